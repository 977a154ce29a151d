"""What sloth was tested with, and, by area, every private name of torch and Triton that it uses.

    dispatch.py   fake tensors, the dispatcher, autograd, autocast, the contexts of a compilation
    dynamo.py     Dynamo: variables, sources, guards
    inductor.py   Inductor and the partitioner
    triton.py     launching kernels, and Triton's interpreter

`src/` names none of them elsewhere: tests/test_compat.py asserts it, and uses each name for what sloth uses it for. A name that
another torch lacks is not there: the module that imports it fails to import, and what it does is off, with a warning
(`load` in integrations/integration.py, rewriter/entry_point.py). This module alone imports no torch.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

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
