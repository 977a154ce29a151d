"""Attention without dropout draws no random numbers, but torch's operators for it are marked as if it did: where checkpointing
computes one again, the state of the generator is saved, put back and restored around it, which takes the host longer than the
call. A pass over Inductor's graphs puts the same operators in their place under names of ours, without the mark.
"""

from __future__ import annotations

import torch
from torch import fx

from sloth.compat.dispatch import OpOverload

_ATTENTION = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def _plain(op: OpOverload) -> OpOverload:
    """The operator under another name, for good: compiled code that torch keeps on disk calls it."""
    name = f"sloth::{op._schema.name.removeprefix('aten::')}_without_dropout"
    torch.library.define(name, str(op._schema).removeprefix(op._schema.name), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", op)
    torch.library.register_fake(name, op)
    return getattr(torch.ops.sloth, name.removeprefix("sloth::")).default


PLAIN = {op: _plain(op) for op in (getattr(torch.ops.aten, name).default for name in _ATTENTION)}


def drop_rng_tag_from_sdpa(graph: fx.Graph) -> None:
    """Of ATen operations, before forward and backward pass are divided."""
    for n in graph.nodes:
        if n.target in PLAIN and _dropout(n) == 0:
            n.target = PLAIN[n.target]


def _dropout(call: fx.Node) -> float:
    place = [a.name for a in call.target._schema.arguments].index("dropout_p")
    return call.args[place] if len(call.args) > place else call.kwargs.get("dropout_p", 0.0)
