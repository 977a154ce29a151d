"""Mutants: graphs of a reference with one change, which must not be taken for the reference."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import map_aggregate

from sloth.compat.dispatch import set_grad_enabled

SIMILAR = [  # functions that one could be written for another
    [operator.add, operator.sub, operator.mul, operator.truediv],
    [torch.rsqrt, torch.sqrt, torch.exp],
    [torch.neg, torch.abs],
    [torch.tanh, torch.sigmoid, F.silu, F.gelu, F.relu],
    ["mean", "sum", "amax"],
    ["float", "half"],
]
WORDS = {"tanh": "none", "mean": "sum", "sum": "mean"}
DTYPES = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}
Edit = tuple[str, Callable[[fx.Graph, fx.Node], Any]]


def altered(a: Any) -> Iterator[Any]:
    """Literals that are not `a`, one change at a time in a container."""
    if isinstance(a, bool):
        yield not a
    elif isinstance(a, int):
        yield from {a + 1, a - 1, -a} - {a}
    elif isinstance(a, float):
        yield from (1.5 * a + 1e-3, -a)
    elif isinstance(a, str | torch.dtype):
        yield from (x for x in [WORDS.get(a) if isinstance(a, str) else DTYPES.get(a)] if x is not None)
    elif isinstance(a, slice):
        for start, stop, step in altered((a.start, a.stop, a.step)):
            yield slice(start, stop, step)
    elif isinstance(a, tuple | list):
        for i, x in enumerate(a):
            for y in altered(x):
                yield type(a)((*a[:i], y, *a[i + 1 :]))
    elif isinstance(a, dict):
        for k, x in a.items():
            for y in altered(x):
                yield {**a, k: y}


def _constants(n: fx.Node) -> Iterator[Edit]:
    """A number, word, dtype or slice bound is another one."""
    for args in altered(tuple(n.args)):
        yield f"args {args}", lambda g, m, args=args: setattr(m, "args", _moved(args, g))
    for kwargs in altered(dict(n.kwargs)):
        yield f"kwargs {kwargs}", lambda g, m, kwargs=kwargs: setattr(m, "kwargs", _moved(kwargs, g))


def _functions(n: fx.Node) -> Iterator[Edit]:
    """add for mul, sqrt for rsqrt, sum for mean."""
    for group in SIMILAR:
        for other in group if n.target in group else ():
            if other != n.target:
                yield f"{getattr(other, '__name__', other)} instead", lambda g, m, other=other: setattr(m, "target", other)


def _operands(n: fx.Node) -> Iterator[Edit]:
    """Operands exchanged, or one of them another value of the same description."""
    for i, a in enumerate(n.args):
        if isinstance(a, tuple | list) and len(a) > 1:
            order = type(a)(reversed(a))
            yield "list reversed", lambda g, m, i=i, order=order: m.update_arg(i, _moved(order, g))
    if len(n.args) > 1 and all(isinstance(a, fx.Node) for a in n.args[:2]):
        yield "operands exchanged", lambda g, m: setattr(m, "args", (m.args[1], m.args[0], *m.args[2:]))
    earlier = [m for m in n.graph.nodes if m < n and isinstance(m.meta.get("example_value"), torch.Tensor)]
    for a in n.all_input_nodes:
        for b in earlier:
            if a is not b and _alike(a, b):
                yield f"{b.name} for {a.name}", lambda g, m, a=a, b=b: m.replace_input_with(*_moved((a, b), g))


def _absences(n: fx.Node) -> Iterator[Edit]:
    """A step left out: a cast, a negation, an addition; or done after the next step instead."""
    for a in n.all_input_nodes:
        yield f"left out for {a.name}", lambda g, m, a=a: m.replace_all_uses_with(_moved(a, g))
    if n.op == "call_method" and n.target in ("to", "float", "type_as") and n.users:
        yield "later", _later


def _later(g: fx.Graph, m: fx.Node) -> None:
    users, before, method = list(m.users), m.all_input_nodes[0], str(m.target)
    m.replace_all_uses_with(before)
    for u in users:
        if u.op != "output":
            _behind(g, u, lambda u=u: g.call_method(method, (u, *m.args[1:]), m.kwargs))


EXTRA: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "negated": lambda g, m: g.call_method("neg", (m,)),
    "scaled": lambda g, m: g.call_function(operator.mul, (m, 1.01)),
    "detached": lambda g, m: g.call_method("detach", (m,)),
    "rounded": lambda g, m: g.call_method("to", (g.call_method("to", (m, torch.float16)), m.meta["example_value"].dtype)),
    "widened": lambda g, m: g.call_method("to", (m, torch.float64)),
    "shifted": lambda g, m: g.call_method("roll", (m, 1, -1)),
}


def _additions(n: fx.Node) -> Iterator[Edit]:
    """One more step between this value and those who read it."""
    for name, write in EXTRA.items():
        yield name, lambda g, m, write=write: _behind(g, m, lambda: write(g, m))


def _effects(n: fx.Node) -> Iterator[Edit]:
    """The value is also a result, is written in place, is computed without gradients, or is read by a step that shifts it."""

    def returned(g: fx.Graph, m: fx.Node) -> None:
        results: Any = g.output_node().args[0]
        g.output_node().update_arg(0, (*results, m))

    yield "result too", returned

    def written(g: fx.Graph, m: fx.Node) -> None:
        with g.inserting_after(m):
            g.call_method("mul_", (m, 1.5))

    def without_gradient(g: fx.Graph, m: fx.Node) -> None:
        with g.inserting_before(m):
            g.call_function(set_grad_enabled, (False,))
        with g.inserting_after(m):
            g.call_function(set_grad_enabled, (True,))

    yield "written in place", written
    if n.op != "placeholder":
        yield "without gradient", without_gradient


KINDS: tuple[Callable[[fx.Node], Iterator[Edit]], ...] = (
    _constants,
    _functions,
    _operands,
    _absences,
    _additions,
    _effects,
)


def mutants(gm: fx.GraphModule) -> Iterator[tuple[str, Callable[[], fx.GraphModule]]]:
    """(what was done, the graph with that one change) for every node and every kind of change, kind by kind."""
    for kind in KINDS:
        for n in gm.graph.nodes:
            value = n.meta.get("example_value")
            if n.op == "output" or not isinstance(value, torch.Tensor) and kind not in (_constants, _operands):
                continue
            if n.op == "placeholder" and kind is not _effects:
                continue
            if kind is _additions and not value.is_floating_point():
                continue
            for what, edit in kind(n):
                yield f"{n.name}: {what}", lambda n=n, edit=edit: _edited(gm, n, edit)


def _edited(gm: fx.GraphModule, n: fx.Node, edit: Callable[[fx.Graph, fx.Node], None]) -> fx.GraphModule:
    gm = copy.deepcopy(gm)
    edit(gm.graph, next(m for m in gm.graph.nodes if m.name == n.name))
    gm.graph.eliminate_dead_code(lambda m: m.is_impure() or m.target == "mul_" or m.target is set_grad_enabled)
    gm.graph.lint()
    gm.recompile()
    return gm


def _moved(a: Any, graph: fx.Graph) -> Any:
    """Nodes of the original as those of the copy."""
    names = {n.name: n for n in graph.nodes}
    return map_aggregate(a, lambda x: names[x.name] if isinstance(x, fx.Node) else x)


def _behind(g: fx.Graph, m: fx.Node, write: Callable[[], fx.Node]) -> None:
    """All readers of `m` read what `write` adds behind it."""
    users = list(m.users)
    with g.inserting_before(m.next):
        new = write()
    for u in users:
        u.replace_input_with(m, new)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("example_value"), b.meta.get("example_value")
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)
