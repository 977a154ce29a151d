"""What the tests of sloth's own entries share: which there are, and the graphs that AOTAutograd makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from sloth.rewriter.backend import sloth
from sloth.rewriter.match.registry import patterns

# What must be computed in the graph is no input that could be drawn: a 4-bit weight, a mask, layers around. They have test files
# of their own.
OTHERS = ("linear_4bit", "attention", "attention_by_mask", "eager_attention", "eager_attention_by_mask")
OTHERS += ("gated_layers", "gated_layers_packed", "linear_4bit_rows", "lora_rows")
ENTRIES = [entry for entry in patterns() if entry.variants and entry.name not in OTHERS]
VARIANTS = [variant for entry in ENTRIES for variant in entry.variants]


def compiled_graphs(model: Callable, train: Callable[[Callable], None]) -> list[fx.Graph]:
    """What AOTAutograd makes of the rewritten graphs of one `train(compiled model)`, forward before backward."""
    graphs = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable:
        graphs.append(gm.graph)
        return gm.forward

    inner = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)

    def backend(gm: fx.GraphModule, inputs: list) -> Callable:
        sloth(gm, inputs, options={"sloth.inner_backend": "eager"})
        return inner(gm, inputs)

    torch._dynamo.reset()
    train(torch.compile(model, backend=backend))
    return graphs
