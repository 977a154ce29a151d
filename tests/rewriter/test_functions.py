"""Autograd functions that are proven to be linear layers, writes to fresh temporaries, and memory that is rebound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import Call, captured, checked, llama_norm, matched

BF16 = torch.bfloat16


def x_like(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def weight(n: int = 6, k: int = 8) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1))


def function(
    forward: Callable[..., Tensor], backward: Callable[..., tuple], save: Callable[..., tuple] = lambda x, w, b: (w,)
) -> type[torch.autograd.Function]:
    """y = forward(x, w, b) with gradients backward(dy, needs, *saved)."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(*save(x, w, b))
            return forward(x, w, b)

        @staticmethod
        def backward(ctx, dy):
            return backward(dy, ctx.needs_input_grad, *ctx.saved_tensors)

    return Made


def seen_through(made: type[torch.autograd.Function], *args: Tensor | None) -> bool:
    """Does the shadow show the function as a linear layer?"""
    outer, *_ = captured(lambda *args: made.apply(*args), *args)
    (out,) = outer.gm.graph.find_nodes(op="output")[0].args[0]
    value = outer.env[out]
    while value.op in ("cast", "view"):
        value = value.args[0]
    return value.op == "linear" and not outer.opaque


def plain_backward(dy, needs, w):
    return dy @ w, None, None


def rows(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1])


# ---------------------------------------------------------------- the derivative, in many spellings

RIGHT = {
    "plain": function(lambda x, w, b: F.linear(x, w), plain_backward),
    "matmul": function(lambda x, w, b: F.linear(x, w), lambda dy, needs, w: (torch.matmul(dy, w), None, None)),
    "rows": function(
        lambda x, w, b: F.linear(x, w), lambda dy, needs, w: ((rows(dy) @ w).view(*dy.shape[:-1], w.shape[1]), None, None)
    ),
    "weight twice transposed": function(lambda x, w, b: F.linear(x, w.t().contiguous().t()), plain_backward),
    "weight scaled": function(lambda x, w, b: F.linear(x, w * 2), lambda dy, needs, w: (dy @ (w * 2), None, None)),
    "weight through a lower dtype": function(
        lambda x, w, b: F.linear(x, w.to(BF16).to(x.dtype)), lambda dy, needs, w: (dy @ w.to(BF16).to(dy.dtype), None, None)
    ),
    "asked whether": function(
        lambda x, w, b: F.linear(x, w), lambda dy, needs, w: (dy @ w if needs[0] else None, None, None)
    ),
    "no_grad in the forward": function(lambda x, w, b: F.linear(x.detach(), w), plain_backward),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in RIGHT if n != "no_grad in the forward"])
def test_derivatives_are_seen_through(name: str) -> None:
    assert seen_through(RIGHT[name], x_like(2, 3, 8), weight(), None)


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_seen_through_trains_as_before(name: str) -> None:
    checked(Call(lambda m, x: llama_norm(RIGHT[name].apply(x, weight(8, 8), None), m.w)), x_like(2, 3, 8))


def with_bias(db: Callable[[Tensor], Tensor]) -> type[torch.autograd.Function]:
    return function(F.linear, lambda dy, needs, w: (dy @ w, None, db(dy) if needs[2] else None))


@pytest.mark.parametrize("db", [lambda dy: dy.sum((0, 1)), lambda dy: dy.sum([1, 0]), lambda dy: rows(dy).sum(0)])
def test_gradients_of_a_bias(db: Callable[[Tensor], Tensor]) -> None:
    assert seen_through(with_bias(db), x_like(2, 3, 8), weight(), x_like(6))
    checked(Call(lambda m, x: with_bias(db).apply(x, weight(8, 8), m.w)), x_like(2, 3, 8))


def test_a_bias_that_wants_none_gets_none() -> None:
    assert seen_through(function(F.linear, plain_backward), x_like(2, 3, 8), weight(), x_like(6).detach())


def test_low_precision_with_casts() -> None:
    made = function(
        lambda x, w, b: F.linear(x.to(BF16), w.to(BF16)).to(x.dtype),
        lambda dy, needs, w: ((dy.to(BF16) @ w.to(BF16)).float(), None, None),
    )
    checked(Call(lambda m, x: made.apply(x, weight(8, 8), None)), x_like(2, 3, 8), tolerance=1e-2)


# ---------------------------------------------------------------- what is not

WRONG = {
    "twice": lambda dy, needs, w: (2 * (dy @ w), None, None),
    "negative": lambda dy, needs, w: (-(dy @ w), None, None),
    "another weight": lambda dy, needs, w: (dy @ (w + 1), None, None),
    "transposed": lambda dy, needs, w: (dy @ w.t(), None, None),
    "of tanh(dy)": lambda dy, needs, w: (dy.tanh() @ w, None, None),
    "straight through": lambda dy, needs, w: (dy.clone(), None, None),
    "other rows": lambda dy, needs, w: ((dy.flip(0)) @ w, None, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_backward_is_kept(name: str) -> None:
    made = function(lambda x, w, b: F.linear(x, w), WRONG[name])
    assert not seen_through(made, x_like(2, 3, 8), weight(8, 8), None)
    report = checked(Call(lambda m, x: llama_norm(made.apply(x, weight(8, 8), None), m.w)), x_like(2, 3, 8))
    assert matched(report) == {"rms_norm": 1}, "what is behind it is matched all the same"


def test_a_gradient_for_the_wrong_input() -> None:
    """x gets none, the bias gets x's."""
    made = function(F.linear, lambda dy, needs, w: (None, None, dy @ w))
    assert not seen_through(made, x_like(8, 8), weight(8, 8), x_like(8, 8))


def test_a_weight_that_wants_a_gradient() -> None:
    def backward(dy, needs, w, x):
        return dy @ w, rows(dy).t() @ rows(x), None

    made = function(lambda x, w, b: F.linear(x, w), backward, lambda x, w, b: (w, x))
    assert not seen_through(made, x_like(2, 3, 8), weight().requires_grad_(), None)
    assert seen_through(made, x_like(2, 3, 8), weight(), None), "a frozen one is fine"
    checked(Call(lambda m, x: made.apply(x, m.w * weight(8, 8), None)), x_like(2, 3, 8))


@pytest.mark.parametrize(
    "db", [lambda dy: dy.sum((0, 1)) * 2, lambda dy: dy.sum(0)[0], lambda dy: dy[0].sum(0), lambda dy: dy.mean((0, 1))]
)
def test_other_gradients_of_a_bias(db: Callable[[Tensor], Tensor]) -> None:
    assert not seen_through(with_bias(db), x_like(2, 3, 8), weight(), x_like(6))
    checked(Call(lambda m, x: with_bias(db).apply(x, weight(8, 8), m.w)), x_like(2, 3, 8))


@pytest.mark.parametrize(
    "forward", [lambda x, w, b: F.linear(x, w) * 2, lambda x, w, b: F.linear(x, w).relu(), lambda x, w, b: F.linear(x, w) + 1]
)
def test_other_forward_passes(forward: Callable[..., Tensor]) -> None:
    made = function(forward, plain_backward)
    assert not seen_through(made, x_like(2, 3, 8), weight(), None)
    checked(Call(lambda m, x: made.apply(x, weight(8, 8), None)), x_like(2, 3, 8))


# ---------------------------------------------------------------- writes to fresh temporaries


def linear_args(fn: Callable[..., Tensor], *args: Tensor) -> list[Any]:
    """The operations that the weight of the one linear layer is made of, from the last."""
    outer, *_ = captured(fn, *args)
    (product,) = [v for v in outer.shadow.values if v.op == "linear"]
    made, v = [], product.args[1]
    while v.op not in ("input", "constant"):
        made.append((v.op, v.mutated_storage))
        v = v.args[0]
    return [*made, (v.op, v.mutated_storage)]


def fresh_cast(x, q, s):
    w = q.to(x.dtype)
    w = w.mul_(s)
    return F.linear(x, w)


def statement(x, q, s):
    w = q.to(x.dtype)
    w.mul_(s)
    return F.linear(x, w)


def fresh_chain(x, q, s):
    return F.linear(x, q.to(x.dtype).mul_(s).add_(1))


def quantised() -> tuple[Tensor, Tensor]:
    return torch.randint(-128, 127, (8, 8), dtype=torch.int8), torch.rand(8, 1)


def test_a_write_to_a_fresh_temporary_is_seen_through() -> None:
    """bitsandbytes scales its int8 weights so."""
    made = linear_args(fresh_cast, x_like(2, 8), *quantised())
    assert [op for op, _ in made] == ["mul", "cast", "input"] and not any(mutated for _, mutated in made)


def transposed_twice(x, q, s):
    w = q.to(x.dtype) * 1.5
    same = w.t().t()  # is w
    same.mul_(s)
    return F.linear(x, w)


def test_a_write_that_rounds() -> None:
    """bf16.mul_(fp32) is the product in fp32, rounded."""
    q, s = quantised()
    made = linear_args(lambda x: F.linear(x, q.to(BF16).mul_(s)), x_like(2, 8, dtype=BF16))
    assert [op for op, _ in made][:2] == ["cast", "mul"]
    checked(Call(lambda m, x: F.linear(x, q.to(BF16).mul_(s))), x_like(2, 8, dtype=BF16))


def read_again(x, q, s):
    w = q.to(x.dtype)
    before = w * 1.5
    w.mul_(s)
    return F.linear(x, w) + before + w


def read_before(x, q, s):
    w = q.to(x.dtype)
    other = w.view(-1)
    w.mul_(s)
    return F.linear(x, w) + other.view(8, 8)


def no_copy(x, q, s):
    w = s.expand(8, 8).contiguous()
    same = w.contiguous()  # is w
    same.mul_(2)
    return F.linear(x, w)


def no_cast(x, q, s):
    w = s.expand(8, 8).clone()
    same = w.to(w.dtype)  # is w
    same.mul_(2)
    return F.linear(x, w) * same


def view_of_a_fresh_one(x, q, s):
    w = q.to(x.dtype)
    w[0].mul_(2)
    w.view(-1)[9:].add_(1)
    return F.linear(x, w)


def of_an_input(x, q, s):
    t = s.view(-1)
    t.mul_(2)
    return F.linear(x, q.to(x.dtype) * s)


def twice(x, q, s):
    w = q.to(x.dtype)
    w.mul_(s)
    w.mul_(w)
    return F.linear(x, w)


ALIASED = (read_again, read_before, transposed_twice, no_copy, no_cast, view_of_a_fresh_one, of_an_input)


@pytest.mark.parametrize("fn", [fresh_cast, fresh_chain, statement, twice, *ALIASED], ids=lambda f: f.__name__)
def test_writes_leave_results_right(fn: Callable[..., Tensor]) -> None:
    """Whatever is seen through: a norm in front and one behind, values and gradients of eager, the inputs written as in eager."""
    checked(Call(lambda m, x, q, s: llama_norm(fn(llama_norm(x, m.w), q, s), m.v)), x_like(8, 8), *quantised())


@pytest.mark.parametrize("fn", [read_before, transposed_twice, no_copy, no_cast, view_of_a_fresh_one], ids=lambda f: f.__name__)
def test_writes_to_what_has_another_name_are_not(fn: Callable[..., Tensor]) -> None:
    """The weight that is multiplied with lies in memory that somebody writes."""
    assert linear_args(fn, x_like(8, 8), *quantised())[0][1]


@pytest.mark.parametrize("write", [lambda y: y.mul_(2), lambda y: y.add_(1), lambda y: y.relu_()])
@pytest.mark.parametrize("alias", [lambda x: x.contiguous(), lambda x: x.to(x.dtype), lambda x: x.view(3, 2, 8), lambda x: x[:]])
def test_a_written_alias_of_an_input_is_no_fresh_tensor(
    alias: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]
) -> None:
    """The input itself is another one afterwards: what was computed of it before is not what would be computed now."""

    def fn(m, x):
        before = llama_norm(x, m.w)
        write(alias(x))
        return before + llama_norm(x, m.v)

    report = checked(Call(fn), x_like(2, 3, 8).detach(), options={"sloth.inner_backend": "eager"})
    assert sorted(s.status for s in report.sites) == ["matched", "mutation"], "the one behind the write is of what was written"


def test_rebound_memory_is_not_written() -> None:
    """`p.data = q` (bitsandbytes casts its biases so) gives p another tensor; q and what is made of q are as they were."""

    def fn(m, x, p, q):
        p.data = q
        return llama_norm(x, q) + p

    assert matched(checked(Call(fn), x_like(2, 3, 8), torch.ones(8), torch.rand(8))) == {"rms_norm": 1}
