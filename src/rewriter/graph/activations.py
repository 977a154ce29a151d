"""Activations that are written out: GELU by erf, and by tanh."""

from __future__ import annotations

import math
from typing import Any

import torch

from sloth.rewriter.graph.canonical import Call, Normal, rule
from sloth.rewriter.graph.value import Value

Polynomial = dict[int, float]  # coefficients by power
ERF, TANH = {1: math.sqrt(0.5)}, {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}
MANY = 6  # factors of a product


@rule("mul")
def written_gelu(n: Normal, c: Call, a, b):
    """½ x (1 + erf(x / √2)) = gelu(x);  ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))) = gelu(x, "tanh"), in any order."""
    number, factors = _factors(n, (a, b))
    for e in factors:
        shift, slope, inner = _affine(n, e)
        if inner is None or not _close(shift * number, 0.5, c) or not _close(slope * number, 0.5, c):
            continue
        others = [f for f in factors if f is not e]
        known = ERF if inner.op == "erf" else TANH
        x = next((x for x in others if _is(_polynomial(n, inner.args[0], x), known, c)), None)
        if x is None or len(factors) > 3 or x.meta.dtype != c.meta.dtype or len(others) != len(factors) - 1:
            return None
        gelu = n.add("gelu", (x, "none" if inner.op == "erf" else "tanh"), c.meta._replace(shape=x.meta.shape))
        others.remove(x)
        return n.call("mul", (gelu, *others), c.metas) if others else gelu
    return None


@rule("div", "reciprocal")
def written_sigmoid(n: Normal, c: Call, *args):
    """1 / (1 + exp(−x)) = sigmoid(x);  a / (1 + exp(−x)) = a · sigmoid(x)."""
    e = args[-1] if len(args) < 3 else None
    if not isinstance(e, Value) or not n.near(e, "add") or not (_number(e.args[1]) and e.args[1] == 1):
        return None
    exp = e.args[0]
    if not n.near(exp, "exp") or not n.near(exp.args[0], "neg") or e.meta.dtype != c.meta.dtype:
        return None
    sigmoid = n.add("sigmoid", exp.args[0].args, e.meta)
    return sigmoid if c.op == "reciprocal" else n.call("mul", (args[0], sigmoid), c.metas)


@rule("glu")
def gated_halves(n: Normal, c: Call, x: Value, dim=-1):
    """glu(x) = first half · sigmoid(second half)."""
    up, gate = n.call("chunk", (x, 2, dim), (c.meta, c.meta))
    return n.call("mul", (up, n.add("sigmoid", (gate,), c.meta)), c.metas)


def _factors(n: Normal, parts: tuple) -> tuple[float, list[Value]]:
    """The number and the tensors that a product is made of."""
    number, found, todo = 1.0, [], [*parts]
    while todo:
        v = todo.pop()
        if isinstance(v, int | float):
            number *= v
        elif isinstance(v, Value) and n.near(v, "mul") and len(found) + len(todo) < MANY:
            todo += v.args
        elif isinstance(v, Value) and n.near(v, "div") and len(v.args) == 2 and _number(v.args[1]) and v.args[1]:
            number, todo = number / v.args[1], [*todo, v.args[0]]
        else:
            found.append(v)
    return number, found


def _affine(n: Normal, v: Any) -> tuple[float, float, Value | None]:
    """shift, slope and t, where v = shift + slope · t, t = erf(…) or tanh(…)."""
    if not isinstance(v, Value) or not n.near(v, "add") or not _number(v.args[1]):
        return 0.0, 0.0, None
    slope, factors = _factors(n, v.args[:1])
    inner = factors[0] if len(factors) == 1 else None
    if not isinstance(inner, Value) or not (n.near(inner, "erf") or n.near(inner, "tanh")):
        return 0.0, 0.0, None
    return float(v.args[1]), slope, inner


def _polynomial(n: Normal, v: Any, x: Value) -> Polynomial | None:
    """v, as a polynomial in x."""
    if v is x:
        return {1: 1.0}
    if _number(v):
        return {0: float(v)}
    if not isinstance(v, Value) or not n.near(v, v.op) or v.op not in ("add", "mul", "div", "pow") or len(v.args) != 2:
        return None
    if v.op == "pow":
        return {int(v.args[1]): 1.0} if v.args[0] is x and v.args[1] in (2, 3) else None
    a, b = (_polynomial(n, part, x) for part in v.args)
    if a is None or b is None:
        return None
    found: Polynomial = {}
    if v.op == "add":
        for p, k in (*a.items(), *b.items()):
            found[p] = found.get(p, 0.0) + k
    elif v.op == "mul":
        for p, k in a.items():
            for q, m in b.items():
                found[p + q] = found.get(p + q, 0.0) + k * m
    elif list(b) == [0] and b[0]:
        found = {p: k / b[0] for p, k in a.items()}
    return found if found and max(found) < 4 else None


def _is(found: Polynomial | None, known: Polynomial, c: Call) -> bool:
    return found is not None and found.keys() == known.keys() and all(_close(found[p], known[p], c) for p in known)


def _close(a: float, b: float, c: Call) -> bool:
    """The same number, as far as the dtype tells."""
    return abs(a - b) <= (1e-12 if c.meta.dtype == torch.float64 else 1e-8) * abs(b)


def _number(a: Any) -> bool:
    return isinstance(a, int | float) and not isinstance(a, bool)
