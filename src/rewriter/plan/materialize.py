"""What a rewrite may compute anew where an operand is no node of the graph: views, casts, dequantised weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sloth.compat.dispatch import OpOverload
from sloth.rewriter.graph.canonical import INT_MAX, VIEWS
from sloth.rewriter.graph.value import Symbol, Value

# By canonical operation: how it is written. `emit` adds to it.
LOWERINGS: dict[str, OpOverload] = {
    "cast": torch.ops.aten.to.dtype,
    "view": torch.ops.aten.reshape.default,
    "expand": torch.ops.aten.expand.default,
    "permute": torch.ops.aten.permute.default,
    "slice": torch.ops.aten.slice.Tensor,
    "detach": torch.ops.aten.detach.default,
    "mul": torch.ops.aten.mul.Tensor,
    "view_as_real": torch.ops.aten.view_as_real.default,
}
REMATERIALIZED: set[OpOverload] = set()  # operators that were added


def emit(op: str, operator: OpOverload) -> None:
    """Let rewrites write the canonical operation `op` as `operator`, called with its arguments in their order. Its result is not
    kept for the backward pass (`rematerialize_cheap_ops` in compile/passes.py).
    """
    LOWERINGS[op] = operator
    REMATERIALIZED.add(operator)


def source_values(v: Value) -> list[Value]:
    """The values of the traced graph that an operand is made of: itself, or what it is a view, a cast … of."""
    if not v.nodes and v.replaces:
        return source_values(v.replaces[0])
    return [h for x in v.inputs for h in source_values(x)] if _is_materialized(v) else [v]


def held_results(root: Value) -> list[Value]:
    """The values by which nodes of the traced graph hold a result: itself, or where none does (it is computed inside one call),
    the views and casts of it that are held. Empty where something else is made of it in there.
    """
    if root.nodes:
        return [root]
    found = []
    for u in root.users:
        if u.op in VIEWS and not u.mutated_storage and _is_materialized(u) | bool(u.nodes):
            inner = held_results(u)
            found += inner
            if inner or not u.users:
                continue
        if u.nodes or u.users:
            return []
    return found


def materialized_values(operands: Iterable[Value]) -> list[Value]:
    """The values between operands and those of the traced graph that they are made of: a rewrite writes them out."""
    made = [v.replaces[0] if not v.nodes and v.replaces else v for v in operands]
    made = [v for v in made if _is_materialized(v)]
    return [*made, *materialized_values([x for v in made for x in v.inputs])] if made else []


def _is_materialized(v: Value) -> bool:
    return not v.nodes and v.op in LOWERINGS and not any(map(_symbolic, lowered_args(v)))


def lowered_args(v: Value) -> tuple:
    """The arguments that `v` is written with. A graph holds no symbols: bounds of a slice are counted from the end instead, one
    size of a view is left open.
    """
    if v.op == "view":
        sizes = tuple(map(_number, v.args[1]))
        return v.args[0], tuple(-1 if isinstance(s, Symbol) else s for s in sizes) if sum(map(_symbolic, sizes)) == 1 else sizes
    if v.op == "slice":
        x, dim, *bounds, step = v.args
        return x, dim, *(_from_end(i, x.meta.shape[dim]) if isinstance(i, Symbol) else i for i in bounds), step
    return v.args


def _from_end(i: Symbol, size: Any) -> Any:
    behind = _number(i - size)
    return i if isinstance(behind, Symbol) else behind or INT_MAX


def _number(a: Any) -> Any:
    """A symbol that is known to be one number as that."""
    known = a.node.maybe_as_int() if isinstance(a, Symbol) else a
    return a if known is None else known


def _symbolic(a: Any) -> bool:
    return isinstance(a, Symbol) or isinstance(a, tuple) and any(map(_symbolic, a))
