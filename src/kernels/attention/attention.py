"""Attention, told what its mask means instead of the mask, or as little of it as can be measured.

    out = softmax(cap(q kᵀ · scale) + bias, over the keys that are seen) v

    query i sees key j where   i − behind ≤ j ≤ i + ahead     (None: no bound; ahead = 0 is causal, behind a window of behind + 1)
                               i and j lie in one run of each of `documents`       ids, constant over each run
                               j is valid                                          by each of `valid`
    Or `visible`, a mask whatever it means, is true where i sees j.
    cap(x) = softcap · tanh(x / softcap);   bias_hj: of keys;   sink_h is one more score, of a key whose value is 0

Shapes   query [B, H, S, D], key [B, G, T, D], value [B, G, T, E] with H a multiple of G, each for H / G heads in a row;
         documents (integers) and valid (bool) [B or 1, S], with dimensions of size 1 anywhere; sinks [H], or bias
         [B or 1, H, S], batch and heads in one dimension too, finite, given no gradient; visible [B or 1, 1, S, T]
         or [S, T], bool. T is S unless it is given, or scores are plain and what is seen is causal (query 0 sees key 0) or
         everything.
By       torch's kernels (flash, cuDNN, …) where the mask is causal or nothing and scores are plain: a mask tensor keeps them off
         their fast path. Otherwise by `interval_attention` on a GPU. Its intervals are made here, by operations that are the same
         for all layers with the same mask, so that a compiled graph makes them once. On a CPU, in fp64, for heads wider than 256
         and for widths that are no multiple of 8 (torch has no fused kernel for these either, and is then more exact) by torch's
         kernels with a mask made of the intervals, or where scores are not plain by ATen's matrix products; so is what is
         `spelled` in fp32: fused kernels compute exp(score − L), which is off by an ulp of L where a softmax gives 1.
         One query a row, without gradients, that is told what is `visible` is `decode_attention`'s.
         Of `visible`, the first and last key of each query and so on are measured, on the device: two passes over it in a step,
         no wait. What lies beyond them is not computed. It stays in memory, and is read where it has holes between them.
Backward is that of those. A query that sees nothing gives 0, or, where `uniform`, the mean of all values: with the gradient of a
softmax whose scores were swallowed by the least number there is, added to each. Where they are `written` over instead, they have
no gradient, as that of a query that is 0: it is made so. A softmax of −∞ alone is nan, and its gradient: of values alone where
scores are written over. `nan` gives that.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth.kernels.attention.decode_attention import decode_attention, takes
from sloth.kernels.attention.interval_attention import interval_attention
from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.launch import compute_dtype, needs_gradient, use_triton, without_autocast

WIDE = torch.float32, torch.float64
WIDEST, MULTIPLE = 256, 8  # channels of a head that the kernels take

torch.library.define(
    "sloth::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor[] documents, Tensor[] valid, int? ahead=None, int? behind=None,"
    " float dropout_p=0.0, float? scale=None, float? softcap=None, Tensor? sinks=None,"
    " Tensor? bias=None, Tensor? visible=None, bool uniform=False, Tensor[]? bounds=None, bool written=False,"
    " bool nan=False, bool spelled=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "sloth::attention_bounds",
    "(Tensor[] documents, Tensor[] valid, int? ahead=None, int? behind=None, Tensor? visible=None, bool uniform=False)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "sloth::intervals",
    "(Tensor[] documents, Tensor? valid, int? ahead, int? behind) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _latest(marked: Tensor, at: Tensor) -> Tensor:
    """The last marked position up to each; -1 where there is none."""
    return torch.where(marked, at, -1).cummax(-1)[0]


def _next(marked: Tensor, at: Tensor) -> Tensor:
    """The first marked position from each on; S where there is none."""
    return torch.where(marked, at, at.shape[-1]).flip(-1).cummin(-1)[0].flip(-1)


def runs(documents: list[Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """[B or 1, S] first and last position of the run, of ids that are equal in all documents, that each position lies in."""
    begins = at == 0
    for ids in documents:
        begins = begins | F.pad(ids[:, 1:] != ids[:, :-1], (1, 0))
    ends = F.pad(begins[:, 1:], (0, 1), value=True)
    return _latest(begins, at), _next(ends, at)


def intervals(documents: list[Tensor], valid: Tensor | None, ahead: int | None, behind: int | None, at: Tensor):
    """lo, hi: the first and last key of each query; first, last: the first and last query of each key. All [B or 1, S], int32.

    at [1, S] = 0 … S − 1. A key that is not valid has no queries; bounds of queries are drawn in to valid keys, so that padding
    costs nothing. A query of which nothing is left has lo > hi.
    """
    S = at.shape[-1]
    begin, end = runs(documents, at) if documents else (torch.zeros_like(at), torch.full_like(at, S - 1))
    lo, last = (begin, end) if behind is None else (torch.maximum(begin, at - behind), torch.minimum(end, at + behind))
    hi, first = (end, begin) if ahead is None else (torch.minimum(end, at + ahead), torch.maximum(begin, at - ahead))
    if valid is not None:
        lo, hi, first, last = torch.broadcast_tensors(lo, hi, first, last, valid)[:4]
        first, last = torch.where(valid, first, S), torch.where(valid, last, -1)
        before, after = _latest(valid, at), _next(valid, at)
        lo = torch.where(lo < S, after.expand_as(lo).gather(-1, lo.clamp(0, S - 1).long()), S)
        hi = torch.where(hi >= 0, before.expand_as(hi).gather(-1, hi.clamp(0, S - 1).long()), -1)
    return lo, hi, first, last


def holed(lo: Tensor, hi: Tensor, valid: Tensor) -> Tensor:
    """[B or 1, S] bool: is a key between a query's bounds not valid? Where padding stands at one end, none is."""
    before = F.pad(valid.cumsum(-1), (1, 0)).expand(lo.shape[0], -1)
    between = before.gather(-1, (hi + 1).long()) - before.gather(-1, lo.long())
    return (lo <= hi) & (between != hi - lo + 1)


def scanned(documents: list[Tensor], valid: Tensor | None, ahead: int | None, behind: int | None) -> list[Tensor]:
    """`intervals`, and where there is `valid` what is `holed`, as an operator that is opaque to Inductor. Its kernels would scan
    along a sequence, and to compile these took 8 s of each first step. torch's own, two dozen launches, run once in a step.
    """
    x = documents[0] if valid is None else valid
    at = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)[None]
    bounds = intervals(documents, valid, ahead, behind, at)
    holes = () if valid is None else (holed(*bounds[:2], valid),)
    return [b.clone(memory_format=torch.contiguous_format) for b in (*bounds, *holes)]  # some are one tensor


torch.library.impl("sloth::intervals", "CompositeExplicitAutograd", scanned)
torch.library.register_fake("sloth::intervals", scanned)


def measured(mask: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The `intervals` that a mask [B or 1, S, T] lies in; holes [B or 1, S], gaps [B or 1, T]: is it false somewhere in them?"""

    def ends(dim: int) -> tuple[Tensor, Tensor, Tensor]:
        n = mask.shape[dim]
        at = torch.arange(n, device=mask.device)  # int64, as n is for Inductor, whose loops over both do not compile
        at = at if dim == -1 else at[:, None]
        least, most = torch.where(mask, at, n).amin(dim), torch.where(mask, at, -1).amax(dim)
        holes = (least <= most) & (mask.sum(dim) != most - least + 1)
        return least.int(), most.int(), holes

    (lo, hi, holes), (first, last, gaps) = ends(-1), ends(-2)
    return (lo, hi, first, last), holes, gaps


def spelled(q, k, v, mask, scale, softcap, sinks, bias, uniform) -> Tensor:
    """By ATen operations, in fp32 at least; the result is rounded once."""
    dtype, (B, H, S, _), T = compute_dtype(q), q.shape, k.shape[2]
    with without_autocast(q):
        k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
        s = q.to(dtype) @ k.to(dtype).mT * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if bias is not None:
            s = s + bias.to(dtype)[:, :, None]
        s = s + torch.where(mask, s.new_zeros(()), torch.finfo(dtype).min)
        if sinks is not None:
            s = torch.cat((s, sinks.to(dtype)[:, None, None].expand(B, H, S, 1)), -1)
        p = s.softmax(-1)[..., :T]
        return ((p if uniform else p.where(mask, 0.0)) @ v.to(dtype)).to(v.dtype)


def with_fully_masked(lo: Tensor, hi: Tensor, at: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Intervals of queries that see nothing marked as the kernels want them, and the first and the last of these [B or 1, 2]."""
    S, none, at = at.shape[-1], lo > hi, at.long()  # as in `measured`
    fully_masked = torch.stack((torch.where(none, at, S).amin(-1), torch.where(none, at, -1).amax(-1)), -1).int()
    return torch.where(none, -1, lo), torch.where(none, T - 1, hi), fully_masked


class Bounds(NamedTuple):
    """What `interval_attention` is told of a mask; under these names it says what each is."""

    lo: Tensor
    hi: Tensor
    first: Tensor
    last: Tensor
    valid: Tensor | None = None
    holes: Tensor | None = None
    gaps: Tensor | None = None
    fully_masked: Tensor | None = None

    def mask(self, at: Tensor) -> Tensor:
        """[B or 1, 1, S, T] bool, true where a query sees a key."""
        if self.gaps is not None:
            return self.valid[:, None]
        lo, hi = self.lo[:, None, :, None], self.hi[:, None, :, None]
        mask = (lo <= at) & (at <= hi)
        mask = mask if self.fully_masked is None else mask & (lo >= 0)
        return mask if self.valid is None else mask & self.valid[:, None, None]


def bounds_of(documents, valid, ahead, behind, visible, uniform: bool, S, device: torch.device) -> Bounds:
    at = torch.arange(S, dtype=torch.int32, device=device)[None]
    if visible is not None:
        usable, T = visible.reshape(-1, *visible.shape[-2:]).contiguous(), visible.shape[-1]
        (lo, hi, first, last), holes, gaps = measured(usable)
    else:
        usable, T, gaps = None, S, None
        for v in valid:
            usable = v.reshape(-1, S) if usable is None else usable & v.reshape(-1, S)
        documents = [d.reshape(-1, S) for d in documents]
        if documents or usable is not None:
            lo, hi, first, last, *rest = torch.ops.sloth.intervals(documents, usable, ahead, behind)
        else:
            lo, hi, first, last, *rest = intervals(documents, usable, ahead, behind, at)
        holes = rest[0] if rest else None
    lo, hi, fully_masked = with_fully_masked(lo, hi, at, T) if uniform else (lo, hi, None)
    return Bounds(*(b.contiguous() for b in (lo, hi, first, last)), usable, holes, gaps, fully_masked)


@torch.library.impl("sloth::attention_bounds", "CompositeImplicitAutograd")
def attention_bounds_composite(documents, valid, ahead=None, behind=None, visible=None, uniform=False):
    x = next(t for t in (visible, *documents, *valid) if t is not None)
    S = x.shape[-2] if visible is not None else next(n for n in reversed(x.shape) if not isinstance(n, int) or n != 1)
    bounds = bounds_of(documents, valid, ahead, behind, visible, uniform, S, x.device)
    return [b for b in bounds if b is not None]


@torch.library.impl("sloth::attention", "CompositeImplicitAutograd")
def attention_composite(
    query, key, value, documents, valid, ahead=None, behind=None, dropout_p=0.0, scale=None, softcap=None, sinks=None,
    bias=None, visible=None, uniform=False, bounds=None, written=False,
    nan=False, spelled=False,
):  # fmt: skip
    low = _autocast(query)
    if low is not None and repeats(query, key):
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    exactly = spelled and not use_triton(query) and dropout_p == 0 and low is None and query.dtype in WIDE
    plain, grouped = softcap is sinks is bias is None, query.shape[1] != key.shape[1]
    told = visible is not None or documents or valid or bounds is not None
    if plain and not told and ahead in (0, None) and behind is None and not exactly:
        causal = ahead == 0
        return F.scaled_dot_product_attention(query, key, value, None, dropout_p, causal, scale=scale, enable_gqa=grouped)
    S, T = query.shape[2], key.shape[2]
    torch._check(dropout_p == 0 or plain and not uniform, lambda: "attention: no dropout here")
    measured_mask = visible is not None or bounds is not None
    torch._check(S == T or measured_mask and bias is None, lambda: f"attention: {S} queries, {T} keys")
    torch._check(sinks is None or bias is None, lambda: "attention: no bias beside sinks")
    bias = None if bias is None else bias.reshape(-1, query.shape[1], T)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if low is not None:  # as it does for torch's own
        query, key, value = (t if t.dtype == torch.float64 else t.to(low) for t in (query, key, value))
    alone = isinstance(S, int) and S == 1 and visible is not None and bounds is sinks is bias is None
    if alone and dropout_p == 0 and takes(query, value) and not (exactly or nan or written or needs_gradient(query, key, value)):
        return decode_attention(query, key, value, visible.reshape(-1, T), scale, softcap, uniform)
    if bounds is not None:
        (*seen, fully_masked) = bounds if uniform else (*bounds, None)
        of = Bounds(*seen, fully_masked=fully_masked)
    else:
        of = bounds_of(documents, valid, ahead, behind, visible, uniform, S, query.device)
    sees = (of.lo >= 0 if uniform else of.lo <= of.hi)[:, None, :, None] if written or nan else None
    if written and not nan:
        query = torch.where(sees, query, 0.0)
    alike = uniform or nan and exactly  # so that its gradient is nan, too
    out = _by_bounds_for(query)(query, key, value, of, dropout_p, scale, softcap, sinks, bias, alike, exactly)
    if written and nan:
        lost = value.sum(2, keepdim=True) * torch.where(sees.all(2, keepdim=True), 0.0, math.nan).to(value.dtype)
        return torch.where(sees, out, lost.repeat_interleave(query.shape[1] // key.shape[1], 1))
    return out * torch.where(sees, 1.0, math.nan).to(out.dtype) if nan else out


def _autocast(x: Tensor) -> torch.dtype | None:
    """What ambient autocast casts to."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def repeats(query: Tensor | None, key: Tensor | None) -> bool:
    """Are fp32 keys that autocast casts repeated before, for each head of a group? So are eager's, whose gradients are then added
    up in fp32. Not on a GPU, where it would cost a copy. Of tensors that are not known it may be so.
    """
    known = [t for t in (query, key) if t is not None]
    if any(map(use_triton, known)):
        return False
    return len(known) < 2 or key.dtype == torch.float32 and query.shape[1] != key.shape[1]


def _by_mask(query, key, value, of: Bounds, dropout_p, scale, softcap, sinks, bias, uniform: bool, exactly: bool) -> Tensor:
    plain, grouped = softcap is sinks is bias is None, query.shape[1] != key.shape[1]
    mask = of.mask(torch.arange(key.shape[2], dtype=torch.int32, device=query.device)[None])
    if plain and not uniform and not exactly:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=grouped)
    return spelled(query, key, value, mask, scale, softcap, sinks, bias, uniform)


def _by_intervals(query, key, value, of: Bounds, dropout_p, scale, softcap, sinks, bias, uniform: bool, exactly: bool) -> Tensor:
    D, E = query.shape[3], value.shape[3]
    if max(D, E) > WIDEST or D % MULTIPLE or E % MULTIPLE or dropout_p > 0:  # the kernels do not take it
        return _by_mask(query, key, value, of, dropout_p, scale, softcap, sinks, bias, uniform, exactly)
    bias = None if bias is None else bias.contiguous()
    lo, hi, first, last, usable, holes, gaps, fully_masked = of
    return interval_attention(
        query, key, value, lo, hi, first, last, usable, holes, gaps, scale, softcap, sinks, bias, fully_masked
    )[0]  # fmt: skip


_by_bounds_for = implementations("sloth::attention", triton=_by_intervals, aten=_by_mask)

attention = torch.ops.sloth.attention.default
"""attention(query, key, value, documents, valid, ahead=None, behind=None, dropout_p=0.0, scale=None, softcap=None, sinks=None,
bias=None, visible=None, uniform=False, bounds=None, written=False, nan=False, spelled=False) -> [B, H, S, E]. With bounds (of
attention_bounds), masks are not read."""
attention_bounds = torch.ops.sloth.attention_bounds.default
"""attention_bounds(documents, valid, ahead=None, behind=None, visible=None, uniform=False) -> what there is of `Bounds`; S > 1"""
