"""Attention by torch's own kernels (flash, cuDNN, …), told what the mask means instead of the mask.

    out = softmax(q kᵀ · scale + mask) v,    mask: j ≤ i ("causal") or nothing

Shapes   query [B, H, S, D], key and value [B, G, S, D] with H a multiple of G, each of which serves H / G heads in a row.
Backward is that of torch's kernels. With a mask tensor they read and write S² values a head or leave their fast path altogether.
"""

import torch
import torch.nn.functional as F

torch.library.define(
    "sloth::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::attention", "CompositeImplicitAutograd")
def _(query, key, value, attn_mask, dropout_p, is_causal, scale=None):
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped)


attention = torch.ops.sloth.attention.default
"""attention(query, key, value, attn_mask, dropout_p, is_causal, scale=None) -> [B, H, S, D]"""
