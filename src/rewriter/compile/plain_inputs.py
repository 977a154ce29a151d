"""Compiled graphs are given plain tensors.

bitsandbytes keeps packed weights in a subclass of Tensor with a `__torch_function__` in Python. Each question asked of one (its
dtype, its device), and each operator called with one, goes through it, some 5 μs, and results are of the subclass again. A model
has hundreds of such weights, and an operator asks a dozen questions: a fifth of what the host does in a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from sloth.compat.dispatch import DisableTorchFunctionSubclass, disabled_torch_function


def plain_inputs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same with frozen tensors of such subclasses passed as what they are: tensors that share their memory."""

    def run(*args: Any) -> Any:
        with DisableTorchFunctionSubclass():  # or they are asked in Python whether they are frozen
            given = [a.as_subclass(torch.Tensor) if _is_dressed(type(a)) and not a.requires_grad else a for a in args]
        return compiled(*given)

    return run


@cache
def _is_dressed(kind: type) -> bool:
    """Has it a `__torch_function__`, and is no wrapper of other tensors, of which compilers know?"""
    if not issubclass(kind, torch.Tensor) or kind is torch.Tensor or hasattr(kind, "__tensor_flatten__"):
        return False
    return kind.__torch_function__ is not disabled_torch_function
