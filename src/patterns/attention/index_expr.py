"""Values of a graph as expressions of their indices: what masks are computed of, followed through the operations that make it.

d0, d1, … are the indices of a value's dimensions. `arange` is an index itself; what is not known here is an atom x(d0, …): data
there. Booleans are relations of such expressions. Indices are integers ≥ 0; sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from sloth.rewriter.graph.value import Value, same_literal

D = sympy.symbols("d0:8", integer=True, nonnegative=True)
RULES: dict[str, Callable[..., Any]] = {}
MANY = 200  # operations in a mask's subgraph, beyond which it is not looked at


def source(v: Value) -> Value:
    """What is passed into the body of a checkpoint."""
    while v.op == "input" and v.captured_from is not None:
        v = v.captured_from
    return v


def follow(*ops: str) -> Callable[[Callable], Callable]:
    def enter(fn: Callable) -> Callable:
        RULES.update(dict.fromkeys(ops, fn))
        return fn

    return enter


class Reader:
    """Expressions of values, each computed once. None for memory that somebody writes, and for floating-point numbers."""

    def __init__(self) -> None:
        self.known: dict[Value, Any] = {}
        self.data: dict[Any, Value] = {}  # what each atom stands for

    def read(self, v: Value) -> Any:
        v = source(v)
        if v not in self.known:
            self.known[v] = None
            if not v.mutated_storage and v.meta is not None and not (v.meta.dtype.is_floating_point or v.meta.dtype.is_complex):
                e = RULES[v.op](self, v, *v.args) if v.op in RULES and len(self.known) < MANY else None
                e = self.atom(v) if e is None else e
                alone = {D[k]: sympy.Integer(0) for k, n in enumerate(v.meta.shape) if is_one(n)}  # the only index there is
                self.known[v] = None if e is None else e.xreplace(alone)
        return self.known[v]

    def atom(self, v: Value) -> Any:
        rank = len(v.meta.shape)
        if rank > len(D):
            return None
        function = sympy.Function(f"x{len(self.data)}", integer=True)
        self.data[function] = v
        e = function(*D[:rank])
        return sympy.Ne(e, 0) if v.meta.dtype == torch.bool else e

    def aligned(self, x: Any, v: Value) -> Any:
        """The expression of an operand in the indices of the result it is broadcast to."""
        if not isinstance(x, Value):
            return sympy.sympify(x) if isinstance(x, bool | int) else None
        e, shift = self.read(x), len(v.meta.shape) - len(x.meta.shape)
        if e is None:
            return None
        one = {D[k]: sympy.Integer(0) if is_one(n) else D[k + shift] for k, n in enumerate(x.meta.shape)}
        return e.xreplace(one)


def is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1


@follow("arange")
def _arange(r: Reader, v: Value, *args: Any) -> Any:
    numbers = args[:-4]  # behind them dtype, layout, device, pin_memory
    start, step = (0, 1) if len(numbers) == 1 else (numbers[0], 1 if len(numbers) == 2 else numbers[2])
    return start + step * D[0] if isinstance(start, int) and isinstance(step, int) else None


@follow("new_ones", "ones", "ones_like", "new_zeros", "zeros", "zeros_like")
def _constant(r: Reader, v: Value, *_: Any) -> Any:
    one = v.op in ("new_ones", "ones", "ones_like")
    return sympy.sympify(one if v.meta.dtype == torch.bool else int(one))


@follow("full")
def _full(r: Reader, v: Value, size: Any, number: Any, *_: Any) -> Any:
    if not isinstance(number, bool | int):
        return None
    return sympy.sympify(bool(number) if v.meta.dtype == torch.bool else int(number))


@follow("cast")
def _cast(r: Reader, v: Value, x: Value, dtype: torch.dtype) -> Any:
    """Between integers, data only to wider ones."""
    e = r.read(x)
    if e is None or x.meta.dtype == torch.bool or not is_wide(v):
        return None
    narrower = dtype.itemsize < x.meta.dtype.itemsize
    return None if narrower and e.atoms(AppliedUndef) else e


@follow("view")
def _view(r: Reader, v: Value, x: Value, shape: tuple) -> Any:
    """Dimensions of size 1 come and go."""
    e = r.read(x)
    old = [k for k, n in enumerate(x.meta.shape) if not is_one(n)]
    new = [k for k, n in enumerate(v.meta.shape) if not is_one(n)]
    if e is None or len(old) != len(new) or len(v.meta.shape) > len(D):
        return None
    if not all(same_literal(x.meta.shape[a], v.meta.shape[b]) for a, b in zip(old, new, strict=True)):
        return None
    moved = {D[a]: D[b] for a, b in zip(old, new, strict=True)}
    return e.xreplace({D[k]: moved.get(D[k], sympy.Integer(0)) for k in range(len(x.meta.shape))})


@follow("expand")
def _expand(r: Reader, v: Value, x: Value, shape: tuple) -> Any:
    return r.aligned(x, v)


@follow("slice")
def _slice(r: Reader, v: Value, x: Value, dim: int, start: Any, end: Any, step: Any) -> Any:
    e = r.read(x)
    return (
        e.xreplace({D[dim]: start + step * D[dim]})
        if e is not None and isinstance(start, int) and isinstance(step, int)
        else None
    )


@follow("add", "sub", "mul")
def _arithmetic(r: Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or not is_wide(v):
        return None
    return sympy.expand({"add": x + y, "sub": x - y, "mul": x * y}[v.op])


@follow("floor_divide")
def _floor(r: Reader, v: Value, a: Any, b: Any) -> Any:
    x = r.aligned(a, v)
    if x is None or not isinstance(b, int) or b <= 0 or is_truth(a):
        return None
    size = v.meta.shape[D.index(x)] if x in D else None
    return sympy.Integer(0) if isinstance(size, int) and size <= b else sympy.floor(x / b)


@follow("abs")
def _absolute(r: Reader, v: Value, a: Value) -> Any:
    x = r.read(a)
    return None if x is None else sympy.Abs(x)


@follow("eq", "ne", "le", "lt", "ge", "gt")
def _relation(r: Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or is_truth(a) or is_truth(b):
        return None
    if isinstance(x, sympy.Abs) and v.op in ("le", "lt"):
        kind = {"le": sympy.Le, "lt": sympy.Lt}[v.op]
        return sympy.And(kind(x.args[0], y), kind(-x.args[0], y))
    kind = {"eq": sympy.Eq, "ne": sympy.Ne, "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt}[v.op]
    return kind(x, y)


@follow("__and__", "bitwise_and", "logical_and", "__or__", "bitwise_or", "logical_or")
def _junction(r: Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or not (is_truth(a) and is_truth(b)):
        return None
    return (sympy.And if "and" in v.op else sympy.Or)(x, y)


@follow("tril", "triu")
def _triangle(r: Reader, v: Value, x: Value, diagonal: int = 0) -> Any:
    """x up to a diagonal, false beyond."""
    e, rank = r.read(x), len(v.meta.shape)
    if e is None or not is_truth(x) or not isinstance(diagonal, int):
        return None
    kind = sympy.Le if v.op == "tril" else sympy.Ge
    return sympy.And(e, kind(D[rank - 1], D[rank - 2] + diagonal))


@follow("bitwise_not", "logical_not")
def _negation(r: Reader, v: Value, a: Any) -> Any:
    x = r.aligned(a, v)
    return sympy.Not(x) if x is not None and is_truth(a) else None


def is_truth(x: Any) -> bool:
    return x.meta.dtype == torch.bool if isinstance(x, Value) else isinstance(x, bool)


@follow("diff")
def _diff(r: Reader, v: Value, x: Value, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    """x[k] − x[k − 1], and x[0] − prepend in front: known where both are one constant."""
    e, first = r.read(x), r.read(prepend) if isinstance(prepend, Value) else None
    axis = D[dim % len(x.meta.shape)]
    if e is None or first is None or n != 1 or append is not None or not is_one(prepend.meta.shape[dim]):
        return None
    rest = sympy.expand(e - e.xreplace({axis: axis - 1}))
    return rest if rest == sympy.expand(e.xreplace({axis: sympy.Integer(0)}) - first.xreplace({axis: sympy.Integer(0)})) else None


@follow("cumsum")
def _cumsum(r: Reader, v: Value, x: Value, dim: int, dtype: Any = None) -> Any:
    """Of zeros."""
    e = r.read(x)
    return sympy.Integer(0) if e in (sympy.false, sympy.Integer(0)) and not v.meta.dtype.is_floating_point else None


@follow("index")
def _index(r: Reader, v: Value, x: Value, indices: tuple) -> Any:
    """x[i, j, …] with an index for each dimension, each a position or a number counted from the front."""
    e = r.read(x)
    if e is None or len(indices) != len(x.meta.shape) or not all(isinstance(i, Value) for i in indices):
        return None
    at = [r.aligned(i, v) for i in indices]
    if any(map(is_truth, indices)) or any(a is None or not (a in D or a.is_Integer and a >= 0) for a in at):
        return None
    return e.xreplace(dict(zip(D, at, strict=False)))


def is_wide(v: Value) -> bool:
    """Integers that do not wrap around."""
    return v.meta.dtype in (torch.int32, torch.int64)
