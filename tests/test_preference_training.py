"""TRL's preference trainers, eager and with sloth: the same losses, metrics and gradients.

DPOTrainer and GRPOTrainer have a head of their own in the model's forward; TPOTrainer takes log-probabilities and entropies of
the model's logits.
"""

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._dynamo.backends.registry import lookup_backend
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from sloth.lazy import rows as lazy_rows
from sloth.rewriter.backend import listening
from sloth.rewriter.compile import inductor

STEPS, WORDS = 2, 30_000
CUDA = torch.cuda.is_available()
SENTENCE = "the sloth hangs in the tree and moves one arm a day while all the leaves grow green"
TEXT = SENTENCE.split()
CONFIG = LlamaConfig(
    vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tokenizer():
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(TEXT)])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def rows(*columns: str) -> Dataset:
    said = lambda i, n: " " + " ".join(TEXT[i % 5 : i % 5 + n])  # noqa: E731
    return Dataset.from_dict(
        {"prompt": ["the sloth"] * 8} | {c: [said(i + j, 4) for i in range(8)] for j, c in enumerate(columns)}
    )


class Gradients(transformers.TrainerCallback):
    """What the optimizer gets."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, *_, model, **__):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def reward(completion_ids, **_):
    return [ids[0] / WORDS for ids in completion_ids]


TRAINERS = {  # trainer, its configuration and more of that, columns of the data, heads that are found, more for the trainer
    "DPO": (DPOTrainer, DPOConfig, {"max_length": 16}, ("chosen", "rejected"), 0, {}),
    "TPO": (TPOTrainer, TPOConfig, {"max_length": 16}, ("chosen", "rejected", "reference"), 1, {}),
    "GRPO": (
        GRPOTrainer,
        GRPOConfig,
        {"max_completion_length": 4, "num_generations": 2, "beta": 0.1, "num_iterations": 2},
        (),
        0,
        {"reward_funcs": reward},
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.nightly
def test_same_curve(name, tokenizer, tmp_path, monkeypatch):
    trainer, config, more, columns, heads, own = TRAINERS[name]
    monkeypatch.setattr(inductor, "_inductor", lambda _, *graph: lookup_backend("aot_eager")(*graph))
    monkeypatch.setattr(lazy_rows, "CHUNK", WORDS * 4)
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(start := tmp_path / "start")  # DPO loads its reference again
    found = []
    for backend in (None, "sloth"):
        torch._dynamo.reset()
        arguments = config(
            output_dir=str(tmp_path), torch_compile=backend is not None, torch_compile_backend=backend, use_cpu=not CUDA,
            max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, save_strategy="no",
            report_to="none", bf16=False, gradient_checkpointing=False, **more,
        )  # fmt: skip
        seen = Gradients()
        with listening() as reports:
            run = trainer(
                LlamaForCausalLM.from_pretrained(start),
                args=arguments,
                train_dataset=rows(*columns),
                processing_class=tokenizer,
                callbacks=[seen],
                **own,
            )
            torch.backends.cuda.matmul.allow_tf32 = False  # accelerate turns it on for compiled models alone
            run.train()
        logs = [entry for entry in run.state.log_history if "loss" in entry]
        found.append((logs, seen.steps, reports))
    (eager_logs, eager_steps, _), (logs, steps, reports) = found
    assert not any(r.untouched for r in reports)
    matched = [s for r in reports for s in r.sites if s.construct == "head"]
    assert bool(heads) == bool(matched) and all(s.status == "matched" for s in matched)
    assert len(logs) == len(steps) == STEPS
    for ours, eager in zip(logs, eager_logs, strict=True):
        for key in eager.keys() - {"epoch", "step", "step_time"}:
            assert ours[key] == pytest.approx(eager[key], rel=1e-3, abs=1e-4), key
    assert all(g.any() for g in eager_steps[0].values())
    for ours, eager in zip(steps, eager_steps, strict=True):
        for key, value in eager.items():
            assert (ours[key] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-7, key
