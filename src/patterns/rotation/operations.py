"""How each operation of the normal form is read as polynomials: what it asks of its operands, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sloth.patterns.rotation.linear_form import CHANNEL, UNIT, Axes, Reader, is_one, known, narrows, place, shape_of, spread
from sloth.patterns.rotation.polynomial import Array, Unreadable, plus, rounded, scaled, side_by_side, times, total
from sloth.rewriter.graph.value import Value, same_literal

SMALL = 8  # channels that a product sums over
OPERATIONS: dict[str, Callable[[Reader, Value, Axes], Array]] = {}


def _reads(*ops: str) -> Callable:
    def enter(fn: Callable) -> Callable:
        OPERATIONS.update(dict.fromkeys(ops, fn))
        return fn

    return enter


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise Unreadable(why)


# ---------------------------------------------------------------- shapes


@_reads("view")
def _view(r: Reader, v: Value, axes: Axes) -> Array:
    x = v.args[0]
    array = r.read(x, _axes_below(shape_of(x), shape_of(v), axes))
    return array.reshape((*r.channels(v, axes), array.shape[-1]))


def _axes_below(below: Sequence, above: Sequence, axes: Axes) -> Axes:
    """The dimensions of what a view is of: rows stay, channels that stand together are taken together."""
    own = [UNIT] * len(below)
    left = [(i, s) for i, s in enumerate(below) if not is_one(s)]
    right = [(a, s) for a, s in zip(axes, above, strict=True) if not is_one(s)]
    while left or right:
        _require(bool(left and right), "a view of other sizes")
        (i, size), (a, wanted) = left.pop(0), right.pop(0)
        dims = [i]
        if same_literal(size, wanted):
            own[i] = a
            continue
        while not same_literal(size, wanted):  # a dimension is split, or several are joined
            _require(isinstance(size, int) and isinstance(wanted, int) and a == CHANNEL, "a view that mixes rows")
            more = left if size < wanted else right
            _require(bool(more) and isinstance(more[0][1], int), "a view that mixes rows")
            if more is left:
                i, factor = left.pop(0)
                size *= factor
                dims.append(i)
            else:
                a, factor = right.pop(0)
                wanted *= factor
        _require(a == CHANNEL, "a view that mixes rows")
        for i in dims:
            own[i] = CHANNEL
    return tuple(own)


@_reads("permute")
def _permute(r: Reader, v: Value, axes: Axes) -> Array:
    x, dims = v.args
    own = tuple(axes[dims.index(d)] for d in range(len(dims)))
    order = [place(own, d) for a, d in zip(axes, dims, strict=True) if a == CHANNEL]
    return r.read(x, own).map(lambda a: a.transpose((*order, len(order))))


@_reads("expand")
def _expand(r: Reader, v: Value, axes: Axes) -> Array:
    array = r.operand(v.args[0], axes)
    return array.expand((*r.channels(v, axes), array.shape[-1]))


@_reads("repeat", "tile")
def _repeat(r: Reader, v: Value, axes: Axes) -> Array:
    x, times_each = v.args
    missing = len(axes) - len(x.meta.shape)
    shape = (1,) * missing + shape_of(x)
    times_each = (1,) * (len(axes) - len(times_each)) + tuple(map(known, times_each))
    apart = all(is_one(n) or is_one(s) or a == CHANNEL for n, s, a in zip(times_each, shape, axes, strict=True))
    _require(apart and all(isinstance(n, int) for n in times_each), "rows that are repeated")
    array = r.operand(x, axes)
    tiles = [1 if is_one(s) else n for n, s, a in zip(times_each, shape, axes, strict=True) if a == CHANNEL]
    return array.map(lambda a: np.tile(a, (*tiles, 1))).expand((*r.channels(v, axes), array.shape[-1]))


@_reads("slice")
def _slice(r: Reader, v: Value, axes: Axes) -> Array:
    x, dim, start, end, step = map(known, v.args)
    _require(all(isinstance(i, int) for i in (shape_of(x)[dim], start, end, step)) and axes[dim] < 0, "some of the rows")
    array, at = r.read(x, (*axes[:dim], CHANNEL, *axes[dim + 1 :])), place(axes, dim)
    if axes[dim] == UNIT:
        return array.map(lambda a: a.take(start, at))
    return array.map(lambda a: a[(slice(None),) * at + (slice(start, end, step),)])


@_reads("cat")
def _cat(r: Reader, v: Value, axes: Axes) -> Array:
    xs, dim = v.args[0], v.args[1] % len(axes)
    _require(axes[dim] == CHANNEL, "rows side by side")
    pieces = []
    for x in xs:
        _require(len(x.meta.shape) == len(axes), "nothing side by side")
        own = (*axes[:dim], UNIT if is_one(shape_of(x)[dim]) else CHANNEL, *axes[dim + 1 :])
        pieces.append(spread(r.read(x, own), own, axes))
    sizes = r.channels(v, axes)
    at = place(axes, dim)
    pieces = [p.expand((*sizes[:at], p.shape[at], *sizes[at + 1 :], p.shape[-1])) for p in pieces]
    return side_by_side(pieces, at)


@_reads("flip")
def _flip(r: Reader, v: Value, axes: Axes) -> Array:
    x, dims = v.args
    dims = [d % len(axes) for d in dims]
    _require(all(axes[d] < 0 for d in dims), "rows the other way round")
    flipped = [place(axes, d) for d in dims if axes[d] == CHANNEL]
    return r.read(x, axes).map(lambda a: np.flip(a, flipped))


@_reads("roll")
def _roll(r: Reader, v: Value, axes: Axes) -> Array:
    x, shifts, dims = v.args
    dims = [d % len(axes) for d in dims]
    _require(bool(dims) and all(axes[d] == CHANNEL for d in dims) and all(isinstance(s, int) for s in shifts), "rolled rows")
    return r.read(x, axes).map(lambda a: np.roll(a, shifts, [place(axes, d) for d in dims]))


# ---------------------------------------------------------------- numbers


@_reads("cast")
def _cast(r: Reader, v: Value, axes: Axes) -> Array:
    _require(v.meta.dtype.is_complex == v.args[0].meta.dtype.is_complex, "one part of complex numbers")
    array = r.read(v.args[0], axes)
    if not narrows(v):
        return array
    if v in r.way:  # the operator rounds once, to the dtype of the result
        _require(v.meta.dtype == r.root.meta.dtype, "rounded on the way")
        return array
    return rounded(array, str(v.meta.dtype).removeprefix("torch."))


@_reads("neg")
def _neg(r: Reader, v: Value, axes: Axes) -> Array:
    return scaled(r.read(v.args[0], axes), -1)


@_reads("add", "sub")
def _add(r: Reader, v: Value, axes: Axes) -> Array:
    a, b, factor = (*v.args, 1)[:3]
    return plus(r.operand(a, axes), scaled(r.operand(b, axes), -factor if v.op == "sub" else factor))


@_reads("mul", "div")
def _mul(r: Reader, v: Value, axes: Axes) -> Array:
    a, b = v.args
    if isinstance(b, Value):
        return times(r.operand(a, axes), r.operand(b, axes))
    return scaled(r.read(a, axes), b if v.op == "mul" else 1 / b)


@_reads("addcmul")
def _addcmul(r: Reader, v: Value, axes: Axes) -> Array:
    x, a, b, factor = v.args
    return plus(r.operand(x, axes), scaled(times(r.operand(a, axes), r.operand(b, axes)), factor))


@_reads("sum")
def _sum(r: Reader, v: Value, axes: Axes) -> Array:
    _require(len(v.args) == 3 and isinstance(v.args[1], tuple), "a sum over everything")
    x, dims, keep = v.args
    own = list(axes)
    for d in dims:
        own[d : d + keep] = [CHANNEL]
        _require(isinstance(shape_of(x)[d], int) and 1 < shape_of(x)[d] <= SMALL, "a sum over many")
    array = r.operand(x, tuple(own))
    for d in reversed(dims):
        array = total(array, place(tuple(own), d))
    return array


@_reads("matmul", "matmul_transposed")
def _matmul(r: Reader, v: Value, axes: Axes) -> Array:
    (a, b), (*batch, m, n) = v.args, axes
    _require(isinstance(shape_of(a)[-1], int) and 1 < shape_of(a)[-1] <= SMALL, "a product that sums over many")
    together = (*batch, m, n, CHANNEL)
    left = spread(r.operand(a, (*batch, m, CHANNEL)), (*batch, m, UNIT, CHANNEL), together)
    if v.op == "matmul_transposed":
        right = r.operand(b, (*batch, n, CHANNEL))
    else:
        own = (*batch, CHANNEL, n)
        right = r.operand(b, own).map(lambda a: np.moveaxis(a, place(own, len(batch)), -2))
    return total(times(left, spread(right, (*batch, UNIT, n, CHANNEL), together)), -2)


# ---------------------------------------------------------------- complex numbers


@_reads("view_as_complex")
def _as_complex(r: Reader, v: Value, axes: Axes) -> Array:
    return r.read(v.args[0], (*axes, CHANNEL)).map(lambda a: a[..., 0])


@_reads("view_as_real")
def _as_real(r: Reader, v: Value, axes: Axes) -> Array:
    _require(axes[-1] == CHANNEL, "rows of parts")
    return r.read(v.args[0], axes[:-1]).map(lambda a: a[..., None])


@_reads("complex")
def _complex(r: Reader, v: Value, axes: Axes) -> Array:
    sizes = (*r.channels(v, axes), 1)
    return side_by_side([r.operand(a, axes).expand(sizes) for a in v.args], -1)


@_reads("_conj", "conj_physical")
def _conj(r: Reader, v: Value, axes: Axes) -> Array:
    array = r.read(v.args[0], axes)
    return side_by_side((array.part(0), scaled(array.part(1), -1)), -1)


@_reads("real", "imag")
def _part(r: Reader, v: Value, axes: Axes) -> Array:
    array = r.read(v.args[0], axes)
    _require(array.shape[-1] == 2, "a part of a real number")
    return array.part(0 if v.op == "real" else 1)
