"""The hook by which transformers makes embeddings require gradients, traced without a break of the graph.

Reentrant checkpointing passes gradients on only where an input requires one, so with frozen embeddings (PEFT, with gradient
checkpointing) `enable_input_require_grads` registers a hook that calls `output.requires_grad_(True)` on what they return. Dynamo
breaks its graph there: torch 2.11 once, torch 2.13 after it has traced the whole model, in each of the frames around the
embedding anew (42 s for 8 layers of a QLoRA, 7 without the hook). A graph needs no such mark, because AOTAutograd finds out
itself what needs a gradient; what leaves a graph does, since eager code may follow. So the call is left out, and outputs get the
mark instead.

What no longer happens: `.grad` of the embedding's own output, which nobody reads, is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import fx
from torch._dynamo.variables import TensorVariable

from sloth.integrations.import_hook import when_imported

_hooks: set[CodeType] = set()  # functions whose call of it is left out
_MADE = "sloth_requires_grad_"  # in the meta of the node whose value the hook was called with


def leave_out(functions: Iterable[CodeType]) -> None:
    """These call x.requires_grad_() for no other end than the hook does."""
    _hooks.update(functions)


def teach_dynamo(transformers: ModuleType) -> None:
    """`transformers` is transformers.modeling_utils."""
    enable = getattr(getattr(transformers, "PreTrainedModel", None), "enable_input_require_grads", None)
    constants = getattr(getattr(enable, "__code__", None), "co_consts", ())
    hooks = [c for c in constants if isinstance(c, CodeType) and c.co_names == ("requires_grad_",)]
    leave_out(hooks)
    if hooks:
        transformers.PreTrainedModel.enable_input_require_grads = _registering_once(enable)


def _registering_once(enable: Callable[[Any], None]) -> Callable[[Any], None]:
    """Trainers switch checkpointing on and off around the reference model's pass (DPO, KTO, GRPO). Each time on, transformers
    registers the hook once more, and Dynamo, which guards on how many there are, compiles anew. One is enough.
    """

    @wraps(enable)
    def enable_input_require_grads(self: Any) -> None:
        if not (getattr(self, "_require_grads_hooks", None) or getattr(self, "_require_grads_hook", None)):
            enable(self)

    return enable_input_require_grads


def is_ours(tx: Any) -> bool:
    """Does Dynamo trace for sloth? What it is taught in this package holds for such graphs alone."""
    return getattr(tx.output.compiler_fn, "__name__", None) == "sloth"


def _skipping(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's `trace` of x.requires_grad_(), but for graphs of sloth and calls of those hooks."""

    def method_requires_grad_(self: TensorVariable, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(tx) or tx.f_code not in _hooks or self.source:
            return trace(self, tx, *args, **kwargs)
        node = self.as_proxy().node
        if not node.meta["example_value"].requires_grad:
            node.meta["example_value"].requires_grad_(True)  # so that Dynamo knows what depends on it
            node.meta[_MADE] = self.requires_grad = True
        return self

    return method_requires_grad_


if hasattr(TensorVariable, "method_requires_grad_"):
    TensorVariable.method_requires_grad_ = _skipping(TensorVariable.method_requires_grad_)
when_imported("transformers.modeling_utils", teach_dynamo)


def left_to_require(gm: fx.GraphModule) -> list[int]:
    """The outputs of `gm`, as Dynamo traced it, that require gradients where such a hook was left out; none elsewhere."""
    if not any(_MADE in n.meta for n in gm.graph.nodes):
        return []
    (outputs,) = gm.graph.output_node().args
    values = [n.meta.get("example_value") if isinstance(n, fx.Node) else None for n in outputs]
    return [i for i, t in enumerate(values) if isinstance(t, torch.Tensor) and t.requires_grad]


def requiring(compiled: Callable[..., Any], outputs: list[int]) -> Callable[..., Any]:
    """`compiled`, with gradients required of these outputs."""

    def run(*args: Any) -> Any:
        out = compiled(*args)
        if torch.is_grad_enabled():
            for i in outputs:
                out[i].requires_grad_(True)  # does nothing to one that does so by what was computed
        return out

    return run if outputs else compiled
