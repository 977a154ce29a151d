"""TRL's own head where its size follows values, as on a GPU: the body is one graph, and what is told is no warning."""

from __future__ import annotations

import inspect
import logging
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sloth.integrations.trl import BEHIND, _cut
from sloth.rewriter import notices
from sloth.rewriter.backend import listening

pytest.importorskip("trl")
import trl.trainer.sft_trainer as sft_trainer
import trl.trainer.utils as utils
from trl import SFTConfig, SFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(utils, "_use_triton"), reason="TRL 1.15 has another head"),
]
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    pad_token_id=0,
    eos_token_id=1,
)  # fmt: skip


@pytest.fixture
def tokenizer():
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """TRL takes the positions with labels alone where its Triton kernels run."""
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)


def trained(tmp_path, tokenizer, made=lambda: None, **compiling) -> list[float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    rows = [{"input_ids": [5 + (i * j) % 200 for j in range(1, 8 + i % 7)]} for i in range(16)]
    args = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, bf16=True, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, max_length=64, learning_rate=1e-2,
        gradient_checkpointing_kwargs={"use_reentrant": False}, **compiling,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=LlamaForCausalLM(CONFIG), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert "input_ids" in inspect.signature(trainer.model.get_base_model().forward).parameters, "generate asks for it"
    made()
    trainer.train()
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.mark.nightly
@pytest.mark.parametrize("imported", ["before", "after the trainer is made", "when the model is compiled"])
def test_the_body_is_one_graph(imported, on_a_gpu, tmp_path, tokenizer, caplog, monkeypatch):
    """By the backend's name alone, sloth is imported when the model is compiled: the trainer has added the head by then."""
    monkeypatch.setattr(notices, "_said", set())
    made = lambda: None  # noqa: E731
    if imported != "before":
        add = inspect.unwrap(utils.add_fused_lm_head)
        for module in (utils, sft_trainer):
            monkeypatch.setattr(module, "add_fused_lm_head", add)
        made = partial(_cut, utils)
    if imported == "when the model is compiled":  # accelerate has put autocast around the model's forward by then
        made, compiles = (lambda: None), torch.compile
        monkeypatch.setattr(torch, "compile", lambda *a, **k: _cut(utils) or compiles(*a, **k))
    eager = trained(tmp_path, tokenizer)
    counters.clear()
    with listening() as reports, caplog.at_level(logging.INFO, "sloth"):
        ours = trained(tmp_path, tokenizer, made, torch_compile_backend="sloth")
    assert ours == pytest.approx(eager, abs=2e-3) and len(eager) == 3
    assert counters["stats"]["unique_graphs"] == 1
    (report,) = (r for r in reports if r.sites)
    found = {s.construct: s.status for s in report.sites}
    assert found["lora"] == "matched" and found["attention"] == "matched"
    told = [r for r in caplog.records if BEHIND in r.message]
    assert len(told) == 1 and told[0].levelno == logging.INFO
    assert not [r.message for r in caplog.records if "not one graph" in r.message]
