"""A few numbers of each row of lazy logits, computed some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sloth.kernels.linear.gemm import as_matrix
from sloth.lazy import rows as lazy_rows
from sloth.lazy.gradient import Contribution, gradient, kind
from sloth.lazy.rows import at_a_time, products_of_layers, stepped
from sloth.lazy.tensor import LazyLogits, materialize


class _ChunkedApply(torch.autograd.Function):
    """fn(logits of some rows [n, V], *beside of these rows) for all rows, one result or several."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, fn: Callable, *beside: Tensor) -> tuple:
        rows, found = x.rows, []
        operands = rows.head.operands(as_matrix(rows.hidden))
        for part in at_a_time(operands):
            one = fn(stepped(x.steps, rows.head.logits(products_of_layers(operands, part))), *(b[part] for b in beside))
            found.append(one if isinstance(one, tuple) else (one,))
        found = tuple(map(torch.cat, zip(*found, strict=True)))
        ctx.set_materialize_grads(False)
        ctx.part, ctx.like = Contribution(rows, x.steps, fn, beside), kind(x)
        ctx.mark_non_differentiable(*(t for t in found if not t.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        found = None
        if any(g is not None for g in grads):
            part = ctx.part._replace(grads=tuple(g if g is None else materialize(g).detach() for g in grads))
            found = gradient(part.rows, part.steps, ctx.like, [part])
        return found, None, *(None for _ in ctx.part.beside)


def at_once(x: LazyLogits) -> bool:
    """Are they so few that all of them are computed at once?"""
    return x.nbytes <= lazy_rows.CHUNK


def chunked_apply(x: LazyLogits, fn: Callable, *beside: Tensor) -> Any:
    """fn(logits of some rows [n, V], *beside of these rows) -> [n, …], or several such, for all rows."""
    x.rows.check()
    found = [t.view((*x.shape[:-1], *t.shape[1:])) for t in _ChunkedApply.apply(x, fn, *beside)]
    return found[0] if len(found) == 1 else tuple(found)
