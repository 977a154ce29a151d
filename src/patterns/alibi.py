"""Which slopes a bias of attention scores is made of: slope_h · (j + c), with j the key's position and c the same for all keys.

A constant added to all scores of a query changes no softmax, so that is slope_h · (j − i), the operator's bias. Models round it
to their dtype on the way; the operator does not.
"""

import torch

from sloth.rewriter.ir import Value, same_literal

KEPT = ("cast", "view", "expand", "repeat", "slice")  # what only changes how often, and from which key on, it stands there

WIDE = (torch.int32, torch.int64)  # integers that hold any position


def slopes(bias: Value, heads: int) -> Value | None:
    """The slopes, in a tensor with dimensions of size 1 besides, of a bias [1 or B, heads, 1, S] or [(B·) heads, 1, S]."""
    while not bias.pinned:
        if bias.op == "input" and bias.outer is not None:  # passed into the body of a checkpoint
            bias = bias.outer
        elif bias.op in KEPT and _is_row(bias) and _keeps(bias):
            bias = bias.args[0]
        else:
            break
    if bias.op != "mul" or bias.pinned or not _is_row(bias) or not all(isinstance(a, Value) for a in bias.args):
        return None
    for slope, position in (bias.args, bias.args[::-1]):
        spans = [n for n in slope.meta.shape if not same_literal(n, 1)]
        of_heads = len(slope.meta.shape) > 2 and same_literal(slope.meta.shape[-3], heads) and len(spans) == (heads > 1)
        if of_heads and _is_position(position):
            return slope
    return None


def _is_row(v: Value) -> bool:
    """[…, heads, 1, keys]: the same for all queries."""
    return len(v.meta.shape) > 2 and same_literal(v.meta.shape[-2], 1)


def _keeps(v: Value) -> bool:
    """Are its rows those of one head after the other, again and again, if its argument's are? Are its keys neighbours?"""
    old, new = v.args[0].meta.shape, v.meta.shape
    if v.op == "cast":
        return v.meta.dtype.is_floating_point
    if v.op == "slice":
        return v.args[1] == len(new) - 1 and v.args[4] == 1
    if v.op == "repeat":
        return len(v.args[1]) == len(old) and all(k == 1 for k in v.args[1][1:])
    if v.op == "expand":
        return len(old) > 2 and same_literal(old[-3:], new[-3:])
    return len(old) > 2 and same_literal(old[-1], new[-1])


def _is_position(v: Value) -> bool:
    """j + c, of keys alone."""
    while v.op in ("view", "cast") and not v.pinned and (v.meta.dtype.is_floating_point or v.meta.dtype in WIDE):
        if v.op == "view" and not same_literal(v.args[0].meta.shape[-1], v.meta.shape[-1]):
            return False
        v = v.args[0]
    numbers = v.args[:-4]  # behind them dtype, layout, device, pin_memory
    return (
        v.op == "arange"
        and not v.pinned
        and v.meta.dtype in WIDE
        and len(v.meta.shape) == 1
        and (len(numbers) < 3 or numbers[2] == 1)
    )
