"""Where a kernel runs, and how it is launched: so that Inductor can see it, or by an operator that is opaque to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from sloth.compat.dispatch import detect_fake_mode
from sloth.compat.triton import (
    InterpretedFunction,
    compile_launcher,
    kernels_unread,
    launch_of,
    load_static,
    raw_stream,
    static_launcher,
)
from sloth.kernels.common.ahead import compiling_of
from sloth.kernels.common.device import compiled_for, device_of
from sloth.kernels.common.faults import blame, falls_back, without_kernels
from sloth.kernels.common.language import TensorDescriptor


def use_triton(x: torch.Tensor) -> bool:
    """Triton on GPUs; elsewhere the ATen formula, which Inductor fuses. Triton has no fp64 worth using, so fp64 is ATen too. So
    is an operator whose kernels failed.
    """
    return device_of(x.device).triton and x.dtype != torch.float64 and not without_kernels()


def launch(kernel):
    """The kernel as a node that Inductor can see, or as it is under Triton's interpreter (TRITON_INTERPRET=1)."""
    if isinstance(kernel, InterpretedFunction):
        return kernel
    return wrap_triton(kernel) if compiling() else _Launched(kernel)


class _Launched:
    """A kernel that is launched, or only compiled, with Triton's launcher of it, where that is done ahead."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **how: Any) -> None:
            try:
                with compiling_of(self.kernel):
                    if compiled_for():
                        compile_launcher(self.kernel.warmup(*args, grid=grid, **how))
                    else:
                        wrap_triton(self.kernel)[grid](*args, **how)
            except Exception as e:
                blame(self.kernel, e)

        return run


def triton_op(name: str, entry: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op` for a function of this package that writes to none of its operands. torch looks for the kernels
    in a function to put their sources into the keys of its caches; the whole package is in these already. entry: that calls it.
    """
    enter = torch.library.triton_op(name, mutates_args=())

    def decorator(fn: Callable[..., Any]) -> Any:
        with kernels_unread():
            return enter(falls_back(name, entry)(fn))

    return decorator


Launcher = Callable[[tuple[int, ...], list, list[int]], None]  # of a grid, operands and numbers
ONES = ((), (1, 1), (1,), ())  # that complete a grid of so many dimensions
ON_HIP = torch.version.hip is not None
LARGE = 2**31
_launchers: dict[tuple, Launcher] = {}
_any_sizes: dict[int, list[bool]] = {}  # by the id of a kernel, which lives as long as its module
_compiled: dict[tuple, Any] = {}  # what is not loaded yet


def launch_cached(
    kernel,
    grid: tuple[int, ...],
    operands: list[Tensor | TensorDescriptor],
    numbers: list[int],
    constants: dict[str, Any],
    **options,
) -> None:
    """kernel[grid](*operands, *numbers, **constants, **options), these in the order of the kernel's parameters. Descriptors among
    the operands come first.

    Triton finds what it has compiled by looking at each argument and by writing the options out as text, 20 … 50 μs of the host
    in every launch, and a model's step has thousands. Here it is found by what it was compiled for: 5 … 10 μs.
    Sizes that are others in every step belong into the kernel's `do_not_specialize`: it is compiled once for all of them.
    """
    if isinstance(kernel, InterpretedFunction):
        kernel[grid](*operands, *numbers, **constants, **options)
        return
    device = torch.cuda.current_device()
    any_size = _any_sizes.get(id(kernel)) or _note_any_sizes(kernel, len(operands))
    key = id(kernel), device, _kinds(operands), *_size_kinds(numbers, any_size), *constants.values(), *options.values()
    try:
        if (launcher := _launchers.get(key)) is None:
            compile_one = partial(kernel.warmup, *operands, *numbers, grid=grid, **constants, **options)
            with compiling_of(kernel):
                launcher = _new_launcher(key, compile_one, device, len(operands) + len(numbers), list(constants.values()))
        if launcher is not None and compiled_for() is None:
            launcher(grid, operands, numbers)
    except Exception as e:
        blame(kernel, e)


def _new_launcher(key: tuple, compile_one: Callable[[], Any], device: int, given: int, constants: list) -> Launcher | None:
    """None where kernels are compiled ahead: whoever launches this one loads it. given: how many operands and numbers it has."""
    if key not in _launchers and key not in _compiled:
        _compiled[key] = compile_one()
        if compiled_for():
            _prepare_launcher(_compiled[key])
    if key in _compiled and not compiled_for():
        _launchers[key] = _launcher_of(_compiled[key], device, given, constants)
        del _compiled[key]
    return _launchers.get(key)


def _prepare_launcher(compiled: Any) -> None:
    """What there is to do without the device."""
    if static_launcher(compiled) is None:
        compile_launcher(compiled)


def _launcher_of(compiled: Any, device: int, given: int, constants: list) -> Launcher:
    """Of a kernel with so many operands and numbers, through torch's launcher where that takes it. Triton's own is C code, which
    gcc compiles for a third of a second.
    """
    static = static_launcher(compiled)
    if static is None or len(static.arg_tys) != sum(i not in static.full_constexprs for i in range(given)):
        compiled[1, 1, 1]  # loads it
        return lambda grid, operands, numbers: compiled[grid + (1,) * (3 - len(grid))](*operands, *numbers, *constants)
    load_static(static, compiled, device)
    run, constant = static.run if ON_HIP else launch_of(static), {i for i in static.full_constexprs if i < given}

    def launch(grid: tuple[int, ...], operands: list, numbers: list[int]) -> None:
        run(*grid, *ONES[len(grid)], raw_stream(device), *operands, *numbers)

    def launch_without(grid: tuple[int, ...], operands: list, numbers: list[int]) -> None:
        passed = [a for i, a in enumerate((*operands, *numbers)) if i not in constant]
        run(*grid, *ONES[len(grid)], raw_stream(device), *passed)

    return launch_without if constant else launch  # a size of 1 is one


def _note_any_sizes(kernel: Any, operands: int) -> list[bool]:
    """Of its numbers, and what comes behind them: is it compiled once for all? (By the kernel's id: its hash takes a lock.)"""
    _any_sizes[id(kernel)] = known = [p.do_not_specialize for p in kernel.params[operands:]]
    return known


def _kinds(operands: list[Tensor | TensorDescriptor]) -> tuple:
    """What Triton compiles for."""
    if ON_HIP or not isinstance(operands[0], Tensor):
        return tuple(map(_kind, operands))
    dtypes, aligned = [x.dtype for x in operands], [x.data_ptr() % 16 == 0 for x in operands]
    return (*dtypes,) if all(aligned) else (*dtypes, *aligned)


def _kind(x: Tensor | TensorDescriptor) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0, ON_HIP and x.untyped_storage().nbytes() < LARGE
    return x.base.dtype, *x.block_shape


def _size_kinds(numbers: list[int], any_size: list[bool]) -> list[int]:
    """Likewise: 64 bits or 32; and, unless one kernel is for all sizes, 1, a multiple of 16, or another."""
    return [
        n >= LARGE if any_one else 4 * (n >= LARGE) + 2 * (n == 1) + (n % 16 == 0)
        for n, any_one in zip(numbers, any_size, strict=False)
    ]


def compiling() -> bool:
    """Is a graph being traced for a compiler, so that what is done here in ATen becomes its kernels?"""
    return detect_fake_mode() is not None


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """Operators say themselves which dtypes they compute in: ambient autocast must not cast the operands of their products."""
    return torch.autocast(x.device.type, enabled=False)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Does autograd record what is computed of these?"""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def no_derivative(*tensors: torch.Tensor | None) -> None:
    """For operators that have none: gradients are refused, not silently lost. A formula for autograd that raises would do so
    too, but passing through autograd takes the host 10 μs in every call, and a model makes thousands in a step.
    """
    if needs_gradient(*tensors):
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
