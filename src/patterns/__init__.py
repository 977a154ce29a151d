"""Sloth's own pattern entries, one construct a file. Importing this package registers them."""

from sloth.patterns import (
    attention,
    attention_by_mask,
    cross_entropy,
    dora_weights,
    eager_attention,
    eager_attention_by_mask,
    gated_mlp,
    head,
    layer_norm,
    linear_4bit,
    linear_cross_entropy,
    lora,
    norm_rope,
    rms_norm,
    rope,
    rows_of_logits,
)

__all__ = [
    "attention",
    "attention_by_mask",
    "cross_entropy",
    "dora_weights",
    "eager_attention",
    "eager_attention_by_mask",
    "gated_mlp",
    "head",
    "layer_norm",
    "linear_4bit",
    "linear_cross_entropy",
    "lora",
    "norm_rope",
    "rms_norm",
    "rope",
    "rows_of_logits",
]
