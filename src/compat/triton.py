"""Private names around Triton's kernels: torch's launcher of them, and Triton's interpreter. Where one is gone, or Triton is not
installed, kernels are launched as Triton launches them, and none is interpreted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any

try:
    from torch._C import _cuda_getCurrentRawStream as raw_stream  # of a CUDA device; builds for CPUs have none
except ImportError:
    raw_stream = None
try:
    from triton.runtime import driver  # of the machine's GPU, made when its `active` is asked for
except ImportError:
    driver = None
try:
    from triton.runtime.cache import triton_key  # what caches know Triton by: a digest of its files, made once in a process
except ImportError:
    triton_key = str
try:
    # what @triton.jit gives under TRITON_INTERPRET=1
    from triton.runtime.interpreter import InterpretedFunction  # pyright: ignore[reportAssignmentType]
except ImportError:

    class InterpretedFunction:
        """No kernel is one."""


def active_driver() -> Any:
    """Triton's driver of this machine's GPU, made if there is none yet. None where that fails: whoever needs it is told then."""
    try:
        return None if driver is None else driver.active
    except Exception:
        return None


@contextmanager
def kernels_unread() -> Iterator[None]:
    """Meanwhile `torch.library.triton_op` does not read the sources of a function, and of all that it calls, to find the kernels
    in them: 25 ms for each operator.
    """
    import torch._library.triton as module

    name = "get_inner_triton_kernels"
    known = getattr(module, name, None)
    if known is not None:
        setattr(module, name, lambda fn: [])
    try:
        yield
    finally:
        if known is not None:
            setattr(module, name, known)


def static_launcher(compiled: Any) -> Any:
    """torch's launcher of a compiled Triton kernel, not loaded yet; None where it does not take the kernel."""
    if raw_stream is None or "cubin" not in getattr(compiled, "asm", ()):
        return None
    try:
        from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel  # since 2.11

        compiled._cubin_path = ""
        static = StaticallyLaunchedCudaKernel(compiled)
        return static if hasattr(static, "full_constexprs") else None
    except (ImportError, AttributeError, KeyError, NotImplementedError):  # tensor descriptors, another layout of torch's
        return None


def load_static(static: Any, compiled: Any, device: int) -> None:
    """Load it to this CUDA device."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        static.cubin_path = file.name
        static.load_kernel(device)


def launch_of(static: Any) -> Callable[..., None]:
    """What torch's loaded launcher calls in C, without the Python around it: of a grid of three, a stream and arguments."""
    scratch = (None,) * (bool(static.has_global_scratch) + bool(static.has_profile_scratch))
    launch, kinds = static.C_impl._launch_kernel, static.arg_tys + "O" * len(scratch)
    warps, shared = static.num_warps, static.shared

    def run(x: int, y: int, z: int, stream: int, *given: Any) -> None:
        # What it asks of `static` keeps that alive: it unloads the kernel when it goes.
        launch(static.function, x, y, z, warps, shared, kinds, (*given, *scratch), stream)

    return run


def compile_launcher(compiled: Any) -> None:
    """Have Triton's own launcher of a compiled kernel in its cache: C code, which some versions give to gcc."""
    active_driver().launcher_cls(compiled.src, compiled.metadata)
