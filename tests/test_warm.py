"""`python -m sloth warm`: what a run compiles is found in the caches, here and behind a file, by a run of the same recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sloth import warm

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "num_hidden_layers": 1,
}  # fmt: skip
AGAIN = """
import sys
from torch._dynamo.utils import counters
from sloth.warm import Recipe, warm
warm(Recipe(sys.argv[1], lora=4, rows=2))
print("hits", counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["total"])
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(**TINY).save_pretrained(folder)
    return folder


def python(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cache.parent, capture_output=True, text=True, timeout=500
    )


@pytest.mark.nightly
def test_a_run_of_the_same_recipe_compiles_nothing_behind_a_file(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "warm.bin"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    done = python(tmp_path / "a" / "cache", "-m", "sloth", "warm", str(config), "--lora", "4", "--rows", "2", "--save", str(file))
    assert done.returncode == 0 and "1 graph(s) compiled" in done.stdout and "MB" in done.stdout, done.stderr[-3000:]
    loaded = python(tmp_path / "b" / "cache", "-m", "sloth", "warm", "--load", str(file))
    assert loaded.returncode == 0 and "entries put into the caches" in loaded.stdout, loaded.stderr[-3000:]
    again = python(tmp_path / "b" / "cache", "-c", AGAIN, str(config))
    hits, total = again.stdout.split("hits")[1].split()
    assert hits == total != "0", again.stderr[-3000:]


def test_a_file_of_another_machine_is_refused_with_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "warm.bin"
    with zipfile.ZipFile(file, "w") as out:
        out.writestr(warm.VERSIONS, json.dumps(warm.versions() | {"device": "NVIDIA H100"}))
        out.writestr(warm.ARTIFACTS, b"")
    with pytest.raises(warm.WarmError, match=r"device NVIDIA H100 \(here"):
        warm.load(file)
    file.write_bytes(b"no such thing")
    with pytest.raises(warm.WarmError, match="is no file of `sloth warm --save`"):
        warm.load(file)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "give a MODEL"),
        (["llama", "--load", "x"], "give a MODEL"),
        (["nowhere"], "nowhere holds no config.json"),
        (["nowhere", "--load-in-4bit"], "--lora RANK"),
        (["nowhere", "--save", "no/such/folder/file"], "there is no folder"),
        (["--load", "nothing.bin"], "nothing.bin"),
        (["--load", "nothing.bin", "--save", "x"], "--load or --save"),
        (["nowhere", "--save", "."], "is a folder"),
    ],
)
def test_bad_input_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from sloth.__main__ import app

    result = CliRunner().invoke(app, ["warm", *arguments])
    assert result.exit_code == 2 and told in result.stderr


def test_binaries_are_found_where_they_are_unpacked(tmp_path: Path) -> None:
    """A group names its files by whole paths: those of the machine that wrote it."""
    group = {"child_paths": {"k.cubin": "/home/another/.triton/KEY/k.cubin"}}
    binaries = {"KEY/__grp__k.json": json.dumps(group).encode(), "KEY/k.cubin": b"code"}
    warm._unpack(binaries, tmp_path)
    (path,) = json.loads((tmp_path / "KEY/__grp__k.json").read_text())["child_paths"].values()
    assert Path(path).read_bytes() == b"code" and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", ["/etc/x", "../x", "KEY/../../x", "KEY//x", "x", "KEY/a/b", "KEY/..", "KEY\\x/y"])
def test_nothing_is_written_outside_of_the_cache(name: str, tmp_path: Path) -> None:
    with pytest.raises(warm.WarmError, match="no name of a file"):
        warm._unpack({name: b"x"}, tmp_path / "cache")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "warm.bin"
    for versions, told in ((warm.versions(), "is damaged"), ([], "its versions are a list")):
        with zipfile.ZipFile(file, "w") as out:
            out.writestr(warm.VERSIONS, json.dumps(versions))
            out.writestr(warm.ARTIFACTS, b"garbage")
        with pytest.raises(warm.WarmError, match=told):
            warm.load(file)


def test_binaries_of_our_kernels_are_found_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton writes them: a folder for each, with a description that names the target."""
    target = type("Target", (), {"backend": "cuda", "arch": 90})
    for name, arch in (("_dequantize_kernel", 90), ("_dequantize_kernel", 80), ("somebody_elses", 90)):
        folder = tmp_path / f"{name}{arch}"
        folder.mkdir()
        (folder / f"__grp__{name}.json").write_text("{}")
        (folder / f"{name}.json").write_text(json.dumps({"target": {"backend": "cuda", "arch": arch}}))
        (folder / f"{name}.cubin").write_bytes(b"code")
    monkeypatch.setattr(warm, "_triton_folders", lambda: [tmp_path])
    assert {Path(name).parent.name for name, _ in warm._binaries(target)} == {"_dequantize_kernel90"}
    assert dict(warm._binaries(target))["_dequantize_kernel90/_dequantize_kernel.cubin"] == b"code"
    assert not list(warm._binaries(None))
