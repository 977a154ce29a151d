"""To the hub, tried against a local server that speaks its API; and to GGUF, with a converter in llama.cpp's place."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import batch_of, checkpoint, loaded

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from sloth import FastLanguageModel

    model, tokenizer = loaded(checkpoint(tmp_path_factory.mktemp("publishing") / "base"), load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)
    model._compiled_call_impl = None
    return model.eval(), tokenizer


class Hub(ThreadingHTTPServer):
    """Repositories, objects of LFS, files that were committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.made: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """What huggingface_hub asks for in create_repo and upload_folder. Weights go by LFS, the rest in the commit."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_PUT(self) -> None:
        content = self.body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.reply({})

    def do_POST(self) -> None:
        body, url = self.body(), self.server.url
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.reply({"url": f"{url}/me/tuned", "name": "me/tuned"})
        elif "/preupload/" in self.path:
            asked = [f["path"] for f in json.loads(body)["files"]]
            modes = {p: "lfs" if p.endswith((".safetensors", ".gguf")) else "regular" for p in asked}
            self.reply({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{url}/lfs/{o['oid']}"}}} for o in objects]
            self.reply({"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.objects[value["oid"]]
            self.reply({"commitUrl": f"{url}/me/tuned/commit/{'a' * 40}", "commitOid": "a" * 40, "pullRequestUrl": None})
        else:
            self.reply({})

    def do_GET(self) -> None:
        self.reply({})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()


@torch.no_grad()
def test_merged_and_pushed(adapted: tuple[Any, Any], hub: Hub, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = adapted
    done = model.push_to_hub_merged("me/tuned", tokenizer, token="hf_secret", private=True, dtype=torch.float32)
    assert done.oid == "a" * 40 and "private" in json.dumps(hub.made) and hub.tokens == {"Bearer hf_secret"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= hub.files.keys()
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    again, same = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = batch_of(tokenizer)
    assert batch_of(same)["input_ids"].equal(ids["input_ids"]) and same.pad_token == tokenizer.pad_token
    torch.testing.assert_close(again(**ids).logits, model(**ids).logits, rtol=1e-4, atol=1e-4)


CONVERTER = """
import json, sys
from pathlib import Path
model, _, out, _, kind = sys.argv[1:]
assert json.loads(Path(model, "config.json").read_text())["dtype"] == "bfloat16" and Path(model, "tokenizer.json").exists()
Path(out).write_text(f"{Path(model).name} {kind}")
"""
QUANTIZE = """#!/bin/sh
echo "$3 of $(cat "$1")" > "$2"
"""


def llama_cpp(folder: Path, converter: str = CONVERTER, quantize: bool = True) -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(converter)
    if quantize:
        (folder / "llama-quantize").write_text(QUANTIZE)
        (folder / "llama-quantize").chmod(0o755)
    return folder


def test_gguf(adapted: tuple[Any, Any], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = adapted
    monkeypatch.setenv("LLAMA_CPP", str(llama_cpp(tmp_path / "llama.cpp")))
    files = model.save_pretrained_gguf(tmp_path / "tuned", tokenizer, quantization_method=["Q8_0", "quantized"])
    assert [f.name for f in files] == ["tuned.q8_0.gguf", "tuned.q4_k_m.gguf"]
    assert [f.read_text().strip() for f in files] == ["tuned q8_0", "Q4_K_M of tuned f16"]
    assert sorted((tmp_path / "tuned").iterdir()) == sorted(files)
    model.push_to_hub_gguf("me/tuned", tokenizer, "not_quantized")
    assert hub.files.keys() == {"tuned.bf16.gguf"}


def test_gguf_without_a_converter_or_with_one_that_fails(
    adapted: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = adapted
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match=r"llama\.cpp's converter, and there is none: git clone"):
        model.save_pretrained_gguf("tuned", tokenizer)
    monkeypatch.setenv("LLAMA_CPP", str(llama_cpp(tmp_path / "failing", "raise SystemExit('no such kind of model')", False)))
    with pytest.raises(RuntimeError, match="q4_k_m is made by llama-quantize, and there is none"):
        model.save_pretrained_gguf("tuned", tokenizer, "q4_k_m")
    with pytest.raises(RuntimeError, match=r"convert_hf_to_gguf.py failed:\nno such kind of model"):
        model.save_pretrained_gguf("tuned", tokenizer)
    with pytest.raises(ValueError, match="give a name of llama"):
        model.save_pretrained_gguf("tuned", tokenizer, 8)
    assert not (tmp_path / "tuned").exists()
