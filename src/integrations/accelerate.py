"""accelerate knows the name "sloth", so that Trainer and TRL take `torch_compile_backend="sloth"`, Accelerator
`dynamo_backend="sloth"`, and what its launcher leaves open stays open.

accelerate keeps the names of backends in a closed enum, `DynamoBackend`, and refuses the others before Dynamo is asked. torch
calls `register` at the end of `import torch` (entry point group "torch.backends"); as soon as accelerate is imported, it adds one
member to the enum, and looks at `TorchDynamoPlugin`.

`accelerate launch` (so each `trl …` command, and a config file) tells the program of every flag that was not given, and
`--dynamo_use_dynamic` that was not given as `dynamic=False`: with that, each length of a batch is a compilation, and from the
ninth on nothing is compiled. Under sloth a flag that was not given is one that was not given: torch decides (`dynamic=None`).
Who wants static sizes says so in the program: `TorchDynamoPlugin(dynamic=False)`.

The model that `prepare` gives is the one it was given, compiled in place, not a wrapper of it. Trainers of preferences call the
model by its own name for the reference's pass: that pass ran uncompiled beside a compiled one, slower, and rounded otherwise, so
that the two differed (by 3 nats a text of a 1B shape in bf16) where nothing was trained yet.
"""

from functools import wraps
from types import ModuleType
from typing import Any

import sloth.integrations.registry  # noqa: F401  what else is met before anybody compiles
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


@integration(
    "accelerate.accelerator", touches="Accelerator.prepare_model",
    why="a model is compiled in place, for whoever calls it: so is the reference's pass in DPO",
)  # fmt: skip
def _compile_in_place(module: ModuleType) -> None:
    prepare = module.Accelerator.prepare_model

    @wraps(prepare)
    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        prepared, plugin = prepare(self, model, *args, **kwargs), self.state.dynamo_plugin
        if (
            plugin.backend.value != "SLOTH"
            or plugin.use_regional_compilation
            or getattr(prepared, "_orig_mod", None) is not model
        ):
            return prepared
        from sloth.integrations.generation import is_compiled_for_sloth  # not inside `import torch`
        from sloth.integrations.peft import lists_of_their_own

        if not is_compiled_for_sloth(model._compiled_call_impl):
            lists_of_their_own(model)
            model.compile(**plugin.to_kwargs())
        return model

    module.Accelerator.prepare_model = prepare_model
