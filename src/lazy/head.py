"""The head that lazy logits are made of: linear layers that are computed again whenever somebody reads.

    logits = step(x_1 W_1ᵀ + b_1, x_2 W_2ᵀ + b_2, …)      hidden = [x_1, x_2, …], side by side in the last dimension

A model's head is one layer, one with an adapter two. Frozen weights may be kept in another form (4 bits): they are made for each
use. Weights that an optimizer has changed since would make other logits: reading is refused then.

In low precision each of several results would round its part of dW, and autograd their sum. So parts are handed to autograd in
fp32, as gradients of a stand-in (`Fp32GradGate`), and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sloth.kernels.common.launch import compute_dtype
from sloth.lazy.weights import RematerializedWeight

Step = Callable[[Tensor], Tensor]  # [..., V] -> [..., V], each row by itself


Layer = tuple[Tensor | RematerializedWeight, Tensor | None]  # weight, bias


@dataclass(eq=False)
class Head:
    """Shared by all that is made of its logits. autocast: (device type, dtype, enabled) that its layers stood in."""

    layers: Sequence[Layer]
    step: Callable[..., Tensor] | None  # of what each layer gives; None: the only one gives the logits
    autocast: tuple[str, torch.dtype, bool]

    def __post_init__(self) -> None:
        given = [t for layer in self.layers for t in layer]
        self.gates = [gate_of(t) for t in given]  # where gradients go
        kept = (t.kept if isinstance(t, RematerializedWeight) else (t,) for t in given if t is not None)
        self.tensors = [t for tensors in kept for t in tensors]
        self.versions = versions(*self.tensors)
        self.stale = False  # an optimizer has changed the weights since
        if any(t.requires_grad for t in self.tensors):
            _trained_heads.add(self)

    def dtype(self, weight: Tensor | RematerializedWeight) -> torch.dtype:
        """What its layer computes in: autocast knows no weights in other forms."""
        _, dtype, enabled = self.autocast
        return dtype if enabled and isinstance(weight, Tensor) and weight.dtype != torch.float64 else weight.dtype

    def operands(self, hidden: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Input, weight and bias of each layer, as autocast gives them to it."""
        inputs, found = hidden.split([weight.shape[1] for weight, _ in self.layers], -1), []
        for x, (weight, bias) in zip(inputs, self.layers, strict=True):
            dtype = self.dtype(weight)
            weight = weight.make(*weight.kept) if isinstance(weight, RematerializedWeight) else weight
            found.append((x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)))
        return found

    def logits(self, products: Sequence[Tensor], steps: Sequence[Step] = ()) -> Tensor:
        """Of what the layers give."""
        z = products[0] if self.step is None else self.step(*products)
        return stepped(steps, z)

    def example(self, hidden: Tensor) -> Tensor:
        """No rows of logits."""
        like = lambda weight: hidden.new_empty(0, weight.shape[0], dtype=self.dtype(weight))  # noqa: E731
        return self.logits([like(weight) for weight, _ in self.layers])

    def check(self, hidden: Tensor, version: tuple[int, ...]) -> None:
        """Raise where the tensors that the logits are made of are not what they were."""
        gone = any(not t.untyped_storage().size() for t in self.tensors)
        if self.stale or gone or (versions(*self.tensors), versions(hidden)) != (self.versions, version):
            raise RuntimeError(
                "sloth: the weights of the head (or hidden states) have changed since these logits were given out, and nothing "
                "had read them before. Read what you want of `outputs.logits` before the optimizer's step, or keep real logits "
                'with torch.compile(…, backend="sloth", options={"sloth.disable": "head,linear_cross_entropy"}).'
            )


def stepped(steps: Sequence[Step], z: Tensor) -> Tensor:
    for step in steps:
        z = step(z)
    return z


def versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if not t.is_inference())


_trained_heads: WeakSet[Head] = WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused optimizers do not count up the versions of what they write."""
    if _trained_heads:
        written = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for head in list(_trained_heads):
            head.stale = head.stale or any(id(t) in written for t in head.tensors)


register_optimizer_step_post_hook(_after_step)


class Fp32GradGate(torch.autograd.Function):
    """A stand-in for a tensor in low precision: no values, but gradients that are added up in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return x.new_zeros((), dtype=dtype).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad.to(ctx.dtype), None


def gate_of(x: Any) -> Tensor | None:
    """What the gradient of `x` is given to; None where it wants none."""
    if x is None or not x.requires_grad or not torch.is_grad_enabled():
        return None
    return x if compute_dtype(x) == x.dtype else Fp32GradGate.apply(x, compute_dtype(x))
