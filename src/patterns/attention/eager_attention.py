"""Attention spelled out: products of queries and keys, an additive mask, softmax, products with values.

The mask is where(m, 0, least), and what m means is proven as for `attention.py`. Added to a score, fp32's or bf16's least number
stays as it is, so a query that sees nothing weighs all keys alike, and the operator is told to do so too. A bias is ALiBi's.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from math import inf

import torch
import torch.nn.functional as F

from sloth.kernels.attention.attention import attention
from sloth.patterns.attention.additive_mask import HIDES, Added, added, may_see_nothing, require_swallowed
from sloth.patterns.attention.additive_mask import why_not as why_not_added
from sloth.patterns.attention.alibi import of_keys
from sloth.patterns.attention.attention import ATTENTION, BY_TORCH, proven, repeated
from sloth.patterns.attention.mask_analysis import Interval, meaning, why_not
from sloth.rewriter.graph.value import Value, same_literal
from sloth.rewriter.match.domain import inverse
from sloth.rewriter.match.registry import pattern

DIMS = {
    "query": "B H S D",
    "key": "B H S D",
    "value": "B H S E",
    "mask": "B 1 S S",
    "seen": "B 1 S S",
    "sinks": "H",
    "bias": "1 1 S",
}
GROUPED = {"query": "B 2*G S D", "key": "B G S D", "value": "B G S E", "sinks": "2*G"}


def shown(match) -> Added | None:
    """The mask that is added, or what is seen where scores are written over."""
    return Added(match.seen, match.least) if "seen" in match.tensors else added(match.mask)


def seen(match) -> Value | None:
    """What is true where a key is seen, of a mask that adds no bias."""
    found = shown(match)
    return found.seen if found is not None and found.bias is None else None


def told(match) -> Interval | None:
    """What is proven of the mask."""
    if not {"seen", "mask"} & match.tensors.keys():
        return Interval()
    return None if (mask := seen(match)) is None else meaning(mask)


def all_alike(match, lonely: bool) -> bool:
    """May there be queries that see nothing, and then weigh all keys alike? Not with a sink, which takes all of the weight."""
    return lonely and "sinks" not in match.tensors and not is_nan(match, lonely)


def is_nan(match, lonely: bool) -> bool:
    """… and then have a softmax of infinities alone."""
    mask = shown(match) if lonely and {"seen", "mask"} & match.tensors.keys() else None
    return mask is not None and mask.least == -inf and "sinks" not in match.tensors


def lonely(match) -> bool:
    return may_see_nothing(told(match) or Interval())


def written(match, lonely: bool) -> bool:
    return lonely and "seen" in match.tensors


TOLD = proven(told) | {"spelled": lambda match: True}
TOLD["bias"] = lambda match: of_keys(match.bias, match.query.meta.shape[1]) if "bias" in match.tensors else None
for _name, _of in {"uniform": all_alike, "nan": is_nan, "written": written}.items():
    TOLD[_name] = lambda match, of=_of: of(match, lonely(match))


def masked(scores, of):
    return scores + of["mask"] if "mask" in of else scores


def scaled(query, key, of, *, scale):
    return masked(torch.matmul(query, key.transpose(2, 3)) * scale, of)


def scaled_wide(query, key, of, *, scale):
    return scaled(query.float(), key.float(), of, scale=scale)


def capped(query, key, of, *, scale, softcap):
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    return masked(torch.tanh(scores / softcap) * softcap, of)


def divided(query, key, of, *, divisor):
    return masked(torch.matmul(query, key.transpose(2, 3)) / divisor, of)


def divided_wide(query, key, of, *, divisor):
    return divided(query.float(), key.float(), of, divisor=divisor)


def divided_last_wide(query, key, of, *, divisor):
    return divided_last(query.float(), key.float(), of, divisor=divisor)


def scaled_last(query, key, of, *, scale):
    return masked(torch.matmul(query, key.transpose(2, 3)), of) * scale


def divided_last(query, key, of, *, divisor):
    return masked(torch.matmul(query, key.transpose(2, 3)), of) / divisor


def filled(query, key, of, *, scale, least):
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = scores + of["bias"] if "bias" in of else scores
    return torch.where(of["seen"].bool(), scores, least)


def filled_wide(query, key, of, *, scale, least):
    return filled(query.float(), key.float(), of, scale=scale, least=least)


def filled_divided(query, key, of, *, divisor, least):
    return torch.where(of["seen"].bool(), torch.matmul(query, key.transpose(2, 3)) / divisor, least)


def flat(x):
    return x.reshape(-1, *x.shape[2:])


def scaled_flat(query, key, of, *, scale):
    scores = torch.bmm(flat(query), flat(key).transpose(1, 2)) * scale
    scores = scores + of["bias"] if "bias" in of else scores
    return masked(scores.view(*query.shape[:2], *scores.shape[1:]), of)


def in_dtype(scores, value, of, drop):
    return torch.matmul(drop(F.softmax(scores, -1).to(value.dtype)), value)


def in_fp32(scores, value, of, drop):
    return torch.matmul(drop(F.softmax(scores, -1, dtype=torch.float32).to(value.dtype)), value)


def less_maximum(scores, value, of, drop):
    """Which changes nothing."""
    return in_dtype(scores - scores.max(-1, keepdim=True).values, value, of, drop)


def in_fp32_flat(scores, value, of, drop):
    weights = drop(F.softmax(scores, -1, dtype=torch.float32).to(value.dtype))
    return torch.bmm(flat(weights), flat(value)).view(*weights.shape[:-1], value.shape[-1])


def in_dtype_flat(scores, value, of, drop):
    weights = drop(F.softmax(flat(scores), -1))
    return torch.bmm(weights, flat(value)).view(*scores.shape[:-1], value.shape[-1])


def with_sinks(scores, of):
    return torch.cat((scores, of["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)


def sinks_behind(scores, value, of, drop):
    return torch.matmul(drop(F.softmax(with_sinks(scores, of), -1)[..., :-1].to(value.dtype)), value)


def sinks_less_maximum(scores, value, of, drop):
    scores = with_sinks(scores, of)
    weights = F.softmax(scores - scores.max(-1, keepdim=True).values, -1)[..., :-1]
    return torch.matmul(drop(weights).to(value.dtype), value)


def sinks_in_fp32(scores, value, of, drop):
    return sinks_less_maximum(scores.float(), value, of | {"sinks": of["sinks"].float()}, drop)


def sinks_after(scores, value, of, drop):
    """The share of the weights that a sink leaves, 1 / (1 + exp(sink − L))."""
    left = (scores.logsumexp(-1) - of["sinks"].view(1, -1, 1)).float().sigmoid()
    out = in_fp32(scores, value, of, drop)
    return out * left.unsqueeze(-1).to(out.dtype)


def spelled(score: Callable, attend: Callable, tensors: str, numbers: str, grouped: bool) -> Callable:
    """The reference with these parameters, with dropout if it is one of them."""
    names = ["query", "key", "value", *tensors.split()]

    def reference(*given, dropout_p=0.0, **number):
        of = dict(zip(names, given, strict=True))
        query, key, value = given[:3]
        if grouped:
            key, value = (repeated(t, query.shape[1]) for t in (key, value))
        return attend(score(query, key, of, **number), value, of, lambda weights: F.dropout(weights, dropout_p))

    parameters = [Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    parameters += [Parameter(n, Parameter.KEYWORD_ONLY, annotation=float) for n in numbers.split()]
    reference.__signature__ = Signature(parameters)
    return reference


VARIANTS = {  # how scores are made and what is done with them, tensors, numbers; in which models
    "fp32": (scaled, in_fp32, "mask", "scale"),  # Llama
    "fp32_full": (scaled, in_fp32, "", "scale"),
    "fp32_dropout": (scaled, in_fp32, "mask", "scale dropout_p"),
    "dtype": (scaled, in_dtype, "mask", "scale"),  # BERT, BART, GPT-2
    "dtype_full": (scaled, in_dtype, "", "scale"),
    "dtype_less_maximum": (scaled, less_maximum, "mask", "scale"),  # MiMo
    "dtype_dropout": (scaled, in_dtype, "mask", "scale dropout_p"),
    "flat": (scaled_flat, in_dtype, "mask", "scale"),  # GPT-NeoX Japanese
    "flat_softmax": (scaled_flat, in_dtype_flat, "mask", "scale"),  # TrOCR
    "divided": (divided, in_dtype, "mask", "divisor"),  # RemBERT, RoFormer
    "divided_dropout": (divided, in_dtype, "mask", "divisor dropout_p"),
    "divided_fp32": (divided, in_fp32, "mask", "divisor"),  # … under autocast
    "divided_wide": (divided_wide, in_dtype, "mask", "divisor"),  # GPT-J
    "divided_last": (divided_last_wide, in_dtype, "mask", "divisor"),  # CodeGen
    "divided_last_dtype": (divided_last, in_dtype, "mask", "divisor"),
    "divided_last_fp32": (divided_last, in_fp32, "mask", "divisor"),
    "scaled_last": (scaled_last, in_dtype, "mask", "scale"),
    "scaled_last_fp32": (scaled_last, in_fp32, "mask", "scale"),
    "softcap": (capped, in_fp32, "mask", "scale softcap"),  # Gemma 2
    "filled": (filled, in_fp32, "seen", "scale least"),
    "filled_dtype": (filled, in_dtype, "seen", "scale least"),  # minGPT
    "filled_wide": (filled_wide, in_dtype, "seen", "scale least"),  # GPT-Neo
    "filled_divided": (filled_divided, in_dtype, "seen", "divisor least"),  # nanoGPT, GPT-2 by hand
    "filled_divided_fp32": (filled_divided, in_fp32, "seen", "divisor least"),
    "filled_dropout": (filled, in_dtype, "seen", "scale least dropout_p"),
    "filled_divided_dropout": (filled_divided, in_dtype, "seen", "divisor least dropout_p"),
    "alibi": (filled, in_fp32, "bias seen", "scale least"),  # MPT
    "alibi_flat": (scaled_flat, in_fp32_flat, "bias mask", "scale"),  # BLOOM
    "sinks": (scaled, sinks_less_maximum, "mask sinks", "scale"),  # GPT-OSS
    "sinks_fp32": (scaled, sinks_in_fp32, "mask sinks", "scale"),  # … under autocast
    "sinks_wide": (scaled_wide, sinks_behind, "mask sinks", "scale"),  # Flint
    "sinks_after": (scaled, sinks_after, "mask sinks", "scale"),  # Granite SWA
}


def options(numbers: str) -> dict:
    return TOLD | {"scale": lambda match: inverse(match.divisor)} if "divisor" in numbers else TOLD


_how = VARIANTS.pop("fp32")
entry = pattern(ATTENTION, op=attention, dims=DIMS, no_grad=("bias",), name="eager_attention", variant="fp32", **TOLD)(
    spelled(*_how, grouped=False)
)
entry.variant("fp32_grouped", GROUPED, **TOLD)(spelled(*_how, grouped=True))
for _name, _how in VARIANTS.items():
    entry.variant(_name, **options(_how[-1]))(spelled(*_how, grouped=False))
    if not any(word in " ".join((_name, *_how[-2:])) for word in ("flat", "bias")):  # models with these do not group
        entry.variant(f"{_name}_grouped", GROUPED, **options(_how[-1]))(spelled(*_how, grouped=True))


@entry.check
def is_supported(match):
    interval, mask = told(match), None
    if {"seen", "mask"} & match.tensors.keys():
        mask = readable(match)
    if interval is None:
        match.require(False, why_not(mask.seen))
    match.require("dropout_p" not in match.numbers or interval in BY_TORCH, "it has dropout, and its mask is not causal")
    if "bias" in match.tensors:
        match.require(
            TOLD["bias"](match) is not None, "its bias is not proven to be a slope of each head times positions of keys"
        )
    if mask is not None:
        require_hidden(match, mask, may_see_nothing(interval))
    require_operands(match)


def readable(match) -> Added:
    """The mask; refused where it is a bias."""
    mask = shown(match)
    match.require(mask is not None and mask.bias is None, "mask" in match.tensors and why_not_added(match.mask))
    return mask


def require_hidden(match, mask: Added, lonely: bool) -> None:
    """What hides keys leaves them no weight, behind the scale too; lonely: a query may see nothing."""
    least = mask.least * behind(match) if "mask" in match.tensors else mask.least
    match.require(least <= HIDES, f"{least:.6g} may not hide a key")
    if lonely and "mask" in match.tensors and mask.least != -inf:
        require_swallowed(match, mask, "sinks" in match.tensors)
    elif lonely and mask.least == -inf:
        match.require("sinks" in match.tensors or mask.alike, "a query may see nothing, and not the same is added to its scores")


def behind(match) -> float:
    """What scores and mask are multiplied with, where that is behind the mask."""
    if "_last" not in match.variant.name:
        return 1.0
    scale = match.numbers.get("scale")
    return inverse(match.divisor) if scale is None else scale


def require_operands(match) -> None:
    rows, columns = match.query.meta.shape[-2], match.key.meta.shape[-2]
    match.require(same_literal(rows, columns), f"{rows} queries, {columns} keys")
    metas = [match.tensors[name].meta for name in ("query", "key", "value")]
    alike = torch.is_autocast_enabled(metas[0].device.type) or len({meta.dtype for meta in metas}) == 1
    match.require(alike, "queries, keys and values differ in dtype")
