"""What TRL computes of a model's logits itself.

Its head (`add_fused_lm_head`: SFT's default, DPO, KTO, GRPO) takes the positions that have labels, which on a GPU are as many as
their values say: no graph holds that. Dynamo finds out behind the model's body, in each of the forwards around it, and traces the
body for each anew, 40 s for 32 layers. So it is told before: the body is one graph, and what is behind it TRL's own code.

Its kernel for log-probabilities and entropies on a GPU, given lazy logits, is run some rows at a time.

    logprob = z_y − log Σ e^z        entropy = −Σ p log p        z = logits / temperature in fp32, p = softmax(z)

The kernel is in an autograd function, about which torch asks no tensor class. `trl.trainer.utils` looks it up by name whenever it
wants it, and finds it behind torch's protocol for functions that ask (`__torch_function__`): real logits go straight on to it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import wraps
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

from sloth.integrations.integration import integration
from sloth.lazy.by_rows import chunked_apply
from sloth.lazy.tensor import HANDLED_FUNCTIONS, LazyLogits

KERNEL = "_fused_logprob_entropy"  # TRL's own name for it


def logprob_and_entropy(
    asking: Callable, x: LazyLogits, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [..., V], index [...], row_mask [...] -> [...] each, 0 where row_mask is."""
    kernel, beside = asking.__wrapped__, [index] if row_mask is None else [index, row_mask]

    def of_rows(z: Tensor, i: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernel(z, i, temperature=temperature, row_mask=mask)

    return chunked_apply(x, of_rows, *(t.reshape(-1) for t in beside))


@integration("trl.trainer.utils", touches=KERNEL, why="lazy logits are given to it some rows at a time")
def _ask(utils: ModuleType) -> None:
    kernel = getattr(utils, KERNEL, None)
    if kernel is not None:
        asking = wrap_torch_function(lambda logits, *_, **__: (logits,))(kernel)
        HANDLED_FUNCTIONS[asking] = logprob_and_entropy
        setattr(utils, KERNEL, asking)


HEAD = "add_fused_lm_head"
BEHIND = "TRL computes head and loss itself, at positions that have labels; the model's body is one graph"


def _cut_before_body(skip: Callable[[Any], Any], utils: ModuleType, forward: Any, model: Any) -> None:
    """Let Dynamo leave this forward of a model, where its head follows values, and trace what it calls. It is marked itself:
    accelerate has wrapped it, maybe, in autocast.
    """
    parameter, head = next(model.parameters(), None), utils._ChunkedLogProbFunction
    if parameter is None or not utils._use_triton(parameter.device):
        return
    skip(forward)
    forward._torchdynamo_disable_msg = BEHIND
    if not hasattr(head.forward, "_torchdynamo_disable"):
        head.forward = staticmethod(torch.compiler.disable(head.forward, reason=BEHIND))


def _made_by(add: Callable[..., None]) -> list[tuple[Any, Any]]:
    """Forwards that `add_fused_lm_head` gave to models already, and these: a trainer is made before its model is compiled, and
    sloth may be imported for that.
    """
    codes = [c for c in add.__code__.co_consts if isinstance(c, CodeType)]
    functions = [f for code in codes for f in gc.get_referrers(code) if isinstance(f, FunctionType)]
    methods = [m for f in functions for m in gc.get_referrers(f) if isinstance(m, MethodType) and m.__func__ is f]
    return [(m.__func__, m.__self__) for m in methods if isinstance(m.__self__, torch.nn.Module)]


@integration("trl.trainer.utils", touches=HEAD, why="a head that no graph holds is told to Dynamo before it traces the body")
def _cut(utils: ModuleType) -> None:
    if not all(getattr(utils, name, None) for name in (HEAD, "_ChunkedLogProbFunction", "_use_triton")):
        return
    from sloth.compat.dynamo import skip  # where it is gone, this is off alone

    add = utils.add_fused_lm_head

    @wraps(add)
    def add_head(model: Any, *args: Any, **kwargs: Any) -> None:
        add(model, *args, **kwargs)
        _cut_before_body(skip, utils, model.forward.__func__, model)

    for name, module in list(sys.modules.items()):  # trainers that were imported before have it by its name
        if name.startswith("trl.") and getattr(module, HEAD, None) is add:
            setattr(module, HEAD, add_head)
    utils.add_fused_lm_head = add_head
    for forward, model in _made_by(add):
        _cut_before_body(skip, utils, forward, model)
