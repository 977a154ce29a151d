"""Put the operator calls of accepted matches into the ORIGINAL graph. Whatever no match covers stays as Dynamo traced it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sloth.compat.dispatch import OpOverload
from sloth.rewriter.graph.aliasing import may_write, writers
from sloth.rewriter.graph.canonical import VIEWS
from sloth.rewriter.graph.lower import View
from sloth.rewriter.graph.value import Value, literal_key, values_in
from sloth.rewriter.match.matcher import Match, Refused
from sloth.rewriter.plan.legality import call_arguments, is_list, match_arguments, operands_of, takes_many
from sloth.rewriter.plan.materialize import EMIT, held, written


def choose(matches: list[Match], standing: Iterable[Match] = ()) -> tuple[list[Match], list[tuple[Match, Match]]]:
    """The largest matches that overlap neither each other nor `standing` ones, in graph order, and the losers, each with the
    match that took its place.
    """
    taken = {v: m for m in standing for v in _own(m)}
    accepted, losers = [], []
    for m in sorted(matches, key=lambda m: (*(-n for n in m.size), m.roots[0].id)):
        winner = next((taken[v] for v in _own(m) if v in taken), None)
        if winner is not None:
            losers.append((m, winner))
            continue
        taken.update(dict.fromkeys(_own(m), m))
        accepted.append(m)
    _trade(accepted, losers, set(standing))
    return sorted(accepted, key=lambda m: m.roots[0].id), losers


def _trade(accepted: list[Match], losers: list[tuple[Match, Match]], standing: set[Match]) -> None:
    """Where a winner keeps out a match of another construct, but a smaller match for its own result would not: those two, if they
    cover more together. An adapter's sum in front of a norm is the adapter's, not the norm's residual.
    """
    by_root: dict[Value, list[Match]] = {}
    for m, _ in losers:
        for root in m.roots:
            by_root.setdefault(root, []).append(m)
    for loser, winner in list(losers):
        own = winner.pattern.construct
        if winner in standing or winner not in accepted or loser in accepted or loser.pattern.construct is own:
            continue
        others = {v for m in (*accepted, *standing) if m is not winner for v in _own(m)}
        smaller = [m for root in winner.roots for m in by_root.get(root, ()) if m.pattern.construct is own]
        fitting = [m for m in smaller if others.isdisjoint(_own(m)) and not set(_own(m)) & set(_own(loser))]
        best = max(fitting, key=lambda m: m.size, default=None)
        if best is not None and others.isdisjoint(_own(loser)) and best.size[0] + loser.size[0] > winner.size[0]:
            accepted[accepted.index(winner)] = best
            accepted.append(loser)
            losers[:] = [(m, w) for m, w in losers if m not in (loser, best)] + [(winner, best)]


def _own(m: Match) -> list[Value]:
    """What no other match may compute too: anything but views."""
    return [v for v in m.values if v.op not in VIEWS] or list(m.roots)


def together(accepted: list[Match]) -> list[list[Match]]:
    """Matches that one call can stand for: their operator takes lists, and all its other arguments are the same."""
    groups: dict[object, list[Match]] = {}
    for m in accepted:
        op = m.pattern.op
        shared = [a for p, a in zip(op._schema.arguments, match_arguments(m), strict=True) if not is_list(p)]
        key = (op, literal_key(tuple(shared)), m.roots[0].region) if takes_many(op) else m
        groups.setdefault(key, []).append(m)
    return list(groups.values())


class Rewriter:
    """Edits one view's graph, call by call. What cannot be placed raises Refused and leaves the graph as it was."""

    def __init__(self, view: View):
        self.graph, self.view = view.gm.graph, view
        self.live = _live(self.graph)
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}

    def apply(self, matches: list[Match]) -> fx.Node:
        """Insert one call for these matches as early as its operands allow, redirect their results' users, drop what nobody
        reads any more.
        """
        roots = [r for m in matches for r in m.roots]
        place = self.place(matches)
        moved = self.held_back(matches, place)
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
            computed = _computed(value)
            for node in computed:
                node.replace_all_uses_with(output)
            value.nodes[:] = [output, *(n for n in value.nodes if n not in computed)]
        self.sweep({v for m in matches for v in m.values}, old)
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        return call

    def place(self, matches: list[Match]) -> fx.Node:
        """The earliest node behind which all operands exist and the grad mode and autocast are those of the matches."""
        region = matches[0].roots[0].region
        node = max((n for m in matches for n in self.sources(m)), key=self.order.__getitem__)
        while node.next.op == "placeholder" or self.view.regions[node.next] != region:
            node = node.next
        return node

    def sources(self, match: Match) -> list[fx.Node]:
        """The nodes of this graph that its operands are made of, and those that write to their memory."""
        made_of = [h for v in operands_of(match) if self.view.shadow.owns(v) for h in held(v)]
        return [n for h in made_of for n in (h.nodes[0], *(writers(h, self.view.writes, self.view.gm) if h.pinned else ()))]

    def held_back(self, matches: list[Match], place: fx.Node) -> list[fx.Node]:
        """Nodes before `place` that read a result: they must move behind the call. None of them may be an operand (convexity)."""
        results = [n for m in matches for r in m.roots for n in _computed(r)]
        if all(self.order[u] > self.order[place] for n in results for u in n.users):
            return []
        behind = _behind(results) - set(results)
        if any(n in behind for m in matches for n in self.sources(m)):
            raise Refused("convexity", "an operand depends on a result")
        moved = [n for n in self.graph.nodes if n in behind and self.order[n] <= self.order[place]]
        region = matches[0].roots[0].region
        if any(n.is_impure() or self.view.regions[n] != region or _random(n) or self.in_written_memory(n) for n in moved):
            raise Refused("convexity", "its results are read before all its operands exist")
        return moved

    def in_written_memory(self, node: fx.Node) -> bool:
        """Does it read or write memory that somebody writes?"""
        values = (self.view.env.get(n) for n in (node, *node.all_input_nodes))
        return any(v.pinned for v in values_in(values))

    def operand(self, v: Value) -> fx.Node:
        """The node that holds `v`, or what `v` is made of some, written out.

        What was computed inside a call was not kept for the backward pass, and is not now: it is computed again.
        """
        if not self.view.shadow.owns(v):
            return passed(v, self.view)
        if v.nodes:
            return v.nodes[0]
        if v.spelled:
            return self.operand(v.spelled[0])
        node = self.graph.call_function(EMIT[v.op], tuple(self.operand(a) if isinstance(a, Value) else a for a in written(v)))
        node.meta.update({k: m for k, m in v.origin.meta.items() if k != "example_value"})
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        v.nodes.append(node)
        self.view.regions[node] = v.region
        return node

    def outputs(self, call: fx.Node, match: Match, roots: list[Value]) -> list[fx.Node]:
        """The nodes that hold the results, with the metadata of those they replace: where in the model, and what it looks
        like.
        """
        sites = [r.nodes[0] for r in roots]
        call.meta.update(sites[0].meta, sloth=match.pattern.name)
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

    def sweep(self, values: set[Value], old: list[fx.Node]) -> None:
        """Remove the nodes of matched values that nobody reads any more, from the last to the first."""
        nodes = {*old, *(v.origin for v in values if v.origin is not None)}
        for n in sorted(nodes & self.order.keys(), key=self.order.__getitem__, reverse=True):
            if n.op not in ("placeholder", "get_attr") and not n.users and not n.is_impure():
                self.graph.erase_node(n)
                del self.order[n]
                for v in (*values, *values_in((self.view.env.get(n),))):
                    if n in v.nodes:
                        v.nodes.remove(n)

    def sweep_rest(self) -> None:
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
        if n.op == "output" or n.is_impure() or may_write(n) or not live.isdisjoint(n.users):
            live.add(n)
    return live


def passed(v: Value, view: View) -> fx.Node:
    """The node that holds `v` of the graph around this body, or further out: one more input, and argument of the call."""
    inputs = view.gm.graph.find_nodes(op="placeholder")
    if known := [n for n in inputs if isinstance(view.env[n], Value) and view.env[n].outer is v]:
        return known[0]
    source = v.nodes[0] if view.around.shadow.owns(v) else passed(v, view.around)
    node = add_input(view, [source] * len(view.calls))
    value = view.env[node] = view.shadow.add("input", (node.name,), v.meta, view.region, origin=node)
    value.outer, value.nodes = v, [node]
    return node


def add_input(view: View, given: Sequence[fx.Node]) -> fx.Node:
    """One more input of a body, the last, and of each of its calls one more argument."""
    *_, last = view.gm.graph.find_nodes(op="placeholder")
    with view.gm.graph.inserting_after(last):
        node = view.gm.graph.placeholder(f"{given[0].name}_passed")
    node.meta.update({k: m for k, m in given[0].meta.items() if k in ("example_value", "stack_trace")}, passed=True)
    for call, argument in zip(view.calls, given, strict=True):
        call.args = (*call.args, argument)
    view.regions[node] = view.region
    return node


def _computed(v: Value) -> list[fx.Node]:
    """The nodes that compute `v`. The others only copy one of these (contiguous, clone): views of their memory rely on them."""
    return [n for n in v.nodes if not any(a in v.nodes for a in n.all_input_nodes)]


def _behind(nodes: list[fx.Node]) -> set[fx.Node]:
    """All that depends on one of them."""
    found: set[fx.Node] = set()
    open_ = list(nodes)
    while open_:
        new = open_.pop().users.keys() - found
        found |= new
        open_ += new
    return found


def _random(n: fx.Node) -> bool:
    return (
        isinstance(n.target, OpOverload)
        and torch.Tag.nondeterministic_seeded in n.target.tags
        or any(word in str(n.target) for word in ("dropout", "rand", "bernoulli", "multinomial"))
    )
