"""Masks that are added to scores: the least number there is where a key is hidden, and 0 or a bias where it is seen."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch

from sloth.patterns.attention.levels import as_value, levels, stopped
from sloth.patterns.attention.mask_analysis import Interval, name_of
from sloth.rewriter.graph.aliasing import root
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.matcher import Match

ABSORBS = torch.finfo(torch.bfloat16).min  # a sum with it, or less, is it again, whatever the score
HIDES = -9984.0  # −10,000 in bf16; less leaves a key no weight, unless scores of a query are thousands apart


class Added(NamedTuple):
    seen: Value  # true where a key is seen
    least: float  # what is added where it is not: no more than that
    bias: Value | None = None  # what is added where it is; None: 0
    alike: bool = True  # the same is added wherever it is not


def added(mask: Value) -> Added | None:
    """What the mask is where(seen, bias, least) of, however it is spelled, if it is."""
    if "added" not in mask.analyses:  # all variants ask
        mask.analyses["added"] = _added(mask)
    return mask.analyses["added"]


def _added(mask: Value) -> Added | None:
    known = levels(mask) or {}
    hidden = [x for x in known if not isinstance(x, Value) and x <= HIDES]
    others = [x for x in known if x not in hidden]
    if len(others) != 1 or not isinstance(others[0], Value) and others[0] != 0:
        return None
    (bias,) = others
    seen = as_value(known[bias], mask)
    return Added(seen, max(hidden, default=-inf), bias if isinstance(bias, Value) else None, len(hidden) < 2)


def why_not(mask: Value) -> str:
    """Why it is not read as a mask that is added: the operation at which reading stopped."""
    if (known := levels(mask)) is not None:
        told = ", ".join("a bias" if isinstance(x, Value) else f"{x:.6g}" for x in known)
        return f"its mask adds {told}: one of them should be 0, the others {HIDES:.0f} or less"
    v = stopped(mask)
    if root(v).op == "input":
        return "its mask comes into this graph from outside as numbers: of what they mean nothing is known"
    how = " written in place" if v.mutated_storage else ""
    return f"its mask is a bias: numbers that are added to the scores; it is read up to {name_of(v)}{how}"


def require_swallowed(match: Match, mask: Added, by_sink: bool = False) -> None:
    """Of a query that sees nothing, scores must be lost in what is added to them, or beside a sink."""
    match.require(by_sink or mask.alike, "a query may see nothing, and not the same is added to all its scores")
    swallowed = by_sink or mask.least <= ABSORBS
    match.require(swallowed, f"a query may see nothing, and {mask.least:.6g} does not absorb its scores")


def may_see_nothing(interval: Interval) -> bool:
    """Can a query be left without a key? It has itself, unless that is not valid or beyond its bounds."""
    beyond = any(bound is not None and bound < 0 for bound in (interval.ahead, interval.behind))
    return bool(interval.valid) or beyond
