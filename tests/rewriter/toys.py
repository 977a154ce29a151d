"""What the rewriter's tests share: small models, their capture, and the comparison of compiled with eager training."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from inner import OPTIONS as QUICK
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sloth.rewriter.backend import listening
from sloth.rewriter.graph.lower import LoweredGraph, lower
from sloth.rewriter.graph.normal_form import Normal
from sloth.rewriter.graph.record import trace
from sloth.rewriter.graph.value import Meta, Value, ValueGraph
from sloth.rewriter.match.registry import constructs, patterns
from sloth.rewriter.pipeline import rewrite
from sloth.rewriter.report import MATCHED, Report, Site

# ---------------------------------------------------------------- graphs


def rewritten_graph(fn: Callable, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> fx.GraphModule:
    """The graph that becomes of it, with all entries of the registry."""
    kept = []

    def sloth(gm: fx.GraphModule, _: Any) -> Callable:
        report = rewrite(gm, patterns(), constructs())
        assert not report.untouched, report.untouched
        kept.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=sloth, dynamic=dynamic)(*args, **kwargs)
    return kept[0]


# ---------------------------------------------------------------- models


def llama_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def tables(batch: int, seq: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, D]."""
    angle = torch.outer(torch.arange(seq), 10000 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2).expand(batch, 1, seq, dim)
    return angle.cos(), angle.sin()


class Norm(nn.Module):
    def __init__(self, d: int = 8, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return llama_norm(x, self.weight, self.eps)


class Layer(nn.Module):
    """norm → q, k with rotation → residual → norm → gated MLP → residual."""

    def __init__(self, d: int = 8, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(d), Norm(d)
        self.q, self.k, self.gate, self.up, self.down = (nn.Linear(d, d, bias=False) for _ in range(5))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k = (p(h).view(*h.shape[:-1], self.heads, -1).transpose(1, 2) for p in (self.q, self.k))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        x = x + F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """`layers` of these, the tables shared by all."""

    def __init__(self, layers: int = 2, d: int = 8, heads: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(Layer(d, heads) for _ in range(layers))
        self.d = d // heads

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = tables(x.shape[0], x.shape[1], self.d)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x.pow(2).mean()


class Call(nn.Module):
    """A function of an input and of parameters w, v [d]."""

    def __init__(self, fn: Callable[..., Any], d: int = 8):
        super().__init__()
        self.w, self.v = nn.Parameter(1 + 0.1 * torch.randn(d)), nn.Parameter(1 + 0.1 * torch.randn(d))
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(self, *args)


# ---------------------------------------------------------------- capture


def normalise(shadow: ValueGraph, fn: Callable[..., Any], inputs: list[Value], mode: FakeTensorMode | None = None) -> Any:
    """The normal form of `fn(*inputs)`."""
    return Normal(shadow).replay(trace(fn, [v.meta for v in inputs], mode or FakeTensorMode()), inputs)


def inputs_like(shadow: ValueGraph, tensors: list[Tensor]) -> list[Value]:
    return [shadow.add("input", (f"x{i}",), Meta.of(t, t.requires_grad)) for i, t in enumerate(tensors)]


def captured(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[LoweredGraph]:
    """The lowered graphs of the one graph that Dynamo traces for `fn(*args)`."""
    found: list[LoweredGraph] = []

    def look(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.extend(lower(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=look, fullgraph=True, **kwargs)(*args)
    return found


# ---------------------------------------------------------------- training


def compiled(model: Callable[..., Any], options: dict[str, Any] | None = None, **kwargs: Any) -> Callable[..., Any]:
    """Compiled by sloth, without Inductor."""
    torch._dynamo.reset()
    return torch.compile(model, backend="sloth", options=QUICK | (options or {}), **kwargs)


def tensors_in(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for x in out:
            yield from tensors_in(x)


def cloned(args: tuple) -> tuple:
    return tuple(a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args)


def outcome(model: nn.Module, run: Callable[..., Any], args: tuple) -> dict[str, Tensor | None]:
    """Outputs, gradients of parameters and of inputs, and the inputs and buffers afterwards, of one training step."""
    model.zero_grad()
    torch.manual_seed(0)
    out = list(tensors_in(run(*args)))
    wanting = [o for o in out if o.requires_grad]
    if wanting:
        # weights that are not all alike, so that a sum over a normalised axis keeps its gradient
        sum((o.double() * torch.linspace(1, 2, o.numel()).view(o.shape)).sum() for o in wanting).backward()
    found: dict[str, Tensor | None] = {f"output {i}": o.detach() for i, o in enumerate(out)}
    found |= {f"output {i} requires grad": torch.tensor(o.requires_grad) for i, o in enumerate(out)}
    found |= {f"grad of {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    found |= {f"grad of input {i}": a.grad for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}
    return found | {f"input {i}": a.detach() for i, a in enumerate(args) if isinstance(a, Tensor)}


def same(ours: dict[str, Tensor | None], eager: dict[str, Tensor | None], tolerance: float = 1e-4) -> None:
    assert ours.keys() == eager.keys()
    for name, theirs in eager.items():
        if theirs is None:
            assert ours[name] is None, f"{name}: eager has none"
        else:
            assert ours[name] is not None, f"{name}: missing"
            close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
            torch.testing.assert_close(ours[name], theirs, **close, msg=lambda m, name=name: f"{name}: {m}")


def checked(
    model: nn.Module, *args: Any, options: dict[str, Any] | None = None, tolerance: float = 1e-4, **kwargs: Any
) -> Report:
    """Compile and train for one step: outputs and every gradient must be those of eager. What was rewritten."""
    theirs = copy.deepcopy(model)
    eager = outcome(theirs, theirs, cloned(args))
    with listening() as graphs:
        ours = outcome(model, compiled(model, options, **kwargs), cloned(args))
    same(ours, eager, tolerance)
    return Report(graphs)


def counts(report: Report) -> dict[str, str]:
    """construct → "matched/expected"."""
    return {c: f"{n['matched']}/{n['expected']}" for c, n in report.constructs.items()}


def matched(report: Report) -> Counter[str]:
    return Counter(s.variant.split("[")[0] for s in report.sites if s.status == MATCHED)


def missed(report: Report) -> list[Site]:
    return [s for s in report.sites if s.status != MATCHED]
