"""`sloth.explain(model, batch)`: what the backend would rewrite in one training call, and what it would leave alone, and why."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import wraps
from inspect import signature
from typing import Any

import torch

from sloth.compat.dynamo import config, counters
from sloth.rewriter.backend import listening, sloth
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import constructs
from sloth.rewriter.report import Report


def explain(model: torch.nn.Module, batch: Mapping[str, Any]) -> Report:
    """Trace one call `model(**batch)` with the backend, without Inductor, and report.

    model: any nn.Module, compiled or not; its parameters, gradients, buffers and mode, and the random state, are left as they
    were. batch: the keyword arguments of one training call, e.g. {"input_ids": …, "labels": …}.
    For models of transformers the expected counts come from the modules that are called (one site for each norm, rotation, MLP,
    loss); for others from what their graphs show. Raises TypeError for a batch that is no mapping, and whatever the model itself
    raises.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"explain needs an nn.Module, not {type(model).__name__}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"explain needs the keyword arguments of one call as a mapping, not {type(batch).__name__}")
    module = getattr(model, "_orig_mod", model)
    report = Report(titles={c.name: c.title for c in constructs()})
    with unchanged(module), torch.enable_grad():
        report.expected = sites_called(module, batch, constructs())
        before = Counter(counters["graph_break"])
        unlimited = config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
        with listening() as graphs, unlimited:
            torch.compile(module, backend=_trace_only())(**batch)
        report.graphs = graphs
        report.breaks = [reason.strip().split("\n")[0] for reason in Counter(counters["graph_break"]) - before]
    return report


def _trace_only():
    """A backend that Dynamo has not seen: what it traced for another one it would not trace again."""

    @wraps(sloth)  # what Dynamo is taught, it is taught for graphs of a backend of this name
    def backend(gm, example_inputs):
        return sloth(gm, example_inputs, options={"sloth.inner_backend": "eager"})

    return backend


def sites_called(model: torch.nn.Module, batch: Mapping[str, Any], wanted: list[Construct]) -> dict[str, int]:
    """Sites by the modules that one eager call goes through, and the functions they call."""
    if not any(type(m).__module__.startswith("transformers.") for m in model.modules()):
        return {}
    found: Counter[str] = Counter()
    inside: list[set[str]] = [set()]  # for each open module call, the constructs whose function it has called
    functions = {c.function: c.name for c in wanted if c.function}

    def enter(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = _arguments(module, args, kwargs)
        for c in wanted:
            found[c.name] += c.module(module, arguments)
        inside.append(set())

    def leave(module: torch.nn.Module, args: tuple, out: Any) -> None:
        found.update(inside.pop())

    def called(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            name = frame.f_code.co_name.lstrip("_")
            inside[-1].update(c for f, c in functions.items() if name.startswith(f))

    hooks = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in model.modules()]
    hooks += [m.register_forward_hook(leave) for m in model.modules()]
    before = sys.getprofile()
    try:
        sys.setprofile(called)
        with torch.no_grad():
            model(**batch)
    finally:
        sys.setprofile(before)
        for h in hooks:
            h.remove()
    return dict(found)


def _arguments(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    try:
        return dict(signature(module.forward).bind_partial(*args, **kwargs).arguments) | kwargs
    except TypeError:
        return kwargs


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Buffers and the random state are put back; gradients are not touched by a forward pass."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        with torch.no_grad():
            for n, b in model.named_buffers():
                if n in buffers and buffers[n].shape == b.shape:
                    b.copy_(buffers[n])
