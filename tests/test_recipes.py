"""The recipes people run, tiny: whatever surrounds the model, what the bare model matches is matched, in one graph or two."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from inner import OPTIONS
from torch import nn
from torch._dynamo.utils import counters

from sloth.lazy import tensor as lazy_tensor
from sloth.rewriter.backend import listening
from sloth.rewriter.explain import explain

ARCHITECTURES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3")
TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 256, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
AOT = {"SLOTH_OPTIONS": "sloth.inner_backend=aot_eager"}


def quantised(model: nn.Module) -> nn.Module:
    """Its layers in NF4, prepared as PEFT does."""
    import bitsandbytes as bnb
    from peft import prepare_model_for_kbit_training

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            four = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            four.load_state_dict(layer.state_dict())
            four = four.to("cpu")
            four.support_avx512bf16_for_cpu = False
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, four)
    model.is_loaded_in_4bit = True
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def build(architecture: str, kind: str, **lora: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **TINY))
    if kind == "qlora":
        model = quantised(model.to(torch.bfloat16))
    if kind != "full":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **lora))
    for p in model.parameters():  # adapters begin as zeros
        if p.requires_grad and p.dim() == 2 and kind != "full":
            p.data.normal_(0, 0.05)
    return model.train()


class Inside(nn.Module):
    """Autocast within what is compiled, as accelerate puts it around a model's forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**batch)


def batch_of(length: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 250, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def sites(model: nn.Module) -> dict[str, str]:
    found = explain(model, batch_of()).constructs
    return {name: f"{n['matched']}/{n['expected']}" for name, n in found.items() if n["expected"]}


# Each value of a column with each of another at least once.
PAIRS = [
    ("llama", "qlora", True, "plain"), ("qwen3", "lora", True, "reentrant"), ("gemma2", "qlora", False, "reentrant"),
    ("gemma3_text", "lora", False, "plain"), ("mistral", "full", True, "plain"), ("phi3", "qlora", True, "none"),
    ("gemma2", "lora", True, "plain"), ("gemma3_text", "qlora", True, "plain"), ("phi3", "lora", False, "plain"),
]  # fmt: skip


@pytest.mark.parametrize("architecture, kind, inside, checkpointing", PAIRS, ids=lambda v: str(v))
@pytest.mark.covered(1)
def test_every_recipe_matches_all(architecture: str, kind: str, inside: bool, checkpointing: str) -> None:
    model = build(architecture, kind)
    if checkpointing != "none":
        checkpointed(model, checkpointing == "reentrant")
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        found = sites(Inside(model) if inside else model)
    missed = {name: n for name, n in found.items() if len(set(n.split("/"))) > 1}
    assert not missed and {"rms_norm", "rope", "gated_mlp", "attention", "cross_entropy"} <= found.keys(), found
    assert kind == "full" or found["lora"].startswith(f"{(7 if architecture != 'phi3' else 4) * TINY['num_hidden_layers']}/"), (
        found
    )


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param({"lora_bias": True}, id="bias"),
        pytest.param({"use_dora": True, "lora_alpha": 8}, id="dora of scale 1", marks=pytest.mark.nightly),
    ],
)
def test_adapters_of_other_kinds(lora: dict[str, Any]) -> None:
    model = build("llama", "lora", **lora)
    assert sites(model)["lora"] == "21/21"
    batch = batch_of()
    eager = step(model, model, batch)
    torch._dynamo.reset()
    ours = step(model, torch.compile(model, backend="sloth", options=OPTIONS), batch)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


def test_another_alpha_in_one_process_is_no_symbol() -> None:
    """Dynamo makes a float symbolic that had another value in another model: a scale of 1 would not be known for one."""
    for alpha in (16, 8):
        assert sites(build("llama", "lora", lora_alpha=alpha))["lora"] == "21/21"
    assert sites(checkpointed(build("gemma3_text", "lora", lora_alpha=24), reentrant=False))["lora"] == "21/21"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.linear(x) * self.scale)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_float_that_changes_in_its_module_becomes_a_symbol() -> None:
    """A schedule over all layers: two graphs, as torch's, not some for each layer until Dynamo gives up."""
    torch._dynamo.reset()
    counters.clear()
    model, x = Layers(), torch.randn(4, 8)
    compiled = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})
    for scale in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        for layer in model.layers:
            layer.scale = scale
        torch.testing.assert_close(compiled(x), model(x))
    assert counters["stats"]["unique_graphs"] == 2


def test_zeros_of_two_signs_are_two_numbers() -> None:
    class Signed(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.abs() / self.scale + self.linear(x) * 0

    model, x = Layers(), torch.rand(4, 8) + 1
    model.layers = nn.ModuleList(Signed() for _ in range(3))
    for layer, scale in zip(model.layers, (0.0, -0.0, 0.0), strict=True):
        layer.scale = scale
    model.forward = lambda x: torch.stack([layer(x) for layer in model.layers])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "eager"})
    torch.testing.assert_close(compiled(x), model(x), equal_nan=True)


def step(model: nn.Module, call: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = call(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.detach().clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.nightly
def test_what_is_kept_narrow_is_no_further_from_the_truth_than_eager() -> None:
    """QLoRA after preparation: weights of norms and embeddings in fp32, so that eager widens what each layer gives."""
    model = build("llama", "qlora")
    call = Inside(model)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="sloth", options={"sloth.inner_backend": "aot_eager"})
    ours, eager = [0.0] * 2, [0.0] * 2
    for length in (24, 40, 56):
        batch = batch_of(length)
        a, b = step(model, compiled, batch), step(model, call, batch)
        with torch.autocast("cpu", enabled=False):
            truth = exact(model, batch)
        for i in range(2):
            pick = slice(0, 1) if i == 0 else slice(1, None)
            ours[i] += distance(a[pick], truth[pick])
            eager[i] += distance(b[pick], truth[pick])
    assert ours[1] <= 1.05 * eager[1], (ours, eager)


def exact(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The step in fp32 of the same weights, dequantised: what both are rounded from."""
    import copy

    import bitsandbytes as bnb

    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            plain.weight.requires_grad_(False)
            parent, leaf = name.rsplit(".", 1)
            setattr(twin.get_submodule(parent), leaf, plain)
    return step(twin, twin, batch)


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b, strict=True)) ** 0.5


def rows(count: int) -> list[dict[str, list[int]]]:
    draw = random.Random(7)
    made = []
    for _ in range(count):
        ids = [draw.randrange(4, 250) for _ in range(draw.choice([17, 24, 31, 40, 48]))]
        prompt = len(ids) // 4
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:]})
    return made


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in batch]) for k, v in pad.items()}


def trained(backend: str, folder: Path, evaluating: bool = False) -> list[float]:
    """The losses of some steps; or, where it evaluates, those of the evaluations, during training and behind it."""
    from transformers import Trainer, TrainingArguments

    compiling = {"torch_compile_backend": backend} if backend else {}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3,
        bf16=True, report_to=[], save_strategy="no", gradient_checkpointing=True, logging_steps=1, learning_rate=1e-3,
        disable_tqdm=True, eval_strategy="steps" if evaluating else "no", eval_steps=2, per_device_eval_batch_size=4,
        gradient_checkpointing_kwargs={"use_reentrant": False}, **compiling,
    )  # fmt: skip
    trainer = Trainer(
        model=build("llama", "qlora"), args=arguments, train_dataset=rows(32), eval_dataset=rows(16), data_collator=collate
    )
    trainer.train()
    if evaluating:
        trainer.evaluate()
        return [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


def test_trainer_with_autocast_checkpointing_and_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all lengths from the first step on, all matched, and eager's losses."""
    for name, value in AOT.items():
        monkeypatch.setenv(name, value)
    torch._dynamo.reset()
    counters.clear()
    with listening() as reports:
        ours = trained("sloth", tmp_path / "sloth")
    assert counters["stats"]["unique_graphs"] == len(reports) == 1 and not counters["graph_break"]
    missed = [s for s in reports[0].sites if s.status != "matched"]
    assert not missed and sum(s.construct == "lora" for s in reports[0].sites) == 21
    assert (reports[0].parts, reports[0].compiled) == (5, 3) and not reports[0].guards
    assert ours == pytest.approx(trained("", tmp_path / "eager"), abs=2e-3)


@pytest.mark.nightly
def test_trainer_evaluates_compiled_and_without_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AOT.items():
        monkeypatch.setenv(name, value)
    read: list[torch.Tensor] = []
    monkeypatch.setattr(lazy_tensor, "materialize", lambda x: read.append(x) or x.known)
    torch._dynamo.reset()
    with listening() as reports:
        ours = trained("sloth", tmp_path / "sloth", evaluating=True)
    monkeypatch.undo()
    assert len(reports) == 2 and not read, [r.line({}) for r in reports]
    assert all(s.status == "matched" for r in reports for s in r.sites)
    assert Counter(s.construct for s in reports[1].sites) == Counter(s.construct for s in reports[0].sites)
    assert len(ours) == 3 and ours == pytest.approx(trained("", tmp_path / "eager", evaluating=True), abs=2e-3)


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.nightly), "static"])
def test_generating_between_steps_makes_no_graphs(cache: str) -> None:
    model = build("llama", "full")
    ids = torch.tensor([[5, 6, 7]])
    wanted = model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=True)
    torch._dynamo.reset()
    model.compile(backend="sloth", options=OPTIONS)
    with listening() as reports:
        for length in (24, 31, 40):
            model.train()(**batch_of(length)).loss.backward()
            got = model.eval().generate(
                input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=True, cache_implementation=cache
            )
            torch.testing.assert_close(got, wanted)
    assert len(reports) == 2
    assert model._compiled_call_impl is not None


def test_hooks_do_not_pile_up() -> None:
    """DPO, KTO and GRPO switch checkpointing off and on around the reference's pass, in each step."""
    model = build("llama", "lora").get_base_model()
    for _ in range(3):
        model.enable_input_require_grads()
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks
    model.enable_input_require_grads()
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    model.set_input_embeddings(nn.Embedding(256, 64))  # one that has no hook
    model.enable_input_require_grads()
    assert len(model.get_input_embeddings()._forward_hooks) == 1


@pytest.mark.nightly
def test_explain_twice_tells_the_same() -> None:
    model = build("llama", "lora")
    assert explain(model, batch_of()).constructs == explain(model, batch_of()).constructs
