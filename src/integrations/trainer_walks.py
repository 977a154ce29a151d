"""Trainer walks over all modules of its model in every step, and finds what it found in the step before.

For each micro-batch it calls `model.train()`, which sets the mode of every module, and counts the parameters that are no
embedding's, for `total_flos`. A model of 32 layers with adapters on all projections has 2,700 modules: 17 ms of the host
together, in which the GPU waits, of a micro-batch of 300 (QLoRA, 8B, H200). While Trainer trains a model under sloth, both are
the model's own attributes: modules are looked at, and set only if one is in another mode; the count is that of the first time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any

from sloth.integrations.integration import integration

WALKS = ("train", "num_parameters")  # in vars(model), while it trains


def set_mode(model: Any, mode: bool = True) -> Any:
    """`model.train(mode)`: nothing is done where every module is in this mode already, and `train` of none does more."""
    from torch.nn import Module

    plain: dict[type, bool] = {}
    rest = [model]
    while rest:
        module = rest.pop()
        kind = type(module)
        if kind not in plain:
            plain[kind] = kind.train is Module.train
        own = "train" in module.__dict__ and module is not model  # set by its user; the model's is ours
        if module.training is not mode or own or not plain[kind] and _does_more(module):
            return type(model).train(model, mode)
        rest += [child for child in module._modules.values() if child is not None]
    return model


def _does_more(module: Any) -> bool:
    """Does its own `train`? That of transformers' models chooses kernels anew, for those that use the hub's."""
    transformers = sys.modules.get("transformers.modeling_utils")
    plain = transformers is not None and type(module).train is transformers.PreTrainedModel.train
    return not plain or getattr(module, "use_kernels", True)


def count(model: Any, known: list[int], only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """`model.num_parameters(…)`; what Trainer asks for is kept in `known`."""
    counted = partial(_plain(model, "num_parameters"), only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
    if only_trainable or not exclude_embeddings:
        return counted()
    if not known:
        known.append(counted())
    return known[0]


def _plain(model: Any, name: str) -> Callable[..., Any]:
    """The method as it is without ours."""
    ours = vars(model).pop(name)
    try:
        return getattr(model, name)  # of a PeftModel, its base's
    finally:
        vars(model)[name] = ours


def _is_for_sloth(trainer: Any) -> bool:
    """Asked of everybody's trainers, so nothing is imported for it; one whose model is yet to be made holds None."""
    from sloth.integrations.accelerate import is_for_sloth  # which imports this module

    compiled = getattr(trainer.model, "_compiled_call_impl", None)
    generation = sys.modules.get("sloth.integrations.generation")  # loaded where anything is compiled for sloth
    return is_for_sloth(trainer.accelerator) or bool(compiled and generation and generation.is_compiled_for_sloth(compiled))


@integration("transformers.trainer", touches="Trainer.train", why="modules are walked over once, not in every step")
def _walk_once(module: ModuleType) -> None:
    train = module.Trainer.train

    @wraps(train)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if not _is_for_sloth(self) or not hasattr(model, "num_parameters") or not vars(model).keys().isdisjoint(WALKS):
            return train(self, *args, **kwargs)
        vars(model).update(train=partial(set_mode, model), num_parameters=partial(count, model, []))
        try:
            return train(self, *args, **kwargs)
        finally:
            for name in WALKS:
                vars(model).pop(name, None)

    module.Trainer.train = run
