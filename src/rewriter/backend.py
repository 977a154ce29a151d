"""`torch.compile(model, backend="sloth")`: rewrite what the registry knows, then hand the graph to Inductor."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import CompileContext
from sloth.integrations.integration import load
from sloth.integrations.transformers import mark_requires_grad, outputs_requiring_grad
from sloth.options import Options, parse
from sloth.rewriter import progress
from sloth.rewriter.compile.inductor import compile_with, compiler, start_early, start_workers, uses_cudagraphs
from sloth.rewriter.compile.plain_inputs import plain_inputs
from sloth.rewriter.compile.regions import compile_by_region
from sloth.rewriter.dynamo import called_modules
from sloth.rewriter.faults import (
    Attempt,
    Compiled,
    Original,
    causes,
    compile_in_spite,
    first_line,
    forget,
    is_fault,
    run_in_spite,
)
from sloth.rewriter.graph.aliasing import writes_outside
from sloth.rewriter.graph.lower import shape_env_of
from sloth.rewriter.graph.scratch import guards_of
from sloth.rewriter.match.pattern import ARGUMENTS
from sloth.rewriter.match.registry import constructs, patterns
from sloth.rewriter.notices import log, speak, warn_of_recompilations, warn_of_versions, warn_once
from sloth.rewriter.pipeline import rewrite
from sloth.rewriter.plan.lazy_outputs import wrap_outputs
from sloth.rewriter.plan.plan import Plan
from sloth.rewriter.report import GraphReport

load(*(f"sloth.integrations.{name}" for name in ("generation", "llamafactory", "peft", "trainer", "trl")))  # met as they are
TAUGHT = ("collector", "graph_breaks", "module_floats", "repeated_layers", "varying_sizes", "widths")
load(*(f"sloth.rewriter.dynamo.{name}" for name in TAUGHT))
load("sloth.generation.session")
patterns()  # now, before anything is traced: they may tell Dynamo how to trace what it does not know
NODES_A_SECOND = 15  # that Inductor compiles, both passes: 12 to 18, tiny models on two cores as 8B ones on a GPU's host
start_early()
_listeners: list[list[GraphReport]] = []
speak()


@progress.watched
def sloth(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Compiled:
    """The Dynamo backend. `mode` and `options` are Inductor's; sloth's own options are those of options.py.

    Raises ValueError for an option `sloth.…` that is not known, and what Inductor raises for its own.
    """
    warn_of_versions()
    compile_id = CompileContext.current_compile_id()
    warn_of_recompilations(compile_id)
    chosen = parse(options)
    if chosen.inner == "inductor":
        start_workers(gm)
    inner = compiler(chosen.inner, mode, chosen.rest)
    required, writes = outputs_requiring_grad(gm), writes_outside(gm)
    whole = chosen.inner == "inductor" and uses_cudagraphs(mode, chosen.rest)
    compile_one, plans = progress.each(partial(compile_with, inner)), []

    def attempt(left_out: Collection[str]) -> Attempt:
        for plan in plans[-1:]:
            plan.restore()
        report = _rewritten(gm, example_inputs, chosen.without(left_out))
        if report.plan is not None:
            plans.append(report.plan)
        start, starting = time.perf_counter(), partial(_say, report, chosen.inner)
        try:
            if whole:
                starting(1, [gm])
                compiled = compile_one(gm, example_inputs)
            else:
                compiled = compile_by_region(gm, example_inputs, compile_one, starting, chosen.checkpoint_offload)
        except Exception as e:
            if not is_fault(e):
                raise
            return Attempt(report, error=e)
        report.seconds[chosen.inner] = time.perf_counter() - start
        return Attempt(report, compiled)

    def finish(compiled: Compiled) -> Compiled:
        return mark_requires_grad(plain_inputs(compiled), required)

    made = compile_in_spite(attempt, getattr(compile_id, "frame_id", None))
    report = made.report
    plan, report.plan = report.plan, None
    for listener in _listeners:
        listener.append(report)
    if (error := made.error) is not None:
        if chosen.inner != "inductor":  # whoever chose another compiler is told what it raises
            raise error
        if plan is not None:
            plan.restore()
        files = any(isinstance(e, OSError) for e in causes(error))
        hint = ". TORCHINDUCTOR_CACHE_DIR names another folder for what it writes" * files
        warn_once(f"Inductor fails on a graph as the model has it, which runs uncompiled: {first_line(error)}{hint}")
        return finish(gm.forward)
    compiled = wrap_outputs(finish(made.compiled), report.deferred)
    if report.rewrites and not writes:
        compiled = run_in_spite(compiled, Original(gm, dict(plan.originals)), made.entries, finish)
    return _counted(compiled, report) if _listeners else compiled


def _counted(compiled: Compiled, report: GraphReport) -> Compiled:
    """A graph of one layer, where the model is not one graph, runs for all layers like it: its sites count as often."""

    def run(*args: Any) -> Any:
        report.runs += bool(_listeners)
        return compiled(*args)

    return run


def _say(report: GraphReport, inner: str, parts: int, modules: list[fx.GraphModule]) -> None:
    """On one line, before the wait: what was found, what is compiled, and how long that takes, by the number of its nodes."""
    report.parts, report.compiled = parts, len(modules)
    progress.starting(len(modules))
    if report.untouched or not (report.sites or report.expected or report.unread):
        return
    nodes = sum(len(g.graph.nodes) for m in modules for g in m.modules() if isinstance(g, fx.GraphModule))
    cut = f"; {len(modules)} of {parts} parts are compiled, equal ones once" if parts > 1 else ""
    wait = (
        f"; compiling takes about {5 * round(1 + nodes / NODES_A_SECOND / 5)} s, less what is cached"
        if inner == "inductor"
        else ""
    )
    log.info("sloth: %s%s%s", report.line({c.name: c.title for c in constructs()}), cut, wait)


def _rewritten(gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Options) -> GraphReport:
    """The report of what was rewritten; what a user should know of it is said."""
    env = shape_env_of(gm)
    before = guards_of(env)
    token = ARGUMENTS.set(chosen.arguments)
    try:
        check = _check_of(example_inputs) if chosen.verify else None
        report = rewrite(gm, list(chosen.entries), constructs(), chosen.deferrals, chosen.limit, chosen.always, check)
    finally:
        ARGUMENTS.reset(token)
    report.guards = guards_of(env)[len(before) :]
    report.expected = called_modules.expected_sites(CompileContext.current_compile_id(), constructs())
    if report.guards:
        warn_once(f"rewriting made sizes constants ({', '.join(report.guards)}): others are compiled anew. Please report this")
    if report.untouched:
        warn_once(f"a graph is left to Inductor as it was: {report.untouched}. Please report this")
    return report


def _check_of(example_inputs: Sequence[Any]) -> Callable[[Plan], list[Any]]:
    from sloth.rewriter.verify.rewrites import keep_what_holds  # nobody else needs it

    return partial(keep_what_holds, inputs=example_inputs)


def _reset() -> None:
    """torch.compiler.reset() calls this: forget which rewrites failed, widths, and CUDA graphs (mode="reduce-overhead")."""
    forget()
    if (widths := sys.modules.get("sloth.rewriter.dynamo.widths")) is not None:
        widths.forget()
    if torch.cuda.is_available():
        from sloth.compat.inductor import reset_cudagraph_trees

        reset_cudagraph_trees()


sloth.reset = _reset


@contextmanager
def listening() -> Iterator[list[GraphReport]]:
    """The reports of the graphs compiled meanwhile, by this thread or any other. How often these run is counted: of one call."""
    reports: list[GraphReport] = []
    _listeners.append(reports)
    try:
        yield reports
    finally:
        _listeners.remove(reports)
