"""The short examples, run to their end on the CPU, with a compiler and without: nightly."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from sloth.rewriter.backend import listening
from sloth.rewriter.compile import inductor

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("unsloth_style", "sft", "dpo", "grpo", "packed_sft", "long_context", "full_finetuning")
pytestmark = pytest.mark.filterwarnings("ignore")


def run(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the script leaves."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import made

    monkeypatch.setattr(sys, "argv", [name])
    model = made.model_name()
    monkeypatch.setattr(sys, "argv", [name, model, str(out)])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def losses(left: dict[str, Any], printed: str) -> list[float]:
    trainer = left.get("trainer")
    if trainer is None:
        return [float(x) for x in re.findall(r"loss (\d+\.\d+)", printed)]
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_without_a_compiler(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sloth.models.fast.compile_in_place", lambda *_, **__: None)
    left = run(name, tmp_path, monkeypatch)
    found = losses(left, capsys.readouterr().out)
    assert found and (name == "grpo" or found[-1] < found[0])
    folders = [p.parent for p in tmp_path.rglob("*config.json") if p.name in ("config.json", "adapter_config.json")]
    assert folders and all((f / "tokenizer.json").exists() for f in folders)


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_compiled_as_without(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same losses, and all of the model matched."""
    monkeypatch.setattr(inductor, "_inductor", lambda _, *graph: lookup_backend("aot_eager")(*graph))
    torch._dynamo.reset()
    with listening() as reports:
        left = run(name, tmp_path / "ours", monkeypatch)
    ours = losses(left, capsys.readouterr().out)
    sites = [s for r in reports for s in r.sites if s.construct != "attention"]
    assert sites and all(s.status == "matched" for s in sites) and not any(r.untouched for r in reports)
    assert name != "full_finetuning" or len(reports) == 1
    monkeypatch.setattr("sloth.models.fast.compile_in_place", lambda *_, **__: None)
    left = run(name, tmp_path / "eager", monkeypatch)
    assert ours == pytest.approx(losses(left, capsys.readouterr().out), rel=1e-4, abs=1e-6)
