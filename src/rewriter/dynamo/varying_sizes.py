"""Token ids of a trainer are dynamic in the first graph already.

Dynamo takes the sizes of the first batch for constants and compiles once more, with symbols, when it sees another length, and
again for another number of rows. A trainer's batches are padded to the longest of their rows, so each of these is a compilation
of the whole model for nothing. Where accelerate runs the training (Trainer, TRL, a loop of one's own with an Accelerator), the
sizes of integer and boolean inputs of up to two dimensions (ids, masks, labels, positions, where packed texts begin) are symbols
at once, equal sizes the same one, as with `dynamic=True`; so are the numbers that say how long the longest of packed texts is.
Floats stay constants, as without. So they are in models of FastLanguageModel, whoever feeds them:
the backend that these are compiled with has the attribute `lengths_vary`. Elsewhere, and with `dynamic=True` or `False`, sizes
are what Dynamo makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic

from sloth.compat.dispatch import is_traceable_wrapper_subclass
from sloth.compat.dynamo import GuardSource, config, innermost_backend, is_ours
from sloth.integrations.integration import integration

DIMENSIONS = (1, 2)  # length, or batch and length
LONGEST = ("['max_length_q']", "['max_length_k']")  # as names of sources end: what transformers passes on to attention


def _marking(context: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's choice of which sizes of an input are symbols."""

    @wraps(context)
    def automatic_dynamic(e: Any, tx: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        made = context(e, tx, source, *args, **kwargs)
        if not _is_tokens(e) or not _varies(source, tx):
            return made
        return replace(made, dynamic_sizes=[DimDynamic.DUCK if n > 1 else DimDynamic.STATIC for n in e.shape])

    return automatic_dynamic


def _opening(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's choice of whether a number is a symbol."""

    @wraps(wrap)
    def wrap_symint(self: Any, value: int, dynamism: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dynamism is None and value > 1 and self.source.name.endswith(LONGEST) and _varies(self.source, self.tx):
            dynamism = DimDynamic.DYNAMIC
        return wrap(self, value, dynamism, *args, **kwargs)

    return wrap_symint


def _varies(source: Any, tx: Any) -> bool:
    """Is it given to the model, by someone whose batches differ?"""
    return is_ours(tx) and source.guard_source is GuardSource.LOCAL and (sizes_vary() or _is_asked(tx))


def _is_tokens(e: Any) -> bool:
    if not isinstance(e, torch.Tensor) or isinstance(e, torch.nn.Parameter) or is_traceable_wrapper_subclass(e):
        return False
    return e.dim() in DIMENSIONS and not e.is_floating_point() and not e.is_complex()


def sizes_vary() -> bool:
    """Does a trainer feed the model, and is it left to Dynamo which sizes are symbols?"""
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    return bool(state and state._shared_state) and is_left_to_dynamo()


def _is_asked(tx: Any) -> bool:
    """Is the graph traced for a backend that says so?"""
    wrapper = innermost_backend(tx.output.compiler_fn)
    return getattr(getattr(wrapper, "compiler_fn", wrapper), "lengths_vary", False) and is_left_to_dynamo()


def is_left_to_dynamo() -> bool:
    """Is it neither `dynamic=True` nor `False`?"""
    return config.assume_static_by_default and config.automatic_dynamic_shapes


@integration(
    "torch._dynamo.variables.builder", touches="_automatic_dynamic", why="a trainer's lengths are symbols from the first graph on"
)
def _mark_sizes(module: ModuleType) -> None:
    module._automatic_dynamic = _marking(module._automatic_dynamic)


@integration(
    "torch._dynamo.variables.builder", touches="VariableBuilder.wrap_symint", why="how long packed texts are is no constant"
)
def _open_numbers(module: ModuleType) -> None:
    module.VariableBuilder.wrap_symint = _opening(module.VariableBuilder.wrap_symint)
