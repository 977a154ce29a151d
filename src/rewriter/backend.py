"""`torch.compile(model, backend="sloth")`: rewrite what the registry knows, then hand the graph to Inductor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext

from sloth.rewriter import module_floats, repeated_layers, varying_sizes  # noqa: F401  (they teach Dynamo)
from sloth.rewriter.deferred import returning
from sloth.rewriter.inner import captures, compile_with, compiler
from sloth.rewriter.input_gradients import left_to_require, requiring
from sloth.rewriter.notices import log, speak, warn_of_recompilations, warn_of_torch, warn_once
from sloth.rewriter.options import parse
from sloth.rewriter.parts import compile_in_parts
from sloth.rewriter.pattern import ARGUMENTS
from sloth.rewriter.pipeline import rewrite
from sloth.rewriter.registry import constructs, patterns
from sloth.rewriter.report import GraphReport
from sloth.rewriter.scratch import guards_of
from sloth.rewriter.shadow import shape_env_of

patterns()  # now, before anything is traced: they may tell Dynamo how to trace what it does not know
_listeners: list[list[GraphReport]] = []
speak()


def sloth(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The Dynamo backend. `mode` and `options` are Inductor's; sloth's own options are those of options.py.

    Raises ValueError for an option `sloth.…` that is not known, and what Inductor raises for its own.
    """
    warn_of_torch()
    warn_of_recompilations(CompileContext.current_compile_id())
    chosen = parse(options)
    inner = compiler(chosen.inner, mode, chosen.rest)
    required = left_to_require(gm)
    report = _rewritten(gm, chosen)
    for listener in _listeners:
        listener.append(report)
    start = time.perf_counter()
    compile_one = partial(compile_with, inner)
    if chosen.inner == "inductor" and captures(mode, chosen.rest):
        compiled = compile_one(gm, example_inputs)
    else:
        compiled, report.parts, report.compiled = compile_in_parts(gm, example_inputs, compile_one)
    compiled = returning(requiring(compiled, required), report.deferred)
    report.seconds[chosen.inner] = time.perf_counter() - start
    if report.parts > 1:
        log.info("sloth: in %d parts, %d of them compiled, %.1f s", report.parts, report.compiled, report.seconds[chosen.inner])
    return compiled


def _rewritten(gm: fx.GraphModule, chosen: Any) -> GraphReport:
    """The report of what was rewritten; what a user should know of it is said."""
    env = shape_env_of(gm)
    before = guards_of(env)
    token = ARGUMENTS.set(chosen.arguments)
    try:
        report = rewrite(gm, list(chosen.entries), constructs(), chosen.deferrals)
    finally:
        ARGUMENTS.reset(token)
    report.guards = guards_of(env)[len(before) :]
    if report.guards:
        warn_once(f"rewriting made sizes constants ({', '.join(report.guards)}): others are compiled anew. Please report this")
    if report.untouched:
        warn_once(f"a graph is left to Inductor as it was: {report.untouched}. Please report this")
    elif report.sites:
        log.info("sloth: %s", report.line({c.name: c.title for c in constructs()}))
    return report


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
