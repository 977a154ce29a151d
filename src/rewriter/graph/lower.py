"""Lower a Dynamo graph, node by node, to its shadow in normal form. The graph itself is only read.

Each node's call is recorded once for each distinct signature (target, literals, descriptions of its tensors) and replayed for the
others: the layers of a model repeat, so a hundred layers cost little more than one. What cannot be lowered (higher-order
operators, data-dependent results, calls that fail on fakes) becomes an opaque value described by its `example_value`; the bodies
of checkpoints, autograd functions and invoke_subgraph are graphs of their own with views of their own.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from sloth.compat.dispatch import (
    FakeTensorMode,
    HigherOrderOperator,
    TracingContext,
    enter_autocast,
    enter_inference_mode,
    exit_autocast,
    exit_inference_mode,
    set_grad_enabled,
)
from sloth.rewriter.graph.aliasing import in_written_memory, may_write, storages, tensors, written_storages
from sloth.rewriter.graph.ambient import Autocast, current, under
from sloth.rewriter.graph.autograd_functions import is_derivative
from sloth.rewriter.graph.fills import Fills, fills
from sloth.rewriter.graph.identity import held
from sloth.rewriter.graph.normal_form import Normal
from sloth.rewriter.graph.record import Ref, Trace, rebuilt, resolve, trace
from sloth.rewriter.graph.value import Meta, Region, Symbol, Value, ValueGraph, literal_key, values_in

# Higher-order operators whose bodies are ordinary code of the model. Those of others (flex_attention's score_mod, …) are left
# alone.
BODIES = {"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "invoke_subgraph", "autograd_function_apply"}

PLAIN = {"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap"}  # of these: the body, and then its inputs in order


@dataclass
class LoweredGraph:
    """One graph and its shadow. `env` gives each node's Value (or literal, or tuple of those)."""

    gm: fx.GraphModule
    path: str
    region: Region
    shadow: ValueGraph = field(default_factory=ValueGraph)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    opaque: dict[fx.Node, str] = field(default_factory=dict)  # node → why it was not lowered
    regions: dict[fx.Node, Region] = field(default_factory=dict)
    writes: list[tuple[fx.Node, Value]] = field(default_factory=list)  # in place: the call, and what it writes to
    around: LoweredGraph | None = (
        None  # of a body that is given its inputs in order: the view of the graph that calls it, and the calls
    )
    calls: list[fx.Node] = field(default_factory=list)
    callers: list[LoweredGraph] = field(default_factory=list)  # a view for each call
    torn: bool = False  # it is called in more than one region

    @property
    def times(self) -> int:
        """How often it runs when the whole graph does: layers that are alike share a body."""
        return sum(caller.times for caller in self.callers) or 1


def lower(gm: fx.GraphModule) -> list[LoweredGraph]:
    """The shadow of `gm` and of every body in it, outermost first. Of a body that is called in more than one region, and of what
    is inside of it, there is none.
    """
    shape_env = shape_env_of(gm)
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=False)
    out: list[LoweredGraph] = []
    todo: list[tuple] = [(gm, "", Region(torch.is_grad_enabled(), current()), [], None, None)]
    seen: dict[int, LoweredGraph] = {}
    memo: dict[Any, Trace | Exception] = {}
    with shape_env.suppress_guards() if shape_env else contextlib.nullcontext():
        while todo:
            body, path, region, operands, around, call = todo.pop(0)
            if id(body) in seen:  # called from several places: an input may be now this value, now that
                _pass(seen[id(body)], region, operands, around, call)
                continue
            builder = _Builder(LoweredGraph(body, path, region), mode, memo)
            builder.run()
            if builder.view.writes:  # somebody writes in place: once more, with that memory marked as mutated
                builder = _Builder(LoweredGraph(body, path, region), mode, memo, builder)
                builder.run()
            seen[id(body)] = builder.view
            _pass(builder.view, region, operands, around, call)
            out.append(builder.view)
            todo += [(*told, builder.view, node) for *told, node in builder.bodies]
    torn = tuple(view.path for view in out if view.torn)
    return [view for view in out if not torn or not view.path.startswith(torn)]


def _pass(view: LoweredGraph, region: Region, operands: list[Any], caller: LoweredGraph | None, call: fx.Node | None) -> None:
    """Note for a body which values of its caller its inputs are: those that are the same in all calls. None are where `operands`
    is empty.
    """
    if caller is None:
        return
    first, inputs = not view.callers, view.gm.graph.find_nodes(op="placeholder")
    known = bool(operands) and len(operands) == len(inputs) and (first or view.around is caller)
    view.torn |= region != view.region
    view.around = caller if known else None
    view.callers.append(caller)
    view.calls.append(call)
    for node, outer in zip(inputs, operands if known else [None] * len(inputs), strict=True):
        value = view.env[node]
        if isinstance(value, Value):
            value.captured_from = outer if isinstance(outer, Value) and (first or value.captured_from is outer) else None


def shape_env_of(gm: fx.GraphModule) -> ShapeEnv | None:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode.shape_env
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        for s in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(s, Symbol):
                return s.node.shape_env
    return None


class _Builder:
    def __init__(self, view: LoweredGraph, mode: FakeTensorMode, memo: dict[Any, Any], first: _Builder | None = None):
        self.view, self.mode, self.memo = view, mode, memo
        # Nodes in memory that is written, or like such; that memory; and writes that only make a constant.
        self.written, self.places, self.fills = first.in_place() if first else (frozenset(), frozenset(), {})
        self.outside = current()
        self.normal = Normal(view.shadow)
        self.normal.region = view.region
        self.bodies: list[
            tuple[fx.GraphModule, str, Region, list[Any], fx.Node]
        ] = []  # with what is passed to each, and the call
        self.inference: list[bool] = []  # the grad mode outside of each open inference mode
        self.autocasts: list[tuple[torch.autocast, Autocast]] = []  # open blocks, and the state outside of each
        self.dropped: frozenset[fx.Node] = frozenset()  # returned, but to nobody who reads them

    def run(self) -> None:
        """Build the view."""
        with under(self.view.region.autocast):
            try:
                self.lower_all()
            finally:
                while self.autocasts:
                    self.leave_autocast()
        # what is rebound is another tensor until the end
        self.view.writes += [(self.view.gm.graph.output_node(), v) for v in self.normal.rebound]

    def in_place(self) -> tuple[frozenset[fx.Node], frozenset[int], Fills]:
        gm, told = self.view.gm, fills(self.view.gm, self.view.env, self.view.writes)
        writes = [w for w in self.view.writes if w[0] not in told]
        calls = [w for w in writes if w[0].op != "output"]  # what is rebound is written in its own name alone
        written = in_written_memory(gm, self.view.shadow.values, calls, self.normal.rebound)
        return written, written_storages(writes, gm), told

    def lower_all(self) -> None:
        for node in self.view.gm.graph.nodes:
            self.normal.origin = node
            self.normal.mutated_storage, self.normal.fills = node in self.written, node in self.fills
            self.view.regions[node] = self.normal.region
            known = len(self.view.shadow.values)
            result = self.view.env[node] = held(self.normal, node, self.view.gm, self.places, self.lower(node), known)
            if isinstance(result, Value):
                result.nodes.append(node)
            self.view.env |= dict.fromkeys(self.fills.get(node, ()), result)
            self.view.writes += [(node, v) for v in self.normal.mutated]
            self.normal.mutated.clear()

    def lower(self, node: fx.Node) -> Any:
        example = node.meta.get("example_value")
        name = getattr(node.target, "__name__", "")
        if node.op == "output":
            return None
        if node.op in ("placeholder", "get_attr"):
            return self.leaf(node, example)
        if node.target is set_grad_enabled:
            self.normal.region = self.normal.region._replace(grad=node.args[0])
        elif node.target is enter_autocast:
            self.enter_autocast(node)
        elif node.target is exit_autocast:
            self.leave_autocast()
        elif node.target is enter_inference_mode:
            self.inference.append(self.normal.region.grad)
            self.normal.region = self.normal.region._replace(grad=self.normal.region.grad and not node.args[0])
        elif node.target is exit_inference_mode:
            self.normal.region = self.normal.region._replace(grad=self.inference.pop())
        elif name.endswith("_increment_nesting"):
            self.normal.region = self.normal.region._replace(transforms=self.normal.region.transforms + 1)
        elif name.endswith("_decrement_nesting"):
            self.normal.region = self.normal.region._replace(transforms=self.normal.region.transforms - 1)
        elif isinstance(node.target, HigherOrderOperator):
            if node.target.name() == "autograd_function_apply" and (found := self.function(node)) is not None:
                return found
            self.enter_bodies(node)
            return self.opaque(node, example, f"higher-order operator {node.target.name()}")
        elif isinstance(example, (*Symbol, int, float, torch.Size, torch.dtype, torch.device)):
            return tuple(example) if isinstance(example, torch.Size) else example
        else:
            return self.operation(node, example)
        return None

    def leaf(self, node: fx.Node, example: Any) -> Any:
        if node.op == "get_attr":
            example = operator.attrgetter(node.target)(self.view.gm)
        if not isinstance(example, torch.Tensor):
            return example
        kind = "input" if node.op == "placeholder" else "constant"
        grad = example.requires_grad and self.view.region.grad
        return self.normal.shadow.add(
            kind, (node.name,), Meta.of(example, grad), self.view.region, self.normal.mutated_storage, origin=node
        )

    def enter_autocast(self, node: fx.Node) -> None:
        block = torch.autocast(*node.args)
        block.__enter__()
        self.autocasts.append((block, self.normal.region.autocast))
        self.normal.region = self.normal.region._replace(autocast=current())

    def leave_autocast(self) -> None:
        block, outer = self.autocasts.pop()
        block.__exit__(None, None, None)
        self.normal.region = self.normal.region._replace(autocast=outer)

    def enter_bodies(self, node: fx.Node) -> None:
        if node.target.name() not in BODIES:
            return
        function = node.target.name() == "autograd_function_apply"
        region = Region(self.normal.region.grad and not function, self.normal.region.autocast)
        for arg in node.args:
            body = self.view.env.get(arg) if isinstance(arg, fx.Node) else None
            if isinstance(body, fx.GraphModule):
                plain = node.target.name() in PLAIN and body is self.view.env.get(node.args[0])
                operands = [self._value(a) for a in node.args[1:]] if plain else []
                backward = function and arg is node.args[1]  # runs when all blocks of the graph are left
                inside = region._replace(autocast=self.outside) if backward else region
                self.bodies.append((body, f"{self.view.path}{arg.target}.", inside, operands, node))

    def opaque(self, node: fx.Node, example: Any, why: str) -> Any:
        """Values that stand for themselves, one for each tensor in the result."""
        self.view.opaque[node] = why
        if may_write(node):
            self.normal.mutated.update(_operands(node, self.view.env))
        source = self.normal.shadow.add(
            "opaque", (node.name, *_operands(node, self.view.env)), None, self.normal.region, True, node
        )
        bodies = isinstance(node.target, HigherOrderOperator)  # of theirs, what is told is not relied on
        linked = lambda t: (t.dtype.is_floating_point or t.dtype.is_complex) and (bodies or t.requires_grad)  # noqa: E731
        count = iter(range(1 << 30))

        def stand_in(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                grad = linked(x) and self.normal.region.grad
                meta, mutated = Meta.of(x, grad), self.normal.mutated_storage
                return self.normal.shadow.add("result", (source, next(count)), meta, self.normal.region, mutated, node)
            return type(x)(map(stand_in, x)) if type(x) in (tuple, list) else x

        return stand_in(example)

    def operation(self, node: fx.Node, example: Any) -> Any:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._value)
        if node.target is operator.getitem and not isinstance(args[0], Value):
            return args[0][args[1]]
        if any(free_unbacked_symbols(t) for t in tensors(example)):
            return self.opaque(node, example, "its size depends on data")
        try:
            self.normal.last_use = self.is_last_use(node)
            result = self.normal.replay(*self.recorded(node, args, kwargs))
            gone = self.fills.get(node, node.args[:1])
            for v in self.normal.consumed:  # what held it holds something else from now on
                v.nodes[:] = [n for n in v.nodes if n not in gone]
            self.normal.consumed.clear()
        except Exception as e:
            return self.opaque(node, example, f"{type(e).__name__}: {e}".split("\n")[0][:200])
        seen, told = [v.meta for v in values_in((result,))], [Meta.of(t) for t in tensors(example)]
        if any(len(a.shape) != len(b.shape) or a.dtype != b.dtype for a, b in zip(seen, told, strict=False)):
            return self.opaque(node, example, "lowers to another shape or dtype than it was traced with")
        return result

    def is_last_use(self, node: fx.Node) -> bool:
        """Is this call the only reader of its first operand, which lies in memory of its own?"""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return False
        if any(user is not node and not (user.op == "output" and first in self.dropped) for user in first.users):
            return False
        own = storages(first, self.view.gm)
        return bool(own) and all(own.isdisjoint(storages(n, self.view.gm)) for n in first.all_input_nodes)

    def function(self, node: fx.Node) -> Any:
        """The results of an autograd function whose backward is proven to be the derivative of its forward."""
        forward, backward, *arguments = map(self._value, node.args)
        read = _read(node)
        scratch = ValueGraph()
        own = [scratch.add("input", (i,), a.meta, origin=node) if isinstance(a, Value) else a for i, a in enumerate(arguments)]
        try:
            told = self.inline(forward, own, scratch, node, read)
            if told is None or not is_derivative(
                told[0], own, lambda *given: self.inline(backward, given, scratch, node), told[1]
            ):
                return None
            found = self.inline(forward, arguments, self.normal.shadow, node, read)
        except Exception:  # bodies that are written in a way we do not know
            return None
        return found[0]

    def inline(
        self, body: fx.GraphModule, arguments: Sequence[Any], shadow: ValueGraph, call: fx.Node, read: set[int] | None = None
    ) -> Any:
        """What the body computes of these arguments, in the region of the call; None where the shadow cannot tell.
        Of the forward pass's results, those that nobody reads are None: torch 2.11 returns all that it computed.
        """
        builder = _Builder(LoweredGraph(body, self.view.path, self.normal.region, shadow), self.mode, self.memo)
        builder.normal.origin = call
        output = body.graph.output_node().args[0]
        if read is not None:
            results, saved = output
            output = ([r if i in read else None for i, r in enumerate(results)], saved)
            builder.dropped = frozenset(body.graph.output_node().all_input_nodes) - set(_nodes(output))
        given = iter(arguments)
        for node in body.graph.nodes:
            if node.op == "output":
                told = fx.node.map_aggregate(output, builder._value)
                return None if builder.view.opaque or builder.normal.mutated else told
            if node.target is not set_grad_enabled:  # the function's gradient is its backward, not its forward's
                builder.view.env[node] = next(given) if node.op == "placeholder" else builder.lower(node)
        return None

    def _value(self, a: Any) -> Any:
        return self.view.env[a] if isinstance(a, fx.Node) else a

    def recorded(self, node: fx.Node, args: tuple, kwargs: dict) -> tuple[Trace, list[Value]]:
        """The trace of the node's call, from the memo where the like was seen."""
        leaves: list[Value] = []

        def lift(a: Any) -> Any:
            if isinstance(a, Value):
                leaves.append(a)
                return Ref(-1, len(leaves) - 1)
            return rebuilt(a, lift)

        lifted = lift((args, kwargs))
        where = node.op == "call_module" and self.view.path, self.normal.region.autocast  # a name means this only in this graph
        signature = (node.op, node.target, literal_key(_flat(lifted)), where)
        key = (signature, tuple((literal_key(v.meta.shape), v.meta.dtype, v.meta.device) for v in leaves))
        if key not in self.memo:
            function = _callable(node, self.view.gm)

            def call(*tensors: torch.Tensor) -> Any:
                a, k = resolve(lifted, lambda r: tensors[r.index])
                return function(*a, **k)

            try:
                self.memo[key] = trace(call, [v.meta for v in leaves], self.mode)
            except Exception as e:
                self.memo[key] = e
        found = self.memo[key]
        if isinstance(found, Exception):
            raise found
        return found, leaves


def _read(call: fx.Node) -> set[int] | None:
    """Which results of a call are read; None for all of them."""
    if all(user.target is operator.getitem for user in call.users):
        return {user.args[1] for user in call.users}
    return None


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _flat(a: Any) -> Any:
    """Containers as tuples, for a key."""
    if isinstance(a, dict):
        return tuple((k, _flat(v)) for k, v in a.items())
    return tuple(_flat(x) for x in a) if isinstance(a, tuple | list) and not isinstance(a, Ref) else a


def _callable(node: fx.Node, gm: fx.GraphModule) -> Callable[..., Any]:
    if node.op == "call_method":
        return getattr(torch.Tensor, node.target)
    if node.target is torch.tensor and isinstance(node.args[0], bool | int | float):  # no ATen operation
        return lambda number, **how: torch.full((), number, **how)
    return node.target if node.op == "call_function" else gm.get_submodule(node.target)


def _operands(node: fx.Node, env: dict) -> tuple:
    return tuple(env[n] for n in node.all_input_nodes if isinstance(env.get(n), Value))
