"""`sloth.testing.check_pattern`: what is wrong with an entry of somebody's is found from the entry alone, and said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sloth
from sloth.rewriter.match.registry import unregister
from sloth.testing import check_pattern

CLAMPED = sloth.Construct("clamped", "clamped gate", anchor=lambda v: v.op == "sigmoid")


def operator(name: str, gain: float) -> Any:
    """clamp(u, least, most)·σ(g), with a gradient of u that is `gain` times too large."""

    @torch.library.custom_op(f"test_check_pattern::{name}", mutates_args=())
    def op(g: Tensor, u: Tensor, most: float, least: float) -> Tensor:
        wide = torch.promote_types(g.dtype, torch.float32)
        return (u.to(wide).clamp(least, most) * torch.sigmoid(g.to(wide))).to(g.dtype)

    @op.register_fake
    def _(g: Tensor, u: Tensor, most: float, least: float) -> Tensor:
        return torch.empty_like(g, memory_format=torch.contiguous_format)

    def backward(ctx: Any, d: Tensor) -> tuple:
        g, u = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in ctx.saved_tensors)
        s, inside = torch.sigmoid(g), (u >= ctx.least) & (u <= ctx.most)
        dg = d.to(g.dtype) * u.clamp(ctx.least, ctx.most) * s * (1 - s)
        return dg.to(d.dtype), (gain * d.to(g.dtype) * s * inside).to(d.dtype), None, None

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        g, u, ctx.most, ctx.least = inputs
        ctx.save_for_backward(g, u)

    op.register_autograd(backward, setup_context=setup)
    return op


def fp32(g: Tensor, u: Tensor, *, most: float, least: float) -> Tensor:
    return (u.float().clamp(least, most) * torch.sigmoid(g.float())).to(g.dtype)


RIGHT, WRONG = operator("right", 1.0), operator("wrong", 17.0)


@pytest.fixture
def entered() -> Iterator[Callable[..., Any]]:
    names = []

    def enter(op: Any, **options: Any) -> Any:
        names.append("clamped")
        return sloth.pattern(CLAMPED, op=op, dims={"g": "B S", "u": "B S"}, name="clamped", **options)(fp32)

    yield enter
    for name in names:
        unregister(name)


def same_dtypes(match: Any) -> None:
    match.require(match.g.meta.dtype == match.u.meta.dtype, "dtypes differ")


def test_a_right_entry_passes(entered: Callable[..., Any]) -> None:
    entered(RIGHT).check(same_dtypes)
    check_pattern("clamped")


def test_a_gradient_that_is_too_large_is_found(entered: Callable[..., Any]) -> None:
    """Though the numbers drawn first leave nothing of it: least above most."""
    with pytest.raises(AssertionError, match=r"clamped\[default\] in torch.float32, .*: gradient\[1\]: error"):
        check_pattern(entered(WRONG))


def test_a_gradient_that_is_always_zero_is_not_taken_for_tested(entered: Callable[..., Any]) -> None:
    entry = entered(WRONG, numbers={"most": (1.0,), "least": (2.0,)})
    with pytest.raises(AssertionError, match=r"the gradient of u is 0 in every draw.*numbers="):
        check_pattern(entry)


def test_checks_that_refuse_everything_are_told(entered: Callable[..., Any]) -> None:
    entry = entered(RIGHT)
    entry.check(lambda match: match.require(match.most == 7.0, "only 7"))
    with pytest.raises(AssertionError, match=r"is not matched in its own reference|refuse every draw"):
        check_pattern(entry)


def test_an_anchor_that_sees_nothing_is_told(entered: Callable[..., Any]) -> None:
    blind = sloth.Construct("blind", "blind", anchor=lambda v: False)

    @sloth.pattern(blind, op=WRONG, dims={"g": "B S", "u": "B S"}, name="blind")
    def entry(g: Tensor, u: Tensor, *, most: float, least: float) -> Tensor:
        return (u.float().clamp(least, most) * torch.tanh(g.float())).to(g.dtype)

    try:
        with pytest.raises(AssertionError):
            check_pattern(entry)
    finally:
        unregister("blind")


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no entry 'no_such'; there are attention"):
        check_pattern("no_such")
