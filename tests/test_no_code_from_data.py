"""Data is never run: no call of sloth's evaluates text or unpickles a file, and code that it writes is its user's alone."""

from __future__ import annotations

import ast
import json
import os
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sloth import tiny_model, warm

ROOT = Path(__file__).parent.parent
FILES = [f for folder in ("src", "examples") for f in sorted((ROOT / folder).rglob("*.py"))]
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "runpy.run_path",
    "builtins.eval", "builtins.exec", "torch.hub.load", "torch.package.PackageImporter",
}  # fmt: skip
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "yaml"}
# Names of modules that are no text of the call: all from tables of sloth's own, or of packages that Python found itself.
NAMED = {
    "src/__init__.py", "src/doctor.py", "src/warm.py", "src/models/arguments.py", "src/integrations/integration.py",
    "src/compat/inductor.py",
}  # fmt: skip


def wrong(source: str, file: str = "") -> Iterator[str]:
    """Lines of a module that would run, or let others run, what they read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        told = {name: value.value for name, value in given.items() if isinstance(value, ast.Constant)}
        if called in FORBIDDEN:
            yield f"{node.lineno}: {called}"
        if called == "torch.load" and told.get("weights_only") is not True:
            yield f"{node.lineno}: torch.load without weights_only=True"
        if any(told.get(n) is True for n in ("shell", "trust_remote_code", "allow_pickle")) or told.get("weights_only") is False:
            yield f"{node.lineno}: {ast.unparse(node)[:80]}"
        if called.split(".")[-1] == "import_module" and not isinstance(node.args[0], ast.Constant) and file not in NAMED:
            yield f"{node.lineno}: {ast.unparse(node)}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            defaults = [*zip(node.args.args[::-1], node.args.defaults[::-1], strict=False)]
            defaults += [(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None]
            yield from (
                f"{node.lineno}: trust_remote_code={ast.unparse(d)}"
                for a, d in defaults
                if a.arg == "trust_remote_code" and ast.unparse(d) != "False"
            )


def test_no_call_runs_what_it_reads() -> None:
    names = {f: str(f.relative_to(ROOT)) for f in FILES}
    assert not {name: found for f, name in names.items() if (found := list(wrong(f.read_text(), name)))}


@pytest.mark.parametrize(
    "line",
    [
        "eval(config['act'])", "import pickle", "from joblib import load", "torch.load(file)", "load(f, weights_only=False)",
        "import_module(config['module'])", "subprocess.run(line, shell=True)", "f(trust_remote_code=True)",
        "def f(*, trust_remote_code=True): ...", "def f(name, trust_remote_code=None): ...", "yaml.load(text)",
        "np.load(file, allow_pickle=True)",
    ],
)  # fmt: skip
def test_each_such_line_is_seen(line: str) -> None:
    assert list(wrong(line))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list:
    """Whoever looks up a host or connects is noted, and refused; the hub is not said to be offline."""
    asked: list = []

    def refuse(*given: object, **_: object) -> None:
        asked.append(given)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize("held", [FOUR_BIT, GPTQ])
@pytest.mark.parametrize("name", ["config.json", "."])
def test_a_quantised_config_does_not_ask_the_network(held: dict, name: str, tmp_path: Path, no_network: list) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": held}))
    with pytest.raises(tiny_model.ModelError, match="no weights lie beside it"):
        tiny_model.build(str(tmp_path / name))
    tiny_model.full(str(tmp_path / name))
    assert not no_network


def test_code_beside_a_config_is_not_run(tmp_path: Path, no_network: list) -> None:
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | own))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for make in (tiny_model.build, tiny_model.full):
        with pytest.raises(tiny_model.ModelError, match="contains custom code"):
            make(str(tmp_path))
    assert not (tmp_path / "ran").exists() and not no_network


def test_caches_are_their_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask: a file of `warm --save`, and what `warm --load` puts into Triton's cache, hold code."""
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"made", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda _: type("Info", (), {"artifacts": {"a": ["b"]}}))
    monkeypatch.setattr(warm, "_binaries", lambda _: iter([("KEY/kernel.cubin", b"code")]))
    monkeypatch.setattr(warm, "_triton_folders", lambda: [tmp_path / "triton"])
    before = os.umask(0)
    try:
        warm.save(tmp_path / "warm.bin")
        warm.load(tmp_path / "warm.bin")
    finally:
        os.umask(before)
    assert zipfile.ZipFile(tmp_path / "warm.bin").read(warm.ARTIFACTS) == b"made"
    folder = tmp_path / "triton" / "KEY"
    assert (folder / "kernel.cubin").read_bytes() == b"code"
    modes = {f.name: oct(f.stat().st_mode & 0o777) for f in (tmp_path / "warm.bin", folder, folder / "kernel.cubin")}
    assert modes == {"warm.bin": "0o600", "KEY": "0o700", "kernel.cubin": "0o600"}


def test_a_file_that_anybody_may_write_is_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "warm.bin"
    file.write_bytes(b"")
    file.chmod(0o666)
    with pytest.raises(warm.WarmError, match="anybody may write to it"):
        warm.load(file)
