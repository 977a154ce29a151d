"""Inductor's code calls sloth's opaque operators as the Python functions that they are, not through torch's dispatcher.

A call through the dispatcher turns each argument into C++'s form and back, 5 to 10 μs of the host, and a model's step has
thousands of these calls while the GPU waits. What the dispatcher would add is not needed there: gradients were formed when the
graph was traced, and so were operands checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from sloth.compat import inductor
from sloth.compat.dispatch import OpOverload
from sloth.integrations.integration import integration
from sloth.rewriter.compile.kernels_ahead import compiled_ahead

_DIRECT: dict[OpOverload, Callable[..., Any]] = {}
_enter: list[Callable[[OpOverload], None]] = []  # once Inductor is imported


def called_directly(op: OpOverload, function: Callable[..., Any], compile_ahead: Callable[..., None] | None = None) -> None:
    """Let graphs that Inductor compiles call `function`, which takes the arguments of `op` and returns what it returns.
    `compile_ahead(function, device, *args, **kwargs)` is told of each call in a graph that is compiled for a GPU; tensors among
    the arguments then have no memory.
    """
    _DIRECT[op] = function
    if compile_ahead is not None:
        compiled_ahead(op, partial(compile_ahead, function))
    for enter in _enter:
        enter(op)


@integration(
    "torch._inductor.select_algorithm",
    touches="extern_kernels",
    why="sloth's operators are called without the dispatcher",
)
def _call_directly(module: ModuleType) -> None:
    codegen, custom, virtualized = inductor.CUSTOM_EXTERN_KERNEL_CODEGEN, inductor.CustomCodegen, inductor.V

    def write(name: str, node: Any, writeline: Callable[[str], None]) -> None:
        """The call of an operator as Inductor writes it, by another name."""
        node.python_kernel_name = name
        virtualized.graph.wrapper_code.generate_fallback_kernel(node)

    def enter(op: OpOverload) -> None:
        name = str(op).replace(".", "_")
        setattr(module.extern_kernels, name, _DIRECT[op])
        codegen[f"torch.ops.{op}"] = custom(python=partial(write, f"extern_kernels.{name}"))

    for op in _DIRECT:
        enter(op)
    _enter.append(enter)
