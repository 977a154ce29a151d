"""TRL's kernel for log-probabilities and entropies on a GPU, given lazy logits: it is run some rows at a time.

    logprob = z_y − log Σ e^z        entropy = −Σ p log p        z = logits / temperature in fp32, p = softmax(z)

The kernel is in an autograd function, about which torch asks no tensor class. `trl.trainer.utils` looks it up by name whenever it
wants it, and finds it behind torch's protocol for functions that ask (`__torch_function__`): real logits go straight on to it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor
from torch.overrides import wrap_torch_function

from sloth.integrations.integration import integration
from sloth.lazy.tensor import STAYS_LAZY, LazyLogits, by_rows

KERNEL = "_fused_logprob_entropy"  # TRL's own name for it


def logprob_and_entropy(
    asking: Callable, x: LazyLogits, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [..., V], index [...], row_mask [...] -> [...] each, 0 where row_mask is."""
    kernel, beside = asking.__wrapped__, [index] if row_mask is None else [index, row_mask]

    def of_rows(z: Tensor, i: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernel(z, i, temperature=temperature, row_mask=mask)

    return by_rows(x, of_rows, *(t.reshape(-1) for t in beside))


@integration("trl.trainer.utils", touches=KERNEL, why="lazy logits are given to it some rows at a time")
def _ask(utils: ModuleType) -> None:
    kernel = getattr(utils, KERNEL, None)
    if kernel is not None:
        asking = wrap_torch_function(lambda logits, *_, **__: (logits,))(kernel)
        STAYS_LAZY[asking] = logprob_and_entropy
        setattr(utils, KERNEL, asking)
