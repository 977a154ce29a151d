"""Why a site was missed: the first operation that differs from the nearest variant, and what was expected there.

From the matcher's own unification: the attempt that got furthest through the site, or, where none reached it from above, the
largest part of a reference that stands there. Tensors are called as the model calls them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sloth.rewriter.graph.canonical import COMMUTATIVE, POINTWISE
from sloth.rewriter.graph.value import Value, shown, uncast
from sloth.rewriter.match.matcher import Difference, Match, Matcher, NearMiss, Refused, Unifier, tells
from sloth.rewriter.match.pattern import Construct, Graph, Variant
from sloth.rewriter.report import Site, source

ALIKE = 0.7  # of the operations of a reference that no anchor sees
PART = 0.33  # … and of one that is told though no attempt reached the site
AROUND = 6  # operations behind a site among which the end of a reference is looked for
Refusals = list[tuple[Match, Refused]]


def missed(values: list[Value], construct: Construct, matcher: Matcher, refused: Refusals) -> Site:
    """The site of these values, the first of which says where it is."""
    file, line = source(values[0].origin)
    own = [(m, r) for m, r in refused if m.pattern.construct is construct and not m.values.isdisjoint(values)]
    if own:
        return refusal(*max(own, key=lambda mr: (mr[1].status == "limit", mr[0].size)), file, line)  # without a limit: matched
    attempts = [*values, *(u for v in values[1:] and values for u in v.users)]
    misses = [matcher.misses[construct.name, v] for v in attempts if (construct.name, v) in matcher.misses]
    best = max(misses, key=lambda one: (one[1].found in values, one[1].depth, *tells(one[1].found)), default=None)
    near = _nearest(values, construct, matcher) if best is None or best[1].found not in values else None
    if best is not None and (near is None or near.difference.found not in values):
        return different(*best, file, line)
    if not any(v.pattern.construct is construct for variants in matcher.by_root.values() for v, _ in variants):
        why = Refused("disabled", "no entry of the construct is in use: see sloth.disable and sloth.only")
        return Site(construct.name, "", why.status, file, line, str(why))
    if near is not None:
        return different(near.variant, near.difference, file, line)
    variant, reason = _part_of(values, construct, matcher)
    return Site(construct.name, variant, "structure", file, line, reason)


def refusal(match: Match, why: Refused, file: str, line: int) -> Site:
    return Site(match.pattern.construct.name, str(match.variant), why.status, file, line, str(why))


def different(variant: Variant, d: Difference, file: str, line: int) -> Site:
    found = ""
    if d.found is not None:
        there = shown(d.literal) if isinstance(d.literal, Value) else d.literal
        number = f" with {there}" if d.status == "constant" and d.literal is not None else ""
        found = f", found {d.found.op}{number}: {shown(d.found)}{_elsewhere(d.found, file, line)}"
    return Site(variant.pattern.construct.name, str(variant), d.status, file, line, f"expected {d.expected}{found}")


def alike(variant: Variant, graph: Graph, values: Iterable[Value]) -> Iterator[NearMiss]:
    """Places where most operations of a reference stand as they should, wherever the others differ."""
    operations = sum(v.op not in ("input", "cast") for v in graph.values)
    for g in values:
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


def _nearest(values: list[Value], construct: Construct, matcher: Matcher) -> NearMiss | None:
    """The reference of which most operations, by far, stand as they should in what ends at or behind these values."""
    best: tuple[float, NearMiss | None] = (0.0, None)
    around = dict.fromkeys(u for v in values for u in _above(v, AROUND))
    for variant, graph in _references(construct, matcher):
        operations = sum(v.op not in ("input", "cast") for v in graph.values)
        for g in around:
            if g.op == graph.main.op:
                agree, difference = _agreement(graph.main, g)
                score = len(agree) / operations
                if difference is not None and score > best[0] and score >= PART and not agree.isdisjoint(values):
                    best = score, NearMiss(variant, agree, difference)
    return best[1]


def _references(construct: Construct, matcher: Matcher) -> list[tuple[Variant, Graph]]:
    """Each once; of entries that share one, the first."""
    found: dict[int, tuple[Variant, Graph]] = {}
    for variant, graph in (one for variants in matcher.by_root.values() for one in variants):
        if variant.pattern.construct is construct:
            found.setdefault(id(graph), (variant, graph))
    return [*found.values()]


def _part_of(values: list[Value], construct: Construct, matcher: Matcher) -> tuple[str, str]:
    """The largest part of any variant of the construct that matches around the values, and what should have followed."""
    values = list(dict.fromkeys((*values, *(uncast(x) for v in values for x in v.inputs))))
    around = list(dict.fromkeys(u for v in values for u in _above(v, AROUND)))
    best: tuple[int, Variant | None, str] = (0, None, "no variant of the construct looks like this")
    for variant, graph in _references(construct, matcher):
        for part in _parts(graph.main):
            operations = [v for v in _parts(part) if v.op != "cast"]
            if len(operations) <= best[0] or len(operations) == 1 and part.op in POINTWISE:  # a product with a number is anything
                continue
            for g in around:
                if g.op != part.op or g.meta is None or not g.meta.dtype.is_floating_point:
                    continue
                bound = next(Unifier(False, graph.sentinels, graph.computed).unify(part, g, {}), None)
                if bound is None or not any(v in bound.values() for v in values):
                    continue
                size = len({bound.get(v) for v in operations})  # a product with an absent number is what it is a product of
                if size > best[0]:
                    after, follows = _readers(g) or "nothing", _readers(part) or "a result"
                    best = (size, variant, f"expected {follows} after {g.op}: {shown(g)}, found {after}")
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


def _readers(v: Value) -> str:
    """The operations that read it, casts aside."""
    found, todo = set(), [v]
    while todo:
        for u in todo.pop().users:
            if u.op == "cast":
                todo.append(u)
            else:
                found.add(u.op)
    return ", ".join(sorted(found))


def _elsewhere(v: Value, file: str, line: int) -> str:
    """The line of a value, where it is not that of the site."""
    where = source(v.nodes[0] if v.nodes else v.origin)
    return f" ({where[0].split('/')[-1]}:{where[1]})" if where[0] and where != (file, line) else ""
