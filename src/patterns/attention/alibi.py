"""Biases of attention scores that are ALiBi's: slope_h · position_j, the same for all queries.

The operator reads the bias of each key as the model rounds it, so that positions may be counted by data, as BLOOM does where
there is padding. What is proven is that it holds one number for each head and key, none of which is there to hide a key.
"""

from typing import Any

import torch

from sloth.patterns.attention.index_expr import is_one, source
from sloth.rewriter.graph.value import Value, same_literal

KEPT = ("cast", "view", "expand", "repeat", "slice")  # what only changes how often, and from which key on, it stands there
ONES = ("ones", "new_ones", "ones_like", "zeros", "new_zeros", "zeros_like")
MODERATE = 1e4


def of_keys(bias: Value, heads: int) -> Value | None:
    """The bias [1 or B, heads, 1, S] or [(B·) heads, 1, S] of all queries, if it is ALiBi's."""
    while bias.op == "expand" and not bias.mutated_storage and not _is_row(bias):
        bias = bias.args[0]
    shape = bias.meta.shape
    by_heads = len(shape) in (3, 4) and same_literal(shape[-3], heads) or len(shape) == 3 and _is_flat(bias, heads)
    return bias if by_heads and _is_row(bias) and _is_slope_times_position(bias) else None


def _is_row(v: Value) -> bool:
    """[…, heads, 1, keys]: the same for all queries."""
    return len(v.meta.shape) > 2 and is_one(v.meta.shape[-2])


def _is_flat(v: Value, heads: int) -> bool:
    """Heads of one sequence after the other in one dimension: scores are so too, or would not be added to it."""
    n = v.meta.shape[0]
    return not isinstance(n, int) or n % heads == 0


def _is_slope_times_position(v: Value) -> bool:
    v = source(v)
    if v.mutated_storage or not v.meta.dtype.is_floating_point:
        return False
    if v.op in KEPT or v.op in ("mul", "div") and _is_moderate(v.args[1]):
        return _is_slope_times_position(v.args[0])
    if v.op != "mul" or not all(isinstance(a, Value) for a in v.args):
        return False
    return any(is_one(slope.meta.shape[-1]) and _is_position(position) for slope, position in (v.args, v.args[::-1]))


def _is_position(x: Value) -> bool:
    """Integers, or numbers counted of ones and integers."""
    x = source(x)
    if x.mutated_storage or x.meta.dtype == torch.bool:
        return False
    if not x.meta.dtype.is_floating_point or x.op in ONES:
        return True
    if x.op in ("add", "sub", "mul"):
        return all(_is_position(a) if isinstance(a, Value) else _is_moderate(a) for a in x.args)
    return x.op in (*KEPT, "cumsum") and _is_position(x.args[0])


def _is_moderate(x: Any) -> bool:
    return isinstance(x, int | float) and 1 / MODERATE < abs(x) < MODERATE
