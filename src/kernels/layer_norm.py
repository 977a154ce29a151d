"""LayerNorm over the last dimension:  y = (x − μ)·r·w + b,  μ = mean(x), r = (mean((x − μ)²) + eps)^(−½).

Shapes   x, y [..., D]; w (weight) and b (bias) [D] or none. fp32 inside, rounded once to x.dtype, y contiguous as F.layer_norm's.

Backward, one row, from g = ∂L/∂y. Let x̂ = (x − μ)·r and m = g·w = ∂L/∂x̂.
    ∂μ/∂x_j = 1/D,   ∂r/∂x_j = −r³·(x_j − μ)/D = −r²·x̂_j/D      (the term through μ vanishes: Σ(x_i − μ) = 0)
    ∂x̂_i/∂x_j = r·(δ_ij − 1/D) − r·x̂_i·x̂_j/D
    summed against m:    dx = r·(m − mean(m) − x̂·mean(m·x̂))
    y_i = x̂_i·w_i + b_i: dw = Σ over rows of g·x̂,   db = Σ over rows of g

Saved    x, w, and μ, r in fp32, shape [..., 1]: 8 bytes a row.
Bytes    forward 2 passes over [N, D] (read x, write y), backward 3 (read g, x; write dx); dw and db add no pass (see
         common/row_reduction.py) and cost nothing where they are not wanted. [8192, 4096] in bf16 on an H200: 31 and 47 µs.
Sources  Ba, Kiros & Hinton, "Layer normalization", 2016; the derivation is ours.
"""

import torch
from torch import Tensor

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import compute_dtype, launch, rows, triton_op
from sloth.kernels.common.row_reduction import Tuning, check_vectors, raise_on_double_backward, sum_partials, sum_rows

FORWARD = Tuning(tile=2048, per_warp=512)
BACKWARD = Tuning(tile=2048, per_warp=512)  # dx alone
BACKWARD_DW = Tuning(tile=2048, per_warp=512, programs=2, stages=3)  # with dw or db


# ---------------------------------------------------------------- Triton


@triton.jit
def _forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, x_stride, N,
    D: tl.constexpr, EPS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows, each in registers, so that the variance is of centred values. Pointers of absent tensors are never read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < N) & (col < D)
    x = tl.load(x_ptr + row * x_stride + col, mask, 0.0).to(tl.float32)
    mean = tl.sum(x, 1, keep_dims=True) / D
    x = tl.where(col < D, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
    y = x * rstd
    if HAS_W:
        y *= tl.load(w_ptr + col, col < D, 0.0).to(tl.float32)
    if HAS_B:
        y += tl.load(b_ptr + col, col < D, 0.0).to(tl.float32)
    tl.store(y_ptr + row * D + col, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + row, mean, row < N)
    tl.store(rstd_ptr + row, rstd, row < N)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, dy_stride, x_stride, N,
    D: tl.constexpr, HAS_W: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of ROWS rows; its share of dw, db goes to row program_id of the partial buffers [P, D]."""
    col = tl.arange(0, BLOCK)[None, :]
    if HAS_W and NEED_DX:
        w = tl.load(w_ptr + col, col < D, 0.0).to(tl.float32)
    if NEED_DW:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    if NEED_DB:
        db = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (row < N) & (col < D)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask, 0.0).to(tl.float32)
        if NEED_DB:
            db += dy
        if NEED_DX or NEED_DW:
            rstd = tl.load(rstd_ptr + row, row < N, 0.0)
            x = tl.load(x_ptr + row * x_stride + col, mask, 0.0).to(tl.float32)
            x = (x - tl.load(mean_ptr + row, row < N, 0.0)) * rstd  # masked columns do not matter: dy is 0 there
            if NEED_DW:
                dw += dy * x
            if NEED_DX:
                if HAS_W:
                    dy *= w
                dx = rstd * (dy - tl.sum(dy, 1, keep_dims=True) / D - x * (tl.sum(dy * x, 1, keep_dims=True) / D))
                tl.store(dx_ptr + row * D + col, dx.to(dx_ptr.dtype.element_ty), mask)
    part = tl.program_id(0).to(tl.int64) * D + col
    if NEED_DW:
        tl.store(dw_ptr + part, tl.sum(dw, 0)[None, :], col < D)
    if NEED_DB:
        tl.store(db_ptr + part, tl.sum(db, 0)[None, :], col < D)


def forward_triton(x, weight, bias, eps: float):
    """(y, mean [..., 1], rstd [..., 1]) by Triton."""
    D = x.shape[-1]
    x_ND = rows(x)
    N = x_ND.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device) for _ in range(2))
    tile_rows, block, warps = FORWARD.block(D)
    launch(_forward_kernel)[(FORWARD.grid(N, D, x.device),)](
        x_ND, x_ND if weight is None else weight.contiguous(), x_ND if bias is None else bias.contiguous(), y, mean, rstd,
        x_ND.stride(0), N, D, eps, weight is not None, bias is not None, tile_rows, block, num_warps=warps,
    )  # fmt: skip
    return y, mean, rstd


def backward_triton(dy, x, weight, mean, rstd, bias_dtype, need_dx: bool, need_dw: bool, need_db: bool):
    """(dx, dw, db) by Triton, None where not needed. bias_dtype: dtype of db."""
    D = x.shape[-1]
    x_ND, dy_ND = rows(x), rows(dy)
    N = x_ND.shape[0]
    tuning = BACKWARD_DW if need_dw or need_db else BACKWARD
    tile_rows, block, warps = tuning.block(D)
    programs = tuning.grid(N, D, x.device)
    stages = tuning.depth(D * (x.element_size() + dy.element_size()), D)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    dw, db = (torch.empty(programs, D, dtype=torch.float32, device=x.device) if need else None for need in (need_dw, need_db))
    launch(_backward_kernel)[(programs,)](
        dy_ND, x_ND, x_ND if weight is None else weight.contiguous(), mean.reshape(-1), rstd.reshape(-1),
        *(x_ND if out is None else out for out in (dx, dw, db)), dy_ND.stride(0), x_ND.stride(0), N,
        D, weight is not None, need_dx, need_dw, need_db, tile_rows, block, stages, num_warps=warps,
    )  # fmt: skip
    return dx, sum_partials(dw, weight.dtype) if need_dw else None, sum_partials(db, bias_dtype) if need_db else None


# ---------------------------------------------------------------- ATen


def forward_aten(x, weight, bias, eps: float):
    """As forward_triton."""
    dtype = compute_dtype(*(t for t in (x, weight, bias) if t is not None))
    x_ = x.to(dtype)
    mean = x_.mean(-1, keepdim=True)
    centred = x_ - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype, memory_format=torch.contiguous_format).contiguous(), mean, rstd


def backward_aten(dy, x, weight, mean, rstd, bias_dtype, need_dx: bool, need_dw: bool, need_db: bool):
    """As backward_triton."""
    dtype = rstd.dtype
    g = dy.to(dtype)
    hat = (x.to(dtype) - mean) * rstd
    dx = dw = db = None
    if need_dx:
        m = g if weight is None else g * weight.to(dtype)
        dx = rstd * (m - m.mean(-1, keepdim=True) - hat * (m * hat).mean(-1, keepdim=True))
        dx = dx.to(x.dtype)
    if need_dw:
        dw = sum_rows(g * hat).to(weight.dtype)
    if need_db:
        db = sum_rows(g).to(bias_dtype)
    return dx, dw, db


# ---------------------------------------------------------------- operators


forward_for = implementations("sloth::layer_norm_forward", triton=forward_triton, aten=forward_aten)
backward_for = implementations("sloth::layer_norm_backward", triton=backward_triton, aten=backward_aten)


@triton_op("sloth::layer_norm_forward", "layer_norm")
def _layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)"""
    check_vectors("layer_norm", x, weight=weight, bias=bias)
    return forward_for(x, weight, bias)(x, weight, bias, eps)


@triton_op("sloth::layer_norm_backward", "layer_norm")
def _layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, bias_dtype: torch.dtype,
    need_dx: bool, need_dw: bool, need_db: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dw, db], without what is not needed."""
    results = backward_for(dy, x, rstd)(dy, x, weight, mean, rstd, bias_dtype, need_dx, need_dw, need_db)
    return [t for t in results if t is not None]


def _setup(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = x.dtype if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _vjp(ctx, dy, *_):
    needed = ctx.needs_input_grad[:3]
    if dy is None or not any(needed):
        return None, None, None, None
    found = iter(torch.ops.sloth.layer_norm_backward(dy, *ctx.saved_tensors, ctx.bias_dtype, *needed))
    return *(next(found) if need else None for need in needed), None


torch.library.register_autograd("sloth::layer_norm_forward", _vjp, setup_context=_setup)
torch.library.register_autograd("sloth::layer_norm_backward", raise_on_double_backward)

# What models call: the operator above without mean and rstd, which only the backward pass wants.
_SCHEMA = "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor"
torch.library.define("sloth::layer_norm", _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl("sloth::layer_norm", "CompositeImplicitAutograd")
def layer_norm_composite(x, weight, bias, eps):
    return torch.ops.sloth.layer_norm_forward(x, weight, bias, eps)[0]


layer_norm = torch.ops.sloth.layer_norm.default
"""layer_norm(x [..., D], weight [D] or None, bias [D] or None, eps) -> y [..., D]"""


# ---------------------------------------------------------------- for compilation without a GPU (tests)

_FORWARD_ARGS = dict.fromkeys(("x_ptr", "w_ptr", "b_ptr", "y_ptr"), "*bf16") | dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32")
_BACKWARD_ARGS = dict.fromkeys(("dy_ptr", "x_ptr", "w_ptr", "dx_ptr"), "*bf16") | dict.fromkeys(
    ("mean_ptr", "rstd_ptr", "dw_ptr", "db_ptr"), "*fp32"
)
_STRIDES = dict.fromkeys(("dy_stride", "x_stride", "N"), "i32")
_WIDE, _NARROW = {"D": 4096, "ROWS": 1, "BLOCK": 4096}, {"D": 100, "ROWS": 16, "BLOCK": 128}
_ALL = {"HAS_W": True, "NEED_DX": True, "NEED_DW": True, "NEED_DB": True, "STAGES": 3}
COMPILE = [
    (_forward_kernel, _FORWARD_ARGS | {"x_stride": "i32", "N": "i32"}, _WIDE | {"EPS": 1e-5, "HAS_W": True, "HAS_B": True}),
    (_forward_kernel, _FORWARD_ARGS | {"x_stride": "i32", "N": "i32"}, _NARROW | {"EPS": 1e-5, "HAS_W": False, "HAS_B": False}),
    (_backward_kernel, _BACKWARD_ARGS | _STRIDES, _WIDE | _ALL),
    (_backward_kernel, _BACKWARD_ARGS | _STRIDES, _NARROW | _ALL | {"NEED_DW": False, "NEED_DB": False, "STAGES": 1}),
]
