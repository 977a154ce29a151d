"""Patterns with dtypes for parameters, factors that may be 1, and operators of which one call stands for several matches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from toys import Call, checked, compiled, matched, missed

import sloth
from sloth.rewriter import backend
from sloth.rewriter.match.registry import patterns

BF16, FP32 = torch.bfloat16, torch.float32
calls: list[tuple] = []

# ---------------------------------------------------------------- two operators


@torch.library.custom_op("sloth_tests::scaled_relu", mutates_args=())
def scaled_relu(x: Tensor, gate: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """relu(x) · scale + gate, rounded once to `dtype`."""
    calls.append((scale, dtype))
    return (x.relu().double() * scale + gate.double()).to(dtype)


@scaled_relu.register_fake
def _(x, gate, scale, dtype):
    return torch.empty_like(x, dtype=dtype)


def _setup(ctx, inputs, output):
    x, gate, ctx.scale, _ = inputs
    ctx.save_for_backward(x, gate)


def _backward(ctx, d):
    x, gate = ctx.saved_tensors
    return (d.double() * ctx.scale * (x > 0)).to(x.dtype), d.to(gate.dtype), None, None


scaled_relu.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("sloth_tests::relus", mutates_args=())
def relus(x: Tensor, gate: list[Tensor], scale: list[float], power: int) -> list[Tensor]:
    """relu(gate)^power · x · scale for each gate and scale."""
    calls.append((len(gate), tuple(scale), power))
    return [g.relu() ** power * x * s for g, s in zip(gate, scale, strict=True)]


@relus.register_fake
def _(x, gate, scale, power):
    return [torch.empty_like(x) for _ in gate]


def _setup_many(ctx, inputs, output):
    x, gate, ctx.scale, ctx.power = inputs
    ctx.save_for_backward(x, *gate)


def _backward_many(ctx, d):
    x, *gate = ctx.saved_tensors
    p, each = ctx.power, list(zip(d, gate, ctx.scale, strict=True))
    dx = sum(di * g.relu() ** p * s for di, g, s in each)
    return dx, [di * x * s * p * g.relu() ** (p - 1) for di, g, s in each], None, None


relus.register_autograd(_backward_many, setup_context=_setup_many)

RELU = sloth.Construct("scaled_relu", "scaled ReLU", anchor=lambda v: v.op == "relu")
DIMS = {"x": "B S E", "gate": "B S E"}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    known = {p.name for p in patterns()}
    calls.clear()
    yield
    for p in patterns():
        if p.name not in known:
            sloth.unregister(p.name)


def x_like(dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


# ---------------------------------------------------------------- dtypes


def typed() -> Any:
    @sloth.pattern(RELU, op=scaled_relu, dims=DIMS, name="typed")
    def typed(x, gate, *, scale: float, dtype: torch.dtype):
        return (x.relu() * scale + gate).to(dtype)

    return typed


@pytest.mark.parametrize("source, target", [(FP32, BF16), (BF16, FP32), (FP32, torch.float16), (FP32, torch.float64)])
def test_a_dtype_is_bound_to_that_of_the_model(source: torch.dtype, target: torch.dtype) -> None:
    """Also to the dtypes that the loose reference is traced with."""
    typed()
    report = checked(Call(lambda m, x: (x.relu() * 0.5 + x.exp()).to(target)), x_like(source), tolerance=2e-2)
    assert matched(report) == {"typed": 1} and (0.5, target) in calls


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_cast_is_a_cast_to_the_same_dtype(dtype: torch.dtype) -> None:
    typed()
    report = checked(Call(lambda m, x: x.relu() * 0.5 + x.exp()), x_like(dtype), tolerance=2e-2)
    assert matched(report) == {"typed": 1} and (0.5, dtype) in calls


def test_two_dtypes_are_bound_apart() -> None:
    """A cast in the middle and one behind."""

    @sloth.pattern(RELU, op=scaled_relu, dims=DIMS, name="two", dtype=lambda match: match.last)
    def two(x, gate, *, scale: float, middle: torch.dtype, last: torch.dtype):
        return ((x.relu() * scale).to(middle) + gate).to(last)

    seen = []
    two.check(lambda match: seen.append((match.middle, match.last)))
    report = checked(Call(lambda m, x: ((x.relu() * 0.5).to(BF16) + x.exp()).to(torch.float16)), x_like(), tolerance=2e-2)
    assert matched(report) == {"two": 1} and (BF16, torch.float16) in seen
    seen.clear()
    report = checked(Call(lambda m, x: (x.relu() * 0.5).to(BF16) + x.exp()), x_like(), tolerance=2e-2)
    assert matched(report) == {"two": 1} and set(seen) == {(BF16, FP32)}


def test_rounding_in_another_place_is_no_match() -> None:
    """x · scale in bf16 and then back in fp32 is not x · scale in fp32."""
    typed()
    report = checked(Call(lambda m, x: (x.relu() * 0.5).to(BF16).float() + x.exp()), x_like())
    assert not matched(report) and len(missed(report)) == 1


# ---------------------------------------------------------------- a factor of 1


@pytest.mark.parametrize("scale", [1.0, 1, 2.0, -1.0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_factor_of_one_is_no_node(scale: float, dtype: torch.dtype) -> None:
    """x · 1 is x in the model as in the reference: the operator is told 1."""
    typed()
    report = checked(Call(lambda m, x: (x.relu() * scale + x.exp()).to(FP32)), x_like(dtype), tolerance=2e-2)
    assert matched(report) == ({"typed": 1} if scale != -1.0 else {}), "−x is another operation"
    assert scale == -1.0 or (float(scale), FP32) in calls


def test_the_factor_may_not_be_written_at_all() -> None:
    typed()
    report = checked(Call(lambda m, x: x.relu() + x.exp()), x_like())
    assert matched(report) == {"typed": 1} and (1.0, FP32) in calls


def test_a_factor_that_stands_elsewhere_is_not_taken_for_one() -> None:
    """relu(2x) + gate: the factor is inside."""
    typed()
    report = checked(Call(lambda m, x: (x * 2).relu() + x.exp()), x_like())
    assert matched(report) == {"typed": 1} and {s for s, _ in calls} == {1.0}


# ---------------------------------------------------------------- one call for several matches


def many(power: int = 2) -> Any:
    @sloth.pattern(RELU, op=relus, dims=DIMS, name=f"many{power}", power=power)
    def many(x, gate, *, scale: float):
        return gate.relu() ** power * x * scale

    return many


def calls_of(op: Any, model: Call, x: Tensor) -> list[fx.Node]:
    found: list[fx.Node] = []
    with pytest.MonkeyPatch.context() as patch:
        compile_with = backend.compile_with

        def look(inner, gm, example_inputs):
            found.extend(gm.graph.find_nodes(op="call_function", target=op._opoverload))
            return compile_with(inner, gm, example_inputs)

        patch.setattr(backend, "compile_with", look)
        compiled(model)(x)
    return found


def three(m, x):
    a = m.w.expand_as(x).relu().square() * x * 0.5
    b = m.v.expand_as(x).relu().square() * x * 3.0
    return a + b, x.exp().relu().square() * x * 2.0


def test_matches_of_one_input_are_one_call() -> None:
    many()
    report = checked(Call(three), x_like())
    assert matched(report) == {"many2": 3}
    assert {c for c in calls} == {(3, (0.5, 3.0, 2.0), 2)}
    (call,) = calls_of(relus, Call(three), x_like())
    assert [len(a) for a in call.args[1:3]] == [3, 3]


def test_matches_of_other_inputs_are_other_calls() -> None:
    many()

    def fn(m, x):
        y = x.sin()
        return m.w.expand_as(x).relu().square() * x * 0.5, m.v.expand_as(x).relu().square() * y * 3.0

    assert matched(checked(Call(fn), x_like())) == {"many2": 2}
    assert [len(n.args[1]) for n in calls_of(relus, Call(fn), x_like())] == [1, 1]


def test_other_arguments_must_agree() -> None:
    """Squares and cubes are not one call: the power is no list."""
    many(2)
    many(3)

    def fn(m, x):
        return [(m.w + s).expand_as(x).relu() ** p * x * s for p, s in ((2, 0.5), (3, 0.6), (2, 3.0))]

    assert matched(checked(Call(fn), x_like())) == {"many2": 2, "many3": 1}
    assert sorted(len(n.args[1]) for n in calls_of(relus, Call(fn), x_like())) == [1, 2]


def test_matches_that_need_each_other_are_calls_of_their_own() -> None:
    """The second's gate is made of the first's result."""
    many()

    def fn(m, x):
        first = m.w.expand_as(x).relu().square() * x * 0.5
        return first.sin().relu().square() * x * 3.0

    assert matched(checked(Call(fn), x_like())) == {"many2": 2}
    assert [len(n.args[1]) for n in calls_of(relus, Call(fn), x_like())] == [1, 1]


def test_matches_of_other_regions_are_calls_of_their_own() -> None:
    """One wants gradients, the other has none."""
    many()

    def fn(m, x):
        with torch.no_grad():
            target = m.w.expand_as(x).relu().square() * x * 0.5
        return m.v.expand_as(x).relu().square() * x * 3.0 + target

    assert matched(checked(Call(fn), x_like())) == {"many2": 2}
    assert [len(n.args[1]) for n in calls_of(relus, Call(fn), x_like())] == [1, 1]
