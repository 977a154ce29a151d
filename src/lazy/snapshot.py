"""What the tensors that logits are made of were when the logits were given out.

Between then and the reading anybody may write to them: an optimizer, an average of weights that is swapped in and out, a merged
adapter, NumPy. Versions count only some of that. So a small tensor is copied at once; of others there is a fingerprint, made on
the device where nobody waits for it, and compared when somebody reads. Before an optimizer of torch writes to a weight, it is
copied while unread logits of it are alive: then a loop may look at them behind the step. `p.data = …` and `.to(…)` give a
parameter other memory; the memory that it had is held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sloth.kernels.common.fingerprint import fingerprint

COPIED = 2**20  # bytes of a tensor that is copied at once
SPARE = 2  # a weight is copied where so many of its size are free


class StaleLogits(RuntimeError):
    """Other logits would be read than the model gave."""


class Claim:
    """Held by a tensor that has not been read: as long as there is one, a snapshot is of use."""


class Snapshot:
    """Of `tensors`, as they are now."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors  # as others know them: an optimizer, say
        small = [t.nbytes <= COPIED for t in tensors]
        self.values = [t.detach().clone() if kept else t.detach() for t, kept in zip(tensors, small, strict=True)]
        self.prints = [None if kept else fingerprint(t) for t, kept in zip(self.values, small, strict=True)]
        self.claims: WeakSet[Claim] = WeakSet()
        if any(t.requires_grad and p is not None for t, p in zip(tensors, self.prints, strict=True)):
            _trained.add(self)

    def check(self) -> None:
        """Raise where one has changed. Waits for the device."""
        for t, then in zip(self.values, self.prints, strict=True):
            if then is None or t.is_cuda and torch.cuda.is_current_stream_capturing():
                continue
            if not t.untyped_storage().size() or not torch.equal(fingerprint(t), then):
                raise StaleLogits(
                    "sloth: the weights of the head (or hidden states) have changed since these logits were given out, and "
                    "nothing had read them before. Read what you want of `outputs.logits` before the weights are changed "
                    "(before the optimizer's step, where memory is short or it is not one of torch's), or keep real logits "
                    'with torch.compile(…, backend="sloth", options={"sloth.disable": "head,linear_cross_entropy"}).'
                )

    def copy(self, written: set[int], copies: dict[int, Tensor]) -> None:
        """Keep what an optimizer is about to write to; `copies` are shared by all snapshots of the same tensors."""
        for i, t in enumerate(self.tensors):
            if id(t) not in written or self.prints[i] is None or t.data_ptr() != self.values[i].data_ptr():
                continue
            if t.data_ptr() not in copies and _is_room(t):
                copies[t.data_ptr()] = self.values[i].clone()
            self.values[i] = copies.get(t.data_ptr(), self.values[i])


_trained: WeakSet[Snapshot] = WeakSet()


def _is_room(t: Tensor) -> bool:
    if not t.is_cuda:
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    free, _ = torch.cuda.mem_get_info(t.device)
    return SPARE * t.nbytes <= free + torch.cuda.memory_reserved(t.device) - torch.cuda.memory_allocated(t.device)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    wanted = [snapshot for snapshot in list(_trained) if snapshot.claims]
    if wanted:
        written = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        copies: dict[int, Tensor] = {}
        for snapshot in wanted:
            snapshot.copy(written, copies)


register_optimizer_step_pre_hook(_before_step)
