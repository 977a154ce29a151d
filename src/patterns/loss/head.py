"""A model's head without a loss in its graph: logits for DPO, GRPO, distillation, generation, and losses of one's own.

Nothing takes the head's place. Logits that a graph gives out and does not use itself are computed when somebody reads them, as
those beside a loss are (`linear_cross_entropy.py`), so that code which takes a few numbers of each row never has all of them.
"""

from math import prod

from torch.fx.experimental.symbolic_shapes import statically_known_true

from sloth.lazy import rows as lazy_rows
from sloth.lazy.functions import lazy
from sloth.patterns.mathematics import weight_sizes
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.cost import cost
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import deferral

HEAD = Construct("head", "logits without a loss")
# What is as wide as a vocabulary and more than four times as wide as its input is one: the other layers that widen so much are
# packed MLPs of a few large models, and a graph gives those out only where it breaks before the activation.
VOCABULARY, WIDER = 30_000, 4


@deferral(HEAD, make=lazy)
def head(layer: Value) -> bool:
    """Logits of a vocabulary."""
    sizes = weight_sizes(layer)
    return sizes is not None and sizes[0] >= VOCABULARY and sizes[0] > WIDER * sizes[1]


@cost(head)
def few_logits(layer: Value) -> str | None:
    """Not more than is computed at a time. Where sizes are symbols, they may be more."""
    size = prod(layer.meta.shape) * layer.meta.dtype.itemsize
    return f"{size} bytes of logits are computed at once" if statically_known_true(size <= lazy_rows.CHUNK) else None
