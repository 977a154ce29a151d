"""LLaMA-Factory's checkpointing of trainable layers, traced without a break of the graph.

Around each layer's checkpoint it puts a function that asks the layer for its parameters (`func.func.__self__`, where `func` is
`super().__call__`), and calls `requires_grad_(True)` on the hidden states. Dynamo knows neither: with adapters each layer is a
graph of its own, over a quantised model all layers run without a compiler. The first is answered here, the second is the hook of
transformers' models written once more (see sloth.integrations.transformers).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import CodeType, ModuleType
from typing import Any

from sloth.compat.dynamo import GetAttrVariable, SuperVariable, is_ours
from sloth.integrations.integration import integration
from sloth.integrations.transformers import leave_out


@integration(
    "llamafactory.model.model_utils.checkpointing", touches="get_custom_gradient_checkpointing_func",
    why="its requires_grad_() is traced without a break of the graph",
)  # fmt: skip
def _teach(checkpointing: ModuleType) -> None:
    """Dynamo alone is told."""
    constants = checkpointing.get_custom_gradient_checkpointing_func.__code__.co_consts
    leave_out(c for c in constants if isinstance(c, CodeType))


def _knowing_self(look_up: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's look-up of an attribute of `super().method`."""

    @wraps(look_up)
    def var_getattr(self: GetAttrVariable, tx: Any, name: str) -> Any:
        if name == "__self__" and isinstance(self.obj, SuperVariable) and self.obj.objvar is not None and is_ours(tx):
            return self.obj.objvar
        return look_up(self, tx, name)

    return var_getattr


@integration("torch._dynamo.variables.misc", touches="GetAttrVariable.var_getattr", why="super().__call__.__self__ is traced")
def _know_self(misc: ModuleType) -> None:
    misc.GetAttrVariable.var_getattr = _knowing_self(misc.GetAttrVariable.var_getattr)
