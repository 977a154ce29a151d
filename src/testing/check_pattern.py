"""`sloth.testing.check_pattern(entry)`: an entry against its own reference, from the entry alone.

def test_my_pattern():
    sloth.testing.check_pattern("clamped_swiglu")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from sloth.rewriter.backend import listening
from sloth.rewriter.match.pattern import Pattern, Variant
from sloth.rewriter.match.registry import patterns
from sloth.testing.judge import LAYOUTS, compare, evaluate
from sloth.testing.samples import (
    accepts,
    arguments,
    cotangents,
    made_match,
    numbers,
    operator_of,
    outputs,
    random_tensor,
    reference,
    sample,
)  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFUSED = (RuntimeError, IndexError, ValueError)  # what eager raises for sizes, layouts or dtypes that it does not take
DRAWS = 6  # of sizes, layouts and numbers, in each dtype


def check_pattern(entry: Pattern | str) -> None:
    """Every variant of an entry: it is matched in its own reference, compiled with static and with dynamic sizes; its operator
    computes the reference, forward and every gradient, on random sizes, layouts and numbers in fp32, bf16 and fp16, no worse than
    1.05 times eager's error beside fp64; in fp64 the backward pass is the derivative; it obeys torch.library.opcheck.

    entry: what `sloth.pattern` returned, or its name. Raises AssertionError that names the variant, what is wrong and by how
    much; ValueError where there is no such entry.
    """
    if isinstance(entry, str):
        found = {p.name: p for p in patterns()}
        if entry not in found:
            raise ValueError(f"there is no entry {entry!r}; there are {', '.join(found)}")
        entry = found[entry]
    for variant in entry.variants:
        _is_matched(variant, dynamic=False)
        _is_matched(variant, dynamic=True)
        tested = [_computes_the_reference(variant, dtype) for dtype in DTYPES]
        if not any(tested):
            raise AssertionError(f"{variant}: its checks refuse every draw; give numbers= with which they do not")
        _is_the_derivative(variant)
    torch.library.opcheck(entry.op, arguments(entry.variants[0], sample(entry.variants[0], torch.float32)))


class _Calls(torch.nn.Module):
    """A reference with its numbers, which stay constants where sizes are dynamic."""

    def __init__(self, variant: Variant):
        super().__init__()
        self.call = partial(variant.reference, **numbers(variant))

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.call(*tensors)


def _is_matched(variant: Variant, dynamic: bool) -> None:
    torch._dynamo.reset()
    options = {"sloth.inner_backend": "eager", "sloth.always": variant.pattern.name}
    with listening() as reports:
        torch.compile(_Calls(variant), backend="sloth", dynamic=dynamic, options=options)(*sample(variant, torch.float32))
    sites = [s for r in reports for s in r.sites if s.construct == variant.pattern.construct.name]
    missed = [f"{s.status}: {s.reason}" for s in sites if s.status != "matched"]
    if variant.numbers and any(s.status == "check" for s in sites):
        missed.append(f"with {numbers(variant)}; give values that go together as numbers= of sloth.pattern")
    untouched = [r.untouched for r in reports if r.untouched]
    how = "dynamic" if dynamic else "static"
    assert not missed and not untouched, f"{variant} is not matched in its own reference ({how} sizes): {missed or untouched}"
    assert sites, f"{variant} has no site in its own reference: does the anchor of {variant.pattern.construct.name} see it?"


Draw = tuple[int, Callable[[int], list[torch.Tensor]]]


def _draws(variant: Variant, dtype: torch.dtype) -> Iterator[Draw]:
    """Sizes and layouts that the entry's checks accept: which numbers go with them, and what makes tensors, by a salt."""
    dice = random.Random(f"{variant} {dtype}")
    letters = sorted({c for spec in variant.dims.values() for c in spec if c.isupper()})
    for draw in range(DRAWS):
        least = 1 if draw == DRAWS - 1 else 2
        sizes = {c: variant.pattern.sizes.get(c) or dice.randint(least, 9) for c in letters}
        described = []
        for i, name in enumerate(variant.tensors):
            meta = variant.meta(name, sizes, dtype)
            layout = dice.choice(LAYOUTS) if len(meta.shape) > 1 else "contiguous"
            described.append((name, meta, 64 * (1000 * draw + 1) + i, layout))
        below = min(sizes.values(), default=2)

        def make(salt: int, described: list = described, below: int = below) -> list[torch.Tensor]:
            return [random_tensor(name, meta, variant, seed + salt, layout, below) for name, meta, seed, layout in described]

        try:
            if accepts(made_match(variant, make(0), draw)):
                yield draw, make
        except REFUSED:
            continue


def _computes_the_reference(variant: Variant, dtype: torch.dtype) -> bool:
    """Returns whether any draw was fit."""
    moved = {n: False for n in variant.tensors if n not in variant.pattern.no_grad and not variant.dims[n].endswith("int64")}
    count = 0
    for draw, make in _draws(variant, dtype):
        op, eager = operator_of(variant, draw), reference(variant, draw)

        def again(salt: int, make: Any = make, eager: Any = eager) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            tensors = make(salt)
            with torch.no_grad():
                return tensors, cotangents(outputs(eager(*tensors)), salt)

        try:
            tensors, douts = again(0)
            grads = [name in moved and t.is_floating_point() for name, t in zip(variant.tensors, tensors, strict=True)]
            if not all(map(_is_finite, evaluate(eager, tensors, grads, douts))):
                continue
        except REFUSED:
            continue
        count += 1
        try:
            _, found = compare(op, eager, tensors, grads, douts, slack=64, scale=1.0, few=64, strides=False, again=again)
        except AssertionError as e:
            raise AssertionError(f"{variant} in {dtype}, {numbers(variant, dtype, draw)}: {e}") from e
        for name, wanted, g in zip(variant.tensors, grads, found, strict=True):
            moved[name] = moved.get(name) or not wanted or g is not None and bool(g.any())
    if zero := [n for n, m in moved.items() if count and not m]:
        raise AssertionError(
            f"{variant}: the gradient of {', '.join(zero)} is 0 in every draw, so nothing was tested of it; give numbers= with"
            " which it is not, or name it in no_grad="
        )
    return count > 0


def _is_finite(tensors: Iterable[torch.Tensor | None]) -> bool:
    return all(torch.isfinite(t).all() for t in tensors if t is not None)


def _is_the_derivative(variant: Variant) -> None:
    """In fp64, where only a wrong formula is left of the difference: the gradient is autograd's of the reference."""
    for draw, make in _draws(variant, torch.float64):
        tensors = make(0)
        named = zip(variant.tensors, tensors, strict=True)
        grads = [t.is_floating_point() and name not in variant.pattern.no_grad for name, t in named]
        op = operator_of(variant, draw)
        try:
            with torch.no_grad():
                douts = cotangents(outputs(reference(variant, draw)(*tensors)), draw)
            wanted = evaluate(reference(variant, draw), tensors, grads, douts)
        except REFUSED:
            continue
        out, found = evaluate(op, tensors, grads, douts)
        if not _is_finite((*out, *found, *wanted[1])):
            continue
        for name, a, b in zip(variant.tensors, found, wanted[1], strict=True):
            assert (a is None) == (b is None), f"{variant}: the gradient of {name} is {'missing' if a is None else 'too much'}"
            if a is not None:
                error, size = (a - b).norm().item(), b.norm().item()
                by = f"off by {error:.3e} of {size:.3e}, {numbers(variant, draw=draw)}"
                narrow = "; is it computed in fp32?" if error <= 1e-5 * max(size, 1.0) else ""
                assert error <= 1e-9 * max(size, 1.0), f"{variant}: in fp64 the gradient of {name} is {by}{narrow}"
