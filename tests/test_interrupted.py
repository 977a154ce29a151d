"""What was interrupted goes on as if nothing had been: training that is resumed, and caches that others left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

MODEL = """
import torch, sloth
from torch import nn
import torch.nn.functional as F
torch.manual_seed(0)
torch.set_num_threads(1)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        h = self.norm(x)
        return (x + self.down(F.silu(self.gate(h)) * self.up(h))).pow(2).mean()

def step(call):
    model.zero_grad()
    loss = call(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

model, x = Block(), torch.randn(2, 5, 16)
wanted = step(model)
torch.testing.assert_close(step(torch.compile(model, backend="sloth")), wanted, rtol=1e-4, atol=1e-6)
print("right")
"""


def process(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", MODEL], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def is_right(run: subprocess.Popen[str]) -> None:
    out, error = run.communicate(timeout=300)
    assert run.returncode == 0 and out.strip() == "right", error[-3000:]


def files(cache: Path) -> list[Path]:
    return [f for f in cache.rglob("*") if f.is_file()]


@pytest.mark.nightly
def test_processes_share_a_cache_that_others_damaged(tmp_path: Path) -> None:
    """One is killed while it compiles; two begin at once on what it left; then each file is cut in half."""
    killed = process(tmp_path)
    while killed.poll() is None and not files(tmp_path):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    for run in [process(tmp_path), process(tmp_path)]:
        is_right(run)
    for file in files(tmp_path):
        os.truncate(file, file.stat().st_size // 2)
    is_right(process(tmp_path))


# ---------------------------------------------------------------- training


class Interrupted(transformers.TrainerCallback):
    """In the middle of its fifth step."""

    def on_substep_end(self, args: object, state: transformers.TrainerState, *_: object, **__: object) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def trainer(folder: Path, *callbacks: transformers.TrainerCallback) -> transformers.Trainer:
    """Of a model whose dropout draws random numbers, on batches of several lengths, that saves every second step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    draw = random.Random(7)
    rows = [{"input_ids": ids, "labels": ids} for ids in ([draw.randrange(97) for _ in range(12 + i % 3)] for i in range(32))]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, attention_dropout=0.2,
        )
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
        save_steps=2, logging_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True, torch_compile_backend="sloth", seed=3,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=_padded, callbacks=list(callbacks))


def _padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["labels"]) for row in batch)
    return {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in batch]) for k, v in
            {"input_ids": 0, "labels": -100}.items()}  # fmt: skip


def losses(of: transformers.Trainer) -> list[float]:
    return [h["loss"] for h in of.state.log_history if "loss" in h]


@pytest.mark.nightly
def test_training_that_was_interrupted_resumes_to_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, with the weights that it would have had."""
    monkeypatch.setenv("SLOTH_OPTIONS", "sloth.inner_backend=aot_eager")
    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "broken", Interrupted()).train()
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    resumed = trainer(tmp_path / "broken")
    torch.rand(7)  # dropout goes on where it was, not where this process is
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
