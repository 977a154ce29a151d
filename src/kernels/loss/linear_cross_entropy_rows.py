"""Head and the cross-entropy of each row (reduction="none"), of logits that never exist all at once.

    logits = h Wᵀ + b      loss_n = row n's loss of loss_terms.py, without z-loss; 0 for ignored rows

Shapes   as in linear_cross_entropy.py; loss in fp32, in target's shape.
Forward  chunks of rows, a matmul and the statistics of each. There is no ∂L/∂loss_n yet, and no gradient can be made without.
Backward with G_n = ∂L/∂loss_n, chunk by chunk: the logits again, their gradient dz_n = G_n ∂loss_n/∂logits_n in their place, and
             dh = dz W          dW = Σ dzᵀ h          db = Σ_rows dz
         In low precision dz is made 2^−k times larger, 2^k the power of two at max |G_n|: the gradients of a mean over many rows
         would vanish. dh, dW and db are added up in fp32, multiplied by 2^k and rounded once.
Saved    per row lse and lse_low; no logits and no gradient. Of four matmuls one is done twice; the mean's operator knows G up to
         a factor, makes its gradients in the forward pass, and needs three.
"""

import torch
from torch import Tensor

from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.launch import compute_dtype, without_autocast
from sloth.kernels.common.row_reduction import raise_on_double_backward
from sloth.kernels.linear.gemm import add_product, as_matrix, product
from sloth.kernels.loss import loss_terms
from sloth.kernels.loss.cross_entropy import forward_for
from sloth.kernels.loss.linear_cross_entropy import BUDGET, check, chunk_rows, logits_of
from sloth.kernels.loss.loss_terms import Terms

HOW = "int ignore_index, float? softcap, float scale, float label_smoothing, int budget"


def _chunks(h_NH: Tensor, weight: Tensor, budget: int) -> tuple[Tensor, list[slice]]:
    """A buffer for the logits of a chunk, and the chunks."""
    N, V = len(h_NH), len(weight)
    C = chunk_rows(N, V, h_NH.element_size(), budget or BUDGET.get(h_NH.device.type, BUDGET["cpu"]))
    return h_NH.new_empty(C * V), [slice(start, start + C) for start in range(0, N, C)]


torch.library.define(
    "sloth::linear_cross_entropy_rows_forward",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, {HOW})"
    " -> (Tensor loss, Tensor lse, Tensor lse_low)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::linear_cross_entropy_rows_forward", "CompositeExplicitAutograd")
@falls_back("sloth::linear_cross_entropy_rows_forward", "linear_cross_entropy_rows")
def linear_cross_entropy_rows_forward_impl(
    hidden, weight, bias, target, class_weight, ignore_index, softcap, scale, label_smoothing, budget
):
    check(hidden, weight, bias, target, None, "sum", class_weight, label_smoothing)
    h_NH, target_N, terms = as_matrix(hidden), target.reshape(-1), Terms(label_smoothing, class_weight, 0.0)
    out = hidden.new_empty(3, len(h_NH), dtype=compute_dtype(hidden))
    w_N = terms.weight_of(target_N, ignore_index, out.dtype)
    forward = forward_for(hidden)
    buffer, chunks = _chunks(h_NH, weight, budget)
    for rows in chunks:
        z = logits_of(h_NH[rows], weight, bias, buffer)
        how = ignore_index, softcap, scale, label_smoothing != 0, class_weight
        nll, lse, low, *spread = forward(z, target_N[rows], *how)
        out[0, rows] = terms.rows(nll, *(spread or [None]), w_N[rows], len(weight))
        out[1, rows], out[2, rows] = lse, low
    return tuple(t.clone() for t in out)


@torch.library.register_fake("sloth::linear_cross_entropy_rows_forward")
def linear_cross_entropy_rows_forward_fake(
    hidden, weight, bias, target, class_weight, ignore_index, softcap, scale, label_smoothing, budget
):
    check(hidden, weight, bias, target, None, "sum", class_weight, label_smoothing)
    return tuple(hidden.new_empty(hidden.numel() // hidden.shape[-1], dtype=compute_dtype(hidden)) for _ in range(3))


torch.library.define(
    "sloth::linear_cross_entropy_rows_backward",
    "(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor lse, Tensor lse_low,"
    f" {HOW}, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::linear_cross_entropy_rows_backward", "CompositeExplicitAutograd")
@falls_back("sloth::linear_cross_entropy_rows_backward", "linear_cross_entropy_rows")
def linear_cross_entropy_rows_backward_impl(
    dloss, hidden, weight, bias, target, class_weight, lse, low, ignore_index, softcap, scale, label_smoothing, *more
):
    budget, need_h, need_w, need_b = more
    h_NH, target_N, terms = as_matrix(hidden), target.reshape(-1), Terms(label_smoothing, class_weight, 0.0)
    (N, H), V, wide = h_NH.shape, len(weight), compute_dtype(hidden)
    counts = target_N != ignore_index
    peak = torch.where(counts, dloss, 0).abs().amax() if N else dloss.new_ones(())
    unit = torch.exp2(peak.log2().floor()).nan_to_num(nan=1.0, posinf=1.0).clamp(min=2.0**-60)
    w_N = terms.weight_of(target_N, ignore_index, wide)
    numbers = terms.coefficients(dloss / unit, 0.0, lse, w_N, counts, V)
    dh = hidden.new_empty(N if need_h else 0, H)
    dw, db = (hidden.new_zeros(V if needed else 0, *size, dtype=wide) for needed, size in ((need_w, (H,)), (need_b, ())))
    backward = loss_terms.backward_for(hidden)
    buffer, chunks = _chunks(h_NH, weight, budget)
    for rows in chunks:
        z = logits_of(h_NH[rows], weight, bias, buffer)
        which = target_N[rows], class_weight, lse[rows], low[rows]
        dz = backward(numbers[:, rows].contiguous(), z, *which, ignore_index, softcap, scale, 0, V)
        if need_h:
            part = hidden.new_empty(len(dz), H, dtype=wide)
            product(dz, weight, part)
            dh[rows] = part * unit
        if need_w:
            add_product(dz.t(), h_NH[rows], dw)
        if need_b:
            db += dz.sum(0, dtype=wide)
    return dh.view(hidden.shape) if need_h else dh, (dw * unit).to(weight.dtype), (db * unit).to(weight.dtype)


@torch.library.register_fake("sloth::linear_cross_entropy_rows_backward")
def linear_cross_entropy_rows_backward_fake(
    dloss, hidden, weight, bias, target, class_weight, lse, low, ignore_index, softcap, scale, label_smoothing, *more
):
    _, need_h, need_w, need_b = more
    (V, H), like = weight.shape, hidden.new_empty
    return like(hidden.shape if need_h else (0, H)), like(V if need_w else 0, H), like(V if need_b else 0)


def _setup(ctx, inputs, output):
    hidden, weight, bias, target, class_weight, *ctx.how = inputs
    ctx.save_for_backward(hidden, weight, bias, target, class_weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 10
    need = ctx.needs_input_grad[:3]
    found = torch.ops.sloth.linear_cross_entropy_rows_backward.default(dloss, *ctx.saved_tensors, *ctx.how, *need)
    return *(d if needed else None for d, needed in zip(found, need, strict=True)), *[None] * 7


torch.library.register_autograd("sloth::linear_cross_entropy_rows_forward", _backward, setup_context=_setup)
torch.library.register_autograd("sloth::linear_cross_entropy_rows_backward", raise_on_double_backward)

torch.library.define(
    "sloth::linear_cross_entropy_rows",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias=None, Tensor? class_weight=None, int ignore_index=-100,"
    " float? softcap=None, float scale=1.0, float label_smoothing=0.0, int budget=0, ScalarType? loss_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::linear_cross_entropy_rows", "CompositeImplicitAutograd")
def linear_cross_entropy_rows_composite(
    hidden, weight, target, bias=None, class_weight=None, ignore_index=-100, softcap=None, scale=1.0, label_smoothing=0.0,
    budget=0, loss_dtype=None,
):  # fmt: skip
    how = ignore_index, softcap, scale, label_smoothing, budget
    with without_autocast(hidden):
        loss, *_ = torch.ops.sloth.linear_cross_entropy_rows_forward.default(hidden, weight, bias, target, class_weight, *how)
    return loss.to(loss_dtype or loss.dtype).view(target.shape)


linear_cross_entropy_rows = torch.ops.sloth.linear_cross_entropy_rows.default
"""linear_cross_entropy_rows(hidden [..., H], weight [V, H], target [...] int64, bias=None, class_weight=None, ignore_index=-100,
softcap=None, scale=1.0, label_smoothing=0.0, budget=0, loss_dtype=None) -> loss [...]. budget: bytes of logits at a time, 0 for a
good number. loss_dtype: fp32 (fp64 for fp64) if not given."""
