"""What is cheap to make is made again for each that reads it, in the graphs that Inductor compiles.

A weight that is dequantised is as large as an activation. In the backward pass of a checkpointed layer it is read twice: when the
layer is computed again, and when its gradient is. Kept in between, the weights of the whole layer stand beside each other at the
peak. Making them again costs a read of the packed weight and a write of the other for each.
"""

from __future__ import annotations

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from sloth.rewriter.emit import OWN


class MadeAgain(CustomGraphPass):
    """Inductor's pass over a graph of ATen operations. `digest` is of the sources, for its caches."""

    def __init__(self, digest: str):
        self.digest = digest

    def __call__(self, graph: fx.Graph) -> None:
        order = {n: i for i, n in enumerate(graph.nodes)}
        made = [n for n in order if n.target in OWN]
        for n in made:
            first, *later = sorted(n.users, key=order.__getitem__)
            for user in later:
                if any(order[first] < order[m] < order[user] for m in made):  # others come between
                    with graph.inserting_before(user):
                        user.replace_input_with(n, graph.node_copy(n))

    def uuid(self) -> str:
        return self.digest
