"""What a loss of a head may add to the likelihood of its targets: label smoothing, class weights, a penalty on large logits.

For one row with z, lse and nll = lse − z_t of cross_entropy.py, w_j the class weights (1 without), s the smoothing, V words:

    row  = (1 − s) · w_t · nll + s/V · Σ_j w_j (lse − z_j)            as F.cross_entropy defines it; 0 where the row is ignored
           Σ_j w_j (lse − z_j) = W · nll − D      W = Σ_j w_j, D = Σ_j w_j (z_j − z_t)   (so offsets cost no precision)
    loss = Σ row / Σ w_t of the rows that count ("sum": not divided) + c/N · Σ lse² of all N rows      (z-loss: Chowdhery et al.,
           "PaLM", 2022; ignored rows count, as models write it)

Backward with p_j = ∂lse/∂z_j, and G what ∂L/∂row is (∂L/∂loss over what the sum is divided by), G' = ∂L/∂loss / N:
    ∂row/∂z_j = (1 − s) w_t (p_j − [j = t]) + s/V (W p_j − w_j)            ∂lse²/∂z_j = 2 lse p_j
    ∂L/∂z_j   = a p_j − b [j = t] − u w_j          b = G (1 − s) w_t,  u = G s/V,  a = b + u W + 2 c G' lse
a, b and u are numbers of a row: the kernel that makes ∂L/∂logits reads them and computes nothing of the above.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import launch, rows
from sloth.kernels.loss.cross_entropy import BACKWARD_BLOCK, BACKWARD_WARPS, _capped, _exp, capped_with_slope


class Terms(NamedTuple):
    """Of one call. Without any of them (`plain`) the kernels of cross_entropy.py are all there is."""

    smoothing: float
    weight: Tensor | None
    z: float

    @property
    def plain(self) -> bool:
        return not self.smoothing and self.weight is None and not self.z

    def weight_of(self, target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
        """w_t [N], 0 for rows that are ignored. A target out of range makes its loss nan by its nll."""
        counts = target != ignore_index
        if self.weight is None:
            return counts.to(dtype)
        return torch.where(counts, self.weight[target.clamp(0, len(self.weight) - 1)].to(dtype), 0)

    def sum_of_weights(self, vocabulary: int) -> Tensor | int:
        return vocabulary if self.weight is None else self.weight.sum(dtype=torch.promote_types(self.weight.dtype, torch.float32))

    def rows(self, nll: Tensor, spread: Tensor, w: Tensor, vocabulary: int) -> Tensor:
        """Each row's loss but for the z-loss, of nll and D."""
        if not self.smoothing:
            return w * nll
        smooth = self.sum_of_weights(vocabulary) * nll - spread
        return (1 - self.smoothing) * w * nll + self.smoothing / vocabulary * smooth

    def coefficients(
        self, grad: Tensor, grad_z: Tensor | float, lse: Tensor, w: Tensor, counts: Tensor, vocabulary: int
    ) -> Tensor:
        """a, b and u of each row [3, N]. grad: G, one number or one for each row; grad_z: G'."""
        grad = torch.where(counts, grad, 0)
        b, u = grad * (1 - self.smoothing) * w, grad * (self.smoothing / vocabulary)
        return torch.stack((b + u * self.sum_of_weights(vocabulary) + 2 * self.z * grad_z * lse, b, u))


@triton.jit
def _backward_kernel(
    coefficients_ptr, x_ptr, target_ptr, weight_ptr, lse_ptr, low_ptr, dx_ptr, x_stride, N, V, first, vocabulary,
    IGNORE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row, as in cross_entropy.py. A target out of range makes it nan."""
    blocks = tl.cdiv(V, BLOCK)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    col = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = col < V
    target = tl.load(target_ptr + row)
    a = tl.load(coefficients_ptr + row)
    b = tl.load(coefficients_ptr + N + row)
    u = tl.load(coefficients_ptr + 2 * N + row)
    a = tl.where((target == IGNORE) | (target >= 0) & (target < vocabulary), a, float("nan"))
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    dx = tl.zeros((BLOCK,), tl.float32)
    if (a != 0) | (b != 0) | (u != 0):  # of an ignored row nothing is read
        z, slope = _capped(tl.load(x_ptr + row * x_stride + col, mask, other=0.0), SCALE, SOFTCAP, EXACT)
        p = _exp((z - tl.load(lse_ptr + row)) - tl.load(low_ptr + row), EXACT)
        share = u
        if WEIGHTED:
            share = u * tl.load(weight_ptr + col, mask, other=0.0).to(tl.float32)
        dx = slope * (a * p - tl.where(first + col == target, b + share, share))
    tl.store(dx_ptr + row * V + col, dx.to(dx_ptr.dtype.element_ty), mask)


def backward_triton(
    coefficients, logits, target, weight, lse, low, ignore_index: int, softcap, scale, first, vocabulary, out=None
):
    """dlogits, in place of the logits [N, V] or contiguous in `out`. They are the columns from `first` on; `weight`: of these."""
    (N, V), x_NV = logits.shape, rows(logits)
    out = logits if out is None else out
    launch(_backward_kernel)[(N * ((V + BACKWARD_BLOCK - 1) // BACKWARD_BLOCK),)](
        coefficients.contiguous(), x_NV, target.contiguous(), x_NV if weight is None else weight.contiguous(), lse, low, out,
        x_NV.stride(0), N, V, first, vocabulary, IGNORE=ignore_index, SCALE=scale, SOFTCAP=softcap,
        WEIGHTED=weight is not None, BLOCK=BACKWARD_BLOCK, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return out


def backward_aten(coefficients, logits, target, weight, lse, low, ignore_index: int, softcap, scale, first, vocabulary, out=None):
    """As backward_triton, but never in place nor into `out`."""
    a, b, u = coefficients.unsqueeze(-1)
    z, slope = capped_with_slope(logits, softcap, scale)
    p = torch.exp((z - lse.unsqueeze(-1)) - low.unsqueeze(-1))
    hit = torch.arange(first, first + logits.shape[1], device=logits.device) == target.unsqueeze(-1)
    u = u if weight is None else u * weight.to(u.dtype)
    dz = slope * (a * p - torch.where(hit, b + u, u))
    return torch.where((a != 0) | (b != 0) | (u != 0).any(1, True), dz, 0).to(logits.dtype)


backward_for = implementations("sloth::cross_entropy_terms_backward", triton=backward_triton, aten=backward_aten)

COMPILE = [
    (
        _backward_kernel,
        {
            name: {"x_ptr": "*bf16", "dx_ptr": "*bf16", "target_ptr": "*i64"}.get(name, "*fp32")
            for name in _backward_kernel.arg_names[:7]
        }
        | dict.fromkeys(("x_stride", "N", "V", "first", "vocabulary"), "i32"),
        {"IGNORE": -100, "SCALE": 1.0, "SOFTCAP": None, "WEIGHTED": weighted, "BLOCK": BACKWARD_BLOCK},
        {"num_warps": BACKWARD_WARPS},
    )
    for weighted in (False, True)
]
