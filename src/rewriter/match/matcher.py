"""Find patterns in a shadow: unification with bindings, then an exact second look.

The first look is loose: sizes and dtypes of the traced example are ignored, and a cast of the pattern may be absent (where the
model's dtypes made it none). It yields bindings. The second look traces the reference again with the bindings' own shapes, dtypes
and numbers and requires the two graphs to be equal, literal for literal. Both looks are `Unifier.unify`, and so are the reasons
for a miss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch

from sloth.compat.dispatch import FakeTensorMode
from sloth.rewriter.graph.ambient import OFF, Autocast, dtype_of, under
from sloth.rewriter.graph.canonical import COMMUTATIVE, VIEWS
from sloth.rewriter.graph.scratch import comparing_nothing
from sloth.rewriter.graph.value import Meta, Symbol, Value, ValueGraph, literal_key, same_literal, shown, uncast
from sloth.rewriter.match.pattern import Graph, Pattern, Variant
from sloth.rewriter.notices import warn_once

AGAIN = " again"  # what is expected where a tensor of the reference occurs a second time
NEARLY = 0.8  # of a reference's values and numbers, for a miss that is told though no anchor sees it
Bindings = dict[Any, Any]  # pattern Value → graph Value, and name of a number → number


class Refused(Exception):
    """A match that must not be made. `status` says which rule, the message why."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


class Difference(NamedTuple):
    """Where pattern and graph first differ, and how much agreed before that."""

    depth: int
    expected: str
    found: Value | None
    status: str
    literal: Any = None  # what stands there in place of a number, dimension or flag


class NearMiss(NamedTuple):
    """What a reference would compute, if it were not for this difference."""

    variant: Variant
    values: frozenset[Value]
    difference: Difference


@dataclass(eq=False)
class Match:
    """A variant found in a shadow: its bindings, its results (`roots`) and all values it computes."""

    variant: Variant
    tensors: dict[str, Value]
    numbers: dict[str, Any]
    roots: tuple[Value, ...]
    values: frozenset[Value]
    smaller: tuple[Match, ...] = ()  # of the same entry, for the same result, the largest first: where this one is refused

    @property
    def pattern(self) -> Pattern:
        return self.variant.pattern

    @property
    def size(self) -> tuple[int, int]:
        """How much it covers: operations, and with views and casts."""
        return sum(v.op not in VIEWS for v in self.values), len(self.values)

    def require(self, condition: bool, reason: str) -> None:
        """For checks of entries: refuse the match for this reason."""
        if not condition:
            raise Refused("check", reason)

    def __getattr__(self, name: str) -> Any:
        """Bindings by the names of the reference: `match.x.meta.dtype`, `match.eps`."""
        if name in self.tensors:
            return self.tensors[name]
        if name in self.numbers:
            return self.numbers[name]
        raise AttributeError(name)


@dataclass
class Unifier:
    """Makes a pattern's values equal to a graph's, backtracking over orders of commutative operations and over absent casts."""

    exact: bool
    sentinels: dict[Any, str] = field(default_factory=dict)
    computed: frozenset[Any] = frozenset()
    best: Difference | None = None
    best_bindings: Bindings = field(default_factory=dict)

    def unify(self, p: Value, g: Value, b: Bindings) -> Iterator[Bindings]:
        if p in b:
            if b[p] is g:
                yield b
            else:
                self.differ(b, f"{shown(b[p])}{AGAIN}", g, "dtype" if uncast(b[p]) is uncast(g) else "structure")
        elif p.op == "input":
            yield {**b, p: g}
        elif not self.exact and p.op == "cast":
            name = self.sentinels.get(p.args[1])  # a dtype that the operator wants to know
            if name is None or b.get(name, g.meta.dtype) == g.meta.dtype:
                bound = {**b, p: g} if name is None else {**b, p: g, name: g.meta.dtype}
                if g.op == "cast":
                    yield from self.unify(p.args[0], g.args[0], bound)
                yield from self.unify(p.args[0], g, bound)
        elif p.op != g.op:
            if not self.exact and g.op == "cast" and p.op in VIEWS:  # autocast's, which the second look has too, or it refuses
                yield from self.unify(p, g.args[0], b)
            yield from self.times_one(p, g, b)
            self.differ(b, p.op, g, "dtype" if "cast" in (p.op, g.op) else "structure")
        elif self.exact and p.meta is not None and p.meta.dtype != g.meta.dtype:
            self.differ(b, f"{p.op} in {p.meta.dtype}", g, "dtype")
        else:
            yield from self.unify_all(p.args, g.args, {**b, p: g}, g)
            if p.op in COMMUTATIVE and len(p.args) == 2 and isinstance(g.args[1], Value):
                yield from self.unify_all(p.args, g.args[::-1], {**b, p: g}, g)
            if all(isinstance(a, Value) for a in g.args):  # x · y, where the pattern has (x · y) · number
                yield from self.times_one(p, g, b)

    def times_one(self, p: Value, g: Value, b: Bindings) -> Iterator[Bindings]:
        """x · 1 is no node. Where the graph scales x, that is the number that is meant."""
        if any(u.op == "mul" and not isinstance(u.args[1], Value) for u in g.users):
            return
        if not self.exact and p.op == "mul" and (name := self.number(p.args[1])) is not None and name not in b:
            yield from self.unify(p.args[0], g, {**b, p: g, name: 1.0})

    def unify_all(self, ps: tuple, gs: tuple, b: Bindings, at: Value) -> Iterator[Bindings]:
        if len(ps) != len(gs):
            self.differ(b, f"{len(ps)} operands", at, "structure")
        elif not ps:
            yield b
        else:
            for first in self.unify_argument(ps[0], gs[0], b, at):
                yield from self.unify_all(ps[1:], gs[1:], first, at)

    def unify_argument(self, p: Any, g: Any, b: Bindings, at: Value) -> Iterator[Bindings]:
        if isinstance(p, Value) and isinstance(g, Value):
            yield from self.unify(p, g, b)
        elif isinstance(p, tuple) and isinstance(g, tuple) and any(isinstance(x, Value) for x in p):
            yield from self.unify_all(p, g, b, at)
        elif (name := self.number(p)) is not None:
            if isinstance(g, (int, float, *Symbol)) and (name not in b or same_literal(b[name], g)):
                yield {**b, name: g}
            else:
                self.differ(b, f"{at.op} with the number {name}", at, "constant", g)
        elif _hashable(p) and p in self.computed and isinstance(g, (int, float, *Symbol)):  # of numbers: the second look has it
            name = self.number(-p)
            yield b if name is None or name in b else {**b, name: -g}
        elif isinstance(g, torch.SymFloat) and isinstance(p, float):  # a constant of the model that dynamic=True made an input
            if g.node.has_hint() and g.node.hint == p and (not self.exact or _constant(g) == p):
                yield b
            else:
                self.differ(b, f"{at.op} with {p}", at, "constant", g)
        elif self.same(p, g):
            yield b
        else:
            self.differ(b, f"{at.op} with {shown(p) if isinstance(p, Value) else p}", at, "constant", g)

    def number(self, p: Any) -> str | None:
        """The parameter that this constant of the pattern stands for."""
        return self.sentinels.get(p) if _hashable(p) else None

    def same(self, p: Any, g: Any) -> bool:
        """Equal literals. A float that Dynamo lifted (a module's `math.pi` with dynamic=True) is what it is now, with a guard."""
        if isinstance(p, float) and isinstance(g, torch.SymFloat):
            return g.node.hint == p and (not self.exact or _constant(g) == p)
        return same_literal(p, g) if self.exact else _like(p, g)

    def differ(self, b: Bindings, expected: str, found: Value, status: str, literal: Any = None) -> None:
        if self.best is None or (len(b), *tells(found)) > (self.best.depth, *tells(self.best.found)):
            self.best = Difference(len(b), expected, found, status, literal)
            self.best_bindings = b


def tells(v: Value | None) -> tuple[bool, bool]:
    """Of two differences that are as deep, operands of a sum in either order: which says more."""
    return v is not None and v.op != "input", v is not None and v.meta is not None and v.meta.requires_grad


def _hashable(a: Any) -> bool:
    return isinstance(a, int | float) and not isinstance(a, bool)


def _like(p: Any, g: Any) -> bool:
    """Loose equality: sizes, positions and dtypes of the example say nothing; other constants do."""
    sizes = (int, torch.SymInt)
    if isinstance(p, bool) or isinstance(g, bool) or p is None or g is None or isinstance(p, str):
        return p is g or p == g
    if isinstance(p, sizes) and isinstance(g, sizes):
        return True
    if isinstance(p, tuple) and isinstance(g, tuple):
        return len(p) == len(g) or all(isinstance(x, sizes) for x in (*p, *g))
    return isinstance(p, torch.dtype) or same_literal(p, g)


class Matcher:
    """All matches of a list of patterns in the values of one shadow."""

    def __init__(self, entries: list[Pattern], mode: FakeTensorMode):
        self.mode = mode
        self.traced: dict[Any, Graph] = {}
        self.by_root: dict[str, list[tuple[Variant, Graph]]] = defaultdict(list)
        self.readers = [entry for entry in entries if entry.reads is not None]
        for entry in entries:
            for variant in entry.variants:
                try:
                    graph = variant.loose()
                except Exception as e:  # a bug of one variant costs that variant
                    warn_once(f"pattern {variant} is not used: its reference raises {type(e).__name__}: {e}".split("\n")[0])
                    continue
                root = graph.main
                self.by_root[root.op].append((variant, graph))
                if root.op == "cast":  # which may be absent
                    self.by_root[root.args[0].op].append((variant, graph))
        # (construct, value) → the attempt that got furthest through this value
        self.misses: dict[tuple[str, Value], tuple[Variant, Difference]] = {}
        self.near: list[NearMiss] = []  # what the first look took for a match

    def matches(self, values: list[Value]) -> Iterator[Match]:
        """The largest match of each entry at each value."""
        for g in values:
            found: dict[Pattern, list[Match]] = {}
            for variant, graph in self.by_root.get(g.op, ()):
                if (m := self.at(variant, graph, g)) is not None:
                    found.setdefault(variant.pattern, []).append(m)
            for alike in found.values():
                largest = max(alike, key=lambda m: m.size)
                others = (m for m in alike if m.size < largest.size)
                largest.smaller = tuple(sorted(others, key=lambda m: m.size, reverse=True))
                yield largest

    def readings(self, shadow: ValueGraph, legal: Sequence[Match]) -> Iterator[Match]:
        """What entries find that read a graph themselves, but for what others of their construct compute."""
        for entry in self.readers:
            taken = frozenset().union(*(m.values for m in legal if m.pattern.construct is entry.construct))
            try:
                for found in entry.reads(shadow, taken):
                    variant = Variant(entry, found.name, _read, found.options, {})
                    yield Match(variant, found.tensors, {}, found.roots, found.values)
            except Exception as e:  # a bug of one entry costs that entry
                warn_once(f"pattern {entry.name!r} is not used: its reader raises {type(e).__name__}: {e}".split("\n")[0])

    def at(self, variant: Variant, graph: Graph, g: Value) -> Match | None:
        """The variant with its main result at `g`, or None, and the reason remembered."""
        unifier = Unifier(False, graph.sentinels, graph.computed)
        attempts = (b for b0 in unifier.unify(graph.main, g, {}) for b in self.other_roots(unifier, graph, 0, b0))
        for b in islice(attempts, 32):
            match, difference = self.second_look(variant, graph, b)
            if match is not None:
                return match
            self.remember(variant, difference, b)
            self.near.append(NearMiss(variant, _computed(graph, b), difference))
        if unifier.best is not None and unifier.best.depth > 2:
            self.remember(variant, unifier.best, unifier.best_bindings)
            if unifier.best.depth >= NEARLY * (len(graph.values) + len(variant.numbers)):
                self.near.append(NearMiss(variant, _computed(graph, unifier.best_bindings), unifier.best))
        return None

    def remember(self, variant: Variant, difference: Difference, b: Bindings) -> None:
        for v in b.values():
            key = (variant.pattern.construct.name, v)
            if isinstance(v, Value) and (key not in self.misses or self.misses[key][1].depth < difference.depth):
                self.misses[key] = (variant, difference)

    def other_roots(self, unifier: Unifier, graph: Graph, i: int, b: Bindings) -> Iterator[Bindings]:
        """Bind the pattern's further results: climb from a value they share with what is bound, nearest candidates first."""
        if i == len(graph.roots):
            yield b
            return
        root = graph.roots[i]
        if root in b:
            yield from self.other_roots(unifier, graph, i + 1, b)
            return
        for g in _candidates(root, b, near=b[graph.main]):
            for bound in unifier.unify(root, g, b):
                yield from self.other_roots(unifier, graph, i + 1, bound)

    def exact(self, variant: Variant, metas: list[Meta], numbers: dict[str, Any], autocast: Autocast) -> Graph:
        """The reference with a match's own shapes, dtypes and numbers, traced once for all sites alike, and for all entries that
        have the same reference: a projection that is multiplied row by row where it has few rows is the same mathematics.
        """
        how = (variant.reference, literal_key(([m[:3] for m in metas], tuple(numbers.values()))))
        if (how, autocast) not in self.traced:
            with under(autocast), comparing_nothing(self.mode):
                graph = self.traced[how, autocast] = variant.graph(metas, numbers, self.mode)
            if not graph.autocasts:  # nor would it without
                self.traced[how, OFF] = graph
        return self.traced[how, autocast]

    def second_look(self, variant: Variant, graph: Graph, b: Bindings) -> tuple[Match | None, Difference]:
        tensors = {name: b[p] for name, p in graph.inputs.items() if p in b}
        numbers = {n: _constant(b[n]) for n in variant.numbers if n in b}
        roots = tuple(b[r] for r in graph.roots)
        if unbound := [n for n in (*graph.inputs, *variant.numbers) if n not in tensors and n not in numbers]:
            used = f"a reference in which {', '.join(unbound)} stands by itself, not only in what is computed of it"
            return None, Difference(len(b), used, roots[0], "structure")
        metas = [v.meta for v in tensors.values()]
        match = difference = None
        autocast = roots[0].region.autocast
        if dtype_of(autocast, metas[0].device.type) is not None:
            match, difference = self.compared(variant, roots, tensors, numbers, len(b), autocast)
        if match is None:  # operators of others are not cast by autocast: casts that there are stand in the graph
            match, plain = self.compared(variant, roots, tensors, numbers, len(b), OFF)
            difference = difference or plain
        return match, difference

    def compared(
        self, variant: Variant, roots: tuple, tensors: dict[str, Value], numbers: dict[str, Any], depth: int, autocast: Autocast
    ) -> tuple[Match | None, Difference]:
        """The reference, traced again for these operands, against the graph, literal for literal."""
        try:
            again = self.exact(variant, [v.meta for v in tensors.values()], numbers, autocast)
        except Exception as e:  # e.g. shapes that do not fit the reference
            return None, Difference(depth, f"operands the reference accepts ({type(e).__name__}: {e})"[:200], roots[0], "shape")
        unifier = Unifier(True)
        states: list[Bindings] = [{again.inputs[name]: v for name, v in tensors.items()}]
        for p, g in zip(again.roots, roots, strict=True):
            states = [s for state in states for s in islice(unifier.unify(p, g, state), 1)]
        if not states:
            return None, unifier.best._replace(depth=depth)
        leaves, given = set(tensors.values()), set(again.inputs.values())
        # What is computed may be an operand, too: q in fp32 as k. It counts where it is written and would be computed anew.
        values = {v for p, v in states[0].items() if p not in given and (v not in leaves or v.mutated_storage)}
        todo = [*values]
        while todo:  # what a rule put these in place of is computed by the match too
            new = set(todo.pop().replaces) - values - leaves
            values |= new
            todo += new
        return Match(variant, tensors, numbers, roots, frozenset(values)), unifier.best


def _read() -> None:
    """In place of the reference of an entry that reads."""


def _candidates(root: Value, b: Bindings, near: Value) -> list[Value]:
    """Values of the graph that could be `root`: the users, along the pattern's own path, of something already bound."""
    paths = [[root]]
    while paths and not any(p in b for p in (path[-1] for path in paths)):
        paths = [[*path, p] for path in paths for p in path[-1].inputs]
    path = next(path for path in paths if path[-1] in b) if paths else []
    level = {b[path[-1]]} if path else set()
    for p in reversed(path[:-1]):
        step = {u for v in level for u in v.users if u.op == p.op}
        level = step | level if p.op == "cast" else step
    bound = {v for v in b.values() if isinstance(v, Value)}
    return sorted(level - bound, key=lambda v: abs(v.id - near.id))


def _computed(graph: Graph, b: Bindings) -> frozenset[Value]:
    """What the pattern's operations are bound to."""
    leaves = {b[p] for p in graph.inputs.values() if p in b}
    return frozenset(v for v in b.values() if isinstance(v, Value)) - leaves


def _constant(number: Any) -> Any:
    """A float that Dynamo lifted to an input (dynamic=True) becomes a constant again, with a guard on its value."""
    if isinstance(number, torch.SymFloat):
        return number.node.guard_float("", 0)
    return number
