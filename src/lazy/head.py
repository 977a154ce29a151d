"""The head that lazy logits are made of: linear layers that are computed again whenever somebody reads.

    logits = step(x_1 W_1ᵀ + b_1, x_2 W_2ᵀ + b_2, …)      hidden = [x_1, x_2, …], side by side in the last dimension

A model's head is one layer, one with an adapter two. Frozen weights may be kept in another form (4 bits): they are made for each
use. What is computed is computed of the tensors as they were when the logits were given out (snapshot.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sloth.lazy.snapshot import Snapshot
from sloth.lazy.weights import RematerializedWeight

Layer = tuple[Tensor | RematerializedWeight, Tensor | None]  # weight, bias


@dataclass(eq=False)
class Head:
    """Shared by all that is made of its logits. autocast: (device type, dtype, enabled) that its layers stood in."""

    layers: Sequence[Layer]
    step: Callable[..., Tensor] | None  # of what each layer gives; None: the only one gives the logits
    autocast: tuple[str, torch.dtype, bool]

    def __post_init__(self) -> None:
        self.given = [t for layer in self.layers for t in layer]  # weight and bias of each
        kept = (t.kept if isinstance(t, RematerializedWeight) else (t,) for t in self.given if t is not None)
        self.snapshot = Snapshot([t for tensors in kept for t in tensors])

    def layers_then(self) -> Iterator[Layer]:
        """The layers, of the tensors as they were."""
        values = iter(self.snapshot.values)

        def then(t: Any) -> Any:
            if isinstance(t, RematerializedWeight):
                return replace(t, kept=[next(values) for _ in t.kept])
            return None if t is None else next(values)

        return ((then(weight), then(bias)) for weight, bias in self.layers)

    def dtype(self, weight: Tensor | RematerializedWeight) -> torch.dtype:
        """What its layer computes in: autocast knows no weights in other forms."""
        _, dtype, enabled = self.autocast
        return dtype if enabled and isinstance(weight, Tensor) and weight.dtype != torch.float64 else weight.dtype

    def operands(self, hidden: Tensor, layers: Sequence[Layer] | None = None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Input, weight and bias of each layer, as autocast gives them to it; layers: others than those that were."""
        inputs, found = hidden.split([weight.shape[1] for weight, _ in self.layers], -1), []
        for x, (weight, bias) in zip(inputs, layers or self.layers_then(), strict=True):
            dtype = self.dtype(weight)
            weight = weight.make(*weight.kept) if isinstance(weight, RematerializedWeight) else weight
            found.append((x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)))
        return found

    def logits(self, products: Sequence[Tensor]) -> Tensor:
        """Of what the layers give."""
        return products[0] if self.step is None else self.step(*products)

    def example(self, hidden: Tensor) -> Tensor:
        """No rows of logits."""
        like = lambda weight: hidden.new_empty(0, weight.shape[0], dtype=self.dtype(weight))  # noqa: E731
        return self.logits([like(weight) for weight, _ in self.layers])
