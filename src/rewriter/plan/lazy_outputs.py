"""Results that a graph gives out but does not compute: logits, made when somebody reads them.

A graph that gives out what linear layers compute row by row (a head; a head and its adapter) gives out their inputs in its place,
side by side, and what compiled code returns there becomes a lazy tensor: the same nodes, run on these inputs and the layers'
weights. There are two such cases: an accepted match does without its logits (head + loss), and an entry without an operator
wants the layers (`LazyOutputRule`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx

from sloth.lazy.weights import RematerializedWeight
from sloth.rewriter.graph.aliasing import is_plain
from sloth.rewriter.graph.ambient import OFF, dtype_of
from sloth.rewriter.graph.canonical import POINTWISE
from sloth.rewriter.graph.lower import LoweredGraph
from sloth.rewriter.graph.value import Symbol, Value, same_literal, uncast
from sloth.rewriter.match.cost import Costs
from sloth.rewriter.match.matcher import Match
from sloth.rewriter.match.pattern import LazyOutputRule
from sloth.rewriter.plan.materialize import LOWERINGS, lowered_args
from sloth.rewriter.report import MATCHED, Site, source

ROW_BY_ROW = POINTWISE | {"linear", "cast"}


Weights = tuple[int | RematerializedWeight, int | None]  # of a layer, its weight and bias: which inputs of the graph


@dataclass(frozen=True)
class Deferred:
    """One output: where it is, what makes it of the layers' inputs, and the layers' weights."""

    index: int
    make: Callable[..., torch.Tensor]  # Pattern.deferred, LazyOutputRule.make
    weights: list[Weights]
    step: Callable[..., torch.Tensor] | None  # what follows the layers
    autocast: tuple[str, torch.dtype, bool]
    plain: bool  # that is nothing, or casts
    grad: bool  # the grad mode that the graph switches to, if any, allows a gradient


class Layer(NamedTuple):
    """A call of a linear layer whose weights are inputs of the graph, or made of such."""

    node: fx.Node
    hidden: fx.Node
    weight: fx.Node | Value
    bias: fx.Node | None


class Chain(NamedTuple):
    """The nodes from linear layers to an output, in graph order."""

    nodes: list[fx.Node]
    layers: list[Layer]


def deferrable(match: Match, v: Value, view: LoweredGraph) -> bool:
    """Can `v`, which the match computes on the way, be computed of the match's operands later, row by row?"""
    if view.path or match.pattern.deferred is None:
        return False
    chains = [_chain(n, view) for n in v.nodes if any(u.op == "output" for u in n.users)]
    return all(c is not None and all(view.env[layer.node] in match.values for layer in c.layers) for c in chains)


def only_given_out(match: Match, v: Value, view: LoweredGraph) -> bool:
    """Is `v` a cast of what the match computes on the way, read by nobody but the graph's caller, and deferrable?"""
    read = [user for n in v.nodes for user in n.users]
    given = bool(read) and all(u.op == "output" for u in read) and not v.users
    return given and v.op == "cast" and deferrable(match, v, view)


class LazyOutput(NamedTuple):
    """One to be: which output, of what it is computed, and what makes it (Pattern.deferred, LazyOutputRule.make)."""

    index: int
    chain: Chain
    make: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class LazyOutputs:
    """Those of one view. What is asked before the rewrite is for the plan; what is done, is asked of the rewritten graph: what
    reads a layer, and what the layer reads, may be an operator's call by then.
    """

    view: LoweredGraph
    deferrals: Sequence[LazyOutputRule]
    costs: Costs

    @cached_property
    def reserved(self) -> set[Value]:
        """What no match is to compute, a layer with its adapter say: a deferral wants it, and nobody but the caller reads it."""
        if self.view.path:
            return set()
        wanted, found = self.wanted([]), set()
        given = self.view.gm.graph.output_node().args[0] if wanted else ()
        for chain in (_chain(node, self.view) for node in given if isinstance(node, fx.Node)):
            if chain and all(self.view.env[layer.node] in wanted for layer in chain.layers) and not _kept(chain, self.view):
                found |= {self.view.env[n] for n in chain.nodes}
        return found

    def found(self, matches: list[Match]) -> tuple[list[LazyOutput], list[Site]]:
        """The outputs that these matches, and the deferrals, leave to be computed later. Also a site for each layer that a
        deferral wants, adapters aside.
        """
        view, sites, found = self.view, {}, []
        if view.path:
            return [], []
        makers = {v: m.pattern.deferred for m in matches if m.pattern.deferred is not None for v in m.values}
        wanted = self.wanted(matches)
        for v, entry in wanted.items():
            reader = next(user for n in v.nodes for user in n.users)
            sites[v] = _site(v, entry, "escape", f"`{reader.name}` in the graph reads it")
        for i, node in enumerate(view.gm.graph.output_node().args[0]):
            chain = _chain(node, view) if isinstance(node, fx.Node) else None
            layers = [view.env[layer.node] for layer in chain.layers] if chain else []
            made = {makers.get(layer) for layer in layers}
            if layers and all(layer in wanted for layer in layers):
                why = _kept(chain, view)
                sites |= {layers[0]: _site(layers[0], wanted[layers[0]], "escape" if why else MATCHED, why)}
                sites = {v: site for v, site in sites.items() if v not in layers[1:]}
                made = set() if why else {wanted[layer].make for layer in layers}
            if len(made) == 1 and None not in made:
                found.append(LazyOutput(i, chain, *made))
        return found, list(sites.values())

    def apply(self, matches: list[Match]) -> tuple[list[Deferred], list[Site]]:
        """Let the graph, in which these matches were made, give out the inputs of layers in place of lazy outputs."""
        found, sites = self.found(matches)
        graph, nodes = self.view.gm.graph, set()
        output = graph.output_node()
        given, deferred = list(output.args[0]), []
        for index, chain, make in found:
            given[index] = _side_by_side(chain, self.view)
            nodes.update((*chain.nodes, *(layer.origin for layer in (self.view.env[x.node] for x in chain.layers))))
            deferred.append(_deferred(index, make, chain, self.view))
        if found:
            output.args = (tuple(given),)
        for n in reversed(graph.nodes):
            if n in nodes and not n.users:
                graph.erase_node(n)
        return deferred, sites

    def wanted(self, matches: list[Match]) -> dict[Value, LazyOutputRule]:
        """Layers outside of matches that somebody reads and a deferral wants."""
        covered = {v for m in matches for v in m.values}
        return {v: d for d in self.deferrals for v in self.layers if v not in covered and self.costs.wants(d, v)}

    @property
    def layers(self) -> list[Value]:
        """Those that somebody reads."""
        return [v for v in self.view.shadow.values if v.op == "linear" and any(n.users for n in v.nodes)]

    def lines(self, matches: list[Match]) -> list[str]:
        """For the print-out of a plan with these matches."""
        lines = [f"output {index} is computed when it is read" for index, *_ in self.found(matches)[0]]
        wanted = [(d, v) for d in self.deferrals for v in self.layers if d.wanted(v)]
        return lines + [f"{d.name} refused, unprofitable: {why}" for d, v in wanted if (why := self.costs.left(d, v))]


def wrap_outputs(compiled: Callable[..., Any], deferred: Sequence[Deferred]) -> Callable[..., Any]:
    """`compiled`, with what its entry makes of it for each output that was deferred."""

    def run(*args: Any) -> tuple:
        out = list(compiled(*args))
        for d in deferred:
            given = lambda w: None if w is None else w.of(args) if isinstance(w, RematerializedWeight) else args[w]  # noqa: E731
            first, *more = [tuple(map(given, layer)) for layer in d.weights]
            with torch.set_grad_enabled(d.grad):
                out[d.index] = d.make(out[d.index], *first, d.step, d.autocast, d.plain, more)
        return tuple(out)

    return run if deferred else compiled


def _chain(node: fx.Node, view: LoweredGraph) -> Chain | None:
    """From the layers that `node` is computed of, row by row; None where it is not, or not of inputs of the graph."""
    nodes, layers, todo = set(), {}, [node]
    while todo:
        if (n := todo.pop()) in nodes:
            continue
        nodes.add(n)
        if _is_layer(n, view):
            layers[n] = _layer(n, view)
        elif (layer := _spelled_layer(n, view) or _remade_layer(n, view)) is not None:
            layers[n] = layer
        elif _row_by_row(n, view):
            todo += n.all_input_nodes
        else:
            return None
    widths = [view.env[n].meta.shape for n in layers]
    if (
        None in layers.values()
        or not all(same_literal(w, widths[0]) for w in widths)
        or any(view.env[n].mutated_storage for n in nodes)
    ):
        return None
    values = [view.env[n] for n in nodes]
    if len({v.region._replace(autocast=OFF) for v in values}) > 1 or values[0].region.transforms:
        return None
    if len({v.region for v in values if v.op != "cast"}) > 1:  # autocast casts no cast
        return None
    order = sorted(nodes)  # fx nodes compare by their place in the graph
    return Chain(order, [layers[n] for n in order if n in layers])


def _row_by_row(node: fx.Node, view: LoweredGraph) -> bool:
    """Is each row of it made of the same row of each of its operands? Of a layer: a copy of its result."""
    v = view.env.get(node)
    if not isinstance(v, Value) or not node.all_input_nodes:
        return False
    if len(node.all_input_nodes) == 1:
        return v.op in ROW_BY_ROW or _words(node, view) is not None
    operands = [view.env.get(n) for n in node.all_input_nodes]
    return v.op in POINTWISE and all(isinstance(x, Value) and same_literal(x.meta.shape, v.meta.shape) for x in operands)


def _layer(node: fx.Node, view: LoweredGraph) -> Layer | None:
    """None where its tensors are not plain, or its weights no inputs of the graph."""
    hidden, weight, bias = (*node.args, *node.kwargs.values(), None)[:3]
    tensors = [n for n in (hidden, weight, bias) if n is not None]
    if any(n.op != "placeholder" for n in tensors[1:]) or any(v.mutated_storage for v in view.env[node].inputs):
        return None
    return Layer(node, hidden, weight, bias) if all(map(_is_plain, tensors)) else None


def _spelled_layer(node: fx.Node, view: LoweredGraph) -> Layer | None:
    """A product that is one: h Wᵀ, by whatever call."""
    v = view.env.get(node)
    if not isinstance(v, Value) or v.op != "linear" or any(view.env.get(n) is v for n in node.all_input_nodes):
        return None
    x, weight, bias = v.args
    held = x.nodes and all(map(_is_input, (weight, bias) if bias is not None else (weight,)))
    if not held or not _is_plain(x.nodes[0]) or any(t.mutated_storage for t in v.inputs):
        return None
    return Layer(node, x.nodes[0], weight.nodes[0], bias and bias.nodes[0])


def _is_plain(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor) and is_plain(node)


def _remade_layer(node: fx.Node, view: LoweredGraph) -> Layer | None:
    """A layer of another library's, whose weight is in 4 bits, say."""
    v = view.env.get(node)
    if not isinstance(v, Value) or v.op != "linear" or any(view.env.get(n) is v for n in node.all_input_nodes):
        return None
    x, weight, bias = v.args
    leaves = [*_leaves(weight), *([] if bias is None else [bias])]
    if weight.meta.requires_grad or not all(map(_is_input, leaves)) or any(t.mutated_storage for t in (x, *leaves)):
        return None
    return Layer(node, x.nodes[0], weight, bias and bias.nodes[0]) if x.nodes and _is_plain(x.nodes[0]) else None


def _is_input(v: Value) -> bool:
    return bool(v.nodes) and v.nodes[0].op == "placeholder" and _is_plain(v.nodes[0])


def _leaves(v: Value) -> list[Value]:
    """What it can be made of anew: inputs of the graph, if nothing else is left."""
    return [v] if _is_input(v) or v.op not in LOWERINGS else [leaf for x in v.inputs for leaf in _leaves(x)]


def _remade(weight: Value, inputs: list[fx.Node]) -> RematerializedWeight:
    graph, leaves = fx.Graph(), list(dict.fromkeys(_leaves(weight)))
    env = {leaf: graph.placeholder(leaf.nodes[0].name) for leaf in leaves}

    def write(v: Value) -> fx.Node:
        if v not in env:
            env[v] = graph.call_function(LOWERINGS[v.op], tuple(write(a) if isinstance(a, Value) else a for a in lowered_args(v)))
        return env[v]

    graph.output(write(weight))
    make = fx.GraphModule(torch.nn.Module(), graph).forward
    return RematerializedWeight(
        make, [inputs.index(leaf.nodes[0]) for leaf in leaves], tuple(weight.meta.shape), weight.meta.dtype
    )


def _is_layer(node: fx.Node, view: LoweredGraph) -> bool:
    """Is it the call of a linear layer itself, not a copy of its result? What it reads may be an operator's by now."""
    v = view.env.get(node)
    if not isinstance(v, Value) or v.op != "linear" or not 2 <= len(node.args) + len(node.kwargs) <= 3:
        return False
    others = (*node.args, *node.kwargs.values())[1:]
    given = [view.env.get(a) if isinstance(a, fx.Node) else a for a in others if a is not None]
    weights = [uncast(w) for w in v.args[1:] if w is not None]
    return [isinstance(w, Value) and uncast(w) for w in given] == weights


def _kept(chain: Chain, view: LoweredGraph) -> str:
    """Why the graph must compute the layer all the same; empty where nothing but its caller reads the result."""
    reason = getattr(view.gm, "compile_subgraph_reason", None)  # DDPOptimizer splits between parameters, no code of the model's
    if reason is not None and reason.graph_break and not reason.reason.startswith("DDPOptimizer"):
        return "compiled code after a break of the graph may read its result"
    last = chain.nodes[-1], view.gm.graph.output_node()
    others = (user for n in chain.nodes for user in n.users if user not in chain.nodes and (n, user) != last)
    return next((f"`{user.name}` in the graph reads it" for user in others), "")


def _side_by_side(chain: Chain, view: LoweredGraph) -> fx.Node:
    """What the layers read: one tensor."""
    hidden = [layer.hidden for layer in chain.layers]
    if len(hidden) == 1:
        return hidden[0]
    with view.gm.graph.inserting_before(chain.layers[-1].node):
        return view.gm.graph.call_function(torch.cat, (hidden, -1))


def _deferred(index: int, make: Callable[..., torch.Tensor], chain: Chain, view: LoweredGraph) -> Deferred:
    inputs = view.gm.graph.find_nodes(op="placeholder")
    layers = [layer.node for layer in chain.layers]
    following = [n for n in chain.nodes if n not in layers]
    value = view.env[layers[0]]
    autocast = _autocast(value)
    plain = len(layers) == 1 and not autocast[2] and all(view.env[n].op in ("linear", "cast") for n in following)
    step = _function(following, layers, autocast, view) if following else None
    place = lambda w: None if w is None else _remade(w, inputs) if isinstance(w, Value) else inputs.index(w)  # noqa: E731
    weights = [(place(layer.weight), place(layer.bias)) for layer in chain.layers]
    return Deferred(index, make, weights, step, autocast, plain, value.region.grad)


def _words(node: fx.Node, view: LoweredGraph) -> tuple | None:
    """The bounds where the node takes a slice of the last dimension, of whole rows."""
    v = view.env[node]
    if v.op != "slice" or v.args[1] != len(v.meta.shape) - 1 or not node.args or view.env.get(node.args[0]) is not v.args[0]:
        return None
    return v.args[2:] if not any(isinstance(a, Symbol) for a in v.args[2:]) else None


def _autocast(value: Value) -> tuple[str, torch.dtype, bool]:
    """(device type, dtype, enabled) of the autocast that it stands in."""
    kind = value.meta.device.type
    dtype = dtype_of(value.region.autocast, kind)
    return kind, dtype or torch.get_autocast_dtype(kind), dtype is not None


def _function(nodes: list[fx.Node], of: list[fx.Node], autocast: tuple, view: LoweredGraph) -> Callable[..., torch.Tensor]:
    """These nodes, one after the other, as a function of what they read: `of`."""
    graph = fx.Graph()
    env = {n: graph.placeholder(n.name) for n in of}
    for n in nodes:
        if words := _words(n, view):
            env[n] = graph.call_function(torch.ops.aten.slice.Tensor, (env[n.args[0]], -1, *words))
        else:
            env[n] = graph.node_copy(n, env.__getitem__)
    graph.output(env[nodes[-1]])
    run = fx.GraphModule(torch.nn.Module(), graph).forward

    def step(*results: torch.Tensor) -> torch.Tensor:
        with torch.autocast(*autocast):
            return run(*results)

    return step


def _site(layer: Value, entry: LazyOutputRule, status: str, reason: str) -> Site:
    return Site(entry.construct.name, entry.name, status, *source(layer.nodes[0]), reason)
