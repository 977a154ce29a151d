"""What a value is of another in the channels of its last dimensions, proven from how it is computed.

Each element of a value is a polynomial of elements of leaves: of the tensor that is rotated, and of tables. A value is read from
its result downward. Its dimensions are known there: rows (batch, positions, heads), which no operation mixes, and channels, whose
number is known and which views, slices, concatenations, complex numbers and small products may mix in any way. What an operation
asks of its operands follows from that: an operand that cannot be read so is a leaf.

    rows      a label for each: the dimension of the result that it is
    channels  an array of polynomials over them, with a last axis of 1 (real) or 2 (real and imaginary part)
    atoms     (leaf, dtypes that it is rounded to, channel of the leaf)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from sloth.rewriter.graph.canonical import Normal
from sloth.rewriter.graph.normal_form import WIDER
from sloth.rewriter.graph.value import Value, same_literal

CHANNEL, UNIT = -1, -2  # of a dimension: its channels; of size 1. Rows have labels from 0 on.
MOST = 4096  # channels of a value that is read
SMALL = 8  # channels that a product sums over
Axes = tuple[int, ...]
Poly = tuple[tuple[tuple, Any], ...]  # (atoms, number) for each monomial


class Unreadable(Exception):
    """It is computed in a way that is not known to be linear."""


class Leaf(NamedTuple):
    value: Value
    axes: Axes
    moving: bool  # is it what is rotated, and not a table?


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def narrows(v: Value) -> bool:
    """Does this cast round?"""
    given, wanted = (real_dtype(x.meta.dtype) for x in (v.args[0], v))
    return given != wanted and wanted not in WIDER.get(given, ())


ONE_INPUT = frozenset(
    {"view", "expand", "permute", "slice", "cast", "neg", "flip", "roll", "view_as_complex", "view_as_real", "_conj", "conj_physical",
     "real", "imag", "sum"}
)  # fmt: skip
BELOW = frozenset({"view", "permute", "slice", "cast", "view_as_complex", "view_as_real"})  # what is rotated is seen through


class Data:
    """Which operands carry what is rotated. Where shapes and gradients do not tell, it is the first, or the second."""

    def __init__(self, second: bool = False):
        self.second, self.guessed = second, False

    def operand(self, a: Value, b: Value) -> Value:
        """Of a product: what needs a gradient, or has more dimensions."""
        if a.meta.requires_grad != b.meta.requires_grad:
            return a if a.meta.requires_grad else b
        sizes = [sum(not is_one(s) for s in x.meta.shape) for x in (a, b)]
        if sizes[0] != sizes[1]:
            return a if sizes[0] > sizes[1] else b
        self.guessed = True
        return b if self.second else a

    def inputs(self, v: Value) -> list[Value] | None:
        """Those operands of `v`; None where it is not linear in any."""
        if v.op in ONE_INPUT:
            return [v.args[0]]
        if v.op == "cat":
            return [*v.args[0]]
        if v.op in ("add", "sub", "complex"):
            return [*v.args[:2]] if all(isinstance(a, Value) for a in v.args[:2]) else None
        if v.op in ("mul", "div") and isinstance(v.args[0], Value) and isinstance(v.args[1], int | float):
            return [v.args[0]]
        if v.op in ("mul", "matmul", "matmul_transposed") and all(isinstance(a, Value) for a in v.args):
            return [self.operand(*v.args)]
        if v.op == "addcmul":
            return [v.args[0], self.operand(*v.args[1:3])]
        return None


class Reader:
    """Reads one result as polynomials. moving: the values on the way from it to what is rotated (`x`); those below x that are but
    views of something deeper are read too if `deep`.
    """

    def __init__(self, normal: Normal, root: Value, x: Value, moving: frozenset[Value], deep: bool):
        self.normal, self.root, self.x, self.moving, self.deep = normal, root, x, moving, deep
        self.leaves: list[Leaf] = []
        self._numbers: dict[tuple[int, Axes], int] = {}
        self._known: dict[tuple[int, Axes], np.ndarray] = {}
        self.below: set[Value] = {x}
        self.ends: set[Value] = set()  # where the reading of what is rotated ended

    def read(self, v: Value, axes: Axes) -> np.ndarray:
        key = (v.id, axes)
        if key not in self._known:
            self._known[key] = self._read(v, axes)
        return self._known[key]

    def _read(self, v: Value, axes: Axes) -> np.ndarray:
        moves, is_x = v in self.moving, v in self.below
        if moves and v.op not in BELOW:
            return self.operation(v, axes, TABLES | MOVING)
        if v.mutated_storage or is_x and not self.passes(v):
            return self.leaf(v, axes, is_x)
        state = len(self.leaves), dict(self._numbers), dict(self._known), set(self.below)
        try:
            if is_x:
                self.below.add(v.args[0])
            return self.operation(v, axes, BELOW_X if is_x else TABLES)
        except Unreadable:
            del self.leaves[state[0] :]
            self._numbers, self._known, self.below = state[1:]
            return self.leaf(v, axes, moves or is_x)

    def passes(self, v: Value) -> bool:
        """May a view of what is rotated be seen through? Its region must be the same, and nothing be rounded."""
        below = v.args[0] if v.op in BELOW else None
        return self.deep and below is not None and below.region == self.root.region and not (v.op == "cast" and narrows(v))

    def operation(self, v: Value, axes: Axes, table: dict[str, Callable]) -> np.ndarray:
        if v.op not in table:
            raise Unreadable(v.op)
        return table[v.op](self, v, axes)

    def leaf(self, v: Value, axes: Axes, moving: bool) -> np.ndarray:
        if v.meta.dtype.is_complex:
            real = self.normal.add("view_as_real", (v,), v.meta._replace(shape=(*v.meta.shape, 2), dtype=v.meta.dtype.to_real()))
            return self.leaf(real, (*axes, CHANNEL), moving)[..., 0]
        shape = self.channels(v, axes)
        if moving:
            self.ends.add(v)
        leading = axes.index(CHANNEL) if CHANNEL in axes else 0
        if moving and set(axes[leading:]) == {CHANNEL}:  # one tensor, in whatever views of it
            v, axes = self.normal.view(v, (*v.meta.shape[:leading], prod(shape))), (*axes[:leading], CHANNEL)
        key = (v.id, axes)
        if key not in self._numbers:
            self._numbers[key] = len(self.leaves)
            self.leaves.append(Leaf(v, axes, moving))
        return _filled([((((self._numbers[key], (), k),), 1),) for k in range(prod(shape))], (*shape, 1))

    def channels(self, v: Value, axes: Axes) -> tuple[int, ...]:
        """The sizes of its channel dimensions."""
        sizes = tuple(s for s, a in zip(v.meta.shape, axes, strict=True) if a == CHANNEL)
        if not all(isinstance(s, int) for s in sizes) or prod(sizes) > MOST:
            raise Unreadable("sizes")
        return sizes

    def operand(self, x: Value, axes: Axes) -> np.ndarray:
        """An operand that is broadcast to these dimensions, its channels beside theirs."""
        rank = len(x.meta.shape)
        if rank > len(axes):
            raise Unreadable("rank")
        own = tuple(UNIT if is_one(s) else a for s, a in zip(x.meta.shape, axes[len(axes) - rank :], strict=True))
        own_all = (UNIT,) * (len(axes) - rank) + own
        return _spread(self.read(x, own), own_all, axes)


def _filled(items: list, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def _spread(array: np.ndarray, own: Axes, axes: Axes) -> np.ndarray:
    """With an axis of size 1 for each channel dimension that only `axes` has."""
    sizes = iter(array.shape[:-1])
    shape = [next(sizes) if o == CHANNEL else 1 for o, a in zip(own, axes, strict=True) if CHANNEL in (o, a)]
    return array.reshape((*shape, array.shape[-1]))


def _position(axes: Axes, dim: int) -> int:
    """Which axis of the array the dimension is."""
    return sum(a == CHANNEL for a in axes[:dim])


# ---------------------------------------------------------------- polynomials


def _product(p: Poly, q: Poly) -> Poly:
    return _sum(*(((tuple(sorted((*a, *b))), m * n),) for a, m in p for b, n in q))


def _sum(*polys: Poly) -> Poly:
    terms: dict[tuple, Any] = {}
    for poly in polys:
        for atoms, number in poly:
            terms[atoms] = terms.get(atoms, 0) + number
    return tuple((atoms, number) for atoms, number in terms.items() if number != 0)


def _scaled(p: Poly, number: Any) -> Poly:
    return tuple((atoms, n * number) for atoms, n in p)


_TIMES, _PLUS = np.frompyfunc(_product, 2, 1), np.frompyfunc(_sum, 2, 1)


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Also of complex numbers."""
    if a.shape[-1] == b.shape[-1] == 2:
        (re, im), (c, s) = ((x[..., :1], x[..., 1:]) for x in (a, b))
        parts = plus(_TIMES(re, c), scaled(_TIMES(im, s), -1)), plus(_TIMES(re, s), _TIMES(im, c))
        return np.concatenate(parts, -1)
    return _TIMES(a, b)


def plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape[-1] != b.shape[-1]:
        raise Unreadable("a real number and a complex one")
    return _PLUS(a, b)


def scaled(a: np.ndarray, number: Any) -> np.ndarray:
    return np.frompyfunc(lambda p: _scaled(p, number), 1, 1)(a)


# ---------------------------------------------------------------- operations


def _view(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    x = v.args[0]
    inner = _axes_below(x.meta.shape, v.meta.shape, axes)
    array = r.read(x, inner)
    return array.reshape((*r.channels(v, axes), array.shape[-1]))


def _axes_below(below: Sequence, above: Sequence, axes: Axes) -> Axes:
    """The dimensions of what a view is of: rows stay, channels that stand together are taken together."""
    own = [UNIT] * len(below)
    left = [(i, s) for i, s in enumerate(below) if not is_one(s)]
    right = [(a, s) for a, s in zip(axes, above, strict=True) if not is_one(s)]
    while left or right:
        if not left or not right:
            raise Unreadable("view")
        (i, size), (a, wanted) = left.pop(0), right.pop(0)
        if same_literal(size, wanted):
            own[i] = a
            continue
        dims = [i]
        while not same_literal(size, wanted):  # a dimension is split, or several are joined
            if not isinstance(size, int) or not isinstance(wanted, int) or a != CHANNEL:
                raise Unreadable("view")
            if size < wanted and left:
                i, more = left.pop(0)
                size = size * more if isinstance(more, int) else more
                dims.append(i)
            elif size > wanted and right:
                a, more = right.pop(0)
                wanted = wanted * more if isinstance(more, int) else more
            else:
                raise Unreadable("view")
        if a != CHANNEL:
            raise Unreadable("view")
        for i in dims:
            own[i] = CHANNEL
    return tuple(own)


def _permute(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    x, dims = v.args
    inner = [UNIT] * len(dims)
    for a, d in zip(axes, dims, strict=True):
        inner[d] = a
    order = [_position(tuple(inner), d) for a, d in zip(axes, dims, strict=True) if a == CHANNEL]
    return r.read(x, tuple(inner)).transpose((*order, len(order)))


def _expand(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    array = r.operand(v.args[0], axes)
    return np.broadcast_to(array, (*r.channels(v, axes), array.shape[-1]))


def _slice(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    x, dim, start, end, step = v.args
    if axes[dim] >= 0 or not all(isinstance(i, int) for i in (x.meta.shape[dim], start, end, step)):
        raise Unreadable("slice of rows")
    array = r.read(x, (*axes[:dim], CHANNEL, *axes[dim + 1 :]))
    at = _position(axes, dim)
    if axes[dim] == UNIT:
        return array.take(start, at)
    return array[(slice(None),) * at + (slice(start, end, step),)]


def _part_of_x(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    """Some channels. One of several tensors that are stacked is a tensor of its own."""
    if axes[v.args[1]] != CHANNEL:
        raise Unreadable("slice of rows")
    return _slice(r, v, axes)


def _cat(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    xs, dim = v.args
    if axes[dim] != CHANNEL:
        raise Unreadable("concatenation of rows")
    pieces = []
    for x in xs:
        own = (*axes[:dim], UNIT if is_one(x.meta.shape[dim]) else CHANNEL, *axes[dim + 1 :])
        pieces.append(_spread(r.read(x, own), own, axes))
    return np.concatenate(pieces, _position(axes, dim))


def _cast(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    array = r.read(v.args[0], axes)
    if not narrows(v):
        return array
    if v in r.moving:  # rounded to what the result is, and computed wide
        if v.meta.dtype != r.root.meta.dtype:
            raise Unreadable("rounded on the way")
        return array
    return np.frompyfunc(lambda p: _rounded(p, v.meta.dtype), 1, 1)(array)


def _rounded(p: Poly, dtype: torch.dtype) -> Poly:
    """Of one element of a table, with its sign."""
    if len(p) != 1 or len(p[0][0]) != 1 or p[0][1] not in (1, -1):
        raise Unreadable("rounded")
    (((leaf, roundings, channel),), sign) = p[0]
    return ((((leaf, (*roundings, str(dtype)[6:]), channel),), sign),)


def _neg(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    return scaled(r.read(v.args[0], axes), -1)


def _flip(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    x, dims = v.args
    dims = [d % len(axes) for d in dims]
    if any(axes[d] >= 0 for d in dims):
        raise Unreadable("flipped rows")
    return np.flip(r.read(x, axes), [_position(axes, d) for d in dims if axes[d] == CHANNEL])


def _roll(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    x, shifts, dims = v.args
    dims = [d % len(axes) for d in dims]
    if not dims or any(axes[d] != CHANNEL for d in dims) or not all(isinstance(s, int) for s in shifts):
        raise Unreadable("rolled rows")
    return np.roll(r.read(x, axes), shifts, [_position(axes, d) for d in dims])


def _as_complex(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    return r.read(v.args[0], (*axes, CHANNEL))[..., 0]


def _as_real(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    if axes[-1] != CHANNEL:
        raise Unreadable("parts")
    return r.read(v.args[0], axes[:-1])[..., None]


def _complex(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    return np.concatenate(np.broadcast_arrays(*(r.operand(a, axes) for a in v.args)), -1)


def _conj(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    array = r.read(v.args[0], axes)
    return np.concatenate((array[..., :1], scaled(array[..., 1:], -1)), -1)


def _part(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    array = r.read(v.args[0], axes)
    return array[..., :1] if v.op == "real" else array[..., -1:]


def _add(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    a, b = (r.operand(x, axes) for x in v.args)
    return plus(a, scaled(b, -1) if v.op == "sub" else b)


def _mul(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    a, b = v.args
    if not isinstance(b, Value):
        return scaled(r.read(a, axes), b if v.op == "mul" else 1 / b)
    return times(r.operand(a, axes), r.operand(b, axes))


def _addcmul(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    x, a, b, number = v.args
    return plus(r.operand(x, axes), scaled(times(r.operand(a, axes), r.operand(b, axes)), number))


def _sum_of(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    x, dims, keep = v.args[:3]
    below = list(axes)
    for d in dims:
        if keep:
            below[d] = CHANNEL
        else:
            below.insert(d, CHANNEL)
        if not isinstance(x.meta.shape[d], int) or x.meta.shape[d] > SMALL:
            raise Unreadable("a sum over many")
    array = r.operand(x, tuple(below))
    for d in reversed(dims):
        at = _position(tuple(below), d)
        parts = [array.take(i, at) for i in range(array.shape[at])]
        array = parts[0]
        for part in parts[1:]:
            array = plus(array, part)
    return array


def _matmul(r: Reader, v: Value, axes: Axes) -> np.ndarray:
    a, b = v.args
    k = a.meta.shape[-1]
    if not isinstance(k, int) or not 1 < k <= SMALL:
        raise Unreadable("a product over many")
    *batch, m, n = axes
    wide = (*batch, m, n, CHANNEL)
    left = _batched(r, a, (*batch, m, CHANNEL), (*batch, m, UNIT, CHANNEL), wide)
    if v.op == "matmul_transposed":
        right = _batched(r, b, (*batch, n, CHANNEL), (*batch, UNIT, n, CHANNEL), wide)
    else:
        own = (*batch, CHANNEL, n)
        right = r.operand(b, own)
        right = np.moveaxis(right, _position(own, len(batch)), -2)
        right = _spread(right, (*batch, UNIT, n, CHANNEL), wide)
    array = times(left, right)
    total = array[..., 0, :]
    for i in range(1, k):
        total = plus(total, array[..., i, :])
    return total


def _batched(r: Reader, x: Value, axes: Axes, spread: Axes, wide: Axes) -> np.ndarray:
    return _spread(r.operand(x, axes), spread, wide)


BELOW_X = {"view": _view, "permute": _permute, "slice": _part_of_x, "cast": _cast}
BELOW_X |= {"view_as_complex": _as_complex, "view_as_real": _as_real}
TABLES = BELOW_X | {
    "slice": _slice, "expand": _expand, "cat": _cat, "neg": _neg, "flip": _flip, "roll": _roll, "complex": _complex, "_conj": _conj,
    "conj_physical": _conj, "real": _part, "imag": _part,
}  # fmt: skip
MOVING = {
    "add": _add, "sub": _add, "mul": _mul, "div": _mul, "addcmul": _addcmul, "sum": _sum_of, "matmul": _matmul,
    "matmul_transposed": _matmul,
}  # fmt: skip
