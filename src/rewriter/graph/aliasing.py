"""Memory: which values lie in the same, and which calls of a graph write to it.

Values say what was computed, not when. For memory that somebody writes that is not enough: a value in it is marked
(`mutated_storage`). It is never the same as any other, and whoever reads it must do so when all writes are done. What cannot be
told is taken to share memory.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import HigherOrderOperator, OpOverload, is_traceable_wrapper_subclass
from sloth.rewriter.graph.canonical import ALIASES
from sloth.rewriter.graph.value import Value


def storages(node: fx.Node, gm: fx.GraphModule) -> frozenset[int]:
    """The memory that the node's tensors lie in."""
    example = operator.attrgetter(node.target)(gm) if node.op == "get_attr" else node.meta.get("example_value")
    found = set()
    for t in tensors(example):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # sparse and other tensors without one
            found.add(t.untyped_storage()._cdata)
    return frozenset(found)


def tensors(example: Any) -> Iterator[torch.Tensor]:
    if isinstance(example, torch.Tensor):
        yield example
    elif isinstance(example, tuple | list):
        for x in example:
            yield from tensors(x)


def is_plain(node: fx.Node) -> bool:
    """Are its tensors none of a subclass that holds others (DTensor, torchao's)?"""
    return not any(map(is_traceable_wrapper_subclass, tensors(node.meta.get("example_value"))))


def root(v: Value) -> Value:
    """Whose memory `v` may share."""
    while v.op in ALIASES:
        v = v.args[0]
    return v


def writers(v: Value, writes: Iterable[tuple[fx.Node, Value]], gm: fx.GraphModule) -> list[fx.Node]:
    """Those of the `writes` (a call, and what it writes to) that may reach the memory `v` lies in."""
    own = _places(v, gm)
    return [n for n, w in writes if root(w) is root(v) or not own or not (to := _places(w, gm)) or not own.isdisjoint(to)]


def _places(v: Value, gm: fx.GraphModule) -> set[int]:
    """The memory that `v`, or what it is a view of, lies in; empty where that is not known."""
    found = {s for n in v.nodes for s in storages(n, gm)}
    return found | _places(v.args[0], gm) if v.op in ALIASES else found


def copies_by_layout(node: fx.Node) -> bool:
    """Is it a call that copies its operand where the layout of that asks for it, and else gives a view of it?"""
    target = node.target
    name = target._schema.name.removeprefix("aten::") if isinstance(target, OpOverload) else getattr(target, "__name__", target)
    return name in ("contiguous", "reshape", "reshape_as", "flatten", "ravel")


def may_write(node: fx.Node) -> bool:
    """May this call, which the shadow does not look into, write to its operands?"""
    target = node.target
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    if isinstance(target, HigherOrderOperator):
        return "mutation" in target.name()
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _KEYWORDS or name.startswith("__i")
    in_place = in_place or name in _IN_PLACE
    return in_place or "out" in node.kwargs or bool(node.kwargs.get("inplace")) or node.op == "call_module"


def writes_for_others(node: fx.Node) -> bool:
    """Does it write what other calls read by the name that it had before?"""
    return may_write(node) and any(u is not node for x in may_be_written(node) for u in x.users)


def written_storages(writes: Iterable[tuple[fx.Node, Value]], gm: fx.GraphModule) -> frozenset[int]:
    """The memory that these calls write to: of the operands that they may, where that is known, or of all that hold the value."""
    return frozenset(s for call, v in writes for n in may_be_written(call) or v.nodes for s in storages(n, gm))


def in_written_memory(
    gm: fx.GraphModule, values: Iterable[Value], writes: Iterable[tuple[fx.Node, Value]], rebound: Iterable[Value]
) -> frozenset[fx.Node]:
    """The nodes in memory that these calls write to, and those that become another tensor."""
    roots = {root(v) for _, v in writes}
    written = {n for v in values if root(v) in roots for n in v.nodes}
    places = {s for n in written for s in storages(n, gm)}
    others = {n for n in gm.graph.nodes if not places.isdisjoint(storages(n, gm))}
    return frozenset(written | {n for v in rebound for n in v.nodes} | others)


def may_be_written(node: fx.Node) -> list[fx.Node]:
    """The operands that this call may write to."""
    if not may_write(node):
        return []
    if isinstance(node.target, OpOverload):
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        written = [given.get(a.name) for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    elif isinstance(node.target, HigherOrderOperator) or node.op == "call_module":
        return node.all_input_nodes
    else:
        written = [*node.args[:1], node.kwargs.get("out")]
    found: list[fx.Node] = []
    fx.node.map_arg(written, found.append)
    return found


def writes_outside(gm: fx.GraphModule) -> bool:
    """May a graph, or one of its bodies, write to memory that it did not make?"""
    given = {s for n in gm.graph.nodes if n.op in ("placeholder", "get_attr") for s in storages(n, gm)}
    for n in gm.graph.nodes:
        places = [storages(a, gm) for a in may_be_written(n)]
        if not all(places) or any(given & written for written in places):
            return True
    return any(writes_outside(m) for m in gm.children() if isinstance(m, fx.GraphModule))


def may_write_or_bodies(node: fx.Node) -> bool:
    """May this call write to others' memory, itself or in a body (a checkpoint's, say), though nobody reads its results?"""
    bodies = [getattr(node.graph.owning_module, a.target, None) for a in node.all_input_nodes if a.op == "get_attr"]
    return may_write(node) or any(writes_outside(body) for body in bodies if isinstance(body, fx.GraphModule))


_KEYWORDS = {"and_", "or_", "not_", "is_"}  # operator's names for them
_IN_PLACE = {"setitem", "delitem", "__setitem__"} | {f"i{name}" for name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul", "concat"
)}  # fmt: skip
