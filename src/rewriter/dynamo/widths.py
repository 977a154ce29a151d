"""A width stays a number where a function is called with tensors of other numbers of dimensions.

Dynamo makes a size a symbol when it differs from that of the call before. Of tensors with another number of dimensions it
compares none: all sizes become symbols. So in a function that is compiled by itself, because the model breaks around it, and
that rotates queries [B, S, H, D] and then keys [N, D], D becomes one, and nothing can prove any more that it is even. Here the
last dimension, which is a width of the model wherever it has always been the same, stays what it is. Where one that was kept
turns out to be a length, nothing of that function is kept any more: that is one graph more, however many inputs it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import CodeType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic

from sloth.compat.dispatch import is_traceable_wrapper_subclass
from sloth.compat.dynamo import is_ours
from sloth.integrations.integration import integration
from sloth.rewriter.dynamo.varying_sizes import is_left_to_dynamo

_lengths: WeakSet[CodeType] = WeakSet()  # functions of which a width that was kept was a length
_kept: WeakKeyDictionary[CodeType, set[str]] = WeakKeyDictionary()  # by source
_seen: WeakKeyDictionary[CodeType, dict[str, set[tuple[int, int]]]] = WeakKeyDictionary()  # dimensions and width, by source


def _keeping(context: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's choice of which sizes of an input are symbols."""

    @wraps(context)
    def automatic_dynamic(e: Any, tx: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        made = context(e, tx, source, *args, **kwargs)
        if not is_ours(tx) or not _has_width(e):
            return made
        seen = _seen.setdefault(tx.f_code, {}).setdefault(source.name, set())
        seen.add((e.dim(), e.shape[-1]))
        widths, ranks = {width for _, width in seen}, {rank for rank, _ in seen}
        marked = any(name.startswith("_dynamo") for name in vars(e))
        kept = _kept.setdefault(tx.f_code, set())
        if len(widths) > 1 and source.name in kept:
            _lengths.add(tx.f_code)
        if len(widths) > 1 or len(ranks) == 1 or marked or not is_left_to_dynamo() or tx.f_code in _lengths:
            return made
        kept.add(source.name)
        sizes, asked = [*made.dynamic_sizes[:-1], DimDynamic.STATIC], [*made.constraint_sizes[:-1], None]
        return replace(made, dynamic_sizes=sizes, constraint_sizes=asked)

    return automatic_dynamic


def _has_width(e: Any) -> bool:
    return isinstance(e, torch.Tensor) and e.is_floating_point() and e.dim() > 0 and not is_traceable_wrapper_subclass(e)


def forget() -> None:
    """Of widths that were seen: for torch.compiler.reset()."""
    for known in (_seen, _kept, _lengths):
        known.clear()


@integration(
    "torch._dynamo.variables.builder",
    touches="_automatic_dynamic (widths)",
    why="a width is a number, whatever the number of dimensions",
)
def _keep_widths(module: ModuleType) -> None:
    module._automatic_dynamic = _keeping(module._automatic_dynamic)
