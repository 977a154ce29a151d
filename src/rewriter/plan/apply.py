"""Put the operator calls of accepted matches into the ORIGINAL graph. Whatever no match covers stays as Dynamo traced it."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sloth.rewriter.graph.aliasing import copies_by_layout, may_write_or_bodies, storages, writes_for_others
from sloth.rewriter.graph.lower import LoweredGraph
from sloth.rewriter.graph.value import Symbol, Value, values_in
from sloth.rewriter.match.matcher import Match, Refused
from sloth.rewriter.plan.bodies import lift_captured_value
from sloth.rewriter.plan.hoist import drop_unread_inputs, hoist
from sloth.rewriter.plan.lazy_outputs import Deferred
from sloth.rewriter.plan.legality import call_arguments, operands_of, takes_many
from sloth.rewriter.plan.materialize import LOWERINGS, held_results, lowered_args
from sloth.rewriter.plan.narrow import keep_narrow
from sloth.rewriter.plan.places import Places, computed
from sloth.rewriter.plan.plan import GraphPlan, Plan
from sloth.rewriter.plan.side_by_side import put_side_by_side
from sloth.rewriter.report import Site


def apply(plan: Plan) -> list[Applied]:
    """Edit the graphs of the plan; what was done in each. What cannot be placed is refused, and `plan` has it so afterwards.

    The plan knows which operands depend on results. Which readers of a result must move, and whether they can, is seen here: it
    depends on where the calls before were put and on what they moved.
    """
    done = [_apply(plan, graph) for graph in plan.graphs]
    if any(graph.placements for graph in plan.graphs) or any(d.deferred for d in done):
        views = [graph.view for graph in plan.graphs]
        hoist(views, plan.mode)  # bodies may have asked the graphs around them for more inputs
        drop_unread_inputs(views)
        for gm, _ in plan.originals:
            gm.graph.lint()
            gm.recompile()
    return done


class Applied(NamedTuple):
    """Of one graph: the outputs that are computed when they are read, and sites of the entries that defer."""

    deferred: list[Deferred]
    sites: list[Site]


def _apply(plan: Plan, graph: GraphPlan) -> Applied:
    if graph.placements:
        _keep_copies(graph.view)
    rewriter = Rewriter(graph.view)
    plan.settle(graph, rewriter.apply)
    applied = Applied(*graph.lazy.apply(graph.matches))
    if graph.placements or applied.deferred:
        rewriter.erase_remaining_dead_nodes()
        keep_narrow(graph.view.gm.graph, graph.view.regions)
        put_side_by_side(rewriter.calls)
    return applied


def _keep_copies(view: LoweredGraph) -> None:
    """Where a copy or what it is of is written, it stays a copy: an operator may give another layout, of which `contiguous` is a
    view.
    """
    for n in [n for n in view.gm.graph.nodes if copies_by_layout(n)]:
        value, places = view.env.get(n), [storages(x, view.gm) for x in (n, *n.all_input_nodes[:1])]
        written = isinstance(value, Value) and any(v.mutated_storage for v in (value, *value.inputs))
        if written and places[0] and not places[0] & places[-1]:
            with view.gm.graph.inserting_after(n):
                copy = view.gm.graph.call_function(torch.ops.aten.clone.default, (n,))
            n.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
            copy.meta.update(n.meta)
            view.env[copy], view.regions[copy] = value, view.regions[n]
            value.nodes[:] = [copy if x is n else x for x in value.nodes]


class Rewriter:
    """Edits one view's graph, call by call. What cannot be placed raises Refused and leaves the graph as it was."""

    def __init__(self, view: LoweredGraph):
        self.graph, self.view = view.gm.graph, view
        self.live = _live(self.graph)
        self.places = Places(view)
        self.calls: dict[fx.Node, list[Match]] = {}

    def apply(self, matches: list[Match]) -> fx.Node:
        """Insert one call for these matches as early as its operands allow, redirect their results' users, drop what nobody
        reads any more.
        """
        if gone := [v for m in matches for v in operands_of(m) if not self.view.shadow.owns(v) and not v.nodes]:
            raise Refused("hidden", f"operand {gone[0].op} is computed inside one call")  # put into the graph around since
        roots = [r for m in matches for r in m.roots]
        place = self.places.earliest(matches)
        moved = self.places.nodes_to_sink(matches, place)
        old = [n for m in matches for v in m.values for n in v.nodes]
        for node in reversed(moved):  # readers of an early result, behind the call now
            place.append(node)
        with self.graph.inserting_after(place):
            call = self.graph.call_function(matches[0].pattern.op)
        with self.graph.inserting_before(call):
            call.args = call_arguments(matches, self.operand)
        for value in {m.tensors[name] for m in matches for name in m.pattern.cheap if name in m.tensors}:
            if value.op in ("dropout", "cast") and value.nodes:
                value.nodes[0].meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        outputs = self.outputs(call, matches[0], roots)
        self.view.regions |= dict.fromkeys((call, *outputs), roots[0].region)
        for value, output in zip(roots, outputs, strict=True):
            held = held_results(value)
            self.hold(value, output)
            for view in held if value not in held else ():  # the value itself was computed inside of one call
                nodes, view.nodes[:] = [*view.nodes], []
                with self.graph.inserting_after(outputs[-1]):
                    made = self.operand(view)
                view.nodes[:] = nodes
                made.meta.update(nodes[0].meta)
                self.hold(view, made)
                old += nodes
        self.erase_dead_nodes({v for m in matches for v in m.values}, old)
        self.places = Places(self.view)
        self.calls[call] = matches
        return call

    def hold(self, value: Value, output: fx.Node) -> None:
        """From now on `output` is what computes the value."""
        replaced = computed(value)
        for node in replaced:
            node.replace_all_uses_with(output)
        value.nodes[:] = [output, *(n for n in value.nodes if n not in replaced)]

    def operand(self, v: Value) -> fx.Node:
        """The node that holds `v`, or what `v` is made of some, written out.

        What was computed inside a call was not kept for the backward pass, and is not now: it is computed again.
        """
        if not self.view.shadow.owns(v):
            return lift_captured_value(v, self.view)
        if v.nodes:
            return v.nodes[0]
        if v.replaces:
            return self.operand(v.replaces[0])
        args = tuple(self.operand(a) if isinstance(a, Value) else self.number(a) for a in lowered_args(v))
        node = self.graph.call_function(LOWERINGS[v.op], args)
        node.meta.update({k: m for k, m in v.origin.meta.items() if k != "example_value"})
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        v.nodes.append(node)
        self.view.regions[node] = v.region
        return node

    def number(self, a: Any) -> Any:
        """A symbol as a node: an input that it is, or a size of one."""
        if isinstance(a, tuple):
            return tuple(map(self.number, a))
        for n in self.graph.find_nodes(op="placeholder") if isinstance(a, Symbol) else ():
            example = n.meta.get("example_value")
            for dim, size in enumerate(example.shape if isinstance(example, torch.Tensor) else (example,)):
                if isinstance(size, Symbol) and size.node.expr == a.node.expr:
                    if size is example:
                        return n
                    with self.graph.inserting_after(n):
                        found = self.graph.call_function(torch.ops.aten.sym_size.int, (n, dim))
                    found.meta["example_value"] = size
                    return found
        return a

    def outputs(self, call: fx.Node, match: Match, roots: list[Value]) -> list[fx.Node]:
        """The nodes that hold the results, with the metadata of those they replace: where in the model, and what it looks
        like.
        """
        held = [held_results(r)[0] for r in roots]
        sites = [v.nodes[0] for v in held]
        call.meta.update(sites[0].meta, sloth=match.pattern.name)
        for r, v in zip(roots, held, strict=True):
            if r is not v and isinstance(example := call.meta.get("example_value"), torch.Tensor):
                call.meta["example_value"] = example.new_empty(r.meta.shape, dtype=r.meta.dtype)
        if match.pattern.recompute:
            call.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        if len(match.pattern.op._schema.returns) == 1 and not takes_many(match.pattern.op):
            return [call]
        call.meta.pop("example_value", None)
        out, at = [], call
        for i, site in enumerate(sites):
            with self.graph.inserting_after(at):
                at = self.graph.call_function(operator.getitem, (call, i))
            at.meta.update(site.meta)
            out.append(at)
        return out

    def erase_dead_nodes(self, values: set[Value], old: list[fx.Node]) -> None:
        """Remove the nodes of matched values that nobody reads any more, from the last to the first."""
        nodes = {*old, *(v.origin for v in values if v.origin is not None)}
        order = self.places.order
        for n in sorted(nodes & order.keys(), key=order.__getitem__, reverse=True):
            if n.op not in ("placeholder", "get_attr") and not n.users and not n.is_impure() and not writes_for_others(n):
                self.graph.erase_node(n)
                del order[n]
                for v in (*values, *values_in((self.view.env.get(n),))):
                    if n in v.nodes:
                        v.nodes.remove(n)

    def erase_remaining_dead_nodes(self) -> None:
        """Remove what was needed before the graph was rewritten and is not now: calls with several results, and what was computed
        for them alone. (AOTAutograd would trace an autograd function that nobody reads, and would not cache the graph.)
        """
        live = _live(self.graph)
        done = self.live - live
        for n in self.graph.nodes:  # what nobody ever read of it goes too
            if n not in live and not done.isdisjoint(n.all_input_nodes):
                done.add(n)
        for n in reversed(self.graph.nodes):
            if n in done and n.op.startswith("call_"):
                self.graph.erase_node(n)
                for v in values_in((self.view.env.get(n),)):
                    v.nodes[:] = [m for m in v.nodes if m is not n]


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The calls that somebody needs in the end."""
    live: set[fx.Node] = set()
    for n in reversed(graph.nodes):
        if n.op == "output" or n.is_impure() or may_write_or_bodies(n) or not live.isdisjoint(n.users):
            live.add(n)
    return live
