"""Python's collector of garbage leaves old objects alone while a graph is traced for sloth and compiled.

Tracing makes hundreds of thousands of objects that live until the graph is compiled. Each time their number has grown by a
quarter, Python walks over all of them, and over the model's and the trainer's, and finds next to nothing: an eighth of a first
step. Young objects are collected as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from sloth.compat.dynamo import callback_handler, is_ours
from sloth.integrations.integration import integration

NEVER = 10**6  # passes over the middle-aged, after which the old are due
_before: list[tuple[int, int, int]] = []


def _sparing(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's `trace` of a module's call."""

    @wraps(trace)
    def call_function(self: Any, tx: Any, *args: Any) -> Any:
        if not _before and is_ours(tx):
            _before.append(gc.get_threshold())
            gc.set_threshold(*_before[0][:2], NEVER)
        if _before and _resume not in callback_handler.end_callbacks:  # torch.compiler.reset() forgets them
            callback_handler.register_end_callback(_resume)
        return trace(self, tx, *args)

    return call_function


def _resume(_: Any) -> None:
    """As it was before, unless somebody has set it meanwhile. Old objects would be due at once, while all that was made for the
    graph is still there and about to be dropped: their passes are counted anew.
    """
    if _before:
        before = _before.pop()
        if gc.get_threshold() == (*before[:2], NEVER):
            gc.set_threshold(*before)
            gc.collect(1)
            if not gc.get_freeze_count():  # what somebody froze stays frozen
                gc.freeze()
                gc.unfreeze()


@integration(
    "torch._dynamo.variables.nn_module",
    touches="UnspecializedNNModuleVariable.call_function (garbage)",
    why="until what is traced is compiled, old objects are not searched for garbage",
)
def _spare_old_objects(module: ModuleType) -> None:
    module.UnspecializedNNModuleVariable.call_function = _sparing(module.UnspecializedNNModuleVariable.call_function)
