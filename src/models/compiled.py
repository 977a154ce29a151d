"""A model compiled in place: it stays what it was, with HF's names and methods, and its calls run sloth's graphs.

`model.compile(…)` keeps the class, `state_dict()` (no `_orig_mod`), `save_pretrained` and `generate`, which runs uncompiled.
Sizes of ids, masks and labels are symbols from the first graph on, whoever feeds the model
(sloth.rewriter.dynamo.varying_sizes).
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch

from sloth.rewriter.notices import warn_once

OFFLOAD = "sloth.checkpoint_offload"


@cache
def _backend() -> Any:
    from sloth.rewriter.backend import sloth as backend

    @wraps(backend)  # by its name Dynamo's teachers know it
    def sloth(*args: Any, **kwargs: Any) -> Any:
        return backend(*args, **kwargs)

    vars(sloth)["lengths_vary"] = True
    return sloth


@cache  # Dynamo compiles anew for another function
def steps_backend() -> Any:
    """The backend that steps of generating are compiled with; it is imported when the first of them is."""

    def sloth(*args: Any, **kwargs: Any) -> Any:
        return _backend()(*args, **kwargs)

    vars(sloth)["lengths_vary"] = True
    return sloth


def compile_in_place(model: torch.nn.Module, offload: bool = False) -> None:
    """Compile the calls of `model`, and only of it. offload: `use_gradient_checkpointing="sloth"`."""
    for module in model.modules():
        if module._compiled_call_impl is not None:  # of a model that has become a part of this one
            module._compiled_call_impl = None
    model.compile(backend=_backend(), options={OFFLOAD: True} if offload else None)


def set_offloading(model: torch.nn.Module, wanted: bool) -> None:
    """Whether inputs of checkpointed layers wait in host memory, from the model's next call on, which then compiles anew.

    A model that is not compiled for sloth stays as it is.
    """
    from sloth.integrations.generation import backend_of  # not before: Dynamo takes a second to import

    backend = backend_of(model._compiled_call_impl)
    held = {} if backend is None else backend.kwargs.get("options", {})
    if backend is None or bool(held.get(OFFLOAD)) == wanted:
        return
    if "mode" in backend.kwargs:
        warn_once("inputs of layers stay on the device: torch.compile takes a mode, as this model has, or options, not both")
        return
    options = {name: value for name, value in held.items() if name != OFFLOAD} | ({OFFLOAD: True} if wanted else {})
    model.compile(backend=backend.compiler_fn, dynamic=backend.dynamic, options=options or None)
