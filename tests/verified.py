"""Programs for `sloth.verify`, small ones: which of the faults in tests/faults.py that change values does it find?

    python -m tests.verified            all of them; exit code 1 where something is wrong
    python -m tests.verified rsub dora  some of them

A program holds what one fault would compute otherwise. It knows nothing of the fault: verify compares with eager and fp64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sloth

B, S, D, V = 2, 12, 16, 40
OPTIONS = {"sloth.inner_backend": "eager"}


class Program(nn.Module):
    """A function of its parameters (by name, with their shapes) and of the batch; its result's square is the loss."""

    def __init__(self, fn: Callable[..., Tensor], frozen: tuple[str, ...] = (), **shapes: tuple[int, ...]):
        super().__init__()
        self.fn = fn
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=name not in frozen))

    def forward(self, **batch: Tensor) -> Tensor:
        return self.fn(self, **batch).pow(2).mean()


PROGRAMS: dict[str, tuple[nn.Module, dict[str, Any]]] = {}


def program(**shapes: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def enter(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        torch.manual_seed(len(PROGRAMS))
        PROGRAMS[fn.__name__] = Program(fn, **shapes), {"x": torch.randn(B, S, D)}
        return fn

    return enter


def rms(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


@program(w=(D,), proj=(D, D))
def residual(m: Any, x: Tensor) -> Tensor:
    h = x + F.linear(x, m.proj)
    return rms(h, m.w) + h


@program(gate=(D, D), up=(D, D))
def gelu(m: Any, x: Tensor) -> Tensor:
    return F.gelu(F.linear(x, m.gate), approximate="tanh") * F.linear(x, m.up)


@program(proj=(2 * D, D))
def packed(m: Any, x: Tensor) -> Tensor:
    (gate, up), (up2, gate2) = (F.linear(x, m.proj * k).chunk(2, -1) for k in (1, 2))
    return F.silu(gate) * up + F.silu(gate2) * up2


@program(proj=(V, D))
def labels(m: Any, x: Tensor) -> Tensor:
    target = torch.arange(B * S, device=x.device) % V
    target = torch.where(target % 3 == 0, -100, target)
    return F.cross_entropy(F.linear(x, m.proj).view(-1, V).float(), target)


@program(w=(V,))
def labels_of_logits(m: Any, x: Tensor) -> Tensor:
    target = torch.arange(B * S, device=x.device) % D
    return F.cross_entropy(x.view(-1, D) * m.w[:D], torch.where(target % 3 == 0, -100, target))


def adapted(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, base) + F.linear(F.linear(x, a), b) * scale


LORA = {f"{kind}{i}": shape for i in "123" for kind, shape in (("base", (D, D)), ("a", (2, D)), ("b", (D, 2)))}


@program(frozen=("base1", "base2", "base3", "a1"), g=(D,), **LORA)
def lora(m: Any, x: Tensor) -> Tensor:
    x = x * m.g
    first, second = adapted(x, m.base1, m.a1, m.b1, 2.0), adapted(x, m.base2, m.a2, m.b2, 2.0)
    return first.sin() + second * adapted(x, m.base3, m.a3, m.b3, 2.0)


@program(frozen=("base1", "base2", "base3"), g=(D,), **LORA)
def lora_scales(m: Any, x: Tensor) -> Tensor:
    x = x * m.g
    return adapted(x, m.base1, m.a1, m.b1, 2.0) * adapted(x, m.base2, m.a2, m.b2, 0.5) + adapted(x, m.base3, m.a3, m.b3, 1.0)


@program(frozen=("base1", "base2", "a1", "b1"), **{name: shape for name, shape in LORA.items() if name[-1] != "3"})
def frozen_adapter(m: Any, x: Tensor) -> Tensor:
    return adapted(x, m.base1, m.a1, m.b1, 2.0).sin() * adapted(x, m.base2, m.a2, m.b2, 2.0)


@program(frozen=("base1", "base2"), g=(D,), **{name: shape for name, shape in LORA.items() if name[-1] != "3"})
def lora_dtypes(m: Any, x: Tensor) -> Tensor:
    """One sum is kept in fp32, the other is not."""
    x = (x * m.g).bfloat16()
    wide, narrow = (F.linear(x, w.bfloat16()) for w in (m.base1, m.base2))
    wide = wide + F.linear(F.linear(x.float(), m.a1), m.b1) * 2.0
    return wide * (narrow + F.linear(F.linear(x.float(), m.a2), m.b2) * 2.0).bfloat16()


@program(base=(D, D), m=(1, D), a=(2, D), b=(D, 2), frozen=("base",))
def dora(m: Any, x: Tensor) -> Tensor:
    inner = F.linear(x, m.base)
    return inner + ((m.m - 1) * inner + m.m * F.linear(F.linear(x, m.a), m.b) * 2.0)


def layer_norm(d: Tensor, m: Any) -> Tensor:
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * m.w + m.v


@program(w=(D,), v=(D,))
def turned_norm(m: Any, x: Tensor) -> Tensor:
    return layer_norm(x.mean(-1, keepdim=True) - x, m)


@program(w=(D,), v=(D,))
def rsub(m: Any, x: Tensor) -> Tensor:
    return layer_norm(torch.rsub(x, x.mean(-1, keepdim=True)), m)


@program(w=(D,), proj=(D, D))
def data(m: Any, x: Tensor) -> Tensor:
    h = F.linear(x, m.proj)
    return rms(h.data, m.w) + h


@program(w=(D,), proj=(D, D))
def frozen_square(m: Any, x: Tensor) -> Tensor:
    h = F.linear(x, m.proj)
    return h * torch.rsqrt(h.data.pow(2).mean(-1, keepdim=True) + 1e-6) * m.w


@torch.library.custom_op("verified::gate", mutates_args=())
def gate(g: Tensor, u: Tensor) -> Tensor:
    return torch.sigmoid(g) * u


gate.register_fake(lambda g, u: torch.empty_like(g))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _skip_u(ctx: Any, d: Tensor) -> tuple:
    g, u = ctx.saved_tensors
    s = torch.sigmoid(g)
    return d * u * s * (1 - s), None


gate.register_autograd(_skip_u, setup_context=_save)
GATE = sloth.Construct("gate", "gate", anchor=lambda v: v.op == "sigmoid")


def gated(g: Tensor, u: Tensor) -> Tensor:
    return torch.sigmoid(g) * u


sloth.pattern(GATE, op=gate, dims={"g": "B S D", "u": "B S D"}, name="verified_gate")(gated)


@program(gate=(D, D), up=(D, D))
def no_gradient_of_up(m: Any, x: Tensor) -> Tensor:
    return gated(F.linear(x, m.gate), F.linear(x, m.up))


@program(w=(D,), proj=(D, D))
def two_for_one(m: Any, x: Tensor) -> Tensor:
    h, k = F.linear(x, m.proj), F.linear(x, m.proj + 1)
    return h * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6) * m.w


@program(w=(D,), proj=(D, D))
def floored(m: Any, x: Tensor) -> Tensor:
    h = F.linear(x, m.proj)
    return torch.div(h, torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6), rounding_mode="floor") * m.w


@program(proj=(2 * D, D))
def overlapping(m: Any, x: Tensor) -> Tensor:
    gate, _, up, _ = F.linear(x, m.proj).tensor_split((D, D // 2, D + D // 2), -1)
    return F.silu(gate) * up


@program(w=(D,), proj=(D, D))
def from_one(m: Any, x: Tensor) -> Tensor:
    return rms(F.linear(x, m.proj), 1.0 + m.w)


@program(w=(D,), proj=(D, D))
def other_dimension(m: Any, x: Tensor) -> Tensor:
    h = F.linear(x, m.proj)[:, :D]
    return h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6) * m.w


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


@program(c=(8,), s=(8,), proj=(D, D))
def learned_tables(m: Any, x: Tensor) -> Tensor:
    q, k = (F.linear(x, m.proj + i).view(B, S, 2, 8).transpose(1, 2) for i in range(2))
    cos, sin = (t.expand(B, 1, S, 8) for t in (m.c.cos(), m.s.sin()))
    return rotated(q, cos, sin) * rotated(k, cos, sin)


def turned_pairs(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = (F.linear(x, m.proj + i).view(B, S, 2, 8).transpose(1, 2) for i in range(2))
    return [t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin for t in (q, k)]


def tables(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(S, device=x.device)[:, None] * 0.5 ** torch.arange(width, device=x.device)
    return angles.cos(), angles.sin()


@program(proj=(D, D))
def pairs(m: Any, x: Tensor) -> Tensor:
    q, k = turned_pairs(m, x, *(t.repeat_interleave(2, -1).expand(B, 1, S, 8) for t in tables(x, 4)))
    return q * k


@program(proj=(D, D))
def pairs_stacked(m: Any, x: Tensor) -> Tensor:
    cos, sin = tables(x, 4)
    a, b = F.linear(x, m.proj).view(B, S, 2, 8).transpose(1, 2).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


@program(proj=(D, D))
def flipped(m: Any, x: Tensor) -> Tensor:
    cos, sin = tables(x, 4)
    a, b = F.linear(x, m.proj).view(B, S, 2, 8).transpose(1, 2).chunk(2, -1)
    return torch.cat((a * cos.flip(-1) - b * sin, b * cos.flip(-1) + a * sin), -1)


@program(c=(8,), proj=(D, D))
def frozen_neighbour(m: Any, x: Tensor) -> Tensor:
    q = F.linear(x, m.proj).view(B, S, 2, 8).transpose(1, 2)
    k = F.linear(x, m.proj.detach() + 1).view(B, S, 2, 8).transpose(1, 2)
    cos, sin = (t.expand(B, 1, S, 8) for t in (m.c.detach().cos(), m.c.detach().sin()))
    return rotated(q, cos, sin) * rotated(k, cos, sin)


def heads(m: Any, x: Tensor) -> list[Tensor]:
    return [F.linear(x, w).view(B, S, 2, 8).transpose(1, 2) for w in (m.q, m.k, m.v)]


QKV = {name: (D, D) for name in "qkv"}


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.arange(S, device=x.device)
    return n[None, None, :, None], n[None, None, None, :]


@program(**QKV)
def window(m: Any, x: Tensor) -> Tensor:
    i, j = positions(x)
    mask = (j <= i) & (i - j < 4) & x.new_ones(B, 1, 1, 1, dtype=torch.bool)
    return F.scaled_dot_product_attention(*heads(m, x), attn_mask=mask)


@program(**QKV)
def two_windows(m: Any, x: Tensor) -> Tensor:
    i, j = positions(x)
    mask = (j <= i) & (i - j < 4) & (i - j < 7) & x.new_ones(B, 1, 1, 1, dtype=torch.bool)
    return F.scaled_dot_product_attention(*heads(m, x), attn_mask=mask)


@program(**QKV)
def lonely(m: Any, x: Tensor) -> Tensor:
    """The first queries of the second sequence see nothing."""
    i, j = positions(x)
    begin = torch.tensor([0, 4], device=x.device)[:, None, None, None]
    mask = torch.where((j <= i) & (j >= begin), 0.0, torch.finfo(torch.float32).min)
    return F.scaled_dot_product_attention(*heads(m, x), attn_mask=mask)


@program(**QKV)
def negative_scale(m: Any, x: Tensor) -> Tensor:
    i, j = positions(x)
    mask = (j <= i) & x.new_ones(B, 1, 1, 1, dtype=torch.bool)
    return F.scaled_dot_product_attention(*heads(m, x), attn_mask=mask, scale=-0.3)


@program(**QKV)
def ids_that_fall(m: Any, x: Tensor) -> Tensor:
    steps = torch.tensor([1, 0, 0, -1, 0, 0, 1, 0, 0, -1, 0, 0], device=x.device)
    ids = steps.cumsum(0).expand(B, S)
    i, j = positions(x)
    mask = (j <= i) & (ids[:, None, :, None] == ids[:, None, None, :])
    return F.scaled_dot_product_attention(*heads(m, x), attn_mask=mask)


@program(**QKV)
def mask_of_each_head(m: Any, x: Tensor) -> Tensor:
    far = torch.tensor([2, 5], device=x.device)[None, :, None, None]
    i, j = positions(x)
    return F.scaled_dot_product_attention(*heads(m, x), attn_mask=((j <= i) & (i - j < far)).expand(B, 2, S, S))


def wrong(names: list[str]) -> list[str]:
    """What verify finds in these programs: a line for each."""
    found = []
    for name in names:
        torch._dynamo.reset()
        model, batch = PROGRAMS[name]
        told = sloth.verify(model, batch, OPTIONS)
        found += [f"{name}: {c.rewrite} {c.status}: {c.reason}" for c in told.checked if c.status == "wrong"]
        print(name, ", ".join(f"{c.rewrite} {c.status}" for c in told.checked), *(c.reason for c in told.not_checked), flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = wrong(sys.argv[1:] or list(PROGRAMS))
    print(*lines, sep="\n")
    sys.exit(bool(lines))
