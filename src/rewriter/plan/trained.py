"""Which values a gradient comes to in the backward pass, and which matches one call must not stand for because of it.

A result that nobody reads, or only what is detached, gets no gradient. Its operator, asked for the gradient of another result
alone, gives none to what the first is made of, and autograd asks what is behind that for a gradient of nothing. Most of torch's
formulas give nothing then. That of attention, while AOTAutograd traces it, gives tensors that are not there when the graph runs.
"""

from __future__ import annotations

from torch import fx

from sloth.rewriter.graph.aliasing import may_write_or_bodies, tensors
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.matcher import Match


def nodes_with_gradients(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that a gradient comes to, or may: what is written to memory may be read in it elsewhere."""
    found: set[fx.Node] = set()
    for n in reversed(graph.nodes):
        held = list(tensors(n.meta.get("example_value")))
        needs = not held or any(t.requires_grad for t in held)
        if n.op == "output" or needs and (not found.isdisjoint(n.users) or may_write_or_bodies(n)):
            found.add(n)
    return frozenset(found)


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
