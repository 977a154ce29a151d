"""Which sites a graph has: the anchors of each construct against the matches that cover them; places that a reference nearly
matches; and what is the construct by its mathematics (`Construct.mathematics`), whatever anchors and references say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import fx

from sloth.compat.dispatch import HigherOrderOperator
from sloth.rewriter.graph.lower import BODIES, LoweredGraph
from sloth.rewriter.graph.value import Value, uncast
from sloth.rewriter.match.matcher import AGAIN, Match, Matcher
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.notices import warn_once
from sloth.rewriter.reasons import Refusals, alike, different, missed, refusal
from sloth.rewriter.report import MATCHED, Site, source

LAYERS = {
    torch.nn.functional.linear: "linear layer(s)",
    torch.nn.functional.scaled_dot_product_attention: "attention(s)",
    "flex_attention": "attention(s)",
}


def matched_sites(match: Match) -> list[Site]:
    """One of its construct, and one for each anchor of others that it holds too. To be taken before the graph is rewritten: the
    rewrite removes the nodes they point to.
    """
    root = match.roots[-1]
    own = Site(match.pattern.construct.name, str(match.variant), MATCHED, *source(root.nodes[0] if root.nodes else root.origin))
    return [own, *_held(match.values, match.pattern.also, str(match.variant))]


def deferred_sites(values: set[Value], constructs: list[Construct]) -> list[Site]:
    """One for each anchor in what is left to be computed later: an adapter on a head."""
    return _held(values, constructs, "deferred")


def _held(values: Iterable[Value], constructs: Iterable[Construct], variant: str) -> list[Site]:
    found = [v for v in sorted(values, key=lambda v: v.id) if v.nodes or not v.replaces]
    return [Site(c.name, variant, MATCHED, *source(v.origin)) for c in constructs for v in found if _anchors(c, v)]


def _anchors(construct: Construct, v: Value) -> bool:
    """Is it characteristic of the construct? A bug in somebody's anchor costs the count of his construct."""
    try:
        return construct.anchor(v)
    except Exception as e:
        warn_once(f"sites of construct {construct.name!r} are not all counted: its anchor raises {type(e).__name__}: {e}")
        return False


def missed_sites(
    view: LoweredGraph, matcher: Matcher, covered: set[Value], refused: Refusals, constructs: list[Construct]
) -> list[Site]:
    """One site for each anchor, or group of anchors of one module, that is not covered by what was replaced or deferred."""
    sites = []
    for construct in constructs:
        seen = [v for v in view.shadow.values if not _is_covered(v, covered) and (v.nodes or not v.replaces)]
        seen = [v for v in seen if _anchors(construct, v)]
        sites += [missed(anchors, construct, matcher, refused) for anchors in _grouped(seen, construct)]
        taken, near = set(covered).union(seen), []
        for values, site in _unseen(view, construct, matcher, covered, refused):
            taken |= values
            near.append(site)
        by_mathematics = _by_mathematics(view, construct, taken)
        for results in _grouped([*by_mathematics], construct):
            values = [v for result in results for v in (result, *sorted(by_mathematics[result] - {result}, key=lambda v: v.id))]
            near.append(missed(values, construct, matcher, refused))
        sites += [replace(site, reason=f"{site.reason} (no anchor of {construct.name} sees this place)") for site in near]
    return sites


def _is_covered(v: Value, covered: set[Value]) -> bool:
    """Was it replaced, or is it the cast of what was?"""
    return v in covered or v.op == "cast" and v.args[0] in covered


def _grouped(values: list[Value], construct: Construct) -> Iterator[list[Value]]:
    """Those that one site may hold: of one module."""
    groups: dict[object, list[Value]] = {}
    for v in values:
        groups.setdefault(_module(v) if construct.per_site > 1 else v, []).append(v)
    for group in groups.values():
        for i in range(0, len(group), construct.per_site):
            yield group[i : i + construct.per_site]


def _by_mathematics(view: LoweredGraph, construct: Construct, taken: set[Value]) -> dict[Value, set[Value]]:
    """By result, the values of each place that is the construct and in no other site: of those that overlap, the first."""
    found: dict[Value, set[Value]] = {}
    for v in view.shadow.values:
        if v.nodes and v not in taken and (values := _mathematics(construct, v)) and taken.isdisjoint(values):
            found[v] = values
            taken |= {v, *values}
    return found


def _mathematics(construct: Construct, v: Value) -> set[Value]:
    """What makes up the construct here. A bug in somebody's function costs what it would find."""
    try:
        return set(construct.mathematics(v))
    except Exception as e:
        warn_once(f"sites of construct {construct.name!r} are not all counted: its mathematics raises {type(e).__name__}: {e}")
        return set()


def _unseen(
    view: LoweredGraph, construct: Construct, matcher: Matcher, covered: set[Value], refused: Refusals
) -> Iterator[tuple[frozenset[Value], Site]]:
    """Values and site of each place that a reference matches, or nearly, and no anchor sees: of those that overlap, the largest.
    Not where the operator's results would not fit: that is something else, as Mamba's activation times a number for each channel;
    nor where one tensor of the reference is two: a · sigmoid(b) is no a · sigmoid(a).
    """
    variants = {v: g for graphs in matcher.by_root.values() for v, g in graphs if v.pattern.construct is construct}
    if construct.anchor is not Construct.anchor and not any(v.is_seen for v in variants):
        return  # the anchor asks for more than references say: a weight in 4 bits
    near = [n for n in matcher.near if n.variant in variants and not n.difference.expected.endswith(AGAIN)]
    near = [n for n in near if _of_like_sizes(variants[n.variant].main, max(n.values, key=lambda v: v.id))]
    near += [n for v, graph in variants.items() if not v.is_seen for n in alike(v, graph, view.shadow.values)]
    found = [(m.values, partial(refusal, m, why)) for m, why in refused if m.variant in variants and why.status != "operator"]
    found += [(n.values, partial(different, n.variant, n.difference)) for n in near]
    taken = set(covered)
    for values, site in sorted(found, key=lambda one: -len(one[0])):
        if not taken.isdisjoint(values) or not all(map(view.shadow.owns, values)):
            continue
        if not any(_anchors(construct, v) for v in values):
            taken |= values
            yield values, site(*source(max(values, key=lambda v: v.id).origin))


def _of_like_sizes(p: Value, g: Value) -> bool:
    """Are the operands of a result of one shape, where those of the reference's are?"""
    ours, theirs = ({tuple(map(str, x.meta.shape)) for x in uncast(v).inputs if x.meta} for v in (g, p))
    return len(theirs) > 1 or len(ours) <= 1


def layers_in(node: fx.Node, gm: fx.GraphModule) -> Counter[str]:
    """Layers that are out of sight in this opaque node of `gm`, by their kind."""
    if not isinstance(node.target, HigherOrderOperator):
        return Counter([LAYERS[node.target]] if node.target in LAYERS else [])
    if node.target.name() in LAYERS:
        return Counter([LAYERS[node.target.name()]])
    if node.target.name() in BODIES:  # they have views of their own
        return Counter()
    bodies = [gm.get_submodule(a.target) for a in node.all_input_nodes if a.op == "get_attr"]
    inside = [layers_in(n, body) for body in bodies if isinstance(body, fx.GraphModule) for n in body.graph.nodes]
    return sum(inside, Counter())


def _module(v: Value) -> object:
    stack = v.origin.meta.get("nn_module_stack") if v.origin is not None else None
    return next(reversed(stack)) if stack else v
