"""From a Dynamo graph to the rewritten graph: lower → plan (match, legality, cost, choice) → apply → sites. One page."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx

from sloth.rewriter.graph.lower import lower
from sloth.rewriter.match.cost import Costs
from sloth.rewriter.match.matcher import Match
from sloth.rewriter.match.pattern import Construct, LazyOutputRule, Pattern
from sloth.rewriter.notices import log, warn_once
from sloth.rewriter.plan.apply import Applied, apply
from sloth.rewriter.plan.plan import GraphPlan, Plan, RewriteFailed, plan
from sloth.rewriter.report import GraphReport, Site, timed
from sloth.rewriter.sites import deferred_sites, layers_in, matched_sites, missed_sites


def rewrite(
    gm: fx.GraphModule,
    entries: list[Pattern],
    constructs: list[Construct],
    deferrals: Sequence[LazyOutputRule] = (),
    limit: int | None = None,
    always: Collection[str] = (),
    check: Callable[[Plan], list[Any]] | None = None,
) -> GraphReport:
    """Rewrite `gm` and its bodies in place, at most `limit` times; entries and constructs in `always` whether it pays or not.
    Whatever goes wrong, the graph is then as it was, and the report says why. check: asked before the graph is edited; it may
    refuse placements of the plan, and gives `report.verified`.
    Outputs that `report.deferred` names are for `lazy_outputs.wrap_outputs` to make of what the graph gives out in their place.
    """
    report = GraphReport()
    made: Plan | None = None
    try:
        with timed(report.seconds, "shadow"):
            lowered = lower(gm)
        for view in lowered:
            report.opaque |= {f"{view.path}{n.name}": why for n, why in view.opaque.items()}
            for node in view.opaque:
                report.unread.update({kind: n * view.times for kind, n in layers_in(node, view.gm).items()})
        made = plan(lowered, entries, deferrals, limit, Costs(frozenset(always)), report.seconds)
        log.debug("sloth: plan\n%s", made)
        if check is not None:
            with timed(report.seconds, "verify"):
                report.verified = check(made)
        with timed(report.seconds, "report"):  # what is made now points to nodes that are gone afterwards
            sites = {m: matched_sites(m) for graph in made.graphs for m in graph.costs}
        with timed(report.seconds, "rewrite"):
            applied = apply(made)
        with timed(report.seconds, "report"):
            for graph, done in zip(made.graphs, applied, strict=True):
                _tell(report, graph, done, made, sites, constructs)
        report.plan = made
    except Exception as e:
        if made is not None:
            made.restore()
        if isinstance(e, RewriteFailed):  # the graph is half edited: it is begun anew
            why = f"{type(e.__cause__).__name__}: {e.__cause__}".split("\n")[0]
            warn_once(f"{e.entry} is left out of a graph, since a rewrite of it raises {why}. Please report this")
            others = [p for p in entries if p.name != e.entry]
            return rewrite(gm, others, constructs, deferrals, limit, always)
        report.rewrites = 0
        report.sites.clear()
        report.deferred.clear()
        report.untouched = f"{type(e).__name__}: {e}".split("\n")[0]
    return report


def _tell(
    report: GraphReport, graph: GraphPlan, done: Applied, made: Plan, sites: dict[Match, list[Site]], constructs: list[Construct]
) -> None:
    """Report what became of one graph."""
    view, reserved = graph.view, graph.lazy.reserved
    report.rewrites += len(graph.matches)
    report.deferred += done.deferred
    covered = reserved.union(*(m.values for m in graph.matches))
    found: list[Site] = [site for m in graph.matches for site in sites[m]]
    found += [*done.sites, *deferred_sites(reserved, constructs)]
    try:
        found += missed_sites(view, made.matcher, covered, graph.refused, constructs)
    except Exception as e:  # what was done holds
        warn_once(f"what a graph misses is not told: {type(e).__name__}: {e}".split("\n")[0] + ". Please report this")
    report.sites += found * view.times
