"""Each distinct rewrite of a plan, checked while its graph is compiled.

The original graph runs once, without gradients, on the inputs that it is compiled for. As soon as all that a rewrite reads and
gives is there, it is cut out and run forward and backward, original and replacement, on these tensors and on random ones of their
shapes, beside the original in fp64; then the tensors go. Equal rewrites (code, shapes, dtypes, which gradients) are checked once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import FakeTensor
from sloth.rewriter.compile.structural_key import Bodies
from sloth.rewriter.graph.aliasing import storages, written_storages
from sloth.rewriter.graph.lower import LoweredGraph
from sloth.rewriter.graph.value import Symbol
from sloth.rewriter.match.matcher import Match, Refused
from sloth.rewriter.notices import warn_once
from sloth.rewriter.plan.plan import Plan
from sloth.rewriter.report import source
from sloth.rewriter.verify.check import Check
from sloth.rewriter.verify.cut import Cut, cut
from sloth.rewriter.verify.report import NOT_CHECKED, WRONG, Checked
from sloth.rewriter.verify.run import NotExact, Run, same_random_numbers


def keep_what_holds(plan: Plan, inputs: Sequence[Any]) -> list[Checked]:
    """Check the plan's placements, and refuse those that fail (status `verify`), with a warning. inputs: of the graph."""
    checks = _Checks(plan)
    checks.run([(p, g.view) for g in plan.graphs for p in g.placements], inputs)
    for graph in plan.graphs:

        def attempt(placement: list[Match], view: LoweredGraph = graph.view) -> None:
            key = checks.key(placement, view)
            if key not in checks.found:  # what comes in the place of a rewrite that failed
                checks.run([(placement, view)], inputs)
            if (found := checks.found[key]).status == WRONG:
                warn_once(f"{found.rewrite} is not made: {found.reason} ({found.file.split('/')[-1]}:{found.line})")
                raise Refused("verify", found.reason)

        plan.settle(graph, attempt)
    return list(checks.found.values())


class _Checks:
    """found: what came out, by the key of cuts."""

    def __init__(self, plan: Plan):
        self.plan, self.bodies = plan, Bodies()
        self.found: dict[Any, Checked] = {}
        self.keys: dict[tuple[Match, ...], Any] = {}

    def key(self, placement: list[Match], view: LoweredGraph) -> Any:
        if tuple(placement) not in self.keys:
            self.keys[tuple(placement)] = self._cut(placement, view)[0]
        return self.keys[tuple(placement)]

    def _cut(self, placement: list[Match], view: LoweredGraph) -> tuple[Any, Cut | None]:
        try:
            made = cut(placement, view, self.bodies)
        except Exception as e:
            key = tuple(placement)
            self.found[key] = _told(placement, view, NOT_CHECKED, f"it cannot be cut out: {_shown(e)}")
            return key, None
        return made.key, made

    def run(self, placements: list[tuple[list[Match], LoweredGraph]], inputs: Sequence[Any]) -> None:
        cuts: dict[Any, Cut] = {}
        for placement, view in placements:
            key, made = self._cut(placement, view)
            self.keys[tuple(placement)] = key
            sites = len(placement) * view.times
            if made is None or key in self.found:
                self.found[key].sites += sites if made is not None else 0
            else:
                self.found[key] = _told(placement, view, NOT_CHECKED, "it was not reached", sites)
                cuts[key] = made
        watch = _Watch(cuts, self._check)
        why = ""
        with torch.no_grad(), same_random_numbers():
            try:
                _watched(self.plan, inputs, watch)
            except Exception as e:
                why = f"the original graph does not run by itself: {_shown(e)}"
        for key, made in watch.waiting():  # in the backward pass of an autograd function, say
            self._check(key, made, None, why or "no real inputs: it is in a part that did not run in the forward pass")

    def _check(self, key: Any, made: Cut, values: list[Any] | None, why: str = "") -> None:
        told = self.found[key]
        try:
            with torch.inference_mode(False), same_random_numbers(1):
                Check(made, told).run(values, why)
        except torch.OutOfMemoryError:
            told.status, told.reason = NOT_CHECKED, "out of memory: take a smaller batch, or fewer layers"
            told.results.clear()
        except NotExact as e:
            told.status, told.reason = NOT_CHECKED, f"no fp64 to judge by: {e}".split("\n")[0]
        except Exception as e:
            told.status, told.reason = NOT_CHECKED, f"it does not run by itself: {_shown(e)}"
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _told(placement: list[Match], view: LoweredGraph, status: str, reason: str, sites: int | None = None) -> Checked:
    node = placement[0].roots[-1].nodes[0]
    several = f" ×{len(placement)}" * (len(placement) > 1)
    sites = len(placement) * view.times if sites is None else sites
    return Checked(f"{placement[0].variant}{several}", str(placement[0].pattern.op), *source(node), sites, status, reason)


def _shown(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}".split("\n")[0][:200]


class _Watch:
    """Collects the values of nodes that cuts wait for, and hands them over as soon as a cut has all."""

    def __init__(self, cuts: dict[Any, Cut], check: Callable[[Any, Cut, list[Any]], None]):
        self.check = check
        self.missing = {key: {*c.inputs, *c.outputs} for key, c in cuts.items()}
        self.cuts = cuts
        self.values: dict[fx.Node, Any] = {}
        self.wanted: dict[fx.Node, list[Any]] = {}
        for key, nodes in self.missing.items():
            for n in nodes:
                self.wanted.setdefault(n, []).append(key)

    def see(self, n: fx.Node, value: Any) -> None:
        if n not in self.wanted:
            return
        self.values[n] = value
        for key in [*self.wanted[n]]:
            self.missing[key].discard(n)
            if not self.missing[key]:
                made = self.cuts.pop(key)
                self.check(key, made, [self.values[n] for n in made.inputs])
                for seen in {*made.inputs, *made.outputs}:
                    self.wanted[seen].remove(key)
                    if not self.wanted[seen]:
                        del self.wanted[seen], self.values[seen]

    def waiting(self) -> list[tuple[Any, Cut]]:
        return list(self.cuts.items())


def _watched(plan: Plan, inputs: Sequence[Any], watch: _Watch) -> None:
    """Run the outermost graph, with its bodies, on real inputs; memory that it writes is a copy."""
    if any(isinstance(x, FakeTensor) for x in inputs):
        raise ValueError("it is compiled for fake tensors")
    outer = plan.graphs[0].view
    written = written_storages(outer.writes, outer.gm)
    places = outer.gm.graph.find_nodes(op="placeholder")
    given = []
    for n, x in zip(places, inputs, strict=True):
        example = n.meta.get("example_value")
        x = x.node.hint if isinstance(x, Symbol) else x
        if isinstance(example, torch.Tensor) and not isinstance(x, torch.Tensor):  # a float that dynamic=True made an input
            x = torch.tensor(x, dtype=example.dtype)
        is_written = isinstance(x, torch.Tensor) and not written.isdisjoint(storages(n, outer.gm))
        given.append(x.clone() if is_written else x)

    class Watching(Run):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            watch.see(n, out)
            if not watch.cuts:
                raise _Done
            return out

    try:
        if watch.cuts:
            Watching(outer.gm).run(*given)
    except _Done:
        pass


class _Done(Exception):
    """All that was waited for has been seen."""
