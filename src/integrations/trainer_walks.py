"""Trainer walks over all modules of its model in every step, and finds what it found in the step before.

For each micro-batch it calls `model.train()`, which sets the mode of every module, and counts the parameters that are no
embedding's, for `total_flos`. A model of 32 layers with adapters on all projections has 2,700 modules: 17 ms of the host
together, in which the GPU waits, of a micro-batch of 300 (QLoRA, 8B, H200). Under sloth modules are looked at, and set only if
one is in another mode; parameters are counted once in a training. For these two calls the model answers itself; whoever copies
or saves it in between finds nothing of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import ModuleType
from typing import Any

from sloth.integrations.integration import integration

COUNTED = "sloth_counted"  # in vars(trainer): the state of a training, and how many parameters its model had


@contextmanager
def _answering(model: Any, name: str, answer: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile `model.name(…)` is this, unless its user has set another."""
    if name in vars(model):
        yield
        return
    vars(model)[name] = answer
    try:
        yield
    finally:
        if vars(model).get(name) is answer:
            del vars(model)[name]


def set_mode(model: Any, mode: bool = True) -> Any:
    """`model.train(mode)`: nothing is done where every module is in this mode already, and `train` of none does more."""
    vars(model).pop("train", None)  # the first call alone: what the step does then is the model's
    rest, usual = [model], _usual()
    while rest:
        module = rest.pop()
        if module.training is not mode or "train" in module.__dict__ or type(module).train not in usual:
            return model.train(mode)
        rest += [child for child in module._modules.values() if child is not None]
    return model


def _usual() -> list[Callable[..., Any]]:
    """torch's, and that of transformers' models, which does more only where the mode changes."""
    from torch.nn import Module

    transformers = sys.modules.get("transformers.modeling_utils")
    return [Module.train] if transformers is None else [Module.train, transformers.PreTrainedModel.train]


def _is_for_sloth(trainer: Any) -> bool:
    """Asked of everybody's trainers, so nothing is imported for it; one whose model is yet to be made holds None."""
    from sloth.integrations.accelerate import is_for_sloth  # which imports this module

    compiled = getattr(trainer.model, "_compiled_call_impl", None)
    generation = sys.modules.get("sloth.integrations.generation")  # loaded where anything is compiled for sloth
    return is_for_sloth(trainer.accelerator) or bool(compiled and generation and generation.is_compiled_for_sloth(compiled))


@integration("transformers.trainer", touches="Trainer.training_step", why="modes are set where they differ, not in every step")
def _look_first(module: ModuleType) -> None:
    step = module.Trainer.training_step

    @wraps(step)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_for_sloth(self):
            return step(self, *args, **kwargs)
        with _answering(self.model, "train", partial(set_mode, self.model)):
            return step(self, *args, **kwargs)

    module.Trainer.training_step = training_step


@integration("transformers.trainer", touches="Trainer.floating_point_ops", why="parameters are counted once, not in every step")
def _count_once(module: ModuleType) -> None:
    count = module.Trainer.floating_point_ops

    @wraps(count)
    def floating_point_ops(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if not hasattr(model, "num_parameters") or not _is_for_sloth(self):
            return count(self, *args, **kwargs)
        state, counted = vars(self).get(COUNTED, (None, 0))
        if state is not self.state:
            counted = model.num_parameters(exclude_embeddings=True)
            vars(self)[COUNTED] = self.state, counted

        def num_parameters(only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
            if not only_trainable and exclude_embeddings:
                return counted
            del vars(model)["num_parameters"]
            return model.num_parameters(only_trainable, exclude_embeddings)

        with _answering(model, "num_parameters", num_parameters):
            return count(self, *args, **kwargs)

    module.Trainer.floating_point_ops = floating_point_ops
