"""Gate and up of an MLP with adapters are one product on a GPU, and so are their gradients: here by the operators' formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE
from peft_layers import BF16, FP32, Attention, Compiled, K, adapted, base_layer, exact, no_worse, same, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from sloth.kernels.common.device import H100
from sloth.kernels.gated_act import gated_act, gated_act_packed
from sloth.kernels.linear.gemm import compute_sum_of_products
from sloth.kernels.linear.lora import lora_linear
from sloth.patterns import lora

NAMES = ["q", "k", "o"]  # gate, up and down, by the names that `adapted` knows


class MLP(nn.Module):
    """how: what keeps the two from being one."""

    def __init__(self, kind: str = "nf4", dtype: torch.dtype = BF16, how: str = "", up_first: bool = False, act=F.silu):
        super().__init__()
        for name, (k, n) in zip(NAMES, ((K, 64), (K, 64), (64, K)), strict=True):
            self.add_module(name, base_layer(kind, k, n, dtype, bias=how == "bias").to(dtype))
        self.how, self.up_first, self.act, self.checkpointed = how, up_first, act, False

    def body(self, x: torch.Tensor) -> torch.Tensor:
        if self.up_first:
            up = self.k(x)
            gate = self.q(x)
        else:
            gate, up = self.q(x), self.k(torch.tanh(x) if self.how == "other x" else x)
        y = self.o(self.act(gate) * up)
        return y + gate.repeat(1, 1, 2) if self.how == "read elsewhere" else y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "device_of", lambda device: H100)


def made(model: nn.Module, x: torch.Tensor) -> Compiled:
    """The same step as eager's, no further from fp64."""
    eager, compiled, truth = step(model, model, x), Compiled(model), exact(model)
    no_worse(step(model, compiled, x), eager, step(truth, truth, x.double()))
    return compiled


def are_one(compiled: Compiled) -> bool:
    packed, apart = len(compiled.calls(gated_act_packed)), len(compiled.calls(gated_act))
    assert packed + apart == 1
    return packed == 1


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_gate_and_up_are_one_tensor(kind: str, up_first: bool, checkpointed: bool) -> None:
    model = adapted(MLP(kind, up_first=up_first), {"target_modules": NAMES})
    model.checkpointed = checkpointed
    compiled = made(model, torch.randn(2, 5, K, device=DEVICE, dtype=BF16, requires_grad=True))
    assert are_one(compiled) and compiled.calls(lora_linear) == [2, 1]


def test_under_autocast() -> None:
    """As trainers have it: adapters in fp32 are cast."""
    model = adapted(MLP(), {"target_modules": NAMES}, fp32=True)
    x = torch.randn(2, 5, K, device=DEVICE, requires_grad=True)
    eager, compiled = step(model, model, x, autocast=True), Compiled(model)
    same(step(model, compiled, x, autocast=True), eager, 1e-2)
    assert are_one(compiled)


@pytest.mark.parametrize("how", ["bias", "read elsewhere", "other x", "fp32 adapters", "ranks", "scales", "one adapter"])
def test_what_keeps_them_apart(how: str) -> None:
    config = {"target_modules": ["q", "o"] if how == "one adapter" else NAMES, "r": 40 if how == "ranks" else 4}
    config |= {"alpha_pattern": {"k": 3}} if how == "scales" else {}
    model = adapted(MLP("dense", how=how), config, fp32=how == "fp32 adapters")
    x = torch.randn(2, 5, K, device=DEVICE, dtype=BF16, requires_grad=True)
    eager, compiled = step(model, model, x), Compiled(model)
    same(step(model, compiled, x), eager, 2e-2)
    assert not are_one(compiled)


def test_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.randn(2, 5, K, device=DEVICE, dtype=BF16, requires_grad=True)
    compiled = made(adapted(MLP("dense"), {"target_modules": NAMES}), x)
    assert are_one(compiled) == (DEVICE == "cuda")


def test_an_activation_of_all_of_them() -> None:
    for act in (F.gelu, lambda x: F.gelu(x, approximate="tanh")):
        model = adapted(MLP("dense", FP32, act=act), {"target_modules": NAMES})
        assert are_one(made(model, torch.randn(2, 5, K, device=DEVICE, requires_grad=True)))


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_that_lie_side_by_side_are_not_copied(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those of wide layers that do not, which are added one by one."""
    copied: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, dim: (copied.append(len(parts)), cat(parts, dim))[1])
    w, g = list(torch.randn(40, 4).split([20, 20])), list(torch.randn(5, 40).split([20, 20], 1))
    g = [part.clone() for part in g] if apart else g
    t, u = torch.randn(5, 2), torch.randn(2, 4)
    found = compute_sum_of_products([t, *g], [u, *w], [1.0] * 3)
    torch.testing.assert_close(found, t @ u + g[0] @ w[0] + g[1] @ w[1])
    assert not copied


def test_attention_is_left_as_it_is() -> None:
    """Three layers, of which nothing reads two in one tensor."""
    model = adapted(Attention("nf4", BF16), {})
    compiled = Compiled(model)
    step(model, compiled, torch.randn(2, 5, K, device=DEVICE, dtype=BF16, requires_grad=True))
    assert compiled.calls(lora_linear) == [3, 1]
