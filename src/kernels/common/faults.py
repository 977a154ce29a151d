"""A kernel that cannot be compiled, loaded or launched costs its speed, not the run: its operator takes its ATen formula then.

Both compute the same, and a kernel that was not launched has written nothing, so the formula begins anew in the middle of a step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch

from sloth.kernels.common.device import compiled_for

ENTRIES: dict[str, str] = {}  # by operator, the entries or construct that `sloth.disable` names, comma-separated
_lost: set[str] = set()  # operators whose kernels are not used any more
_inside = threading.local()  # operator: the one that this thread runs


class KernelFault(RuntimeError):
    """A kernel could not be compiled, loaded or launched."""


def blame(kernel: Any, e: Exception) -> NoReturn:
    """Raise what a launch that raised `e` is to raise: the kernel's fault, unless memory is not there or the device is broken."""
    if isinstance(e, KernelFault | torch.OutOfMemoryError | torch.AcceleratorError):
        raise e
    if "out of memory" in str(e):  # so Triton says it, when it loads a kernel
        raise torch.OutOfMemoryError(str(e)) from e
    name = getattr(getattr(kernel, "fn", kernel), "__name__", "kernel")
    raise KernelFault(f"{name}: {type(e).__name__}: {e}".split("\n")[0][:300]) from e


def falls_back(operator: str, entry: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For an operator's function, which asks `use_triton`: after a fault of a kernel it is called again, and is told no. entry:
    that calls it.
    """
    ENTRIES[operator] = entry

    def decorator(fn: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            around, lost = getattr(_inside, "operator", None), operator in _lost
            _inside.operator = operator
            try:
                return fn(*args, **kwargs)
            except KernelFault as e:
                if lost or compiled_for() is not None:  # compiled ahead: perhaps for nobody
                    raise
                why = str(e)
            finally:
                _inside.operator = around
            return _again(run, operator, why, args, kwargs)

        return run

    return decorator


def _again(run: Callable[..., Any], operator: str, why: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """By ATen; what the fault left behind is gone by now."""
    _lost.add(operator)
    try:
        found = run(*args, **kwargs)
    except Exception:
        _lost.discard(operator)  # it is no better
        raise
    logging.getLogger("sloth").warning(
        "sloth: %s is computed by ATen from now on, since a kernel of it cannot be used (%s). SLOTH_OPTIONS='sloth.disable=%s'"
        " leaves what calls it to Inductor. Please report this",
        operator, why, ENTRIES[operator],
    )  # fmt: skip
    return found


def without_kernels() -> bool:
    """Has the operator that this thread runs lost its kernels?"""
    return bool(_lost) and getattr(_inside, "operator", None) in _lost
