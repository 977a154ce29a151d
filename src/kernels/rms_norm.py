"""RMSNorm, alone and behind a residual addition.

Shapes   x, residual, h, y [..., D]; weight [D] or none. With s = offset + weight (offset = 1 is Gemma's; no weight: s = 1):

    rms_norm        y = x · r · s,   r = (mean(x²) + eps)^(−½)  over the last dimension
    add_rms_norm    h = x + residual, rounded to promote_types(x, residual);   y = rms_norm(h)

in fp32, rounded once. Where `summed` is set, all means are sums: x̂ has length 1 (nGPT). y is in `dtype`; by default in that of
its input, or promote_types(input, weight) where `promote` is set: Llama's `weight * h.to(x.dtype)` promotes, Gemma's
`(…).type_as(x)` and OLMo2's `(weight * h).to(x.dtype)` do not.

Backward, one row, from g = ∂L/∂y. Let x̂ = x·r and m = g·s = ∂L/∂x̂.
    r depends on x:      ∂r/∂x_j = −½ (mean(x²) + eps)^(−3/2) · 2x_j/D = −r³·x_j/D
    x̂_i = x_i·r:         ∂x̂_i/∂x_j = r·δ_ij − x_i·x_j·r³/D = r·(δ_ij − x̂_i·x̂_j/D)
    summed against m:    dx = r·(m − x̂·mean(m·x̂))
    y_i = x̂_i·s_i:       dweight = Σ over rows of g·x̂
and for add_rms_norm, where h has a second use with gradient dh:  dx = dresidual = dh + r·(m − x̂·mean(m·x̂)),  one tensor.

Saved    x (or h), weight, and r in fp32, shape [..., 1]: 4 bytes a row. x̂ is x·r again, which costs a multiplication.
Bytes    forward 2 passes over [N, D] (read x, write y), backward 3 (read g, x; write dx); with the addition 4 and 4. dweight adds
         no pass: each program keeps its share of the sum in registers (see row_reduction.py). [8192, 4096] in bf16 on an H200
         (4288 GB/s): forward ≥ 31 µs, backward ≥ 47 µs. A frozen weight costs nothing, nor does an x without gradient.
Sources  Zhang & Sennrich, "Root mean square layer normalization", 2019; the derivation is ours.

Strides  of h, y, dx are eager's: the dimension order of the input, otherwise dense (last dimension innermost).
"""

import torch
from torch import Tensor

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import compute_dtype, launch, triton_op
from sloth.kernels.common.layout import from_rows, ordered_rows, row_order
from sloth.kernels.common.row_reduction import Tuning, check_vectors, raise_on_double_backward, sum_partials, sum_rows

FORWARD = Tuning(tile=2048, per_warp=512)
BACKWARD = Tuning(tile=2048, per_warp=512)  # dx alone
BACKWARD_DW = Tuning(tile=2048, per_warp=512, programs=2, stages=3)  # with dweight


# ---------------------------------------------------------------- Triton


@triton.jit
def _forward_kernel(
    x_ptr, res_ptr, w_ptr, h_ptr, y_ptr, rstd_ptr, x_stride, res_stride, N,
    D: tl.constexpr, OVER: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_RES: tl.constexpr, HAS_W: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows; OVER: what sums are divided by. Pointers of absent tensors are never read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < N) & (col < D)
    if ROWS == 1 and BLOCK == D:
        mask = tl.full([1, BLOCK], 1, tl.int1)  # a whole row a program: loads without a mask
    x = tl.load(x_ptr + row * x_stride + col, mask, 0.0).to(tl.float32)
    if HAS_W:  # every program reads the same weight: keep it in L2, and let what is written pass by
        scale = tl.load(w_ptr + col, col < D, 0.0, eviction_policy="evict_last").to(tl.float32) + OFFSET
    if HAS_RES:
        h = (x + tl.load(res_ptr + row * res_stride + col, mask, 0.0).to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * D + col, h, mask)
        x = h.to(tl.float32)  # the norm is that of the rounded sum
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / OVER + EPS)
    y = x * rstd
    if HAS_W:
        y *= scale
    tl.store(y_ptr + row * D + col, y.to(y_ptr.dtype.element_ty), mask, cache_modifier=".cg")
    tl.store(rstd_ptr + row, rstd, row < N)


@triton.jit
def _backward_kernel(
    dy_ptr, dh_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, part_ptr, dy_stride, dh_stride, x_stride, N,
    D: tl.constexpr, OVER: tl.constexpr, OFFSET: tl.constexpr, HAS_DH: tl.constexpr, HAS_W: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of ROWS rows; its share of dweight goes to row program_id of part [P, D]."""
    col = tl.arange(0, BLOCK)[None, :]
    if HAS_W and NEED_DX:
        scale = tl.load(w_ptr + col, col < D, 0.0).to(tl.float32) + OFFSET
    if NEED_DW:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (row < N) & (col < D)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask, 0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + col, mask, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < N, 0.0)
        x *= rstd
        if NEED_DW:
            dw += dy * x
        if NEED_DX:
            if HAS_W:
                dy *= scale
            dx = rstd * (dy - x * (tl.sum(dy * x, 1, keep_dims=True) / OVER))
            if HAS_DH:
                dx += tl.load(dh_ptr + row * dh_stride + col, mask, 0.0).to(tl.float32)
            tl.store(dx_ptr + row * D + col, dx.to(dx_ptr.dtype.element_ty), mask)
    if NEED_DW:
        part = part_ptr + tl.program_id(0).to(tl.int64) * D + col
        tl.store(part, tl.sum(dw, 0)[None, :], col < D)


def forward_triton(x, residual, weight, eps: float, offset: float, promote: bool, dtype=None, summed: bool = False):
    """(h or None, y, rstd [..., 1]) by Triton."""
    D = x.shape[-1]
    order = row_order(x) if residual is None else row_order(x, residual)
    x_ND = ordered_rows(x, order)
    res_ND = x_ND if residual is None else ordered_rows(residual, order)
    N = x_ND.shape[0]
    in_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    h_ND = x_ND if residual is None else torch.empty(N, D, dtype=in_dtype, device=x.device)
    y_ND = torch.empty(N, D, dtype=dtype or _out_dtype(in_dtype, weight, promote), device=x.device)
    rstd_N = torch.empty(N, dtype=torch.float32, device=x.device)
    rows, block, warps = FORWARD.block(D)
    launch(_forward_kernel)[(FORWARD.grid(N, D, x.device),)](
        x_ND, res_ND, x_ND if weight is None else weight.contiguous(), h_ND, y_ND, rstd_N,
        x_ND.stride(0), res_ND.stride(0), N,
        D, 1 if summed else D, eps, offset, residual is not None, weight is not None, rows, block, num_warps=warps,
    )  # fmt: skip
    h = None if residual is None else from_rows(h_ND, x.shape, order)
    return h, from_rows(y_ND, x.shape, order), from_rows(rstd_N, x.shape[:-1], order).unsqueeze(-1)


def backward_triton(dy, dh, x, weight, rstd, offset: float, need_dx: bool, need_dw: bool, summed: bool = False):
    """(dx or None, dweight or None) by Triton."""
    D = x.shape[-1]
    order = row_order(x)
    x_ND, dy_ND = ordered_rows(x, order), ordered_rows(dy, order)
    rstd_N = rstd.squeeze(-1).permute(order).reshape(-1)  # and what stands for tensors that there are not
    dh_ND = dy_ND if dh is None else ordered_rows(dh, order)
    N = x_ND.shape[0]
    tuning = BACKWARD_DW if need_dw else BACKWARD
    rows, block, warps = tuning.block(D)
    programs = tuning.grid(N, D, x.device)
    loaded = [x, dy] if dh is None else [x, dy, dh]
    stages = tuning.depth(D * sum(t.element_size() for t in loaded), D)
    dx_ND = torch.empty(N, D, dtype=x.dtype, device=x.device) if need_dx else rstd_N
    part_PD = torch.empty(programs, D, dtype=torch.float32, device=x.device) if need_dw else rstd_N
    launch(_backward_kernel)[(programs,)](
        dy_ND, dh_ND, x_ND, rstd_N if weight is None else weight.contiguous(), rstd_N, dx_ND, part_PD,
        dy_ND.stride(0), dh_ND.stride(0), x_ND.stride(0), N,
        D, 1 if summed else D, offset, dh is not None, weight is not None, need_dx, need_dw, rows, block, stages, num_warps=warps,
    )  # fmt: skip
    dx = from_rows(dx_ND, x.shape, order) if need_dx else None
    return dx, sum_partials(part_PD, weight.dtype) if need_dw else None


# ---------------------------------------------------------------- ATen


def _out_dtype(in_dtype: torch.dtype, weight, promote: bool) -> torch.dtype:
    return torch.promote_types(in_dtype, weight.dtype) if promote and weight is not None else in_dtype


def _scale(weight: Tensor, dtype: torch.dtype, offset: float) -> Tensor:
    return weight.to(dtype) + offset if offset else weight.to(dtype)


def forward_aten(x, residual, weight, eps: float, offset: float, promote: bool, dtype=None, summed: bool = False):
    """As forward_triton."""
    wide = compute_dtype(*(t for t in (x, residual, weight) if t is not None))
    h = None if residual is None else x + residual
    source = x if h is None else h
    x_ = source.to(wide)
    square = x_ * x_
    rstd = torch.rsqrt((square.sum(-1, keepdim=True) if summed else square.mean(-1, keepdim=True)) + eps)
    y = x_ * rstd
    if weight is not None:
        y = y * _scale(weight, wide, offset)
    return h, y.to(dtype or _out_dtype(source.dtype, weight, promote)), rstd


def backward_aten(dy, dh, x, weight, rstd, offset: float, need_dx: bool, need_dw: bool, summed: bool = False):
    """As backward_triton."""
    dtype = rstd.dtype
    g, x_ = dy.to(dtype), x.to(dtype)
    dx = dw = None
    if need_dx:
        m = g if weight is None else g * _scale(weight, dtype, offset)
        over = 1 if summed else x.shape[-1]
        c = (m * x_).sum(-1, keepdim=True) * rstd * (1 / over) * rstd  # mean(m·x̂)·r; no r², which may underflow
        dx = rstd * (m - x_ * c)
        dx = (dx if dh is None else dx + dh.to(dtype)).to(x.dtype)
    if need_dw:
        dw = sum_rows(g * (x_ * rstd)).to(weight.dtype)
    return dx, dw


# ---------------------------------------------------------------- operators


forward_for = implementations("sloth::rms_norm_forward", "sloth::add_rms_norm_forward", triton=forward_triton, aten=forward_aten)
backward_for = implementations("sloth::rms_norm_backward", triton=backward_triton, aten=backward_aten)


@triton_op("sloth::rms_norm_forward", "rms_norm")
def _rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, promote: bool, dtype: torch.dtype | None = None,
    summed: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, rstd)"""
    check_vectors("rms_norm", x, weight=weight)
    _, y, rstd = forward_for(x, weight)(x, None, weight, eps, offset, promote, dtype, summed)
    return y, rstd


@triton_op("sloth::add_rms_norm_forward", "rms_norm")
def _add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, promote: bool,
    dtype: torch.dtype | None = None, summed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(h, y, rstd)"""
    check_vectors("add_rms_norm", x, weight=weight)
    torch._check(x.shape == residual.shape, lambda: f"add_rms_norm: shapes {x.shape} and {residual.shape} differ")
    return forward_for(x, residual, weight)(x, residual, weight, eps, offset, promote, dtype, summed)


@triton_op("sloth::rms_norm_backward", "rms_norm")
def _rms_norm_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dx: bool, need_dw: bool,
    summed: bool = False,
) -> list[Tensor]:  # fmt: skip
    """[dx, dweight], without what is not needed."""
    backward = backward_for(dy, dh, x, weight)
    return [t for t in backward(dy, dh, x, weight, rstd, offset, need_dx, need_dw, summed) if t is not None]


def _gradients(ctx, dy, dh, need_dx: bool, need_dw: bool):
    """(gradient of the norm's input with dh added, dweight), None where not needed or zero."""
    x, weight, rstd = ctx.saved_tensors
    if dy is None or not (need_dx or need_dw):
        return (dh if need_dx else None), None
    found = iter(torch.ops.sloth.rms_norm_backward(dy, dh, x, weight, rstd, ctx.offset, need_dx, need_dw, ctx.summed))
    return next(found) if need_dx else None, next(found) if need_dw else None


def _rms_norm_setup(ctx, inputs, output):
    x, weight, _, ctx.offset, _, _, ctx.summed = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _rms_norm_vjp(ctx, dy, _):
    dx, dw = _gradients(ctx, dy, None, *ctx.needs_input_grad[:2])
    return dx, dw, *[None] * 5


def _add_rms_norm_setup(ctx, inputs, output):
    x, residual, weight, _, ctx.offset, _, _, ctx.summed = inputs
    h, _, rstd = output
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(h, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_rms_norm_vjp(ctx, dh, dy, _):
    need_x, need_residual, need_dw = ctx.needs_input_grad[:3]
    d, dw = _gradients(ctx, dy, dh, need_x or need_residual, need_dw)
    dx, dresidual = (d.to(t) if d is not None and n else None for t, n in zip(ctx.dtypes, (need_x, need_residual), strict=True))
    return dx, dresidual, dw, *[None] * 5


torch.library.register_autograd("sloth::rms_norm_forward", _rms_norm_vjp, setup_context=_rms_norm_setup)
torch.library.register_autograd("sloth::add_rms_norm_forward", _add_rms_norm_vjp, setup_context=_add_rms_norm_setup)
torch.library.register_autograd("sloth::rms_norm_backward", raise_on_double_backward)

# What models call: the operators above without rstd, which only the backward pass wants.
_TAGS = (torch.Tag.pt2_compliant_tag,)
_NUMBERS = "Tensor? weight, float eps, float offset=0.0, bool promote=False, ScalarType? dtype=None, bool summed=False"
_SCHEMA = f"(Tensor x, {_NUMBERS}) -> Tensor"
_ADD_SCHEMA = f"(Tensor x, Tensor residual, {_NUMBERS}) -> (Tensor h, Tensor y)"
torch.library.define("sloth::rms_norm", _SCHEMA, tags=_TAGS)
torch.library.define("sloth::add_rms_norm", _ADD_SCHEMA, tags=_TAGS)


@torch.library.impl("sloth::rms_norm", "CompositeImplicitAutograd")
def rms_norm_composite(x, weight, eps, offset=0.0, promote=False, dtype=None, summed=False):
    return torch.ops.sloth.rms_norm_forward(x, weight, eps, offset, promote, dtype, summed)[0]


@torch.library.impl("sloth::add_rms_norm", "CompositeImplicitAutograd")
def add_rms_norm_composite(x, residual, weight, eps, offset=0.0, promote=False, dtype=None, summed=False):
    return torch.ops.sloth.add_rms_norm_forward(x, residual, weight, eps, offset, promote, dtype, summed)[:2]


rms_norm = torch.ops.sloth.rms_norm.default
"""rms_norm(x [..., D], weight [D] or None, eps, offset=0.0, promote=False, dtype=None, summed=False) -> y [..., D]"""
add_rms_norm = torch.ops.sloth.add_rms_norm.default
"""add_rms_norm(x, residual [..., D], weight [D] or None, eps, offset=0.0, promote=False, dtype=None, summed=False)
-> (h, y) [..., D]"""


# ---------------------------------------------------------------- for compilation without a GPU (tests)

_FORWARD_ARGS = dict.fromkeys(("x_ptr", "res_ptr", "w_ptr", "h_ptr", "y_ptr"), "*bf16") | {
    "rstd_ptr": "*fp32", "x_stride": "i32", "res_stride": "i32", "N": "i32",
}  # fmt: skip
_BACKWARD_ARGS = dict.fromkeys(("dy_ptr", "dh_ptr", "x_ptr", "w_ptr", "dx_ptr"), "*bf16") | {
    "rstd_ptr": "*fp32", "part_ptr": "*fp32", "dy_stride": "i32", "dh_stride": "i32", "x_stride": "i32", "N": "i32",
}  # fmt: skip
_WIDE, _NARROW = {"D": 4096, "OVER": 4096, "ROWS": 1, "BLOCK": 4096}, {"D": 100, "OVER": 1, "ROWS": 16, "BLOCK": 128}
_DX = {"OFFSET": 1.0, "HAS_DH": False, "HAS_W": True, "NEED_DX": True, "NEED_DW": False, "STAGES": 1}
COMPILE = [
    (_forward_kernel, _FORWARD_ARGS, _WIDE | {"EPS": 1e-6, "OFFSET": 0.0, "HAS_RES": True, "HAS_W": True}),
    (_forward_kernel, _FORWARD_ARGS, _NARROW | {"EPS": 1e-6, "OFFSET": 1.0, "HAS_RES": False, "HAS_W": False}),
    (_backward_kernel, _BACKWARD_ARGS, _WIDE | _DX | {"HAS_DH": True, "NEED_DW": True, "STAGES": 3}),
    (_backward_kernel, _BACKWARD_ARGS, _NARROW | _DX),
]
