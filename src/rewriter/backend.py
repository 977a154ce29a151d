"""`torch.compile(model, backend="sloth")`: rewrite what the registry knows, then hand the graph to Inductor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx

from sloth.rewriter.deferred import returning
from sloth.rewriter.inner import captures, compile_with, compiler
from sloth.rewriter.input_gradients import left_to_require, requiring
from sloth.rewriter.parts import compile_in_parts
from sloth.rewriter.pattern import ARGUMENTS
from sloth.rewriter.pipeline import rewrite
from sloth.rewriter.registry import constructs, deferrals, patterns
from sloth.rewriter.report import GraphReport

log = logging.getLogger("sloth")
patterns()  # now, before anything is traced: they may tell Dynamo how to trace what it does not know
_listeners: list[list[GraphReport]] = []

OPTIONS = {
    "sloth.disable": "names of patterns or constructs not to rewrite, comma-separated or a list",
    "sloth.linear_cross_entropy.budget": "bytes of logits at a time; any number of an entry's operator is set so",
    "sloth.inner_backend": "what compiles the rewritten graph instead of Inductor: the name of any Dynamo backend",
}


def sloth(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The Dynamo backend. `mode` and `options` are Inductor's; sloth's own options are those of OPTIONS.

    Raises ValueError for an option `sloth.…` that is not known, and what Inductor raises for its own.
    """
    own = {k: v for k, v in (options or {}).items() if k.startswith("sloth.")}
    rest = {k: v for k, v in (options or {}).items() if not k.startswith("sloth.")}
    arguments = _arguments(own)
    if unknown := sorted(own.keys() - OPTIONS.keys()):
        known = "; ".join(f"{k}: {what}" for k, what in OPTIONS.items())
        raise ValueError(f"unknown option {', '.join(unknown)} of backend 'sloth'. Known are: {known}")
    name = own.get("sloth.inner_backend", "inductor")
    inner = compiler(name, mode, rest)
    disabled = own.get("sloth.disable", ())
    disabled = {name.strip() for name in (disabled.split(",") if isinstance(disabled, str) else disabled)} - {""}
    known = (*patterns(), *deferrals())
    if strange := disabled - {e.name for e in known} - {c.name for c in constructs()}:
        raise ValueError(f"sloth.disable names {', '.join(sorted(strange))}; known are {', '.join(e.name for e in known)}")
    entries = [e for e in patterns() if not {e.name, *(c.name for c in (e.construct, *e.also))} & disabled]
    deferring = [d for d in deferrals() if not {d.name, d.construct.name} & disabled]

    required = left_to_require(gm)
    token = ARGUMENTS.set(arguments)
    try:
        report = rewrite(gm, entries, constructs(), deferring)
    finally:
        ARGUMENTS.reset(token)
    log.info("sloth: %s", report.line({c.name: c.title for c in constructs()}))
    for listener in _listeners:
        listener.append(report)
    start = time.perf_counter()
    compile_one = partial(compile_with, inner)
    if name == "inductor" and captures(mode, rest):
        compiled = compile_one(gm, example_inputs)
    else:
        compiled, report.parts, report.compiled = compile_in_parts(gm, example_inputs, compile_one)
    compiled = returning(requiring(compiled, required), report.deferred)
    report.seconds[name] = time.perf_counter() - start
    if report.parts > 1:
        log.info("sloth: in %d parts, %d of them compiled, %.1f s", report.parts, report.compiled, report.seconds[name])
    return compiled


def _arguments(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Takes `sloth.NAME.ARGUMENT` out of the options: a number for the operators of the entry NAME and of those named NAME_…
    (the same in other cases). ValueError for what is no number.
    """
    found: dict[str, dict[str, Any]] = {}
    known = set()
    for key in sorted(options, key=len):  # the most special one last
        name, _, argument = key.removeprefix("sloth.").partition(".")
        for p in patterns():
            kinds = {a.name: str(a.type) for a in p.op._schema.arguments}
            if argument not in kinds or not f"{p.name}_".startswith(f"{name}_"):
                continue
            value = options[key]
            if kinds[argument] not in ("int", "float") or not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{key}={value!r}: only numbers can be set, and this is a {kinds[argument]}")
            found.setdefault(p.name, {})[argument] = value
            known.add(key)
    for key in known:
        del options[key]
    return found


def _reset() -> None:
    """torch._dynamo.reset() calls this: forget CUDA graphs (mode="reduce-overhead")."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


sloth.reset = _reset


@contextmanager
def listening() -> Iterator[list[GraphReport]]:
    """The reports of the graphs compiled meanwhile, by this thread or any other."""
    reports: list[GraphReport] = []
    _listeners.append(reports)
    try:
        yield reports
    finally:
        _listeners.remove(reports)
