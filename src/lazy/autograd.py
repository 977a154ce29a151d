"""How lazy logits hang together in autograd: on hidden states and weights, and on each other.

make: makes the tensor, to which autograd then gives its past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sloth.lazy.gradient import LazyGradient, Via, gradient, gradients, kind, parts_of
from sloth.lazy.rows import LogitsSource, Step, products_of_layers
from sloth.lazy.snapshot import StaleLogits

Make = Callable[[], Tensor]


def _given(grad: Any) -> Tensor:
    """A gradient that somebody gives: lazy logits, maybe. A lazy gradient stays one."""
    return grad.read() if hasattr(grad, "read") else grad


class Logits(torch.autograd.Function):
    """Lazy logits, of hidden states and weights."""

    @staticmethod
    def forward(ctx: Any, rows: LogitsSource, make: Make, hidden: Tensor, *given: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.inputs = rows, (hidden, *given)
        ctx.versions = _versions(ctx.inputs)
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * (2 + len(ctx.inputs))
        need = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() and not isinstance(grad, LazyGradient):
            return None, None, *_differentiable(ctx, _given(grad), need)
        with torch.no_grad():
            found = gradients(ctx.rows, parts_of(_given(grad), ctx.rows, ()), need)
        hidden = ctx.inputs[0]
        found = [d if d is None else d.to(t.dtype) for d, t in zip(found, ctx.inputs, strict=True)]
        found[0] = found[0] if found[0] is None else found[0].view(hidden.shape)
        if torch.is_grad_enabled():
            anchor = torch.zeros((), requires_grad=True)
            found = [d if d is None else _Once.apply(d, anchor) for d in found]
        return None, None, *found


def _differentiable(ctx: Any, grad: Tensor, need: Sequence[bool]) -> list[Tensor | None]:
    """The gradients, which somebody wants the gradients of."""
    ctx.rows.check()
    if ctx.versions != _versions(ctx.inputs):
        raise StaleLogits("sloth: the weights of the head (or hidden states) have changed since these logits were given out")
    head = ctx.rows.head
    z = head.logits(products_of_layers(head.operands(ctx.inputs[0], head.layers)))
    wanted = [t for t, n in zip(ctx.inputs, need, strict=True) if n]
    found = iter(torch.autograd.grad(z, wanted, grad, create_graph=True))
    return [next(found) if n else None for n in need]


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [t._version for t in tensors if t is not None and not t.is_inference()]


class _Once(torch.autograd.Function):
    """What is computed some rows at a time has no second derivative: it is refused, not silently zero."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, anchor: Tensor) -> Tensor:
        return d.view_as(d)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        raise RuntimeError("sloth: losses of lazy logits can be differentiated once, not twice")


class Derived(torch.autograd.Function):
    """Lazy logits of others: the same parts make up the gradients of both."""

    @staticmethod
    def forward(ctx: Any, rows: LogitsSource, steps: tuple[Step, ...], make: Make, of: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.here, ctx.of = (rows, steps), (of.rows, of.steps, kind(of))
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        found = None if grad is None else gradient(*ctx.of, parts_of(_given(grad), *ctx.here))
        return None, None, None, found


class Merged(torch.autograd.Function):
    """Lazy logits of several others: a part of the one is a part of each of them, to which the rest are constants."""

    @staticmethod
    def forward(ctx: Any, rows: LogitsSource, steps: tuple[Step, ...], make: Make, fn: Callable, *operands: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.here, ctx.fn = (rows, steps), fn
        ctx.kinds = [kind(o) if isinstance(o, Tensor) else None for o in operands]
        ctx.operands = tuple(o.steps if isinstance(o, Tensor) else o for o in operands)
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * (4 + len(ctx.operands))
        (rows, steps), found = ctx.here, []
        parts = parts_of(_given(grad), rows, steps)
        for i, (like, before) in enumerate(zip(ctx.kinds, ctx.operands, strict=True)):
            via = Via(ctx.fn, ctx.operands, i)
            through = [p._replace(steps=(*before, via, *p.steps[len(steps) :]), made=None) for p in parts] if like else []
            found.append(gradient(rows, before, like, through) if like else None)
        return None, None, None, None, *found
