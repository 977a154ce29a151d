"""accelerate knows the name "sloth", so that Trainer and TRL take `torch_compile_backend="sloth"`, Accelerator
`dynamo_backend="sloth"`, and what its launcher leaves open stays open.

accelerate keeps the names of backends in a closed enum, `DynamoBackend`, and refuses the others before Dynamo is asked. torch
calls `register` at the end of `import torch` (entry point group "torch.backends"); as soon as accelerate is imported, it adds one
member to the enum, and looks at `TorchDynamoPlugin`.

`accelerate launch` (so each `trl …` command, and a config file) tells the program of every flag that was not given, and
`--dynamo_use_dynamic` that was not given as `dynamic=False`: with that, each length of a batch is a compilation, and from the
ninth on nothing is compiled. Under sloth a flag that was not given is one that was not given: torch decides (`dynamic=None`).
Who wants static sizes says so in the program: `TorchDynamoPlugin(dynamic=False)`.

Trainers of preferences call the model by its own name for the reference's pass, not what `prepare` gave: that pass ran uncompiled
beside a compiled one, slower, and rounded otherwise, so that the two differed (by 3 nats a text of a 1B shape in bf16) where
nothing was trained yet. While Trainer works, the model's own calls are compiled too; before and behind it they are not.
"""

import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any
from weakref import WeakSet

import sloth.integrations.registry
import sloth.integrations.trainer_walks  # noqa: F401  what else is met before anybody compiles
from sloth.integrations.integration import integration


def register() -> None:
    """What the entry point calls. To import this module is enough; it runs inside `import torch`, and never raises."""


DATACLASSES = "accelerate.utils.dataclasses"


@integration(DATACLASSES, touches="DynamoBackend", why="sloth is a backend by name in Trainer, TRL and accelerate")
def _add_name(module: ModuleType) -> None:
    enum = module.DynamoBackend
    if "SLOTH" in enum.__members__:
        return
    member = str.__new__(enum, "SLOTH")
    member._name_, member._value_ = "SLOTH", "SLOTH"
    type.__setattr__(enum, "SLOTH", member)
    enum._member_map_["SLOTH"] = enum._value2member_map_["SLOTH"] = member
    enum._member_names_.append("SLOTH")


@integration(DATACLASSES, touches="TorchDynamoPlugin.__post_init__", why="sizes stay open where the launcher was told nothing")
def _leave_open(module: ModuleType) -> None:
    plugin = module.TorchDynamoPlugin
    read = plugin.__post_init__

    @wraps(read)
    def __post_init__(self: Any) -> None:
        given = self.dynamic
        read(self)
        if given is None and self.dynamic is False and self.backend.value == "SLOTH":
            self.dynamic = None

    plugin.__post_init__ = __post_init__


_at_work: WeakSet[Any] = WeakSet()  # trainers; a model may be made anew within a training (model_init)
CALLS = "sloth_calls"  # in what accelerate makes of a model: the model's own calls, compiled


def is_for_sloth(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "dynamo_plugin", None)
    return getattr(getattr(plugin, "backend", None), "value", None) == "SLOTH"


@integration(
    "accelerate.accelerator", touches="Accelerator.prepare_model",
    why="in a trainer's work every call of its model is compiled: that of the reference in DPO",
)  # fmt: skip
def _compile_calls(module: ModuleType) -> None:
    prepare = module.Accelerator.prepare_model

    @wraps(prepare)
    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, model, *args, **kwargs)
        if not is_for_sloth(self) or self.state.dynamo_plugin.use_regional_compilation:
            return prepared
        if getattr(prepared, "_orig_mod", None) is model and model._compiled_call_impl is None:
            from sloth.compat.dynamo import allow_more_graphs  # not inside `import torch`
            from sloth.integrations.peft import lists_of_their_own

            lists_of_their_own(model)
            allow_more_graphs()
            calls = sys.modules["torch"].compile(model._call_impl, **self.state.dynamo_plugin.to_kwargs())
            vars(prepared)[CALLS] = calls  # it hands on to the model what is set in the usual way
            model._compiled_call_impl = calls if any(trainer.model is model for trainer in _at_work) else None
        return prepared

    module.Accelerator.prepare_model = prepare_model


@integration(
    "transformers.trainer", touches="Trainer.train, evaluate, predict",
    why="in a trainer's work every call of its model is compiled: that of the reference in DPO",
)  # fmt: skip
def _while_it_works(module: ModuleType) -> None:
    def working(work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = self.model  # None where Ray has yet to have it made
            compiled = getattr(before, "_compiled_call_impl", None) is not None  # for good, or by the work around this one
            if compiled or self in _at_work or not is_for_sloth(self.accelerator):
                return work(self, *args, **kwargs)
            _at_work.add(self)
            if before is not None:
                before._compiled_call_impl = vars(self.model_wrapped).get(CALLS)
            try:
                return work(self, *args, **kwargs)
            finally:
                _at_work.discard(self)
                for model in (before, self.model):
                    if model is not None:
                        model._compiled_call_impl = None

        return run

    for name in ("train", "evaluate", "predict"):
        setattr(module.Trainer, name, working(getattr(module.Trainer, name)))
