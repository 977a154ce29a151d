"""TRL's log-probabilities and entropies of lazy logits on a GPU, where TRL runs a kernel of its own.

    logprob = z_y − log Σ e^z        entropy = −Σ p log p        z = logits / temperature in fp32, p = softmax(z)

The kernel is in an autograd function, about which torch asks no tensor class. `trl.trainer.utils` looks it up by name whenever it
wants it, and finds it behind torch's protocol for functions that ask (`__torch_function__`): all other tensors go on to TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor
from torch.overrides import wrap_torch_function

from sloth.kernels.launch import compute_dtype
from sloth.lazy_tensor import STAYS_LAZY, LazyLogits, by_rows
from sloth.when_imported import when_imported

KERNEL = "_fused_logprob_entropy"  # TRL's own name for it


def logprob_and_entropy(
    func: Callable, x: LazyLogits, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [..., V], index [...] -> [...] each; 0 where row_mask [...] is."""

    def of_rows(z: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        logp = (z.to(compute_dtype(z)) / temperature).log_softmax(-1)
        return logp.gather(-1, i).squeeze(-1), -(logp.exp() * logp).sum(-1)

    found = by_rows(x, of_rows, index.reshape(-1, 1).long())
    return found if row_mask is None else tuple(t.masked_fill(row_mask == 0, 0.0) for t in found)


def _ask(utils: ModuleType) -> None:
    """`utils` is trl.trainer.utils."""
    kernel = getattr(utils, KERNEL, None)
    if kernel is not None:
        asking = wrap_torch_function(lambda logits, *_, **__: (logits,))(kernel)
        STAYS_LAZY[asking] = logprob_and_entropy
        setattr(utils, KERNEL, asking)


when_imported("trl.trainer.utils", _ask)
