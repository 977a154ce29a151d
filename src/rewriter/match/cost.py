"""Whether a rewrite pays. Legal matches are asked before any is chosen; what does not pay is refused with status `unprofitable`.

    @cost(lora_linear)                      # an operator, an entry, or an entry's name
    def few_rows(match):
        return "a few rows are faster as they are" if … else None

What chooses a kernel inside of an operator is the operator's: here is decided only whether there is a call of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.matcher import Match, Refused
from sloth.rewriter.match.pattern import LazyOutputRule, Pattern
from sloth.rewriter.match.registry import COSTS, deferrals, overload, patterns
from sloth.rewriter.notices import warn_once

Function = Callable[[Any], str | None]


class Cost(NamedTuple):
    """operations: of the graph that the call takes the place of; values: these, views and casts; reason: why it does not pay,
    or why it is made all the same.
    """

    operations: int
    values: int
    reason: str = ""


def cost(of: Any) -> Callable[[Function], Function]:
    """Register what says whether rewrites of an entry pay, or of all entries with an operator: `fn(match)` returns why not, or
    None. In place of the function that was registered for it before; an entry's counts more than its operator's.

    of: an entry, an entry's name, or an operator of torch.library. Of an entry that defers (`head`), fn is given the Value of the
    layer. Raises ValueError where there is no entry of this name.
    """
    if isinstance(of, str) and of not in (known := [e.name for e in (*patterns(), *deferrals())]):
        raise ValueError(f"there is no entry {of!r}; there are {', '.join(known)}")
    key = of if isinstance(of, str) else of.name if isinstance(of, Pattern | LazyOutputRule) else overload(of)

    def enter(fn: Function) -> Function:
        COSTS[key] = fn
        return fn

    return enter


@dataclass(frozen=True)
class Costs:
    """The stage. always: entries and constructs of which every legal rewrite is made."""

    always: frozenset[str] = frozenset()

    def of(self, match: Match) -> Cost:
        """What the match is worth. Raises Refused where it does not pay, or where its function raises."""
        reason = self.why_not(match.pattern, match)
        if reason and not self.is_always(match.pattern):
            raise Refused("unprofitable", reason)
        return Cost(*match.size, f"made all the same: {reason}" if reason else "")

    def wants(self, entry: LazyOutputRule, layer: Value) -> bool:
        """Does the entry want the layer, and does it pay to leave it?"""
        return entry.wanted(layer) and not self.left(entry, layer)

    def left(self, entry: LazyOutputRule, layer: Value) -> str:
        """Why a layer that the entry wants is computed all the same."""
        try:
            return "" if self.is_always(entry) else self.why_not(entry, layer) or ""
        except Refused as why:
            return str(why)

    def why_not(self, entry: Pattern | LazyOutputRule, asked: Any) -> str | None:
        """What the function of the entry, or of its operator, says."""
        function = COSTS.get(entry.name) or COSTS.get(getattr(entry, "op", ""))
        try:
            return function(asked) if function is not None else None
        except Refused as why:  # match.require
            return str(why)
        except Exception as e:  # a bug of one function costs its entry's rewrites, not the graph
            why = f"{type(e).__name__}: {e}".split("\n")[0]
            warn_once(f"entry {entry.name!r} is not used where its cost raises: {why}")
            raise Refused("error", f"the cost of {entry.name} raises {why}") from e

    def is_always(self, entry: Pattern | LazyOutputRule) -> bool:
        return not self.always.isdisjoint((entry.name, entry.construct.name))
