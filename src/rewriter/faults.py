"""What fails does not end a training run: a graph is compiled without the rewrite that is to blame, then without any, or it runs
as the model has it.

While compiling: what fails is tried again without the entries that the error names; without any; and if that works, with half of
them, and so on, until what is left out is least, or patience ends. While running: a forward pass that raises is run once more as
Dynamo traced it, uncompiled, if it writes to none of its inputs; what that raises is the model's own error.

Not faults, and passed on: memory that is not there, a broken device, what Dynamo raises to steer itself, and torch's checkpoint.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from sloth.compat import dynamo
from sloth.compat.dispatch import CheckpointStop
from sloth.rewriter.match.registry import deferrals, patterns
from sloth.rewriter.notices import log, warn_once
from sloth.rewriter.report import MATCHED, GraphReport, Site

PATIENCE = 120.0  # seconds of compiling in which the entry to blame is looked for
STEERING = tuple(getattr(dynamo, name, ()) for name in ("RestartAnalysis", "SkipFrame", "breaks_the_graph"))
PASSED_ON = (torch.OutOfMemoryError, torch.AcceleratorError, CheckpointStop, STEERING)

Compiled = Callable[..., Any]
_guilty: dict[Any, frozenset[str]] = {}  # by the code that Dynamo traced: not tried again for its next sizes


@dataclass
class Attempt:
    """To compile a graph: what came of it, or why nothing did."""

    report: GraphReport
    compiled: Any = None
    error: Exception | None = None

    @property
    def entries(self) -> frozenset[str]:
        """Those that made a rewrite."""
        return frozenset(entry_of(s) for s in self.report.sites if s.status == MATCHED)


def entry_of(site: Site) -> str:
    """The name of the entry: `rms_norm[llama]` is a variant of rms_norm."""
    return site.variant.partition("[")[0]


def causes(e: BaseException | None) -> Iterator[BaseException]:
    """It, and what it was made of."""
    seen: set[int] = set()
    while e is not None and id(e) not in seen:
        yield e
        seen.add(id(e))
        e = getattr(e, "inner_exception", None) or e.__cause__


def is_fault(e: BaseException) -> bool:
    """May the run go on without what raised this?"""
    return not any(isinstance(c, PASSED_ON) for c in causes(e))


def first_line(e: BaseException) -> str:
    """Of the exception that began it, at most a line."""
    *_, first = causes(e)
    begins, *others = f"{type(first).__name__}: {first}".strip().split("\n")
    if others and begins.endswith(":"):  # of a process that compiles: what it raised stands last
        begins = f"{begins} {others[-1].strip()}"
    return begins[:300]


def forget() -> None:
    """What was to blame in graphs of before."""
    _guilty.clear()


def compile_in_spite(attempt: Callable[[Collection[str]], Attempt], code: Any = None) -> Attempt:
    """The first attempt that works, and leaves out as little as can be found. attempt: given entries that must not be used. code:
    what the graph was made of. Where none works, the last, without any rewrite.
    """
    start, before = time.perf_counter(), _guilty.get(code, frozenset())
    failed = attempt(before)
    if failed.error is None or not failed.entries:
        return failed
    used, named = failed.entries, _named(failed)
    if named and (done := attempt(before | named)).error is None:
        return _blame(done, failed, named, before, code)
    log.info(
        "sloth: the compiler fails with a graph that was rewritten (%s). It is compiled without, and up to %.0f s are spent to"
        " find which entry is to blame", first_line(failed.error), PATIENCE,
    )  # fmt: skip
    everything = frozenset(e.name for e in (*patterns(), *deferrals()))
    done, blamed, last = attempt(everything), everything, everything
    while done.error is None and len(blamed & used) > 1 and time.perf_counter() - start < PATIENCE:
        for last in _halves(blamed & used):
            if (found := attempt(before | last)).error is None:
                done, blamed = found, last
                break
        else:  # more than one is to blame
            break
    if done.error is not None:
        return done
    if last != blamed:  # some backends return what belongs to the graph, which is another one by now
        done = attempt(before | blamed)
    return _blame(done, failed, blamed, before, code)


def _halves(names: frozenset[str]) -> list[frozenset[str]]:
    """Two of about the same size."""
    ordered = sorted(names)
    middle = len(ordered) // 2
    return [frozenset(ordered[:middle]), frozenset(ordered[middle:])]


def _blame(done: Attempt, failed: Attempt, blamed: frozenset[str], before: frozenset[str], code: Any) -> Attempt:
    """Say it, and remember."""
    if code is not None:
        _guilty[code] = before | blamed
    guilty = blamed & failed.entries
    names = ",".join(sorted(guilty))
    site = next(s for s in failed.report.sites if s.status == MATCHED and entry_of(s) in guilty)
    where = f", first used at {site.file.split('/')[-1]}:{site.line}" if site.file else ""
    assert failed.error is not None
    warn_once(
        f"a graph is compiled without {names}{where}: the compiler fails with it ({first_line(failed.error)})."
        f" options={{'sloth.disable': '{names}'}} or SLOTH_OPTIONS='sloth.disable={names}' leaves it out from the start."
        " Please report this"
    )
    return done


def _named(failed: Attempt) -> frozenset[str]:
    """The entries whose operator the error speaks of: `sloth.rms_norm_backward` is of the entry whose operator is rms_norm. None
    where it speaks of several, as where it shows a graph.
    """
    assert failed.error is not None
    text = "\n".join("".join(traceback.format_exception_only(c)) for c in causes(failed.error))
    operators = {p.name: p.op.name().replace("::", ".") for p in patterns() if p.name in failed.entries}
    named = set()
    for word in re.findall(r"\b(\w+(?:::|\.)\w+)", text):
        meant = {op for op in operators.values() if f"{word.replace('::', '.')}_".startswith(f"{op}_")}
        named |= {max(meant, key=len)} if meant else set()
    return frozenset(name for name, op in operators.items() if named == {op})


# ---------------------------------------------------------------- while it runs


class Original:
    """A graph as Dynamo made it. It is kept without what is known of its nodes, and made to run when it is needed."""

    def __init__(self, gm: fx.GraphModule, graphs: dict[fx.GraphModule, fx.Graph]):
        self.graph = graphs[gm]
        names = {str(n.target) for n in self.graph.nodes if n.op in ("get_attr", "call_module")}
        held = {name: attrgetter(name)(gm) for name in names}
        self.held = {
            name: Original(x, graphs) if isinstance(x, fx.GraphModule) and x in graphs else x for name, x in held.items()
        }
        for n in self.graph.nodes:
            n.meta.clear()

    def module(self) -> fx.GraphModule:
        held = {name: x.module() if isinstance(x, Original) else x for name, x in self.held.items()}
        return fx.GraphModule(held, self.graph)


def run_in_spite(
    compiled: Compiled, original: Original, entries: Collection[str], finish: Callable[[Compiled], Compiled]
) -> Compiled:
    """`compiled`; once it has raised, the graph as the model has it, uncompiled. finish: makes of a graph that runs what is
    returned.
    """
    instead: list[Compiled] = []

    def run(*args: Any) -> Any:
        if instead:
            return instead[0](*args)
        try:
            return compiled(*args)
        except Exception as e:
            if not is_fault(e):
                raise
            traceback.clear_frames(e.__traceback__)  # they hold what was computed
            eager, why = finish(original.module().forward), first_line(e)
            try:
                found = eager(*args)
            except torch.OutOfMemoryError:  # it takes more
                raise e from None
            except Exception as own:
                raise own from None
        instead.append(eager)
        names = ",".join(sorted(entries))
        warn_once(
            f"a compiled graph raises where the model does not, and now runs uncompiled: {why}. It was rewritten by {names}:"
            " with options={'sloth.disable': …}, naming the one to blame, it is compiled. Please report this"
        )
        return found

    return run
