"""LoRA and QLoRA: PEFT over dense and bitsandbytes layers, compiled, against eager; every projection matched."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from common import DEVICE
from harness import VARIANTS
from inner import INNER
from peft_layers import (
    BASES,
    BF16,
    FOUR_BIT,
    FP32,
    INT8,
    Attention,
    Compiled,
    K,
    adapted,
    comparable,
    disabled,
    exact,
    no_worse,
    same,
    step,
    tuners,
    x_like,
)
from torch import nn

from sloth.integrations.peft import weight_of
from sloth.kernels.linear.adapter import adapter
from sloth.kernels.linear.dequantize_4bit import dequantize_4bit
from sloth.kernels.linear.lora import lora_linear
from sloth.testing.samples import accepts, made_match, sample

ONE_FOR_QKV = [3, 1]


def trained(model, x, tolerance, *, autocast=False, **kwargs):
    """One step, eager and compiled, must agree; the compiled model."""
    eager = step(model, model, x, autocast)
    compiled = Compiled(model, **kwargs)
    ours = step(model, compiled, x, autocast)
    same(ours, eager, tolerance if comparable(model) else float("inf"))
    return compiled


def assert_matched(compiled, kind="dense", bias=False):
    """All four layers, q, k and v in one call. On a GPU LLM.int8 multiplies in 8 bits: an adapter over what no entry knows, in
    graphs of their own (bitsandbytes looks for outliers in the data), and those of q, k and v are one.
    """
    if kind == "int8" and DEVICE != "cpu":
        assert list(compiled.variants) == ["adapter[lora]"]
    else:
        assert compiled.variants == {f"lora[linear{'_bias' if bias else ''}]": 4}
        assert compiled.calls(lora_linear) == ONE_FOR_QKV


# ---------------------------------------------------------------- every base


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bias, dtype", [(False, BF16), (True, FP32)], ids=["bf16", "fp32-bias"])
@pytest.mark.covered(1)
def test_bases(kind, bias, dtype):
    model = adapted(Attention(kind, dtype, bias), {})
    compiled = trained(model, x_like(dtype=dtype), 1e-5 if dtype == FP32 else 1e-2, inner=INNER)
    assert_matched(compiled, kind, bias)
    assert len(compiled.calls(dequantize_4bit)) == (4 if kind in FOUR_BIT else 0)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("fp32", [False, True], ids=["same", "fp32-adapters"])
@pytest.mark.covered(1)
def test_no_further_from_the_truth(kind, fp32):
    """In bf16, against the same model in fp64."""
    model = adapted(Attention(kind, BF16, bias=True), {}, fp32=fp32)
    x = x_like(4, 64, dtype=BF16)
    compiled = Compiled(model)
    right = exact(model)
    no_worse(step(model, compiled, x), step(model, model, x), step(right, right, x.detach().double().requires_grad_()))
    assert compiled.variants == {"lora[linear_bias]": 4}


# ---------------------------------------------------------------- every way to configure the adapter

CONFIGS = {
    "rank 1": {"r": 1},
    "scale 1": {"r": 4, "lora_alpha": 4},
    "rsLoRA": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
    "dropout, scale 1": {"lora_dropout": 0.1, "lora_alpha": 4},
    "adapter with bias": {"lora_bias": True},
}


@pytest.mark.parametrize(
    "kind, name", [*(("dense", n) for n in CONFIGS if n != "adapter with bias"), ("nf4", "dropout"), ("nf4", "scale 1")]
)
def test_configurations(kind, name):
    """With dropout the mask is eager's: the adapter has an input of its own, and its layers are still one call."""
    compiled = trained(adapted(Attention(kind), CONFIGS[name]), x_like(), 1e-5, inner=INNER)
    assert_matched(compiled, kind)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_adapters_with_a_bias_are_left_alone(kind):
    """B x + bias is no LoRA projection of ours: whatever is made of it, values and gradients are eager's."""
    trained(adapted(Attention(kind), CONFIGS["adapter with bias"]), x_like(), 1e-5)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.covered(1)
def test_fp32_adapters_over_bf16(kind, dropout):
    model = adapted(Attention(kind, BF16), {"lora_dropout": dropout}, fp32=True)
    compiled = trained(model, x_like(dtype=BF16), 1e-2)
    assert_matched(compiled, kind)


@pytest.mark.parametrize("kind, dtype", [("dense", FP32), ("dense", BF16), ("nf4", BF16), ("int8", BF16)], ids=str)
@pytest.mark.parametrize("fp32", [False, True], ids=["same", "fp32-adapters"])
@pytest.mark.covered(1)
def test_autocast(kind, dtype, fp32):
    compiled = trained(adapted(Attention(kind, dtype), {}, fp32=fp32), x_like(dtype=dtype), 1e-2, autocast=True)
    assert_matched(compiled, kind)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["nf4", "nf4-single"])
@pytest.mark.covered(1)
def test_fp32_states_into_a_bf16_layer(kind, dropout):
    """As `prepare_model_for_kbit_training` has it: norms and adapters in fp32, and so what the layer is given."""
    model = adapted(Attention(kind, BF16), {"lora_dropout": dropout}, fp32=True)
    compiled = trained(model, x_like(), 1e-2)
    assert compiled.variants == {"lora[linear]": 4}


# ---------------------------------------------------------------- several adapters, some layers, none


@pytest.mark.parametrize("kind, active", [("dense", 0), ("nf4", 1)])
def test_two_adapters_of_which_one_is_active(kind, active):
    model = adapted(Attention(kind), {}, {"r": 2})
    for m in tuners(model):
        m.set_adapter(f"adapter{active}")
    eager = step(model, model, x_like())
    assert {n for n, g in eager.items() if g is not None and "lora_" in n} == {
        n for n, _ in model.named_parameters() if f"adapter{active}" in n
    }
    compiled = trained(model, x_like(), 1e-5)
    assert_matched(compiled, kind)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.covered(1)
def test_two_active_adapters(kind, dtype):
    """The second is added to what the first made."""
    model = adapted(Attention(kind, dtype), {}, {"r": 2})
    for m in tuners(model):
        m.set_adapter(["adapter0", "adapter1"])
    compiled = trained(model, x_like(dtype=dtype), 1e-5 if dtype == FP32 else 1e-2)
    assert compiled.variants == {"adapter[lora]": 4, "lora[linear]": 4}
    assert compiled.calls(lora_linear) == ONE_FOR_QKV and len(compiled.calls(adapter)) == 4


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_adapters_on_some_layers(kind):
    """The others of a 4-bit model are 4-bit layers."""
    compiled = trained(adapted(Attention(kind), {"target_modules": ["q", "v"]}), x_like(), 1e-5)
    if kind in FOUR_BIT:
        assert compiled.variants == {"linear_4bit[linear]": 2, "lora[linear]": 2}
        assert compiled.calls(lora_linear) == ONE_FOR_QKV
    else:
        assert list(compiled.variants) == [INT8 if kind == "int8" else "lora[linear]"]


@pytest.mark.parametrize("kind, bias", [("nf4", False), ("nf4-single", True), ("fp4", True)])
def test_quantised_layers_without_adapters(kind, bias):
    """Nothing to train but the head: x wants a gradient."""
    model = adapted(Attention(kind, bias=bias))
    compiled = trained(model, x_like(), 1e-5)
    assert compiled.variants == {f"linear_4bit[linear{'_bias' if bias else ''}]": 4}


def test_modules_to_save():
    model = adapted(Attention("nf4"), {"modules_to_save": ["head"]})
    eager = step(model, model, x_like())
    assert [n for n, g in eager.items() if g is not None and "modules_to_save" in n], "the head is trained"
    compiled = trained(model, x_like(), 1e-5)
    assert compiled.variants == {"lora[linear]": 4}


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_disabled_adapters(kind):
    """As the reference model of DPO: the base alone. Switched on again, the adapters are there again."""
    model = adapted(Attention(kind), {})
    with disabled(model):
        compiled = trained(model, x_like(), 1e-5)
        assert compiled.variants == ({"linear_4bit[linear]": 4} if kind == "nf4" else {})
    assert trained(model, x_like(), 1e-5).variants == {"lora[linear]": 4}


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_dora(kind):
    """Its norm of the weight is made anew in each step. PEFT's way to ask for the weight breaks no graph."""
    compiled = trained(adapted(Attention(kind), {"use_dora": True}), x_like(), 1e-4)
    assert len(compiled.graphs) == 1
    assert compiled.variants == {"adapter[dora]": 4} | ({"linear_4bit[linear]": 4} if kind == "nf4" else {})


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.nightly), "nf4"])
def test_dora_where_torchao_is_imported(kind, monkeypatch):
    """As transformers does where it is installed."""

    class Quantised(torch.Tensor):
        def dequantize(self):
            return self.as_subclass(torch.Tensor) * 2

    monkeypatch.setitem(sys.modules, "torchao.utils", SimpleNamespace(TorchAOBaseTensor=Quantised))
    assert len(trained(adapted(Attention(kind), {"use_dora": True}), x_like(), 1e-4).graphs) == 1
    weight = torch.ones(2, 2).as_subclass(Quantised)
    assert weight_of(SimpleNamespace(weight=weight)).tolist() == [[2, 2], [2, 2]]


# ---------------------------------------------------------------- how it is called


@pytest.mark.parametrize("kind, fp32", [("dense", False), ("nf4", True), ("int8", False)])
def test_dynamic(kind, fp32):
    """One graph for all lengths, once Dynamo has made constants of what it took for inputs (the scale, int8's state)."""
    dtype = BF16 if fp32 else FP32
    model = adapted(Attention(kind, dtype), {}, fp32=fp32)
    compiled, graphs = Compiled(model, dynamic=True), []
    for length in (12, 7, 9):
        x = x_like(2, length, dtype=dtype)
        same(step(model, compiled, x), step(model, model, x), 1e-2 if fp32 else 1e-5)
        graphs.append(len(compiled.graphs))
    assert graphs[1] == graphs[2], "the third length is compiled no more"
    assert list(compiled.variants) == [INT8 if kind == "int8" else "lora[linear]"]
    assert compiled.calls_of(lora_linear, compiled.graphs[-1]) == ([] if "adapter[lora]" in compiled.variants else ONE_FOR_QKV)


@pytest.mark.parametrize("kind", BASES)
def test_input_without_gradient(kind):
    """As behind a frozen embedding: bitsandbytes then writes its layers as another operator."""
    compiled = trained(adapted(Attention(kind), {}), x_like(grad=False), 1e-5)
    assert_matched(compiled, kind)


@pytest.mark.parametrize("kind, dropout", [("dense", 0.1), ("nf4", 0.0), ("nf4", 0.1), ("int8", 0.0)])
def test_checkpointed(kind, dropout):
    if kind == "int8" and torch.__version__ < "2.12":
        pytest.skip("there Dynamo traces no checkpointed function that sets attributes, as bitsandbytes' int8 layer does")
    model = adapted(Attention(kind, checkpointed=True), {"lora_dropout": dropout})
    compiled = trained(model, x_like(), 1e-5, inner="aot_eager")
    assert_matched(compiled, kind)


def test_adapters_that_share_no_input_are_calls_of_their_own():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x):
            return self.k(torch.tanh(self.q(x)))

    compiled = trained(adapted(Chain(), {"target_modules": ["q", "k"]}), x_like(), 1e-5)
    assert compiled.calls(lora_linear) == [1, 1]


@pytest.mark.parametrize("rows", [1, 33])
def test_generation_keeps_the_packed_product(rows):
    """Without gradients, bitsandbytes multiplies a few rows with the packed weights themselves."""
    model = adapted(Attention("nf4"))
    with torch.no_grad():
        compiled, x = Compiled(model, dynamic=False), x_like(1, rows, grad=False)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    many = len(compiled.calls(dequantize_4bit))
    assert many == (4 if rows > 32 else 0)


def test_a_trained_base_is_left_alone():
    """The operator has no gradient for the weight."""
    model = adapted(Attention(), {})
    model.q.base_layer.weight.requires_grad_()
    x = x_like()
    eager, compiled = step(model, model, x), Compiled(model)
    same(step(model, compiled, x), eager, 1e-5)
    statuses = [(s.variant, s.status) for r in compiled.reports for s in r.sites if s.construct == "lora"]
    assert eager["q.base_layer.weight"] is not None
    assert [variant for variant, status in statuses].count("lora[linear]") == 3
    assert [v for v, status in statuses if status == "matched"] in (
        ["lora[linear]"] * 3,
        ["adapter[lora]", *["lora[linear]"] * 3],
    )


def test_a_bias_of_another_dtype_is_left_to_torch():
    """Eager adds it to the product where the input is not contiguous, and else raises."""
    (variant,) = (v for v in VARIANTS if str(v) == "lora[linear_bias]")
    tensors = sample(variant, BF16)
    assert accepts(made_match(variant, tensors))
    tensors = [t.float() if n == "bias" else t for n, t in zip(variant.tensors, tensors, strict=True)]
    assert not accepts(made_match(variant, tensors))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "inner, kind, x_grad",
    [pytest.param("inductor", "nf4", True, marks=pytest.mark.nightly), ("aot_eager_decomp_partition", "fp4", False)],
)
def test_dequantised_weights_are_not_saved(inner, kind, x_grad):
    """They are made again in the backward pass: what is kept of the weights is packed."""
    model = adapted(Attention(kind, BF16), {})
    x = x_like(dtype=BF16, grad=x_grad)
    compiled = Compiled(model, inner)
    y = compiled(x)
    kept, todo, seen = [], [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kept += [t for t in getattr(node, "saved_tensors", ()) if isinstance(t, torch.Tensor)]
        todo += [n for n, _ in node.next_functions]
    assert kept, "something is saved"
    weights = {(64, K), (K, 64)}
    assert not [t.shape for t in kept if t.is_floating_point() and tuple(t.shape) in weights]
    packed = [t for t in kept if t.dtype == torch.uint8 and t.numel() == 64 * K // 2]
    assert len(packed) == (4 if x_grad else 1), "o's input wants a gradient in any case"
    y.float().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_the_mask_of_dropout_is_drawn_again_from_its_seed():
    """Inductor keeps neither masks nor what they made of x. The loss is linear in x and, but for the base, in A and in B: their
    gradients, times what they belong to, give it back only if both passes saw the same mask.
    """
    model = adapted(Attention(), {"lora_dropout": 0.4})
    layer = model.q
    x = x_like()
    y = torch.compile(layer, backend="sloth")(x)
    g = (y - layer.base_layer(x)).detach()
    kept = [t for t in y.grad_fn.saved_tensors if isinstance(t, torch.Tensor)]
    assert not any(t.dtype == torch.bool for t in kept)
    assert sum(t.numel() == x.numel() for t in kept) <= 1, "x itself, and no copy with holes"
    loss = (y * g).sum()
    own = [next(iter(parts.values())).weight for parts in (layer.lora_A, layer.lora_B)]
    dx, *adapters = torch.autograd.grad(loss, [x, *own])
    assert torch.allclose((dx * x).sum(), loss, rtol=1e-3)
    change = loss - (layer.base_layer(x) * g).sum()
    assert change > 1
    for p, d in zip(own, adapters, strict=True):
        assert torch.allclose((d * p).sum(), change, rtol=1e-3)
