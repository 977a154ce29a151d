"""A rewrite cut out of its graph: the calls of the original, and the call that takes their place, as two functions of the same
tensors.

Nothing here asks the shadow what a node computes, or the check would believe what it is to check: the original is the nodes that
Dynamo traced, from those that hold the results back to those that the operator reads. What only one of the two reads (a mask
whose meaning was proven, ids that it was made of) is an input too.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sloth.rewriter.compile.structural_key import Bodies, body_of, graph_key, tensor_key
from sloth.rewriter.graph.lower import LoweredGraph
from sloth.rewriter.graph.value import Region, Value, values_in
from sloth.rewriter.match.matcher import Match
from sloth.rewriter.plan.legality import call_arguments, operands_of, takes_many
from sloth.rewriter.plan.materialize import LOWERINGS, lowered_args, source_values
from sloth.rewriter.plan.places import computed


@dataclass(eq=False)
class Cut:
    """inputs, outputs: nodes of the graph (inputs of graphs around it, too); original and replacement give a tuple, an element
    for each output. read: which inputs both of them read. names: of inputs, for people. regions: of the original's nodes.
    """

    placement: list[Match]
    view: LoweredGraph
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    original: fx.GraphModule
    replacement: fx.GraphModule
    read: list[bool]
    names: list[str]
    regions: dict[fx.Node, Region]
    key: Hashable = field(default=None)

    @property
    def region(self) -> Region:
        return self.placement[0].roots[0].region

    @property
    def grads(self) -> list[bool]:
        """Which inputs need a gradient."""
        return [self.region.grad and _needs_gradient(n, self.view) for n in self.inputs]

    @property
    def leaves(self) -> list[bool]:
        """Which inputs are leaves of autograd: parameters, and others that the model is called with."""
        return [n.op != "call_function" and getattr(n.meta.get("example_value"), "is_leaf", False) for n in self.inputs]


def cut(placement: list[Match], view: LoweredGraph, bodies: Bodies) -> Cut:
    """bodies: numbers those of checkpoints and autograd functions, the same for all cuts whose keys are compared."""
    roots = [r for m in placement for r in m.roots]
    results = [(n, i) for i, r in enumerate(roots) for n in computed(r) or r.nodes[:1]]
    outputs = [n for n, _ in results]
    inside, theirs = _inside(outputs, placement, view)
    replacement = _Replacement(view, inside)
    replacement.call(placement)
    order = {n: i for i, n in enumerate(view.gm.graph.nodes)}
    inputs = sorted(theirs | replacement.reads, key=lambda n: (order.get(n, -1), n.name))
    original, regions = _original(view, inputs, inside, outputs)
    ours = replacement.finished(inputs, placement, [i for _, i in results])
    read = [n in theirs and n in replacement.reads for n in inputs]
    names = [_name(n, placement, view) for n in inputs]
    made = Cut(placement, view, inputs, outputs, original, ours, read, names, regions)
    code = tuple(graph_key(gm.graph, gm, bodies) for gm in (original, ours))
    made.key = code, tuple(map(tensor_key, inputs)), tuple(made.grads), tuple(regions.values()), made.region
    return made


def _inside(outputs: list[fx.Node], placement: list[Match], view: LoweredGraph) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that compute the outputs, and those that they read.

    An operand is computed apart where the original does not read the node that the operator reads, but computes the same another
    time: in another node, or inside of one (autocast's cast). Then both computations are inside, up to what both of them read.
    """
    held = {h for m in placement for v in operands_of(m) for h in (source_values(v) if view.shadow.owns(v) else ())}
    own = {v for m in placement for v in m.values}
    apart: set[Value] = set()
    while True:
        found = _walked(outputs, own, held, apart, view)
        if isinstance(found, Value):
            apart.add(found)
            continue
        inside, read = found
        alone = {n for n in read if _is_float(n) and not any(n is h.nodes[0] for h in held)}
        hidden = {h for h in held - apart if alone and not alone.isdisjoint(_made_of(h.nodes[0]))}
        if not hidden:
            return inside, read
        apart |= hidden


def _walked(
    outputs: list[fx.Node], own: set[Value], held: set[Value], apart: set[Value], view: LoweredGraph
) -> tuple[set[fx.Node], set[fx.Node]] | Value:
    """Or an operand that turns out to be computed apart."""
    reads = {h.nodes[0] for h in held - apart}
    below = _readers(reads)
    inside: set[fx.Node] = set()
    found: set[fx.Node] = set()
    todo = [(n, False) for n in outputs] + [(h.nodes[0], True) for h in apart]
    while todo:
        n, above = todo.pop()
        values = set(values_in((view.env.get(n),)))
        if n in inside or n in found:
            continue
        if n.op == "get_attr" and body_of(n, view.gm) is not None:
            inside.add(n)
        elif n in reads or n.op in ("placeholder", "get_attr"):
            found.add(n)
        elif other := next((v for v in values & held - apart if len(nodes := computed(v)) > 1 and n in nodes), None):
            return other
        elif n in outputs or n in below or values & (own | apart) or above and any(len(computed(v)) > 1 for v in values):
            inside.add(n)
            todo += [(a, above or not apart.isdisjoint(values)) for a in n.all_input_nodes]
        else:
            found.add(n)
    return inside, found


def _is_float(n: fx.Node) -> bool:
    return getattr(n.meta.get("example_value"), "is_floating_point", lambda: False)()


def _made_of(n: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [n]
    while todo:
        new = [a for a in todo.pop().all_input_nodes if a not in found]
        found.update(new)
        todo += new
    return found


def _readers(nodes: set[fx.Node]) -> set[fx.Node]:
    """All that is computed of these."""
    found: set[fx.Node] = set()
    todo = [*nodes]
    while todo:
        new = [u for u in todo.pop().users if u not in found]
        found.update(new)
        todo += new
    return found


def _original(
    view: LoweredGraph, inputs: list[fx.Node], inside: set[fx.Node], outputs: list[fx.Node]
) -> tuple[fx.GraphModule, dict[fx.Node, Region]]:
    graph, attributes, regions = fx.Graph(), {}, {}
    env = {n: _placeholder(graph, n, i) for i, n in enumerate(inputs)}
    for n in view.gm.graph.nodes:
        if n in inside:
            env[n] = _copied(graph, n, env, attributes, view)
            regions[env[n]] = view.regions[n]
    graph.output(tuple(env[n] for n in outputs))
    return fx.GraphModule(attributes, graph), regions


def _placeholder(graph: fx.Graph, n: fx.Node, number: int) -> fx.Node:
    made = graph.placeholder(f"input_{number}")
    made.meta.update({k: v for k, v in n.meta.items() if k == "example_value"})
    return made


def _copied(graph: fx.Graph, n: fx.Node, env: dict[fx.Node, fx.Node], attributes: dict[str, Any], view: LoweredGraph) -> fx.Node:
    made = graph.node_copy(n, env.__getitem__)
    made.meta.pop("recompute", None)
    if n.op in ("get_attr", "call_module"):
        attributes[n.target] = view.gm.get_submodule(n.target)
    return made


class _Replacement:
    """The call with all that a rewrite writes out for it, as `Rewriter` in plan/apply.py does. reads: its inputs."""

    def __init__(self, view: LoweredGraph, inside: set[fx.Node]):
        self.view, self.inside = view, inside
        self.graph, self.attributes = fx.Graph(), {}
        self.reads: set[fx.Node] = set()
        self.env: dict[Any, fx.Node] = {}

    def call(self, placement: list[Match]) -> fx.Node:
        return self.graph.call_function(placement[0].pattern.op, call_arguments(placement, self.operand))

    def finished(self, inputs: list[fx.Node], placement: list[Match], results: list[int]) -> fx.GraphModule:
        """With an input for each of these: made once more, now that they are known."""
        self.graph, self.attributes = fx.Graph(), {}
        self.env = {n: _placeholder(self.graph, n, i) for i, n in enumerate(inputs)}
        made, op = self.call(placement), placement[0].pattern.op
        several = len(op._schema.returns) > 1 or takes_many(op)
        self.graph.output(tuple(self.graph.call_function(operator.getitem, (made, i)) if several else made for i in results))
        return fx.GraphModule(self.attributes, self.graph)

    def operand(self, v: Value) -> fx.Node:
        if v not in self.env:
            if not self.view.shadow.owns(v) or v.nodes:
                self.env[v] = self.node(v.nodes[0])
            elif v.replaces:
                self.env[v] = self.operand(v.replaces[0])
            else:
                given = tuple(self.operand(a) if isinstance(a, Value) else a for a in lowered_args(v))
                self.env[v] = self.graph.call_function(LOWERINGS[v.op], given)
        return self.env[v]

    def node(self, n: fx.Node) -> fx.Node:
        """An input; or, of an operand that is computed apart, that computation."""
        if n not in self.env:
            if n in self.inside:
                for a in n.all_input_nodes:
                    self.node(a)
                self.env[n] = _copied(self.graph, n, self.env, self.attributes, self.view)
            else:
                self.reads.add(n)
                self.env[n] = _placeholder(self.graph, n, len(self.reads))
        return self.env[n]


def _needs_gradient(n: fx.Node, view: LoweredGraph) -> bool:
    value, example = view.env.get(n), n.meta.get("example_value")
    if isinstance(value, Value) and value.meta is not None and not value.mutated_storage:
        return value.meta.requires_grad
    return bool(getattr(example, "requires_grad", False)) and view.region.grad


def _name(n: fx.Node, placement: list[Match], view: LoweredGraph) -> str:
    for i, m in enumerate(placement):
        for name, v in m.tensors.items():
            if view.shadow.owns(v) and any(n in h.nodes for h in source_values(v)):
                return name if len(placement) == 1 else f"{name} ({i + 1})"
    return n.name
