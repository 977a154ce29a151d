"""Operands that no tensor of the pattern is: values that an operand is made of, in the graph or in the graphs around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from toys import compiled, missed

import sloth
from sloth.rewriter.backend import listening
from sloth.rewriter.backend import sloth as backend
from sloth.rewriter.graph.value import Value
from sloth.rewriter.report import Report

torch.library.define("sloth_tests::times_exp_twice", "(Tensor x, Tensor source) -> Tensor")


@torch.library.impl("sloth_tests::times_exp_twice", "CompositeImplicitAutograd")
def _(x: Tensor, source: Tensor) -> Tensor:
    return x * (2 * source).exp()


def source_of(match: Any) -> Value | None:
    """s, where the pattern's y is s + s."""
    y = match.y
    while y.op == "input" and y.captured_from is not None:
        y = y.captured_from
    return y.args[0] if y.op in ("add", "mul") else None


@pytest.fixture(autouse=True)
def entry() -> Iterator[None]:
    construct = sloth.Construct("twice", "twice", anchor=lambda v: v.op == "mul" and any(a.op == "exp" for a in v.inputs))
    op = torch.ops.sloth_tests.times_exp_twice.default

    @sloth.pattern(construct, op=op, dims={"x": "B D", "y": "B D"}, name="twice", source=source_of)
    def _(x, y):
        return x * y.exp()

    yield
    sloth.unregister("twice")


class Body(nn.Module):
    """A layer in a checkpoint that reads y, which is made outside."""

    def __init__(self, depth: int = 1):
        super().__init__()
        self.w, self.depth = nn.Parameter(torch.randn(4)), depth

    def layer(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * self.w) * y.exp()

    def nested(self, depth: int, x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(self.nested, depth - 1, x, y, use_reentrant=False).sin() if depth else self.layer(x, y)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.nested(self.depth, x, s + s)


def trained(model: nn.Module, *args: Tensor) -> Report:
    """One step, its loss and gradients those of eager."""
    with listening() as graphs:
        ours = compiled(model)(*args)
    eager = model(*args)
    torch.testing.assert_close(ours, eager)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), model.w) for out in (ours, eager)), strict=True):
        torch.testing.assert_close(a, b)
    return Report(graphs)


def twice(report: Report) -> list[str]:
    return [s.status for s in report.sites if s.construct == "twice"]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_operator_gets_what_the_operand_is_made_of(depth: int) -> None:
    torch.manual_seed(0)
    report = trained(Body(depth), torch.randn(3, 4), torch.randn(3, 4))
    assert twice(report) == ["matched"]


def test_it_is_one_more_input_of_the_body() -> None:
    found = []

    def look(gm: fx.GraphModule, inputs: list) -> Any:
        found.append(gm)
        return backend(gm, inputs, options={"sloth.inner_backend": "eager"})

    torch._dynamo.reset()
    torch.compile(Body(), backend=look)(torch.randn(3, 4), torch.randn(3, 4))
    (call,) = (n for n in found[0].graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator))
    inputs = found[0].get_submodule(call.args[0].target).graph.find_nodes(op="placeholder")
    assert len(inputs) == len(call.args) - 1
    assert [n.name for n in inputs if n.users][-1].endswith("passed")


def test_what_wants_a_gradient_is_not_passed_by() -> None:
    """The operator's formula knows the pattern's tensors; a gradient that flows past them would be another matter."""
    torch.manual_seed(0)

    class Source(Body):
        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return super().forward(x, s * self.w)

    report = trained(Source(), torch.randn(3, 4), torch.randn(3, 4))
    assert twice(report) == ["gradient"]


def test_a_source_that_is_written() -> None:
    class Written(Body):
        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            s = s.clone()
            y = s + s
            s.mul_(2)
            return self.nested(self.depth, x, y) + s

    torch.manual_seed(0)
    for depth in (0, 1):
        report = trained(Written(depth), torch.randn(3, 4), torch.randn(3, 4))
        assert twice(report) == ["mutation"], missed(report)


def test_a_source_that_a_call_around_computes_inside() -> None:
    """When the plan is made it is a node; when the body is rewritten, the graph around it holds the sum alone."""

    @torch.library.custom_op("sloth_tests::exp_twice", mutates_args=())
    def exp_twice(s: Tensor) -> Tensor:
        return s.exp() + s.exp()

    exp_twice.register_fake(lambda s: torch.empty_like(s))
    sums = sloth.Construct("sums", "sums", anchor=lambda v: v.op == "add")

    @sloth.pattern(sums, op=exp_twice, dims={"s": "B D"}, name="sums")
    def _(s):
        return s.exp() + s.exp()

    class Source(Body):
        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return super().forward(x, s.exp())

    try:
        torch.manual_seed(0)
        report = trained(Source(), torch.randn(3, 4), torch.randn(3, 4))
    finally:
        sloth.unregister("sums")
    assert [(s.construct, s.status) for s in report.sites] == [("sums", "matched"), ("twice", "hidden")]
