"""Is what a node holds the value that its call was lowered to?

The result of a no-op is its argument, as long as nobody can tell the two apart. Two things do. Autograd: `x.data` makes no ATen
call, has x's numbers, and no gradient flows through it. Writes: a copy that is written, through whatever view of it, is no longer
what it was copied from. What the tracer saw of the node says so: whether it requires a gradient, and which memory it lies in.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import HigherOrderOperator
from sloth.rewriter.graph.aliasing import storages, tensors
from sloth.rewriter.graph.canonical import Normal
from sloth.rewriter.graph.value import Value


def held(n: Normal, node: fx.Node, gm: fx.GraphModule, written: frozenset[int], result: Any, known: int) -> Any:
    """`result`, what the node's call was lowered to, with values of its own where it is not that. written: the memory that calls
    of the graph write to. known: how many values there were before this node.
    """

    def kept(v: Value, _: Any) -> Value:
        """A copy that is written is itself. One that is not, of what is, legality knows of (`memory`)."""
        if v.mutated_storage:
            own, theirs = storages(node, gm), {s for x in v.nodes for s in storages(x, gm)}
            apart = v.id < known and theirs and own.isdisjoint(theirs) and not own.isdisjoint(written)
            return n.add("copy", (v,), v.meta) if apart else v
        return n.add("copy", (v,), v.meta) if n.mutated_storage else v

    result = _each(result, None, kept)
    # Not asked of bodies and of parts of results, which others describe, nor where gradients are off: there the tracer takes what
    # a no-op hands out for a copy (`F.dropout(x, 0.0)`), and eager gives x itself.
    if isinstance(node.target, HigherOrderOperator) or node.target is operator.getitem or not n.region.grad:
        return result
    if not any(t.requires_grad for x in node.all_input_nodes for t in tensors(x.meta.get("example_value"))):
        return result

    def cut(v: Value, example: Any) -> Value:
        told = isinstance(example, torch.Tensor) and not example.requires_grad
        written = v.mutated_storage and v.id >= known  # a write that comes later may have changed what is told
        return n.add("detach", (v,), v.meta) if told and v.meta.requires_grad and not written else v

    return _each(result, node.meta.get("example_value"), cut)


def _each(result: Any, example: Any, change: Any) -> Any:
    """`change` each tensor's value in a result, with what is told of it."""
    if isinstance(result, Value):
        return result if result.meta is None else change(result, example)
    if not isinstance(result, tuple | list):
        return result
    told = example if isinstance(example, tuple | list) and len(example) == len(result) else [None] * len(result)
    return (list if isinstance(result, list) else tuple)(_each(r, e, change) for r, e in zip(result, told, strict=True))
