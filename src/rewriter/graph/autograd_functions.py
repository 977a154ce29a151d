"""Is the backward pass of an autograd function the derivative of what its forward pass computes?

Where it is proven to be, the shadow shows the function as what it computes, and patterns see through it. One kind is proven: a
linear layer y = x Wᵀ + b that gives gradients to x and b alone, however W is come by (quantised layers write theirs as such a
function, to compute W anew in the backward pass):

    dx = dy W      db = Σ dy over all but the last dimension      everything else: none
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sloth.rewriter.graph.value import Meta, Value, same_literal, uncast, values_in


def is_derivative(results: Sequence[Any], inputs: Sequence[Any], backward: Callable[..., Any], saved: Sequence[Any]) -> bool:
    """`results`, Values of a scratch shadow, were computed of `inputs`; `backward(*gradients, *saved)` gives a gradient for each
    input or None. Results behind the first one, None where nobody reads them, must have no gradient.
    """
    y = results[0]
    if not isinstance(y, Value) or y.op != "linear":
        return False
    x, weight, bias = (*y.args, None)[:3]
    dy = Value(-1, "input", ("dy",), y.meta, y.region)
    unused = [Value(-2 - i, "input", ("unused", i), getattr(r, "meta", None), y.region) for i, r in enumerate(results[1:])]
    gradients = backward(dy, *unused, *saved)
    if gradients is None or len(gradients) != len(inputs) or any(u in _leaves(gradients) for u in unused):
        return False
    for given, d in zip(inputs, gradients, strict=True):
        if not isinstance(given, Value) or not given.meta.requires_grad:
            continue
        if given is uncast(x):
            if not _is_product(d, dy, weight, given.meta):
                return False
        elif not (bias is not None and given is uncast(bias) and _is_row_sum(d, dy)):
            return False
    return not (_leaves((weight,)) & {i for i in inputs if isinstance(i, Value) and i.meta.requires_grad})


def _is_product(d: Any, dy: Value, weight: Value, meta: Meta) -> bool:
    """d = dy W, in the shape of the input."""
    if not isinstance(d, Value) or not same_literal(d.meta.shape, meta.shape):
        return False
    d = _plain(d)
    return d.op in ("matmul", "mm") and _plain(d.args[0]) is dy and _same(uncast(d.args[1]), uncast(weight))


def _same(a: Value, b: Value) -> bool:
    """One value, or the same operation but for the dtype it is computed in."""
    alike = lambda x, y: x is y or same_literal(x, y) or isinstance(x, torch.dtype) and isinstance(y, torch.dtype)  # noqa: E731
    return a is b or a.op == b.op and len(a.args) == len(b.args) and all(map(alike, a.args, b.args))


def _is_row_sum(d: Any, dy: Value) -> bool:
    """d = Σ dy over all dimensions but the last."""
    if not isinstance(d, Value) or _plain(d).op != "sum":
        return False
    rows, dims, *_ = _plain(d).args
    last = len(rows.meta.shape) - 1
    return _plain(rows) is dy and dims == tuple(range(last)) and same_literal(rows.meta.shape[last], dy.meta.shape[-1])


def _plain(v: Value) -> Value:
    """Without casts and row-major views."""
    while v.op in ("cast", "view"):
        v = v.args[0]
    return v


def _leaves(values: Any) -> set[Value]:
    """The values without operands that these are computed of."""
    seen, todo = set(), list(values_in(tuple(values)))
    while todo:
        v = todo.pop()
        if v not in seen:
            seen.add(v)
            todo += v.inputs
    return {v for v in seen if not any(True for _ in v.inputs)}
