"""4-bit layers as other versions of bitsandbytes write them, and autograd functions that only look like one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE
from inner import INNER
from peft_layers import BF16, FP32, Attention, Compiled, K, adapted, bnb, same, step, x_like
from torch import Tensor, nn

from sloth.kernels.linear.dequantize_4bit import dequantize_4bit
from sloth.kernels.linear.linear_4bit_rows import linear_4bit_rows
from sloth.kernels.linear.lora import lora_linear
from sloth.patterns import linear_4bit

unpacked = bnb.functional.dequantize_4bit


class Version46(torch.autograd.Function):
    """bitsandbytes 0.46: the weight comes as [1, N·K/2], and what is dequantised of it as [K, N]."""

    @staticmethod
    def forward(ctx, a, b, out=None, bias=None, state=None):
        ctx.state, ctx.dtype_bias = state, None if bias is None else bias.dtype
        ctx.tensors = (None, b)
        return F.linear(a, unpacked(b, state).to(a.dtype).t(), bias)

    @staticmethod
    def backward(ctx, grad_output):
        need_a, _, _, need_bias, _ = ctx.needs_input_grad
        _, b = ctx.tensors
        grad_bias = grad_output.sum(0, dtype=ctx.dtype_bias) if need_bias else None
        grad_a = torch.matmul(grad_output, unpacked(b, ctx.state).to(grad_output.dtype).t()) if need_a else None
        return grad_a, None, None, grad_bias, None


class Saved(torch.autograd.Function):
    """The packed weight saved in autograd's way, and the gradient cast."""

    @staticmethod
    def forward(ctx, a, b, out=None, bias=None, state=None):
        ctx.state = state
        ctx.save_for_backward(b)
        return F.linear(a, unpacked(b, state).to(a.dtype).t(), bias)

    @staticmethod
    def backward(ctx, grad_output):
        (b,) = ctx.saved_tensors
        weight = unpacked(b, ctx.state).to(grad_output.dtype).t()
        return (grad_output.reshape(-1, grad_output.shape[-1]) @ weight).view(*grad_output.shape[:-1], -1), None, None, None, None


class Doubled(Version46):
    """Not the derivative: twice as much."""

    @staticmethod
    def backward(ctx, grad_output):
        weight = unpacked(ctx.tensors[1], ctx.state).to(grad_output.dtype).t()
        return (2 * (grad_output @ weight), *[None] * 4)


class OtherScale(Version46):
    """Not the derivative: of W², say."""

    @staticmethod
    def backward(ctx, grad_output):
        weight = unpacked(ctx.tensors[1], ctx.state).to(grad_output.dtype).t()
        return (grad_output @ weight.square(), *[None] * 4)


class Straight(Version46):
    """Not the derivative: the gradient of the first row for all."""

    @staticmethod
    def backward(ctx, grad_output):
        weight = unpacked(ctx.tensors[1], ctx.state).to(grad_output.dtype).t()
        return (grad_output[:, :1].expand_as(grad_output) @ weight, *[None] * 4)


RIGHT, WRONG = (Version46, Saved), (Doubled, OtherScale, Straight)


class Layer(nn.Module):
    """bitsandbytes' layer with another function in it."""

    def __init__(self, function, bias: bool = False, dtype: torch.dtype = FP32):
        super().__init__()
        self.inner = bnb.nn.Linear4bit(K, 64, bias, compute_dtype=dtype, quant_type="nf4").to(dtype)
        self.inner.requires_grad_(False)
        self.function = function
        self.a, self.b = nn.Parameter(torch.randn(4, K, dtype=dtype) * 0.1), nn.Parameter(torch.randn(64, 4, dtype=dtype) * 0.1)
        self.adapter = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.function.apply(x * 2, self.inner.weight.t(), None, self.inner.bias, self.inner.weight.quant_state)
        return y + F.linear(F.linear(x * 2, self.a), self.b) * 2.0 if self.adapter else torch.tanh(y) @ self.b @ self.a


@pytest.mark.parametrize("function", RIGHT)
@pytest.mark.parametrize("bias, dtype", [(False, FP32), (True, BF16)])
def test_other_versions(function, bias, dtype):
    """Matched with their adapter, and without."""
    torch.manual_seed(0)
    model, x = Layer(function, bias, dtype).to(DEVICE), x_like(dtype=dtype)
    for model.adapter in (True, False):
        compiled = Compiled(model, INNER)
        same(step(model, compiled, x), step(model, model, x), 1e-5 if dtype == FP32 else 1e-2)
        kind = "linear_bias" if bias else "linear"
        assert compiled.variants == {f"lora[{kind}]" if model.adapter else f"linear_4bit[{kind}]": 1}
        assert len(compiled.calls(dequantize_4bit)) == len(compiled.calls(lora_linear)) == 1


@pytest.mark.parametrize("function", WRONG)
@pytest.mark.parametrize("adapter", [True, False])
def test_functions_with_another_backward_keep_it(function, adapter):
    torch.manual_seed(0)
    model, x = Layer(function).to(DEVICE), x_like()
    model.adapter = adapter
    right = step(model, model, x)
    compiled = Compiled(model, INNER)
    same(step(model, compiled, x), right, 1e-5)
    model.function = Version46
    assert not torch.allclose(right["x"], step(model, model, x)["x"], rtol=1e-2), "its gradient is another one"
    matched = [s.variant for r in compiled.reports for s in r.sites if s.status == "matched" and s.construct == "lora"]
    assert matched == (["adapter[lora]"] if adapter else []), "only what is added to the function's result"


def test_a_trained_bias_has_its_gradient():
    """db is what bitsandbytes gives: for rows in one dimension. (It sums over the first dimension alone.)"""
    torch.manual_seed(0)
    model, x = Layer(Version46, bias=True).to(DEVICE), x_like(12)
    model.inner.bias.requires_grad_()
    compiled = Compiled(model, INNER)
    eager = step(model, model, x)
    same(step(model, compiled, x), eager, 1e-5)
    assert eager["inner.bias"] is not None and compiled.variants == {"lora[linear_bias]": 1}


@pytest.mark.parametrize("rows, matched", [(64, 4), (4, 0)])
def test_evaluation(rows, matched):
    """Without gradients, many rows are multiplied with the unpacked weight and a few are left to bitsandbytes."""
    model = adapted(Attention("nf4"))
    with torch.no_grad():
        x = x_like(1, rows, grad=False)
        compiled = Compiled(model, dynamic=False)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert sum(compiled.calls(lora_linear)) == matched
    sites = [s for r in compiled.reports for s in r.sites if s.construct == "linear_4bit"]
    assert len(sites) == 4 and all(
        matched or (s.status, s.reason) == ("unprofitable", f"{rows} rows without gradients") for s in sites
    )


# ---------------------------------------------------------------- a few rows, where there are kernels for them


@pytest.fixture
def kernels(monkeypatch):
    """As on a GPU; what is chosen then computes by ATen here."""
    monkeypatch.setattr(linear_4bit, "device_of", lambda device: SimpleNamespace(triton=True))


@pytest.mark.parametrize("adapters, bias", [(None, True), ("bf16", True), ("fp32", False)])
def test_few_rows(kernels, adapters, bias):
    """q, k and v in one call, with their adapters, which read x as it is or in fp32; as near to fp64 as eager."""
    model = adapted(Attention("nf4", BF16, bias), *([] if adapters is None else [{}]), fp32=adapters == "fp32")
    x = x_like(2, 1, dtype=BF16, grad=False)
    with torch.no_grad():
        compiled = Compiled(model)
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    entry = "linear_4bit_rows" if adapters is None else "lora_rows"
    assert compiled.variants == {f"{entry}[linear{'_bias' * bias}]": 4}
    assert sorted(compiled.calls(linear_4bit_rows)) == [1, 3] and not compiled.calls(dequantize_4bit)


def test_one_token_of_any_number_of_sequences(kernels):
    """One graph; of many sequences the operator dequantises. With gradients, or with many tokens, nothing changes."""
    model = adapted(Attention("nf4", BF16), {})
    compiled = Compiled(model, dynamic=True)
    with torch.no_grad():
        for rows in (3, 40):
            x = x_like(rows, 1, dtype=BF16, grad=False)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    assert len(compiled.reports) == 1 and sum(compiled.calls(linear_4bit_rows)) == 4
    for x, grad in ((x_like(3, 1, dtype=BF16), True), (x_like(3, 12, dtype=BF16, grad=False), False)):
        with torch.set_grad_enabled(grad):
            other = Compiled(model)
            other(x)
        assert sum(other.calls(lora_linear)) == 4 and not other.calls(linear_4bit_rows)


@pytest.mark.parametrize(
    "rows, tokens, dtype, blocksize, left",
    [(3, 8, BF16, 64, True), (20, 1, BF16, 64, True), (2, 1, FP32, 64, True), (2, 1, BF16, 512, True), (16, 1, BF16, 128, False)],
)
def test_what_the_kernels_do_not_take_is_left_to_bitsandbytes(kernels, rows, tokens, dtype, blocksize, left):
    """More than 16 rows of 32, fp32, larger blocks than they hold."""
    layer = bnb.nn.Linear4bit(1024, 8, compute_dtype=dtype, quant_type="nf4").to(dtype)
    layer.weight.blocksize = blocksize
    layer.to(DEVICE)
    x = torch.randn(rows, tokens, 1024, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        compiled = Compiled(layer, dynamic=False)
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)
    assert not compiled.calls(lora_linear) and bool(compiled.calls(linear_4bit_rows)) != left
