"""What the tests of pattern entries share: inputs from an entry's description, its operator as a function, graphs, mutants."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import make, wide
from functorch.compile import min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from sloth.rewriter.backend import sloth
from sloth.rewriter.graph.value import Meta
from sloth.rewriter.match.matcher import Match
from sloth.rewriter.match.pattern import Pattern, Variant
from sloth.rewriter.match.registry import patterns
from sloth.rewriter.plan import legality
from sloth.rewriter.report import MATCHED, GraphReport, Site

NUMBERS = {
    "eps": 1e-5,
    "ignore_index": -100,
    "label_smoothing": 0.1,
    "up_scale": 0.25,
}  # by name; others get a value that fits any scale or cap
# What must be computed in the graph is no input that could be drawn: a 4-bit weight, a mask. They have test files of their own.
ENTRIES = [
    entry
    for entry in patterns()
    if entry.name not in ("linear_4bit", "attention", "attention_by_mask", "eager_attention", "eager_attention_by_mask")
]
VARIANTS = [variant for entry in ENTRIES for variant in entry.variants]


def numbers(variant: Variant, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A value for each number that the reference takes; dtypes are `dtype`."""
    values = {float: lambda i: 0.75 + i, int: lambda i: 3 + i, torch.dtype: lambda i: dtype}
    fixed = NUMBERS | {"loss_dtype": torch.promote_types(dtype, torch.float32)}
    return {n: fixed.get(n, values[t](i)) for i, (n, t) in enumerate(variant.numbers.items())}


POSITIVE = {"class_weight"}  # a sum of them is divided by


def random_tensor(name: str, meta: Meta, variant: Variant, seed: int, layout: str = "contiguous", below: int = 2) -> torch.Tensor:
    """A tensor like `meta`; integers lie in [0, below), and every third is what the variant is told to ignore."""
    if meta.dtype.is_floating_point:
        drawn = make(meta.shape, meta.dtype, layout, seed)
        return drawn.abs() + 0.1 if name in POSITIVE else drawn
    if not meta.shape:
        return torch.tensor(below + 1)  # a number of items, never 0
    drawn = torch.randint(0, below, meta.shape, generator=torch.Generator().manual_seed(seed))
    ignored = numbers(variant).get("ignore_index")
    return drawn if ignored is None else drawn.where(torch.arange(drawn.numel()).view(drawn.shape) % 3 != 1, ignored)


def sample(variant: Variant, dtype: torch.dtype, grad: bool = True) -> list[torch.Tensor]:
    """Leaf tensors from the variant's description; those the operator gives no gradient to need none."""
    metas = zip(variant.tensors, variant.sample_metas(dtype), strict=True)
    out = [random_tensor(name, m, variant, 64 * i + 1) for i, (name, m) in enumerate(metas)]
    for name, t in zip(variant.tensors, out, strict=True):
        t.requires_grad_(grad and t.is_floating_point() and name not in variant.pattern.no_grad)
    return out


class Exactly(TorchFunctionMode):
    """Run reference code in the precision of its inputs: `.float()` of fp64 stays fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return wide(args[0]) if func is torch.Tensor.float else func(*args, **(kwargs or {}))


def reference(variant: Variant) -> Callable[..., Any]:
    """The reference as a function of its tensors, exact for fp64."""

    def function(*tensors: torch.Tensor) -> Any:
        with Exactly():
            return variant.reference(*tensors, **numbers(variant, tensors[0].dtype))

    return function


def made_match(variant: Variant, tensors: list[torch.Tensor]) -> Match:
    """The match of the variant with its own reference on tensors like these."""
    found = numbers(variant, tensors[0].dtype)
    graph = variant.graph([Meta.of(t) for t in tensors], found, FakeTensorMode())
    return Match(variant, graph.inputs, found, graph.roots, frozenset())


def accepts(match: Match) -> bool:
    """Would the rewriter take the entry's operator for these operands?"""
    try:
        legality.results(match, legality.Ground(None, FakeTensorMode()))
        for condition in match.pattern.checks:
            condition(match)
    except legality.Refused:
        return False
    return True


def arguments(variant: Variant, tensors: list[torch.Tensor]) -> tuple:
    """What the rewritten graph passes to the operator."""
    match = made_match(variant, tensors)
    given = dict(zip(match.tensors.values(), tensors, strict=True))
    return legality.call_arguments([match], given.__getitem__)


def operator_of(variant: Variant) -> Callable[..., Any]:
    """The entry's operator as a function of the reference's tensors, with as many results as the reference has."""

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(made_match(variant, list(tensors)).roots)
        return outputs(variant.pattern.op(*arguments(variant, list(tensors))))[:count]

    return function


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def cotangents(out: tuple[torch.Tensor, ...], salt: int = 0) -> list[torch.Tensor]:
    """A gradient for each output, scalars included."""
    return [make((*t.shape, 1), t.dtype, seed=(1 << 20) + salt + i)[..., 0] for i, t in enumerate(out)]


def expression(variant: Variant, dtype: torch.dtype) -> str:
    """The variant's normal form in this dtype, to tell whether two variants are the same mathematics there."""
    graph = variant.graph(variant.sample_metas(dtype), numbers(variant, dtype), FakeTensorMode())
    names = {v: n for n, v in graph.inputs.items()}

    def show(a: Any) -> str:
        if isinstance(a, tuple):
            return f"({', '.join(map(show, a))})"
        return names.get(a) or f"{a.op}{show(a.args)}" if hasattr(a, "op") else str(a)

    return show(graph.roots)


def sites(reports: list[GraphReport], entry: Pattern) -> tuple[list[Site], list[Site]]:
    """Sites of the entry's construct: matched, missed."""
    own = [s for r in reports for s in r.sites if s.construct == entry.construct.name]
    return [s for s in own if s.status == MATCHED], [s for s in own if s.status != MATCHED]


# ---------------------------------------------------------------- captured graphs


def captured(variant: Variant, dtype: torch.dtype) -> fx.GraphModule:
    """The reference as Dynamo traces it, its inputs in the order of the reference's parameters."""
    found: list[tuple[fx.GraphModule, list]] = []

    def keep(gm: fx.GraphModule, inputs: list) -> Callable:
        found.append((gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    tensors = sample(variant, dtype)
    torch.compile(lambda *t: variant.reference(*t, **numbers(variant, dtype)), backend=keep, dynamic=False)(*tensors)
    ((gm, inputs),) = found
    place = {n: next(i for i, t in enumerate(tensors) if t is x) for n, x in zip(_placeholders(gm), inputs, strict=True)}
    for n in sorted(place, key=place.__getitem__, reverse=True):
        next(iter(gm.graph.nodes)).prepend(n)
    gm.recompile()
    return gm


def compiled_graphs(model: Callable, train: Callable[[Callable], None]) -> list[fx.Graph]:
    """What AOTAutograd makes of the rewritten graphs of one `train(compiled model)`, forward before backward."""
    graphs = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable:
        graphs.append(gm.graph)
        return gm.forward

    inner = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)

    def backend(gm: fx.GraphModule, inputs: list) -> Callable:
        sloth(gm, inputs, options={"sloth.inner_backend": "eager"})
        return inner(gm, inputs)

    torch._dynamo.reset()
    train(torch.compile(model, backend=backend))
    return graphs


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


class _Examples(fx.Interpreter):
    """Runs a graph on fake tensors and notes what each node gives, as Dynamo would have."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = value = super().run_node(n)
        return value


def described(gm: fx.GraphModule, tensors: list[torch.Tensor]) -> bool:
    """Give the nodes of an edited graph their example values; False where it does not run."""
    grad = torch.is_grad_enabled()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
    try:
        with mode:
            _Examples(gm).run(*fakes)
    except Exception:
        return False
    finally:
        torch.set_grad_enabled(grad)
    return all(isinstance(t, FakeTensor) for t in outputs(gm.graph.output_node().meta["example_value"]))


def doubled(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph in fp64: what its result would be without rounding."""
    gm = copy.deepcopy(gm)
    for n in gm.graph.nodes:
        if n.op == "call_method" and n.target in ("float", "half"):
            n.target = "double"
        change = lambda a: torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a  # noqa: E731
        n.args, n.kwargs = fx.node.map_aggregate(n.args, change), fx.node.map_aggregate(n.kwargs, change)
    gm.recompile()
    return gm


# ---------------------------------------------------------------- mutants

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
Edit = tuple[str, Callable[[fx.Graph, fx.Node], None]]


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
    users = list(m.users)
    m.replace_all_uses_with(m.args[0])
    for u in users:
        if u.op != "output":
            _behind(g, u, lambda u=u: g.call_method(m.target, (u, *m.args[1:]), m.kwargs))


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
    yield "result too", lambda g, m: g.output_node().update_arg(0, (*g.output_node().args[0], m))

    def written(g: fx.Graph, m: fx.Node) -> None:
        with g.inserting_after(m):
            g.call_method("mul_", (m, 1.5))

    def without_gradient(g: fx.Graph, m: fx.Node) -> None:
        with g.inserting_before(m):
            g.call_function(torch._C._set_grad_enabled, (False,))
        with g.inserting_after(m):
            g.call_function(torch._C._set_grad_enabled, (True,))

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
    gm.graph.eliminate_dead_code(lambda m: m.is_impure() or m.target == "mul_" or m.target is torch._C._set_grad_enabled)
    gm.graph.lint()
    gm.recompile()
    return gm


def _moved(a: Any, graph: fx.Graph) -> Any:
    """Nodes of the original as those of the copy."""
    names = {n.name: n for n in graph.nodes}
    return fx.node.map_aggregate(a, lambda x: names[x.name] if isinstance(x, fx.Node) else x)


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
