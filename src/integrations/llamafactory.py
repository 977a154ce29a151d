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

from torch._dynamo.variables.misc import GetAttrVariable, SuperVariable

from sloth.integrations.import_hook import when_imported
from sloth.integrations.transformers import is_ours, leave_out


def _teach(checkpointing: ModuleType) -> None:
    """`checkpointing` is llamafactory.model.model_utils.checkpointing."""
    make = getattr(checkpointing, "get_custom_gradient_checkpointing_func", None)
    leave_out(c for c in getattr(getattr(make, "__code__", None), "co_consts", ()) if isinstance(c, CodeType))


def _knowing_self(look_up: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's look-up of an attribute of `super().method`."""

    @wraps(look_up)
    def var_getattr(self: GetAttrVariable, tx: Any, name: str) -> Any:
        if name == "__self__" and isinstance(self.obj, SuperVariable) and self.obj.objvar is not None and is_ours(tx):
            return self.obj.objvar
        return look_up(self, tx, name)

    return var_getattr


GetAttrVariable.var_getattr = _knowing_self(GetAttrVariable.var_getattr)
when_imported("llamafactory.model.model_utils.checkpointing", _teach)
