"""What is computed again and what is kept, where a model is checkpointed: passes over the graphs that Inductor compiles.

A weight that is dequantised is as large as an activation. In the backward pass of a checkpointed layer it is read twice: when the
layer is computed again, and when its gradient is. Kept in between, the weights of the whole layer stand beside each other at the
peak. Making them again costs a read of the packed weight and a write of the other for each.

What leaves a checkpointed part and is needed by the backward pass of what follows is kept, as in eager. torch does so where the
next part is checkpointed too; after the last layer it would compute that layer's last projection again, for the norm behind it.
"""

from __future__ import annotations

from torch import fx
from torch._functorch.partitioners import must_recompute
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

from sloth.rewriter.emit import OWN


class _Pass(CustomGraphPass):
    """`digest` is of the sources, for Inductor's caches."""

    def __init__(self, digest: str):
        self.digest = digest

    def uuid(self) -> str:
        return self.digest


class MadeAgain(_Pass):
    """Over a graph of ATen operations, forward or backward: what is cheap to make is made again for each that reads it."""

    def __call__(self, graph: fx.Graph) -> None:
        order = {n: i for i, n in enumerate(graph.nodes)}
        made = [n for n in order if n.target in OWN]
        for n in made:
            first, *later = sorted(n.users, key=order.__getitem__)
            for user in later:
                if any(order[first] < order[m] < order[user] for m in made):  # others come between
                    with graph.inserting_before(user):
                        user.replace_input_with(n, graph.node_copy(n))


class Kept(_Pass):
    """Over the graph of both passes, before it is divided: what leaves a checkpointed part is not computed again."""

    def __call__(self, graph: fx.Graph) -> None:
        needed: set[fx.Node] = set()  # of what follows checkpointed parts, what has a part in its own backward pass
        for n in reversed(graph.nodes):
            if "ac_graph_id" not in n.meta and _is(n, "forward") and any(u in needed or _is(u, "backward") for u in n.users):
                needed.add(n)
        for n in graph.nodes:
            if must_recompute(n) and "ac_graph_id" in n.meta and not needed.isdisjoint(n.users):
                while getattr(n.target, "is_view", False) and must_recompute(n.args[0]):
                    n = n.args[0]  # views are always made again
                n.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _is(node: fx.Node, part: str) -> bool:
    return node.meta.get("partitioner_tag") == f"is_{part}"
