"""Which activations are kept, and the switch between training and generating."""

from __future__ import annotations

import sys
from typing import Any

import torch

from sloth.models.arguments import one_of
from sloth.models.compiled import set_offloading, steps_backend
from sloth.rewriter.notices import tell_once
from sloth.saving.merged import base_of

# What scripts write, and whether it checkpoints and offloads.
KINDS = {False: (False, False), True: (True, False), "sloth": (True, True), "unsloth": (True, True)}


def kind_of(given: Any) -> tuple[bool, bool]:
    """Whether layers are checkpointed, and whether their inputs wait in host memory. Raises ValueError that lists the kinds."""
    return one_of("use_gradient_checkpointing", given, KINDS)


def checkpoint(model: Any, wanted: bool) -> None:
    """Switch checkpointing of layers on or off. It is not re-entrant: a re-entrant one needs inputs that require gradients.

    Raises ValueError for a model that has none.
    """
    if not wanted:
        if is_checkpointed(model):
            model.gradient_checkpointing_disable()
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} cannot checkpoint its layers: give use_gradient_checkpointing=False")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def is_checkpointed(model: torch.nn.Module) -> bool:
    """Does any of its layers checkpoint?"""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def for_training(model: Any, use_gradient_checkpointing: Any = None) -> Any:
    """Training mode: dropout is on, and keys and values are not kept. use_gradient_checkpointing: None leaves it as it is.

    Returns the model. Raises ValueError for a kind that is not known, and for a model that cannot checkpoint.
    """
    if use_gradient_checkpointing is not None:
        wanted, offload = kind_of(use_gradient_checkpointing)
        checkpoint(base_of(model), wanted)
        set_offloading(model, offload)
    model.train()
    base_of(model).config.use_cache = False
    _stop(model)
    return model


def for_inference(model: Any, replay_steps: bool | None = None) -> Any:
    """Evaluation mode: dropout is off, keys and values are kept for `generate`. Returns the model.

    replay_steps: on a GPU with CUDA graphs, does `generate` replay the forward pass of a token (docs/guides/generation.md), with
    the same weights, which are not copied, until `for_training`? The first time takes half a minute and more for 32 layers. None:
    once so many tokens were asked for that it pays.
    """
    model.eval()
    base = base_of(model)
    for config in (base.config, getattr(base, "generation_config", None)):
        if config is not None:  # of a model that was saved behind a training, both say no
            config.use_cache = True
    if replay_steps or replay_steps is None and any(p.is_cuda for p in model.parameters()):
        from sloth.generation.session import PAYS_AFTER, start  # not before: Dynamo takes a second to import

        if not start(base, steps_backend(), 0 if replay_steps else PAYS_AFTER) and replay_steps:
            tell_once("generating runs the model's own code: there are no CUDA graphs, or the model is on several devices")
    elif replay_steps is False:
        _stop(model)
    return model


def _stop(model: Any) -> None:
    """Let `generate` be transformers' own."""
    if (session := sys.modules.get("sloth.generation.session")) is not None:  # else nothing was started
        session.stop(base_of(model))
