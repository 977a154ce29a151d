"""Masks as a choice of few numbers: which number stands where.

A mask that is added to scores is made of truths, numbers and what is done to both: `where`, `masked_fill`, triangles of
constants, `1 − m` times a number, sums, casts, views. It is read as levels, {number: where it stands}, each operation for each
pair of levels. Where a level stands is a tree of truths over Values of the graph:

    True, False, a Value of dtype bool, ("not", tree), ("and", tree, tree), ("or", tree, tree)

and each Value broadcasts to the mask. A truth that is computed of levels (`m == 0`) is read through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sloth.patterns.attention.index_expr import is_truth, source
from sloth.rewriter.graph.normal_form import Normal
from sloth.rewriter.graph.value import Meta, Value
from sloth.rewriter.plan.materialize import LOWERINGS

Tree = Any
Levels = dict[float | Value, Tree]  # a Value: a bias, that is no level itself
MANY = 12  # levels, beyond which nothing is read
VIEWS = ("view", "expand", "permute", "slice")
NOT, AND, OR = ("bitwise_not", "logical_not"), ("__and__", "bitwise_and", "logical_and"), ("__or__", "bitwise_or", "logical_or")
ZEROS, ONES = ("zeros", "zeros_like", "new_zeros"), ("ones", "ones_like", "new_ones")
FULL = {"full": 1, "new_full": 2, "full_like": 1, "scalar_tensor": 0, "fill": 1}  # which argument is the number
BINARY: dict[str, Callable[[float, float], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b if b else math.nan,
    "maximum": max, "minimum": min, "max": max, "min": min, "clamp_min": max, "clamp_max": min,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
UNARY = ("neg", "log", "exp", "abs", "sqrt", "sign", "relu")
DEEP = 40  # operations below each other
LOWERINGS.update({op: getattr(torch, op) for op in (*COMPARISONS, "bitwise_not", "bitwise_and", "bitwise_or")})


# ---------------------------------------------------------------- trees


def negated(t: Tree) -> Tree:
    if isinstance(t, bool):
        return not t
    return t[1] if isinstance(t, tuple) and t[0] == "not" else ("not", t)


def both(a: Tree, b: Tree) -> Tree:
    if a is True or a == b:
        return b
    if b is True:
        return a
    return False if a is False or b is False or a == negated(b) else ("and", a, b)


def either(a: Tree, b: Tree) -> Tree:
    return negated(both(negated(a), negated(b))) if isinstance(a, bool) or isinstance(b, bool) or _alike(a, b) else ("or", a, b)


def _alike(a: Tree, b: Tree) -> bool:
    return a == b or a == negated(b)


def mapped(t: Tree, fn: Callable[[Value], Tree]) -> Tree:
    """The tree with other truths in the places of its Values."""
    if isinstance(t, bool):
        return t
    if isinstance(t, Value):
        return fn(t)
    parts = [mapped(x, fn) for x in t[1:]]
    return {"not": negated, "and": both, "or": either}[t[0]](*parts)


def as_value(t: Tree, like: Value) -> Value:
    """The tree as one Value in the graph of `like`, that broadcasts to it."""
    n = normal_at(like)

    def made(t: Tree) -> Value:
        if isinstance(t, Value):
            return t
        if isinstance(t, bool):
            return _whole(n, t, like)
        parts = tuple(map(made, t[1:]))
        name = {"not": "bitwise_not", "and": "bitwise_and", "or": "bitwise_or"}[t[0]]
        return n.call(name, parts, (_broadcast([p.meta for p in parts]),))

    found = made(t)
    return found if len(found.meta.shape) > 1 else n.expand(found, like.meta.shape)


def normal_at(v: Value) -> Normal:
    """Makes values where `v` is."""
    n = Normal(v.graph)
    n.region, n.origin = v.region, v.origin
    return n


def _whole(n: Normal, truth: bool, like: Value) -> Value:
    meta = like.meta._replace(dtype=torch.bool, requires_grad=False)
    return n.add("ones" if truth else "zeros", (meta.shape, torch.bool, None, meta.device, None), meta)


def _broadcast(metas: list[Meta]) -> Meta:
    rank = max(len(m.shape) for m in metas)
    shapes = [(1,) * (rank - len(m.shape)) + tuple(m.shape) for m in metas]
    sizes = [next((s for s in dim if not (isinstance(s, int) and s == 1)), 1) for dim in zip(*shapes, strict=True)]
    return metas[0]._replace(shape=tuple(sizes), requires_grad=False)


# ---------------------------------------------------------------- reading


def truth(v: Value) -> Tree:
    """Where `v`, of dtype bool, is true."""
    found = _known(source(v), "truth", _truth)
    return v if found is None else found


def _known(v: Value, name: str, of: Callable[[Value], Any]) -> Any:
    """What is read of `v`, once. Nothing of what somebody writes."""
    global _depth
    if name not in v.analyses:
        _depth += 1
        try:
            unread = v.mutated_storage or v.meta is None or _depth > DEEP
            v.analyses[name] = None if unread else of(v)
        finally:
            _depth -= 1
    return v.analyses[name]


_depth = 0


def _truth(v: Value) -> Tree | None:
    a, b = (*v.args, None, None)[:2]
    if v.op in NOT:
        return negated(truth(a)) if is_truth(a) else _where(v, levels(a), lambda x: x == 0)
    if v.op in (*AND, *OR, "mul", "add", "maximum", "minimum"):
        if not (is_truth(a) and is_truth(b)):
            return None
        join = both if v.op in (*AND, "mul", "minimum") else either
        return join(*(x if isinstance(x, bool) else truth(x) for x in (a, b)))
    if v.op == "cast":
        return _where(v, levels(a), lambda x: x != 0)
    if v.op == "where":
        t, (x, y) = truth(a), (x if isinstance(x, bool) else truth(x) if is_truth(x) else None for x in v.args[1:])
        return None if x is None or y is None else either(both(t, x), both(negated(t), y))
    if v.op in VIEWS:
        return _viewed(v, truth(a))
    if v.op in ("triu", "tril"):
        inner, whole = truth(a), _triangle(v)
        return None if inner is True or isinstance(inner, Value) else both(whole, inner)
    if v.op in COMPARISONS or v.op in ZEROS or v.op in ONES or v.op in FULL:
        return _where(v, _levels(v), lambda x: x != 0)
    return None


def _where(v: Value, known: Levels | None, holds: Callable[[float], bool]) -> Tree | None:
    if known is None or any(isinstance(x, Value) for x in known):
        return None
    found: Tree = False
    for number, t in known.items():
        found = either(found, t) if holds(number) else found
    return found


def _viewed(v: Value, t: Tree) -> Tree:
    """The same view of a tree of the Value that `v` is a view of."""
    n, x = normal_at(v), v.args[0]
    if t is x or t is source(x):
        return v

    def view(leaf: Value) -> Value:
        whole = n.expand(leaf, x.meta.shape)
        if v.op == "view":
            return n.view(whole, v.args[1])
        return n.slice(whole, *v.args[1:]) if v.op == "slice" else getattr(n, v.op)(whole, v.args[1])

    return mapped(t, view)


def _triangle(v: Value) -> Value:
    """Where triu, tril keep what they are of."""
    n, shape = normal_at(v), v.meta.shape[-2:]
    meta = v.meta._replace(shape=shape, dtype=torch.bool, requires_grad=False)
    return n.add(v.op, (n.add("ones", (shape, torch.bool, None, meta.device, None), meta), *v.args[1:]), meta)


def levels(v: Any) -> Levels | None:
    """Which number stands where in `v`. None: it is not known to be a choice of few."""
    if isinstance(v, bool | int | float):
        return {float(v): True}
    if not isinstance(v, Value):
        return None
    found = _known(source(v), "levels", _levels)
    return found if found is not None and len(found) <= MANY else None


def _levels(v: Value) -> Levels | None:
    if v.op in ZEROS or v.op in ONES:
        return {float(v.op in ONES): True}
    if v.op in FULL:
        return _mapped(levels(v.args[FULL[v.op]]), _rounded(v.meta.dtype))
    if v.op == "cast":
        of = {1.0: (t := truth(v.args[0])), 0.0: negated(t)} if is_truth(v.args[0]) else levels(v.args[0])
        return _mapped(of, _rounded(v.meta.dtype))
    if v.op in VIEWS:
        of = levels(v.args[0])
        return of if of is None or any(isinstance(x, Value) for x in of) else {x: _viewed(v, t) for x, t in of.items()}
    if v.op == "where" and v.meta.dtype.is_floating_point:
        t, sides = truth(v.args[0]), [_or_bias(x) for x in v.args[1:]]
        return _joined([(x, both(w, s)) for side, w in zip(sides, (t, negated(t)), strict=True) for x, s in side.items()])
    if v.op in ("triu", "tril"):
        of, keeps = levels(v.args[0]), _triangle(v)
        return of and _joined([*((x, both(keeps, t)) for x, t in of.items()), (0.0, negated(keeps))])
    if v.op in UNARY and (of := levels(v.args[0])) is not None:
        fn = getattr(torch, v.op)
        return _mapped(of, lambda x: fn(torch.tensor(x, dtype=v.meta.dtype)).item())
    if v.op in BINARY and len(v.args) == 2:
        return _of_pairs(v, *v.args[:2])
    return None


def _or_bias(x: Any) -> Levels:
    return found if (found := levels(x)) is not None else {x: True}


def _of_pairs(v: Value, a: Any, b: Any) -> Levels | None:
    x = levels(a)
    y = levels(b) if x is not None or v.op == "add" else None
    if v.op == "add" and v.meta.dtype.is_floating_point and (x is None) != (y is None):  # a bias, and a mask
        x, y = _or_bias(a), _or_bias(b)
    if x is None or y is None or len(x) * len(y) > MANY * MANY:
        return None
    pairs = []
    for p, s in x.items():
        for q, t in y.items():
            if (where := both(s, t)) is False:
                continue
            if (found := _result(v, p, q)) is None:
                return None
            pairs.append((found, where))
    return _joined(pairs)


def _result(v: Value, p: float | Value, q: float | Value) -> float | Value | None:
    """What becomes of two levels. Beside a bias, 0 is nothing, and the bias nothing beside what absorbs any score."""
    if isinstance(p, Value) or isinstance(q, Value):
        bias, number = (p, q) if isinstance(p, Value) else (q, p)
        if isinstance(number, Value) or v.op != "add":
            return None
        return bias if number == 0 else number if number <= torch.finfo(torch.bfloat16).min else None
    found = BINARY[v.op](p, q)
    return float(found) if v.op in COMPARISONS else _rounded(v.meta.dtype)(float(found))


def _rounded(dtype: torch.dtype) -> Callable[[float], float]:
    def rounded(x: float) -> float:
        if not dtype.is_floating_point and dtype != torch.bool and (x != x or abs(x) > 2**31 or x % 1):
            return math.nan
        return float(torch.tensor(x, dtype=torch.float64).to(dtype).item())

    return rounded


def _mapped(of: Levels | None, fn: Callable[[float], float]) -> Levels | None:
    if of is None or any(isinstance(x, Value) for x in of):
        return None
    return _joined([(fn(x), t) for x, t in of.items()])


def _joined(pairs: list[tuple[Any, Tree]]) -> Levels:
    found: Levels = {}
    for x, t in pairs:
        if t is not False:
            found[x] = either(found[x], t) if x in found else t
    return found


def stopped(v: Value) -> Value | None:
    """The operation at which reading stopped, where `levels` are not known: the first that is none that is read."""
    v, seen = source(v), set()
    while v not in seen:
        seen.add(v)
        unread = [source(x) for x in v.inputs if not is_truth(x) and levels(x) is None]
        if not unread or not (
            v.op in VIEWS or v.op in BINARY or v.op in UNARY or v.op in ("cast", "triu", "tril", "where", *FULL)
        ):
            return v
        v = unread[0]
    return v
