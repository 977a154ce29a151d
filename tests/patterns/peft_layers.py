"""What the tests of adapters share: PEFT over dense and bitsandbytes layers, and one training step of it, eager and compiled."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from common import DEVICE
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from sloth.rewriter import backend
from sloth.rewriter.report import MATCHED, GraphReport

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

BF16, FP32 = torch.bfloat16, torch.float32
FOUR_BIT = {"nf4": ("nf4", True), "nf4-single": ("nf4", False), "fp4": ("fp4", True)}
BASES = ("dense", *FOUR_BIT, "int8")
K = 128
INT8 = "lora[linear]" if DEVICE == "cpu" else "adapter[lora]"  # on a CPU the layer is a dequantisation and a product


def base_layer(kind: str, k: int, n: int, dtype: torch.dtype, bias: bool = False) -> nn.Module:
    if kind == "dense":
        return nn.Linear(k, n, bias, dtype=dtype)
    if kind == "int8":
        return bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=6.0)
    quant_type, double = FOUR_BIT[kind]
    return bnb.nn.Linear4bit(k, n, bias, compute_dtype=dtype, compress_statistics=double, quant_type=quant_type)


class Attention(nn.Module):
    """Three layers that share x and one behind them."""

    def __init__(self, kind: str = "dense", dtype: torch.dtype = FP32, bias: bool = False, checkpointed: bool = False):
        super().__init__()
        sizes = {"q": (K, 64), "k": (K, 64), "v": (K, 64), "o": (64, K)}
        for name, (k, n) in sizes.items():
            self.add_module(name, base_layer(kind, k, n, dtype, bias).to(dtype))  # before it is quantised
        self.head = nn.Linear(K, 8, dtype=FP32 if kind != "dense" else dtype)
        self.checkpointed = checkpointed

    def attend(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x)
        return self.head(y.to(self.head.weight.dtype))


def adapted(model: nn.Module, *configs: dict[str, Any], fp32: bool = False) -> nn.Module:
    """The model frozen, moved to its device (which quantises), an adapter for each of `configs`, B not zero as PEFT leaves it."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.requires_grad_(False)
    model.to(DEVICE)
    for i, how in enumerate(configs):
        how = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "k", "v", "o"]} | how
        peft.inject_adapter_in_model(peft.LoraConfig(**how), model, adapter_name=f"adapter{i}")
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = (torch.randn(p.shape) * (0.1 if "lora_B" in name else p.shape[1] ** -0.5)).to(
                p.device, FP32 if fp32 else p.dtype
            )
    return model.train()


def tuners(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (m for m in model.modules() if isinstance(m, BaseTunerLayer))


def exact(model: nn.Module) -> nn.Module:
    """The model in fp64, what is quantised as the dense layer that it stands for."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, bnb.nn.Linear4bit):
                dense = nn.Linear(m.in_features, m.out_features, m.bias is not None)
                state = copy.copy(m.weight.quant_state)
                state.dtype = m.compute_dtype
                dense.weight.data = bnb.functional.dequantize_4bit(m.weight.data, state).to(m.compute_dtype)
                if m.bias is not None:
                    dense.bias.data = m.bias.data
                parent._modules[name] = dense.requires_grad_(False)
    for m in tuners(model):
        m.cast_input_dtype_enabled = True
    return model.double()


# ---------------------------------------------------------------- one step


def step(model: nn.Module, run: Callable[..., Any], x: Tensor, autocast: bool = False) -> dict[str, Tensor | None]:
    """The output and every gradient of one training step, with the same random numbers each time."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    torch.manual_seed(1)
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        y = run(x)
    generator = torch.Generator().manual_seed(2)
    (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(DEVICE)).sum().backward()
    found = {"output": y.detach(), "x": x.grad}
    return found | {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def comparable(model: nn.Module) -> bool:
    """Does eager draw the numbers that compiled code draws? Not for dropout on a GPU, under any compiler."""
    return DEVICE == "cpu" or not any(isinstance(m, nn.Dropout) and m.p for m in model.modules())


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def same(ours: dict[str, Tensor | None], eager: dict[str, Tensor | None], tolerance: float) -> None:
    """The same tensors, of the same dtypes, as far apart as allowed; the same ones missing."""
    assert ours.keys() == eager.keys()
    assert {n for n, t in ours.items() if t is None} == {n for n, t in eager.items() if t is None}
    for name, theirs in eager.items():
        if theirs is not None:
            mine = ours[name]
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
            assert (d := distance(mine, theirs)) <= tolerance, f"{name}: {d:.2e}"


def no_worse(ours: dict, eager: dict, truth: dict) -> None:
    """The 1.05 rule over a whole step. Half an ulp more: what eager rounds by luck to the right side is a small tensor here."""
    same(ours, eager, 0.1)
    for name, theirs in eager.items():
        if theirs is not None:
            mine, right = ours[name], truth[name]
            assert distance(mine, right) <= 1.05 * distance(theirs, right) + torch.finfo(BF16).eps / 8, name


class Compiled:
    """A model compiled by sloth: its reports, and the graphs that it was rewritten to."""

    def __init__(self, model: nn.Module, inner: str = "eager", **kwargs: Any):
        torch._dynamo.reset()
        options = {"sloth.inner_backend": inner} if inner != "inductor" else {}
        self.run = torch.compile(model, backend="sloth", options=options, **kwargs)
        self.reports: list[GraphReport] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, *args: Any) -> Any:
        compile_with = backend.compile_with

        def look(inner, gm, example_inputs):
            self.graphs.append(gm)
            return compile_with(inner, gm, example_inputs)

        with backend.listening() as reports, mock.patch.object(backend, "compile_with", look):
            out = self.run(*args)
        self.reports += reports
        return out

    @property
    def variants(self) -> dict[str, int]:
        """How often each variant of the two constructs was matched; a site that was missed is a failure."""
        for report in self.reports:
            assert not report.untouched, report.untouched
        sites = [s for r in self.reports for s in r.sites if s.construct in ("lora", "linear_4bit")]
        missed = [s for s in sites if s.status != MATCHED]
        assert not missed, missed
        return {v: sum(s.variant == v for s in sites) for v in sorted({s.variant for s in sites})}

    def calls(self, op: Any) -> list[int]:
        """For each call of `op`: how many layers it stands for."""
        return [n for gm in self.graphs for n in self.calls_of(op, gm)]

    @staticmethod
    def calls_of(op: Any, gm: fx.GraphModule) -> list[int]:
        bodies = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
        found = [n for body in bodies for n in body.graph.find_nodes(op="call_function", target=op)]
        return [len(n.args[1]) if isinstance(n.args[1], list | tuple) else 1 for n in found]


def x_like(*lead: int, dtype: torch.dtype = FP32, grad: bool = True) -> Tensor:
    x = torch.randn((*(lead or (2, 12)), K), generator=torch.Generator().manual_seed(0))
    return x.to(DEVICE, dtype).requires_grad_(grad)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    for m in tuners(model):
        m.enable_adapters(False)
    yield
    for m in tuners(model):
        m.enable_adapters(True)
