"""The model and one training run of the fine-tuning example: `python training.py RUN_FOLDER BACKEND [--resume]`.

Each contender trains in a process of its own, so that memory, caches and random state are its own too. It starts from
OUT/start, and leaves OUT/runs/BACKEND/result.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_folder import BadInput, RunFolder, Settings, last_checkpoint, replaced, write_json
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

# One progress bar is enough, and so is one voice: what matters here is checked and said by the example itself.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

HEAD_DIM = 64
POSITIONS = 1024
WARMUP = 3  # steps not timed: the first compiles, the next ones fill caches and pools
EVALUATIONS = 3  # evaluations (and checkpoints) a run


def make_config(settings: Settings) -> PreTrainedConfig:
    """The configuration of the model: that of `--model`, or a small one of `--arch`."""
    if settings.model:
        try:
            return AutoConfig.from_pretrained(settings.model)
        except (OSError, ValueError) as error:
            raise BadInput(f"--model {settings.model} cannot be loaded: {_first_line(error)}") from error
    try:
        defaults = AutoConfig.for_model(settings.arch)
    except ValueError as error:
        raise BadInput(f"--arch {settings.arch} is no model type of transformers: llama, qwen3, gemma2, …") from error
    if settings.hidden % 2 or (settings.hidden > HEAD_DIM and settings.hidden % HEAD_DIM):
        raise BadInput(f"--hidden {settings.hidden} cannot be cut into heads: give a multiple of {HEAD_DIM}")
    known = defaults.to_dict()
    sizes = {name: value for name, value in _sizes(settings).items() if name in known or name in defaults.attribute_map}
    # Dropout draws its noise in another order under a compiler: the curves could not be compared.
    sizes |= {name: 0.0 for name in known if name.endswith(("dropout", "_pdrop"))}
    try:
        config = AutoConfig.for_model(settings.arch, **sizes)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever that class raises, it is no causal model of these sizes
        raise BadInput(
            f"--arch {settings.arch} cannot be built with --hidden {settings.hidden} --layers {settings.layers}: "
            f"{_first_line(error)}"
        ) from error
    return config


def _sizes(settings: Settings) -> dict[str, Any]:
    """Sizes by the names that the architectures give them; each takes those that it knows."""
    heads = max(1, settings.hidden // HEAD_DIM)
    groups = heads // 3 if heads % 3 == 0 else heads // 2 if heads % 2 == 0 else heads
    wide = settings.hidden * 8 // 3 // 32 * 32
    return {
        "hidden_size": settings.hidden,
        "intermediate_size": wide,
        "moe_intermediate_size": wide // 2,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": settings.hidden // heads,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": POSITIONS,
        "vocab_size": settings.vocab,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "use_cache": False,
        "is_decoder": True,  # BERT and its kin look ahead otherwise
    }


def _first_line(error: Exception) -> str:
    """The first line of a message: ours are one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


def check_sequence(config: PreTrainedConfig, seq: int) -> None:
    """Refuse a sequence longer than the model has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and seq > positions:
        raise BadInput(f"--seq {seq} is longer than the {positions} positions of the model: give at most {positions}")


def save_start(settings: Settings, config: PreTrainedConfig, folder: Path) -> None:
    """Save the model that every contender starts from."""
    set_seed(settings.seed)
    if settings.model:
        try:
            model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        except Exception as error:  # missing or damaged weights are reported by half a dozen kinds of exception
            raise BadInput(f"--model {settings.model} cannot be loaded: {_first_line(error)}") from error
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)


def load_model(folder: Path) -> PreTrainedModel:
    """Load a saved model in fp32: on a GPU the arithmetic is bf16, by autocast, and the weights stay fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False)


class Blocks(Dataset):
    """Rows of token ids; the labels are the ids (the model shifts them itself)."""

    def __init__(self, file: Path) -> None:
        self.ids = torch.from_numpy(np.load(file))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}

    def batch(self, size: int, device: torch.device | str) -> dict[str, torch.Tensor]:
        """The first `size` rows as the model takes them."""
        return {"input_ids": self.ids[:size].to(device), "labels": self.ids[:size].to(device)}


class Recorder(TrainerCallback):
    """Times the steps and shows them as a progress bar."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.started = 0.0
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", leave=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        self.bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        shown = {name: f"{logs[name]:.4f}" for name in ("loss", "eval_loss") if name in logs}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()


def argument_values(settings: Settings, backend: str, folder: Path, checkpoints: bool) -> dict[str, Any]:
    """The Trainer's arguments: the same for each contender, but for the compiler."""
    every = max(1, settings.steps // EVALUATIONS)
    compiled = backend != "eager"
    return dict(
        output_dir=str(folder),
        torch_compile=compiled,
        torch_compile_backend=backend if compiled else None,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup",  # does not depend on --steps: a resumed run may be made longer
        warmup_steps=10,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps" if checkpoints else "no",
        save_steps=every,
        save_total_limit=2,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN is to be seen
        disable_tqdm=True,  # the bar is the Recorder's
        report_to="none",
        seed=settings.seed,
    )


def peak_memory() -> int:
    """Bytes at the peak: allocated on the GPU, or resident in this process.

    ru_maxrss survives exec on Linux (a child starts with the peak of its parent), so VmHWM is read where there is one.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits in evaluation mode, as they come out of `model`."""
    model.eval()
    return model(**batch).logits.float()


def save_and_reload(trainer: Trainer, run: RunFolder, batch: dict[str, torch.Tensor]) -> float:
    """Save the model, load it as any user would, and compare logits. Returns the compiled model's relative difference.

    The weights must come back bit for bit, so plain code on them must too; compiled code may round otherwise.
    """
    compiled = logits_of(trainer.model_wrapped, batch)
    trained = trainer.accelerator.unwrap_model(
        trainer.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False
    )  # without autocast and without compiler
    with replaced(run.model) as folder:
        trained.save_pretrained(folder)
        AutoTokenizer.from_pretrained(run.tokenizer).save_pretrained(folder)
    reloaded = load_model(run.model).to(trained.device)
    expected, got = logits_of(trained, batch), logits_of(reloaded, batch)
    if not torch.equal(expected, got):
        raise AssertionError(f"the reloaded model's logits differ by {(expected - got).abs().max():.3g}")
    difference = ((compiled - got).abs().max() / got.abs().max()).item()
    limit = 5e-2 if torch.cuda.is_available() else 1e-3  # bf16 against fp32, or the same precision
    if not difference <= limit:
        raise AssertionError(f"the compiled model's logits differ from plain ones by {difference:.3g} of the largest")
    return difference


def measured(trainer: Trainer, recorder: Recorder, settings: Settings, memory: int) -> dict[str, Any]:
    """What a run shows: its curve, its speed, its memory."""
    history = trainer.state.log_history
    seconds = recorder.seconds
    steady = statistics.median(seconds[WARMUP:] or seconds)
    return {
        "steps": trainer.state.global_step,
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "eval": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "seconds": seconds,
        "tokens_per_second": settings.tokens_a_step / steady,
        "compile_seconds": max(0.0, seconds[0] - steady),
        "peak_memory": memory,
    }


def train(run: RunFolder, backend: str, *, resume: bool) -> None:
    """Train with one backend, and leave what was measured in the run folder."""
    settings = run.read_settings()
    main = backend == settings.backend
    folder = run.contender(backend)
    done = read_result(run, backend)
    if resume and done and done["steps"] >= settings.steps:
        print(f"{backend}: the run had its {done['steps']} steps already")
        return
    recorder = Recorder(backend)
    trainer = Trainer(
        model=load_model(run.start),
        args=TrainingArguments(**argument_values(settings, backend, folder, checkpoints=main)),
        train_dataset=Blocks(run.tokens / "train.npy"),
        eval_dataset=Blocks(run.tokens / "eval.npy"),
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder, settings.steps) if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    memory = peak_memory()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.state.global_step not in evaluated:
        trainer.evaluate()
    result = measured(trainer, recorder, settings, memory)
    if main:
        batch = Blocks(run.tokens / "eval.npy").batch(settings.batch, trainer.args.device)
        result["logits_difference"] = save_and_reload(trainer, run, batch)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(run.result_file(backend), result)


def main() -> None:
    """Entry point of the process of one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("backend")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    train(RunFolder(options.run), options.backend, resume=options.resume)


def read_result(run: RunFolder, backend: str) -> dict[str, Any] | None:
    """What a finished contender measured, or None."""
    try:
        return json.loads(run.result_file(backend).read_text())
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
