"""Some rows of a head's logits, and how many of them are computed at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth.kernels.common.launch import without_autocast
from sloth.lazy.head import Head
from sloth.lazy.snapshot import Claim, Snapshot

CHUNK = 64 * 2**20  # bytes of logits at a time

Step = Callable[[Tensor], Tensor]  # [..., V] -> [..., V], each row by itself
Pick = Callable[[Tensor], Tensor]  # [..., K] -> others of its rows [..., K], for any K


class LogitsSource:
    """Some rows of a head's logits: what all that is computed of them shares. hidden [..., H]: what they are computed of."""

    def __init__(self, head: Head, hidden: Tensor):
        self.head, self.picks = head, ()
        self.need: list[bool] = []  # which of hidden states, and weight and bias of each layer, want a gradient
        self.snapshot = Snapshot([hidden.detach()])
        (self.hidden,) = self.snapshot.values

    def picked(self, pick: Pick) -> LogitsSource:
        """Others of its rows."""
        found = LogitsSource.__new__(LogitsSource)
        found.head, found.need, found.snapshot = self.head, self.need, self.snapshot
        found.hidden, found.picks = pick(self.hidden), (*self.picks, pick)
        if found.hidden.untyped_storage()._cdata != self.hidden.untyped_storage()._cdata:
            self.snapshot.check()  # of a copy nobody knows
            found.snapshot = None
        return found

    def check(self) -> None:
        """Raise where what they are made of is not what it was."""
        self.head.snapshot.check()
        if self.snapshot is not None:
            self.snapshot.check()

    def claim(self) -> Claim:
        claim = Claim()
        self.head.snapshot.claims.add(claim)
        return claim

    def back(self, d: Tensor, to: LogitsSource) -> Tensor:
        """A gradient of these rows, [n, K], as one of those that they were picked of, which has zeros elsewhere: [N, K]."""
        picks = self.picks[len(to.picks) :]
        if not picks:
            return d.reshape(-1, d.shape[-1])
        with torch.enable_grad():
            whole = picked = d.new_zeros(()).expand(*to.hidden.shape[:-1], d.shape[-1]).requires_grad_()
            for pick in picks:
                picked = pick(picked)
        (found,) = torch.autograd.grad(picked, whole, d.view(picked.shape))
        return found.reshape(-1, d.shape[-1])


def at_a_time(operands: Sequence[tuple], trained: int = 0, terms: int = 1) -> list[slice]:
    """Rows at a time, fewer for many terms. Each chunk adds to all of dW: as many as the weights that are trained, of so many
    bytes, have.
    """
    row = sum(len(weight) * weight.element_size() for _, weight, _ in operands)
    n = max(1, max(CHUNK, trained) // row // terms)
    return [slice(i, i + n) for i in range(0, max(len(operands[0][0]), 1), n)]


def products_of_layers(operands: Sequence[tuple], rows: slice = slice(None)) -> list[Tensor]:
    """What each layer gives for these rows."""
    with without_autocast(operands[0][0]):
        return [F.linear(x[rows], weight, bias) for x, weight, bias in operands]


def stepped(steps: Sequence[Step], z: Tensor) -> Tensor:
    for step in steps:
        z = step(z)
    return z
