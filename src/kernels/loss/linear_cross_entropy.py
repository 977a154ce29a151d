"""Head and cross-entropy in one: the loss of logits that never exist all at once.

    logits = h Wᵀ + b + s t Uᵀ       loss = cross_entropy(scale or cap of logits)     (kernels/cross_entropy.py has its formulas,
                                                                             and loss_terms.py those of what may be added to it)

Shapes   h [..., H], W [V, H], b [V] or None, target [...] int64 with as many elements as h has rows (N).
Adapter  t [..., r] (`lora_a_out`) and U [V, r] (`lora_b`) of a head with a low-rank adapter, or None: t = x Aᵀ is computed
         outside, where A and x, which may be h after dropout, get their gradients of dt. W + s U A never exists.
Method   rows are taken in chunks whose logits fill `budget` bytes (Hsu et al., "Liger Kernel", 2024, chunk so too, by V/H). Each
         chunk is a matmul into the same buffer, the statistics of its rows, and, where gradients are wanted, its gradient in
         place and two more matmuls. Nothing is computed twice and nothing waits for the device.
Lean     with a budget of the user's and a trained head: dW waits for the backward pass, which takes slabs of the vocabulary whose
         logits, computed again, fill the budget for all rows. dW of a slab is then one product, and needs no copy in fp32.
Whole    in a graph that is being compiled, where all logits take no more than dW in fp32 would: a linear layer and the
         cross-entropy of its logits, whose gradient the compiler writes over them. Each product is done once, for all rows.
Backward with G = ∂L/∂loss, and dz = ∂loss/∂logits of the chunk, already made in the forward pass:
             dh = G · dz W          dW = G · Σ dzᵀ h          db = G · Σ_rows dz        dt = s G · dz U      dU = s G · Σ dzᵀ t
         In low precision dz/n would lose small probabilities (fp16) or be rounded twice: dz is made 2^k times larger, 2^k the
         next power of two of n (the rows that count, or `items`), and dh is multiplied by G/2^k at the end, in fp32.
Dtypes   logits in h's dtype, as the head alone would give them; t and U in one of their own, often fp32 where h is bf16: their
         product is then in fp32 too. Gradients are added up and kept in fp32, rounded once.
         With a budget of the user's dh and db are kept in h's dtype: a second rounding, unless G is a power of two.
Saved    dh [N, H], and dW [V, H], db [V], dt [N, r], dU [V, r] only if wanted: 4·N·H bytes where the logits were 2·N·V.
         Lean: the operands and the rows' lse in place of dW. Whole: the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sloth.kernels.common.device import device_of
from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.launch import compiling, compute_dtype, without_autocast
from sloth.kernels.common.row_reduction import raise_on_double_backward
from sloth.kernels.linear.gemm import add_product, as_matrix, product
from sloth.kernels.loss import loss_terms
from sloth.kernels.loss.cross_entropy import (
    REDUCTIONS,
    backward_for,
    cross_entropy,
    forward_aten,
    forward_for,
)
from sloth.kernels.loss.loss_terms import Terms

BUDGET = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}  # bytes of logits: enough rows to keep the matmuls fast, few enough for caches
STEPS = (1024, 64)  # chunks are a multiple of the first of these that fits: on an H200 1408 rows are 8 % slower than 1024
TRAINED = 0.9  # bytes of logits over those of W where it is trained: fewer passes over dW; the backward pass needs as much


def chunk_rows(rows: int, vocabulary: int, itemsize: int, budget: int) -> int:
    """Rows of one chunk; chunks are as even as they can be."""
    most = max(1, budget // (vocabulary * itemsize))
    if rows <= most:
        return max(rows, 1)
    step = next((s for s in STEPS if s <= most), most)
    chunks = -(-rows // (most // step * step))
    return -(-rows // (chunks * step)) * step


torch.library.define(
    "sloth::linear_cross_entropy_forward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a_out, Tensor? lora_b, Tensor target, Tensor? items,"
    " int ignore_index, str reduction, float? softcap, float scale, Tensor? class_weight, float label_smoothing, float z_loss,"
    " float up_scale, bool[] need, int budget) -> (Tensor loss, Tensor count, Tensor unit,"
    " Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dlora_a_out, Tensor dlora_b, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check(hidden, weight, bias, target, items, reduction, class_weight, label_smoothing, lora_a_out=None, lora_b=None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    told = f"linear_cross_entropy: hidden {hidden.dtype} {list(hidden.shape)}, weight {weight.dtype} {list(weight.shape)}"
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1] and weight.dtype == hidden.dtype
    torch._check(fits, lambda: told)
    torch._check(bias is None or bias.dtype == weight.dtype and bias.shape == weight.shape[:1], lambda: f"{told}, and a bias")
    torch._check(items is None or reduction == "sum" and items.numel() == 1, lambda: "items: one number, for a sum")
    torch._check(class_weight is None or class_weight.shape == weight.shape[:1], lambda: f"{told}, and weights of other classes")
    torch._check(0 <= label_smoothing <= 1, lambda: f"label_smoothing must be in [0, 1], got {label_smoothing}")
    rows = hidden.numel() // hidden.shape[-1]
    torch._check(target.numel() == rows, lambda: f"{rows} rows of hidden states, but {target.numel()} targets")
    torch._check((lora_a_out is None) == (lora_b is None), lambda: "linear_cross_entropy: lora_a_out and lora_b go together")
    if lora_b is not None:
        told += f", lora_a_out {lora_a_out.dtype} {list(lora_a_out.shape)}, lora_b {lora_b.dtype} {list(lora_b.shape)}"
        fits = lora_b.shape == (weight.shape[0], lora_a_out.shape[-1]) and lora_a_out.dtype == lora_b.dtype
        torch._check(fits and lora_a_out.numel() // lora_a_out.shape[-1] == rows, lambda: told)


def _kept(dtype: torch.dtype, budget: int) -> torch.dtype:
    """What gradients wait for the backward pass in."""
    return dtype if budget else torch.promote_types(dtype, torch.float32)


def _is_lean(need: list[bool], budget: int) -> bool:
    return budget > 0 and need[1]


def logits_of(h: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """h Wᵀ + b, at the beginning of the buffer."""
    z = buffer[: len(h) * len(weight)].view(len(h), len(weight))
    return torch.mm(h, weight.t(), out=z) if bias is None else torch.addmm(bias, h, weight.t(), out=z)


def with_adapter(
    h: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor, lora_b: Tensor, scale: float, buffer: Tensor
) -> Tensor:
    """h Wᵀ + b + s t Uᵀ, at the beginning of the buffer."""
    if t.dtype != h.dtype:
        return logits_of(h, weight, bias, buffer).add_(t @ lora_b.t(), alpha=scale)
    z = buffer[: len(h) * len(weight)].view(len(h), len(weight))
    start, beta = (z, 0) if bias is None else (bias, 1)
    return torch.addmm(start, t, lora_b.t(), beta=beta, alpha=scale, out=z).addmm_(h, weight.t())  # thin first: gemm.py


class _Rows:
    """What both orders of the work share: the operands as matrices, how the loss is taken of logits, and where results go."""

    def __init__(
        self, hidden, weight, bias, lora_a_out, lora_b, up_scale, target, items, ignore_index, reduction, softcap, scale, terms,
        need, budget,
    ):  # fmt: skip
        self.h_NH, self.target_N = as_matrix(hidden), target.reshape(-1)
        self.weight, self.bias = weight, bias
        self.t_NR, self.lora_b, self.up_scale = None if lora_a_out is None else as_matrix(lora_a_out), lora_b, up_scale
        self.how, self.wide = (ignore_index, softcap, scale), compute_dtype(hidden)
        self.forward, self.backward = forward_for(hidden), (backward_for if terms.plain else loss_terms.backward_for)(hidden)
        self.terms, self.w_N = terms, terms.weight_of(self.target_N, ignore_index, self.wide)
        (N, H), V = self.h_NH.shape, weight.shape[0]
        self.need_h, self.need_w, self.need_b, self.need_t, self.need_lora_b = need
        self.wanted = any(need)
        self.budget = budget or BUDGET.get(hidden.device.type, BUDGET["cpu"])
        if self.need_w and not budget:
            self.budget = max(self.budget, int(TRAINED * weight.nbytes))
        self.count = (self.target_N != ignore_index).sum()
        mean = self.w_N.sum() if terms.weight is not None else self.count
        over = mean if reduction == "mean" else self.count.new_ones(()) if items is None else items
        self.over = over.to(self.wide)
        self.unit = torch.exp2(self.over.abs().log2().ceil()).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).clamp(min=2.0**-60)
        self.loss, self.squares = (hidden.new_zeros((), dtype=self.wide) for _ in range(2))
        self.dh = hidden.new_empty(N if self.need_h else 0, H, dtype=_kept(hidden.dtype, budget))
        self.db = hidden.new_zeros(V if self.need_b else 0, dtype=self.wide)
        self.dt = hidden.new_zeros(self.t_NR.shape if self.need_t else 0, dtype=self.wide)
        self.dlora_b = hidden.new_zeros(lora_b.shape if self.need_lora_b else 0, dtype=self.wide)

    def logits(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        layer = self.h_NH[rows], self.weight[columns], None if self.bias is None else self.bias[columns]
        if self.lora_b is None:
            return logits_of(*layer, out)
        return with_adapter(*layer, self.t_NR[rows], self.lora_b[columns], self.up_scale, out)

    def adapter_gradients(self, dz: Tensor, rows: slice) -> None:
        """dt and dU but for s, of these rows, are added up."""
        if self.need_t or self.need_lora_b:
            dz = dz.to(self.lora_b.dtype)
        if self.need_t:
            add_product(dz, self.lora_b, self.dt[rows])
        if self.need_lora_b:
            add_product(dz.t(), self.t_NR[rows], self.dlora_b)

    def statistics(self, z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The loss of these rows is added up; lse and its rounding error are returned."""
        forward, terms = self.forward, self.terms
        if terms.plain:
            nll, *lse = forward(z, self.target_N[rows], *self.how)
            self.loss += nll.sum()
            return lse
        every = terms.z != 0
        nll, lse, low, *spread = forward(z, self.target_N[rows], *self.how, terms.smoothing != 0, terms.weight, every)
        self.loss += terms.rows(nll, *(spread or [None]), self.w_N[rows], z.shape[1]).sum()
        if every:
            self.squares += lse.square().sum()
        return lse, low

    def gradient(self, z: Tensor, rows: slice, lse: Tensor, low: Tensor, first: int = 0) -> Tensor:
        """unit · ∂loss/∂logits, in place where kernels do it; columns are those from `first` on."""
        ignore_index, softcap, scale = self.how
        target, V, terms = self.target_N[rows], len(self.weight), self.terms
        if not terms.plain:
            G = self.unit / self.over, self.unit / len(self.target_N)
            numbers = terms.coefficients(*G, lse, self.w_N[rows], target != ignore_index, V)
            weight = None if terms.weight is None else terms.weight[first : first + z.shape[1]]
            return self.backward(numbers, z, target, weight, lse, low, *self.how, first, V)
        how = self.unit, z, target, lse, low, self.over, ignore_index, True, softcap, scale
        return self.backward(*how, out=z, first=first)

    def total(self) -> Tensor:
        """The loss of all rows."""
        loss = self.loss / self.over
        return loss + self.terms.z * self.squares / len(self.target_N) if self.terms.z else loss

    def by_log_softmax(self, z: Tensor, rows: slice) -> Tensor | None:
        """Both of the above where logits are taken as they are: in ATen that is fewer passes over them. As eager computes it."""
        counts = self.target_N[rows] != self.how[0]
        at = torch.where(counts, self.target_N[rows], 0).unsqueeze(1)
        p = torch.log_softmax(z, -1, dtype=self.wide)
        self.loss -= torch.where(counts, p.gather(1, at).squeeze(1), 0).sum()
        if not self.wanted:
            return None
        p.exp_().scatter_(1, at, p.gather(1, at) - 1)  # not scatter_add_, which torch.use_deterministic_algorithms refuses
        return p.mul_(torch.where(counts, self.unit / self.over, 0).unsqueeze(1)).to(z.dtype)


def _by_rows(r: _Rows, keep: bool) -> tuple[Tensor, Tensor]:
    """Chunks of rows, each with all that is wanted of it. dW, added up in fp32, and if they are to be kept lse and lse_low."""
    (N, H), V, all_columns = r.h_NH.shape, r.weight.shape[0], slice(None)
    C = chunk_rows(N, V, r.h_NH.element_size(), r.budget)
    buffer, dw = r.h_NH.new_empty(C * V), r.h_NH.new_empty(V if r.need_w else 0, H, dtype=r.wide)
    kept = r.h_NH.new_empty(2, N if keep else 0, dtype=r.wide)
    if not N:
        dw.zero_()
    for start in range(0, N, C):
        rows = slice(start, start + C)
        z = r.logits(rows, all_columns, buffer)
        if r.forward is forward_aten and r.how[1:] == (None, 1.0) and r.terms.plain and not keep:
            dz = r.by_log_softmax(z, rows)
        else:
            lse, low = r.statistics(z, rows)
            if keep:
                kept[0, rows], kept[1, rows] = lse, low
            dz = r.gradient(z, rows, lse, low) if r.wanted else None
        if r.need_h:
            product(dz, r.weight, r.dh[rows])
        if r.need_w:
            (add_product if start else product)(dz.t(), r.h_NH[rows], dw)
        if r.need_b:
            r.db += dz.sum(0, dtype=r.wide)
        r.adapter_gradients(dz, rows)
    return dw, kept


@falls_back("sloth::linear_cross_entropy_forward", "linear_cross_entropy")
def compute_linear_cross_entropy(
    hidden, weight, bias, lora_a_out, lora_b, target, items, ignore_index, reduction, softcap, scale, class_weight,
    label_smoothing, z_loss, up_scale, need, budget,
):  # fmt: skip
    check(hidden, weight, bias, target, items, reduction, class_weight, label_smoothing, lora_a_out, lora_b)
    layer, terms = (hidden, weight, bias, lora_a_out, lora_b, up_scale), Terms(label_smoothing, class_weight, z_loss)
    lean = _is_lean(need, budget)
    now = [needed and not (lean and n == 1) for n, needed in enumerate(need)]
    r = _Rows(*layer, target, items, ignore_index, reduction, softcap, scale, terms, now, budget)
    dw, lse = _by_rows(r, lean)
    dh, dt = r.dh.view(hidden.shape) if r.need_h else r.dh, r.dt.view(lora_a_out.shape) if r.need_t else r.dt
    return r.total(), r.count, r.unit, dh, dw, r.db.to(_kept(weight.dtype, budget)), dt, r.dlora_b, lse


torch.library.impl("sloth::linear_cross_entropy_forward", "CompositeExplicitAutograd", compute_linear_cross_entropy)


@torch.library.register_fake("sloth::linear_cross_entropy_forward")
def linear_cross_entropy_forward_fake(
    hidden, weight, bias, lora_a_out, lora_b, target, items, ignore_index, reduction, softcap, scale, class_weight,
    label_smoothing, z_loss, up_scale, need, budget,
):  # fmt: skip
    check(hidden, weight, bias, target, items, reduction, class_weight, label_smoothing, lora_a_out, lora_b)
    need_h, need_w, need_b, need_t, need_lora_b = need
    wide, kept = compute_dtype(hidden), _kept(hidden.dtype, budget)
    (V, H), scalar, lean = weight.shape, hidden.new_empty((), dtype=wide), _is_lean(need, budget)
    dh = hidden.new_empty(hidden.shape if need_h else (0, H), dtype=kept)
    dw = hidden.new_empty(V if need_w and not lean else 0, H, dtype=wide)
    db = hidden.new_empty(V if need_b else 0, dtype=kept)
    dt, dlora_b = (
        hidden.new_empty(t.shape if needed else 0, dtype=wide) for t, needed in ((lora_a_out, need_t), (lora_b, need_lora_b))
    )
    lse = hidden.new_empty(2, target.numel() if lean else 0, dtype=wide)
    return scalar, target.new_empty((), dtype=torch.int64), torch.empty_like(scalar), dh, dw, db, dt, dlora_b, lse


torch.library.define(
    "sloth::linear_cross_entropy_dweight",
    "(Tensor dloss, Tensor lse, Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a_out, Tensor? lora_b, Tensor target,"
    " Tensor? items, Tensor? class_weight, int ignore_index, str reduction, float? softcap, float scale, float label_smoothing,"
    " float z_loss, float up_scale, int budget) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::linear_cross_entropy_dweight", "CompositeExplicitAutograd")
@falls_back("sloth::linear_cross_entropy_dweight", "linear_cross_entropy")
def linear_cross_entropy_dweight_impl(
    dloss, lse, hidden, weight, bias, lora_a_out, lora_b, target, items, class_weight, ignore_index, reduction, softcap, scale,
    label_smoothing, z_loss, up_scale, budget,
):  # fmt: skip
    """By slabs of the vocabulary, with all rows at a time."""
    layer, terms = (hidden, weight, bias, lora_a_out, lora_b, up_scale), Terms(label_smoothing, class_weight, z_loss)
    r = _Rows(*layer, target, items, ignore_index, reduction, softcap, scale, terms, [False] * 5, budget)
    r.unit = dloss.to(r.wide)
    V, N, rows, dw = len(weight), len(r.h_NH), slice(None), torch.empty_like(weight)
    columns = chunk_rows(V, max(N, 1), r.h_NH.element_size(), budget)
    buffer = r.h_NH.new_empty(N * columns)
    for first in range(0, V, columns):
        slab = slice(first, first + columns)
        dz = r.gradient(r.logits(rows, slab, buffer), rows, *lse, first)
        torch.mm(dz.t(), r.h_NH, out=dw[slab])
    return dw


@torch.library.register_fake("sloth::linear_cross_entropy_dweight")
def linear_cross_entropy_dweight_fake(dloss, lse, hidden, weight, *_):
    return torch.empty_like(weight)


torch.library.register_autograd("sloth::linear_cross_entropy_dweight", raise_on_double_backward)


def _setup(ctx, inputs, output):
    *layer, class_weight = *inputs[:7], inputs[11]
    ctx.how = *inputs[7:11], *inputs[12:15], inputs[16]
    ctx.dtypes, ctx.up_scale, ctx.need = [t if t is None else t.dtype for t in inputs[:5]], inputs[14], inputs[15]
    ctx.lean = _is_lean(ctx.need, inputs[16])
    ctx.save_for_backward(*output[2:8], *((output[8], *layer, class_weight) if ctx.lean else ()))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 17
    unit, *kept = ctx.saved_tensors
    kept, lean, factor = kept[:5], kept[5:], dloss / unit
    factors = [factor] * 3 + [factor * ctx.up_scale] * 2
    each = zip(kept, factors, ctx.dtypes, ctx.need, strict=True)
    found = [(d * f).to(dtype) if need else None for d, f, dtype, need in each]
    if ctx.lean:
        found[1] = torch.ops.sloth.linear_cross_entropy_dweight.default(dloss, *lean, *ctx.how)
    return *found, *[None] * 12


torch.library.register_autograd("sloth::linear_cross_entropy_forward", _backward, setup_context=_setup)

linear_cross_entropy_forward = torch.ops.sloth.linear_cross_entropy_forward.default
"""The loss, and what its backward pass needs: `unit` times the gradients that were asked for, in fp32 where budget is 0, those of
the adapter but for up_scale."""


def _is_whole(hidden: Tensor) -> bool:
    few = hidden.numel() * hidden.itemsize <= 4 * hidden.shape[-1] ** 2  # rows · V · itemsize <= V · H · 4
    return device_of(hidden.device).roomy and hidden.itemsize == 2 and compiling() and statically_known_true(few)


torch.library.define(
    "sloth::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias=None, Tensor? items=None, int ignore_index=-100,"
    ' str reduction="mean", float? softcap=None, float scale=1.0, int budget=0, Tensor? class_weight=None,'
    " float label_smoothing=0.0, float z_loss=0.0, Tensor? lora_a_out=None, Tensor? lora_b=None, float up_scale=1.0,"
    " ScalarType? loss_dtype=None) -> (Tensor loss, Tensor count)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::linear_cross_entropy", "CompositeImplicitAutograd")
def linear_cross_entropy_composite(
    hidden, weight, target, bias=None, items=None, ignore_index=-100, reduction="mean", softcap=None, scale=1.0, budget=0,
    class_weight=None, label_smoothing=0.0, z_loss=0.0, lora_a_out=None, lora_b=None, up_scale=1.0, loss_dtype=None,
):  # fmt: skip
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias, lora_a_out, lora_b)]
    plain = lora_b is None and Terms(label_smoothing, class_weight, z_loss).plain
    with without_autocast(hidden):
        if plain and need[1] and not budget and _is_whole(hidden):
            check(hidden, weight, bias, target, items, reduction, class_weight, label_smoothing)
            loss, _, count = cross_entropy(F.linear(hidden, weight, bias), target, ignore_index, reduction, softcap, scale)
            return (loss if items is None else loss / items).to(loss_dtype or loss.dtype), count
        loss, count, *_ = linear_cross_entropy_forward(
            hidden, weight, bias, lora_a_out, lora_b, target, items, ignore_index, reduction, softcap, scale,
            class_weight, label_smoothing, z_loss, up_scale, need, budget,
        )  # fmt: skip
    return loss.to(loss_dtype or loss.dtype), count


linear_cross_entropy = torch.ops.sloth.linear_cross_entropy.default
"""linear_cross_entropy(hidden [..., H], weight [V, H], target [...] int64, bias=None, items=None, ignore_index=-100,
reduction="mean", softcap=None, scale=1.0, budget=0, class_weight [V]=None, label_smoothing=0.0, z_loss=0.0,
lora_a_out [..., r]=None, lora_b [V, r]=None, up_scale=1.0, loss_dtype=None) -> (loss [], count [] int64). items: what a sum is
divided by, a tensor of one number. budget: bytes of logits at a time, 0 for a good number. class_weight …: loss_terms.py;
class_weight gets no gradient. loss_dtype: fp32 (fp64 for fp64) if not given."""
