"""Triton, or where it is not installed (macOS, Windows) or cannot be imported a stand-in: kernels can be defined. They are not
run, since operators take their ATen formulas there.
"""

from __future__ import annotations

import logging
from inspect import signature
from typing import Any

__all__ = ["THERE", "TensorDescriptor", "tl", "triton"]
THERE = True  # is it Triton?

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except Exception as e:
    THERE = False
    if not (isinstance(e, ModuleNotFoundError) and e.name == "triton"):
        logging.getLogger("sloth").warning(
            "sloth: Triton cannot be imported (%s: %s): operators take their ATen formulas. Install the one that torch asks for",
            type(e).__name__, e,
        )  # fmt: skip

    class _Kernel:
        """A function that nothing compiles."""

        def __init__(self, fn: Any):
            self.fn, self.__name__, self.arg_names = fn, fn.__name__, list(signature(fn).parameters)

    class _Absent:
        """Any name of Triton; as a decorator, one that makes a kernel."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _Kernel(args[0]) if len(args) == 1 and callable(args[0]) and not kwargs else self

    class TensorDescriptor:
        """No operand is one."""

    triton = tl = _Absent()
