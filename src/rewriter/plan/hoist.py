"""What layers have in common is computed once, outside of them.

An operator may be told what it would else compute of some of its arguments: the intervals that a mask leaves, say. Where these
arguments come into a layer's body from outside, as the mask does, every layer would compute it, again in its backward pass and,
with checkpointing, once more before that. So it is computed where its operands are, once for all calls that are alike, and handed
in. Within one graph a compiler would find that by itself; graphs that are compiled in parts, and bodies, it does not see through.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import FakeTensorMode, OpOverload
from sloth.rewriter.graph.lower import LoweredGraph, shape_env_of
from sloth.rewriter.graph.record import fakes
from sloth.rewriter.graph.scratch import trying
from sloth.rewriter.graph.value import Meta, literal_key, values_in
from sloth.rewriter.plan.bodies import add_input


@dataclass(frozen=True)
class _Shared:
    by: OpOverload
    argument: str
    when: Callable[[fx.Node], bool]


_SHARED: dict[OpOverload, _Shared] = {}


def shares(op: OpOverload, by: OpOverload, argument: str, when: Callable[[fx.Node], bool]) -> None:
    """`op` computes the list that `by` gives of the arguments of the same names, unless it is given as `argument`. Calls of `op`
    for which `when` is false are left as they are.
    """
    _SHARED[op] = _Shared(by, argument, when)


def hoist(views: Iterable[LoweredGraph], scratch: FakeTensorMode) -> None:
    """In these graphs, after they were rewritten."""
    calls = [(view, n) for view in views for n in view.gm.graph.nodes if n.target in _SHARED]
    made: dict[Any, list[fx.Node]] = {}
    for view, call in calls:
        shared = _SHARED[call.target]
        names = [a.name for a in call.target._schema.arguments]
        own = [names.index(a.name) for a in shared.by._schema.arguments]
        given = tuple(call.args[i] for i in own)
        if shared.when(call) and list(_nodes(given)) and len(call.args) == len(names) and not call.kwargs:
            parts = _parts(shared.by, given, view, made, scratch)
            if parts is not None:
                args = list(call.args)
                args[names.index(shared.argument)] = parts
                for i in own:
                    if list(_nodes((args[i],))):
                        args[i] = [] if isinstance(args[i], list | tuple) else None
                call.args = tuple(args)


def drop_unread_inputs(views: Sequence[LoweredGraph]) -> None:
    """Tensors that bodies are given and read no more, as a mask of [S, S] whose meaning attention was told. They would be
    computed and kept for the backward pass; now AOTAutograd drops what computes them, which nobody reads. views: outermost first.

    Of bodies that are given their inputs in order. Tensors without dimensions may be numbers that Dynamo lifted.
    """
    for view in (v for v in reversed(views) if v.around is not None):
        inputs = view.gm.graph.find_nodes(op="placeholder")
        for n in [*inputs]:
            example = n.meta.get("example_value")
            if n.users or not isinstance(example, torch.Tensor) or example.dim() == 0:
                continue
            at = inputs.index(n) - len(inputs)
            for call in view.calls:
                given = list(call.args)
                del given[at]
                call.args = tuple(given)
            view.gm.graph.erase_node(n)
            inputs.remove(n)


def _parts(by: OpOverload, given: tuple, view: LoweredGraph, made: dict, scratch: FakeTensorMode) -> list[fx.Node] | None:
    """Nodes of this graph that hold what `by` gives of these: computed here, or further out where all of them come from."""
    if any(v.mutated_storage for n in _nodes(given) for v in values_in((view.env.get(n),))):
        return None  # memory that somebody writes is read where it was
    key = (id(view), by, literal_key(fx.map_arg(given, lambda n: n.name)))
    if key not in made:
        passed = _passed(by, given, view, made, scratch) if _from_outside(given, view) else None
        parts = passed or _computed(by, given, view, scratch)
        if parts is None:
            return None
        made[key] = parts
    return made[key]


def _nodes(given: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(given, found.append)
    return found


def _from_outside(given: tuple, view: LoweredGraph) -> bool:
    """Are these inputs of a body that is given its inputs in order? The backward body of an autograd function is not."""
    return view.around is not None and all(n.op == "placeholder" for n in _nodes(given))


def _passed(by: OpOverload, given: tuple, view: LoweredGraph, made: dict, scratch: FakeTensorMode) -> list[fx.Node] | None:
    """Inputs of a body for what its callers compute: for each call of what it is given."""
    inputs = view.gm.graph.find_nodes(op="placeholder")
    found = []
    for caller, call in zip(view.callers, view.calls, strict=True):
        outer = dict(zip(inputs, call.args[len(call.args) - len(inputs) :], strict=True))
        parts = _parts(by, fx.map_arg(given, outer.__getitem__), caller, made, scratch)
        if parts is None:
            return None
        found.append(parts)
    if not found or len({len(parts) for parts in found}) > 1:
        return None
    return [add_input(view, each) for each in zip(*found, strict=True)]


def _computed(by: OpOverload, given: tuple, view: LoweredGraph, scratch: FakeTensorMode) -> list[fx.Node] | None:
    """A call of `by` behind the last of its operands, and its results."""
    graph, order = view.gm.graph, {n: i for i, n in enumerate(view.gm.graph.nodes)}
    examples = _examples(by, given, view, scratch)
    if examples is None:
        return None
    last = max(_nodes(given), key=order.__getitem__)
    while last.next.op == "placeholder":
        last = last.next
    with graph.inserting_after(last):
        call = graph.call_function(by, given)
    nodes, at = [], call
    for i, example in enumerate(examples):
        with graph.inserting_after(at):
            at = graph.call_function(operator.getitem, (call, i))
        at.meta.update({k: m for k, m in last.meta.items() if k in ("stack_trace", "nn_module_stack")}, example_value=example)
        nodes.append(at)
    view.regions |= dict.fromkeys((call, *nodes), view.regions[last])
    return nodes


def _examples(by: OpOverload, given: tuple, view: LoweredGraph, scratch: FakeTensorMode) -> list[torch.Tensor] | None:
    """What the results look like; None where that depends on how sizes compare."""
    nodes = _nodes(given)
    known = [n.meta.get("example_value") for n in nodes]
    if not all(isinstance(x, torch.Tensor) for x in known):
        return None
    tried = dict(zip(nodes, fakes([Meta.of(x) for x in known], scratch), strict=True))
    try:
        with trying(scratch):
            metas = [Meta.of(t) for t in by(*fx.map_arg(given, tried.__getitem__))]
    except Exception:
        return None
    env = shape_env_of(view.gm)
    with env.suppress_guards() if env else nullcontext():
        return fakes(metas, known[0].fake_mode)
