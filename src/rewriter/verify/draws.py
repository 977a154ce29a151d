"""Random tensors in place of real ones.

A draw has the mean of the real tensor and 1 to 8 times its spread: what is computed of numbers that are all alike is rounded
alike, and says little. Of a tensor that is constant (weights of a norm, a LoRA's B before the first step) the spread is that of
such weights. Kept as they are: integers
and booleans; numbers that mask (infinite ones, and huge ones); what only one side reads, since something was proven of it; and
where code of others takes part (quantised weights), all that needs no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from sloth.compat.dispatch import HigherOrderOperator, OpOverload
from sloth.rewriter.verify.cut import Cut
from sloth.rewriter.verify.run import OWN

GOLDEN = 0.6180339887  # its multiples fill an interval evenly
HUGE = 1e4  # numbers from which on an added tensor masks


def random_inputs(made: Cut, values: list[Any], seed: int) -> list[Any]:
    """One in place of each of these."""
    proven = any(isinstance(x, torch.Tensor) and not read for x, read in zip(values, made.read, strict=True))
    fixed = proven or any(_is_of_others(n) for n in made.original.graph.nodes)
    out = []
    for i, (x, read, grad) in enumerate(zip(values, made.read, made.grads, strict=True)):
        keep = not _is_float(x) or not read or fixed and not grad
        out.append(x if keep else _drawn(x, 1000 * seed + i))
    return out


def cotangents(results: tuple[Any, ...], seed: int) -> list[Any]:
    """A gradient for each result; None for what has none."""
    return [_normal(t, (1 << 20) + 1000 * seed + i).to(t.dtype) if _is_float(t) else None for i, t in enumerate(results)]


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _is_of_others(n: Any) -> bool:
    target = n.target
    return isinstance(target, HigherOrderOperator) or isinstance(target, OpOverload) and target.namespace not in OWN


def _normal(x: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)


def _drawn(x: torch.Tensor, seed: int) -> torch.Tensor:
    if not x.numel():
        return x
    wide = x.detach().float()
    least, most = (t.item() for t in torch.aminmax(wide))
    if not max(abs(least), abs(most)) < HUGE:  # not a number, too
        return x
    mean, spread = wide.mean().item(), wide.std().item() if x.numel() > 1 else 0.0
    if spread == 0:
        spread = x.shape[-1] ** -0.5 if x.dim() > 1 else 0.1 if mean else 1.0
    spread *= 2 ** (seed * GOLDEN % 3)
    drawn = _normal(x, seed) * spread + mean
    if least >= 0 and most > 0:
        drawn = drawn.abs()
    drawn = drawn.to(x.dtype)
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if _is_dense(x) else None
    return drawn if made is None else made.copy_(drawn)


def _is_dense(x: torch.Tensor) -> bool:
    """Has each element memory of its own, without gaps?"""
    size = 1
    for length, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if length > 1 and stride != size:
            return False
        size *= length
    return True
