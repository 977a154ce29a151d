"""Which sites a graph has, and why a site was missed: the anchors of each construct against the matches that cover them.

The reasons come from the matcher's own unification: the attempt that got furthest through the anchor, or, where no attempt
reached it from above, the largest part of a pattern that does match around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import fx

from sloth.compat.dispatch import HigherOrderOperator
from sloth.rewriter.graph.canonical import COMMUTATIVE
from sloth.rewriter.graph.lower import BODIES, LoweredGraph
from sloth.rewriter.graph.value import Value, uncast
from sloth.rewriter.match.matcher import Difference, Match, Matcher, NearMiss, Refused, Unifier
from sloth.rewriter.match.pattern import Construct, Graph, Variant
from sloth.rewriter.notices import warn_once
from sloth.rewriter.report import MATCHED, Site, source

LAYERS = {
    torch.nn.functional.linear: "linear layer(s)",
    torch.nn.functional.scaled_dot_product_attention: "attention(s)",
    "flex_attention": "attention(s)",
}
ALIKE = 0.7  # of the operations of a reference that no anchor sees
Refusals = list[tuple[Match, Refused]]


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
        groups: dict[object, list[Value]] = {}
        for v in view.shadow.values:
            if v not in covered and (v.nodes or not v.replaces) and _anchors(construct, v):
                groups.setdefault(_module(v) if construct.per_site > 1 else v, []).append(v)
        for anchors in groups.values():
            for i in range(0, len(anchors), construct.per_site):
                sites.append(_missed(anchors[i], construct, matcher, refused))
        sites += _unseen(view, construct, matcher, covered, refused)
    return sites


def _unseen(view: LoweredGraph, construct: Construct, matcher: Matcher, covered: set[Value], refused: Refusals) -> Iterator[Site]:
    """One site for each place that a reference matches, or nearly, and no anchor sees: of those that overlap, the largest. Not
    where the operator's results would not fit: that is something else, as Mamba's activation times a number for each channel.
    """
    variants = {v: g for graphs in matcher.by_root.values() for v, g in graphs if v.pattern.construct is construct}
    if construct.anchor is not Construct.anchor and not any(v.is_seen for v in variants):
        return  # the anchor asks for more than references say: a weight in 4 bits
    near = [n for n in matcher.near if n.variant in variants]
    near += [n for v, graph in variants.items() if not v.is_seen for n in _alike(v, graph, view)]
    found = [(m.values, partial(_refused, m, why)) for m, why in refused if m.variant in variants and why.status != "operator"]
    found += [(n.values, partial(_different, n.variant, n.difference)) for n in near]
    taken = set(covered)
    for values, site in sorted(found, key=lambda one: -len(one[0])):
        if not taken.isdisjoint(values) or not all(map(view.shadow.owns, values)):
            continue
        if not any(_anchors(construct, v) for v in values):
            taken |= values
            told = site(*source(max(values, key=lambda v: v.id).origin))
            yield replace(told, reason=f"{told.reason} (no anchor of {construct.name} sees this place)")


def _alike(variant: Variant, graph: Graph, view: LoweredGraph) -> Iterator[NearMiss]:
    """Places where most operations of a reference stand as they should, wherever the others differ."""
    operations = sum(v.op not in ("input", "cast") for v in graph.values)
    for g in view.shadow.values:
        if g.op == graph.main.op:
            values, difference = _agreement(graph.main, g)
            if len(values) >= ALIKE * operations and difference is not None:
                yield NearMiss(variant, values, difference)


def _agreement(p: Value, g: Value) -> tuple[frozenset[Value], Difference | None]:
    """What of the graph agrees with the pattern below `p`, casts aside, and the first operation that does not."""
    p, g = uncast(p), uncast(g) if uncast(p).op != "input" else g
    if p.op == "input":
        return frozenset(), None
    if p.op != g.op or len(p.args) != len(g.args):
        return frozenset(), Difference(0, p.op, g, "structure")
    orders = [g.args, g.args[::-1]] if p.op in COMMUTATIVE else [g.args]
    found = []
    for args in orders:
        below = [_agreement(a, b) for a, b in zip(p.args, args, strict=True) if isinstance(a, Value) and isinstance(b, Value)]
        values = frozenset({g}).union(*(values for values, _ in below))
        found.append((values, next((d for _, d in below if d is not None), None)))
    return max(found, key=lambda one: len(one[0]))


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


def _missed(anchor: Value, construct: Construct, matcher: Matcher, refused: Refusals) -> Site:
    file, line = source(anchor.origin)
    own = [(m, r) for m, r in refused if m.pattern.construct is construct and anchor in m.values]
    if own:
        return _refused(*max(own, key=lambda mr: (mr[1].status == "limit", mr[0].size)), file, line)  # without a limit: matched
    if (miss := matcher.misses.get((construct.name, anchor))) is not None:
        return _different(*miss, file, line)
    if not any(v.pattern.construct is construct for variants in matcher.by_root.values() for v, _ in variants):
        refusal = Refused("disabled", "no entry of the construct is in use: see sloth.disable and sloth.only")
        return Site(construct.name, "", refusal.status, file, line, str(refusal))
    variant, reason = nearest(anchor, construct, matcher)
    return Site(construct.name, variant, "structure", file, line, reason)


def _refused(match: Match, refusal: Refused, file: str, line: int) -> Site:
    return Site(match.pattern.construct.name, str(match.variant), refusal.status, file, line, str(refusal))


def _different(variant: Variant, d: Difference, file: str, line: int) -> Site:
    found = f", found {_show(d.found)}" if d.found is not None else ""
    where = _place(d.found, file, line)
    return Site(variant.pattern.construct.name, str(variant), d.status, *where, f"expected {d.expected}{found}")


def nearest(anchor: Value, construct: Construct, matcher: Matcher) -> tuple[str, str]:
    """The largest part of any variant of the construct that matches around the anchor, and what should have followed."""
    around = _above(anchor, 6)
    best: tuple[int, Variant | None, str] = (0, None, "no variant of the construct looks like this")
    for variant, graph in {
        id(g): (v, g) for vs in matcher.by_root.values() for v, g in vs if v.pattern.construct is construct
    }.values():
        for part in _parts(graph.main):
            if len(list(_parts(part))) <= best[0]:
                continue
            for g in around:
                if g.op != part.op:
                    continue
                bound = next(Unifier(False, graph.sentinels, graph.computed).unify(part, g, {}), None)
                if bound is not None and anchor in bound.values():
                    after = ", ".join(sorted({u.op for u in g.users})) or "nothing"
                    follows = ", ".join(sorted({u.op for u in part.users})) or "a result"
                    best = (len(list(_parts(part))), variant, f"expected {follows} after {_show(g)}, found {after}")
                    break
    return (str(best[1]) if best[1] else ""), best[2]


def _parts(v: Value) -> list[Value]:
    """The operations of a pattern below `v`, itself first."""
    seen: dict[Value, None] = {}
    todo = [v]
    while todo:
        x = todo.pop(0)
        if x not in seen and x.op != "input":
            seen[x] = None
            todo += x.inputs
    return list(seen)


def _above(v: Value, levels: int) -> list[Value]:
    out, level = {v: None}, [v]
    for _ in range(levels):
        level = [u for x in level for u in x.users if u not in out]
        out.update(dict.fromkeys(level))
    return list(out)


def _show(v: Value) -> str:
    node = v.nodes[0] if v.nodes else v.origin
    return f"{v.op} ({node.name})" if node is not None else v.op


def _place(v: Value | None, file: str, line: int) -> tuple[str, int]:
    node = (v.nodes[0] if v.nodes else v.origin) if v is not None else None
    found = source(node)
    return found if found[0] else (file, line)
