"""What an attention mask means, proven from how it is computed: each entry as an expression in its own indices.

A mask that transformers builds under a compiler is arithmetic on `arange`s: comparisons of positions, broadcast to each other.
So every value of its subgraph is followed as a sympy expression of the indices d0, d1, … of its dimensions; where data enters, or
an operation is not known here, there is no expression and nothing is proven. Sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from sloth.rewriter.ir import Value, same_literal

D = sympy.symbols("d0:8", integer=True, nonnegative=True)
RULES: dict[str, Callable[..., Any]] = {}
MANY = 200  # operations in a mask's subgraph, beyond which it is not looked at


def meaning(mask: Value) -> str | None:
    """ "causal" (position j is seen from i where j ≤ i), "full" (everything is seen), or None where neither is proven."""
    rank = len(mask.meta.shape)
    expression = _Reader().read(mask) if mask.meta.dtype == torch.bool and 2 <= rank <= len(D) else None
    if expression is None:
        return None
    if expression == sympy.true:
        return "full"
    i, j = D[rank - 2], D[rank - 1]
    rest = [part for part in sympy.And.make_args(expression) if not _same_relation(part, sympy.Le(j, i))]
    if len(rest) == len(sympy.And.make_args(expression)):
        return None
    return "causal" if all(_always(part, mask, i, j) for part in rest) else None


def _same_relation(a: Any, b: Any) -> bool:
    """Two relations of integers, as one difference: x ≤ y, x < y + 1, y ≥ x."""
    return isinstance(a, sympy.core.relational.Relational) and _difference(a) is not None and _difference(a) == _difference(b)


def _difference(r: Any) -> Any:
    """e, where the relation says e ≥ 0."""
    forms = {
        sympy.Le: lambda: r.rhs - r.lhs, sympy.Lt: lambda: r.rhs - r.lhs - 1,
        sympy.Ge: lambda: r.lhs - r.rhs, sympy.Gt: lambda: r.lhs - r.rhs - 1,
    }  # fmt: skip
    return sympy.expand(forms[type(r)]()) if type(r) in forms else None


def _always(relation: Any, mask: Value, i: Any, j: Any) -> bool:
    """Does it hold in the whole mask (a window wider than the sequence)? Linear, so its least value is at a corner."""
    rows, columns = mask.meta.shape[-2:]
    e = _difference(relation) if isinstance(relation, sympy.core.relational.Relational) else None
    if e is None or not isinstance(rows, int) or not isinstance(columns, int) or e.free_symbols - {i, j}:
        return False
    if sympy.Poly(e, i, j).total_degree() > 1:
        return False
    return all(e.subs({i: a, j: b}) >= 0 for a in (0, rows - 1) for b in (0, columns - 1))


def follow(*ops: str) -> Callable[[Callable], Callable]:
    def enter(fn: Callable) -> Callable:
        RULES.update(dict.fromkeys(ops, fn))
        return fn

    return enter


class _Reader:
    """Expressions of values, each computed once."""

    def __init__(self) -> None:
        self.known: dict[Value, Any] = {}

    def read(self, v: Value) -> Any:
        if v.op == "input" and v.outer is not None:  # in a checkpoint
            return self.read(v.outer)
        if v not in self.known:
            self.known[v] = None
            if v.op in RULES and not v.pinned and v.meta is not None and len(self.known) < MANY:
                e = RULES[v.op](self, v, *v.args)
                alone = {D[k]: sympy.Integer(0) for k, n in enumerate(v.meta.shape) if _is_one(n)}  # the only index there is
                self.known[v] = None if e is None else e.xreplace(alone)
        return self.known[v]

    def aligned(self, x: Any, v: Value) -> Any:
        """The expression of an operand in the indices of the result it is broadcast to."""
        if not isinstance(x, Value):
            return sympy.sympify(x) if isinstance(x, bool | int) else None
        e, shift = self.read(x), len(v.meta.shape) - len(x.meta.shape)
        if e is None:
            return None
        one = {D[k]: sympy.Integer(0) if _is_one(n) else D[k + shift] for k, n in enumerate(x.meta.shape)}
        return e.xreplace(one)


def _is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1


@follow("arange")
def _arange(r: _Reader, v: Value, *args: Any) -> Any:
    numbers = args[:-4]  # behind them dtype, layout, device, pin_memory
    start, step = (0, 1) if len(numbers) == 1 else (numbers[0], 1 if len(numbers) == 2 else numbers[2])
    return start + step * D[0] if isinstance(start, int) and isinstance(step, int) else None


@follow("new_ones", "ones", "ones_like", "new_zeros", "zeros", "zeros_like")
def _constant(r: _Reader, v: Value, *_: Any) -> Any:
    one = v.op in ("new_ones", "ones", "ones_like")
    return sympy.sympify(one if v.meta.dtype == torch.bool else int(one))


@follow("cast")
def _cast(r: _Reader, v: Value, x: Value, dtype: torch.dtype) -> Any:
    whole = lambda t: not t.is_floating_point and not t.is_complex and t != torch.bool  # noqa: E731
    return r.read(x) if whole(dtype) and whole(x.meta.dtype) else None


@follow("view")
def _view(r: _Reader, v: Value, x: Value, shape: tuple) -> Any:
    """Dimensions of size 1 come and go."""
    e = r.read(x)
    old = [k for k, n in enumerate(x.meta.shape) if not _is_one(n)]
    new = [k for k, n in enumerate(v.meta.shape) if not _is_one(n)]
    if e is None or len(old) != len(new) or len(v.meta.shape) > len(D):
        return None
    if not all(same_literal(x.meta.shape[a], v.meta.shape[b]) for a, b in zip(old, new, strict=True)):
        return None
    moved = {D[a]: D[b] for a, b in zip(old, new, strict=True)}
    return e.xreplace({D[k]: moved.get(D[k], sympy.Integer(0)) for k in range(len(x.meta.shape))})


@follow("expand")
def _expand(r: _Reader, v: Value, x: Value, shape: tuple) -> Any:
    return r.aligned(x, v)


@follow("slice")
def _slice(r: _Reader, v: Value, x: Value, dim: int, start: Any, end: Any, step: Any) -> Any:
    e = r.read(x)
    return (
        e.xreplace({D[dim]: start + step * D[dim]})
        if e is not None and isinstance(start, int) and isinstance(step, int)
        else None
    )


@follow("add", "sub", "mul")
def _arithmetic(r: _Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or v.meta.dtype.is_floating_point:
        return None
    return sympy.expand({"add": x + y, "sub": x - y, "mul": x * y}[v.op])


@follow("eq", "ne", "le", "lt", "ge", "gt")
def _relation(r: _Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or _is_truth(a) or _is_truth(b):
        return None
    kind = {"eq": sympy.Eq, "ne": sympy.Ne, "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt}[v.op]
    return kind(x, y)


@follow("__and__", "bitwise_and", "logical_and", "__or__", "bitwise_or", "logical_or")
def _junction(r: _Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or not (_is_truth(a) and _is_truth(b)):
        return None
    return (sympy.And if "and" in v.op else sympy.Or)(x, y)


@follow("bitwise_not", "logical_not")
def _negation(r: _Reader, v: Value, a: Any) -> Any:
    x = r.aligned(a, v)
    return sympy.Not(x) if x is not None and _is_truth(a) else None


def _is_truth(x: Any) -> bool:
    return x.meta.dtype == torch.bool if isinstance(x, Value) else isinstance(x, bool)


@follow("diff")
def _diff(r: _Reader, v: Value, x: Value, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    """x[k] − x[k − 1], and x[0] − prepend in front: known where both are one constant."""
    e, first = r.read(x), r.read(prepend) if isinstance(prepend, Value) else None
    axis = D[dim % len(x.meta.shape)]
    if e is None or first is None or n != 1 or append is not None or not _is_one(prepend.meta.shape[dim]):
        return None
    rest = sympy.expand(e - e.xreplace({axis: axis - 1}))
    return rest if rest == sympy.expand(e.xreplace({axis: sympy.Integer(0)}) - first.xreplace({axis: sympy.Integer(0)})) else None


@follow("cumsum")
def _cumsum(r: _Reader, v: Value, x: Value, dim: int, dtype: Any = None) -> Any:
    """Of zeros."""
    e = r.read(x)
    return sympy.Integer(0) if e in (sympy.false, sympy.Integer(0)) and not v.meta.dtype.is_floating_point else None


@follow("index")
def _index(r: _Reader, v: Value, x: Value, indices: tuple) -> Any:
    """x[i, j, …] with an index for each dimension, each a position or a number counted from the front."""
    e = r.read(x)
    if e is None or len(indices) != len(x.meta.shape) or not all(isinstance(i, Value) for i in indices):
        return None
    at = [r.aligned(i, v) for i in indices]
    if any(map(_is_truth, indices)) or any(a is None or not (a in D or a.is_Integer and a >= 0) for a in at):
        return None
    return e.xreplace(dict(zip(D, at, strict=False)))
