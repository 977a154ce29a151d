"""Which values a gradient comes to in the backward pass, and which matches one call must not stand for because of it.

A result that nobody reads, or only what is detached, gets no gradient. Its operator, asked for the gradient of another result
alone, gives none to what the first is made of, and autograd asks what is behind that for a gradient of nothing. Most of torch's
formulas give nothing then. That of attention, while AOTAutograd traces it, gives tensors that are not there when the graph runs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from sloth.rewriter.graph.aliasing import may_write_or_bodies, tensors
from sloth.rewriter.graph.lower import PLAIN, LoweredGraph
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.matcher import Match


def nodes_with_gradients(view: LoweredGraph, around: Mapping[int, frozenset[fx.Node]]) -> frozenset[fx.Node]:
    """The nodes that a gradient comes to, or may: what is written to memory may be read in it elsewhere. around: those of the
    graphs that call this one, by the id of their view.
    """
    found: set[fx.Node] = set()
    results = _results_with_gradients(view, around)
    for n in reversed(view.gm.graph.nodes):
        held = list(tensors(n.meta.get("example_value")))
        needs = not held or any(t.requires_grad for t in held)
        if n.op != "output" and needs and (n in results or not found.isdisjoint(n.users) or may_write_or_bodies(n)):
            found.add(n)
    return frozenset(found)


def _results_with_gradients(view: LoweredGraph, around: Mapping[int, frozenset[fx.Node]]) -> set[fx.Node]:
    """All that the graph gives; of a checkpoint's body, what gets one where it is called."""
    output = view.gm.graph.output_node()
    given = output.args[0]
    if not isinstance(given, tuple | list) or not view.calls or any(c.target.name() not in PLAIN for c in view.calls):
        return set(output.all_input_nodes)
    wanted: set[fx.Node] = set()
    for call, caller in zip(view.calls, view.callers, strict=True):
        trained = around.get(id(caller))
        for user in call.users:
            if user.target is not operator.getitem or trained is None:
                return set(output.all_input_nodes)
            if user in trained and isinstance(result := given[user.args[1]], fx.Node):
                wanted.add(result)
    return wanted


def gets_gradient(v: Value, trained: frozenset[fx.Node]) -> bool:
    return v.meta.requires_grad and not (v.nodes and trained.isdisjoint(v.nodes))


def asked_for_nothing(match: Match, trained: frozenset[fx.Node]) -> list[Value]:
    """Operands that need a gradient, and of which only those results are made that get none, where others get one."""
    roots = [r for r in match.roots if r.meta.requires_grad]
    idle = [r for r in roots if not gets_gradient(r, trained)]
    if not idle or len(idle) == len(roots):
        return []
    reached = {v for r in roots if r not in idle for v in _made_of(r, match)}
    return [v for v in match.tensors.values() if v.meta.requires_grad and v not in reached]


def _made_of(root: Value, match: Match) -> set[Value]:
    """What the match makes this result of."""
    seen, todo = {root}, [root]
    while todo:
        for v in todo.pop().inputs:
            if v not in seen:
                seen.add(v)
                todo += [v] if v in match.values else []
    return seen
