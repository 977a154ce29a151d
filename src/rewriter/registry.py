"""The registry of pattern entries: sloth's own, those of installed packages, and the user's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch

from sloth.rewriter.pattern import Construct, Pattern, PatternError

log = logging.getLogger("sloth")
_patterns: dict[str, Pattern] = {}
_loaded = False


def pattern(
    construct: Construct,
    *,
    op: Any,
    dims: dict[str, str],
    sizes: dict[str, int] | None = None,
    no_grad: tuple[str, ...] = (),
    recompute: bool = False,
    cheap: tuple[str, ...] = (),
    deferred: Callable[..., torch.Tensor] | None = None,
    name: str | None = None,
    variant: str = "default",
    **options: Any,
) -> Callable[[Callable], Pattern]:
    """Register reference code as a pattern that `op` replaces.

    op: an operator of torch.library (an OpOverload, its packet, or what `custom_op`/`triton_op` return), with a registered
        backward unless it is only wanted where no gradient flows. Its arguments are found by name.
    dims: for each tensor its sizes by letters, "B S D" or "B S 2*I", with " int64" behind for indices. `sizes` fixes letters.
    no_grad: tensors that the operator gives no gradient to; where one of them needs it, the match is refused.
    recompute: its result is large and cheap: computed again in the backward pass by whoever needs it there, not kept.
    cheap: tensors of which a dropout or cast is computed again too, where the backward pass wants it, instead of keeping it.
    deferred: what it computes row by row on the way and the graph gives out (logits) is left to `deferred(hidden, weights, head,
        plain)`, which returns a tensor for head(hidden, *weights); plain: the head is a linear layer and casts.
    Raises PatternError where the name is taken or the operator lacks a parameter of the reference.
    """

    def enter(reference: Callable) -> Pattern:
        entry = Pattern(
            name or reference.__name__, construct, _overload(op), dims, sizes or {}, no_grad, recompute, cheap, deferred
        )
        if entry.name in _patterns:
            raise PatternError(f"a pattern named {entry.name!r} is registered already; give another name=")
        entry.variant(variant, **options)(reference)
        _patterns[entry.name] = entry
        return entry

    return enter


def unregister(name: str) -> None:
    """Forget an entry. KeyError where there is none of this name."""
    del _patterns[name]


def patterns() -> list[Pattern]:
    """All entries; the first call loads sloth's own and those of packages with an entry point in the group `sloth_patterns`."""
    global _loaded
    if not _loaded:
        import_module("sloth.patterns")
        _loaded = True
        for point in entry_points(group="sloth_patterns"):
            try:
                point.load()
            except Exception as e:  # somebody else's package must not stop a training run
                log.warning("sloth: patterns of %s were not loaded: %s: %s", point.value, type(e).__name__, e)
    return list(_patterns.values())


def constructs() -> list[Construct]:
    """The constructs that have entries, in the order of registration."""
    return list({p.construct.name: p.construct for p in patterns()}.values())


def _overload(op: Any) -> torch._ops.OpOverload:
    op = getattr(op, "_opoverload", op)
    op = getattr(op, "default", op)
    if not isinstance(op, torch._ops.OpOverload):
        raise PatternError(f"op must be an operator of torch.library, not {type(op).__name__}")
    return op
