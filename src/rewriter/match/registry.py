"""The registry of pattern entries: sloth's own, those of installed packages, and the user's."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import torch

from sloth.compat.dispatch import OpOverload
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.pattern import Construct, LazyOutputRule, Pattern, PatternError, Reads
from sloth.rewriter.notices import log

GROUP, OWN = "sloth_patterns", "sloth.patterns"  # entry points of packages with patterns; sloth's own come first
_patterns: dict[str, Pattern] = {}
_deferrals: dict[str, LazyOutputRule] = {}
# By an entry's name or an operator: of a match, or a layer that a deferral wants, why the rewrite does not pay, if so (cost.py).
COSTS: dict[str | OpOverload, Callable[[Any], str | None]] = {}
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
    also: tuple[Construct, ...] = (),
    numbers: dict[str, tuple[float, ...]] | None = None,
    name: str | None = None,
    variant: str = "default",
    **options: Any,
) -> Callable[[Callable], Pattern]:
    """Register reference code as a pattern that `op` replaces.

    op: an operator of torch.library (an OpOverload, its packet, or what `custom_op`/`triton_op` return), with a registered
        backward unless it is only wanted where no gradient flows. Its arguments are found by name.
    dims: for each tensor its sizes by letters, "B S D" or "B S 2*I", with " int64" behind for indices. `sizes` fixes letters.
    no_grad: tensors that the operator gives no gradient to on some device; where one of them needs it, the match is refused. What
        its backward gives no gradient to here is found out without.
    recompute: its result is large and cheap: computed again in the backward pass by whoever needs it there, not kept.
    cheap: tensors of which a dropout or cast is computed again too, where the backward pass wants it, instead of keeping it.
    deferred: what a linear layer computes row by row on the way and the graph gives out (logits) is left to `deferred(hidden,
        weight, bias, step, autocast, plain, more)`, which returns a tensor for step(linear(hidden, weight, bias)), the layer
        under autocast(device type, dtype, enabled); the step may be None; plain: there is none, or casts alone, and no autocast.
        more: (weight, bias) of further layers, which read further columns of `hidden`; the step takes what each layer gives.
        A frozen weight that is kept in another form is a `RematerializedWeight`.
    also: other constructs that a match holds, each anchor of theirs a site (norms, in an entry of RoPE that norms q and k too).
    numbers: values that the generated tests (sloth.testing.check_pattern) give to numbers of the reference, one after the other:
        {"limit": (7.0, 2.0)}. Without, they are drawn.
    Raises PatternError where the name is taken or the operator lacks a parameter of the reference.
    """

    def enter(reference: Callable) -> Pattern:
        entry = Pattern(
            name or reference.__name__, construct, overload(op), dims, sizes or {}, no_grad, recompute, cheap, deferred, also,
            numbers or {},
        )  # fmt: skip
        if entry.name in _deferrals.keys() | _patterns.keys():
            raise PatternError(f"a pattern named {entry.name!r} is registered already; give another name=")
        entry.variant(variant, **options)(reference)
        _patterns[entry.name] = entry
        return entry

    return enter


def reader(
    construct: Construct, *, op: Any, no_grad: tuple[str, ...] = (), recompute: bool = False, name: str | None = None
) -> Callable[[Reads], Pattern]:
    """Register `reads(shadow, taken)`, which finds places by what they compute, whatever they look like: it gives a Reading for
    each, and has itself proven that `op` with those arguments computes its results. All other legality is asked as of any match.
    taken: values that legal matches of other entries of the construct compute; what they hold need not be read. recompute: as of
    a pattern.
    Raises PatternError where the name is taken.
    """

    def enter(reads: Reads) -> Pattern:
        entry = Pattern(name or reads.__name__, construct, overload(op), {}, no_grad=no_grad, recompute=recompute, reads=reads)
        if entry.name in _deferrals.keys() | _patterns.keys():
            raise PatternError(f"a pattern named {entry.name!r} is registered already; give another name=")
        _patterns[entry.name] = entry
        return entry

    return enter


def deferral(
    construct: Construct, *, make: Callable[..., torch.Tensor], name: str | None = None
) -> Callable[[Callable[[Value], bool]], LazyOutputRule]:
    """Register `wanted(layer)`: linear layers whose result is left to `make` (as `deferred` of a pattern) where a graph gives it
    out and does not use it. The layer is described by its Value. Raises PatternError where the name is taken.
    """

    def enter(wanted: Callable[[Value], bool]) -> LazyOutputRule:
        entry = LazyOutputRule(name or wanted.__name__, construct, wanted, make)
        if entry.name in _deferrals.keys() | _patterns.keys():
            raise PatternError(f"an entry named {entry.name!r} is registered already; give another name=")
        _deferrals[entry.name] = entry
        return entry

    return enter


def unregister(name: str) -> None:
    """Forget an entry, and what was registered for its name. KeyError where there is none of this name."""
    del _patterns[name]
    COSTS.pop(name, None)


def patterns() -> list[Pattern]:
    """All entries; the first call loads those of packages with an entry point in the group `sloth_patterns`, sloth's own first.
    Another package's that fail are logged and left out.
    """
    global _loaded
    if not _loaded:
        points = entry_points(group=GROUP)
        if OWN not in {point.value for point in points}:
            raise RuntimeError(f"sloth's own patterns are not installed (no entry point {OWN} in {GROUP}): install sloth again")
        for point in sorted(points, key=lambda point: point.value != OWN):
            try:
                point.load()
            except Exception as e:
                if point.value == OWN:
                    raise
                log.warning("sloth: patterns of %s were not loaded: %s: %s", point.value, type(e).__name__, e)
        _loaded = True
    return list(_patterns.values())


def deferrals() -> list[LazyOutputRule]:
    """All entries that defer; loaded with the patterns."""
    patterns()
    return list(_deferrals.values())


def constructs() -> list[Construct]:
    """The constructs that have entries, in the order of registration; of those of one name the first."""
    found: dict[str, Construct] = {}
    for e in (*patterns(), *deferrals()):
        found.setdefault(e.construct.name, e.construct)
    return list(found.values())


def overload(op: Any) -> OpOverload:
    op = getattr(op, "_opoverload", op)
    op = getattr(op, "default", op)
    if not isinstance(op, OpOverload):
        raise PatternError(f"op must be an operator of torch.library, not {type(op).__name__}")
    return op
