"""A copy of a graph's symbolic sizes to try things on.

What is tried (an operator on fake operands, a reference traced for a match) may compare sizes. On the sizes of the graph itself
each comparison would be a guard: `s27 - 1 == 295` holds for this length alone, and Dynamo compiles anew for every other. Here it
is noted in the copy, where it can be seen, and the graph's own sizes learn nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import sympy
import torch
from torch import SymBool, SymFloat, SymInt
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sloth.compat.dispatch import FakeTensorMode, SymT, disable_fake_tensor_cache, enable_python_dispatcher, symbol_is_type

ORDINARY = (16, 104, 4096, 10**7)


class Compared(Exception):
    """What was tried holds for some sizes only; the message says for which."""


def scratch_mode(env: ShapeEnv | None) -> FakeTensorMode:
    """Fake tensors whose sizes are those of `env`, copied."""
    if env is None:
        return FakeTensorMode(shape_env=None)
    forked = copy(env)
    for name, value in vars(env).items():
        if isinstance(value, dict | list | set):
            setattr(forked, name, copy(value))
    return FakeTensorMode(shape_env=forked)


def into(size: Any, mode: FakeTensorMode) -> Any:
    """The same size as one of the mode's."""
    if not isinstance(size, SymInt | SymFloat | SymBool) or size.node.shape_env is mode.shape_env:
        return size
    node = size.node
    return type(size)(SymNode(node.expr, mode.shape_env, node.pytype, node.hint if node.has_hint() else None))


@contextmanager
def comparing_nothing(mode: FakeTensorMode) -> Iterator[None]:
    """Raises Compared where what was done meanwhile holds for some sizes only. Each attempt starts from the same knowledge."""
    env = mode.shape_env
    known = None if env is None else {k: copy(v) for k, v in vars(env).items() if isinstance(v, dict | list | set)}
    yield
    if env is None or len(env.guards) == len(known["guards"]):
        return
    learnt = [g.expr for g in env.guards[len(known["guards"]) :]]
    vars(env).update(known)
    if not all(map(_of_ordinary_sizes, learnt)):
        raise Compared(f"it holds for some sizes only: {', '.join(map(str, learnt))}")


@contextmanager
def trying(mode: FakeTensorMode) -> Iterator[None]:
    """Operators are called on the mode's fake tensors meanwhile. Of like calls one is tried, so that what torch would keep of
    each ATen call, to know the next one like it, costs more than it saves.
    """
    dispatching = enable_python_dispatcher()  # in C++, sizes would become numbers
    with comparing_nothing(mode), mode, disable_fake_tensor_cache(mode), torch.no_grad(), dispatching:
        yield


def _of_ordinary_sizes(expr: sympy.Basic) -> bool:
    """Does it hold for all sizes but the least? torch asks for 0 and 1 wherever it lays a tensor out (`s - 1 >= 2`)."""
    symbols = sorted(expr.free_symbols, key=str)
    return all(expr.xreplace({s: sympy.Integer(n + 8 * i) for i, s in enumerate(symbols)}) == True for n in ORDINARY)  # noqa: E712


def guards_of(env: ShapeEnv | None) -> list[str]:
    """On sizes. Of numbers that Dynamo made inputs (an adapter's scale that changed), a pattern must know the value."""
    exprs = [] if env is None else [g.expr for g in env.guards]
    return [str(e) for e in exprs if not any(symbol_is_type(s, SymT.FLOAT) for s in e.free_symbols)]
