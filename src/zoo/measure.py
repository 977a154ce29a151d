"""One training call of an architecture in eager and under sloth: loss, every gradient, graphs, breaks, sites.

In fp32 both compute the same numbers up to the order of sums. In bf16 they round in other places, so both are compared with the
same step, of the same weights, in fp32: what is judged is whose error is larger, over all gradients together.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from sloth.compat.dynamo import counters
from sloth.rewriter.backend import listening
from sloth.rewriter.explain import sites_called, unchanged
from sloth.rewriter.match.registry import constructs
from sloth.rewriter.report import MATCHED, GraphReport, Report
from sloth.zoo.models import Batch, tiny_batch, tiny_model

Row = dict[str, Any]
Gradients = dict[str, torch.Tensor]
Step = tuple[torch.Tensor, Gradients]
MISMATCH = 1e-4  # relative difference of a gradient in fp32 from which on it is another
# In bf16: how much larger an error than eager's is none of chance, and a size of errors below which nobody asks.
WORSE, SMALL = 1.5, 2e-2
DRAWS, RANK = 20, 4
AOT = "aot_eager_decomp_partition"


class Run(NamedTuple):
    """How the model is trained, and what compiles the rewritten graph: AOTAutograd as Inductor has it, or nothing, at half the
    time.
    """

    dtype: torch.dtype
    lora: bool
    inner: str


RUNS = {
    "fp32": Run(torch.float32, False, AOT),
    "fp32 LoRA": Run(torch.float32, True, "eager"),
    "bf16": Run(torch.bfloat16, False, "eager"),
    "bf16 LoRA": Run(torch.bfloat16, True, "eager"),
}


def measure(arch: str, runs: tuple[str, ...] = tuple(RUNS)) -> Row:
    """{"arch", "class", "seconds", "runs": name → what became of it}. A run's state is

    "ok": it trains as in eager · "differs": other numbers · "fails": an error · "untrained": not in eager either.
    """
    start = time.perf_counter()
    row: Row = {"arch": arch, "runs": {}}
    for name in runs:
        started = time.perf_counter()
        try:
            found = _measured(arch, RUNS[name], row)
        except Untrained as e:
            found = {"state": "untrained", "why": str(e)}
        except Exception as e:  # ours: the model has trained in eager
            found = failed(first_line(e))
        row["runs"][name] = found | {"seconds": round(time.perf_counter() - started, 1)}
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


class Untrained(Exception):
    """Eager has no step to compare with; the message says why."""


@contextmanager
def in_eager() -> Iterator[None]:
    try:
        yield
    except Exception as e:
        raise Untrained(first_line(e)) from e


def failed(why: str) -> Row:
    return {"state": "fails", "why": why, "constructs": {}, "missed": [], "breaks": [], "graphs": 0}


def first_line(e: BaseException) -> str:
    text = next((line for line in str(e).strip().split("\n") if line.strip()), "")
    return f"{type(e).__name__}: {text}"[:240]


def _measured(arch: str, run: Run, row: Row) -> Row:
    with in_eager():
        model = tiny_model(arch, run.dtype)
        row["class"] = type(model).__name__
        batch = tiny_batch(model, arch)
    if run.lora:
        model = with_adapters(model, run.dtype)
    with in_eager():
        eager = step(model, model, batch)
    if not torch.isfinite(eager[0]) or not eager[1]:
        raise Untrained(f"the loss is {eager[0].item()}, with {len(eager[1])} gradients")
    found: Row = {"state": "ok", "inner": run.inner}
    try:
        with unchanged(model):
            expected = sites_called(model, batch, constructs())
    except Exception as e:
        expected, found["uncounted"] = {}, first_line(e)
    compared, graphs = compiled(model, batch, eager, "sloth", options={"sloth.inner_backend": run.inner})
    found |= compared
    found |= _told(Report(graphs, expected=expected, titles={c.name: c.title for c in constructs()}))
    if found["state"] != "ok":
        plain, _ = compiled(model, batch, eager, AOT)
        found["torch"] = plain["state"] if plain["state"] == "ok" else f"{plain['state']}: {plain.get('why', '')}"
    return found


def with_adapters(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model with PEFT's adapters on all linear layers but the head, and all else frozen. Every gradient tells something.

    Not on experts: PEFT would take the name of a layer in an expert for all of a fused parameter, which breaks graphs. It does so
    where it sees a model of transformers, so it is given one inside of something else.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    head, around = model.get_output_embeddings(), torch.nn.ModuleDict({"model": model})
    named = {n: m for n, m in around.named_modules() if m is not head}
    layers = [n for n, m in named.items() if type(m) in (torch.nn.Linear, Conv1D)]
    layers = layers or [n for n, m in named.items() if isinstance(m, torch.nn.Linear)]  # all are of a class of Falcon's own
    torch.manual_seed(4)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=8, target_modules=layers, init_lora_weights=False), around)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model.to(dtype).train()


def step(function: Callable[..., Any], model: torch.nn.Module, batch: Batch) -> Step:
    """Loss and gradients by parameter name of one call; `model` has no gradients afterwards. Buffers that calls change (running
    statistics, dynamic tables) are put back.
    """
    model.zero_grad(set_to_none=True)
    with unchanged(model):
        torch.manual_seed(3)
        out = function(**batch)
        loss = (out["loss"] if "loss" in out else out[0]).mean()
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def gradient_difference(ours: Gradients, theirs: Gradients) -> tuple[float, str]:
    """The largest ‖a − b‖ / ‖b‖ over the parameters, and whose it is; infinite where a gradient is missing on one side.

    Norms have a floor of 1e-3 of the largest: a gradient that is zero in exact arithmetic (biases of keys) is noise in any other.
    """
    if strange := ours.keys() ^ theirs.keys():
        return float("inf"), min(strange)
    floor = 1e-3 * max((g.double().norm().item() for g in theirs.values()), default=0.0) + 1e-12
    differences = ((((ours[n] - b).double().norm() / (b.double().norm() + floor)).item(), n) for n, b in theirs.items())
    return max(((d if d == d else float("inf"), n) for d, n in differences), default=(0.0, ""))


def error(ours: Gradients, truth: Gradients) -> float:
    """‖a − b‖ / ‖b‖ of all gradients as one vector; one that is missing (of an expert without tokens) is zero."""
    alone = sum(ours[n].double().norm().item() ** 2 for n in ours.keys() - truth.keys())
    of = alone + sum((ours[n].double() - b.double() if n in ours else b.double()).norm().item() ** 2 for n, b in truth.items())
    return (of / (sum(b.double().norm().item() ** 2 for b in truth.values()) + 1e-24)) ** 0.5


def compiled(model: torch.nn.Module, batch: Batch, eager: Step, backend: str, **how: Any) -> tuple[Row, list[GraphReport]]:
    """The compiled model's step against eager's, and sloth's reports of its graphs."""
    torch.compiler.reset()
    counters.clear()
    function = torch.compile(model, backend=backend, **how)
    wide = any(p.dtype == torch.bfloat16 for p in model.parameters())
    row: Row = {}
    try:
        with listening() as graphs:
            loss, grads = step(function, model, batch)
        difference, name = gradient_difference(grads, eager[1])
        row = {"loss": _short(abs(loss - eager[0]).item() / (abs(eager[0]).item() + 1e-6)), "gradient": _short(difference)}
        row |= {"worst": name}
        right = row["loss"] < MISMATCH and difference < MISMATCH
        if wide:
            right = row["loss"] < SMALL
            if right and (errors := errors_of(function, model, batch, grads, eager[1])) is not None:
                row |= {"error": _short(errors[0]), "eager_error": _short(errors[1])}
                right = errors[0] < max(WORSE * errors[1], SMALL)
            elif right:
                right = difference < float("inf")
        row["state"] = "ok" if right else "differs"
    except Exception as e:
        row |= {"state": "fails", "why": first_line(e)}
    row["breaks"] = [reason.strip().split("\n")[0][:160] for reason in counters["graph_break"]]
    return row, graphs


def _short(number: float) -> float:
    return float(f"{number:.2e}")


def errors_of(
    function: Callable[..., Any], model: torch.nn.Module, batch: Batch, ours: Gradients, theirs: Gradients
) -> tuple[float, float] | None:
    """How far our gradients and eager's are from those in fp32, or None where the model does not run in it. Where ours are
    further, or of other parameters, other tokens are drawn: a router that decides otherwise, for a number that was rounded
    otherwise, is chance. Gradients of other parameters in every draw are not: the error is infinite.
    """
    ids = batch["input_ids"]
    squares: list[tuple[float, float]] = []
    try:
        wide = copy.deepcopy(model).float()
    except Exception:
        return None
    same = False
    for draw in range(DRAWS):
        try:
            truth = step(wide, wide, batch)[1]
        except Exception:
            return None
        if draw:
            ours, theirs = step(function, model, batch)[1], step(model, model, batch)[1]
        same = same or ours.keys() == theirs.keys()
        squares.append((error(ours, truth) ** 2, error(theirs, truth) ** 2))
        found = tuple((sum(e) / len(e)) ** 0.5 for e in zip(*squares, strict=True))
        if same and found[0] < max(WORSE * found[1], SMALL):
            return found
        flat, order = ids.reshape(-1), torch.Generator().manual_seed(draw)
        batch = batch | {"input_ids": flat[torch.randperm(flat.numel(), generator=order)].view_as(ids)}
    return found if same else (float("inf"), found[1])


def _told(report: Report) -> Row:
    """What is kept of a report."""
    missed: Counter = Counter()
    for s in report.sites:
        if s.status != MATCHED:
            missed[dataclasses.replace(s, file="/".join(s.file.split("/")[-1:]))] += 1
    return {
        "graphs": len(report.graphs),
        "constructs": {c: [n["matched"], n["expected"]] for c, n in report.constructs.items() if n["expected"]},
        "missed": [
            {"construct": s.construct, "status": s.status, "where": f"{s.file}:{s.line}", "reason": s.reason, "sites": n}
            for s, n in missed.items()
        ]
        + [
            {"construct": c, "status": "unseen", "where": "", "reason": "no code looks like it", "sites": n}
            for c, n in report.unseen.items()
        ],
        "untouched": [g.untouched for g in report.graphs if g.untouched],
        "opaque": dict(Counter(why.split("\n")[0][:120] for g in report.graphs for why in g.opaque.values())),
    }
