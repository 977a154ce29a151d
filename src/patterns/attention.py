"""Attention with a mask that is computed: where the mask is proven to be causal or empty, the kernels are told so."""

import torch
import torch.nn.functional as F

from sloth.kernels.attention import attention
from sloth.patterns.mask_meaning import meaning
from sloth.rewriter.ir import Value, same_literal
from sloth.rewriter.pattern import Construct
from sloth.rewriter.registry import pattern


def is_masked(v: Value) -> bool:
    return v.op == "scaled_dot_product_attention" and isinstance(v.args[3], Value)


ATTENTION = Construct("attention", "attention mask", anchor=is_masked)
DIMS = {"query": "B H S D", "key": "B H S D", "value": "B H S D", "attn_mask": "B 1 S S"}
GROUPED = {"query": "B 2*G S D", "key": "B G S D", "value": "B G S D"}
PROVEN = {"documents": (), "valid": (), "ahead": lambda match: 0 if meaning(match.attn_mask) == "causal" else None}


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
    match.require(meaning(match.attn_mask) is not None, "its mask is not proven to be causal")
    rows, columns = match.query.meta.shape[-2], match.key.meta.shape[-2]
    match.require(same_literal(rows, columns), f"{rows} queries, {columns} keys")
    match.require(same_literal(match.query.meta.shape[-1], match.value.meta.shape[-1]), "keys and values differ in width")
