"""Constants that are written in place while they are made: `m = torch.full(…); m.masked_fill_(hidden, 0)`.

A value in memory that somebody writes is nobody's but its own. Not so where the memory is a constant's, only whole tensors are
written, and nobody else has a view of it before that is over: then each write is a function of what was there, and its result is
what is there from then on, under whichever name. No node but the last write holds that value, so who reads it stands behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from sloth.rewriter.graph.aliasing import storages
from sloth.rewriter.graph.canonical import FRESH
from sloth.rewriter.graph.value import Value

Fills = dict[fx.Node, list[fx.Node]]  # a write, and the other names of what it writes


def fills(gm: fx.GraphModule, env: dict[fx.Node, Any], writes: Iterable[tuple[fx.Node, Value]]) -> Fills:
    """The writes of the graph that only make a constant."""
    found: Fills = {}
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    written = {n for n, _ in writes}
    for memory in {storages(n.args[0], gm) for n in written if n.args and isinstance(n.args[0], fx.Node)}:
        names = [n for n in order if not memory.isdisjoint(storages(n, gm))]
        if len(memory) != 1 or any(storages(n, gm) != memory for n in names) or not _is_constant(env.get(names[0])):
            continue
        calls = [n for n in order if n in written and any(x in names for x in n.all_input_nodes)]
        if not all(map(_writes_first, calls)):
            continue
        made = [n for n in names if order[n] <= order[calls[-1]]]  # by then
        if made[-1] is calls[-1] and all(map(_writes_first, made[1:])):
            found |= {n: made[: made.index(n)] for n in made[1:]}
    return found


def _writes_first(n: fx.Node) -> bool:
    """Does it write the tensor that it is a method of, whole?"""
    return n.op == "call_method" and n.target.endswith("_") and not n.target.endswith("__")


def _is_constant(v: Any) -> bool:
    """Is it made of numbers alone, in memory of its own?"""
    return isinstance(v, Value) and v.op in FRESH and all(map(_is_constant, v.inputs))
