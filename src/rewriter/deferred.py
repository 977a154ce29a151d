"""Results that a graph gives out but does not compute: logits beside a loss, made when somebody reads them.

The loss of an accepted match needs no logits. Where its graph gives them out, it gives out the head's input in their place, and
what compiled code returns there becomes a lazy tensor: the same nodes, run on the head's input and its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast

from sloth.rewriter.ir import Value
from sloth.rewriter.match import Match
from sloth.rewriter.normal_form import POINTWISE
from sloth.rewriter.shadow import View

ROW_BY_ROW = POINTWISE | {"linear", "cast"}


@dataclass(frozen=True)
class Deferred:
    """One output: where it is, its head as a function of hidden states and weights, and which inputs those weights are."""

    index: int
    make: Callable[..., torch.Tensor]  # Pattern.deferred
    head: Callable[..., torch.Tensor]
    weights: tuple[int, ...]
    plain: bool


def deferrable(match: Match, v: Value, view: View) -> bool:
    """Can `v`, which the match computes on the way, be computed of the match's operands later, row by row?"""
    if view.path or match.pattern.deferred is None:
        return False
    return all(_recipe(match, n, view) is not None for n in v.nodes if any(u.op == "output" for u in n.users))


def defer(view: View, matches: list[Match]) -> list[Deferred]:
    """Let the graph give out the heads' inputs."""
    inside = {v: m for m in matches if m.pattern.deferred is not None for v in m.values - set(m.roots)}
    output = view.gm.graph.output_node()
    given, found = list(output.args[0]), []
    inputs = [n for n in view.gm.graph.nodes if n.op == "placeholder"]
    for i, node in enumerate(given):
        match = inside.get(view.env.get(node)) if isinstance(node, fx.Node) else None
        recipe = match and _recipe(match, node, view)
        if recipe:
            nodes, hidden, weights = recipe
            autocast = _autocast(match, view)
            head = _function(nodes, (hidden, *weights), autocast)
            _, _, casts = autocast
            plain = not casts and all(view.env[n].op in ("linear", "cast") for n in nodes)
            given[i] = hidden
            at = tuple(map(inputs.index, weights))
            found.append(Deferred(i, match.pattern.deferred, head, at, plain))
    if found:
        output.args = (tuple(given),)
        for n in reversed(view.gm.graph.nodes):
            if not n.users and view.env.get(n) in inside and n.op not in ("placeholder", "output"):
                view.gm.graph.erase_node(n)
    return found


def returning(compiled: Callable[..., Any], deferred: Sequence[Deferred]) -> Callable[..., Any]:
    """`compiled`, with what its entry makes of it for each output that was deferred."""

    def run(*args: Any) -> tuple:
        out = list(compiled(*args))
        for d in deferred:
            out[d.index] = d.make(out[d.index], tuple(args[i] for i in d.weights), d.head, d.plain)
        return tuple(out)

    return run if deferred else compiled


def _recipe(match: Match, node: fx.Node, view: View) -> tuple[list[fx.Node], fx.Node, list[fx.Node]] | None:
    """The nodes that compute `node` of the match's operands, in order; the head's input; its weights, inputs of the graph."""
    nodes: dict[fx.Node, None] = {}
    leaves: dict[fx.Node, None] = {}

    def visit(n: fx.Node) -> None:
        if view.env.get(n) not in match.values:
            leaves[n] = None
        elif n not in nodes:
            for a in n.all_input_nodes:
                visit(a)
            nodes[n] = None

    visit(node)
    linear = [n for n in nodes if view.env[n].op == "linear"]
    if len(linear) != 1 or any(view.env[n].op not in ROW_BY_ROW for n in nodes):
        return None
    hidden = linear[0].args[0] if linear[0].args else None
    weights = [n for n in leaves if n is not hidden]
    if hidden not in leaves or any(n.op != "placeholder" for n in weights):
        return None
    if not all(isinstance(n.meta.get("example_value"), torch.Tensor) for n in leaves):
        return None
    return list(nodes), hidden, weights


def _autocast(match: Match, view: View) -> tuple:
    """(device type, dtype, enabled) of the autocast that the match stands in."""
    device = match.roots[0].meta.device.type
    if block := match.roots[0].region.autocast:
        return tuple([n for n in view.gm.graph.nodes if n.target is _enter_autocast][block - 1].args[:3])
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def _function(nodes: list[fx.Node], leaves: tuple[fx.Node, ...], autocast: tuple) -> Callable[..., torch.Tensor]:
    graph = fx.Graph()
    env = {leaf: graph.placeholder(f"x{i}") for i, leaf in enumerate(leaves)}
    for n in nodes:
        env[n] = graph.node_copy(n, env.__getitem__)
    graph.output(env[nodes[-1]])
    run = fx.GraphModule(torch.nn.Module(), graph).forward

    def head(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast(*autocast):
            return run(*tensors)

    return head
