"""Cross-entropy of logits that are already there, with what a loss may add to it (loss_terms.py), or of each row.

Shapes   logits [..., V], target [...] int64 with as many elements as logits has rows (N), class_weight [V] or None.
         loss [] for "mean" and "sum", in target's shape for "none", which knows no z-loss.
Forward  the statistics of cross_entropy.py in one pass over the logits, then row and loss of loss_terms.py.
Backward its coefficients of each row, of G = ∂L/∂loss over what the rows are divided by ("none": of each row's own), and
             dlogit_j = (a p_j − b [j = t] − u w_j) · ∂z_j/∂logit_j
Saved    the logits, target, class_weight, and per row lse and lse_low in fp32. No softmax.
Bytes    as in cross_entropy.py: the floor is 3·N·V·itemsize over the copy rate.
"""

import torch
from torch import Tensor

from sloth.kernels.common.launch import compute_dtype, triton_op
from sloth.kernels.linear.gemm import as_matrix
from sloth.kernels.loss import loss_terms
from sloth.kernels.loss.cross_entropy import forward_for
from sloth.kernels.loss.loss_terms import Terms

REDUCTIONS = ("mean", "sum", "none")


def _check(logits, target, class_weight, reduction, label_smoothing, z_loss) -> None:
    if reduction not in REDUCTIONS or reduction == "none" and z_loss:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, the last without z-loss, got {reduction!r}")
    V, rows = logits.shape[-1], logits.numel() // logits.shape[-1]  # of a shape numel() is a constant
    torch._check(target.numel() == rows, lambda: f"{rows} rows of logits, but {target.numel()} targets")
    torch._check(class_weight is None or class_weight.shape == (V,), lambda: f"{V} words, and weights of other classes")
    torch._check(0 <= label_smoothing <= 1, lambda: f"label_smoothing must be in [0, 1], got {label_smoothing}")


@triton_op("sloth::cross_entropy_terms_forward", "cross_entropy_terms")
def _cross_entropy_terms_forward(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str, softcap: float | None,
    scale: float, label_smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, lse, lse_low)"""
    _check(logits, target, class_weight, reduction, label_smoothing, z_loss)
    terms, target_N = Terms(label_smoothing, class_weight, z_loss), target.reshape(-1)
    w_N = terms.weight_of(target_N, ignore_index, compute_dtype(logits))
    how = ignore_index, softcap, scale, label_smoothing != 0, class_weight, z_loss != 0
    nll, lse, low, *spread = forward_for(logits)(logits, target_N, *how)
    row = terms.rows(nll, *(spread or [None]), w_N, logits.shape[-1])
    if reduction == "none":
        return row, lse, low
    loss = row.sum() / w_N.sum() if reduction == "mean" else row.sum()
    return loss + z_loss * lse.square().mean() if z_loss else loss, lse, low


@triton_op("sloth::cross_entropy_terms_backward", "cross_entropy_terms")
def _cross_entropy_terms_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, class_weight: Tensor | None, lse: Tensor, lse_low: Tensor, ignore_index: int,
    reduction: str, softcap: float | None, scale: float, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    terms, x_NV, target_N = Terms(label_smoothing, class_weight, z_loss), as_matrix(logits), target.reshape(-1)
    (N, V), counts = x_NV.shape, target_N != ignore_index
    w_N = terms.weight_of(target_N, ignore_index, lse.dtype)
    G = dloss.to(lse.dtype)
    numbers = terms.coefficients(G / w_N.sum() if reduction == "mean" else G, G / N if z_loss else 0.0, lse, w_N, counts, V)
    given = numbers, x_NV, target_N, class_weight, lse, lse_low, ignore_index, softcap, scale, 0, V
    backward = loss_terms.backward_for(logits)
    out = None if backward is loss_terms.backward_aten else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return backward(*given, out).reshape(logits.shape)


def _setup(ctx, inputs, output):
    logits, target, class_weight, *ctx.how = inputs
    ctx.save_for_backward(logits, target, class_weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 9
    return torch.ops.sloth.cross_entropy_terms_backward.default(dloss, *ctx.saved_tensors, *ctx.how), *[None] * 8


_cross_entropy_terms_forward.register_autograd(_backward, setup_context=_setup)

torch.library.define(
    "sloth::cross_entropy_terms",
    '(Tensor logits, Tensor target, Tensor? class_weight=None, int ignore_index=-100, str reduction="mean", float? softcap=None,'
    " float scale=1.0, float label_smoothing=0.0, float z_loss=0.0, ScalarType? loss_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::cross_entropy_terms", "CompositeImplicitAutograd")
def cross_entropy_terms_composite(
    logits, target, class_weight=None, ignore_index=-100, reduction="mean", softcap=None, scale=1.0, label_smoothing=0.0,
    z_loss=0.0, loss_dtype=None,
):  # fmt: skip
    how = ignore_index, reduction, softcap, scale, label_smoothing, z_loss
    loss, *_ = torch.ops.sloth.cross_entropy_terms_forward.default(logits, target, class_weight, *how)
    return loss.to(loss_dtype or loss.dtype).view(target.shape if reduction == "none" else ())


cross_entropy_terms = torch.ops.sloth.cross_entropy_terms.default
"""cross_entropy_terms(logits [..., V], target [...] int64, class_weight [V]=None, ignore_index=-100, reduction="mean",
softcap=None, scale=1.0, label_smoothing=0.0, z_loss=0.0, loss_dtype=None) -> loss, in fp32 (fp64 for fp64) if no dtype is given.
class_weight gets no gradient."""
