"""Attention with a mask that is computed: kernels are told the interval of keys that it is proven to leave each query."""

import torch
import torch.nn.functional as F

from sloth.kernels.attention import attention
from sloth.patterns.mask_meaning import Interval, meaning
from sloth.rewriter.ir import Value, same_literal
from sloth.rewriter.pattern import Construct
from sloth.rewriter.registry import pattern


def is_masked(v: Value) -> bool:
    return v.op == "scaled_dot_product_attention" and isinstance(v.args[3], Value)


ATTENTION = Construct("attention", "attention mask", anchor=is_masked)
DIMS = {"query": "B H S D", "key": "B H S D", "value": "B H S D", "attn_mask": "B 1 S S"}
GROUPED = {"query": "B 2*G S D", "key": "B G S D", "value": "B G S D"}


def proven(field):
    """A field of what is proven of the mask, as an argument of the operator; nothing proven is refused by the check below."""
    return lambda match: getattr(meaning(match.attn_mask) or Interval(), field)


PROVEN = {field: proven(field) for field in ("documents", "valid", "ahead", "behind")}


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    B, G, S, D = x.shape
    return x[:, :, None].expand(B, G, heads // G, S, D).reshape(B, heads, S, D)


@pattern(ATTENTION, op=attention, dims=DIMS, name="attention", variant="plain", **PROVEN)
def plain(query, key, value, attn_mask, *, dropout_p: float, scale: float):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale)


@plain.variant("grouped", dims=GROUPED, **PROVEN)
def _(query, key, value, attn_mask, *, dropout_p: float, scale: float):
    heads = query.shape[1]
    key, value = repeated(key, heads), repeated(value, heads)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale)


@plain.variant("grouped_native", dims=GROUPED, **PROVEN)
def _(query, key, value, attn_mask, *, dropout_p: float, scale: float):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=True)


@plain.check
def _(match):
    told = meaning(match.attn_mask)
    match.require(told is not None, "its mask is not proven to be an interval of keys for each query")
    match.require(match.dropout_p == 0 or told in (Interval(), Interval(ahead=0)), "it has dropout, and its mask is not causal")
    rows, columns = match.query.meta.shape[-2], match.key.meta.shape[-2]
    match.require(same_literal(rows, columns), f"{rows} queries, {columns} keys")
    match.require(same_literal(match.query.meta.shape[-1], match.value.meta.shape[-1]), "keys and values differ in width")
