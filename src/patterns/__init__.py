"""Sloth's own pattern entries, one construct a file. Importing this package registers them."""

from sloth.patterns import cross_entropy, dora_weights, gated_mlp, layer_norm, linear_4bit, lora, rms_norm, rope

__all__ = ["cross_entropy", "dora_weights", "gated_mlp", "layer_norm", "linear_4bit", "lora", "rms_norm", "rope"]
