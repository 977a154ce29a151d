"""Rotary position embedding in any spelling: found by what is computed of each pair of channels, not by how it is written.

    y[i] = c[i] · x[i] ± s[i] · x[j]        i, j a pair; other channels pass through

A result is read as polynomials of the channels of one tensor x and of tables (sloth.patterns.rotation.linear_form). Where each
channel is such a sum, that is what `rotate` computes, however the model splits, multiplies and joins: halves or pairs, tables of
each channel or of each pair in any layout, complex numbers, stacks, small matrices, scales. What an entry of sloth.patterns.rope
or norm_rope matches too is left to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch

from sloth.kernels.rotation import CONTIGUOUS, LIKE, rotate, rotate_both
from sloth.patterns.rope import PART, ROPE
from sloth.patterns.rotation.linear_form import (
    ARITHMETIC,
    CHANNEL,
    UNIT,
    VIEWS_OF_ONE,
    Axes,
    Leaf,
    Moving,
    Reader,
    is_one,
    narrows,
    real_dtype,
    shape_of,
)
from sloth.patterns.rotation.operations import OPERATIONS
from sloth.patterns.rotation.polynomial import Array, Unreadable
from sloth.rewriter.graph.canonical import Normal
from sloth.rewriter.graph.normal_form import WIDER
from sloth.rewriter.graph.value import Value, ValueGraph, same_literal
from sloth.rewriter.match.domain import FLOATS, domain
from sloth.rewriter.match.pattern import Reading
from sloth.rewriter.match.registry import reader
from sloth.rewriter.plan.narrow import rounds_once

PRODUCTS = {"mul", "addcmul", "matmul", "matmul_transposed"}
MIXES = {"slice", "cat", "flip", "roll", "view_as_complex", "complex", "sum", "matmul", "matmul_transposed"}
ROOTS = {"add", "sub", "cat", "view", "cast", "addcmul", "sum", "matmul", "matmul_transposed", "view_as_real"}
LARGEST, FARTHEST = 48, 8  # operations of a rotation; values that could be what is rotated
TABLES = ("cos", "sin", "cos_second", "sin_second")
PAIRINGS = ((False, False), (True, True), (True, False), (False, True))  # interleaved? x, the result
Coefficients = list[tuple[Any, tuple]]  # for each pair (number, atoms of tables)


class Rotation(NamedTuple):
    """A result that is one: arguments of the operator, and the values that compute it."""

    root: Value
    x: Value
    tables: dict[str, Value]
    options: dict[str, Any]
    values: frozenset[Value]
    read: frozenset[Value]  # these, and what tables are made of

    @property
    def learns(self) -> bool:
        """Do its tables want a gradient?"""
        return any(t.meta.requires_grad for t in self.tables.values())

    @property
    def name(self) -> str:
        before, after = ("pairs" if self.options[name] else "halves" for name in ("interleaved", "interleaves"))
        return before if before == after else f"{before}_to_{after}"


def rotations(shadow: ValueGraph, taken: Set[Value] = frozenset()) -> list[Rotation]:
    """All results that are one, and no part of a larger one (of more channels, or behind a cast) nor of what others match."""
    values = [*shadow.values]
    for v in reversed(values):
        if "rotation" not in v.analyses and PART not in v.analyses and v.op in ROOTS and v.nodes and v not in taken:
            found = _found(v, shadow)
            if (
                found is not None
                and found.learns
                and any((part := _found(w, shadow)) and not part.learns for w in found.values - {v} if w.op in ROOTS)
            ):
                found = None  # of a weight that something smaller is multiplied by
            v.analyses["rotation"] = found
            for part in found.read if found is not None else ():
                part.analyses[PART] = part is v
    return [found for v in values if (found := v.analyses.get("rotation")) is not None]


def _found(root: Value, shadow: ValueGraph) -> Rotation | None:
    meta = root.meta
    if meta is None or len(meta.shape) < 2 or meta.dtype not in FLOATS or root.mutated_storage:
        return None
    width = shape_of(root)[-1]
    if not isinstance(width, int) or width < 2 or root.op == "cast" and not narrows(root):
        return None
    if root.op == "view" and same_literal(root.args[0].meta.shape[-1], meta.shape[-1]):  # what is viewed may be one
        return None
    for second in (False, True):
        moving, found, known = Moving(second), None, frozenset()
        for x, way in _candidates(root, moving):
            if found is not None and any(v.op in ARITHMETIC for v in way - known):
                break  # what x is computed by is its own
            for deep in (True, False):
                proof = _Proof(root, x, way, deep, shadow)
                try:
                    found, known = proof.rotation(), way
                    break
                except Unreadable:
                    if len(proof.reader.below) == 1:  # nothing deeper was read
                        break
        if found is not None or not moving.guessed:
            return found
    return None


def _candidates(root: Value, moving: Moving) -> Iterator[tuple[Value, frozenset[Value]]]:
    """Values that all ways from the result down to what is rotated lead through, and what lies on these ways; nearest first."""
    front, way, tried = {root}, set(), 0
    while len(way) < LARGEST and tried < FARTHEST:
        v = max(front, key=lambda v: v.id)
        ops = {w.op for w in way}
        if len(front) == 1 and not v.meta.dtype.is_complex and not ops.isdisjoint(PRODUCTS) and not ops.isdisjoint(MIXES):
            tried += 1
            yield v, frozenset(way)
        operands = moving.operands(v) if v.region == root.region and not v.mutated_storage else None
        if not operands:
            return
        front.remove(v)
        way.add(v)
        front.update(operands)


class _Proof:
    """That one result is a rotation of one tensor. Raises Unreadable where it is not."""

    def __init__(self, root: Value, x: Value, way: frozenset[Value], deep: bool, shadow: ValueGraph):
        self.root, self.way, self.rows = root, way, shape_of(root)[:-1]
        self.axes = (*(UNIT if is_one(s) else d for d, s in enumerate(self.rows)), CHANNEL)
        self.normal = Normal(shadow)
        self.normal.region, self.normal.origin = root.region, root.origin
        self.reader = Reader(self.normal, root, x, way, deep, OPERATIONS)

    def rotation(self) -> Rotation:
        width = shape_of(self.root)[-1]
        array = self.reader.read(self.root, self.axes)
        terms_of_each = sum((t.numbers != 0) for t in array.terms)
        _require(bool(array.terms) and 0 < terms_of_each.min() <= terms_of_each.max() == 2, "no sums of two")
        own = [i for i, leaf in enumerate(self.reader.leaves) if leaf.moves]
        _require(len(own) == 1, "more than one tensor that is rotated")
        terms = _terms(array, own[0])
        first = _first_channel(terms)
        terms = [{i - first: c for i, c in t.items()} for t in terms]
        start, turned = _turned(terms)
        pairing, (c1, s1), (c2, s2) = _pairs(terms, start, turned)
        signs = [-1 if s[0][0] < 0 else 1 for s in (s1, s2)]
        s1, s2 = ([(number * sign, atoms) for number, atoms in s] for s, sign in zip((s1, s2), signs, strict=True))
        x = self.rotated(self.reader.leaves[own[0]], first, width)
        self.batched, axis = self.positions([*c1, *s1, *c2, *s2])
        self.table_rows = [0, axis] if self.batched else [axis]
        wanted = (c1, s1) if (c1, s1) == (c2, s2) else (c1, s1, c2, s2)
        tables = {name: self.table(t) for name, t in zip(TABLES, wanted, strict=False)}
        self.require_precise([x, *tables.values()])
        options = {"axis": axis, "start": start, "interleaved": pairing[0], "interleaves": pairing[1]}
        options |= {"first": signs[0], "second": signs[1], "layout": _layout(self.root, self.way), "dtype": self.root.meta.dtype}
        computed = self.computed(x)
        return Rotation(self.root, x, tables, options, computed, computed | self.reader.tables())

    def rotated(self, leaf: Leaf, first: int, width: int) -> Value:
        """x, with the dimensions that the result has: as it stands in the graph, or made of the leaf."""
        if (known := self.standing(leaf, first, width)) is not None:
            return known
        n, axes, last = self.normal, leaf.axes[:-1], len(leaf.axes) - 1
        rows = [d for d, s in enumerate(self.rows) if not is_one(s)]
        _require(leaf.axes[-1] == CHANNEL and sorted(a for a in axes if a != UNIT) == rows, "rows from elsewhere")
        x = n.slice(leaf.value, last, first, first + width)
        units = [d for d, a in enumerate(axes) if a == UNIT]
        if last == len(self.rows):  # dimensions of size 1 go where there is room
            return n.permute(x, (*(axes.index(k) if k in axes else units.pop(0) for k in range(last)), last))
        return n.view(n.permute(x, (*(axes.index(k) for k in rows), *units, last)), (*self.rows, width))

    def standing(self, leaf: Leaf, first: int, width: int) -> Value | None:
        """What has been read that is just these channels."""
        number = self.reader.leaves.index(leaf)
        wanted = range(first, first + width)
        for v in sorted((self.way | self.reader.below) - {self.root}, key=lambda v: v.id):
            array = self.reader.known(v, self.axes)
            if v.nodes and array is not None and array.shape == (width, 1) and len(array.terms) == 1:
                tensors, elements, numbers = array.terms[0]
                if tensors == ((number, ()),) and [*elements[0][:, 0]] == [*wanted] and numbers.min() == numbers.max() == 1:
                    return v
        return None

    def positions(self, coefficients: Coefficients) -> tuple[bool, int]:
        """Which dimensions tables have: that of positions, and perhaps the batch's; of a single row, any."""
        leaves = {atom[0] for _, atoms in coefficients for atom in atoms}
        rows = sorted({a for i in leaves for a in self.reader.leaves[i].axes if a >= 0})
        if all(map(is_one, self.rows)):
            return False, 0
        _require(len(rows) == 1 or len(rows) == 2 and rows[0] == 0, "tables that differ from head to head")
        return len(rows) == 2, rows[-1]

    def table(self, coefficients: Coefficients) -> Value:
        """These as [positions, pairs], or [batch, positions, pairs]."""
        n, number = self.normal, coefficients[0][0]
        counts = {len(atoms) for _, atoms in coefficients}
        _require({c for c, _ in coefficients} == {number} and len(counts) == 1 and 0 not in counts, "tables of several kinds")
        parts = [self.part(atoms) for atoms in zip(*(atoms for _, atoms in coefficients), strict=True)]
        found = parts[0]
        if len(parts) > 1 or number != 1:  # a product of tables is not rounded to less than fp32
            found, *others = (n.cast(p, torch.promote_types(p.meta.dtype, torch.float32)) for p in parts)
            for other in others:
                shape = tuple(b if is_one(a) else a for a, b in zip(shape_of(found), shape_of(other), strict=True))
                dtype = torch.promote_types(found.meta.dtype, other.meta.dtype)
                found = n.add("mul", (found, other), found.meta._replace(shape=shape, dtype=dtype))
            found = found if number == 1 else n.add("mul", (found, number), found.meta)
        *rows, pairs = shape_of(found)
        _require(not is_one(rows[-1]) or all(map(is_one, self.rows)), "a table without positions")
        return found if same_literal(pairs, len(coefficients)) else n.expand(found, (*rows, len(coefficients)))

    def part(self, atoms: tuple) -> Value:
        """The channels of one leaf that the pairs read, in their order: all at the same distance."""
        (leaf, roundings, first), *_ = atoms
        steps = {b[2] - a[2] for a, b in pairwise(atoms)} or {1}
        _require({a[:2] for a in atoms} == {(leaf, roundings)} and len(steps) == 1 and min(steps) >= 0, "tables put together")
        table = self.arranged(*self.reader.leaves[leaf][:2])
        table = self.normal.slice(table, len(self.table_rows), first, atoms[-1][2] + 1, max(min(steps), 1))
        for name in roundings:
            table = self.normal.cast(table, getattr(torch, name))
        return table

    def arranged(self, v: Value, axes: Axes) -> Value:
        """A leaf as [positions, channels] or [batch, positions, channels]; of size 1 where it has no such dimension."""
        shape, rows = shape_of(v), [axes.index(k) for k in self.table_rows if k in axes]
        channels = [d for d, a in enumerate(axes) if a == CHANNEL]
        if [*rows, *channels] != sorted([*rows, *channels]):
            order = (*rows, *channels, *(d for d, a in enumerate(axes) if a == UNIT))
            v = self.normal.permute(v, order)
        sizes = (shape[axes.index(k)] if k in axes else 1 for k in self.table_rows)
        return self.normal.view(v, (*sizes, prod(shape[d] for d in channels)))

    def require_precise(self, operands: Iterable[Value]) -> None:
        """The operator computes in fp32, or in the widest dtype of its operands, and rounds once: nothing may be wider."""
        wide = torch.float32
        for v in operands:
            wide = torch.promote_types(wide, v.meta.dtype)
        for v in self.way:
            dtype = real_dtype(v.meta.dtype)
            _require(dtype == wide or wide in WIDER.get(dtype, ()), "computed wider than its operands are")

    def computed(self, x: Value) -> frozenset[Value]:
        """What the operator takes the place of: all that was read on the way down to x, or to what x is made of."""
        read, found, todo = (self.way | self.reader.below) - self.reader.ends - {x}, set(), [self.root]
        while todo:
            v = todo.pop()
            if v in read and v not in found:
                found.add(v)
                todo += v.inputs
        todo = [*found - {self.root}]
        while todo:  # views that the normal form has looked through: nobody reads them but what is read here
            views = [u for u in todo.pop().users if u.op in VIEWS_OF_ONE and not u.users and u.nodes and u not in found]
            todo += [u for u in views if not any(user.op == "output" for n in u.nodes for user in n.users)]
            found.update(todo)
        return frozenset(found)


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise Unreadable(why)


def _terms(array: Array, moving: int) -> list[dict[int, tuple[Any, tuple]]]:
    """For each channel of the result: by channels of x, their coefficient (number, atoms of tables)."""
    found: list[dict] = [{} for _ in range(array.shape[0])]
    for tensors, elements, numbers in array.terms:
        _require([leaf for leaf, _ in tensors].count(moving) == 1, "not linear")
        at = next(i for i, (leaf, _) in enumerate(tensors) if leaf == moving)
        others = [i for i in range(len(tensors)) if i != at]
        columns = [e[:, 0].tolist() for e in elements]
        for row, number in enumerate(numbers[:, 0].tolist()):
            if number:
                _require(columns[at][row] not in found[row], "not linear")
                found[row][columns[at][row]] = number, tuple((*tensors[i], columns[i][row]) for i in others)
    return found


def _first_channel(terms: list[dict]) -> int:
    """Where the channels begin, in the tensor that is read, that become those of the result."""
    read = {i for t in terms for i in t}
    _require(bool(read) and max(read) - min(read) < len(terms), "channels from elsewhere")
    return min(read)


def _turned(terms: list[dict]) -> tuple[int, int]:
    """Which channels do not pass through: the first of them, and how many."""
    turned = [i for i, t in enumerate(terms) if t != {i: (1, ())}]
    _require(bool(turned) and turned[-1] - turned[0] == len(turned) - 1 and len(turned) % 2 == 0, "nothing that is turned")
    return turned[0], len(turned)


def _pairs(terms: list[dict], start: int, width: int) -> tuple:
    """How channels are paired; and for the first and the second of the pairs, what their own is multiplied by and the other."""

    def place(pair: int, second: int, interleaved: bool) -> int:
        return start + (2 * pair + second if interleaved else pair + second * (width // 2))

    for before, after in PAIRINGS:
        found: list[tuple[Coefficients, Coefficients]] = []
        for second in (0, 1):
            own, other = [], []
            for pair in range(width // 2):
                t, a, b = terms[place(pair, second, after)], place(pair, second, before), place(pair, 1 - second, before)
                if len(t) != 2 or a not in t or b not in t:
                    break
                own.append(t[a])
                other.append(t[b])
            else:
                found.append((own, other))
        if len(found) == 2:
            return (before, after), *found
    raise Unreadable("channels that are no pairs")


def _layout(v: Value, way: frozenset[Value]) -> int:
    """A result that ends in a concatenation is contiguous. Else it has the layout of what is rotated."""
    while v.op not in ("cat", "matmul", "matmul_transposed"):
        below = [a for a in v.inputs if a in way]
        if not below:
            return LIKE
        v = below[0]
    return CONTIGUOUS


def _reading(found: list[Rotation], names: tuple[str, ...]) -> Reading:
    tensors = {name: f.x for name, f in zip(names, found, strict=True)} | found[0].tables
    values = frozenset().union(*(f.values for f in found))
    return Reading(found[0].name, tensors, found[0].options, tuple(f.root for f in found), values)


@reader(ROPE, op=rotate_both, no_grad=TABLES, name="rotation")
def both(shadow: ValueGraph, taken: Set[Value]) -> Iterator[Reading]:
    """q and k of one layer, which are turned alike."""
    alike: dict[Any, list[Rotation]] = {}
    for found in rotations(shadow, taken):
        how = (*found.tables.values(), *found.options.items(), found.root.region, len(found.values))
        alike.setdefault(how, []).append(found)
    for waiting in alike.values():
        for q, k in zip(waiting[::2], waiting[1::2], strict=False):
            yield _reading([q, k], ("q", "k"))


@reader(ROPE, op=rotate, no_grad=TABLES, name="rotation_single")
def single(shadow: ValueGraph, taken: Set[Value]) -> Iterator[Reading]:
    for found in rotations(shadow, taken):
        yield _reading([found], ("x",))


domain(rotate)
domain(rotate_both)
rounds_once(rotate, streams=("x",))
rounds_once(rotate_both, streams=("q", "k"))
