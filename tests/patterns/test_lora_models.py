"""Adapters on a whole model of transformers: what `explain` counts, and one step of training."""

from __future__ import annotations

import pytest
import torch
from common import DEVICE
from peft_layers import BF16, FP32, Compiled, bnb, comparable, peft, same
from torch import nn

import sloth

transformers = pytest.importorskip("transformers")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(quantised: bool, targets=tuple(PROJECTIONS), dtype: torch.dtype = FP32, layers: int = 1, **how):
    """Tiny layers with adapters; the linear ones in 4 bits if wanted."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.config.use_cache = False
    for parent in list(model.model.layers.modules()) if quantised else ():
        for name, m in list(parent.named_children()):
            if isinstance(m, nn.Linear):
                new = bnb.nn.Linear4bit(m.in_features, m.out_features, False, compute_dtype=dtype, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(m.weight.data, requires_grad=False, quant_type="nf4", module=new)
                setattr(parent, name, new)
    model = peft.get_peft_model(model.to(DEVICE), peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **how))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.1)
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def step(model, run) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = run(**batch()).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def checkpointed(model, on: bool):
    if on:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("checkpoint, layers", [(False, 2), (True, 1)], ids=["plain", "checkpointed"])
@pytest.mark.covered(1)
def test_explain_counts_every_projection(quantised, checkpoint, layers):
    model = checkpointed(llama(quantised, layers=layers), checkpoint)
    report = sloth.explain(model, batch())
    assert report.constructs["lora"] == {"matched": 7 * layers, "expected": 7 * layers}, str(report)
    assert report.constructs["linear_4bit"]["expected"] == report.constructs["linear_4bit"]["matched"]
    assert {s.variant for s in report.sites if s.construct == "lora"} == {"lora[linear]"}


@pytest.mark.parametrize("quantised, checkpoint", [(False, False), (True, True)], ids=["dense", "nf4-checkpointed"])
def test_a_step_of_training(quantised, checkpoint):
    model = checkpointed(llama(quantised, lora_dropout=0.1), checkpoint)
    eager, compiled = step(model, model), Compiled(model, "aot_eager")
    run = lambda **kwargs: compiled.run(**kwargs)  # noqa: E731
    same(step(model, run), eager, 1e-4 if comparable(model) else float("inf"))
    assert sum(g is not None for g in eager.values()) == 1 + 2 * 7


def test_adapters_on_attention_only():
    """The gated MLP's layers are 4-bit layers without adapters."""
    report = sloth.explain(llama(True, PROJECTIONS[:4]), batch())
    assert report.constructs["lora"] == {"matched": 4, "expected": 4}
    assert report.constructs["linear_4bit"] == {"matched": 3, "expected": 3}


def test_fp32_adapters_over_a_bf16_model():
    """What `get_peft_model` makes of one."""
    model = llama(True, dtype=BF16)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {FP32}
    report = sloth.explain(model, batch())
    assert report.constructs["lora"] == {"matched": 7, "expected": 7}, str(report)


def test_disabled_adapters_are_not_expected():
    model = llama(False)
    with model.disable_adapter():
        assert sloth.explain(model, batch()).constructs["lora"] == {"matched": 0, "expected": 0}


def test_two_active_adapters_are_counted_twice():
    model = llama(False, PROJECTIONS[:2])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=PROJECTIONS[:2]))
    model.base_model.set_adapter(["default", "second"])
    report = sloth.explain(model, batch())
    assert report.constructs["lora"] == {"matched": 4, "expected": 4}, str(report)
