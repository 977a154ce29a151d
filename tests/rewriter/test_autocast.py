"""Autocast with operands of several dtypes: each is cast, and the casts are values of the shadow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import Call, captured, checked

from sloth.rewriter.match.pattern import Variant
from sloth.rewriter.match.registry import patterns

BF16, FP32 = torch.bfloat16, torch.float32


def tensor(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def operands(*args: Tensor) -> list[tuple[str, torch.dtype]]:
    """What the linear layer of these operands is given under autocast."""
    with torch.autocast("cpu", BF16):
        (view,) = captured(lambda *args: F.linear(*args), *args)
    (product,) = [v for v in view.shadow.values if v.op == "linear"]
    assert product.meta.dtype == BF16
    return [(v.op, v.meta.dtype) for v in product.inputs]


@pytest.mark.parametrize(
    "x, w, expected",
    [
        (BF16, FP32, ["input", "cast"]),  # fp32 adapters over bf16 states
        (FP32, BF16, ["cast", "input"]),  # a bf16 base behind an fp32 norm
        (FP32, FP32, ["cast", "cast"]),
        (BF16, BF16, ["input", "input"]),
    ],
)
def test_each_operand_is_cast(x: torch.dtype, w: torch.dtype, expected: list[str]) -> None:
    assert operands(tensor(2, 8, dtype=x), tensor(8, 8, dtype=w)) == [(op, BF16) for op in expected]


def test_a_bias_of_another_dtype_is_cast_too() -> None:
    found = operands(tensor(2, 8, dtype=BF16), tensor(8, 8, dtype=BF16), tensor(8))
    assert found == [("input", BF16), ("input", BF16), ("cast", BF16)]


@pytest.mark.parametrize("x, w", [(BF16, FP32), (FP32, BF16)])
def test_mixed_operands_train_as_in_eager(x: torch.dtype, w: torch.dtype) -> None:
    with torch.autocast("cpu", BF16):
        checked(
            Call(lambda m, x, w: F.linear(F.linear(x, w), w) * m.w), tensor(2, 8, dtype=x), tensor(8, 8, dtype=w), tolerance=2e-2
        )


def test_without_autocast_mixed_sums_are_not_cast() -> None:
    """Type promotion is the operation's own."""
    (view,) = captured(lambda a, b: a + b, tensor(8, dtype=BF16), tensor(8))
    (total,) = [v for v in view.shadow.values if v.op == "add"]
    assert total.meta.dtype == FP32 and [v.op for v in total.inputs] == ["input", "input"]


def test_sums_of_mixed_dtypes_are_promoted_under_autocast_as_well() -> None:
    with torch.autocast("cpu", BF16):
        (view,) = captured(lambda a, b: a + b, tensor(8, dtype=BF16), tensor(8))
    (total,) = [v for v in view.shadow.values if v.op == "add"]
    assert total.meta.dtype == FP32 and {v.meta.dtype for v in total.inputs} == {BF16, FP32}


def casts(variant: Variant) -> int:
    """Of its reference, traced anew."""
    todo, seen = [variant._traced_loose().main], set()
    while todo:
        seen.add(v := todo.pop())
        todo += v.inputs
    return sum(v.op == "cast" for v in seen)


def test_references_are_traced_alike_whatever_is_ambient() -> None:
    """The first call of a process may stand under autocast."""
    (variant,) = (v for p in patterns() if p.name == "eager_attention" for v in p.variants if v.name == "divided_wide")
    with torch.autocast("cpu", BF16):
        under = casts(variant)
    assert under == casts(variant) > 0
