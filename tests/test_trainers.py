"""Every trainer, unmodified: the curve of plain transformers and PEFT, through the backend and through FastLanguageModel."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import LORA, TRAINERS, checkpoint, fast, plain, texts, tokenizer, train

from sloth.rewriter import notices
from sloth.rewriter.backend import listening

pytestmark = pytest.mark.filterwarnings("ignore")
UNLIKE = {"epoch", "step", "step_time", "total_flos", "learning_rate"}  # of what is logged: times
AOT = "sloth.inner_backend=aot_eager"
# Passes that are graphs of their own: without gradients, of the reference, of mismatched pairs.
PASSES = {"DPO": 2, "KTO": 3, "GRPO": 3, "RLOO": 3, "GKD": 2, "online DPO": 2}
OF_DEFAULT = {("ORPO", "adapters of the trainer")}  # it has no head of its own: one graph


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTH_OPTIONS", AOT)
    torch._dynamo.reset()


def base(folder: Path, model: str) -> Any:
    import transformers

    return getattr(transformers, model).from_pretrained(folder, dtype=torch.float32)


def adapters(model: str) -> dict[str, Any]:
    """For the trainer."""
    from peft import LoraConfig

    return {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM" if model == "LlamaForCausalLM" else "SEQ_CLS")}


def compiled(folder: Path, model: str) -> Any:
    """A model without adapters, compiled in place."""
    if model == "LlamaForCausalLM":
        from sloth import FastLanguageModel

        return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, load_in_4bit=False)[0]
    made = base(folder, model)
    made.compile(backend="sloth")
    return made


def assert_same(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=tolerance, abs=tolerance)
        for key in other.keys() - UNLIKE - {"loss"}:
            assert mine[key] == pytest.approx(other[key], rel=30 * tolerance, abs=tolerance), key


def assert_compiled(reports: list[Any]) -> None:
    """All that is there is matched, in each graph that holds a layer."""
    sites = [s for r in reports for s in r.sites]
    missed = [s for s in sites if s.status != "matched"]
    assert {"lora", "rms_norm", "attention"} <= {s.construct for s in sites} and not missed, missed
    assert not any(r.untouched for r in reports) and not notices.was_told("the same code is compiled a last time")


HOW = ("backend", "FastLanguageModel", "adapters of the trainer")
CASES = [
    pytest.param(name, how, marks=[] if (name, how) in OF_DEFAULT else pytest.mark.nightly)
    for name, row in TRAINERS.items()
    for how in HOW
    if not (how == "FastLanguageModel" and row.model != "LlamaForCausalLM")
    and not (how == "adapters of the trainer" and name not in ("SFT", "DPO", "ORPO", "reward", "GRPO"))
]


@pytest.mark.parametrize("name, how", CASES)
def test_the_curve_is_that_of_plain_training(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_said", set())
    row = TRAINERS[name]
    folder = checkpoint(tmp_path / "start", row.model)
    if how == "adapters of the trainer":
        theirs = train(row, base(folder, row.model), tmp_path / "plain", own=adapters(row.model))
    else:
        theirs = train(row, plain(folder, row), tmp_path / "plain")
    with listening() as reports:
        if how == "backend":
            ours = train(row, plain(folder, row), tmp_path / "ours", torch_compile_backend="sloth")
        elif how == "FastLanguageModel":
            ours = train(row, fast(folder, row), tmp_path / "ours")
        else:
            ours = train(row, compiled(folder, row.model), tmp_path / "ours", own=adapters(row.model))
    assert_same(ours, theirs, 1e-4)
    assert_compiled(reports)
    assert how != "backend" or len([r for r in reports if r.sites]) == PASSES.get(name, 1)
    assert all(math.isfinite(entry["loss"]) for entry in ours) and any(entry["grad_norm"] > 0 for entry in ours)
    assert not row.falls or ours[-1]["loss"] < ours[0]["loss"]


RECIPES = {  # more for the configuration, and how near curves are
    "AdamW 8-bit": ({"optim": "adamw_8bit"}, 1e-4),
    "AdamW 8-bit paged": ({"optim": "paged_adamw_8bit"}, 1e-4),
    "AdamW paged": ({"optim": "paged_adamw_32bit"}, 1e-4),
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 1e-4),
    "checkpointing": ({"gradient_checkpointing": True}, 1e-4),
    "bf16": ({"bf16": True}, 2e-3),
    "fp16 with scaler": ({"fp16": True}, 2e-3),
}


@pytest.mark.nightly
@pytest.mark.parametrize("through", ["backend", "FastLanguageModel"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str, through: str, tmp_path: Path) -> None:
    more, tolerance = RECIPES[recipe]
    row = TRAINERS["Trainer"]
    folder = checkpoint(tmp_path / "start", hidden_size=256)  # from 4,096 numbers on an optimizer of 8 bits has 8 bits
    theirs = train(row, plain(folder, row, r=16), tmp_path / "plain", **more)
    with listening() as reports:
        if through == "backend":
            ours = train(row, plain(folder, row, r=16), tmp_path / "ours", torch_compile_backend="sloth", **more)
        else:
            ours = train(row, fast(folder, row, r=16), tmp_path / "ours", **more)
    assert_same(ours, theirs, tolerance)
    assert_compiled(reports)
    if recipe == "accumulation":  # rows of other lengths weigh as many tokens as they have
        whole = train(row, plain(folder, row, r=16), tmp_path / "whole")
        assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in whole], rel=1e-4)


@pytest.mark.nightly
def test_grpo_generates_by_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curve of plain training, with checkpointing, which the trainer switches off and on around each `generate`."""
    from generating import StandIn

    from sloth import FastLanguageModel
    from sloth.generation import session

    graphs = StandIn()
    monkeypatch.setattr(session, "capture_for", lambda device: graphs)
    monkeypatch.setattr(session, "_compiled", lambda backend: lambda model, inputs: model(**inputs))
    row, more = TRAINERS["GRPO"], {"gradient_checkpointing": True, "max_completion_length": 24}
    folder = checkpoint(tmp_path / "start")
    theirs = train(row, plain(folder, row), tmp_path / "plain", **more)
    model = FastLanguageModel.for_training(fast(folder, row), use_gradient_checkpointing=True)
    with listening() as reports:
        ours = train(row, FastLanguageModel.for_inference(model, replay_steps=True), tmp_path / "ours", **more)
    assert_same(ours, theirs, 1e-4)
    assert_compiled(reports)
    assert graphs.captured == 1 and graphs.replayed > 30


@pytest.mark.nightly
def test_from_the_command_line(tmp_path: Path) -> None:
    """`trl sft … --torch_compile_backend sloth`, and without."""
    folder = checkpoint(tmp_path / "start")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(24)["text"]))
    found = {}
    for name, more in {"plain": [], "ours": ["--torch_compile_backend", "sloth"]}.items():
        out = tmp_path / name
        command = [
            str(Path(sys.executable).parent / "trl"), "sft", "--model_name_or_path", str(folder), "--dataset_name", str(data),
            "--output_dir", str(out), "--max_steps", "3", "--use_cpu", "--bf16", "False", "--logging_steps", "1",
            "--save_steps", "3", "--learning_rate", "1e-2", "--report_to", "none", "--use_peft", "--lora_r", "8",
            "--lora_target_modules", "q_proj", "up_proj", "--dtype", "float32", *more,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        logged = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        found[name] = [entry["loss"] for entry in logged]
        assert ("LoRA projection" in done.stderr) == (name == "ours"), done.stderr[-2000:]
    assert found["ours"] == pytest.approx(found["plain"], rel=1e-4) and len(found["ours"]) == 3


# ---------------------------------------------------------------- what scripts do with a model that is compiled


def test_adapters_that_a_trainer_adds_are_saved(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from sloth import FastLanguageModel

    model = compiled(checkpoint(tmp_path / "start"), "LlamaForCausalLM")
    around = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False))
    FastLanguageModel.save_pretrained_merged(around, tmp_path / "adapters", save_method="lora")
    assert (tmp_path / "adapters/adapter_config.json").exists() and not (tmp_path / "adapters/config.json").exists()
    with pytest.raises(ValueError, match="a trainer put the adapters around this model"):
        around.save_pretrained_merged(tmp_path / "other", save_method="lora")  # the model's within
    around.save_pretrained_merged(tmp_path / "merged", dtype=torch.float32)
    model._compiled_call_impl, ids = None, torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(base(tmp_path / "merged", "LlamaForCausalLM").eval()(ids).logits, around.eval()(ids).logits)


def test_names_that_trl_had_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As scripts for Unsloth call it: a warning says today's names, and what TRL has no name for is an error still."""
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    import sloth.models.fast  # noqa: F401

    model = plain(checkpoint(tmp_path / "start"), TRAINERS["SFT"])
    given = {"model": model, "tokenizer": tokenizer(), "train_dataset": Dataset.from_dict({"words": texts(4)["text"]})}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.5, report_to="none")
    trainer = SFTTrainer(**given, args=arguments, dataset_text_field="words", max_seq_length=7, packing=False)
    assert type(trainer.args) is SFTConfig and (trainer.args.max_length, trainer.args.learning_rate) == (7, 0.5)
    assert trainer.processing_class is given["tokenizer"] and max(map(len, trainer.train_dataset["input_ids"])) == 7
    assert "processing_class=…, SFTConfig(dataset_text_field=…, max_length=…, packing=…)" in caplog.text
    config = SFTConfig(str(tmp_path), use_cpu=True, dataset_text_field="words", max_seq_length=9)
    assert SFTTrainer(**given, args=config).args.max_length == 9
    assert SFTTrainer(**given, args=config, max_seq_length=8).args.max_length == 8 and config.max_length == 9
    with pytest.raises(TypeError, match="maximum"):
        SFTTrainer(**given, args=config, maximum=3)
    with pytest.raises(TypeError, match="both are given"):
        SFTTrainer(**given, args=config, processing_class=tokenizer())
    pairs = Dataset.from_dict(TRAINERS["DPO"].data(4))
    config = DPOConfig(str(tmp_path), use_cpu=True)
    preferring = DPOTrainer(model, ref_model=None, tokenizer=tokenizer(), train_dataset=pairs, args=config, beta=0.3)
    assert preferring.args.beta == 0.3


def test_a_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from sloth import TrainingChart

    row, drawn = TRAINERS["Trainer"], [TrainingChart(), TrainingChart(tmp_path / "more" / "chart.png")]
    folder = checkpoint(tmp_path / "start")
    logged = train(row, plain(folder, row), tmp_path / "out", own={"callbacks": drawn}, include_num_input_tokens_seen=True)
    for file in (tmp_path / "out" / "training.png", tmp_path / "more" / "chart.png"):
        assert file.read_bytes().startswith(b"\x89PNG") and not [*file.parent.glob(".*")]
    chart = drawn[0]
    assert chart.losses == [(i + 1, entry["loss"]) for i, entry in enumerate(logged)]
    assert chart.unit == "tokens" and len(chart.rates) == len(chart.memory) == len(logged) == 4
    assert all(rate > 20 for _, rate in chart.rates) and all(0.01 < gib < 99 for _, gib in chart.memory)
    (tmp_path / "file").touch()
    lost = TrainingChart(tmp_path / "file" / "chart.png")
    train(row, plain(folder, row), tmp_path / "out", steps=2, own={"callbacks": [lost]})
    assert "is not drawn: " in caplog.text and lost.unit == "steps" and len(lost.rates) == 2
