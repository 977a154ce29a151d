"""Means and variances, and norms that leave their eps to torch."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from sloth.rewriter.graph.canonical import Call, Normal, rule
from sloth.rewriter.graph.value import Value, same_literal


@rule("mul", "div")
def mean_of_sum(n: Normal, c: Call, x, k, *rounding):
    """sum(x, dims) / n = sum(x, dims) · (1 / n) = mean(x, dims), of the n numbers that are summed."""
    if any(rounding) or not n.near(x, "sum") or len(x.args) != 3 or not x.meta.dtype.is_floating_point:
        return None
    of, dims, keepdim = x.args
    count = prod(of.meta.shape[d] for d in dims)
    if not isinstance(count, int) or not same_literal(k, count if c.op == "div" else 1 / count) or of.meta.dtype != c.meta.dtype:
        return None
    return n.add("mean", (of, dims, keepdim), c.meta)


@rule("var")
def variance(n: Normal, c: Call, x: Value, dims=None, correction=None, keepdim=False):
    """var(x, dims, unbiased=False) = mean((x − mean(x))²)."""
    return _variance(n, c, x, dims, keepdim) if correction in (False, 0) and correction is not None else None


@rule("std")
def deviation(n: Normal, c: Call, x: Value, dims=None, correction=None, keepdim=False):
    """std(x, …) = sqrt(var(x, …))."""
    found = variance(n, c, x, dims, correction, keepdim)
    return None if found is None else n.add("sqrt", (found,), c.meta)


@rule("var_mean")
def variance_and_mean(n: Normal, c: Call, x: Value, dims=None, correction=None, keepdim=False):
    """var_mean(x, …) = (var(x, …), mean(x, …))."""
    found = variance(n, c, x, dims, correction, keepdim)
    return None if found is None else (found, n.call("mean", (x, dims, keepdim, None), c.metas[1:]))


@rule("sub")
def variance_by_squares(n: Normal, c: Call, a, b, alpha=1):
    """mean(x²) − mean(x)² = mean((x − mean(x))²)."""
    if alpha != 1 or not (n.near(a, "mean") and n.near(b, "mul") and b.args[0] is b.args[1] and n.near(b.args[0], "mean")):
        return None
    square, (x, dims, keepdim) = a.args[0], b.args[0].args
    if not n.near(square, "mul") or square.args != (x, x) or a.args[1:] != (dims, keepdim):
        return None
    return _variance(n, c, x, dims, keepdim)


@rule("rms_norm")
def own_eps(n: Normal, c: Call, x: Value, shape, weight=None, eps=None):
    """rms_norm(x, …, eps=None) = rms_norm(x, …, eps of the dtype it is computed in): float32's, or float64's."""
    if eps is not None or not x.meta.dtype.is_floating_point:
        return None
    wide = torch.promote_types(x.meta.dtype, torch.float32)
    return n.add("rms_norm", (x, shape, weight, torch.finfo(wide).eps), c.meta)


def _variance(n: Normal, c: Call, x: Value, dims: Any, keepdim: bool) -> Value | None:
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not dims or x.meta.dtype != c.meta.dtype:
        return None
    rank = len(x.meta.shape)
    dims = tuple(sorted(d % rank for d in dims))
    over = tuple(1 if d in dims else s for d, s in enumerate(x.meta.shape))
    u = n.call("sub", (x, n.add("mean", (x, dims, True), x.meta._replace(shape=over))), (x.meta,))
    return n.add("mean", (n.call("mul", (u, u), (x.meta,)), dims, keepdim), c.meta)
