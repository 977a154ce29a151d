"""When two pieces of a graph are the same code: keys that are equal for them alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from sloth.rewriter.graph.aliasing import tensors


def body_of(n: fx.Node, gm: fx.GraphModule) -> fx.GraphModule | None:
    """Of a checkpoint, say."""
    value = attrgetter(n.target)(gm) if n.op == "get_attr" else None
    return value if isinstance(value, fx.GraphModule) else None


class Bodies:
    """Bodies of checkpoints and the like, by number: one for all that are the same code."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.known: dict[int, int] = {}

    def number(self, body: fx.GraphModule) -> int:
        if id(body) not in self.known:
            self.known[id(body)] = self.numbers.setdefault(graph_key(body.graph, body, self), len(self.numbers))
        return self.known[id(body)]


def call_key(n: fx.Node, gm: fx.GraphModule, bodies: Bodies) -> Hashable:
    """What a call looks like, whatever it is called with."""
    if n.op == "get_attr":
        return _attribute(n, gm, bodies)
    return n.op, n.target, _literal((n.args, n.kwargs), lambda _: None), tensor_key(n)


def graph_key(graph: fx.Graph, gm: fx.GraphModule, bodies: Bodies) -> Hashable:
    """The same for two graphs that are the same code. `gm` has their attributes."""
    order = {n: i for i, n in enumerate(graph.nodes)}

    def target(n: fx.Node) -> Hashable:
        return _attribute(n, gm, bodies) if n.op == "get_attr" else n.op.startswith("call") and n.target

    return tuple((n.op, target(n), _literal((n.args, n.kwargs), order.get), n.meta.get("recompute")) for n in order)


def _attribute(n: fx.Node, gm: fx.GraphModule, bodies: Bodies) -> Hashable:
    body = body_of(n, gm)
    return (False, id(attrgetter(n.target)(gm))) if body is None else (True, bodies.number(body))


def _literal(a: Any, of: Callable[[fx.Node], Hashable]) -> Hashable:
    """Of code, so unlike `literal_key` it tells lists from tuples: x[[0, 1]] is not x[(0, 1)]."""
    if isinstance(a, fx.Node):
        return fx.Node, of(a)
    if isinstance(a, tuple | list):
        return type(a), *(_literal(x, of) for x in a)
    if isinstance(a, dict):
        return dict, *((k, _literal(v, of)) for k, v in a.items())
    if isinstance(a, slice):
        return slice, *(_literal(x, of) for x in (a.start, a.stop, a.step))
    return type(a), a, repr(a) if isinstance(a, float) else ""  # 0.0 is not -0.0


def tensor_key(n: fx.Node) -> Hashable:
    """What a compiler sees of the node's tensors."""
    value = n.meta.get("example_value")
    if not isinstance(value, torch.Tensor | tuple | list):
        return str(value)
    return tuple(
        (str((*t.shape, *t.stride(), t.storage_offset())), t.dtype, t.device, t.requires_grad, type(t)) for t in tensors(value)
    )
