"""A low-rank adapter on top of a layer that is computed elsewhere, with or without magnitudes (Liu et al., "DoRA", 2024):

    y = base + s · l                                  l = t Bᵀ,  t = x Aᵀ
    y = base + (m − 1) ⊙ inner + s · m ⊙ l            with magnitudes m
    y = base + s · (l + c)                            with a bias c of B (PEFT's lora_bias)

Shapes   x [..., K], A [r, K], B [N, r]; base, inner and y [..., N]; m has N elements ([1, N] as PEFT makes it).
inner    the layer's output without bias, for the same x as the adapter: base itself, base − bias, or computed anew of x.
Dtypes   any; computed in fp32 or more where they differ, y rounded once to `dtype`.

Backward, with g = ∂L/∂y (m = 1 and no inner without magnitudes):
    dbase = g      dinner = (m − 1) ⊙ g      dl = s · m ⊙ g      dm = Σ_rows g ⊙ (inner + s · l)
    dt = dl B      dB = dlᵀ t                dA = dtᵀ x          dx = dt A          dc = Σ_rows dl
Saved    t [M, r] and the inputs that a gradient needs. l [M, N] is not: dm computes it again from t.
The element-wise parts are left to the compiler, which fuses them.
"""

import torch
from torch import Tensor

from sloth.kernels.common.launch import compute_dtype, triton_op, without_autocast
from sloth.kernels.common.row_reduction import raise_on_double_backward
from sloth.kernels.linear.gemm import as_matrix


@triton_op("sloth::adapter_forward", "adapter")
def _adapter_forward(
    base: Tensor,
    inner: Tensor | None,
    m: Tensor | None,
    lora_input: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
    c: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and t."""
    torch._check((inner is None) == (m is None), lambda: "adapter: inner and m go together")
    torch._check(a.dtype == b.dtype, lambda: f"adapter: A is {a.dtype}, B {b.dtype}")
    torch._check(c is None or m is None, lambda: "adapter: no bias of B beside magnitudes")
    t = as_matrix(lora_input).to(a.dtype) @ a.t()
    wide = compute_dtype(base, b)
    l = (t @ b.t()).to(wide)
    change = (l if c is None else l + c.to(wide)).view(base.shape) * scale
    if m is not None:
        m = m.to(wide).view(-1)
        change = (m - 1) * inner.to(wide) + m * change
    return (base.to(wide) + change).to(dtype), t


@triton_op("sloth::adapter_backward", "adapter")
def _adapter_backward(
    g: Tensor,
    inner: Tensor | None,
    m: Tensor | None,
    lora_input: Tensor,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    scale: float,
    need_inner: bool,
    need_m: bool,
    need_lora_input: bool,
    need_a: bool,
    need_b: bool,
    need_c: bool = False,
    c_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """dinner, dm, dx, dA, dB, dc, each only if it is needed."""
    wide = compute_dtype(g, b)
    g2, out = as_matrix(g).to(wide), []
    mw = None if m is None else m.to(wide).view(-1)
    if need_inner:
        out.append(((mw - 1) * g2).to(inner.dtype).view(inner.shape))
    if need_m:
        l = (t @ b.t()).to(wide) * scale
        out.append((g2 * (as_matrix(inner).to(wide) + l)).sum(0).to(m.dtype).view(m.shape))
    dl = (g2 * scale if mw is None else mw * g2 * scale).to(b.dtype)
    dt = dl @ b
    if need_lora_input:
        out.append((dt @ a).to(lora_input.dtype).view(lora_input.shape))
    if need_a:
        out.append(dt.t() @ as_matrix(lora_input).to(a.dtype))
    if need_b:
        out.append(dl.t() @ t)
    if need_c:
        out.append((g2 * scale).sum(0).to(c_dtype))
    return out


def _setup(ctx, inputs, output):
    base, inner, m, lora_input, a, b, ctx.scale, _, c = inputs
    ctx.base_dtype, ctx.c_dtype = base.dtype, None if c is None else c.dtype
    ctx.save_for_backward(inner, m, lora_input, a, b, output[1])
    ctx.mark_non_differentiable(output[1])


def _vjp(ctx, g, _):
    needs = [*ctx.needs_input_grad[1:6], any(ctx.needs_input_grad[8:])]
    found = iter(torch.ops.sloth.adapter_backward(g, *ctx.saved_tensors, ctx.scale, *needs, ctx.c_dtype) if any(needs) else ())
    dbase = g.to(ctx.base_dtype) if ctx.needs_input_grad[0] else None
    *grads, dc = [next(found) if need else None for need in needs]
    return dbase, *grads, None, None, dc


torch.library.register_autograd("sloth::adapter_forward", _vjp, setup_context=_setup)
torch.library.register_autograd("sloth::adapter_backward", raise_on_double_backward)

torch.library.define(
    "sloth::adapter",
    "(Tensor base, Tensor? inner, Tensor? m, Tensor lora_input, Tensor a, Tensor b, float scale, ScalarType? dtype=None,"
    " Tensor? c=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::adapter", "CompositeImplicitAutograd")
def adapter_composite(base, inner, m, lora_input, a, b, scale, dtype=None, c=None):
    with without_autocast(lora_input):
        return torch.ops.sloth.adapter_forward(base, inner, m, lora_input, a, b, scale, dtype or base.dtype, c)[0]


adapter = torch.ops.sloth.adapter.default
"""adapter(base, inner, m, lora_input, a, b, scale, dtype=None, c=None) -> y"""
