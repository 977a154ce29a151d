"""Rotary position embedding in any spelling: found by what it computes of each pair of channels, not by how it is written.

    y[i] = c[i] · x[i] ± s[i] · x[j]        i, j a pair; other channels pass through

A result is read as polynomials of the channels of one tensor x and of tables (sloth.patterns.linear_form). Where each channel is
such a sum, that is what `rotate` computes, however the model splits, multiplies and joins: halves or pairs, tables of each channel
or of each pair, of any layout, complex numbers, stacks, small matrices, scales. What the entries of sloth.patterns.rope match is
left to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import torch

from sloth.kernels.rotation import CONTIGUOUS, LIKE, rotate, rotate_both
from sloth.patterns.linear_form import CHANNEL, UNIT, WIDER, Axes, Data, Leaf, Reader, Unreadable, is_one, narrows, real_dtype
from sloth.patterns.rope import PART, ROPE
from sloth.rewriter.graph.canonical import Normal
from sloth.rewriter.graph.value import Value, ValueGraph, same_literal
from sloth.rewriter.match.domain import FLOATS, domain
from sloth.rewriter.match.pattern import Reading
from sloth.rewriter.match.registry import reader
from sloth.rewriter.plan.narrow import rounds_once

ROOTS = frozenset({"add", "sub", "cat", "view", "cast", "mul", "addcmul", "sum", "matmul", "matmul_transposed", "view_as_real"})
MIXES = frozenset({"slice", "cat", "flip", "roll", "view_as_complex", "complex", "sum", "matmul", "matmul_transposed"})
PRODUCTS = frozenset({"mul", "addcmul", "matmul", "matmul_transposed"})
LARGEST = 48  # operations of a rotation
TABLES = ("cos", "sin", "cos_second", "sin_second")
PAIRINGS = ((False, False), (True, True), (True, False), (False, True))  # interleaved? of x, of the result


class Rotation(NamedTuple):
    """One result that is a rotation: arguments of the operator, and the values that compute it."""

    root: Value
    x: Value
    tables: dict[str, Value]
    options: dict[str, Any]
    values: frozenset[Value]

    @property
    def name(self) -> str:
        before, after = ("pairs" if self.options[name] else "halves" for name in ("interleaved", "interleaves"))
        return before if before == after else f"{before}_to_{after}"


def rotations(shadow: ValueGraph) -> Iterator[Rotation]:
    """All results in the graph that are one, and no part of a larger one: of more channels, or rounded."""
    values = [*shadow.values]
    for v in reversed(values):
        if "rotation" not in v.analyses and PART not in v.analyses and v.op in ROOTS and v.nodes:
            v.analyses["rotation"] = found = _found(v, shadow)
            for part in found.values if found is not None else ():
                part.analyses[PART] = part is v
    found = (v.analyses.get("rotation") for v in values)
    yield from (f for f in found if f is not None)


def _found(root: Value, shadow: ValueGraph) -> Rotation | None:
    meta = root.meta
    width = meta.shape[-1] if meta is not None and len(meta.shape) > 1 else None
    if not isinstance(width, int) or width < 2 or root.mutated_storage or meta.dtype not in FLOATS:
        return None
    if root.op == "cast" and (not narrows(root) or root.args[0].meta.dtype not in FLOATS):
        return None
    if root.op == "mul" and not isinstance(root.args[1], Value):  # a number is not worth tables of its own
        return None
    for second in (False, True):
        data = Data(second)
        for x, moving in _candidates(root, data):
            for deep in (True, False):
                try:
                    return _Proof(root, x, moving, deep, shadow).rotation()
                except Unreadable:
                    continue
        if not data.guessed:
            break
    return None


def _candidates(root: Value, data: Data) -> Iterator[tuple[Value, frozenset[Value]]]:
    """Values that all ways from the result down to what is rotated lead through, and what lies on these ways, nearest first."""
    front, moving, tried = {root}, set(), 0
    while front and len(moving) < LARGEST and tried < 8:
        v = max(front, key=lambda v: v.id)
        if len(front) == 1 and any(m.op in PRODUCTS for m in moving) and any(m.op in MIXES for m in moving):
            tried += 1
            yield v, frozenset(moving)
        inputs = data.inputs(v) if v.region == root.region and not v.mutated_storage else None
        if inputs is None:
            return
        front.remove(v)
        moving.add(v)
        front.update(inputs)


class _Proof:
    """That one result is a rotation of one tensor. Raises Unreadable where it is not."""

    def __init__(self, root: Value, x: Value, moving: frozenset[Value], deep: bool, shadow: ValueGraph):
        self.root, self.candidate, self.moving = root, x, moving
        self.normal = Normal(shadow)
        self.normal.region, self.normal.origin = root.region, root.origin
        self.reader = Reader(self.normal, root, x, moving, deep)
        self.rank = len(root.meta.shape)

    def rotation(self) -> Rotation:
        shape = self.root.meta.shape
        axes = tuple(UNIT if is_one(s) else d for d, s in enumerate(shape[:-1]))
        array = self.reader.read(self.root, (*axes, CHANNEL))
        _require(array.shape == (shape[-1], 1), "a complex result")
        own = [leaf for leaf in self.reader.leaves if leaf.moving]
        _require(len(own) == 1, "more than one tensor that is rotated")
        self.moving_leaf = self.reader.leaves.index(own[0])
        terms = [self.terms(p) for p in array[:, 0]]
        first = self.first_channel(terms)
        terms = [{i - first: c for i, c in t.items()} for t in terms]
        start, width = _turned(terms)
        for pairing in PAIRINGS:
            if (found := _coefficients(terms, start, width, *pairing)) is not None:
                break
        else:
            raise Unreadable("channels that are no pairs")
        x, below = self.rotated(own[0], first, shape[-1])
        (c1, s1), (c2, s2) = found
        signs = [_sign(s) for s in (s1, s2)]
        self.axis, self.batched = self.positions([c1, c2, s1, s2])
        tables = {name: self.table(t) for name, t in zip(TABLES, (c1, _unsigned(s1)), strict=False)}
        if (c2, _unsigned(s2)) != (c1, _unsigned(s1)):
            tables |= {"cos_second": self.table(c2), "sin_second": self.table(_unsigned(s2))}
        self.require_precise(x, tables.values())
        options = {
            "axis": self.axis, "start": start, "interleaved": pairing[0], "interleaves": pairing[1],
            "first": signs[0], "second": signs[1], "layout": CONTIGUOUS if _is_joined(self.root, self.moving) else LIKE, "dtype": self.root.meta.dtype,
        }  # fmt: skip
        return Rotation(self.root, x, tables, options, self.computed(x, below))

    def terms(self, p: Any) -> dict[int, tuple]:
        """Of one channel of the result: by channels of x, the coefficient (number, atoms of tables)."""
        found = {}
        for atoms, number in p:
            moved = [a for a in atoms if a[0] == self.moving_leaf]
            _require(len(moved) == 1 and not moved[0][1] and moved[0][2] not in found, "not linear")
            found[moved[0][2]] = (number, tuple(a for a in atoms if a[0] != self.moving_leaf))
        return found

    def first_channel(self, terms: list[dict]) -> int:
        """Where in the tensor that is read the channels begin that become those of the result."""
        read = [i for t in terms for i in t]
        _require(bool(read) and max(read) - min(read) < len(terms), "channels from elsewhere")
        return min(read)

    def rotated(self, leaf: Leaf, first: int, width: int) -> tuple[Value, frozenset[Value]]:
        """x, in the order of dimensions that the result has, and what lies above it and was read through."""
        n, v, axes = self.normal, leaf.value, leaf.axes
        dims = [d for d, a in enumerate(axes) if a == CHANNEL]
        rows = [a for a in axes if a >= 0]
        wanted = [d for d, s in enumerate(self.root.meta.shape[:-1]) if not is_one(s)]
        _require(dims == [*range(dims[0], len(axes))] if dims else False, "channels in front of rows")
        _require(sorted(rows) == wanted, "rows from elsewhere")
        shape = v.meta.shape
        total = 1
        for d in dims:
            total *= shape[d]
        x = n.view(v, (*shape[: dims[0]], total))
        x = n.slice(x, dims[0], first, first + width)
        leading = axes[: dims[0]]
        if len(leading) == self.rank - 1:  # dimensions of size 1 go where there is room
            units = iter(d for d, a in enumerate(leading) if a == UNIT)
            order = [leading.index(k) if k in leading else next(units) for k in range(self.rank - 1)]
            return n.permute(x, (*order, self.rank - 1)), frozenset(self.reader.below)
        order = [leading.index(k) for k in wanted] + [d for d, a in enumerate(leading) if a == UNIT] + [dims[0]]
        return n.view(n.permute(x, tuple(order)), (*self.root.meta.shape[:-1], width)), frozenset(self.reader.below)

    def positions(self, tables: list[list]) -> tuple[int, bool]:
        """The dimension of positions, and whether each batch has tables of its own: the dimensions that they have."""
        leaves = {a[0] for table in tables for _, atoms in table for a in atoms}
        rows = sorted({a for leaf in leaves for a in self.reader.leaves[leaf].axes if a >= 0})
        _require(len(rows) == 1 or len(rows) == 2 and rows[0] == 0, "tables that differ from head to head")
        return rows[-1], len(rows) == 2

    def table(self, entries: list[tuple]) -> Value:
        """[positions, pairs], or [batch, positions, pairs], of these coefficients."""
        _require(
            all(e[0] == entries[0][0] and len(e[1]) == len(entries[0][1]) > 0 for e in entries), "coefficients of several kinds"
        )
        n, parts = self.normal, []
        for atoms in zip(*(atoms for _, atoms in entries), strict=True):
            parts.append(self.slice_of_leaf(atoms))
        number, found = entries[0][0], parts[0]
        if len(parts) > 1 or number != 1:  # a product of tables is not rounded to less than fp32
            parts = [n.cast(p, torch.promote_types(p.meta.dtype, torch.float32)) for p in parts]
            found = parts[0]
            for part in parts[1:]:
                shape = tuple(b if is_one(a) else a for a, b in zip(found.meta.shape, part.meta.shape, strict=True))
                dtype = torch.promote_types(found.meta.dtype, part.meta.dtype)
                found = n.add("mul", (found, part), found.meta._replace(shape=shape, dtype=dtype))
            found = found if number == 1 else n.add("mul", (found, number), found.meta)
        shape = found.meta.shape
        _require(not is_one(shape[-2]), "a table without positions")
        return found if same_literal(shape[-1], len(entries)) else n.expand(found, (*shape[:-1], len(entries)))

    def slice_of_leaf(self, atoms: tuple) -> Value:
        """The channels of one leaf that these pairs read, in their order."""
        _require(len({a[:2] for a in atoms}) == 1, "tables that are put together")
        n, leaf = self.normal, self.reader.leaves[atoms[0][0]]
        v, axes, at = leaf.value, leaf.axes, [a[2] for a in atoms]
        steps = {b - a for a, b in pairwise(at)}
        _require(len(steps) <= 1 and min(steps, default=1) >= 0, "tables in another order")
        v, last = self.arranged(v, axes), 2 if self.batched else 1
        step = min(steps, default=1)
        v = n.slice(v, last, at[0], at[-1] + 1, step or 1)
        for name in atoms[0][1]:
            v = n.cast(v, getattr(torch, name))
        return v

    def arranged(self, v: Value, axes: Axes) -> Value:
        """A leaf as [positions, channels] or [batch, positions, channels]; 1 where it has no such dimension."""
        n, shape = self.normal, v.meta.shape
        wanted = [0, self.axis] if self.batched else [self.axis]
        rows = [axes.index(k) for k in wanted if k in axes]
        channels = [d for d, a in enumerate(axes) if a == CHANNEL]
        total = 1
        for d in channels:
            total *= shape[d]
        units = [d for d, a in enumerate(axes) if a == UNIT]
        order = (*rows, *channels, *units) if [*rows, *channels] != sorted([*rows, *channels]) else tuple(range(len(axes)))
        return n.view(n.permute(v, order), (*(shape[axes.index(k)] if k in axes else 1 for k in wanted), total))

    def require_precise(self, x: Value, tables: Any) -> None:
        """The operator computes in fp32 or in the widest dtype of its operands, and rounds once. So nothing may be wider."""
        wide = torch.float32
        for v in (x, *tables):
            wide = torch.promote_types(wide, v.meta.dtype)
        for v in self.moving:
            dtype = real_dtype(v.meta.dtype)
            _require(dtype == wide or wide in WIDER.get(dtype, ()), "computed wider than its operands")

    def computed(self, x: Value, below: frozenset[Value]) -> frozenset[Value]:
        """What the operator takes the place of: the way down to x, which may stand there by itself."""
        found, todo = set(), [self.root]
        read = (self.moving | below) - self.reader.ends - {x}
        while todo:
            v = todo.pop()
            if v not in found and v in read:
                found.add(v)
                todo += v.inputs
        return frozenset(found)


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise Unreadable(why)


def _passes(channel: int, terms: dict[int, tuple]) -> bool:
    return terms == {channel: (1, ())}


def _turned(terms: list[dict]) -> tuple[int, int]:
    """Which channels do not pass through: the first of them, and how many."""
    turned = [i for i, t in enumerate(terms) if not _passes(i, t)]
    _require(bool(turned) and turned[-1] - turned[0] == len(turned) - 1 and len(turned) % 2 == 0, "nothing that is turned")
    return turned[0], len(turned)


def _place(pair: int, second: int, width: int, interleaved: bool) -> int:
    return 2 * pair + second if interleaved else pair + second * (width // 2)


def _coefficients(terms: list[dict], start: int, width: int, interleaved: bool, interleaves: bool) -> list | None:
    """For the first and the second channels of the pairs: what their own is multiplied by, and what the other."""
    found = []
    for second in (0, 1):
        own, other = [], []
        for pair in range(width // 2):
            t = terms[start + _place(pair, second, width, interleaves)]
            a, b = (start + _place(pair, k, width, interleaved) for k in (second, 1 - second))
            if t.keys() != {a, b} or a == b:
                return None
            own.append(t[a])
            other.append(t[b])
        found.append((own, other))
    return found


def _sign(entries: list[tuple]) -> int:
    return -1 if entries[0][0] < 0 else 1


def _unsigned(entries: list[tuple]) -> list[tuple]:
    sign = _sign(entries)
    return [(number * sign, atoms) for number, atoms in entries]


def _is_joined(v: Value, moving: frozenset[Value]) -> bool:
    """Does the result end in a concatenation, which is contiguous? Else it has the layout of what is rotated."""
    while v.op not in ("cat", "matmul", "matmul_transposed"):
        inner = [a for a in v.inputs if a in moving]
        if not inner:
            return False
        v = inner[0]
    return True


# ---------------------------------------------------------------- entries

NO_GRAD = TABLES


def _reading(found: list[Rotation], names: tuple[str, ...]) -> Reading:
    tensors = dict(zip(names, (f.x for f in found), strict=True)) | found[0].tables
    values = frozenset().union(*(f.values for f in found))
    return Reading(found[0].name, tensors, found[0].options, tuple(f.root for f in found), values)


@reader(ROPE, op=rotate, no_grad=NO_GRAD, name="rotation_single")
def single(shadow: ValueGraph) -> Iterator[Reading]:
    for found in rotations(shadow):
        yield _reading([found], ("x",))


@reader(ROPE, op=rotate_both, no_grad=NO_GRAD, name="rotation")
def both(shadow: ValueGraph) -> Iterator[Reading]:
    """q and k of one layer, which are turned alike."""
    waiting: dict[Any, list[Rotation]] = {}
    for found in rotations(shadow):
        how = (*found.tables.values(), *found.options.items(), found.root.op, found.root.region, len(found.values))
        waiting.setdefault(how, []).append(found)
    for alike in waiting.values():
        for q, k in zip(alike[::2], alike[1::2], strict=False):
            yield _reading([q, k], ("q", "k"))


domain(rotate)
domain(rotate_both)
rounds_once(rotate, streams=("x",))
rounds_once(rotate_both, streams=("q", "k"))
