"""References as graphs: as Dynamo traces them, with example values, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from sloth.compat.dispatch import FakeTensor, FakeTensorMode
from sloth.rewriter.match.pattern import Variant
from sloth.testing.samples import numbers, outputs, sample


def captured(variant: Variant, dtype: torch.dtype) -> fx.GraphModule:
    """The reference as Dynamo traces it, its inputs in the order of the reference's parameters."""
    found: list[tuple[fx.GraphModule, list]] = []

    def keep(gm: fx.GraphModule, inputs: list) -> Callable:
        found.append((gm, inputs))
        return gm.forward

    torch.compiler.reset()
    tensors = sample(variant, dtype)
    torch.compile(lambda *t: variant.reference(*t, **numbers(variant, dtype)), backend=keep, dynamic=False)(*tensors)
    ((gm, inputs),) = found
    place = {n: next(i for i, t in enumerate(tensors) if t is x) for n, x in zip(_placeholders(gm), inputs, strict=True)}
    for n in sorted(place, key=place.__getitem__, reverse=True):
        next(iter(gm.graph.nodes)).prepend(n)
    gm.recompile()
    return gm


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


class _Examples(fx.Interpreter):
    """Runs a graph on fake tensors and notes what each node gives, as Dynamo would have."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = value = super().run_node(n)
        return value


def described(gm: fx.GraphModule, tensors: list[torch.Tensor]) -> bool:
    """Give the nodes of an edited graph their example values; False where it does not run."""
    grad = torch.is_grad_enabled()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
    try:
        with mode:
            _Examples(gm).run(*fakes)
    except Exception:
        return False
    finally:
        torch.set_grad_enabled(grad)
    return all(isinstance(t, FakeTensor) for t in outputs(gm.graph.output_node().meta["example_value"]))


def doubled(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph in fp64: what its result would be without rounding."""
    gm = copy.deepcopy(gm)
    for n in gm.graph.nodes:
        if n.op == "call_method" and n.target in ("float", "half"):
            n.target = "double"
        change = lambda a: torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a  # noqa: E731
        n.args, n.kwargs = map_aggregate(n.args, change), map_aggregate(n.kwargs, change)
    gm.recompile()
    return gm
