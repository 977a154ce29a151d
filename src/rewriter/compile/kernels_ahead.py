"""Which kernels opaque operators will launch is told ahead, as soon as Inductor is about to compile the graph that calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import OpOverload, pytree
from sloth.rewriter.graph.value import Symbol
from sloth.rewriter.notices import log

TIMES = (1, 16)  # sizes that are symbols, as in this batch and in larger ones: an operator may have a kernel for these
_AHEAD: dict[OpOverload, Callable[..., None]] = {}


def compiled_ahead(op: OpOverload, compile_ahead: Callable[..., None]) -> None:
    """Let `compile_ahead(device, *args, **kwargs)` be called for each call of `op` in a graph that is compiled for a GPU: with
    its arguments, for tensors some without memory.
    """
    _AHEAD[op] = compile_ahead


def compile_kernels_ahead(graph: fx.Graph) -> None:
    """Of ATen operations, forward or backward, when other passes are done."""
    told = set()
    for n in graph.nodes:
        compile_ahead = _AHEAD.get(n.target)
        if compile_ahead is None:
            continue
        tensors = [t for t in pytree.tree_leaves(n.meta.get("val")) if isinstance(t, torch.Tensor)]
        if not tensors or tensors[0].device.type != "cuda":
            continue
        for times in TIMES:
            try:
                args, kwargs = fx.node.map_aggregate((n.args, n.kwargs), partial(_without_memory, times))
            except Exception as e:  # a size that depends on data
                log.debug("sloth: %s is not compiled ahead: %s", n, e)
                break
            key = n.target, str(pytree.tree_map(_described, (args, kwargs)))
            if key not in told:
                told.add(key)
                compile_ahead(tensors[0].device, *args, **kwargs)


def _without_memory(times: int, a: Any) -> Any:
    value = a.meta["val"] if isinstance(a, fx.Node) else a
    if isinstance(value, torch.Tensor):
        shape, stride = ([_number(n, times) for n in numbers] for numbers in (value.shape, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
    return _number(value, times) if isinstance(value, Symbol) else value


def _number(n: Any, times: int) -> Any:
    return n.node.hint * times if isinstance(n, Symbol) else n


def _described(a: Any) -> Any:
    return (a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a
