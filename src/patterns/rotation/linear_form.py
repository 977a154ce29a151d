"""What a value is of others in the channels of its last dimensions, proven from how it is computed.

Each element is a polynomial of elements of leaves: of the tensor that moves (is rotated), and of tables. A value is read from its
result downward. Its dimensions are known there: rows (batch, positions, heads), which no operation mixes, and channels, whose
number is known and which views, slices, concatenations, complex numbers and small products may mix in any way. What an operation
asks of its operands follows from that: an operand that cannot be read so is a leaf.

    axes      of a value's dimensions: for rows a label (the dimension of the result), for channels CHANNEL, for size 1 UNIT
    array     polynomials over its channels (sloth.patterns.rotation.polynomial)
    atom      a channel of a leaf, rounded to some dtypes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from sloth.patterns.rotation.polynomial import Array, Unreadable, elements_of
from sloth.rewriter.graph.canonical import Normal
from sloth.rewriter.graph.normal_form import WIDER
from sloth.rewriter.graph.value import Symbol, Value

CHANNEL, UNIT = -1, -2
MOST = 4096  # channels of a value that is read
Axes = tuple[int, ...]

ONE_OPERAND = {"view", "expand", "permute", "slice", "cast", "neg", "flip", "roll", "real", "imag", "sum"}
ONE_OPERAND |= {"view_as_complex", "view_as_real", "_conj", "conj_physical"}
VIEWS_OF_ONE = {"view", "permute", "slice", "cast", "view_as_complex", "view_as_real"}


class Leaf(NamedTuple):
    value: Value
    axes: Axes
    moves: bool


def known(size: Any) -> Any:
    """A symbol that is one number as that."""
    found = size.node.maybe_as_int() if isinstance(size, Symbol) else size
    return size if found is None else found


def shape_of(v: Value) -> tuple:
    return tuple(map(known, v.meta.shape))


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def narrows(v: Value) -> bool:
    """Does this cast round?"""
    given, wanted = (real_dtype(x.meta.dtype) for x in (v.args[0], v))
    return given != wanted and wanted not in WIDER.get(given, ())


class Moving:
    """Which operands carry what moves. Where sizes and gradients do not tell, it is the first, or the second."""

    def __init__(self, second: bool = False):
        self.second, self.guessed = second, False

    def factor(self, a: Value, b: Value) -> Value:
        """Of a product: what needs a gradient, or has more dimensions."""
        if a.meta.requires_grad != b.meta.requires_grad:
            return a if a.meta.requires_grad else b
        dims = [sum(not is_one(s) for s in shape_of(x)) for x in (a, b)]
        if dims[0] != dims[1]:
            return a if dims[0] > dims[1] else b
        self.guessed = True
        return b if self.second else a

    def operands(self, v: Value) -> list[Value] | None:
        """Those operands of `v`; None where it is not linear in any."""
        values = [isinstance(a, Value) for a in v.args[:3]]
        if v.op in ONE_OPERAND:
            return [v.args[0]]
        if v.op == "cat":
            return [*v.args[0]]
        if v.op in ("add", "sub", "complex"):
            return [*v.args[:2]] if all(values[:2]) else None
        if v.op in ("mul", "matmul", "matmul_transposed") and all(values):
            return [self.factor(*v.args)]
        if v.op in ("mul", "div") and values == [True, False] and isinstance(v.args[1], int | float):
            return [v.args[0]]
        if v.op == "addcmul":
            return [v.args[0], self.factor(*v.args[1:3])]
        return None


class Reader:
    """Reads one result. way: the values between it and `x`, which moves. What x is a view of is read too if `deep`."""

    def __init__(self, normal: Normal, root: Value, x: Value, way: frozenset[Value], deep: bool, table: Mapping[str, Callable]):
        self.normal, self.root, self.way, self.deep, self.table = normal, root, way, deep, table
        self.leaves: list[Leaf] = []
        self.below = {x}  # x, and what it is a view of
        self.ends: set[Value] = set()  # where the reading of what moves ended
        self._numbers: dict[tuple[int, Axes], int] = {}
        self._known: dict[tuple[int, Axes], Array] = {}

    def read(self, v: Value, axes: Axes) -> Array:
        key = (v.id, axes)
        if key not in self._known:
            self._known[key] = self._read(v, axes)
        return self._known[key]

    def known(self, v: Value, axes: Axes) -> Array | None:
        """What has been read."""
        return self._known.get((v.id, axes))

    def tables(self) -> frozenset[Value]:
        """What has been read of tables."""
        read = {self.normal.shadow.values[i] for i, _ in self._known}
        return frozenset(read - self.way - self.below)

    def _read(self, v: Value, axes: Axes) -> Array:
        on_way, is_x = v in self.way, v in self.below
        if on_way and v.op not in VIEWS_OF_ONE:
            return self.operation(v, axes)
        if v.mutated_storage or is_x and not self.passes(v, axes):
            return self.leaf(v, axes, is_x)
        if not on_way and not is_x and v.op in ARITHMETIC:  # what is computed of tables is a table
            return self.leaf(v, axes, False)
        before = len(self.leaves), dict(self._numbers), dict(self._known), set(self.below), set(self.ends)
        try:
            if is_x:
                self.below.add(v.args[0])
            return self.operation(v, axes)
        except Unreadable:
            del self.leaves[before[0] :]
            _, self._numbers, self._known, self.below, self.ends = before
            return self.leaf(v, axes, on_way or is_x)

    def passes(self, v: Value, axes: Axes) -> bool:
        """May a view of what moves be seen through? Its region must be the same, nothing be rounded, and one of several tensors
        that are stacked is a tensor of its own.
        """
        if not self.deep or v.op not in VIEWS_OF_ONE or v.args[0].region != self.root.region:
            return False
        return not (v.op == "cast" and narrows(v) or v.op == "slice" and axes[v.args[1]] != CHANNEL)

    def operation(self, v: Value, axes: Axes) -> Array:
        if v.op not in self.table:
            raise Unreadable(v.op)
        return self.table[v.op](self, v, axes)

    def leaf(self, v: Value, axes: Axes, moves: bool) -> Array:
        if v.meta.dtype.is_complex:
            meta = v.meta._replace(shape=(*v.meta.shape, 2), dtype=v.meta.dtype.to_real())
            return self.leaf(self.normal.add("view_as_real", (v,), meta), (*axes, CHANNEL), moves).map(lambda a: a[..., 0])
        shape = self.channels(v, axes)
        if moves:
            self.ends.add(v)
            leading = axes.index(CHANNEL) if CHANNEL in axes else len(axes)
            if set(axes[leading:]) <= {CHANNEL, UNIT}:  # it is one tensor, in whatever views
                v, axes = self.normal.view(v, (*v.meta.shape[:leading], prod(shape))), (*axes[:leading], CHANNEL)
        key = (v.id, axes)
        if key not in self._numbers:
            self._numbers[key] = len(self.leaves)
            self.leaves.append(Leaf(v, axes, moves))
        return elements_of(self._numbers[key], shape)

    def channels(self, v: Value, axes: Axes) -> tuple[int, ...]:
        """The sizes of its channel dimensions."""
        sizes = tuple(s for s, a in zip(shape_of(v), axes, strict=True) if a == CHANNEL)
        if not all(isinstance(s, int) for s in sizes) or prod(sizes) > MOST:
            raise Unreadable("its channels are not known, or many")
        return sizes

    def operand(self, x: Value, axes: Axes) -> Array:
        """An operand that is broadcast to these dimensions, with an axis for each of their channels."""
        missing = len(axes) - len(x.meta.shape)
        if missing < 0:
            raise Unreadable("an operand of more dimensions")
        own = tuple(UNIT if is_one(s) else a for s, a in zip(shape_of(x), axes[missing:], strict=True))
        return spread(self.read(x, own), (UNIT,) * missing + own, axes)


ARITHMETIC = {"add", "sub", "mul", "div", "addcmul", "sum", "matmul", "matmul_transposed"}


def spread(array: Array, own: Axes, axes: Axes) -> Array:
    """With an axis of size 1 for each channel dimension that only `axes` has."""
    sizes = iter(array.shape[:-1])
    shape = [next(sizes) if o == CHANNEL else 1 for o, a in zip(own, axes, strict=True) if CHANNEL in (o, a)]
    return array.reshape((*shape, array.shape[-1]))


def place(axes: Axes, dim: int) -> int:
    """Which axis of the array the dimension is."""
    return sum(a == CHANNEL for a in axes[:dim])
