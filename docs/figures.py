"""The tables of figures in README.md, performance.md and generation.md, of benchmarks/results. docs/tables.py writes them."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
NAMES = {"sloth": "sloth", "unsloth": "Unsloth", "inductor": "Inductor", "liger": "Liger", "eager": "eager"}


def found(file: str, **wanted: Any) -> dict[str, Any]:
    """The one row of a file of results that has these values; {} where it has none."""
    results = json.loads((RESULTS / f"{file}.json").read_text())
    rows = [r for r in results.get("rows", results.get("runs")) if all(r.get(k) == v for k, v in wanted.items())]
    assert len(rows) < 2, f"{file}.json: {wanted} are several rows"
    return rows[0] if rows else {}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (tuple(head), *map(tuple, rows)))
    lines = (first, "|" + "---|" * len(tuple(head)), *others)
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def three(ms: float) -> str:
    """With three digits, of numbers below 1000."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"


# ---------------------------------------------------------------- a whole run of Trainer

RECIPES = (
    ("sloth", "sloth", "cold"), ("sloth, a second run", "sloth", "warm"),
    ("sloth, `FastLanguageModel`", "sloth-fast", "cold"), ("Unsloth", "unsloth", "cold"), ("Liger", "liger", "cold"),
    ("Inductor", "inductor", "cold"), ("eager", "eager", "cold"),
)  # fmt: skip


def recipes(file: str = "recipes") -> str:
    runs = ((name, found(file, recipe="padded", contender=contender, caches=state)) for name, contender, state in RECIPES)
    rows = (
        (
            name, f"{r['total_s']} s", f"{r['first_s']} s", f"{r['median_s']:.2f} s", f"{r['peak_gib']:.1f} GiB",
            str(r["graphs"] or ""),
        )
        for name, r in runs if "total_s" in r
    )  # fmt: skip
    return table(("", "whole run", "first step", "a step (median)", "peak memory", "graphs"), rows)


# ---------------------------------------------------------------- steps, layers, head and loss

WORKLOADS = {"W1": "2 x 2048 tokens, checkpointing", "W2": "2 x 2048 tokens", "W4": "1 x 16384 tokens, checkpointing"}
QLORA = {
    "qlora_W1": "",
    "qlora_W2": "",
    "qlora_W4": "",
    "qlora_W2_compilers": " †",
    "qlora_W4_h200": " ‡",
}  # the first that has it


def qlora() -> str:
    def cell(workload: str, contender: str) -> str:
        for file, mark in QLORA.items():
            if r := found(file, workload=workload, contender=contender):
                digits = 2 if workload == "W1" else 1
                return f"{r['ms']:.0f}, {r['peak_gib']:.{digits}f}{mark}"
        return ""

    rows = ((told, *(cell(workload, c) for c in NAMES)) for workload, told in WORKLOADS.items())
    return table(("", *NAMES.values()), rows)


def layers(file: str, rows: dict[str, tuple[str, int]], contenders: dict[str, str], column: str = "batch") -> str:
    """ms and GiB of attention. rows: what is told of each, its batch in the file, and its tokens in all."""

    def cell(batch: str, tokens: int, contender: str) -> str:
        for f in file.split():
            if r := found(f, batch=batch, tokens=tokens, contender=contender):
                return f"{three(r['ms'])}, {r['peak_mib'] / 1024:.1f}"
        return ""

    told = ((name, tokens_of(batch, n), *(cell(batch, n, c) for c in contenders)) for name, (batch, n) in rows.items())
    return table((column, "tokens", *contenders.values()), told)


def tokens_of(batch: str, n: int) -> str:
    return f"2 x {n}" if batch == "padded" else str(n)


COMPILERS = {c: NAMES[c] for c in ("sloth", "inductor", "eager")}
PADDED, PACKED = "one of two sequences padded", "four packed sequences"


def attention() -> str:
    long = {"causal": ("causal", 32768), PADDED: ("padded", 32768), PACKED: ("packed", 32768)}
    rows = layers("attention_32K", long, COMPILERS)
    (longest,) = layers("attention", {"causal": ("causal", 65536)}, COMPILERS).split("\n")[2:]
    return f"{rows}\n{longest}"


def attention_short() -> str:
    short = {PADDED: ("padded", 8192), PACKED: ("packed", 8192), "a window of 1024 tokens": ("window", 8192)}
    return layers("attention_8K", short, COMPILERS)


def attention_scores() -> str:
    written = {"Llama": ("spelled", 8192), "Gemma 2, soft-capped": ("softcap", 8192), "gpt-oss, with sinks": ("sinks", 8192)}
    contenders = {"sloth": "sloth", "inductor": "Inductor", "flex": "FlexAttention", "eager": "eager"}
    return layers("attention_sinks attention_scores", written, contenders, "layer")


LOSSES = {
    "sloth": "sloth", "sloth, 80 MiB": "sloth, budget 80 MiB", "sloth, 320 MiB": "sloth, budget 320 MiB", "inductor": "Inductor",
    "liger": "Liger", "cut cross-entropy": "Cut Cross-Entropy", "eager": "eager",
}  # fmt: skip


def loss() -> str:
    def cell(head: str, contender: str) -> str:
        r = found("loss", head=head, contender=contender)
        return f"{r['ms']:.1f}, {r['peak_mib']:.0f}"

    return table(("head", *LOSSES.values()), ((head, *(cell(head, c) for c in LOSSES)) for head in ("frozen", "trained")))


# ---------------------------------------------------------------- operators

OPERATORS = {name: (name, "operators") for name in (
    "rms_norm dX", "rms_norm dX+dW", "add_rms_norm dX", "layer_norm", "rope", "swiglu", "geglu tanh", "swiglu packed",
    "cross_entropy",
)}  # fmt: skip
OPERATORS |= {f"QK-norm and rope {of} ‡": (f"norm_rope {of}", "operators_attention") for of in ("dX", "dX+dW")}
IN_PLACE = ("rope", "swiglu", "geglu tanh", "cross_entropy")  # as Liger has them


def operators() -> str:
    def row(told: str, name: str, file: str) -> Iterable[str]:
        def times(contender: str) -> str:
            if not (r := found(file, row=name, contender=contender)):
                return "–"
            mark = " †" if contender == "liger" and name in IN_PLACE else ""
            return f"{r['forward_us']:.0f} / {r['both_us']:.0f}{mark}"

        ours = found(file, row=name, contender="sloth")
        share = f"{ours['forward_copy_fraction']:.2f} / {ours['both_copy_fraction']:.2f}"
        return told, times("sloth"), share, times("inductor"), times("liger"), times("eager")

    head = ("row (bf16)", "sloth", "of the copy rate", "Inductor", "Liger", "eager")
    return table(head, (row(told, name, file) for told, (name, file) in OPERATORS.items()))


# ---------------------------------------------------------------- fine-tuning to the end, and generating


def accuracy() -> str:
    """How far losses are from eager's with the same seed, beside how far eager's seeds are from each other."""
    of = json.loads((RESULTS / "accuracy.json").read_text())["summary"]
    rows = (
        ("seeds of eager", of["spread"]),
        ("sloth, Trainer", of["sloth"]["apart"]),
        ("`FastLanguageModel`", of["fast"]["apart"]),
    )
    head = ("", "training, means of 50 steps", "held out, at the end")
    return table(head, ((name, f"{apart['curve']:.4f}", f"{apart['held_out']:.4f}") for name, apart in rows))


def decode() -> str:
    runs = json.loads((RESULTS / "decode.json").read_text())["runs"]
    head = ("rows", "", "tokens/s of `generate`", "a step alone", "first `generate`", "peak memory")

    def row(r: dict[str, Any]) -> Iterator[str]:
        yield str(r["batch"])
        yield NAMES.get(r["contender"], r["contender"])
        yield f"{r['tok_s']:.0f}"
        yield f"{r['step_ms']:.1f} ms" if "step_ms" in r else ""
        yield f"{r['first_s']:.0f} s"
        yield f"{r['peak_gib']} GiB"

    return table(head, (tuple(row(r)) for r in sorted(runs, key=lambda r: r["batch"])))


def trainers() -> str:
    runs = [run for file in ("trainers", "trainers_grpo") for run in json.loads((RESULTS / f"{file}.json").read_text())["runs"]]
    of = {(run["trainer"], run["contender"]): run for run in runs}

    def row(name: str) -> Iterator[str]:
        yield name
        for contender in ("sloth", "eager"):
            run = of[name, contender]
            inside = f" ({statistics.median(run['generate_s']):.2f} in `generate`)" if "generate_s" in run else ""
            yield f"{run['median_s']:.2f}{inside}, {run['peak_gib']}"
            yield f"{run['first_s']:.0f}"

    head = ("", "sloth: a step, peak", "first two steps", "eager: a step, peak", "first two steps")
    return table(head, (tuple(row(name)) for name in dict.fromkeys(name for name, _ in of)))


README: dict[str, Callable[[], str]] = {"recipes": recipes}
PERFORMANCE: dict[str, Callable[[], str]] = {
    "qlora": qlora, "attention": attention, "attention-short": attention_short, "attention-scores": attention_scores,
    "loss": loss, "operators": operators, "accuracy": accuracy, "trainers": trainers,
    "llama2-7b": lambda: recipes("recipes_llama2_7b"), "mistral-7b": lambda: recipes("recipes_mistral_7b"),
}  # fmt: skip
GENERATION: dict[str, Callable[[], str]] = {"decode": decode}
