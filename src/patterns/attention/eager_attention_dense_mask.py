"""Attention spelled out, with an added mask of which nothing is proven. What it is where(m, 0, least) of is measured, as in
`attention_dense_mask.py`.
"""

from inspect import signature

from sloth.kernels.attention.attention import attention
from sloth.patterns.attention.additive_mask import added, require_swallowed
from sloth.patterns.attention.attention import ATTENTION
from sloth.patterns.attention.attention_dense_mask import is_whole, once
from sloth.patterns.attention.eager_attention import entry as proven
from sloth.patterns.attention.eager_attention import require_operands, seen, told
from sloth.patterns.attention.mask_analysis import why_not
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.registry import pattern


def given(match) -> Value | None:
    """The mask, once where it is the same for the whole batch."""
    mask = seen(match)
    return mask and once(mask, match)


def options(variant) -> dict:
    """Those of the entry whose masks are proven, with the mask itself for what is proven."""
    nothing = {"documents": (), "valid": (), "ahead": None, "behind": None}
    return variant.options | nothing | {"visible": given, "uniform": lambda match: "sinks" not in match.tensors}


MEASURED = [
    v for v in proven.variants if "mask" in (names := signature(v.reference).parameters) and not {"dropout_p", "bias"} & {*names}
]
first, *others = MEASURED
entry = pattern(ATTENTION, op=attention, dims=first.dims, name="eager_attention_by_mask", variant=first.name, **options(first))(
    first.reference
)
for variant in others:
    entry.variant(variant.name, variant.dims, **options(variant))(variant.reference)


@entry.check
def needs_dense_mask(match):
    mask = added(match.mask)
    match.require(mask is not None and mask.bias is None, why_not(match.mask))
    match.require(told(match) is None, "what its mask means is proven")
    match.require(is_whole(given(match), match), "its mask is not one for all heads, of each query and key")
    require_swallowed(match, mask.least, "sinks" in match.tensors)
    require_operands(match)
