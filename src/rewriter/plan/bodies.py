"""What a body needs of the graphs around it becomes one more input of it, and argument of its calls."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from sloth.rewriter.graph.lower import LoweredGraph
from sloth.rewriter.graph.value import Value


def lift_captured_value(v: Value, view: LoweredGraph) -> fx.Node:
    """The node that holds `v` of the graph around this body, or further out: one more input, and argument of the call."""
    inputs = view.gm.graph.find_nodes(op="placeholder")
    if known := [n for n in inputs if isinstance(view.env[n], Value) and view.env[n].captured_from is v]:
        return known[0]
    source = v.nodes[0] if view.around.shadow.owns(v) else lift_captured_value(v, view.around)
    node = add_input(view, [source] * len(view.calls))
    value = view.env[node] = view.shadow.add("input", (node.name,), v.meta, view.region, origin=node)
    value.captured_from, value.nodes = v, [node]
    return node


def add_input(view: LoweredGraph, given: Sequence[fx.Node]) -> fx.Node:
    """One more input of a body, the last, and of each of its calls one more argument."""
    *_, last = view.gm.graph.find_nodes(op="placeholder")
    with view.gm.graph.inserting_after(last):
        node = view.gm.graph.placeholder(f"{given[0].name}_passed")
    node.meta.update({k: m for k, m in given[0].meta.items() if k in ("example_value", "stack_trace")})
    for call, argument in zip(view.calls, given, strict=True):
        call.args = (*call.args, argument)
    view.regions[node] = view.region
    return node
