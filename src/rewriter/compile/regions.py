"""Equal layers are compiled once: a graph that repeats itself is cut between the repetitions and compiled in parts.

What AOTAutograd and Inductor take grows with the number of layers, though these are alike. Parts that are the same code on the
same kinds of tensors share what they are compiled to, and run one after the other; autograd joins their backward passes. What
crosses a cut is what the model passes on from layer to layer. A part costs the host 0.1 to 0.2 ms in a step, both ways.

A graph stays whole where cuts could be seen: where calls leave a state behind or write to memory of another part, and where it
is captured as a CUDA graph or called on fake tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import sympy
import torch
from torch import fx

from sloth.compat.dispatch import (
    FakeTensorMode,
    TracingContext,
    enter_autocast,
    exit_autocast,
    is_traceable_wrapper_subclass,
    set_grad_enabled,
    tracing,
)
from sloth.rewriter.compile import checkpoint_offload
from sloth.rewriter.compile.checkpoint_offload import HostCopies, inputs_that_leave
from sloth.rewriter.compile.structural_key import Bodies, body_of, call_key, graph_key, tensor_key
from sloth.rewriter.graph.aliasing import may_be_written, may_write, storages, tensors
from sloth.rewriter.graph.value import Symbol
from sloth.rewriter.notices import warn_once

REPETITIONS = 3  # at least, or nothing is won
CALLS = 16  # of a repetition, those in bodies included; a shorter one runs about as fast as a part is entered
PERIODS = 64  # that are looked at

Compiled = Callable[..., Any]


@dataclass(eq=False)
class CompileRegion:
    """Consecutive calls of a graph, what they read of others, and what others read of them. entered, left: the blocks of
    autocast that are open before and behind them.
    """

    calls: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    entered: list[fx.Node]
    left: list[fx.Node]

    def graph(self) -> fx.Graph:
        graph = fx.Graph()
        env = {n: graph.placeholder(n.name) for n in self.inputs}
        for n, placeholder in env.items():
            placeholder.meta.update(n.meta)
        for n in (*self.entered, *self.calls):
            env[n] = graph.node_copy(n, env.__getitem__)
        for block in reversed(self.left):
            graph.call_function(exit_autocast, (env[block],))
        graph.output(tuple(env[n] for n in self.outputs))
        return graph


def compile_by_region(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_one: Callable[[fx.GraphModule, Sequence[Any]], Compiled],
    starting: Callable[[int, list[fx.GraphModule]], None] = lambda parts, modules: None,
    offload: bool = False,
) -> Compiled:
    """What `compile_one` makes of the graph. starting: is told before, of how many parts it is and which are compiled. offload:
    inputs of layers wait in host memory for their backward pass.
    """
    context = TracingContext.try_get()
    known = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    compiled: dict[int, Compiled] = {}
    run, prepared = [], _prepared(gm, context)
    starting(len(prepared) or 1, [module for _, module, _ in prepared if module is not None] or [gm])
    leaving = _leaving(gm, [part for part, _, _ in prepared]) if offload else {}
    for part, module, same in prepared:
        if module is not None:
            given = [known[n] if n in known else _fake(n, context.fake_mode) for n in part.inputs]
            with tracing(copy(context)):  # one of its own: facts of what is compiled are noted in it
                compiled[same] = compile_one(module, given)
        run.append((compiled[same], part))
    if run:
        return RegionSequence(gm, run, leaving)
    if offload and any(map(checkpoint_offload.is_on_gpu, example_inputs)):
        warn_once("sloth.checkpoint_offload: the graph does not repeat itself in layers, and nothing waits in host memory")
    return compile_one(gm, example_inputs)


def _leaving(gm: fx.GraphModule, regions: Sequence[CompileRegion]) -> dict[int, fx.Node]:
    """The input of each region that is to wait in host memory, which is made meanwhile."""
    memory = _memory(gm)
    leaving = inputs_that_leave(regions, lambda n: {m for s in storages(n, gm) for m in memory[s]})
    checkpoint_offload.make_host_memory([n.meta["example_value"] for n in leaving.values()])
    return leaving


def _prepared(gm: fx.GraphModule, context: TracingContext | None) -> list[tuple[CompileRegion, fx.GraphModule | None, int]]:
    """Each part, a module of it if it is the first of its kind, and the number of that first. Nothing if the graph is to stay
    whole, as it does if anything here goes wrong.
    """
    if context is None or context.fake_mode is None or context.fakify_first_call:
        return []
    try:
        bodies = Bodies()
        found = [(part, part.graph()) for part in split_repeated_regions(gm, bodies)]
        keys = [(graph_key(graph, gm, bodies), tuple(tensor_key(n) for n in part.inputs)) for part, graph in found]
        first: dict[Hashable, int] = {}
        same = [first.setdefault(k, i) for i, k in enumerate(keys)]
        return [(part, fx.GraphModule(gm, graph) if same[i] == i else None, same[i]) for i, (part, graph) in enumerate(found)]
    except Exception as e:
        why = f"{type(e).__name__}: {e}".split("\n")[0]
        warn_once(f"equal layers are compiled one by one, because the graph cannot be cut: {why}. Please report this")
        return []


# ---------------------------------------------------------------- where to cut


def split_repeated_regions(gm: fx.GraphModule, bodies: Bodies) -> list[CompileRegion]:
    """The graph, cut where it repeats itself; nothing where it does not, or must stay whole."""
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    symbols = _symbols(gm)
    if symbols is None or not (cuts := _cuts(calls, gm, bodies)):
        return []
    pieces = [calls[a:b] for a, b in pairwise([0, *cuts, len(calls)]) if a < b]
    made_in = {n: i for i, piece in enumerate(pieces) for n in piece}
    blocks = list(accumulate(pieces, lambda entered, piece: _open_blocks(piece, entered), initial=[]))
    memory = _memory(gm)
    if any(made_in.get(n) != i for i, piece in enumerate(pieces) for n in _written(piece, gm, memory)):
        return []
    found = []
    for i, piece in enumerate(pieces):
        before = dict.fromkeys(a for n in piece for a in n.all_input_nodes if a.op == "get_attr" and made_in[a] != i)
        piece = [*before, *piece]  # a body that was named before the cut
        inputs = dict.fromkeys(
            a for n in piece for a in n.all_input_nodes if a not in before and made_in.get(a) != i and a not in blocks[i]
        )
        read = {s for n in (*inputs, *piece) for s in _free_symbols(n)}
        sizes = dict.fromkeys(node for s, node in symbols.items() if s in read)  # in an order that caches know again
        outputs = [n for n in piece if _crosses(n) and any(made_in.get(u) != i for u in n.users)]
        found.append(CompileRegion(piece, list(sizes | inputs), outputs, blocks[i], blocks[i + 1]))
    return found


def _cuts(calls: list[fx.Node], gm: fx.GraphModule, bodies: Bodies) -> list[int]:
    """Before which calls the graph is cut: at the same place of each repetition, where the least crosses. Of equally many tensors
    those of fewest dimensions: what attention gives by heads is laid out as its kernel likes, and its gradient would be copied.
    """
    numbers: dict[Hashable, int] = {}
    labels = [numbers.setdefault(call_key(n, gm, bodies), len(numbers)) for n in calls]
    weights = [_weight(n, gm) for n in calls]
    first, period, length = longest_repetition(labels, weights)
    if sum(weights[first : first + period]) < CALLS or not length or (allowed := _allowed(calls)) is None:
        return []
    order = {n: i for i, n in enumerate(calls)}
    values = {n: n.meta.get("example_value") for n in calls}
    plain = {n: _is_plain(x) for n, x in values.items()}
    dimensions = {n: x.dim() if isinstance(x, torch.Tensor) else 0 for n, x in values.items()}
    crossing: list[list[fx.Node]] = [[] for _ in range(len(calls) + 1)]
    for n, i in order.items():
        last_read = max((order.get(u, len(calls)) for u in n.users), default=i)
        for at in range(i + 1, last_read + 1) if _crosses(n) else ():
            crossing[at].append(n)
    best: tuple[int, int, int] | None = None
    cuts: list[int] = []
    for start in range(first, first + period):
        places = range(start, first + length + period + 1, period)
        if len(places) <= REPETITIONS or not all(allowed[at] and all(plain[n] for n in crossing[at]) for at in places):
            continue
        cost = (
            max(len(crossing[at]) for at in places),
            max(sum(dimensions[n] for n in crossing[at]) for at in places),
            -len(places),
        )
        if best is None or cost < best:
            best, cuts = cost, list(places)
    return cuts


def _is_plain(x: Any) -> bool:
    """May it cross a cut: can it be brought into the strides that are expected behind it?"""
    if not isinstance(x, torch.Tensor):
        return isinstance(x, torch.SymInt)
    return not is_traceable_wrapper_subclass(x) and (not _symbolic(x) or _order(x) is not None)


def longest_repetition(labels: Sequence[int], weights: Sequence[int]) -> tuple[int, int, int]:
    """(first, period, length): labels[i] = labels[i + period] for first ≤ i < first + length, at least as often as `REPETITIONS`
    says and of the greatest weight; where weights are equal, of the shortest period.
    """
    places: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        places.setdefault(label, []).append(i)
    gaps = Counter(b - a for each in places.values() for a, b in pairwise(each))
    until = [0, *accumulate(weights)]
    found, greatest = (0, 1, 0), 0
    for period in sorted(gap for gap, _ in gaps.most_common(PERIODS)):
        first = 0
        for i in range(len(labels) - period + 1):
            if i == len(labels) - period or labels[i] != labels[i + period]:
                if i - first >= (REPETITIONS - 1) * period and until[i] - until[first] > greatest:
                    found, greatest = (first, period, i - first), until[i] - until[first]
                first = i + 1
    return found


def _allowed(calls: list[fx.Node]) -> list[bool] | None:
    """May the graph be cut before each call, and behind the last? Not inside of a block (of inference mode, of a transform of
    torch.func; what is cut inside of autocast enters it itself), or of another grad mode. None if it holds calls that leave
    another state behind.
    """
    ambient = torch.is_grad_enabled()
    grad, blocks, allowed = ambient, 0, []
    for n in calls:
        allowed.append(blocks == 0 and grad == ambient)
        name = getattr(n.target, "__name__", "")
        if n.target in (enter_autocast, exit_autocast):
            continue
        if name.startswith("_enter_") or name.endswith("_increment_nesting"):
            blocks += 1
        elif name.startswith("_exit_") or name.endswith("_decrement_nesting"):
            blocks -= 1
        elif n.target is set_grad_enabled:
            grad = n.args[0]
        elif n.op == "call_function" and n.is_impure() and not may_write(n):
            return None
    return [*allowed, blocks == 0 and grad == ambient]


def _crosses(n: fx.Node) -> bool:
    """May what it gives be handed from part to part? Attributes and blocks of autocast each part has by itself."""
    return n.op != "get_attr" and n.target is not enter_autocast


def _open_blocks(calls: Iterable[fx.Node], entered: list[fx.Node]) -> list[fx.Node]:
    """The blocks of autocast that are open behind these calls, where those of `entered` are before them."""
    blocks = list(entered)
    for n in calls:
        if n.target is enter_autocast:
            blocks.append(n)
        elif n.target is exit_autocast:
            blocks.remove(n.args[0])
    return blocks


def _memory(gm: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """What lies in each memory of the graph."""
    found: dict[int, list[fx.Node]] = {}
    for n in gm.graph.nodes:
        for s in storages(n, gm):
            found.setdefault(s, []).append(n)
    return found


def _written(calls: Iterable[fx.Node], gm: fx.GraphModule, memory: dict[int, list[fx.Node]]) -> list[fx.Node]:
    """Those of the graph in whose memory some of `calls` may write."""
    own: set[int] = set()
    for n in calls:
        bodies = [body for a in n.all_input_nodes if (body := body_of(a, gm)) is not None]
        inside = any(m.op == "placeholder" for body in bodies for m in _written(body.graph.nodes, body, _memory(body)))
        own.update(s for a in (n.all_input_nodes if inside else may_be_written(n)) for s in storages(a, gm))
    return [n for s in own for n in memory[s]]


def _weight(n: fx.Node, gm: fx.GraphModule) -> int:
    """How many calls it stands for."""
    body = body_of(n, gm)
    return 1 if body is None else sum(_weight(m, body) for m in body.graph.nodes)


# ---------------------------------------------------------------- symbols, examples


def _symbols(gm: fx.GraphModule) -> dict[Any, fx.Node] | None:
    """The inputs that hold the sizes that are symbols. None where not all of them are inputs: parts need them as theirs."""
    found = {}
    for n in gm.graph.find_nodes(op="placeholder"):
        value = n.meta.get("example_value")
        if isinstance(value, Symbol) and value.node.expr.is_Symbol:
            found[value.node.expr] = n
    return found if all(s in found for n in gm.graph.nodes for s in _free_symbols(n)) else None


def _free_symbols(n: fx.Node) -> set:
    value = n.meta.get("example_value")
    numbers = [value, *(s for t in tensors(value) for s in (*t.shape, *t.stride()))]
    return {s for number in numbers if isinstance(number, torch.SymInt) for s in number.node.expr.free_symbols}


def _fake(n: fx.Node, mode: FakeTensorMode) -> Any:
    """A tensor like the node's, in the mode of what is compiled."""
    t = n.meta["example_value"]
    if not isinstance(t, torch.Tensor):
        return t
    with mode:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device, requires_grad=t.requires_grad)


# ---------------------------------------------------------------- run


class RegionSequence:
    """One part after the other. What no later one reads is let go; what is in `leaving`, by the number of its part, waits in host
    memory for the backward pass.
    """

    def __init__(self, gm: fx.GraphModule, run: list[tuple[Compiled, CompileRegion]], leaving: dict[int, fx.Node]):
        place = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        inputs = len(place)
        for n in (n for _, part in run for n in part.outputs):
            place[n] = len(place)
        self.made = len(place) - inputs
        (returned,) = gm.graph.output_node().args
        self.returned = [(place[x], None) if isinstance(x, fx.Node) else (None, x) for x in returned]
        last = {n: i for i, (_, part) in enumerate(run) for n in part.inputs}
        last |= dict.fromkeys((x for x in returned if isinstance(x, fx.Node)), len(run))
        self.offloads = bool(leaving)
        self.steps = []
        for i, (compiled, part) in enumerate(run):
            done = [place[n] for n in part.inputs if last[n] == i]
            written = [(place[n], _layout(n.meta["example_value"])) for n in part.outputs]
            leaves = part.inputs.index(leaving[i]) if i in leaving else None
            self.steps.append((compiled, [place[n] for n in part.inputs], done, written, leaves))

    def __call__(self, *args: Any) -> tuple:
        values = [*args, *[None] * self.made]
        copies = HostCopies() if self.offloads and torch.is_grad_enabled() else None
        for compiled, read, done, written, leaves in self.steps:
            given = [values[i] for i in read]
            for i in done:
                values[i] = None
            results = compiled(*given)
            if copies is not None and leaves is not None:
                copies.take(given[leaves], results)
            del given
            for (i, layout), value in zip(written, results, strict=True):
                values[i] = value if layout is None else _laid_out(value, layout(value))
        if copies is not None:
            copies.close()
        return tuple([x if i is None else values[i] for i, x in self.returned])


Strides = list[tuple[int, int]]  # of dimensions where they mean something


def _layout(x: Any) -> Callable[[torch.Tensor], Strides] | None:
    """The strides that later parts were compiled for, of the tensor that is there in the place of `x`. None for numbers."""
    if not isinstance(x, torch.Tensor):
        return None
    if not _symbolic(x):
        fixed = [(d, x.stride(d)) for d in range(x.dim()) if x.shape[d] > 1]
        return lambda _: fixed
    if (order := _order(x)) is None:  # a result of the graph
        return None
    return lambda t: [(d, math.prod(t.size(inner) for inner in order[:i])) for i, d in enumerate(order) if t.size(d) > 1]


def _symbolic(x: torch.Tensor) -> bool:
    return any(isinstance(s, Symbol) for s in (*x.shape, *x.stride()))


def _order(x: torch.Tensor) -> list[int] | None:
    """The dimensions of a tensor with symbolic sizes, innermost first. None if it is not dense, or if that is not known."""
    numbers = [
        (s.node.expr, s.node.has_hint() and s.node.hint) if isinstance(s, Symbol) else (sympy.Integer(s), s)
        for s in (*x.stride(), *x.shape)
    ]
    if any(hint is False for _, hint in numbers):
        return None
    stride, size = numbers[: x.dim()], [s for s, _ in numbers[x.dim() :]]
    inner, order = sympy.Integer(1), sorted(range(x.dim()), key=lambda d: (stride[d][1], size[d] != 1))
    for d in order:
        if size[d] != 1 and sympy.expand(stride[d][0] - inner) != 0:
            return None
        inner *= size[d]
    return order


def _laid_out(x: torch.Tensor, strides: Strides) -> torch.Tensor:
    if all(x.stride(d) == stride for d, stride in strides):
        return x
    wanted = dict(strides)
    stride = [wanted.get(d, 1) for d in range(x.dim())]
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)
