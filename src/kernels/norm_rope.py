"""RMSNorm of each head of q and k (QK-norm) and their rotary position embedding, in one pass over q and k.

Shapes   q [B, H, S, D], k [B, G, S, D] with any strides, their weights wq, wk [D], cos, sin [B or 1, S, R] or
         [B or 1, 1, S, R], R even, R ≤ D: the last D − R channels are normalised, not turned. With `transpose`, q and k are
         [B, S, heads, D], and the results [B, heads, S, D]; with cos and sin [B or 1, S, 1, R] all are [B, S, heads, D].

Forward  one head of one token, with s = offset + w (offset = 1 is Gemma's) and M the turn of sloth.kernels.rope (y = M x for each
         pair of channels):
             r = (mean(x²) + eps)^(−½),   x̂ = x·r,   y = M (x̂·s)
         As the turn is linear and r one number: y[i] = r·(x[i]·s[i]·c[i] ± x[j]·s[j]·sin), j the partner of i. In fp32, rounded
         once: what the eager code rounds between norm and turn is not.

Backward from g = ∂L/∂y:
             n = Mᵀ g = ∂L/∂(x̂·s)                 (the backward pass of rope: the sines change sign)
             m = n·s = ∂L/∂x̂
             dx = r·(m − x̂·mean(m·x̂))            (derived in sloth.kernels.rms_norm)
             dw = Σ over tokens and heads of n·x̂
         cos and sin are functions of the positions: no gradient.
Sources  Zhang & Sennrich, "Root mean square layer normalization", 2019; Su et al., "RoFormer", 2021; Henry et al., "Query-key
         normalization for transformers", 2020; the derivation is ours.

Saved    q and k, which the projections gave, the weights, cos and sin. r is a sum over D channels that the backward pass reads
         anyway: computed again, not kept.
Layout   as in sloth.kernels.rope: outputs as eager's, gradients in [B, S, heads, D] memory order.
Bytes    forward 2 passes over q and k (read x, write y), backward 3 (read g, x; write dx): the floor of both is
         5·B·S·(H + G)·D·itemsize over the copy rate; norm and rope one after the other move 9. dw adds no pass: each program
         keeps its share of the sum in registers (see sloth.kernels.common.row_reduction). Weights without gradient cost nothing.
"""

import torch
from torch import Tensor

from sloth.kernels import rms_norm
from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import compute_dtype, launch, triton_op
from sloth.kernels.common.row_reduction import check_vectors, multiprocessors, raise_on_double_backward, sum_partials
from sloth.kernels.rope import (
    allocate,
    arranged,
    block_heads,
    blocks,
    heads_last,
    load_table,
    padded,
    single_aten,
    table_args,
    unit_stride,
)

# Tuning: warps of a program (some heads of one token, as in rope), and programs for each multiprocessor where weights want a
# gradient: each then walks over many tokens.
NUM_WARPS = 1
WALKERS = 12


# ---------------------------------------------------------------- Triton


@triton.jit
def _forward_tile(
    x_at, y_at, w_ptr, x_head, y_head, block, heads, c, s, col, other,
    D: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS heads of one token. `x_at`, `y_at`: its first channel; `x_head`, `y_head`: strides from head to head."""
    head = block * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    mask = (head < heads) & (col < D)
    x, y = x_at + head * x_head, y_at + head * y_head
    c *= tl.load(w_ptr + col, col < D, 0.0).to(tl.float32) + OFFSET
    s *= tl.load(w_ptr + other, col < D, 0.0).to(tl.float32) + OFFSET
    own, partner = tl.load(x + col, mask, 0.0).to(tl.float32), tl.load(x + other, mask, 0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(own * own, 1, keep_dims=True) / D + EPS)
    tl.store(y + col, ((own * c + partner * s) * rstd).to(y.dtype.element_ty), mask)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, wq_ptr, wk_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, S, H, G,
    q_b, q_h, q_s, k_b, k_h, k_s, yq_b, yq_h, yq_s, yk_b, yk_h, yk_s, cos_b, cos_s, sin_b, sin_s,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, K_ROWS: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, of q in the first programs of axis 1, of k in the others. Strides are named tensor_dimension."""
    pid = tl.program_id(0).to(tl.int64)
    b, s = pid // S, pid % S
    col = tl.arange(0, BLOCK)[None, :]
    cos_at, sin_at = cos_ptr + b * cos_b + s * cos_s, sin_ptr + b * sin_b + s * sin_s
    cos, sin, other = load_table(cos_at, sin_at, col, R, INTERLEAVED, False)
    at, q_blocks = tl.program_id(1), tl.cdiv(H, ROWS)
    if at < q_blocks:
        x_at, y_at = q_ptr + b * q_b + s * q_s, yq_ptr + b * yq_b + s * yq_s
        _forward_tile(x_at, y_at, wq_ptr, q_h, yq_h, at, H, cos, sin, col, other, D, EPS, OFFSET, ROWS)
    else:
        x_at, y_at = k_ptr + b * k_b + s * k_s, yk_ptr + b * yk_b + s * yk_s
        _forward_tile(x_at, y_at, wk_ptr, k_h, yk_h, at - q_blocks, G, cos, sin, col, other, D, EPS, OFFSET, K_ROWS)


@triton.jit
def _backward_walk(
    dy_ptr, x_ptr, w_ptr, dx_ptr, part_ptr, cos_ptr, sin_ptr, block, heads, tokens, S,
    dy_b, dy_h, dy_s, x_b, x_h, x_s, dx_b, dx_h, dx_s, cos_b, cos_s, sin_b, sin_s,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """ROWS heads of every num_programs-th token; their share of dw goes to part_ptr [D]."""
    col = tl.arange(0, BLOCK)[None, :]
    head = block * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    mask = (head < heads) & (col < D)
    scale = tl.load(w_ptr + col, col < D, 0.0).to(tl.float32) + OFFSET
    if NEED_DW:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)
        cos_at, sin_at = cos_ptr + b * cos_b + s * cos_s, sin_ptr + b * sin_b + s * sin_s
        cos, sin, other = load_table(cos_at, sin_at, col, R, INTERLEAVED, True)
        dy = dy_ptr + b * dy_b + s * dy_s + head * dy_h
        n = tl.load(dy + col, mask, 0.0).to(tl.float32) * cos + tl.load(dy + other, mask, 0.0).to(tl.float32) * sin
        x = tl.load(x_ptr + b * x_b + s * x_s + head * x_h + col, mask, 0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
        x *= tl.where(head < heads, rstd, 0.0)  # eps may be 0
        if NEED_DW:
            dw += n * x
        if NEED_DX:
            m = n * scale
            dx = rstd * (m - x * (tl.sum(m * x, 1, keep_dims=True) / D))
            tl.store(dx_ptr + b * dx_b + s * dx_s + head * dx_h + col, dx.to(dx_ptr.dtype.element_ty), mask)
    if NEED_DW:
        tl.store(part_ptr + col, tl.sum(dw, 0)[None, :], col < D)


@triton.jit
def _backward_kernel(
    dyq_ptr, dyk_ptr, q_ptr, k_ptr, wq_ptr, wk_ptr, dq_ptr, dk_ptr, q_part_ptr, k_part_ptr, cos_ptr, sin_ptr,
    tokens, S, H, G, q_blocks, k_blocks,
    dyq_b, dyq_h, dyq_s, dyk_b, dyk_h, dyk_s, q_b, q_h, q_s, k_b, k_h, k_s, dq_b, dq_h, dq_s, dk_b, dk_h, dk_s,
    cos_b, cos_s, sin_b, sin_s,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, K_ROWS: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_DWQ: tl.constexpr, NEED_DWK: tl.constexpr,
):  # fmt: skip
    """As forward; parts of dwq, dwk [programs of axis 0, blocks of heads, D]. What needs nothing has no blocks."""
    pid, at = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if at < q_blocks:
        _backward_walk(
            dyq_ptr, q_ptr, wq_ptr, dq_ptr, q_part_ptr + (pid * q_blocks + at) * D, cos_ptr, sin_ptr, at, H, tokens, S,
            dyq_b, dyq_h, dyq_s, q_b, q_h, q_s, dq_b, dq_h, dq_s, cos_b, cos_s, sin_b, sin_s,
            D, R, BLOCK, ROWS, EPS, OFFSET, INTERLEAVED, NEED_DQ, NEED_DWQ,
        )  # fmt: skip
    else:
        at -= q_blocks
        _backward_walk(
            dyk_ptr, k_ptr, wk_ptr, dk_ptr, k_part_ptr + (pid * k_blocks + at) * D, cos_ptr, sin_ptr, at, G, tokens, S,
            dyk_b, dyk_h, dyk_s, k_b, k_h, k_s, dk_b, dk_h, dk_s, cos_b, cos_s, sin_b, sin_s,
            D, R, BLOCK, K_ROWS, EPS, OFFSET, INTERLEAVED, NEED_DK, NEED_DWK,
        )  # fmt: skip


def _constants(q, k, cos, eps: float, offset: float, interleaved: bool) -> dict:
    D = q.shape[-1]
    return dict(
        D=D, R=cos.shape[-1], BLOCK=padded(D), ROWS=block_heads(q.shape[1], D), K_ROWS=block_heads(k.shape[1], D),
        EPS=eps, OFFSET=offset, INTERLEAVED=interleaved, num_warps=NUM_WARPS,
    )  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    return [t.stride(d) for t in tensors for d in range(3)]


def forward_triton(q, k, wq, wk, cos, sin, eps: float, offset: float, interleaved: bool, dtype: torch.dtype):
    """(yq, yk) by Triton."""
    q, k = unit_stride(q), unit_stride(k)
    B, H, S, _ = q.shape
    G = k.shape[1]
    (q_buffer, yq), (k_buffer, yk) = allocate(q, cos, dtype, False), allocate(k, cos, dtype, False)
    (cos, sin), table_strides = table_args(cos, sin, B)
    options = _constants(q, k, cos, eps, offset, interleaved)
    launch(_forward_kernel)[(B * S, blocks(H, options["ROWS"]) + blocks(G, options["K_ROWS"]))](
        q, k, wq.contiguous(), wk.contiguous(), q_buffer, k_buffer, cos, sin, S, H, G,
        *_strides(q, k, yq, yk), *table_strides, **options,
    )  # fmt: skip
    return yq, yk


def backward_triton(dyq, dyk, q, k, wq, wk, cos, sin, eps: float, offset: float, interleaved: bool, need: list[bool]):
    """(dq, dk, dwq, dwk), None where not needed, by Triton."""
    q, k = unit_stride(q), unit_stride(k)
    dyq, dyk = (unit_stride(given if dy is None else dy) for dy, given in ((dyq, dyk), (dyk, dyq)))
    B, H, S, D = q.shape
    G = k.shape[1]
    need_dq, need_dk, need_dwq, need_dwk = need
    options = _constants(q, k, cos, eps, offset, interleaved)
    q_blocks = blocks(H, options["ROWS"]) if need_dq or need_dwq else 0
    k_blocks = blocks(G, options["K_ROWS"]) if need_dk or need_dwk else 0
    programs = B * S
    if need_dwq or need_dwk:
        programs = max(1, WALKERS * multiprocessors(q.device) // (q_blocks + k_blocks))
    (q_buffer, dq), (k_buffer, dk) = (
        allocate(x, cos, x.dtype, True) if needed else (x, x) for x, needed in ((q, need_dq), (k, need_dk))
    )
    q_part, k_part = (
        torch.empty(programs * n, D, dtype=torch.float32, device=q.device) if needed else q
        for n, needed in ((q_blocks, need_dwq), (k_blocks, need_dwk))
    )
    (cos, sin), table_strides = table_args(cos, sin, B)
    launch(_backward_kernel)[(programs, q_blocks + k_blocks)](
        dyq, dyk, q, k, wq.contiguous(), wk.contiguous(), q_buffer, k_buffer, q_part, k_part, cos, sin,
        B * S, S, H, G, q_blocks, k_blocks, *_strides(dyq, dyk, q, k, dq, dk), *table_strides,
        NEED_DQ=need_dq, NEED_DK=need_dk, NEED_DWQ=need_dwq, NEED_DWK=need_dwk, **options,
    )  # fmt: skip
    dwq, dwk = sum_partials(q_part, wq.dtype) if need_dwq else None, sum_partials(k_part, wk.dtype) if need_dwk else None
    return dq if need_dq else None, dk if need_dk else None, dwq, dwk


# ---------------------------------------------------------------- ATen


def _forward_one(x, w, cos, sin, eps: float, offset: float, interleaved: bool, dtype: torch.dtype) -> Tensor:
    wide = x.to(compute_dtype(x, w, cos))
    return single_aten(rms_norm.forward_aten(wide, None, w, eps, offset, False)[1], cos, sin, interleaved, dtype)


def _backward_one(dy, x, w, cos, sin, eps: float, offset: float, interleaved: bool, need_dx: bool, need_dw: bool):
    """(dx, dw), None where not needed."""
    if not (need_dx or need_dw):
        return None, None
    wide = compute_dtype(x, w, cos)
    rstd = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    n = single_aten(dy, cos, sin, interleaved, wide, backward=True)
    dx, dw = rms_norm.backward_aten(n, None, x, w, rstd, offset, need_dx, need_dw)
    return allocate(x, cos, x.dtype, True)[1].copy_(dx) if need_dx else None, dw


def forward_aten(q, k, wq, wk, *how):
    """As forward_triton."""
    return _forward_one(q, wq, *how), _forward_one(k, wk, *how)


def backward_aten(dyq, dyk, q, k, wq, wk, *how):
    """As backward_triton."""
    *how, (need_dq, need_dk, need_dwq, need_dwk) = how
    dq, dwq = _backward_one(dyq, q, wq, *how, need_dq, need_dwq)
    dk, dwk = _backward_one(dyk, k, wk, *how, need_dk, need_dwk)
    return dq, dk, dwq, dwk


# ---------------------------------------------------------------- operators


forward_for = implementations("sloth::norm_rope_forward", triton=forward_triton, aten=forward_aten)
backward_for = implementations("sloth::norm_rope_backward", triton=backward_triton, aten=backward_aten)


@triton_op("sloth::norm_rope_forward", "norm_rope")
def _norm_rope_forward(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor,
    eps: float, offset: float, interleaved: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [B, heads, S, D], cos, sin [B or 1, S, R]"""
    return forward_for(q, k, wq, wk, cos)(q, k, wq, wk, cos, sin, eps, offset, interleaved, dtype)


@triton_op("sloth::norm_rope_backward", "norm_rope")
def _norm_rope_backward(
    dyq: Tensor | None, dyk: Tensor | None, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor,
    eps: float, offset: float, interleaved: bool, need: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Of [dq, dk, dwq, dwk] those that `need` says."""
    backward = backward_for(q, k, wq, wk, cos)
    return [t for t in backward(dyq, dyk, q, k, wq, wk, cos, sin, eps, offset, interleaved, need) if t is not None]


def _setup(ctx, inputs, output):
    *tensors, ctx.eps, ctx.offset, ctx.interleaved, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _vjp(ctx, *dys):
    need = [needed and dy is not None for needed, dy in zip(ctx.needs_input_grad[:4], (*dys, *dys), strict=True)]
    found = iter(())
    if any(need):
        found = iter(torch.ops.sloth.norm_rope_backward(*dys, *ctx.saved_tensors, ctx.eps, ctx.offset, ctx.interleaved, need))
    return *(next(found) if needed else None for needed in need), *[None] * 6


torch.library.register_autograd("sloth::norm_rope_forward", _vjp, setup_context=_setup)
torch.library.register_autograd("sloth::norm_rope_backward", raise_on_double_backward)

# What models call: the operator above, whatever the order of heads and positions.
torch.library.define(
    "sloth::norm_rope",
    "(Tensor q, Tensor k, Tensor wq, Tensor wk, Tensor cos, Tensor sin, float eps, ScalarType dtype, float offset=0.0, "
    "bool interleaved=False, bool transpose=False) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::norm_rope", "CompositeImplicitAutograd")
def norm_rope_composite(q, k, wq, wk, cos, sin, eps, dtype, offset=0.0, interleaved=False, transpose=False):
    check_vectors("norm_rope", q, wq=wq)
    check_vectors("norm_rope", k, wk=wk)
    if transpose:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    last = heads_last(cos)
    cos, sin, q, k = arranged(cos, sin, q, k)
    yq, yk = torch.ops.sloth.norm_rope_forward(q, k, wq, wk, cos, sin, eps, offset, interleaved, dtype)
    return (yq.transpose(1, 2), yk.transpose(1, 2)) if last else (yq, yk)


norm_rope = torch.ops.sloth.norm_rope.default
"""norm_rope(q, k [B, heads, S, D], wq, wk [D], cos, sin, eps, dtype, offset=0.0, interleaved=False, transpose=False) -> (yq, yk)
of this dtype"""


# ---------------------------------------------------------------- for compilation without a GPU (tests)


def _compile_case(kernel, R: int, need: tuple[bool, ...] = (), **changes):
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    constants = dict(D=128, R=R, BLOCK=128, ROWS=8, K_ROWS=4, EPS=1e-6, OFFSET=1.0, INTERLEAVED=False) | changes
    constants |= dict(zip(("NEED_DQ", "NEED_DK", "NEED_DWQ", "NEED_DWK"), need, strict=False))
    signature = {name: "i32" for name in kernel.arg_names if name not in pointers and name not in constants}
    signature |= {name: "*fp32" if "part" in name else "*bf16" for name in pointers}
    return kernel, signature, constants, {"num_warps": NUM_WARPS}


COMPILE = [
    _compile_case(_forward_kernel, 128),
    _compile_case(_forward_kernel, 64, INTERLEAVED=True, D=96),
    _compile_case(_backward_kernel, 128, (True, True, True, True)),
    _compile_case(_backward_kernel, 64, (True, True, False, False), D=96),
]
