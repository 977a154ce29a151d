"""Cut-out code run: as it is, and in fp64 as the judge of both.

fp64 is the same code with each floating-point tensor and each dtype that it names in fp64. What is no operator of ATen's is
called in the dtypes that it was traced with, and its result counts as exact: weights that are kept in 4 bits are the same
constants to all. An operator of others that computes with activations says here what it is (`exact`), or its rewrites are not
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sloth.compat.dispatch import HigherOrderOperator, OpOverload, TorchDispatchMode, pytree
from sloth.rewriter.graph.ambient import OFF, under
from sloth.rewriter.graph.lower import PLAIN
from sloth.rewriter.graph.value import Region

NARROW = (torch.float32, torch.bfloat16, torch.float16)
WIDE = dict.fromkeys(NARROW, torch.float64) | {torch.complex64: torch.complex128}
TRACED = "_sloth_traced"  # on a tensor that is fp64 for this dtype
OWN = ("aten", "prims", "prim")
_EXACT: dict[str, Callable[..., Any]] = {}


class NotExact(Exception):
    """Code that fp64 cannot be asked of; the message says why."""


def exact(operator: str) -> Callable[[Callable], Callable]:
    """Enter what an operator ("namespace::name") that takes no fp64 computes, as ATen operations on fp64. The function gets the
    operator's arguments, and of one of others as `traced` the dtype that the first of them has outside of fp64.
    """

    def enter(function: Callable) -> Callable:
        _EXACT[operator] = function
        return function

    return enter


@exact("aten::_grouped_mm")
def grouped_products(a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
    """Of experts: the products of a's and b's parts that end at `offs`."""
    if offs is None:
        return a @ b
    ends = offs.tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    if a.dim() == b.dim() == 2:  # [M, T] · [T, N], a gradient of weights
        return torch.stack([a[:, p] @ b[p] for p in parts])
    if a.dim() == 2:  # [T, K] · [E, K, N]
        made = a.new_zeros(a.shape[0], b.shape[-1])
        for p, w in zip(parts, b, strict=True):
            made[p] = a[p] @ w
        return made
    made = b.new_zeros(a.shape[1], b.shape[-1])
    for p, w in zip(parts, a, strict=True):
        made[:, p] = w @ b[:, p]
    return made


def widened(x: Any) -> Any:
    """fp64 in place of a narrower floating-point tensor."""
    return x.to(WIDE[x.dtype]) if isinstance(x, torch.Tensor) and x.dtype in WIDE else x


class Exactly(TorchDispatchMode):
    """Whatever is computed is computed in fp64. `as_it_is`: the operators of others that were called in their own dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.as_it_is: set[str] = set()
        self.narrowing = False

    def __enter__(self) -> Exactly:
        self.stack = ExitStack()
        self.stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        self.stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # other threads would not be in this mode
        self.stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # a fused one takes weights of 1 for those of all keys alike
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.narrowing:
            return func(*args, **kwargs)
        if func.namespace not in OWN:
            return self.foreign(func, args, kwargs)
        if func is torch.ops.aten.view.dtype:
            raise NotExact("it reads the bits of a number")
        asked = kwargs.get("dtype") if func is torch.ops.aten._to_copy.default else None
        args, kwargs = pytree.tree_map(lambda a: WIDE.get(a, a) if isinstance(a, torch.dtype) else a, (args, kwargs))
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.dtype in WIDE for t in tensors) and any(t.dtype == torch.float64 for t in tensors):
            written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
            names = [a.name for a in func._schema.arguments]
            args = tuple(a if n in written else pytree.tree_map(widened, a) for n, a in zip(names, args, strict=False))
            kwargs = {n: a if n in written else pytree.tree_map(widened, a) for n, a in kwargs.items()}
        if func._schema.name in _EXACT:
            return _EXACT[func._schema.name](*args, **kwargs)
        out = func(*args, **kwargs)
        if asked is not None and isinstance(out, torch.Tensor):
            vars(out)[TRACED] = asked
        return out

    def as_traced(self, x: Any, n: fx.Node) -> Any:
        """In the dtype that the node was traced in."""
        traced = n.meta.get("example_value")
        if not isinstance(x, torch.Tensor) or not isinstance(traced, torch.Tensor):
            return x
        self.narrowing = True
        try:
            return x.to(traced.dtype)
        finally:
            self.narrowing = False

    def foreign(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in pytree.tree_leaves((args, kwargs))):
            traced = vars(args[0]).get(TRACED) if args and isinstance(args[0], torch.Tensor) else None
            if name in _EXACT and traced is not None:
                return _EXACT[name](*args, **kwargs, traced=traced)
            raise NotExact(f"{name} does not compute in fp64")
        self.as_it_is.add(name)
        return func(*args, **kwargs)


class Run(fx.Interpreter):
    """A graph with its bodies, each node in the region that it was traced in."""

    def __init__(self, gm: fx.GraphModule, regions: dict[fx.Node, Region] | None = None):
        super().__init__(gm)
        self.regions = regions or {}
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        region = self.regions.get(n)
        if region is None:
            return super().run_node(n)
        with torch.set_grad_enabled(region.grad), under(self.autocast(region)):
            return super().run_node(n)

    def autocast(self, region: Region) -> Any:
        return region.autocast

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not isinstance(target, HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        if target.name() in PLAIN:
            return self.body(args[0])(*args[1:])
        if target.name() == "invoke_subgraph":
            return self.body(args[0])(*args[2:])
        if target.name() == "autograd_function_apply":
            args = tuple(_wrapped(a, self.body(a)) if isinstance(a, fx.GraphModule) else a for a in args)
            return super().call_function(target, args, kwargs)
        return self.other(target, args, kwargs)

    def call_method(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target == "item" and isinstance(args[0], int | float):  # bodies of checkpoints ask so of floats that they are given
            return args[0]
        return super().call_method(target, args, kwargs)

    def other(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, args, kwargs)

    def body(self, gm: fx.GraphModule) -> Callable[..., Any]:
        return type(self)(gm).run


class RunExactly(Run):
    """In fp64, under this mode: inputs are given as fp64."""

    def __init__(self, gm: fx.GraphModule, regions: dict[fx.Node, Region], mode: Exactly):
        super().__init__(gm, regions)
        self.mode = mode

    def autocast(self, region: Region) -> Any:
        return OFF

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or not isinstance(n.target, OpOverload) or n.target.namespace in OWN:
            return super().run_node(n)
        if n.target._schema.name in _EXACT:
            vars(self.env[n.args[0]])[TRACED] = n.args[0].meta["example_value"].dtype
            return super().run_node(n)
        given = fx.node.map_arg((n.args, n.kwargs), lambda a: self.mode.as_traced(self.env[a], a))
        return pytree.tree_map(widened, n.target(*given[0], **given[1]))

    def other(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotExact(f"{target.name()} holds code that is not run in fp64")

    def body(self, gm: fx.GraphModule) -> Callable[..., Any]:
        return RunExactly(gm, {}, self.mode).run


def _wrapped(gm: fx.GraphModule, run: Callable[..., Any]) -> fx.GraphModule:
    """A graph of one call, for higher-order operators that want graphs."""
    graph = fx.Graph()
    given = [graph.placeholder(f"input_{i}") for i, _ in enumerate(gm.graph.find_nodes(op="placeholder"))]
    graph.output(graph.call_function(run, tuple(given)))
    return fx.GraphModule({}, graph)


Found = tuple[list[Any], list[torch.Tensor | None], list[bool]]  # results, gradients, which results require a gradient


def evaluate(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    grads: Sequence[bool],
    are_leaves: Sequence[bool],
    cotangents: Sequence[Any],
    grad: bool = True,
) -> Found:
    """Results, and gradients at fresh leaves with the values and strides of `inputs`. are_leaves: which of these eager has as
    leaves; autocast casts a leaf once for all its readers, whose gradients are then added up in the narrow dtype. cotangents: of
    the results, None where they are no floating-point tensors.
    """
    leaves = [x.detach().requires_grad_(g) if isinstance(x, torch.Tensor) else x for x, g in zip(inputs, grads, strict=True)]
    with torch.set_grad_enabled(grad):
        given = zip(leaves, grads, are_leaves, strict=True)
        out = list(function(*(x.view_as(x) if g and not leaf else x for x, g, leaf in given)))
    used = [(o, d) for o, d in zip(out, cotangents, strict=True) if isinstance(o, torch.Tensor) and o.requires_grad]
    wanted = [x for x, g in zip(leaves, grads, strict=True) if g]
    found: Iterator[torch.Tensor | None] = iter(())
    if used and wanted:
        roots, given = zip(*used, strict=True)
        found = iter(torch.autograd.grad(roots, wanted, given, allow_unused=True))
    gradients = [next(found, None) if g else None for g in grads]
    required = [isinstance(o, torch.Tensor) and o.requires_grad for o in out]
    return [o.detach() if isinstance(o, torch.Tensor) else o for o in out], gradients, required


@contextmanager
def same_random_numbers(seed: int = 0) -> Iterator[None]:
    """The block draws the same numbers each time, and leaves the generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
