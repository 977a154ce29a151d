"""Which implementation of an operator runs on which device: one table of all of them, and the one place that chooses.

    forward_for = implementations("sloth::gated_act", triton=forward_triton, aten=forward_aten)
    …
    return forward_for(gate, up)(gate, up, act)

Both take the same arguments and give the same results. `python -m sloth patterns --operators` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sloth.kernels.common.launch import use_triton

Implementation = Callable[..., Any]
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}  # by operator, "triton" and "aten"


def implementations(*operators: str, triton: Implementation, aten: Implementation) -> Callable[..., Implementation]:
    """Enter what computes operators, and return the function that chooses: "triton" where Triton's kernels run for all operands
    that it is given (None is no operand), else "aten".
    """
    of = {"triton": triton, "aten": aten}
    IMPLEMENTATIONS.update(dict.fromkeys(operators, of))

    def choose(*operands: Tensor | None) -> Implementation:
        for x in operands:
            if x is not None and not use_triton(x):
                return of["aten"]
        return of["triton"]

    return choose
