"""From a Dynamo graph to the rewritten graph: shadow → match → legality → choice → rewrite → deferred → sites. One page."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import fx

from sloth.rewriter.graph.lower import View, shape_env_of, views
from sloth.rewriter.graph.scratch import scratch_mode
from sloth.rewriter.match.matcher import Match, Matcher, Refused
from sloth.rewriter.match.pattern import Construct, Deferral, Pattern
from sloth.rewriter.plan import legality
from sloth.rewriter.plan.apply import Rewriter, choose, together
from sloth.rewriter.plan.hoist import drop_unread_inputs, hoist
from sloth.rewriter.plan.lazy_outputs import defer, left_alone
from sloth.rewriter.plan.narrow import keep_narrow
from sloth.rewriter.report import MATCHED, GraphReport
from sloth.rewriter.sites import deferred_sites, layers_in, matched_sites, missed_sites


def rewrite(
    gm: fx.GraphModule,
    entries: list[Pattern],
    constructs: list[Construct],
    deferrals: Sequence[Deferral] = (),
    limit: int | None = None,
) -> GraphReport:
    """Rewrite `gm` and its bodies in place, at most `limit` times. Whatever goes wrong, the graph is then as it was, and the
    report says why.
    Outputs that `report.deferred` names are for `lazy_outputs.returning` to make of what the graph gives out in their place.
    """
    report = GraphReport()
    bodies: list[fx.GraphModule] = []
    backup: list[fx.Graph] = []
    try:
        with _timed(report, "shadow"):
            shadows = views(gm)
        bodies = [view.gm for view in shadows]
        backup = [_copied(body.graph) for body in bodies]
        mode = scratch_mode(shape_env_of(gm))
        with _timed(report, "patterns"):
            matcher = Matcher(entries, mode)
        tried: dict = {}
        for view in shadows:
            report.opaque |= {f"{view.path}{n.name}": why for n, why in view.opaque.items()}
            for node in view.opaque:
                report.unread.update({kind: n * view.times for kind, n in layers_in(node, view.gm).items()})
            rewrite_view(view, matcher, legality.Ground(view, mode, tried), constructs, deferrals, report, limit)
        with _timed(report, "rewrite"):  # a body may have asked the graphs around it for more inputs
            hoist(shadows, mode)
            changed = report.deferred or any(s.status == MATCHED for s in report.sites)
            if changed:
                drop_unread_inputs(shadows)
            for body in bodies if changed else ():
                body.graph.lint()
                body.recompile()
    except Exception as e:
        for body, graph in zip(bodies, backup, strict=False):
            body.graph = graph
        report.sites.clear()
        report.deferred.clear()
        report.untouched = f"{type(e).__name__}: {e}".split("\n")[0]
    return report


def rewrite_view(
    view: View,
    matcher: Matcher,
    ground: legality.Ground,
    constructs: list[Construct],
    deferrals: Sequence[Deferral],
    report: GraphReport,
    limit: int | None = None,
) -> None:
    known = len(report.sites)
    legal: list[Match] = []
    refused: list[tuple[Match, Refused]] = []
    with _timed(report, "match"):
        found = list(matcher.matches(view.shadow.values))
    with _timed(report, "legality"):
        for match in found:
            try:
                legality.check(match, ground)
                legal.append(match)
            except Refused as why:
                refused.append((match, why))
        spared = left_alone(view, deferrals)
        accepted, losers = choose([m for m in legal if not m.values & spared])
    with _timed(report, "rewrite"):
        rewriter, placed = Rewriter(view), []
        todo = together(accepted)
        while todo:
            matches = todo.pop(0)
            if limit is not None and report.rewrites + len(matches) > limit:
                refused += [(m, Refused("limit", f"sloth.limit={limit}")) for m in matches]
                continue
            sites = [site for match in matches for site in matched_sites(match)]
            try:
                rewriter.apply(matches)
            except Refused as why:
                if len(matches) > 1:
                    todo[:0] = [[m] for m in matches]
                else:  # what it took the place of may have it back
                    refused.append((matches[0], why))
                    standing = [*placed, *(m for waiting in todo for m in waiting)]
                    freed, losers = choose([m for m, _ in losers], standing)
                    todo[:0] = together(freed)
                continue
            placed += matches
            report.rewrites += len(matches)
            report.sites += sites
        later = deferred_sites(spared, constructs)
        deferred, sites = defer(view, placed, deferrals)
        if placed or deferred:
            rewriter.sweep_rest()
            keep_narrow(view.gm.graph, view.regions)
        report.deferred += deferred
        report.sites += [*sites, *later]
    with _timed(report, "report"):
        covered = spared.union(*(m.values for m in placed))
        report.sites += missed_sites(view, matcher, covered, refused, constructs)
        report.sites[known:] *= view.times


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy with all that Dynamo attached to the nodes (AOTAutograd asks where each input comes from)."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        vars(new).update({k: v for k, v in vars(old).items() if k not in vars(new)})
    return copied


@contextmanager
def _timed(report: GraphReport, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.seconds[stage] = report.seconds.get(stage, 0.0) + time.perf_counter() - start
