"""What people run, from the first line to the last: HF Trainer, QLoRA on a Llama-3-8B shape, batches of varying length.

    python benchmarks/recipes.py [--out FILE.json [--add]] [--contenders sloth,eager,…] [--recipes padded,packed] [--warm sloth]

Weights in NF4 (random, written once to a temporary folder), `prepare_model_for_kbit_training`, `bf16=True`, checkpointing, rank
16 on all seven projections, AdamW in 8 bits, 4 rows of lognormal length (median 245 tokens, 24 … 2048), accumulation 2, 30 steps.
padded: to the longest of each batch, as DataCollatorForSeq2Seq does; packed: the same rows in one without padding, told apart by
their positions (DataCollatorWithFlattening). Every contender runs in a process of its own, with caches of its own that are empty;
those of `--warm` once more with the caches of their first run. sloth-offload: inputs of layers wait in host memory. Unsloth and
sloth-fast are set up as Unsloth's users do, by FastLanguageModel: no weight in fp32, its own checkpointing, which offloads. Peers
that are not installed are left out.

total_s: all of `trainer.train()`, compilation with it; first_s: until the first optimizer step is done; steps_s: all others.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import machine, optional, parse, parser, tell, told, write
from qlora import RANK, SHAPES, TARGETS, write_checkpoint

CONTENDERS = ("sloth", "sloth-offload", "sloth-fast", "unsloth", "eager", "liger", "inductor")
OFFLOAD = {"sloth-offload": {"SLOTH_OPTIONS": "sloth.checkpoint_offload=1"}}
FAST = ("unsloth", "sloth-fast")
NEEDS = {"unsloth": "unsloth", "liger": "liger_kernel"}
ROWS, ACCUMULATE, LONGEST = 4, 2, 2048
WORDS = 900  # of the vocabulary that texts are made of
SECONDS = 400  # for one contender, or it is told as not done


# ---------------------------------------------------------------- the recipe


def texts(count: int) -> list[dict[str, list[int]]]:
    """Rows of tokens; the first quarter of each is a prompt without labels."""
    draw, rows = random.Random(7), []
    for _ in range(count):
        n = max(24, min(LONGEST, int(draw.lognormvariate(5.5, 0.8))))
        ids = [1] + [draw.randrange(4, WORDS) for _ in range(n)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * (n // 4) + ids[n // 4 :]})
    return rows


def model_of(contender: str, folder: str) -> tuple[Any, Any]:
    """The model with fresh adapters, as a user of the contender sets it up, and the tokenizer."""
    torch.manual_seed(1)
    lora = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": TARGETS}
    if contender in FAST:
        FastLanguageModel = importlib.import_module("unsloth" if contender == "unsloth" else "sloth").FastLanguageModel
        loaded = {"model_name": folder, "max_seq_length": LONGEST, "dtype": torch.bfloat16, "load_in_4bit": True}
        model, tokenizer = FastLanguageModel.from_pretrained(**loaded)
        return FastLanguageModel.get_peft_model(model, **lora, bias="none", use_gradient_checkpointing="unsloth"), tokenizer
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if contender == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0})
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM")), AutoTokenizer.from_pretrained(folder)


def train(contender: str, recipe: str, folder: str, steps: int) -> dict[str, Any]:
    """One training run; what is in the results of one contender."""
    begin = time.perf_counter()
    if contender == "unsloth":
        import unsloth  # noqa: F401  (before transformers)
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

    model, tokenizer = model_of(contender, folder)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    ours = {"torch_compile_backend": "sloth"}
    compiling = {"sloth": ours, **dict.fromkeys(OFFLOAD, ours), "inductor": {"torch_compile": True}}.get(contender, {})
    checkpointing = {"gradient_checkpointing": contender not in FAST, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=ROWS, gradient_accumulation_steps=ACCUMULATE, max_steps=steps,
        learning_rate=2e-4, warmup_steps=5, bf16=True, optim="adamw_8bit", logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, seed=3, **checkpointing, **compiling,
    )  # fmt: skip
    padded = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    data = texts(ROWS * ACCUMULATE * (steps + 2))
    collator = padded if recipe == "padded" else DataCollatorWithFlattening()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[Clock()])
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start
    after = [b - a for a, b in zip([start, *ends], ends, strict=False)]
    counters = torch._dynamo.utils.counters
    return {
        "load_s": round(start - begin, 1),
        "total_s": round(total, 1),
        "first_s": round(after[0], 1),
        "median_s": round(statistics.median(after[1:]), 3),
        "steps_s": [round(s, 3) for s in after[1:]],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "losses": [round(float(h["loss"]), 4) for h in trainer.state.log_history if "loss" in h],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


# ---------------------------------------------------------------- all of them


def run(contender: str, recipe: str, folder: str, steps: int, caches: Path) -> dict[str, Any]:
    """`train` in a process of its own; what went wrong, if it did."""
    places = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--one", contender, recipe, folder, str(steps)]
    try:
        done = subprocess.run(
            command,
            env=os.environ | places | offline | OFFLOAD.get(contender, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {SECONDS} s"}
    return told(done.stdout)


def main(args: argparse.Namespace) -> None:
    results: dict[str, Any] = {"machine": machine(args.commit), "shape": args.shape, "steps": args.steps, "runs": []}
    if args.add:
        before = json.loads(Path(args.out).read_text())
        same = ("device", "torch", "commit")
        if [before["machine"].get(k) for k in same] != [results["machine"].get(k) for k in same]:
            raise SystemExit(f"{args.out} was measured on another machine or of another commit: give another --out")
        results["runs"] = before["runs"]
    wanted = [c for c in args.contenders.split(",") if c not in NEEDS or optional(NEEDS[c])]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.shape, args.layers)
        for recipe in args.recipes.split(","):
            for contender in wanted:
                caches = Path(tempfile.mkdtemp())
                for state in ("cold", "warm") if contender in args.warm.split(",") else ("cold",):
                    found = run(contender, recipe, folder, args.steps, caches)
                    results["runs"].append({"recipe": recipe, "contender": contender, "caches": state, **found})
                    short = {k: v for k, v in found.items() if k not in ("steps_s", "losses")}
                    print(recipe, contender, state, short, flush=True)
                    write(results, args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        *which, count = sys.argv[2:]
        tell(lambda: train(*which, int(count)))
    else:
        made = parser(__doc__)
        made.add_argument("--contenders", default=",".join(CONTENDERS))
        made.add_argument("--recipes", default="padded,packed")
        made.add_argument("--add", action="store_true", help="to the runs that --out holds already")
        made.add_argument("--warm", default="sloth", help="contenders that run once more with the caches of their first run")
        made.add_argument("--shape", choices=SHAPES, default="8b")
        made.add_argument("--layers", type=int, default=0, help="of another number than the shape's")
        made.add_argument("--steps", type=int, default=30)
        main(parse(made))
