"""Where a kernel runs, and how it is launched: so that Inductor can see it, or by an operator that is opaque to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.library import wrap_triton

from sloth.kernels.common.device import device_of
from sloth.kernels.common.language import InterpretedFunction, TensorDescriptor


def use_triton(x: torch.Tensor) -> bool:
    """Triton on GPUs; elsewhere the ATen formula, which Inductor fuses. Triton has no fp64 worth using, so fp64 is ATen too."""
    return device_of(x.device).triton and x.dtype != torch.float64


def launch(kernel):
    """The kernel as a node that Inductor can see, or as it is under Triton's interpreter (TRITON_INTERPRET=1)."""
    return kernel if isinstance(kernel, InterpretedFunction) else wrap_triton(kernel)


_launchers: dict[tuple, Callable] = {}
LAUNCHERS = 4096  # kept at most: sizes may be others in every step


def launch_opaque(
    kernel,
    grid: tuple[int, ...],
    operands: list[Tensor | TensorDescriptor],
    numbers: list[int],
    constants: dict[str, Any],
    **options,
) -> None:
    """kernel[grid](*operands, *numbers, **constants, **options), these in the order of the kernel's parameters.

    Triton finds what it has compiled by looking at each argument and by writing the options out as text, 20 … 50 μs of the host
    in every launch, and a model's step has thousands. Here it is found by what it was compiled for: 5 … 10 μs.
    """
    if isinstance(kernel, InterpretedFunction):
        kernel[grid](*operands, *numbers, **constants, **options)
        return
    key = id(kernel), torch.cuda.current_device(), grid, *map(_kind, operands), *numbers, *constants.values(), *options.values()
    if (launcher := _launchers.get(key)) is not None:
        launcher(*operands, *numbers, *constants.values())
        return
    compiled = kernel[grid](*operands, *numbers, **constants, **options)
    if len(_launchers) >= LAUNCHERS:
        _launchers.clear()
    _launchers[key] = compiled[grid + (1,) * (3 - len(grid))]


def _kind(x: Tensor | TensorDescriptor) -> tuple:
    """What Triton compiles for."""
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    return x.dtype, x.data_ptr() % 16 == 0


def compiling() -> bool:
    """Is a graph being traced for a compiler, so that what is done here in ATen becomes its kernels?"""
    return detect_fake_mode() is not None


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """Operators say themselves which dtypes they compute in: ambient autocast must not cast the operands of their products."""
    return torch.autocast(x.device.type, enabled=False)


def no_derivative(*tensors: torch.Tensor | None) -> None:
    """For operators that have none: gradients are refused, not silently lost. A formula for autograd that raises would do so
    too, but passing through autograd takes the host 10 μs in every call, and a model makes thousands in a step.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("this operator of sloth has no derivative: it is a part of others that have one")


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where an input has it: low precision is for storage only."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., D] as [N, D] with unit stride along D: a view where the strides allow it, otherwise a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
