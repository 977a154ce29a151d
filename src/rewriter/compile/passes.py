"""What is computed again, what is kept and what is written over: passes over the graphs that Inductor compiles.

A weight that is dequantised is as large as an activation. In the backward pass of a checkpointed layer it is read twice: when the
layer is computed again, and when its gradient is. Kept in between, the weights of the whole layer stand beside each other at the
peak. Making them again costs a read of the packed weight and a write of the other for each.

What leaves a checkpointed part and is needed by the backward pass of what follows is kept, as in eager. torch does so where the
next part is checkpointed too; after the last layer it would compute that layer's last projection again, for the norm behind it.

A product with few columns for those that it reads is kept, though it lies in a checkpointed part, as that of an activation and
an adapter's A: a hundredth of the activation, and to make it again takes the host as long as a product of any size.

A gradient of a parameter in fp32 that is computed in bf16 is rounded, and cast to fp32 in a launch of its own. An operator that
accumulates in fp32 can write it so.

A kernel that reads an element of an operand in the program that writes the same element of its result can have both in one
buffer. Inductor gives results buffers of their own, and holds a free one of the size back for them, long before the kernel runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sloth.compat.dispatch import OpOverload
from sloth.compat.inductor import CustomGraphPass
from sloth.rewriter.notices import warn_once
from sloth.rewriter.plan.materialize import REMATERIALIZED

THIN = 16  # times as many columns has the activation as a product of it that is kept
_OVER: dict[object, dict[str, str]] = {}


def declare_inplace(kernel: object, **operands: str) -> None:
    """Let a Triton kernel write results over operands, `result_ptr="operand_ptr"`, where nobody reads these any more. Each of its
    programs must have read an element of the operand before it writes the same element of the result, and no other program may
    read that.
    """
    _OVER[kernel] = operands


_TOGETHER: dict[OpOverload, tuple[OpOverload, int, Callable[[list[tuple]], tuple | None]]] = {}


def called_together(op: OpOverload, many: OpOverload, most: int, arguments: Callable[[list[tuple]], tuple | None]) -> None:
    """Let up to `most` calls of `op` that stand in a row, none of which reads another, be one of `many`, which returns a list.
    `arguments` makes its arguments of theirs, or None where they do not fit together.
    """
    _TOGETHER[op] = many, most, arguments


_WIDE: dict[OpOverload, tuple[int, Callable[..., bool]]] = {}


def accumulates_wide(op: OpOverload, first: int = 0, where: Callable[..., bool] = lambda *_: True) -> None:
    """Its result, or those of a list from this one on, are accumulated in fp32 and rounded to its last argument `dtype`: they may
    be written as they are read, in calls with arguments for which `where` is so.
    """
    _WIDE[op] = first, where


class Pass(CustomGraphPass):
    """These functions of a graph, one after the other; `digest` is of the sources, for Inductor's caches. behind: the user's own
    pass of the same place, if any: where that has no name for the caches, neither has this.
    """

    def __init__(self, digest: str, *functions: Callable[[fx.Graph], None], behind: Callable[[fx.Graph], Any] | None = None):
        self.digest, self.functions, self.behind = digest, functions, behind

    def __call__(self, graph: fx.Graph) -> None:
        for function in self.functions:
            try:
                function(graph)
            except ImportError as e:  # of what it needs of torch: the first that each of them does
                warn_once(f"{function.__name__} ({__name__}) is off: {e}")
        if self.behind is not None:
            self.behind(graph)

    def uuid(self) -> Any:
        if self.behind is None:
            return self.digest
        theirs = self.behind.uuid() if isinstance(self.behind, CustomGraphPass) else None
        return None if theirs is None else (self.digest, theirs)


def rematerialize_cheap_ops(graph: fx.Graph) -> None:
    """Of ATen operations, forward or backward: what is cheap to make is made again for each that reads it."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    made = [n for n in order if n.target in REMATERIALIZED]
    for n in made:
        first, *later = sorted(n.users, key=order.__getitem__)
        for user in later:
            if any(order[first] < order[m] < order[user] for m in made):  # others come between
                with graph.inserting_before(user):
                    user.replace_input_with(n, graph.node_copy(n))


def in_one_call(graph: fx.Graph) -> None:
    """Of ATen operations, forward or backward: what stands in a row is launched once. A launch costs the host more than these
    weights cost the GPU. They are read one behind the other, so that they stand beside each other as they did.
    """
    calls = [n for n in graph.nodes if n.op == "call_function"]
    start = 0
    while start < len(calls):
        many, most, arguments = _TOGETHER.get(calls[start].target, (None, 1, None))
        row = [calls[start]]
        for n in calls[start + 1 : start + most]:
            if n.target is not row[0].target or n.kwargs or set(n.all_input_nodes) & set(row):
                break
            if n.meta["val"].device != row[0].meta["val"].device:
                break
            row.append(n)
        start += len(row)
        if len(row) > 1 and (given := arguments([n.args for n in row])) is not None:
            _replace(graph, row, many, given)


def _replace(graph: fx.Graph, row: list[fx.Node], many: OpOverload, given: tuple) -> None:
    """These calls by the results of one, which stands where the last of them does: its operands are there."""
    with graph.inserting_after(row[-1]):
        call = graph.call_function(many, given)
    call.meta["val"] = [n.meta["val"] for n in row]
    at = call
    for i, n in enumerate(row):
        with graph.inserting_after(at):
            at = graph.call_function(operator.getitem, (call, i))
        at.meta.update(n.meta)
        n.replace_all_uses_with(at)
        graph.erase_node(n)


def write_as_read(graph: fx.Graph) -> None:
    """Of ATen operations, forward or backward: what is read in fp32 alone is written in fp32."""
    for op, (first, where) in _WIDE.items():
        for call in graph.find_nodes(op="call_function", target=op):
            results = [call]
            if not isinstance(call.meta["val"], torch.Tensor):
                results = [n for n in call.users if n.target is operator.getitem and n.args[1] >= first]
            paths = [_until_cast(n) for n in results]
            told = call.kwargs or len(call.args) == len(op._schema.arguments)  # its dtype, among others
            if paths and all(paths) and not told and where(*call.args):
                _write_wide(graph, call, paths)


def _until_cast(n: fx.Node) -> list[fx.Node]:
    """A result, views of it, and their cast to fp32, where each is all that is read of the one before; else nothing."""
    path = [n]
    while len(n.users) == 1:
        (n,) = n.users
        path.append(n)
        if n.target is torch.ops.prims.convert_element_type.default:
            return path if n.args[1] == torch.float32 else []
        if not getattr(n.target, "is_view", False):
            break
    return []


def _write_wide(graph: fx.Graph, call: fx.Node, paths: list[list[fx.Node]]) -> None:
    """Give the call the dtype, and what reads it what it gives then."""
    defaults = [a.default_value for a in call.target._schema.arguments]
    more = *defaults[len(call.args) : -1], torch.float32
    call.args = (*call.args, *more)
    if traced := call.meta.get("eager_input_vals"):  # Inductor lays operands out as these
        call.meta["eager_input_vals"] = ((*traced[0], *more), traced[1])
    for *before, cast in paths:
        for n in before:
            n.meta["val"] = n.meta["val"].to(torch.float32)
        cast.replace_all_uses_with(before[-1])
        graph.erase_node(cast)
    if paths[0][0] is not call:
        values = dict(enumerate(call.meta["val"])) | {part.args[1]: part.meta["val"] for part, *_ in paths}
        call.meta["val"] = list(values.values())


def reuse_operand_buffers(graph: fx.Graph) -> None:
    """Of ATen operations, forward or backward, before Inductor decides which results lie where: if it finds that an operand is
    read later after all, it copies it.
    """
    from sloth.compat.inductor import get_node_storage, kernel_side_table, triton_kernel_wrapper_functional

    order = {n: i for i, n in enumerate(graph.nodes)}
    storages: dict[int | None, list[fx.Node]] = {}
    for n in order:
        storages.setdefault(get_node_storage(n), []).append(n)
    for call in graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional):
        kernel, given = kernel_side_table.get_kernel(call.kwargs["kernel_idx"]), call.kwargs["kwargs"]
        for result, operand in _OVER.get(kernel if kernel in _OVER else getattr(kernel, "fn", None), {}).items():
            new, old = given[result], given[operand]
            same_memory = storages.get(get_node_storage(old), ())
            done = all(n.op == "call_function" and all(order[u] <= order[call] for u in n.users) for n in same_memory)
            if done and same_memory and _is_fresh(new) and _alike(new.meta["val"], old.meta["val"]):
                given = {**given, result: old}
        call.kwargs = {**call.kwargs, "kwargs": given}


def _is_fresh(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default) and len(node.users) == 1


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and a.is_contiguous() and b.is_contiguous()


def save_checkpoint_boundaries(graph: fx.Graph) -> None:
    """Of both passes, before they are divided: what leaves a checkpointed part is not computed again."""
    from sloth.compat.inductor import must_recompute

    needed: set[fx.Node] = set()  # of what follows checkpointed parts, what has a part in its own backward pass
    for n in reversed(graph.nodes):
        if "ac_graph_id" not in n.meta and _is(n, "forward") and any(u in needed or _is(u, "backward") for u in n.users):
            needed.add(n)
    for n in graph.nodes:
        if must_recompute(n) and "ac_graph_id" in n.meta and not needed.isdisjoint(n.users):
            while getattr(n.target, "is_view", False) and must_recompute(n.args[0]):
                n = n.args[0]  # views are always made again
            n.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def save_thin_products(graph: fx.Graph) -> None:
    """Of both passes, before they are divided: of checkpointed parts, what is thin and takes a whole matrix to make."""
    for n in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        columns, read = n.meta["val"].shape[1], n.args[0].meta["val"].shape[1]
        known = isinstance(columns, int) and isinstance(read, int)
        plain = n.meta.get("recompute") == CheckpointPolicy.PREFER_RECOMPUTE  # others the user's own policy chose
        if known and columns * THIN <= read and plain and "ac_graph_id" in n.meta:
            n.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _is(node: fx.Node, part: str) -> bool:
    return node.meta.get("partitioner_tag") == f"is_{part}"
