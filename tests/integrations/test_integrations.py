"""What other packages do around a model, met as they do it."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from sloth.integrations import generation, llamafactory
from sloth.integrations.integration import WAITING, integrations
from sloth.integrations.trainer_walks import _answering, set_mode
from sloth.rewriter.backend import listening

# ---------------------------------------------------------------- accelerate


def test_what_the_launcher_was_not_told_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` without --dynamo_use_dynamic: each length would be a compilation."""
    from accelerate.utils import TorchDynamoPlugin

    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")
    assert TorchDynamoPlugin(backend="sloth").dynamic is None
    assert TorchDynamoPlugin(backend="sloth", dynamic=False).dynamic is False
    assert TorchDynamoPlugin(backend="inductor").dynamic is False
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "True")
    assert TorchDynamoPlugin(backend="sloth").dynamic is True


def test_the_name_is_a_member_like_others() -> None:
    from accelerate.utils import DynamoBackend

    assert DynamoBackend("SLOTH") is DynamoBackend.SLOTH is DynamoBackend["SLOTH"] and "SLOTH" in DynamoBackend.__members__


@pytest.mark.parametrize("backend", ["sloth", "eager"])
def test_while_a_trainer_works_every_call_of_its_model_is_compiled(backend: str, tmp_path: Path) -> None:
    """Under sloth. Before and behind it, and what accelerate gives, is as with other backends."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    seen: list[Any] = []

    class Seen(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            seen.append(model._compiled_call_impl)

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    told = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    row = {"input_ids": torch.arange(4), "labels": torch.arange(4)}
    arguments = TrainingArguments(**told, max_steps=2, per_device_train_batch_size=2, torch_compile_backend=backend)
    trainer = Trainer(model, arguments, train_dataset=[row] * 8, eval_dataset=[row] * 2, callbacks=[Seen()])
    for work in (trainer.train, trainer.evaluate, trainer.train):
        work()
        assert model._compiled_call_impl is None
    assert len(seen) == 4 and len(set(map(id, seen))) == 1 and (seen[0] is not None) == (backend == "sloth")
    assert trainer.model_wrapped is not model
    assert trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False) is model
    gone = weakref.ref(model)
    seen.clear()
    torch._dynamo.reset()
    del model, trainer, work
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("given", [True, False])
def test_a_model_that_is_made_within_a_training_is_compiled_too(given: bool, tmp_path: Path) -> None:
    """By model_init, anew in each; and where there was none before, as Ray's search of hyperparameters has it."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    seen: list[tuple] = []

    class Seen(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            seen.append((id(model), model._compiled_call_impl is not None))

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    told = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 2
    arguments = TrainingArguments(**told, max_steps=1, torch_compile_backend="sloth")
    make = lambda: LlamaForCausalLM(LlamaConfig(**sizes))  # noqa: E731
    trainer = Trainer(None, arguments, train_dataset=data, callbacks=[Seen()], model_init=make)
    first = trainer.model
    trainer.model = first if given else None
    trainer.train()
    assert seen == [(id(trainer.model), True)] and trainer.model is not first
    assert trainer.model._compiled_call_impl is first._compiled_call_impl is None


class Frozen(nn.Module):
    """Stays in evaluation mode, as some models have it."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


@pytest.mark.parametrize("frozen", [False, True])
def test_modes_are_set_as_modules_set_them(frozen: bool) -> None:
    """Trainer's short walk, whatever was done to a module in between."""
    made = lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(Frozen() if frozen else nn.Dropout(), nn.ReLU()))  # noqa: E731
    one, other = made(), made()
    for mode, changed in [(True, None), (True, 0), (False, 1), (False, None), (True, 1), (True, None)]:
        for model in (one, other):
            if changed is not None:
                model[changed].train(not mode)
        assert set_mode(one, mode) is one
        other.train(mode)
        assert [m.training for m in one.modules()] == [m.training for m in other.modules()]


def test_a_train_that_does_more_is_called() -> None:
    calls: list[bool] = []

    class Counting(nn.Module):
        def train(self, mode: bool = True) -> Any:
            calls.append(mode)
            return super().train(mode)

    set_mode(nn.Sequential(nn.ReLU(), Counting()))
    assert calls == [True]
    set_by_user = nn.ReLU()
    set_by_user.train = calls.append  # pyright: ignore[reportAttributeAccessIssue]
    set_mode(nn.Sequential(set_by_user))
    assert calls == [True, True]


def test_a_train_of_the_users_stays() -> None:
    """Set on the model while it trains, it is called, and there behind the step."""
    model = nn.Sequential(nn.ReLU())
    with _answering(model, "train", partial(set_mode, model)):
        model.train()
        assert "train" not in vars(model), "whoever copies the model in a step copies nothing of ours"
        mine = vars(model)["train"] = lambda mode=True: model
    assert vars(model)["train"] is mine
    with _answering(model, "train", partial(set_mode, model)):
        assert vars(model)["train"] is mine


@pytest.mark.parametrize("backend", ["sloth", "eager"])
def test_while_a_trainer_trains_modules_are_walked_over_once(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under sloth; the count of operations is what it was, and nothing is left of it behind the training."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

    counted: list[dict] = []
    count = PreTrainedModel.num_parameters
    monkeypatch.setattr(
        PreTrainedModel, "num_parameters", lambda self, *args, **kwargs: (counted.append(kwargs), count(self, *args, **kwargs))[1]
    )
    walks: list[bool] = []
    train = PreTrainedModel.train

    def walk(self: Any, mode: bool = True) -> Any:
        walks.append(mode)
        return train(self, mode)

    monkeypatch.setattr(PreTrainedModel, "train", walk)
    copies: list[Any] = []

    class Copies(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            copies.append(vars(copy.copy(model)))

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    before, held = count(model, exclude_embeddings=True), set(vars(model))
    told = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(**told, max_steps=3, per_device_train_batch_size=2, torch_compile_backend=backend)
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Copies()])
    trainer.train()
    assert trainer.state.total_flos == 3 * 6 * 8 * before
    assert not any({"train", "num_parameters"} & set(held) for held in copies) and len(copies) == 3
    in_steps = [given for given in counted if given.get("exclude_embeddings")]
    assert len(in_steps) == (1 if backend == "sloth" else 3)
    assert len(walks) == (0 if backend == "sloth" else 2 * 3), "of LlamaForCausalLM and LlamaModel in it"
    assert model.training and not {"train", "num_parameters"} & set(vars(model)) and held <= set(vars(model))
    model.another = nn.Linear(8, 16, bias=False)
    trainer.train()
    assert trainer.state.total_flos == 3 * 6 * 8 * (before + 8 * 16), "counted anew in another training"


def test_training_without_sloth_needs_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a model before it begins, as in a search of hyperparameters with Ray; a torch that lacks our names trains too."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    monkeypatch.setitem(sys.modules, "sloth.integrations.generation", None)  # it cannot be imported
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    told = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 2
    arguments = TrainingArguments(**told, max_steps=1)
    trainer = Trainer(None, arguments, train_dataset=data, model_init=lambda: LlamaForCausalLM(LlamaConfig(**sizes)))
    trainer.model = None  # run_hp_search_ray: models do not pickle
    assert trainer.train().global_step == 1


# ---------------------------------------------------------------- LLaMA-Factory


def make(through: Any) -> Any:
    """A function as LLaMA-Factory puts it around each checkpoint."""

    def wrapper(func: partial, *args: Any) -> Any:
        module = func.func.__self__
        if not any(p.requires_grad for p in module.parameters()):
            return func(*args)
        for arg in args:
            if torch.is_tensor(arg) and torch.is_floating_point(arg):
                arg.requires_grad_(True)
                break
        return through(func, *args)

    return wrapper


class Checkpointed(nn.Module):
    """As transformers calls its layers up to 5.8."""

    around: Any

    def __call__(self, x: Tensor) -> Tensor:
        return self.around(partial(super().__call__), x)


class Layer(Checkpointed):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.adapter = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.frozen(x) + self.adapter(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_trainable_layers_are_in_the_graph(reentrant: bool) -> None:
    llamafactory._teach(SimpleNamespace(get_custom_gradient_checkpointing_func=make))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8).requires_grad_(False), Layer(), Layer())
    for layer in model[1:]:
        layer.around = make(partial(checkpoint, use_reentrant=reentrant))
    ids = torch.arange(6)[None]
    model(ids).sum().backward()
    eager = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch._dynamo.reset()
    counters.clear()
    torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})(ids).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters["graph_break"]
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], eager)


# ---------------------------------------------------------------- generate()


def test_who_compiled_a_call_is_known() -> None:
    model = nn.Linear(2, 2)
    assert not generation.is_compiled_for_sloth(model._compiled_call_impl)
    model.compile(backend="inductor")
    assert not generation.is_compiled_for_sloth(model._compiled_call_impl)
    model.compile(backend="sloth")
    assert generation.is_compiled_for_sloth(model._compiled_call_impl)


# ---------------------------------------------------------------- what breaks a graph


def test_a_broken_graph_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from sloth.rewriter import notices

    monkeypatch.setattr(notices, "_said", set())

    def broken(x: Tensor) -> Tensor:
        y = torch.sigmoid(x) * 2
        torch._dynamo.graph_break()
        return torch.sigmoid(y) * 2

    torch._dynamo.reset()
    counters.clear()
    with listening() as reports:
        torch.compile(broken, backend="sloth", options={"sloth.inner_backend": "eager"})(torch.randn(3))
    told = [r.getMessage() for r in caplog.records if r.name == "sloth" and "not one graph" in r.getMessage()]
    counters.clear()
    assert len(reports) == 2 and len(told) == 1 and "TORCH_LOGS=graph_breaks" in told[0]


# ---------------------------------------------------------------- all of them


def test_every_touch_finds_what_it_touches() -> None:
    """A name of another package that is gone is told here, not in somebody's run. LLaMA-Factory is not installed."""
    import_module("sloth.rewriter.backend")
    for name in {i.module for i in integrations() if not i.module.startswith("llamafactory")}:
        import_module(name)
    states = {(i.module, i.touches): i.state for i in integrations()}
    waiting = [key for key, state in states.items() if state == WAITING]
    assert all(module.startswith("llamafactory") for module, _ in waiting), waiting
    assert all(state in ("on", WAITING) for state in states.values()) and len(states) >= 15, states


def test_one_that_fails_costs_itself_alone(caplog: pytest.LogCaptureFixture) -> None:
    from sloth.integrations import integration

    @integration.integration("json", touches="no_such_name", why="nothing would be better")
    def touch(module: Any) -> None:
        module.no_such_name = module.no_such_name

    entered = integration._known.pop(("json", "no_such_name"))
    assert entered.state.startswith("off: AttributeError") and "json no_such_name is left alone" in caplog.text


# ---------------------------------------------------------------- PEFT


def test_adapters_are_switched_and_back_in_one_graph_each() -> None:
    """As TRL does for the reference's pass. PEFT's layers share one list of what is active until they are switched."""
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin
    from peft import LoraConfig, get_peft_model
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(inner, LoraConfig(r=2, target_modules=["0", "1"]))
    model.add_adapter("ref", model.peft_config["default"])
    plugin = TorchDynamoPlugin(backend="sloth")
    compiled = Accelerator(cpu=True, dynamo_plugin=plugin).prepare(model)
    x = torch.randn(3, 8)
    for _ in range(3):
        compiled(x)
        model.set_adapter("ref")
        compiled(x)
        model.set_adapter("default")
    assert counters["stats"]["unique_graphs"] == 2
