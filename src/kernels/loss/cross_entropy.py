"""Cross-entropy of logits that are already there, with soft-capping and scaling.

Shapes   logits [..., V] in any float dtype, target [...] int64 with as many elements as logits has rows (N); ignored rows have
         target = ignore_index.

Forward  z = scale · logits, and z = softcap · tanh(z / softcap) where there is a soft cap; for row n with target t
             m = max_j z_j,   l = Σ_j e^(z_j − m),   lse = m + log l
             nll = lse − z_t = log l + (m − z_t)            (this order keeps small losses exact)
         loss = Σ nll over the rows that count (÷ their number for "mean"; nan where there are none, as in PyTorch).
         One pass: every lane keeps m and l of the columns it has seen; when m rises to m', l is scaled by e^(m − m').
         (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018.)

Backward For one row that counts, with G = ∂L/∂loss (÷ number of rows for "mean"):
             ∂lse/∂z_j = e^(z_j − m)/l = e^(z_j − lse)               the softmax
             ∂nll/∂z_j = e^(z_j − lse) − [j = t]
             ∂z_j/∂logit_j = scale · tanh'(scale·logit_j/softcap)     tanh' = 1 − tanh²; without soft cap: scale
             dlogit_j = G · (e^(z_j − lse) − [j = t]) · ∂z_j/∂logit_j
         Ignored rows are exactly 0.

Saved    the logits (which the matmul before produced), target, and per row lse and its rounding error lse_low, in fp32: lse alone
         would leave e^(z − lse) an error of ε·|lse|, some ten times that of eager's log-softmax. No softmax is saved.
Bytes    forward reads the logits once, backward reads them and writes the gradient, a new tensor: the floor is
         3·N·V·itemsize over the copy rate.

A target out of range: PyTorch's "index out of bounds" error in eager code on the CPU; on a GPU the row's loss and gradient are
nan, and its lse; nothing is read out of bounds, and nothing waits for the device.
"""

import torch
from torch import Tensor

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import compiling, compute_dtype, launch, rows, triton_op

# Tuning. Forward, one program a row: a step of its walk takes FORWARD_UNROLL × FORWARD_LANES columns. With 8 lanes (16 bytes of
# bf16) to a thread, that is FORWARD_LANES = 256 · FORWARD_WARPS, the reduction over UNROLL stays inside a thread.
# STAGES: steps whose loads are in flight (software pipelining).
FORWARD_LANES, FORWARD_UNROLL, FORWARD_WARPS, FORWARD_STAGES = 2048, 4, 8, 1
# Backward: columns and warps of a program.
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 8

REDUCTIONS = ("mean", "sum")


# ---------------------------------------------------------------- Triton


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """e^x, fp32, x ≤ 0. tl.exp is 2^(x·log₂e) with the rounded product, an error of ε·|x|, which shows where the input has fp32's
    precision: EXACT multiplies the rounding error of the product back in."""
    if EXACT:
        x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)  # e^−150 is 0; −∞ would give nan below
        y = x * 1.4426950216293335
        low = tl.fma(x, 1.4426950216293335, -y) + x * 1.9259629911266175e-08  # log₂e in two parts
        return tl.exp2(y) * (1 + low * 0.6931471805599453)
    else:
        return tl.exp(x)


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """tanh and its derivative, fp32: with e = e^(−2|x|), |tanh| = (1 − e)/(1 + e) and tanh' = 4e/(1 + e)², which, other than
    1 − tanh², stays right where tanh is nearly 1. (1 − e) cancels near 0: EXACT takes a polynomial there (Chebyshev fit)."""
    e = _exp(-2 * tl.abs(x), EXACT)
    r = 1 / (1 + e)
    t = (1 - e) * r
    t = tl.where(x < 0, -t, t)
    if EXACT:
        s = x * x
        p = s * (-0.008323187058278775 + s * 0.002269501684162354)
        p = s * (-0.0539584616274522 + s * (0.021762502907359264 + p))
        p = x + x * s * (-0.33333333149374506 + s * 0.13333300146188914 + s * p)
        t = tl.where(s < 0.4, p, t)
    return t, 4 * e * r * r


@triton.jit
def _capped(x, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """z and ∂z/∂logit of raw logits, fp32."""
    z = x.to(tl.float32) * SCALE
    if SOFTCAP is not None:
        u = z / SOFTCAP
        t, slope = _tanh(u, EXACT)
        if not EXACT:  # of small logits (1 − e) has few digits: Taylor's series
            s = u * u
            t = tl.where(s < 0.01, u + u * s * (-1 / 3 + s * (2 / 15)), t)
        return SOFTCAP * t, SCALE * slope
    else:
        return z, SCALE


@triton.jit
def _forward_kernel(
    x_ptr, target_ptr, weight_ptr, nll_ptr, lse_ptr, low_ptr, spread_ptr, x_stride, V,
    IGNORE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SPREAD: tl.constexpr, WEIGHTED: tl.constexpr,
    EVERY: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row: nll, lse and lse_low; all 0 and the logits not read where it is ignored. EVERY: its lse even then.
    SPREAD: also Σ_j w_j (z_j − z_target), w_j = 1 unless WEIGHTED.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    target = tl.load(target_ptr + row)
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    offset = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full((LANES,), -3.4028234663852886e38, tl.float32)  # finite: −∞ − (−∞) would be nan
    total = tl.zeros((LANES,), tl.float32)
    spread = tl.zeros((LANES,), tl.float32)
    inside = (target >= 0) & (target < V)
    z_t, _slope_t = _capped(tl.load(x_row + target, inside, other=0.0), SCALE, SOFTCAP, EXACT)  # a name is of one type
    wanted = (target != IGNORE) | EVERY
    if wanted:
        for start in tl.range(0, V, UNROLL * LANES, num_stages=STAGES):
            col = start + offset
            z, _ = _capped(tl.load(x_row + col, col < V, other=float("-inf")), SCALE, SOFTCAP, EXACT)
            if SOFTCAP is not None or SCALE <= 0:
                z = tl.where(col < V, z, float("-inf"))
            higher = tl.maximum(peak, tl.max(z, 0))
            total = total * _exp(peak - higher, EXACT) + tl.sum(_exp(z - higher[None, :], EXACT), 0)
            peak = higher
            if SPREAD:
                distance = tl.where(col < V, z - z_t, 0.0)
                if WEIGHTED:
                    distance *= tl.load(weight_ptr + col, col < V, other=0.0).to(tl.float32)
                spread += tl.sum(distance, 0)
    ignored = target == IGNORE
    m = tl.max(peak, 0)
    log_l = tl.log(tl.sum(total * _exp(peak - m, EXACT), 0))
    nll = tl.where(inside, log_l + (m - z_t), float("nan"))
    lse = tl.where(inside | ignored, m + log_l, float("nan"))  # so the row's gradient is nan too
    tl.store(nll_ptr + row, tl.where(ignored, 0.0, nll))
    tl.store(lse_ptr + row, tl.where(wanted, lse, 0.0))
    tl.store(low_ptr + row, tl.where(wanted, (m - lse) + log_l, 0.0))
    if SPREAD:
        tl.store(spread_ptr + row, tl.where(ignored, 0.0, tl.sum(spread, 0)))


@triton.jit
def _backward_kernel(
    dloss_ptr, x_ptr, target_ptr, lse_ptr, low_ptr, count_ptr, dx_ptr, x_stride, V, first,
    IGNORE: tl.constexpr, MEAN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row; neighbouring programs work on neighbouring memory. The V columns are those from `first` on."""
    blocks = tl.cdiv(V, BLOCK)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    col = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = col < V
    target = tl.load(target_ptr + row)
    dx = tl.zeros((BLOCK,), tl.float32)
    if target != IGNORE:
        G = tl.load(dloss_ptr).to(tl.float32)
        if MEAN:
            G = G / tl.load(count_ptr).to(tl.float32)
        EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
        z, slope = _capped(tl.load(x_ptr + row * x_stride + col, mask, other=0.0), SCALE, SOFTCAP, EXACT)
        p = _exp((z - tl.load(lse_ptr + row)) - tl.load(low_ptr + row), EXACT)
        dx = (G * slope) * tl.where(first + col == target, p - 1, p)
    tl.store(dx_ptr + row * V + col, dx.to(dx_ptr.dtype.element_ty), mask)


def forward_triton(
    logits, target, ignore_index: int, softcap, scale: float,
    spread: bool = False, weight: Tensor | None = None, every: bool = False,
):  # fmt: skip
    """nll, lse, lse_low, each [N] fp32, 0 for ignored rows. For loss_terms.py: `spread`, then the last result
    is Σ_j w_j (z_j − z_target) of `weight`, or of ones; `every`: lse and lse_low of ignored rows too.
    """
    x_NV, target_N = rows(logits), target.reshape(-1).contiguous()
    N, V = x_NV.shape
    nll, lse, low, *more = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(3 + spread))
    launch(_forward_kernel)[(N,)](
        x_NV, target_N, x_NV if weight is None else weight.contiguous(), nll, lse, low, more[0] if spread else nll,
        x_NV.stride(0), V, IGNORE=ignore_index, SCALE=scale, SOFTCAP=softcap, SPREAD=spread, WEIGHTED=weight is not None,
        EVERY=every, LANES=FORWARD_LANES, UNROLL=FORWARD_UNROLL, STAGES=FORWARD_STAGES, num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return nll, lse, low, *more


def backward_triton(
    dloss, logits, target, lse, low, count, ignore_index: int, mean: bool, softcap, scale: float,
    out: Tensor | None = None, first: int = 0,
):  # fmt: skip
    """dlogits, contiguous, in logits' dtype; into `out`, which may be the logits themselves where they are contiguous.
    `first`: the logits are columns of a vocabulary from there on.
    """
    x_NV, target_N = rows(logits), target.reshape(-1).contiguous()
    N, V = x_NV.shape
    dx = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    launch(_backward_kernel)[(N * ((V + BACKWARD_BLOCK - 1) // BACKWARD_BLOCK),)](
        dloss, x_NV, target_N, lse, low, count, dx, x_NV.stride(0), V, first,
        IGNORE=ignore_index, MEAN=mean, SCALE=scale, SOFTCAP=softcap, BLOCK=BACKWARD_BLOCK, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return dx


# ---------------------------------------------------------------- ATen


def _capped_aten(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    z = logits.to(compute_dtype(logits))
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def capped_with_slope(logits: Tensor, softcap: float | None, scale: float) -> tuple[Tensor, Tensor | float]:
    """z and ∂z/∂logit."""
    z = _capped_aten(logits, softcap, scale)
    if softcap is None:
        return z, scale
    e = torch.exp(logits.to(z.dtype).abs() * (-2 * abs(scale) / softcap))
    r = 1 / (1 + e)
    return z, 4 * scale * e * r * r


def forward_aten(
    logits, target, ignore_index: int, softcap, scale: float,
    spread: bool = False, weight: Tensor | None = None, every: bool = False,
):  # fmt: skip
    """As forward_triton."""
    z_NV = _capped_aten(logits.reshape(-1, logits.shape[-1]), softcap, scale)
    target_N = target.reshape(-1)
    counts = target_N != ignore_index
    m = z_NV.amax(-1)
    log_l = (z_NV - m.unsqueeze(-1)).exp().sum(-1).log()
    z_t = z_NV.gather(-1, torch.where(counts, target_N, 0).unsqueeze(-1)).squeeze(-1)
    lse = m + log_l
    statistics, low = [log_l + (m - z_t)], (m - lse) + log_l
    if spread:
        distance = z_NV - z_t.unsqueeze(-1)
        statistics.append((distance if weight is None else distance * weight.to(distance.dtype)).sum(-1))
    nll, *more = (torch.where(counts, t, 0.0) for t in statistics)
    if not every:
        lse, low = (torch.where(counts, t, 0.0) for t in (lse, low))
    return nll, lse, low, *more


def backward_aten(
    dloss, logits, target, lse, low, count, ignore_index: int, mean: bool, softcap, scale: float,
    out: Tensor | None = None, first: int = 0,
):  # fmt: skip
    """As backward_triton, but never into `out`. Without `low`, which matters to fp32 alone, it reads less for each element."""
    V = logits.shape[-1]
    z_NV, slope = capped_with_slope(logits.reshape(-1, V), softcap, scale)
    target_N1 = target.reshape(-1, 1)
    G = dloss.to(z_NV.dtype)
    G = G / count if mean else G
    z_NV = z_NV - lse.unsqueeze(-1)
    p = torch.exp(z_NV if low is None else z_NV - low.unsqueeze(-1))
    dz = p - (torch.arange(first, first + V, device=logits.device) == target_N1).to(p.dtype)
    return torch.where(target_N1 != ignore_index, (G * slope) * dz, 0.0).to(logits.dtype).reshape(logits.shape)


# ---------------------------------------------------------------- operators


forward_for = implementations(
    "sloth::cross_entropy_forward", "sloth::cross_entropy_terms_forward", triton=forward_triton, aten=forward_aten
)
backward_for = implementations("sloth::cross_entropy_backward", triton=backward_triton, aten=backward_aten)


@triton_op("sloth::cross_entropy_forward", "cross_entropy")
def _cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, lse_low, count)"""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    n_rows = logits.numel() // logits.shape[-1]
    torch._check(target.numel() == n_rows, lambda: f"{n_rows} rows of logits, but {target.numel()} targets")
    nll, lse, low = forward_for(logits)(logits, target, ignore_index, softcap, scale)
    count = (target != ignore_index).sum()
    loss = nll.sum()
    return loss / count if reduction == "mean" else loss, lse, low, count


@triton_op("sloth::cross_entropy_backward", "cross_entropy")
def _cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    count: Tensor,
    ignore_index: int,
    reduction: str,
    softcap: float | None,
    scale: float,
) -> Tensor:
    how = ignore_index, reduction == "mean", softcap, scale
    if compiling() and logits.itemsize == 2:
        # Inductor writes one kernel of these formulas, over logits that nobody needs any more.
        return backward_aten(dloss, logits, target, lse, None, count, *how)
    return backward_for(logits)(dloss, logits, target, lse, lse_low, count, *how)


def _setup(ctx, inputs, output):
    logits, target, *ctx.how = inputs
    _, lse, low, count = output
    ctx.save_for_backward(logits, target, lse, low, count)
    ctx.mark_non_differentiable(lse, low, count)
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    dlogits = None
    if dloss is not None:
        dlogits = torch.ops.sloth.cross_entropy_backward.default(dloss, *ctx.saved_tensors, *ctx.how)
    return dlogits, None, None, None, None, None


_cross_entropy_forward.register_autograd(_backward, setup_context=_setup)

# What models call: the operator above without lse_low, which only the backward pass wants.
torch.library.define(
    "sloth::cross_entropy",
    '(Tensor logits, Tensor target, int ignore_index=-100, str reduction="mean", float? softcap=None, float scale=1.0,'
    " ScalarType? loss_dtype=None) -> (Tensor loss, Tensor lse, Tensor count)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::cross_entropy", "CompositeImplicitAutograd")
def cross_entropy_composite(logits, target, ignore_index=-100, reduction="mean", softcap=None, scale=1.0, loss_dtype=None):
    loss, lse, _, count = torch.ops.sloth.cross_entropy_forward.default(logits, target, ignore_index, reduction, softcap, scale)
    return loss.to(loss_dtype or loss.dtype), lse, count


cross_entropy = torch.ops.sloth.cross_entropy.default
"""cross_entropy(logits [..., V], target [...] int64, ignore_index=-100, reduction="mean", softcap=None, scale=1.0,
loss_dtype=None) -> (loss [] , lse [N], count [] int64); lse in fp32, fp64 for fp64 logits, and so the loss if no dtype is given.
Only loss is differentiable."""


# ---------------------------------------------------------------- compiled for every target by the tests


def _compile_case(kernel, softcap: float | None, warps: int):
    types = dict(target_ptr="*i64", count_ptr="*i64", x_ptr="*bf16", dx_ptr="*bf16", weight_ptr="*bf16")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name.endswith("_ptr")}
    constants = dict(IGNORE=-100, SCALE=1.0, SOFTCAP=softcap, MEAN=True, BLOCK=BACKWARD_BLOCK)
    constants |= dict(
        SPREAD=softcap is not None,
        WEIGHTED=softcap is not None,
        EVERY=False,
        LANES=FORWARD_LANES,
        UNROLL=FORWARD_UNROLL,
        STAGES=FORWARD_STAGES,
    )
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    sizes = [name for name in ("x_stride", "V", "first") if name in kernel.arg_names]
    return kernel, signature | dict.fromkeys(sizes, "i32"), constants, {"num_warps": warps}


COMPILE = [
    _compile_case(kernel, softcap, warps)
    for kernel, warps in ((_forward_kernel, FORWARD_WARPS), (_backward_kernel, BACKWARD_WARPS))
    for softcap in (None, 30.0)
]
