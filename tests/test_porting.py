"""The contributor's path: each miss beside what came nearest, files for a new entry, and the page that walks a port."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from test_docs import essence, first_column, section
from typer.testing import CliRunner

import sloth
from sloth import new_pattern
from sloth.__main__ import app
from sloth.near_misses import TO_DO, near_misses
from sloth.rewriter.report import GraphReport, Report, Site
from sloth.tiny_model import ModelError, as_trained, build

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "porting.md").read_text()
RULES = ["--isolated", "--line-length", "130", "--select", "E,F,I,B,UP,SIM,RUF", "--ignore", "E741,RUF001,RUF002,RUF003,RUF021"]

spec = importlib.util.spec_from_file_location("walk", ROOT / "docs" / "walk.py")
walk = importlib.util.module_from_spec(spec)
spec.loader.exec_module(walk)


def lint(folder: Path, *rules: str) -> None:
    for how in (["check", "--no-cache", *rules], ["format", "--check", "--no-cache", *rules[:3]]):
        done = subprocess.run([sys.executable, "-m", "ruff", *how, "."], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_files_of_a_new_entry_pass_lint(tmp_path: Path) -> None:
    """In a folder of one's own, and in a checkout of sloth under its own rules."""
    own, checkout = tmp_path / "own", tmp_path / "checkout"
    for folder in (own, checkout / "src" / "patterns", checkout / "src" / "kernels", checkout / "tests" / "kernels"):
        folder.mkdir(parents=True)
    (checkout / "src" / "patterns" / "__init__.py").touch()
    (checkout / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for folder in (own, checkout):
        files, _ = new_pattern.write(folder, "an_odd_norm")
        assert len(files) == 3 + (folder is own)
        for file in files:
            compile(file.read_text(), file.name, "exec")
        kernels = files[0].read_text()  # its operators are in the table of those, and chosen as those are
        assert kernels.count("= implementations(") == 2 and "use_triton" not in kernels
    lint(own, *RULES)
    lint(checkout)


def test_a_new_entry_overwrites_nothing(tmp_path: Path) -> None:
    for name, told in [
        ("rms_norm", "an entry named rms_norm already"),
        ("Soft-Norm", "lower-case"),
        ("class", "lower-case"),
    ]:
        done = CliRunner().invoke(app, ["new-pattern", name, "--folder", str(tmp_path)])
        assert done.exit_code == 2 and told in done.stderr and not [*tmp_path.iterdir()]
    new_pattern.write(tmp_path, "soft")
    (tmp_path / "test_soft.py").write_text("mine")
    with pytest.raises(new_pattern.NewPatternError, match="there already"):
        new_pattern.write(tmp_path, "soft")
    assert (tmp_path / "test_soft.py").read_text() == "mine"


def test_a_new_entry_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src" / "patterns").mkdir(parents=True)
    (tmp_path / "src" / "patterns" / "__init__.py").touch()
    (tmp_path / "src" / "kernels" / "linear").mkdir(parents=True)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(new_pattern.NewPatternError, match=r"no folder .*tests/kernels"):
        new_pattern.write(tmp_path, "soft")
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    with pytest.raises(new_pattern.NewPatternError, match="operator sloth::lora_linear already"):
        new_pattern.write(tmp_path, "lora_linear")
    with pytest.raises(new_pattern.NewPatternError, match="kernels/linear is there already"):
        new_pattern.write(tmp_path, "linear")
    write_text = Path.write_text

    def full_disk(file: Path, text: str) -> int:
        if "patterns" in file.parts:
            raise OSError(28, "No space left on device")
        return write_text(file, text)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(new_pattern.NewPatternError, match="No space left"):
        new_pattern.write(tmp_path, "soft")
    assert {*tmp_path.rglob("*")} - before == {tmp_path / "tests", tmp_path / "tests" / "kernels"}


def test_edits_of_the_page_fit_what_is_written(tmp_path: Path) -> None:
    def only_writes(command: str, folder: Path, output: str) -> str:
        if "new-pattern" not in command:
            return output
        files, steps = new_pattern.write(folder, command.split()[-1])
        return "".join(
            f"{line}\n" for line in [*(f"wrote {f.name}" for f in files), *(f"{i}. {s}" for i, s in enumerate(steps, 1))]
        )

    assert walk.walked(PAGE, tmp_path, only_writes) == PAGE, "python docs/walk.py docs/porting.md"
    lint(tmp_path, *RULES)
    written = "".join(f.read_text() for f in tmp_path.glob("*soft_norm*.py"))
    assert ".abs" not in written and "sign" not in written  # nothing of the example is left


@pytest.mark.nightly
def test_the_page_prints_what_it_shows(tmp_path: Path) -> None:
    """If not: python docs/walk.py docs/porting.md"""

    def run(command: str, folder: Path, output: str) -> str:
        printed = walk.printed(command, folder)
        if " verify " not in command:
            return re.sub(r"in \d+\.\d+s.*", "in _", printed)
        assert printed.splitlines()[-1] == output.splitlines()[-1] and "soft_norm[wide]" in printed  # its numbers are the CPU's
        return output

    assert essence(walk.walked(PAGE, tmp_path, run)) == essence(re.sub(r"in \d+\.\d+s.*", "in _", PAGE))


def test_a_miss_is_shown_beside_the_nearest_reference(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text("x = 1\ny = torch.rsqrt(x).sqrt()\n")
    miss = ("structure", str(file), 2)
    sites = [Site("rms_norm", v, *miss, "expected mul") for v in ("add_rms_norm[llama]", "rms_norm[llama]", "rms_norm[llama]")]
    sites += [Site("rope", "", "constant", str(file), 1, "another"), Site("rms_norm", "rms_norm[llama]", "matched", str(file), 2)]
    first, second = near_misses(Report([GraphReport(sites)], titles={"rms_norm": "RMSNorm"})).split("\n\n")
    assert first.startswith("RMSNorm ×3, model.py:2: structure\n  the model has     y = torch.rsqrt(x).sqrt()\n")
    assert "rms_norm[llama], sloth/patterns/rms_norm.py:" in first and "h = x.float()" in first and "new-pattern" in first
    assert second.startswith("rope ×1") and TO_DO["constant"] in " ".join(second.split())
    held = near_misses(Report([GraphReport([sites[0]])]))
    assert "def both(x, residual" in held and "def llama(x, weight" in held  # what it is made of, too
    assert "no near misses" in near_misses(Report([GraphReport(sites[-1:])]))


def test_a_miss_is_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "models.py").write_text(MODELS)
    missed = Report([GraphReport([Site("rope", "", "constant", str(file), 1, "another")])], breaks=["a break"])
    monkeypatch.setattr(sloth, "explain", lambda model, batch: missed)
    for flags in ((), ("--near-misses",)):
        told = CliRunner().invoke(app, ["explain", f"{file}:takes", *flags]).stdout
        assert told.count("another") == 1 and "a break" in told


def test_what_is_no_site_is_not_said_to_be_rewritten() -> None:
    for report, told in [
        (Report(expected={"rms_norm": 3}, titles={"rms_norm": "RMSNorm"}), "3 RMSNorm of the modules called"),
        (Report([GraphReport(untouched="it raises")]), "a graph is left as it was: it raises"),
        (Report([GraphReport(unread=Counter({"a_layer": 2}))]), "2 a_layer not looked into"),
    ]:
        assert near_misses(report).startswith(told)


def test_classes_that_no_anchor_sees_are_named() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Seen(Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    class Partial(Norm):
        forward = partial(torch.mul, 2)

    code = Seen.forward.__code__
    site = Site("rms_norm", "rms_norm[llama]", "matched", code.co_filename, code.co_firstlineno + 1)
    model = torch.nn.Sequential(Norm(), Norm(), Seen(), Partial(), torch.nn.Linear(2, 2))
    told = near_misses(Report([GraphReport([site])]), model)
    assert f"code of Norm ×2 (test_porting.py:{Norm.forward.__code__.co_firstlineno})\n" in told


def test_each_status_says_what_to_do() -> None:
    table = section("patterns.md", "When it does not match").split("| status |")[1].split("\n\n")[0]
    assert TO_DO.keys() == first_column(table) - {"matched"}


def test_explain_builds_the_run_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list = []

    def explained(model: torch.nn.Module, batch: dict) -> Report:
        asked.append((model, batch, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return Report()

    monkeypatch.setattr(sloth, "explain", explained)
    flags = ["--near-misses", "--lora", "--4bit", "--dtype", "bfloat16", "--packed", "--batch", "3", "--seq", "5"]
    done = CliRunner().invoke(app, ["explain", "llama", *flags])
    assert done.exit_code == 0 and "no near misses" in done.stdout, done.output
    ((model, batch, autocast, dtype),) = asked
    assert autocast and dtype == torch.bfloat16
    assert batch["input_ids"].shape == (1, 15) and batch["position_ids"].tolist() == [[*range(5)] * 3]
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    assert type(layer.base_layer).__name__ == "Linear4bit" and layer.base_layer.compute_dtype == torch.bfloat16
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in n for n in trained)
    assert CliRunner().invoke(app, ["explain", "llama", "--dtype", "bf16"]).exit_code == 0
    assert {p.dtype for p in asked[-1][0].parameters()} == {torch.bfloat16} and not asked[-1][2]
    done = CliRunner().invoke(app, ["explain", "llama", "--4bit"])
    assert done.exit_code == 2 and "give --lora too" in done.stderr


def test_a_model_of_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\ndef make():\n    return torch.nn.Linear(2, 2).eval()\n\ndef number():\n    return 3\n")
    assert build(f"{file}:make").training
    with pytest.raises(ModelError, match="no adapters"):
        as_trained(build(f"{file}:make"), True, False, None)
    for name, told in [("number", "gives a int"), ("other", "has no function other")]:
        with pytest.raises(ModelError, match=told):
            build(f"{file}:{name}")
    with pytest.raises(ModelError, match="there is no file"):
        build(f"{tmp_path / 'none.py'}:make")


MODELS = """
import torch
from transformers import AutoConfig, AutoModel


class Takes(torch.nn.Linear):
    def forward(self, input_ids, labels):
        return super().forward(input_ids)


def layer():
    return torch.nn.Linear(2, 2)


def takes():
    return Takes(2, 2)


def headless():
    return AutoModel.from_config(AutoConfig.for_model("llama", hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
"""


def test_a_model_that_is_no_causal_lm_is_one_line(tmp_path: Path) -> None:
    (file := tmp_path / "models.py").write_text(MODELS)
    for command, told in [
        ("explain layer", "Linear cannot be called as model(input_ids=…, labels=…)"),
        ("verify layer", "Linear cannot be called as model(input_ids=…, labels=…)"),
        ("verify takes", "Takes has no get_input_embeddings"),
        ("verify takes --checkpointing", "Takes has no gradient_checkpointing_enable"),
        ("explain headless --lora", "PEFT gives LlamaModel no adapters"),
    ]:
        kind, name, *flags = command.split()
        done = CliRunner().invoke(app, [kind, f"{file}:{name}", *flags])
        assert done.exit_code == 2 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1, (command, done.output)
