"""Masks that are added to scores: the least number there is where a key is hidden, and 0 or a bias where it is seen."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sloth.patterns.attention.index_expr import is_truth, source
from sloth.patterns.attention.mask_analysis import Interval
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.matcher import Match

ABSORBS = torch.finfo(torch.bfloat16).min  # a sum with it, or less, is it again, whatever the score
ZEROS = ("zeros", "zeros_like", "new_zeros", "full")
NOT = ("bitwise_not", "logical_not")


class Added(NamedTuple):
    seen: Value  # true where a key is seen
    least: float  # what is added where it is not
    bias: Value | None  # what is added where it is; None: 0


def added(mask: Value) -> Added | None:
    """What the mask is where(seen, bias, least) of, in either spelling, if it is."""
    mask = source(mask)
    if mask.mutated_storage or mask.op not in ("where", "masked_fill"):
        return None
    if mask.op == "where":
        seen, bias, least = mask.args
    else:
        bias, hidden, least = mask.args
        seen = seen_of(hidden)
        bias = 0 if source(hidden).op == "cast" and source(hidden).args[0] is bias else bias  # what is 0 is filled nowhere
    if seen is None or not isinstance(least, float) or least > torch.finfo(mask.meta.dtype).min:
        return None
    return Added(seen, least, None if _is_zero(bias) else bias) if isinstance(bias, Value) or _is_zero(bias) else None


def seen_of(hidden: Value) -> Value | None:
    """What `hidden` is the contrary of: itself said so, or as what is not 0 in a mask that is added."""
    hidden = source(hidden)
    if not is_truth(hidden):
        return _zero_where(hidden)
    if hidden.mutated_storage or not hidden.args or not isinstance(hidden.args[0], Value):
        return None
    of = hidden.args[0]
    if hidden.op in NOT:
        return of
    if hidden.op == "cast" and is_truth(hidden) or hidden.op == "ne" and hidden.args[1] == 0:
        return _zero_where(of)
    if hidden.op == "lt" and isinstance(hidden.args[1], int | float):
        found = added(of)
        return found.seen if found is not None and found.bias is None and found.least < hidden.args[1] <= 0 else None
    return None


def _zero_where(x: Value) -> Value | None:
    """m, if x is where(m, 0, least) or 1 − m."""
    x = source(x)
    if x.op == "sub" and not x.mutated_storage and x.args[0] == 1:
        m = source(x.args[1])
        return m.args[0] if m.op == "cast" and not m.mutated_storage and is_truth(m.args[0]) else None
    found = added(x)
    return found.seen if found is not None and found.bias is None else None


def _is_zero(x: Value | float) -> bool:
    if isinstance(x, Value) and x.op in ZEROS and not x.mutated_storage:
        x = x.args[1] if x.op == "full" else 0
    return not isinstance(x, Value) and x == 0


def require_swallowed(match: Match, least: float, by_sink: bool = False) -> None:
    """Of a query that sees nothing, scores must be lost in what is added to them, or beside a sink."""
    match.require(-float("inf") < least, "a query may see nothing, and is nan then")
    match.require(by_sink or least <= ABSORBS, f"a query may see nothing, and {least} does not absorb its scores")


def may_see_nothing(interval: Interval) -> bool:
    """Can a query be left without a key? It has itself, unless that is not valid or beyond its bounds."""
    beyond = any(bound is not None and bound < 0 for bound in (interval.ahead, interval.behind))
    return bool(interval.valid) or beyond
