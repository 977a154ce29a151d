"""Sloth's own pattern entries, one construct a file. Importing this package registers them, in this order: of two entries that
match the same, the first is taken.
"""

# isort: off
from sloth.patterns.attention import attention, attention_dense_mask
from sloth.patterns.loss import cross_entropy
from sloth.patterns.attention import eager_attention, eager_attention_dense_mask
from sloth.patterns import gated_mlp, gated_formula
from sloth.patterns.loss import head
from sloth.patterns import layer_norm, linear_4bit
from sloth.patterns.loss import linear_cross_entropy
from sloth.patterns import lora, norm_rope, rms_norm, rope
from sloth.patterns.rotation import rotation
from sloth.patterns.loss import sliced_logits
# isort: on

__all__ = [
    "attention",
    "attention_dense_mask",
    "cross_entropy",
    "eager_attention",
    "eager_attention_dense_mask",
    "gated_formula",
    "gated_mlp",
    "head",
    "layer_norm",
    "linear_4bit",
    "linear_cross_entropy",
    "lora",
    "norm_rope",
    "rms_norm",
    "rope",
    "rotation",
    "sliced_logits",
]
