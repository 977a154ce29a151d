"""Kernels of opaque operators are compiled while Inductor compiles the graph around them.

An operator that is opaque to the compiler would compile its kernels when it is first called: seconds of the first step, in which
the GPU waits, one kernel after the other. Which kernels these are is known as soon as the call stands in a graph. A thread of its
own calls the operator's function with tensors that have no memory (of device "meta"): products and allocations cost nothing
there, and where a kernel would be launched it is compiled. Triton's passes and ptxas run without Python's lock.

That thread loads nothing onto the device, of which another may be recording a CUDA graph: whoever launches a kernel loads it. A
process that ends waits for the kernel that is being compiled, and for no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from sloth.kernels.common.device import compiled_for, standing_in

_jobs: set[Future] = set()
_locks: dict[int, threading.Lock] = {}


@cache
def _thread() -> ThreadPoolExecutor:
    """One: kernels that several operators launch are compiled once."""
    return ThreadPoolExecutor(1, "sloth-compiles-ahead")


def compile_ahead(function: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any) -> None:
    """Compile what `function` launches on the device for arguments like these, whose tensors are on "meta". What it raises is
    raised again where the operator is called.
    """
    try:
        job = _thread().submit(_compile, function, device, args, kwargs)
    except RuntimeError:  # the interpreter is about to end
        return
    _jobs.add(job)
    job.add_done_callback(_jobs.discard)


def _compile(function: Callable[..., Any], device: torch.device, args: tuple, kwargs: dict[str, Any]) -> None:
    if threading.main_thread().is_alive():
        with torch.no_grad(), torch.cuda.device(device), standing_in(device):
            function(*args, **kwargs)


def compiling_of(kernel: Any) -> threading.Lock:
    """To be held where it may be compiled: another thread would do so a second time."""
    if compiled_for() is not None and not threading.main_thread().is_alive():
        raise RuntimeError("the process ends, and nobody needs it")
    return _locks.setdefault(id(kernel), threading.Lock())
