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

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import wraps
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import fx

from sloth.compat.dynamo import is_ours
from sloth.integrations.integration import integration

_hooks: set[CodeType] = set()  # functions whose call of it is left out
_MADE = "sloth_requires_grad_"  # in the meta of the node whose value the hook was called with


def leave_out(functions: Iterable[CodeType]) -> None:
    """These call x.requires_grad_() for no other end than the hook does."""
    _hooks.update(functions)


def marks_gradients(hook: Callable[..., Any]) -> bool:
    """Is it such a hook, which changes nothing of what is computed?"""
    return getattr(hook, "__code__", None) in _hooks


def _registering_once(enable: Callable[[Any], None]) -> Callable[[Any], None]:
    """Trainers switch checkpointing on and off around the reference model's pass (DPO, KTO, GRPO). Each time on, transformers
    registers the hook once more, and Dynamo, which guards on how many there are, compiles anew. One is enough.
    """

    @wraps(enable)
    def enable_input_require_grads(self: Any) -> None:
        hooks = getattr(self.get_input_embeddings(), "_forward_hooks", {})
        held = [*(getattr(self, "_require_grads_hooks", None) or ()), getattr(self, "_require_grads_hook", None)]
        if not any(getattr(hook, "id", None) in hooks for hook in held):  # today's embedding has none
            enable(self)

    return enable_input_require_grads


@integration(
    "transformers.modeling_utils", touches="PreTrainedModel.enable_input_require_grads",
    why="its hook is traced without a break of the graph, and does not pile up",
)  # fmt: skip
def teach_dynamo(transformers: ModuleType) -> None:
    enable = transformers.PreTrainedModel.enable_input_require_grads
    leave_out(c for c in enable.__code__.co_consts if isinstance(c, CodeType) and c.co_names == ("requires_grad_",))
    transformers.PreTrainedModel.enable_input_require_grads = _registering_once(enable)


def _skipping(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's `trace` of x.requires_grad_(), but for graphs of sloth and calls of those hooks."""

    def method_requires_grad_(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(tx) or tx.f_code not in _hooks or self.source:
            return trace(self, tx, *args, **kwargs)
        node = self.as_proxy().node
        if not node.meta["example_value"].requires_grad:
            node.meta["example_value"].requires_grad_(True)  # so that Dynamo knows what depends on it
            node.meta[_MADE] = self.requires_grad = True
        return self

    return method_requires_grad_


@integration(
    "torch._dynamo.variables.tensor", touches="TensorVariable.method_requires_grad_",
    why="requires_grad_() of such a hook is left out of the graph",
)  # fmt: skip
def _teach_requires_grad(tensor: ModuleType) -> None:
    tensor.TensorVariable.method_requires_grad_ = _skipping(tensor.TensorVariable.method_requires_grad_)


def _saying_now(trace: Callable[..., Any], constant: Any) -> Callable[..., Any]:
    """Dynamo's `trace` of a logger's method. transformers' `warning_once` is called now, while a graph of sloth is traced."""

    @wraps(trace)
    def call_method(self: Any, tx: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if name != "warning_once" or not is_ours(tx):
            return trace(self, tx, name, args, kwargs)
        with suppress(NotImplementedError):  # a message with something in it that is not known yet
            self.value.warning_once(*(a.as_python_constant() for a in args))
        return constant.create(value=None)

    return call_method


@integration(
    "torch._dynamo.variables.misc", touches="LoggingLoggerVariable.call_method",
    why="warnings of transformers do not break the graph",
)  # fmt: skip
def _teach_warnings(misc: ModuleType) -> None:
    from sloth.compat.dynamo import ConstantVariable  # where it is gone, this alone is off

    misc.LoggingLoggerVariable.call_method = _saying_now(misc.LoggingLoggerVariable.call_method, ConstantVariable)


def outputs_requiring_grad(gm: fx.GraphModule) -> list[int]:
    """The outputs of `gm`, as Dynamo traced it, that require gradients where such a hook was left out; none elsewhere."""
    if not any(_MADE in n.meta for n in gm.graph.nodes):
        return []
    (outputs,) = gm.graph.output_node().args
    values = [n.meta.get("example_value") if isinstance(n, fx.Node) else None for n in outputs]
    return [i for i, t in enumerate(values) if isinstance(t, torch.Tensor) and t.requires_grad]


def mark_requires_grad(compiled: Callable[..., Any], outputs: list[int]) -> Callable[..., Any]:
    """`compiled`, with gradients required of these outputs."""

    def run(*args: Any) -> Any:
        out = compiled(*args)
        if torch.is_grad_enabled():
            for i in outputs:
                out[i].requires_grad_(True)  # does nothing to one that does so by what was computed
        return out

    return run if outputs else compiled
