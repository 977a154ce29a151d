"""For which operands and numbers an operator computes what its patterns' references compute.

A reference is traced for the operands of a match and must be the model's code. That the operator's formula is the reference's is
proven for real numbers, so each operator says once what it takes, and legality asks that of every match, whatever the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch

from sloth.compat.dispatch import OpOverload
from sloth.rewriter.graph.value import same_literal, values_in

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int64,)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Domain:
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    numbers: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)


_DOMAINS: dict[OpOverload, Domain] = {}


def domain(op: OpOverload, numbers: Mapping[str, Callable[[Any], bool]] | None = None, **dtypes: tuple[torch.dtype, ...]) -> None:
    """State what `op` takes. dtypes: of its arguments by name; those that are not named take floating-point numbers alone.
    numbers: by argument, a function whose name says what a number that is given must be.
    """
    _DOMAINS[op] = Domain(dtypes, numbers or {})


def has_domain(op: OpOverload) -> bool:
    return op in _DOMAINS


def finite(number: Any) -> bool:
    return -inf < number < inf


def positive(number: Any) -> bool:
    return 0 < number < inf


def not_zero(number: Any) -> bool:
    return number != 0 and finite(number)


def inverse(number: float) -> float:
    """For options: 1 / number, and of 0 what is in no domain."""
    return 1.0 / number if number else inf


def outside(op: OpOverload, arguments: Mapping[str, Any]) -> str:
    """Why `op` does not take these arguments, Values and numbers by name; empty where it does. A tensor without elements is in no
    domain: sums over nothing, and launches of no programs.
    """
    stated = _DOMAINS.get(op)
    for name, given in arguments.items():
        for v in values_in((given,)):
            if any(same_literal(size, 0) for size in v.meta.shape):
                return f"{name} is {list(v.meta.shape)}, without elements"
            if stated is not None and v.meta.dtype not in stated.dtypes.get(name, FLOATS):
                return f"{name} is {v.meta.dtype}"
        number = stated is not None and isinstance(given, int | float) and stated.numbers.get(name)
        if number and not number(given):
            return f"{name} is {given}, not {number.__name__.replace('_', ' ')}"
    return ""
