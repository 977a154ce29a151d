"""Weights that are not kept as they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class RematerializedWeight:
    """A weight without gradient that is made, for each use, of what it is kept as: tensors, or which inputs of the graph."""

    make: Callable[..., torch.Tensor]
    kept: Sequence[Any]
    shape: tuple[int, int]
    dtype: torch.dtype
    requires_grad = False

    def of(self, inputs: Sequence[Any]) -> RematerializedWeight:
        return replace(self, kept=[inputs[i] for i in self.kept])
