"""Where in a graph, as it is now, a call can stand: behind its operands, in front of all that reads its results. Only read."""

from __future__ import annotations

import torch
from torch import fx

from sloth.compat.dispatch import OpOverload
from sloth.rewriter.graph.aliasing import writers, writes_for_others
from sloth.rewriter.graph.lower import LoweredGraph
from sloth.rewriter.graph.value import Value, values_in
from sloth.rewriter.match.matcher import Match, Refused
from sloth.rewriter.plan.legality import operands_of
from sloth.rewriter.plan.materialize import held_results, source_values


class Places:
    def __init__(self, view: LoweredGraph):
        self.view = view
        self.order = {n: i for i, n in enumerate(view.gm.graph.nodes)}

    def earliest(self, matches: list[Match]) -> fx.Node:
        """The earliest node behind which all operands exist and the grad mode and autocast are those of the matches."""
        region = matches[0].roots[0].region
        node = self.last_source(matches)
        while node.next.op == "placeholder" or self.view.regions[node.next] != region:
            node = node.next
        return node

    def last_source(self, matches: list[Match]) -> fx.Node:
        return max((n for m in matches for n in self.sources(m)), key=self.order.__getitem__)

    def sources(self, match: Match) -> list[fx.Node]:
        """The nodes of this graph that its operands are made of, and those that write to their memory."""
        owns = self.view.shadow.owns
        made_of = [h for v in operands_of(match) if owns(v) for h in source_values(v) if owns(h)]
        if gone := [h for h in made_of if not h.nodes]:
            raise Refused("hidden", f"operand {gone[0].op} is computed by what another match was replaced by")
        return [
            n for h in made_of for n in (h.nodes[0], *(writers(h, self.view.writes, self.view.gm) if h.mutated_storage else ()))
        ]

    def require_order(self, matches: list[Match]) -> None:
        """Raises Refused where an operand depends on a result: no place would do, wherever other calls are put."""
        self.behind(matches, self.last_source(matches))

    def behind(self, matches: list[Match], place: fx.Node) -> set[fx.Node]:
        """The nodes up to `place` that depend on a result, results aside. None of them may be an operand (convexity)."""
        results = {n for m in matches for r in m.roots for v in held_results(r) for n in computed(v)}
        found, todo, last = set(), [u for n in results for u in n.users], self.order[place]
        while todo:
            n = todo.pop()
            if n not in found and self.order[n] <= last:
                found.add(n)
                todo += n.users
        found -= results
        if any(n in found for m in matches for n in self.sources(m)):
            raise Refused("convexity", "an operand depends on a result")
        return found

    def nodes_to_sink(self, matches: list[Match], place: fx.Node) -> list[fx.Node]:
        """Nodes before `place` that read a result, in graph order: they must move behind the call."""
        moved = sorted(self.behind(matches, place), key=self.order.__getitem__)
        region = matches[0].roots[0].region
        if any(n.is_impure() or self.view.regions[n] != region or _random(n) or self.in_written_memory(n) for n in moved):
            raise Refused("convexity", "its results are read before all its operands exist")
        return moved

    def in_written_memory(self, node: fx.Node) -> bool:
        """Does it read memory that somebody writes, or write some?"""
        values = (self.view.env.get(n) for n in (node, *node.all_input_nodes))
        return writes_for_others(node) or any(v.mutated_storage for v in values_in(values))


def computed(v: Value) -> list[fx.Node]:
    """The nodes that compute `v`. The others are made of one of these (contiguous, transposed twice): views of their memory
    rely on their layout.
    """
    if len(v.nodes) < 2:
        return [*v.nodes]
    first = min(v.nodes)  # fx nodes compare by their place in the graph

    def made_of_one(node: fx.Node) -> bool:
        seen, todo = set(), [*node.all_input_nodes]
        while todo:
            if (n := todo.pop()) in v.nodes:
                return True
            if n not in seen and n > first:
                seen.add(n)
                todo += n.all_input_nodes
        return False

    return [n for n in v.nodes if not made_of_one(n)]


def _random(n: fx.Node) -> bool:
    return (
        isinstance(n.target, OpOverload)
        and torch.Tag.nondeterministic_seeded in n.target.tags
        or any(word in str(n.target) for word in ("dropout", "rand", "bernoulli", "multinomial"))
    )
