"""What is to be done in a graph and its bodies. `plan` only reads; `apply` in apply.py edits.

A plan is what a rewrite can be judged by, bounded, printed and undone by: `str(plan)` is a line for each placement.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from sloth.compat.dispatch import FakeTensorMode
from sloth.rewriter.graph.lower import LoweredGraph, shape_env_of
from sloth.rewriter.graph.scratch import scratch_mode
from sloth.rewriter.match.cost import Cost, Costs
from sloth.rewriter.match.matcher import Match, Matcher, Refused
from sloth.rewriter.match.pattern import LazyOutputRule, Pattern
from sloth.rewriter.plan import legality
from sloth.rewriter.plan.choice import group_horizontally, select_non_overlapping
from sloth.rewriter.plan.lazy_outputs import LazyOutputs
from sloth.rewriter.plan.places import Places
from sloth.rewriter.plan.trained import nodes_with_gradients
from sloth.rewriter.report import source, timed

Placement = list[Match]  # what one call is to stand for: several where its operator takes lists


class RewriteFailed(Exception):
    """A bug was met in a rewrite of this entry."""

    def __init__(self, entry: str):
        super().__init__(entry)
        self.entry = entry


@dataclass(eq=False)
class GraphPlan:
    """For one graph. trained: nodes that a gradient comes to; placements: calls to be made, in graph order; costs: of all legal
    matches; losers: legal matches, each with the one that takes its place; refused: matches that are not made, and why; beyond:
    those of `refused` that the limit leaves out, whose place nothing else takes.
    """

    view: LoweredGraph
    lazy: LazyOutputs
    trained: frozenset[fx.Node]
    placements: list[Placement] = field(default_factory=list)
    costs: dict[Match, Cost] = field(default_factory=dict)
    losers: list[tuple[Match, Match]] = field(default_factory=list)
    refused: list[tuple[Match, Refused]] = field(default_factory=list)
    beyond: list[Match] = field(default_factory=list)

    @property
    def matches(self) -> list[Match]:
        return [m for placement in self.placements for m in placement]

    def instead_of(self, placement: Placement, why: Refused, todo: list[Placement]) -> list[Placement]:
        """What is tried in place of a placement that was refused."""
        if len(placement) > 1:
            return [[m] for m in placement]
        self.refused.append((placement[0], why))
        standing = [*self.matches, *self.beyond, *(m for waiting in todo for m in waiting)]
        freed, self.losers = select_non_overlapping([m for m, _ in self.losers], standing)
        return group_horizontally(freed, self.trained)


@dataclass
class Plan:
    """For a graph and its bodies, outermost first. originals: copies of all of them, as they are before `apply`."""

    graphs: list[GraphPlan]
    matcher: Matcher
    mode: FakeTensorMode
    limit: int | None
    originals: list[tuple[fx.GraphModule, fx.Graph]]

    def settle(self, graph: GraphPlan, attempt: Callable[[Placement], object]) -> None:
        """Keep the placements that `attempt` takes, as many matches as the limit leaves of the graphs before. What it refuses is
        tried match by match, and then what the refused match took the place of.
        """
        made = sum(len(g.matches) for g in self.graphs[: self.graphs.index(graph)])
        todo, graph.placements = graph.placements, []
        while todo:
            placement = todo.pop(0)
            if self.limit is not None and made + len(graph.matches) + len(placement) > self.limit:
                graph.refused += [(m, Refused("limit", f"sloth.limit={self.limit}")) for m in placement]
                graph.beyond += placement
                continue
            try:
                attempt(placement)
            except Refused as why:
                todo[:0] = graph.instead_of(placement, why, todo)
            except Exception as e:
                raise RewriteFailed(placement[0].pattern.name) from e
            else:
                graph.placements.append(placement)

    def restore(self) -> None:
        """Undo `apply`: all graphs are as they were when the plan was made."""
        for gm, graph in self.originals:
            gm.graph = graph

    def __str__(self) -> str:
        """A line for each placement, with the number of rewrites so far (that `sloth.limit` counts), for each output that is left
        to be computed when it is read, and for each match that is refused.
        """
        lines, count = [], 0
        for graph in self.graphs:
            for placement in graph.placements:
                count += len(placement)
                lines.append(f"{count:4}  {_shown(graph, placement)}")
            lines += [f"      {line}" for line in graph.lazy.lines(graph.matches)]
            lines += [f"      {m.variant} refused, {why.status}: {why} ({_place(m)})" for m, why in graph.refused]
        return "\n".join(lines) or "nothing to rewrite"


def plan(
    views: list[LoweredGraph],
    entries: list[Pattern],
    deferrals: Sequence[LazyOutputRule] = (),
    limit: int | None = None,
    costs: Costs = Costs(),
    seconds: dict[str, float] | None = None,
) -> Plan:
    """What `entries` and `deferrals` are to do in the lowered graphs. Nothing is edited. seconds: gets the time of each stage."""
    seconds = {} if seconds is None else seconds
    mode = scratch_mode(shape_env_of(views[0].gm))
    with timed(seconds, "patterns"):
        matcher = Matcher(entries, mode)
    tried: dict = {}
    found = Plan([], matcher, mode, limit, [])
    for view in views:
        trained = nodes_with_gradients(view, {id(graph.view): graph.trained for graph in found.graphs})
        graph = GraphPlan(view, LazyOutputs(view, deferrals, costs), trained)
        with timed(seconds, "match"):
            matches = list(matcher.matches(view.shadow.values))
        with timed(seconds, "legality"):
            context = legality.LegalityContext(view, mode, graph.trained, tried)
            legal = list(_legal(graph, matches, context, costs))
        with timed(seconds, "match"):
            matches = list(matcher.readings(view.shadow, legal))
        with timed(seconds, "legality"):
            legal += _legal(graph, matches, context, costs)
            accepted, graph.losers = select_non_overlapping([m for m in legal if not m.values & graph.lazy.reserved])
            graph.placements = group_horizontally(accepted, graph.trained)
            found.graphs.append(graph)
            found.settle(graph, Places(view).require_order)
    with timed(seconds, "rewrite"):
        found.originals += [(view.gm, _copied(view.gm.graph)) for view in views]
    return found


def _legal(graph: GraphPlan, matches: Iterable[Match], context: legality.LegalityContext, costs: Costs) -> Iterator[Match]:
    """The matches that may be made and pay, or smaller ones in their place; the others are noted as refused."""
    for match in matches:
        refused: list[tuple[Match, Refused]] = []
        for m in (match, *match.smaller):
            try:
                legality.check(m, context)
                graph.costs[m] = costs.of(m)
            except Refused as why:
                refused.append((m, why))
            else:
                yield m
                break
        else:
            graph.refused.append(refused[0])


def _shown(graph: GraphPlan, placement: Placement) -> str:
    first, several = placement[0], f" ×{len(placement)}" * (len(placement) > 1)
    operations = sum(graph.costs[m].operations for m in placement)
    reasons = {r: None for m in placement if (r := graph.costs[m].reason)}
    where = f"{graph.view.path.rstrip('.')} " * bool(graph.view.path) + _place(first)
    what = f"{first.variant}{several} in place of {operations} operation{'s' * (operations != 1)}"
    return ", ".join([what, *reasons]) + f" ({where})"


def _place(match: Match) -> str:
    node = next((n for r in match.roots for n in (*r.nodes, r.origin) if n is not None), None)
    file, line = source(node)
    return f"{file.split('/')[-1]}:{line}"


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy with all that Dynamo attached to the nodes (AOTAutograd asks where each input comes from)."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        vars(new).update({k: v for k, v in vars(old).items() if k not in vars(new)})
    return copied
