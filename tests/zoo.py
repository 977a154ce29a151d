"""Tiny random-weight models of every causal LM architecture of transformers, and a sweep of the backend over them.

    python -m tests.zoo --out zoo.json --all              # resumes where it was interrupted
    python -m tests.zoo --out zoo.json --arch llama qwen3+qknorm --dtype bfloat16

A name is a model type of transformers, or "type+branch" for a branch of its configuration that is off by default (VARIANTS).
Configurations are derived, not listed: every field whose name says what it is (TINY) becomes small, dropout becomes 0, and the
depth is such that each kind of layer appears. In a sweep each runs in a child with a time limit: a crash or a hang costs one row.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from tests.zoo_sizes import (
    DEPTH,
    DROPOUT,
    IN_TOWERS,
    KEPT_IF,
    OVERRIDES,
    PER_LAYER,
    SET_IF_NONE,
    TEXT_PARTS,
    TINY,
    VARIANTS,
    VOCAB,
)
from torch._dynamo.utils import counters
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sloth.rewriter.backend import listening
from sloth.rewriter.explain import _expected
from sloth.rewriter.match.registry import constructs
from sloth.rewriter.report import MATCHED, Report

Row = dict[str, Any]
Rows = dict[str, Row]
Batch = dict[str, torch.Tensor | bool]
BATCH, SEQ = 2, 33
MISMATCH = 1e-4  # relative difference of a gradient in fp32 from which on a row is a problem

# ---------------------------------------------------------------- tiny models


def architectures() -> list[str]:
    """Every model type that has a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(arch: str, **changes: Any) -> Any:
    """A small configuration of this architecture in which every kind of layer occurs."""
    kind = arch.split("+")[0]
    return _shrunk(CONFIG_MAPPING[kind], OVERRIDES.get(kind, {}) | VARIANTS.get(arch, {}) | changes)


def _shrunk(cls: type, changes: dict[str, Any], tower: bool = False) -> Any:
    default = cls()
    held = vars(default)  # not getattr: some configurations refuse fields that differ between layers
    declared = {f.name: f.default for f in dataclasses.fields(cls)}
    kinds = {k: list(dict.fromkeys(v)) for k, v in held.items() if k in PER_LAYER and isinstance(v, list | tuple) and v}
    depth = changes.get("depth") or max(2, *map(len, kinds.values()), 2)
    given: dict[str, Any] = {}
    for name in sorted({n for n in declared | held if not n.startswith("_")}):
        current, low = held.get(name), name.lower()
        if hasattr(current, "to_dict"):
            if name in cls.sub_configs or name in declared:
                part = {k.split(".", 1)[1]: v for k, v in changes.items() if k.startswith(name + ".")}
                part = OVERRIDES.get(current.model_type, {}) | part if name in TEXT_PARTS else part
                given[name] = _shrunk(type(current), part, tower or name not in TEXT_PARTS)
        elif name not in declared and not isinstance(current, float) or isinstance(current, bool):
            continue
        elif isinstance(current, int | float) and any(word in low for word in DROPOUT):
            given[name] = 0.0 if isinstance(declared.get(name, 0.0), float) else 0
        elif name in kinds:
            given[name] = type(current)(kinds[name][i % len(kinds[name])] for i in range(depth))
        elif name in TINY and (isinstance(current, int) or current is None and name in SET_IF_NONE):
            if not tower or name in IN_TOWERS:
                given[name] = _tiny(name, current, depth, "kv_lora_rank" in declared)
        elif low.endswith(("_token_id", "_token_index", "_index")) and isinstance(current, int) and current >= VOCAB:
            given[name] = 4
        elif low.endswith("_token_id") and isinstance(current, list):
            given[name] = [2]
    given |= {"is_decoder": True} if "is_decoder" in declared and not tower else {}
    given |= {"use_cache": False} if "use_cache" in declared else {}
    return cls(**given | {k: v for k, v in changes.items() if "." not in k and k != "depth"})


def _tiny(name: str, current: int | None, depth: int, latent: bool) -> int:
    if current is not None and name in KEPT_IF.get(current, ()):
        return current
    if name == "num_key_value_heads" and latent:  # latent attention has no grouped heads
        name = "num_attention_heads"
    return depth if TINY[name] == DEPTH else TINY[name]


def tiny_model(arch: str, dtype: torch.dtype = torch.float32, *, attention: str | None = None, **changes: Any) -> torch.nn.Module:
    """A model in training mode whose parameters are nowhere symmetric, zero or one, so that each gradient tells something."""
    config = tiny_config(arch, **changes)
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[arch.split("+")[0]])
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and type(config) is not wanted:  # the decoder inside of a larger model
        config = next((part for part in vars(config).values() if type(part) is wanted), config)
    how = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(0)
    known = type(config) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM.from_config if known else cls._from_config)(config, **how).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.02)
    return model.train()


def tiny_batch(model: torch.nn.Module, arch: str = "", batch: int = BATCH, seq: int = SEQ) -> Batch:
    """The keyword arguments of one training call."""
    config, g = model.config, torch.Generator().manual_seed(2)
    if arch == "reformer":
        seq = 32
    ids = torch.randint(5, VOCAB, (batch, seq), generator=g)
    out: Batch = {"input_ids": ids, "labels": ids.clone()}
    if arch.startswith("musicgen"):
        books = torch.randint(5, VOCAB, (batch, seq, config.num_codebooks), generator=g)
        out = {"input_ids": books.permute(0, 2, 1).reshape(-1, seq), "labels": books}
    if arch == "git":
        out["pixel_values"] = torch.randn(batch, 3, *[config.vision_config.image_size] * 2, generator=g)
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted or "past_key_values" in accepted and any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        out["use_cache"] = False
    return out


# ---------------------------------------------------------------- one training call


def step(function: Callable[..., Any], model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by parameter name of one call; `model` has no gradients afterwards."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = function(**batch)
    loss = (out["loss"] if "loss" in out else out[0]).mean()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


@contextmanager
def same_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Buffers that calls change (running statistics, dynamic tables) are put back."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    yield
    with torch.no_grad():
        for n, b in model.named_buffers():
            if n in before and before[n].shape == b.shape:
                b.copy_(before[n])


def gradient_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest ‖a − b‖ / ‖b‖ over the parameters, and whose it is; infinite where a gradient is missing on one side.

    Norms have a floor of 1e-3 of the largest: a gradient that is zero in exact arithmetic (biases of keys) is noise in any other.
    """
    if strange := ours.keys() ^ theirs.keys():
        return float("inf"), min(strange)
    floor = 1e-3 * max((g.double().norm().item() for g in theirs.values()), default=0.0) + 1e-12
    differences = ((((ours[n] - b).double().norm() / (b.double().norm() + floor)).item(), n) for n, b in theirs.items())
    return max(((d if d == d else float("inf"), n) for d, n in differences), default=(0.0, ""))


def measure(arch: str, dtype: torch.dtype = torch.float32) -> Row:
    """One architecture under eager and under sloth with aot_eager inside; where that goes wrong, under aot_eager alone too."""
    row: Row = {"arch": arch, "dtype": str(dtype).removeprefix("torch."), "phase": "build", "trains": False}
    start = time.perf_counter()
    try:
        model = tiny_model(arch, dtype)
        row |= {"class": type(model).__name__, "phase": "eager"}
        batch = tiny_batch(model, arch)
        with same_buffers(model):
            loss, grads = step(model, model, batch)
        row |= {"trains": bool(torch.isfinite(loss)) and bool(grads), "loss": loss.item(), "gradients": len(grads)}
        if row["trains"]:
            expected = _guarded(row, "expected_error", lambda: _expected(model, batch, constructs())) or {}
            row["phase"] = "compile"
            options = {"options": {"sloth.inner_backend": "aot_eager"}}
            with listening() as graphs:
                row |= _compiled(model, batch, (loss, grads), "sloth", **options)
            row |= _told(Report(graphs, expected=expected, titles={c.name: c.title for c in constructs()}))
            if not agrees(row):
                row["aot_eager"] = _compiled(model, batch, (loss, grads), "aot_eager")
        del row["phase"]
    except Exception as e:
        row["error"] = f"{type(e).__name__}: {e}"[:600]
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def agrees(row: Row) -> bool:
    """Did the compiled model give eager's loss and gradients?"""
    limit = MISMATCH if row.get("dtype", "float32") == "float32" else 3e-2
    return "error" not in row and row["loss_difference"] < limit and row["gradient_difference"] < limit


def _compiled(model: torch.nn.Module, batch: Batch, truth: tuple, backend: str, **how: Any) -> Row:
    """The compiled model against eager's loss and gradients."""
    torch._dynamo.reset()
    counters.clear()
    row: Row = {}
    with same_buffers(model):
        found = _guarded(row, "error", lambda: step(torch.compile(model, backend=backend, **how), model, batch))
    row["breaks"] = [reason.strip().split("\n")[0][:200] for reason in counters["graph_break"]]
    if found is not None:
        (loss, grads), (true_loss, true_grads) = found, truth
        difference, name = gradient_difference(grads, true_grads)
        row |= {"loss_difference": abs(loss - true_loss).item() / (abs(true_loss).item() + 1e-6)}
        row |= {"gradient_difference": difference, "worst": name}
    return row


def _told(report: Report) -> Row:
    """What the sweep keeps of a report."""
    missed = Counter(dataclasses.replace(s, file="/".join(s.file.split("/")[-1:])) for s in report.sites if s.status != MATCHED)
    return {
        "graphs": len(report.graphs),
        "constructs": {c: n for c, n in report.constructs.items() if n["expected"]},
        "variants": Counter(f"{s.construct}: {s.variant}" for s in report.sites if s.status == MATCHED),
        "missed": [dataclasses.asdict(s) | {"sites": n} for s, n in missed.items()],
        "untouched": [g.untouched for g in report.graphs if g.untouched],
        "opaque": Counter(why for g in report.graphs for why in g.opaque.values()),
        "sloth_seconds": round(sum(v for k, v in report.seconds.items() if k != "aot_eager"), 2),
    }


def _guarded(row: Row, key: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as e:
        row[key] = f"{type(e).__name__}: {e}"[:600]
        return None


# ---------------------------------------------------------------- sweep


def sweep(archs: Iterable[str], out: Path, dtype: torch.dtype = torch.float32, jobs: int = 1, limit: float = 300) -> Rows:
    """Measure each architecture in a child of its own; rows go to `out` one by one, and those found there are not repeated."""
    constructs()  # load the patterns once, before forking
    rows: Rows = json.loads(out.read_text()) if out.exists() else {}
    with ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(lambda arch: _in_child(arch, dtype, limit, jobs), [a for a in archs if a not in rows]):
            rows[row["arch"]] = row
            out.write_text(json.dumps(rows, indent=1))
            print(summary(row), flush=True)
    return rows


def _in_child(arch: str, dtype: torch.dtype, limit: float, jobs: int) -> Row:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(False)
    child = context.Process(target=_child, args=(there, arch, dtype, max(1, (os.cpu_count() or 1) // jobs)), daemon=True)
    child.start()
    there.close()
    row: Row = {"arch": arch, "phase": "child", "trains": None, "error": f"took more than {limit:.0f} s"}
    try:
        row = here.recv() if here.poll(limit) else row
    except EOFError:
        child.join(5)
        row["error"] = f"died with exit code {child.exitcode}"
    child.join(2)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
    return row


def _child(pipe: Connection, arch: str, dtype: torch.dtype, threads: int) -> None:
    os.setsid()  # so that what it starts can be ended with it
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1), os.dup2(silent, 2)
    torch.set_num_threads(threads)
    pipe.send(measure(arch, dtype))


def summary(row: Row) -> str:
    """One line for people."""
    counts = ", ".join(f"{n['matched']}/{n['expected']} {c}" for c, n in row.get("constructs", {}).items())
    what = f"{row['gradient_difference']:.0e} {counts}" if "gradient_difference" in row else ""
    state = "not trained" if not row["trains"] else "ok" if agrees(row) else "WRONG"
    return f"{row['arch']:26} {state:12} {row.get('seconds', 0):5} s  {what} {row.get('error', '')[:150]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", nargs="*", default=[])
    parser.add_argument("--all", action="store_true", help="every architecture and every branch in VARIANTS")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    archs = [*given.arch, *((*architectures(), *VARIANTS) if given.all else ())]
    rows = sweep(archs, given.out, getattr(torch, given.dtype), given.jobs)
    print(json.dumps(totals(rows.values()), indent=1))


def totals(rows: Iterable[Row]) -> Row:
    """Over all rows: how many train, how many agree, and matched / expected of each construct."""
    rows = [r for r in rows if r["trains"]]
    counted: dict[str, Counter] = {}
    for row in rows:
        for name, n in row.get("constructs", {}).items():
            counted.setdefault(name, Counter()).update(n)
    return {"train": len(rows), "agree": sum(map(agrees, rows)), "constructs": {c: dict(n) for c, n in counted.items()}}


if __name__ == "__main__":
    main()
