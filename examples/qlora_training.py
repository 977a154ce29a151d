"""The quantised model and one training run of the QLoRA example: `python qlora_training.py RUN_FOLDER BACKEND`.

Each contender trains in a process of its own, starts from OUT/start, and leaves OUT/runs/BACKEND/result.json. The main one
also leaves OUT/adapter, after it was loaded again, merged and asked for a text. Beside what run_folder.py says:

OUT/start            the base model before it is quantised, with its tokenizer: `--base OUT/start` starts from it again
OUT/adapter          the trained adapter, for plain `PeftModel.from_pretrained`
"""

from __future__ import annotations

import argparse
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import run_folder  # before bitsandbytes, whose warning it silences

# isort: split
import bitsandbytes.functional as bnb
import datasets
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from training import Blocks, Recorder, argument_values, logits_of, measured, peak_memory
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
)
from trl import SFTConfig, SFTTrainer

datasets.disable_progress_bars()
# Renamings that are transformers', PEFT's and TRL's affair, and bitsandbytes on a CPU, where pages are plain memory.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
warnings.filterwarnings("ignore", message="Merge lora module to 4-bit linear")  # `merge` says how much

Checkpointing = Literal["off", "on", "reentrant"]
PROMPT = "def "
NEW_TOKENS = 40
WIDEST_STEP = 0.304  # between the codes −1 and −0.696 of NF4 (Dettmers et al., QLoRA, 2023, appendix E)


@dataclass(frozen=True)
class Settings(run_folder.Settings):
    """What QLoRA adds."""

    base_steps: int
    r: int
    alpha: int
    optim: str
    accumulate: int
    checkpointing: Checkpointing

    @property
    def tokens_a_step(self) -> int:
        """Tokens between two updates of the weights."""
        return self.batch * self.seq * self.accumulate


class RunFolder(run_folder.RunFolder):
    """Paths of a run of this example."""

    made_by = "sloth examples/qlora.py"
    settings_type = Settings
    earlier = "replace it with --force, or choose another"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.adapter = root / "adapter"


def load_quantised(folder: Path) -> PreTrainedModel:
    """The model in `folder` in NF4 with double quantisation, ready for adapters: the rest frozen and in fp32.

    Products are made in bf16 on a GPU, in fp32 on a CPU.
    """
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, device_map={"": 0 if gpu else "cpu"}, dtype=dtype, use_cache=False
    )
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # bitsandbytes repacks weights for good when a CPU with bf16 instructions first evaluates: scales become bf16.
            layer.support_avx512bf16_for_cpu = False
    # Checkpointing is switched on by the trainer.
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def add_adapters(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """LoRA on every linear layer but the head: q, k, v, o, gate, up and down in a Llama."""
    torch.manual_seed(settings.seed)
    # Dropout draws its noise in another order under a compiler: the curves could not be compared.
    lora = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def make_trainer(model: PeftModel, settings: Settings, backend: str, run: RunFolder, recorder: Recorder) -> SFTTrainer:
    """TRL's trainer as in finetune.py, and what QLoRA adds. TRL casts the adapters to bf16, as the QLoRA paper has them."""
    values = argument_values(settings, backend, run.contender(backend), checkpoints=False)
    values |= {
        "eval_strategy": "no",
        "seed": settings.seed + 1,  # other rows than those the base saw first
        "optim": settings.optim,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_checkpointing": settings.checkpointing != "off",
        "gradient_checkpointing_kwargs": {"use_reentrant": settings.checkpointing == "reentrant"},
        "max_length": settings.seq,
    }
    rows = {name: Blocks(run.tokens / f"{name}.npy").ids.tolist() for name in ("train", "eval")}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**values),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows["train"]}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": rows["eval"]}),
        processing_class=AutoTokenizer.from_pretrained(run.tokenizer),
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def save_and_reload(model: PeftModel, run: RunFolder, batch: dict[str, torch.Tensor]) -> PeftModel:
    """Save the adapter, and load it as any user would: without a compiler, onto the base model quantised once more.

    Weights must come back bit for bit. PEFT loads adapters in fp32; cast back, as TRL trained them, logits must be equal too.
    """
    with run_folder.replaced(run.adapter) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(run.tokenizer).save_pretrained(folder)
    reloaded = PeftModel.from_pretrained(load_quantised(run.start), run.adapter, is_trainable=True)
    there = dict(reloaded.named_parameters())
    for name, trained in model.named_parameters():
        if trained.requires_grad:
            there[name].data = there[name].data.to(trained.dtype)
        if not torch.equal(there[name], trained):
            raise AssertionError(f"{name} of the reloaded model differs")
    expected, got = logits_of(model, batch), logits_of(reloaded, batch)
    if not torch.equal(expected, got):
        raise AssertionError(f"the reloaded model's logits differ by {(expected - got).abs().max():.3g}")
    return reloaded


def plain_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every 4-bit weight of `model`, with its adapter if it has one, in fp32."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and not name.endswith(".base_layer"):
            weights[name] = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        elif isinstance(base := getattr(layer, "base_layer", None), Linear4bit):
            weight = bnb.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
            weights[name] = weight + sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    return weights


@torch.no_grad()
def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The loss in evaluation mode."""
    model.eval()
    return model(**batch).loss.item()


def merge(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, dict[str, float]]:
    """Merge the adapter into the 4-bit weights, and say what that changed.

    W + s·B·A is no NF4 tensor: each weight moves to the nearest code of its block of 64, by at most half the widest step times
    the block's largest weight. That much is checked (a little more is allowed: the largest weights are in 8 bits, and W + s·B·A
    is rounded to bf16 on a GPU). What it means for logits depends on the model; rounding the base did the same to it.
    """
    before, weights = logits_of(model, batch), plain_weights(model)
    losses = {"loss_adapter": loss_of(model, batch)}
    with model.disable_adapter():
        losses["loss_base"] = loss_of(model, batch)
    merged = model.merge_and_unload()
    after, rounded = logits_of(merged, batch), plain_weights(merged)
    losses["loss_merged"] = loss_of(merged, batch)
    worst = 0.0
    for name, layer in merged.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        prefix = f"base_model.model.{name}"
        size = layer.weight.quant_state.blocksize
        exact, got = weights[prefix].reshape(-1, size), rounded[name].reshape(-1, size)
        largest = exact.abs().amax(1, keepdim=True)
        off = (exact - got).abs()
        if not (off <= (WIDEST_STEP / 2 + 0.01) * largest + 0.01 * largest.max()).all():
            raise AssertionError(f"merged into {name}, weights moved further than NF4 rounds")
        worst = max(worst, (off / largest).max().item())
    return merged, losses | {"weights": worst, "logits": ((after - before).abs().max() / before.abs().max()).item()}


def rounding_of_base(run: RunFolder, batch: dict[str, torch.Tensor]) -> float:
    """How far NF4 moved the logits of the base model, relative to the largest."""
    plain = AutoModelForCausalLM.from_pretrained(run.start, dtype=torch.float32, use_cache=False).to(batch["input_ids"].device)
    exact, got = logits_of(plain, batch), logits_of(load_quantised(run.start), batch)
    return ((got - exact).abs().max() / exact.abs().max()).item()


def write_text(model: PreTrainedModel, run: RunFolder) -> str:
    """What the model says after PROMPT, always taking the most probable token."""
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    model.eval()
    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def rewrites(reports: list[Any]) -> str:
    """`28/28 LoRA projection, …` over all graphs of the training step."""
    from sloth.rewriter.match.registry import constructs
    from sloth.rewriter.report import GraphReport

    together = GraphReport([site for report in reports for site in report.sites])
    for report in reports:
        for stage, seconds in report.seconds.items():
            together.seconds[stage] = together.seconds.get(stage, 0.0) + seconds
    return f"{together.line({c.name: c.title for c in constructs()})} in {len(reports)} graph(s)"


def train(run: RunFolder, backend: str) -> None:
    """Train with one backend, and leave what was measured in the run folder."""
    settings = run.read_settings()
    recorder = Recorder(backend)
    model = add_adapters(load_quantised(run.start), settings)
    trainer = make_trainer(model, settings, backend, run, recorder)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # loading and quantising is not training
    listening = nullcontext([])
    if backend == "sloth":
        from sloth.rewriter.backend import listening as listen

        listening = listen()
    with listening as reports:
        trainer.train()
    memory = peak_memory()
    trainer.evaluate()
    result = measured(trainer, recorder, settings, memory)
    if backend == "sloth":
        result["rewrites"] = rewrites(reports)
    if backend == settings.backend:
        batch = Blocks(run.tokens / "eval.npy").batch(settings.batch, trainer.args.device)
        trained = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
        trained.disable_input_require_grads()
        reloaded = save_and_reload(trained, run, batch)
        merged, result["merge"] = merge(reloaded, batch)
        result["merge"]["base"] = rounding_of_base(run, batch)
        result["text"] = write_text(merged, run)
    run.contender(backend).mkdir(parents=True, exist_ok=True)
    run_folder.write_json(run.result_file(backend), result)


def main() -> None:
    """Entry point of the process of one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("backend")
    options = parser.parse_args()
    train(RunFolder(options.run), options.backend)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
