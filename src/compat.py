"""What sloth was tested with, and what it asks of torch's private parts in more than one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from tempfile import NamedTemporaryFile
from typing import Any

TESTED = {  # first and last version of each package that the tests and benchmarks ran with
    "torch": ((2, 11), (2, 13)),
    "triton": ((3, 6), (3, 7)),
    "transformers": ((5, 17), (5, 24)),
    "peft": ((0, 21), (0, 21)),
    "bitsandbytes": ((0, 50), (0, 50)),
    "accelerate": ((1, 15), (1, 15)),
    "trl": ((1, 15), (1, 16)),
}


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_tested(package: str, found: str) -> bool:
    """Does the version lie in the window?"""
    first, last = TESTED[package]
    return first <= tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split("+")[0].split(".")[:2]) <= last


def window(package: str) -> str:
    """`2.11 to 2.13`"""
    return " to ".join(dict.fromkeys(".".join(map(str, v)) for v in TESTED[package]))


def static_launcher(compiled: Any, device: int) -> Any:
    """torch's launcher of a compiled Triton kernel, loaded to this CUDA device; None where it does not take the kernel."""
    if "cubin" not in getattr(compiled, "asm", ()):
        return None
    try:
        from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            compiled._cubin_path = file.name
            static = StaticallyLaunchedCudaKernel(compiled)
            static.load_kernel(device)
        return static if hasattr(static, "full_constexprs") else None
    except (ImportError, AttributeError, KeyError, NotImplementedError):  # tensor descriptors, another layout of torch's
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


def is_ours(tx: Any) -> bool:
    """Does Dynamo, whose InstructionTranslator `tx` is, trace for sloth? What it is taught holds for such graphs alone.

    But for two things that it can only be told for all: how to trace a function of PEFT's, and to skip a warning of
    transformers'.
    """
    return getattr(tx.output.compiler_fn, "__name__", None) == "sloth"
