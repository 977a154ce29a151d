"""Is anything lost? The same fine-tuning under eager and under sloth, with three seeds each; on a CPU too.

    python benchmarks/accuracy.py [--out FILE.json] [--steps 2000] [--seeds 0,1,2]

A small Llama is trained on one half of Python's standard library until its loss hardly falls (no pretrained model can be had
without downloading), and put into NF4. Adapters of rank 16 on all seven projections are then trained on the other half: rows of
24 to 96 tokens, padded, checkpointing, bf16 by autocast, AdamW. A seed draws adapters and order of rows. Contenders:

eager          transformers and PEFT, prepared for k-bit training as PEFT does
sloth          the same, with `torch_compile_backend="sloth"`
fast           FastLanguageModel with the options that scripts for Unsloth have; Unsloth itself needs a GPU, and does not run here

curve: mean losses of each 50 steps; held_out: losses on rows that nobody trained on, at each quarter.
summary, of each contender against eager with the same seed: apart, the largest difference of curves, and of held_out at the end;
spread: the same between the seeds of eager.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from measuring import machine, parser, write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import corpus

CONTENDERS = ("eager", "sloth", "fast")
RANK, TARGETS = 16, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LONGEST, BATCH, EVERY, HELD_OUT = 96, 4, 50, 64
MODEL = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
Rows = list[dict[str, list[int]]]


# ---------------------------------------------------------------- model and text


def rows_of(tokenizer: Any, documents: list[str]) -> Rows:
    """Of 24 to LONGEST tokens."""
    draw = random.Random(7)
    cut = [ids[: draw.randint(24, LONGEST)].tolist() for ids in corpus.blocks(tokenizer, documents, LONGEST)]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in cut]


def prepare(folder: Path, steps: int) -> tuple[Rows, Rows, list[float]]:
    """The base model, trained and saved in `folder`; rows to train on and rows held out of the other half; its curve."""
    from transformers import LlamaConfig, LlamaForCausalLM

    documents = corpus.read_text(None)
    tokenizer = corpus.train_tokenizer(documents, MODEL["vocab_size"] - 1)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL | {"pad_token_id": tokenizer.pad_token_id}))
    rows = rows_of(tokenizer, documents[::2])
    curve, _ = fit(model, tokenizer, rows, rows[:BATCH], steps, 0, 2e-3, warmup=100, checkpointing=False, bf16=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    other = rows_of(tokenizer, documents[1::2])
    random.Random(0).shuffle(other)
    return other[HELD_OUT:], other[:HELD_OUT], curve


def model_of(contender: str, folder: Path, seed: int) -> tuple[Any, Any]:
    """With fresh adapters, drawn from the seed; and the tokenizer."""
    lora = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": TARGETS, "bias": "none"}
    if contender == "fast":
        from sloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, load_in_4bit=True)
        return FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing="unsloth", random_state=seed), tokenizer
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    place = {"": 0 if torch.cuda.is_available() else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map=place, dtype=dtype)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # evaluating would repack weights for good, with scales in bf16
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM")), AutoTokenizer.from_pretrained(folder)


def fit(
    model: Any, tokenizer: Any, rows: Rows, held_out: Rows, steps: int, seed: int, rate: float, **more: Any
) -> tuple[list[float], list[float]]:
    """The curve, and the losses held out at each quarter."""
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    warmup, checkpointing = more.pop("warmup", 20), more.pop("checkpointing", True)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=not torch.cuda.is_available(), per_device_train_batch_size=BATCH, max_steps=steps,
        per_device_eval_batch_size=BATCH, learning_rate=rate, warmup_steps=warmup, lr_scheduler_type="cosine", report_to=[],
        save_strategy="no", logging_steps=EVERY, eval_strategy="steps", eval_steps=max(1, steps // 4), seed=seed,
        prediction_loss_only=True, disable_tqdm=True, dataloader_drop_last=True, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None, **{"bf16": True} | more,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=held_out, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = trainer.state.log_history
    return [h["loss"] for h in logged if "loss" in h], [h["eval_loss"] for h in logged if "eval_loss" in h]


def one(contender: str, seed: int, folder: Path, rows: Rows, held_out: Rows, steps: int) -> dict[str, Any]:
    """One fine-tuning."""
    torch.compiler.reset()
    begin = time.perf_counter()
    model, tokenizer = model_of(contender, folder, seed)
    compiling = {"torch_compile_backend": "sloth"} if contender == "sloth" else {}
    curve, held = fit(model, tokenizer, rows, held_out, steps, seed, 1e-3, **compiling)
    seconds = round(time.perf_counter() - begin, 1)
    rounded = {"curve": [round(x, 5) for x in curve], "held_out": [round(x, 5) for x in held]}
    return {"contender": contender, "seed": seed, "seconds": seconds, **rounded}


# ---------------------------------------------------------------- all of them


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """The largest of two curves, and that of losses held out at the end."""
    curve = max(abs(x - y) for x, y in zip(a["curve"], b["curve"], strict=True))
    return {"curve": round(curve, 5), "held_out": round(abs(a["held_out"][-1] - b["held_out"][-1]), 5)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    of = {(r["contender"], r["seed"]): r for r in runs}
    seeds = sorted({seed for _, seed in of})
    pairs = [difference(of["eager", a], of["eager", b]) for a, b in combinations(seeds, 2)]
    found: dict[str, Any] = {"spread": largest(pairs)}
    for contender in sorted({name for name, _ in of} - {"eager"}):
        found[contender] = {"apart": largest([difference(of[contender, s], of["eager", s]) for s in seeds])}
    return found


def largest(of: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(d[key] for d in of) for key in of[0]}


def main(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results: dict[str, Any] = {"machine": machine(args.commit), "steps": args.steps, "model": MODEL, "runs": []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "base")
        rows, held_out, results["base_curve"] = prepare(folder, args.base_steps)
        print("base", results["base_curve"][0], results["base_curve"][-1], flush=True)
        for contender in CONTENDERS:
            for seed in map(int, args.seeds.split(",")):
                results["runs"].append(found := one(contender, seed, folder, rows, held_out, args.steps))
                print(contender, seed, found["seconds"], found["curve"][0], found["curve"][-1], found["held_out"], flush=True)
            results["summary"] = summary(results["runs"])
            print(json.dumps(results["summary"]), flush=True)
            write(results, args.out)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=2000)
    made.add_argument("--base-steps", type=int, default=3000)
    made.add_argument("--seeds", default="0,1,2")
    given = made.parse_args()
    if "," not in given.seeds:
        made.error("--seeds: the spread of seeds needs two of them at least")
    main(given)
