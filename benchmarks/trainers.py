"""TRL's trainers on one GPU, a few steps of each: a Llama-3.2-1B shape in NF4, adapters of rank 16, bf16, checkpointing.

    python benchmarks/trainers.py [--out FILE.json] [--trainers sft,dpo,…] [--contenders sloth,eager] [--steps 8]

Trainers are as they come: a quantised model and `peft_config`; sloth's have `torch_compile_backend="sloth"` more.
GRPO's model comes from FastLanguageModel and `for_inference`, and from transformers and PEFT; it generates 64 tokens for each of
two prompts, four times. Texts are random words of lognormal length. All runs begin side by side, each in a process of its own;
after two steps (what is compiled, is) each waits, and then they train on one after the other. Caches are empty, and all share
them.

first_s: until the second optimizer step is done, beside the others; median_s: of the later ones, alone; generate_s: of each, in
`generate`; peak_gib: allocated; held_gib: behind each of them; losses: of each step. log: what sloth said. found: what the
compiled graphs hold, and what of it was matched.
"""

import argparse
import importlib
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
from measuring import machine, parse, parser, tell, told, write
from qlora import RANK, TARGETS, write_checkpoint

CONTENDERS = ("sloth", "eager")
WORDS, ROWS, WARM = 900, 4, 2  # words that there are, rows of a batch, and steps before the others are waited for
SECONDS = 420


# ---------------------------------------------------------------- what is trained


def said(draw: random.Random, median: int) -> str:
    length = max(4, min(900, int(draw.lognormvariate(0, 0.7) * median)))
    return " ".join(f"t{draw.randrange(4, WORDS)}" for _ in range(length))


def texts(draw: random.Random) -> dict[str, Any]:
    return {"text": said(draw, 250)}


def preferences(draw: random.Random) -> dict[str, Any]:
    return {"prompt": said(draw, 60), "chosen": " " + said(draw, 150), "rejected": " " + said(draw, 150)}


def labelled(draw: random.Random) -> dict[str, Any]:
    return {"prompt": said(draw, 60), "completion": " " + said(draw, 150), "label": draw.random() < 0.5}


def prompts(draw: random.Random) -> dict[str, Any]:
    return {"prompt": said(draw, 60)}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split())) / 10 for text in completions]


GENERATED = {"max_completion_length": 64, "num_generations": 4, "per_device_train_batch_size": 8}
TRAINERS: dict[str, tuple[str, Any, dict[str, Any]]] = {  # trainer, a row of its data, and more for its configuration
    "sft": ("SFTTrainer", texts, {}),
    "sft-packing": ("SFTTrainer", texts, {"packing": True, "max_length": 1024, "per_device_train_batch_size": 1}),
    "sft-padding-free": ("SFTTrainer", texts, {"padding_free": True, "max_length": None}),
    "dpo": ("DPOTrainer", preferences, {}),
    "kto": ("KTOTrainer", labelled, {}),
    "reward": ("RewardTrainer", preferences, {}),
    "grpo": ("GRPOTrainer", prompts, GENERATED),
}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    made = Tokenizer(models.WordLevel(special | {f"t{i}": i for i in range(4, WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def model_of(contender: str, name: str, folder: str) -> tuple[Any, dict[str, Any]]:
    """The model as a user would load it, and what the trainer is given beside it."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    lora = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": TARGETS, "bias": "none"}
    if contender == "sloth" and name == "grpo":
        from sloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True)
        model = FastLanguageModel.get_peft_model(model, **lora, random_state=1, use_gradient_checkpointing=True)
        return FastLanguageModel.for_inference(model, replay_steps=True), {}
    of_rewards = name == "reward"
    kind, more = (AutoModelForSequenceClassification, {"num_labels": 1}) if of_rewards else (AutoModelForCausalLM, {})
    torch.manual_seed(1)
    model = kind.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0}, **more)
    torch.manual_seed(1)
    return model, {"peft_config": LoraConfig(**lora, task_type="SEQ_CLS" if of_rewards else "CAUSAL_LM")}


def train(contender: str, name: str, folder: str, steps: int, turn: Path) -> dict[str, Any]:
    """turn: a file that says, once it is there, that no other run is under way; this one then says that it waits."""
    trl = importlib.import_module("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    kind, row, more = TRAINERS[name]
    model, given = model_of(contender, name, folder)
    given |= {"reward_funcs": reward} if name == "grpo" else {}
    ends: list[float] = []
    held: list[float] = []
    generated, parent = [0.0], os.getppid()

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if len(ends) == WARM:
                turn.with_suffix(".waits").touch()
                while not turn.exists():
                    if os.getppid() != parent:
                        raise RuntimeError("whoever measures is gone")
                    time.sleep(0.2)
                ends.append(time.perf_counter())
            generated.append(0.0)
            held.append(round(torch.cuda.memory_allocated() / 2**30, 3))

    usual = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": ROWS, "max_steps": steps, "learning_rate": 2e-4,
        "bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    if contender == "sloth" and name != "grpo":
        usual["torch_compile_backend"] = "sloth"
    arguments = getattr(trl, kind.replace("Trainer", "Config"))(**usual | more)
    draw = random.Random(5)
    data = Dataset.from_list([row(draw) for _ in range(16 * ROWS * (steps + 2))])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = getattr(trl, kind)(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()], **given
    )
    inner = trainer.model
    plain = inner.generate if hasattr(inner, "generate") else None

    def timed(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            torch.cuda.synchronize()
            generated[-1] += time.perf_counter() - start

    if name == "grpo":
        inner.generate = timed
    torch.cuda.reset_peak_memory_stats()
    start, reports = time.perf_counter(), []
    if contender == "sloth":
        from sloth.rewriter.backend import listening

        with listening() as reports:
            trainer.train()
    else:
        trainer.train()
    waited, later = ends[WARM], ends[WARM + 1 :]
    took = [b - a for a, b in zip([waited, *later], later, strict=False)]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    sites = [site for report in reports for site in report.sites]
    counters = torch._dynamo.utils.counters
    return {
        "first_s": round(ends[WARM - 1] - start, 1),
        "median_s": round(statistics.median(took), 3),
        "steps_s": [round(s, 3) for s in took],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "held_gib": held[WARM:],
        "losses": [round(float(entry["loss"]), 5) for entry in history],
        "found": {"sites": len(sites), "matched": sum(site.status == "matched" for site in sites), "graphs": len(reports)},
        "breaks": sum(counters["graph_break"].values()),
    } | ({"generate_s": [round(s, 3) for s in generated[WARM:-1]]} if name == "grpo" else {})


# ---------------------------------------------------------------- all of them


def result_of(run: subprocess.Popen, log: Path) -> dict[str, Any]:
    try:
        run.wait(SECONDS)
    except subprocess.TimeoutExpired:
        run.kill()
        return {"failed": f"not done in {SECONDS} s"}
    output = log.read_text()
    return told(output) | {"log": [line for line in output.splitlines() if line.startswith("sloth: ")]}


def main(args: argparse.Namespace) -> None:
    results: dict[str, Any] = {"machine": machine(args.commit), "shape": args.shape, "steps": args.steps, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "model")
        checkpoint.mkdir()
        write_checkpoint(checkpoint, args.shape, args.layers)
        write_tokenizer(checkpoint)
        torch.cuda.empty_cache()
        begun = []
        for name in args.trainers.split(","):
            for contender in args.contenders.split(","):
                turn = Path(folder, f"{name}-{contender}")
                log = turn.with_suffix(".log")
                caches = {k: f"{folder}/{v}" for k, v in (("TORCHINDUCTOR_CACHE_DIR", "i"), ("TRITON_CACHE_DIR", "t"))}
                command = [sys.executable, __file__, "--one", contender, name, str(checkpoint), str(args.steps), str(turn)]
                few = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
                with log.open("w") as out:
                    run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | caches | few)
                begun.append((name, contender, turn, log, run))
        try:
            deadline = time.monotonic() + SECONDS
            while any(r.poll() is None and not t.with_suffix(".waits").exists() for _, _, t, _, r in begun):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.5)
            for name, contender, turn, log, run in begun:
                turn.touch()
                found = result_of(run, log)
                results["runs"].append({"trainer": name, "contender": contender, **found})
                print(name, contender, {k: v for k, v in found.items() if k not in ("steps_s", "losses", "held_gib")}, flush=True)
                write(results, args.out)
        finally:
            for *_, run in begun:
                run.kill()
                run.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        *which, count, turn = sys.argv[2:]
        tell(lambda: train(*which, int(count), Path(turn)))
    else:
        made = parser(__doc__)
        made.add_argument("--trainers", default=",".join(TRAINERS))
        made.add_argument("--contenders", default=",".join(CONTENDERS))
        made.add_argument("--shape", default="1b")
        made.add_argument("--layers", type=int, default=0, help="of another number than the shape's")
        made.add_argument("--steps", type=int, default=8)
        main(parse(made))
