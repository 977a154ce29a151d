"""Attention with a mask of which nothing is proven: made before a graph break, of keys that a model chooses, with blocks of
images.

Its meaning is measured, in every step and on the device: the operator is handed the mask, computes nothing beyond the first and
last key that each query sees, and reads the mask where it has holes between them. So it stays in memory, unlike one whose meaning
is proven.
"""

import torch

from sloth.kernels.attention.attention import attention
from sloth.patterns.attention.additive_mask import HIDES, Added
from sloth.patterns.attention.attention import ATTENTION, bias, plain, readable, require_finite, require_widths, shown, told
from sloth.patterns.attention.index_expr import is_one, is_truth
from sloth.patterns.attention.levels import normal_at
from sloth.rewriter.graph.value import Value, same_literal
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.materialize import source_values


def given(match) -> Value | None:
    """The mask, once where it is the same for the whole batch."""
    mask = shown(match)
    return mask and measurable(mask, match.attn_mask, match)


def measurable(mask: Added, spelled: Value | None, match) -> Value:
    """What is true where a key is seen, as the graph has it, or where the mask that is added is more than what hides a key."""
    found = once(mask.seen, match)
    if spelled is None or is_truth(spelled) or all(v.nodes or v.op == "input" for v in source_values(found)):
        return found
    n, spelled = normal_at(spelled), once(spelled, match)
    return n.call("gt", (spelled, HIDES), (spelled.meta._replace(dtype=torch.bool, requires_grad=False),))


def once(seen: Value, match) -> Value:
    while seen.op == "expand" and not seen.mutated_storage and is_whole(seen.args[0], match):
        seen = seen.args[0]
    return seen


def is_whole(seen: Value, match) -> bool:
    """[S, T] or [1 or B, 1, S, T]."""
    shape, sizes = seen.meta.shape, (match.query.meta.shape[-2], match.key.meta.shape[-2])
    return same_literal(shape[-2:], sizes) and (len(shape) == 2 or len(shape) == 4 and is_one(shape[1]))


OPTIONS = {"documents": (), "valid": (), "visible": given, "bias": bias, "uniform": lambda match: not is_truth(match.attn_mask)}
first, *others = plain.variants
entry = pattern(ATTENTION, op=attention, dims=first.dims, name="attention_by_mask", variant=first.name, **OPTIONS)(
    first.reference
)
for variant in others:
    entry.variant(variant.name, variant.dims, **OPTIONS)(variant.reference)


@entry.check
def needs_dense_mask(match):
    mask = readable(match)
    match.require(told(match) is None, "what its mask means is proven")
    match.require(is_whole(given(match), match), "its mask is not one for all heads, of each query and key")
    match.require(match.dropout_p == 0, "it has dropout, and its mask is not proven to be causal")
    if not is_truth(match.attn_mask):
        require_finite(match, mask)
    require_widths(match)
