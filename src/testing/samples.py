"""Inputs and numbers from an entry's description alone, and its operator and reference as functions of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sloth.compat.dispatch import FakeTensorMode
from sloth.rewriter.graph.value import Meta
from sloth.rewriter.match.matcher import Match
from sloth.rewriter.match.pattern import Pattern, Variant
from sloth.rewriter.plan import legality
from sloth.rewriter.report import MATCHED, GraphReport, Site
from sloth.testing.judge import make, wide

NUMBERS = {
    "eps": 1e-5,
    "ignore_index": -100,
    "label_smoothing": 0.1,
    "up_scale": 0.25,
}  # by name; others get a value that fits any scale or cap


def numbers(variant: Variant, dtype: torch.dtype = torch.float32, draw: int = 0) -> dict[str, Any]:
    """A value for each number that the reference takes; dtypes are `dtype`. Draws order them otherwise, and turn their signs, so
    that a bound is not always above the other: 0.75, 1.75, …; … 1.75, 0.75; -0.75, -1.75, …. What the entry gives as `numbers`
    is taken, in turn.
    """
    count = len(variant.numbers)
    floats = (lambda i: 0.75 + i, lambda i: count - 0.25 - i, lambda i: -0.75 - i)[draw % 3]
    values = {float: floats, int: lambda i: 3 + i, torch.dtype: lambda i: dtype}
    own = {n: given[draw % len(given)] for n, given in variant.pattern.numbers.items()}
    fixed = NUMBERS | {"loss_dtype": torch.promote_types(dtype, torch.float32)} | own
    return {n: fixed.get(n, values[t](i)) for i, (n, t) in enumerate(variant.numbers.items())}


POSITIVE = {"class_weight"}  # a sum of them is divided by


def random_tensor(name: str, meta: Meta, variant: Variant, seed: int, layout: str = "contiguous", below: int = 2) -> torch.Tensor:
    """A tensor like `meta`; integers lie in [0, below), and every third is what the variant is told to ignore."""
    if meta.dtype.is_floating_point:
        drawn = make(meta.shape, meta.dtype, layout, seed)
        return drawn.abs() + 0.1 if name in POSITIVE else drawn
    if not meta.shape:
        return torch.tensor(below + 1)  # a number of items, never 0
    drawn = torch.randint(0, below, meta.shape, generator=torch.Generator().manual_seed(seed))
    ignored = numbers(variant).get("ignore_index")
    return drawn if ignored is None else drawn.where(torch.arange(drawn.numel()).view(drawn.shape) % 3 != 1, ignored)


def sample(variant: Variant, dtype: torch.dtype, grad: bool = True) -> list[torch.Tensor]:
    """Leaf tensors from the variant's description; those the operator gives no gradient to need none."""
    metas = zip(variant.tensors, variant.sample_metas(dtype), strict=True)
    out = [random_tensor(name, m, variant, 64 * i + 1) for i, (name, m) in enumerate(metas)]
    for name, t in zip(variant.tensors, out, strict=True):
        t.requires_grad_(grad and t.is_floating_point() and name not in variant.pattern.no_grad)
    return out


class Exactly(TorchFunctionMode):
    """Run reference code in the precision of its inputs: `.float()` of fp64 stays fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return wide(args[0]) if func is torch.Tensor.float else func(*args, **(kwargs or {}))


def reference(variant: Variant, draw: int = 0) -> Callable[..., Any]:
    """The reference as a function of its tensors, exact for fp64."""

    def function(*tensors: torch.Tensor) -> Any:
        with Exactly():
            return variant.reference(*tensors, **numbers(variant, tensors[0].dtype, draw))

    return function


def made_match(variant: Variant, tensors: list[torch.Tensor], draw: int = 0) -> Match:
    """The match of the variant with its own reference on tensors like these."""
    found = numbers(variant, tensors[0].dtype, draw)
    graph = variant.graph([Meta.of(t) for t in tensors], found, FakeTensorMode())
    return Match(variant, graph.inputs, found, graph.roots, frozenset())


def accepts(match: Match) -> bool:
    """Would the rewriter take the entry's operator for these operands?"""
    try:
        context = legality.LegalityContext(None, FakeTensorMode(), frozenset())  # pyright: ignore[reportArgumentType]  (no view)
        legality.results(match, context)
        for condition in match.pattern.checks:
            condition(match)
    except legality.Refused:
        return False
    return True


def arguments(variant: Variant, tensors: list[torch.Tensor], draw: int = 0) -> tuple:
    """What the rewritten graph passes to the operator."""
    match = made_match(variant, tensors, draw)
    given = dict(zip(match.tensors.values(), tensors, strict=True))
    return legality.call_arguments([match], given.__getitem__)


def operator_of(variant: Variant, draw: int = 0) -> Callable[..., Any]:
    """The entry's operator as a function of the reference's tensors, with as many results as the reference has."""

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(made_match(variant, list(tensors), draw).roots)
        return outputs(variant.pattern.op(*arguments(variant, list(tensors), draw)))[:count]

    return function


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def cotangents(out: tuple[torch.Tensor, ...], salt: int = 0) -> list[torch.Tensor]:
    """A gradient for each output, scalars included."""
    return [make((*t.shape, 1), t.dtype, seed=(1 << 20) + salt + i)[..., 0] for i, t in enumerate(out)]


def expression(variant: Variant, dtype: torch.dtype) -> str:
    """The variant's normal form in this dtype, to tell whether two variants are the same mathematics there."""
    graph = variant.graph(variant.sample_metas(dtype), numbers(variant, dtype), FakeTensorMode())
    names = {v: n for n, v in graph.inputs.items()}

    def show(a: Any) -> str:
        if isinstance(a, tuple):
            return f"({', '.join(map(show, a))})"
        return names.get(a) or f"{a.op}{show(a.args)}" if hasattr(a, "op") else str(a)

    return show(graph.roots)


def sites(reports: list[GraphReport], entry: Pattern) -> tuple[list[Site], list[Site]]:
    """Sites of the entry's construct: matched, missed."""
    own = [s for r in reports for s in r.sites if s.construct == entry.construct.name]
    return [s for s in own if s.status == MATCHED], [s for s in own if s.status != MATCHED]
