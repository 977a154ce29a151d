"""Attention spelled out, with an added mask of which nothing is proven. What it is where(m, 0, least) of is measured, as in
`attention_dense_mask.py`.
"""

from inspect import signature

from sloth.kernels.attention.attention import attention
from sloth.patterns.attention.attention import ATTENTION
from sloth.patterns.attention.attention_dense_mask import is_whole, measurable
from sloth.patterns.attention.eager_attention import (
    all_alike,
    is_nan,
    readable,
    require_hidden,
    require_operands,
    shown,
    told,
    written,
)
from sloth.patterns.attention.eager_attention import entry as proven
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.registry import pattern


def given(match) -> Value | None:
    """The mask, once where it is the same for the whole batch."""
    mask = shown(match)
    return mask and measurable(mask, match.tensors.get("mask"), match)


def options(variant) -> dict:
    """Those of the entry whose masks are proven, with the mask itself for what is proven. Any query may see nothing."""
    nothing = {"documents": (), "valid": (), "ahead": None, "behind": None, "visible": given}
    always = {"uniform": all_alike, "nan": is_nan, "written": written}
    return variant.options | nothing | {name: lambda match, of=of: of(match, True) for name, of in always.items()}


MEASURED = [
    v
    for v in proven.variants
    if {"mask", "seen"} & (names := {*signature(v.reference).parameters}) and not {"dropout_p", "bias"} & names
]
first, *others = MEASURED
entry = pattern(ATTENTION, op=attention, dims=first.dims, name="eager_attention_by_mask", variant=first.name, **options(first))(
    first.reference
)
for variant in others:
    entry.variant(variant.name, variant.dims, **options(variant))(variant.reference)


@entry.check
def needs_dense_mask(match):
    mask = readable(match)
    match.require(told(match) is None, "what its mask means is proven")
    match.require(is_whole(given(match), match), "its mask is not one for all heads, of each query and key")
    require_hidden(match, mask, True)
    require_operands(match)
