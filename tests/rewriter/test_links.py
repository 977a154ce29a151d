"""Gradients flow where they do in eager and nowhere else.

`checked` compares outputs, whether they require a gradient, and every gradient or its absence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_legality import custom, derivative, entry, x_like  # noqa: F401  (entry is a fixture)
from toys import Call, captured, checked, llama_norm, matched, tables, turned

IDS = torch.arange(6) % 5


def head(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w).flatten(0, 1)


@torch._dynamo.allow_in_graph
def scaled_by_frozen(x, w):
    return F.silu(x) * w.data


# ---------------------------------------------------------------- links that break without an ATen call

FROZEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    ".data": lambda w: w.data,
    ".data of a view": lambda w: w.view(-1).data,
    "a view of .data": lambda w: w.data.view(-1),
    ".data of .data": lambda w: w.data.data,
    "torch.tensor": lambda w: torch.tensor(w),
    "new_tensor": lambda w: w.new_tensor(w),
    "Buffer": lambda w: torch.nn.Buffer(w.data),
    "by way of numpy": lambda w: torch.from_numpy(w.detach().numpy()),
}


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN.keys())
def test_a_frozen_weight_in_many_spellings(freeze: Callable) -> None:
    report = checked(Call(lambda m, x: llama_norm(x, freeze(m.w))), x_like(2, 3, 8))
    assert matched(report) == {"rms_norm": 1}


USES: dict[str, tuple[Callable[[Any, torch.Tensor], Any], dict[str, int]]] = {
    "layer norm": (lambda m, x: F.layer_norm(x, (8,), m.w.data), {"layer_norm": 1}),
    "a gate's other factor": (lambda m, x: F.silu(x * m.w) * (x * m.v).data, {"gated_mlp": 1}),
    "a residual": (lambda m, x: (h := (x + x.sin()), h + llama_norm(h.data, m.w))[1], {"rms_norm": 1}),
    "the input of its own square": (lambda m, x: m.w * (x * torch.rsqrt(x.data.pow(2).mean(-1, keepdim=True) + 1e-6)), {}),
    "half of RoPE": (lambda m, x: turned(x.data[None], *tables(1, 3, 8)) * m.w, {"rope_single": 1}),
    "a head": (lambda m, x: F.cross_entropy(head(x, torch.outer(m.w, m.v).data), IDS), {"linear_cross_entropy": 1}),
    "logits": (lambda m, x: F.cross_entropy(head(x, torch.outer(m.w, m.v)).data, IDS) + x.sum(), {"cross_entropy": 1}),
    "a LoRA's base": (
        lambda m, x: F.linear(x, torch.outer(m.w, m.v)).data + F.linear(F.linear(x, m.w[None]), m.v[:, None]) * 2.0,
        {"adapter": 1},
    ),
    "inside of one node": (lambda m, x: scaled_by_frozen(x, x * m.w), {"gated_mlp": 1}),
    "where gradients are off": (
        lambda m, x: (torch.set_grad_enabled(False), w := m.w.data, torch.set_grad_enabled(True), llama_norm(x, w))[-1],
        {"rms_norm": 1},
    ),
    "of memory that is written": (lambda m, x: (h := x * 2, h.mul_(3), llama_norm(h.data, m.w))[-1], {"rms_norm": 1}),
}


@pytest.mark.parametrize(("fn", "found"), USES.values(), ids=USES.keys())
def test_what_is_frozen_is_frozen_for_every_operator(fn: Callable[[Any, torch.Tensor], Any], found: dict) -> None:
    assert matched(checked(Call(fn), x_like(2, 3, 8))) == found


def test_a_tensor_made_of_another_is_still_linked() -> None:
    report = checked(Call(lambda m, x: llama_norm(torch.Tensor(x), torch.as_tensor(m.w))), x_like(2, 3, 8))
    assert matched(report) == {"rms_norm": 1}


def test_what_is_made_like_a_tensor_is_not_linked_to_it() -> None:
    made = [torch.zeros_like, torch.rand_like, lambda x: x.new_full((2, 3, 8), 2.0), lambda x: x.new_zeros(8)]
    (view,) = captured(Call(lambda m, x: [f(x) for f in made]), x_like(2, 3, 8))
    assert [v.meta.requires_grad for v in view.shadow.values if v.meta] == [True, *[False] * len(made)]


# ---------------------------------------------------------------- operands that an operator gives no gradient to

LOST: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "a learned divisor": lambda m, x: F.cross_entropy(head(x, torch.outer(m.w, m.v)), IDS, reduction="sum") / m.w[0],
    "a divisor of the input": lambda m, x: F.cross_entropy(head(x, torch.outer(m.w, m.v)), IDS, reduction="sum") / (x.sum() + 50),
    "learned tables": lambda m, x: turned(x, m.w.expand(2, 3, 8).view(2, 1, 3, 8)[:, 0], m.v.expand(2, 3, 8)),
}


@pytest.mark.parametrize("fn", LOST.values(), ids=LOST.keys())
def test_an_operand_without_a_gradient_that_needs_one(fn: Callable[[Any, torch.Tensor], Any]) -> None:
    checked(Call(fn), x_like(2, 3, 8))


def test_an_operator_that_forgets_an_operand_is_found_out(entry: Callable) -> None:  # noqa: F811
    """Nobody declared it: its backward pass is tried."""
    op = custom(lambda ctx, d: (d * ctx.saved_tensors[1].exp(), None))
    entry(op)
    fn = lambda m, x: x * (m.w * x).exp()  # noqa: E731
    assert [(s.status, s.reason) for s in checked(Call(fn), x_like(2, 3, 8)).sites if s.construct == "product"] == [
        ("gradient", f"{op._opoverload} gives no gradient to y")
    ]
    frozen = lambda m, x: (x * m.w) * x.detach().exp()  # noqa: E731
    assert matched(checked(Call(frozen), x_like(2, 3, 8)))


def test_an_operand_that_is_declared_to_get_none(entry: Callable) -> None:  # noqa: F811
    """On this device it would."""
    entry(custom(derivative), no_grad=("y",))
    fn = lambda m, x: x * (m.w * x).exp()  # noqa: E731
    assert [(s.construct, s.status) for s in checked(Call(fn), x_like(2, 3, 8)).sites] == [("product", "gradient")]


def attention(q, k, v, slopes, at):
    bias = slopes.view(1, -1, 1, 1) * at.float().view(1, 1, 1, -1)
    mask = torch.where((at[None] <= at[:, None])[None, None], bias, torch.finfo(torch.float32).min)
    return F.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("pick", [lambda q, k, v: (q, k, k), lambda q, k, v: (q, q, q), lambda q, k, v: (k, q, k)])
def test_operands_that_are_one_tensor_hide_no_other(pick: Callable) -> None:
    """Learned slopes of ALiBi, which the operator gives no gradient, where keys are values or queries."""
    q, k, v = (x_like(1, 2, 4, 8) * (i + 1) for i in range(3))
    fn = lambda m, q, k, v: attention(*pick(q, k, v), m.w[:2], torch.arange(4))  # noqa: E731
    assert [(s.construct, s.status) for s in checked(Call(fn), *(t.detach().requires_grad_() for t in (q, k, v))).sites] == [
        ("attention", "gradient")
    ]


def test_a_result_that_is_an_operand() -> None:
    """h = x + r is its own weight: a norm that gives h out would read what it makes."""
    fn = lambda m, x: (h := x + x.sin(), llama_norm(h, h) + h)[1]  # noqa: E731
    assert sum(matched(checked(Call(fn), x_like(8))).values()) == 1


# ---------------------------------------------------------------- results that need no gradient


@pytest.mark.parametrize("q, k", [(lambda x: x.detach(), lambda x: x), (lambda x: x, lambda x: x.data)])
def test_a_rotation_that_needs_no_gradient_beside_one_that_does(q: Callable, k: Callable) -> None:
    fn = lambda m, a, b: (turned(q(a), *tables(2, 3, 8)), turned(k(b), *tables(2, 3, 8)))  # noqa: E731
    report = checked(Call(fn), x_like(2, 2, 3, 8), x_like(2, 2, 3, 8) * 2)
    assert matched(report) == {"rope_single": 2}


def test_a_residual_stream_that_needs_no_gradient() -> None:
    """The weight of the norm does."""
    fn = lambda m, x: (h := x + x.sin(), llama_norm(h, m.w), h)[1:]  # noqa: E731
    (site,) = checked(Call(fn), x_like(2, 3, 8, grad=False)).sites
    assert site.variant == "add_rms_norm[no_weight]"


def test_adapters_of_which_one_is_frozen() -> None:
    """Projections of one input go into one call, if all of them need a gradient or none does."""

    def fn(m, x):
        base, a, b = torch.outer(m.w, m.v).detach(), m.w[None], m.v[:, None]
        trained = F.linear(x, base) + F.linear(F.linear(x, a), b) * 2.0
        frozen = F.linear(x, base * 2) + F.linear(F.linear(x, a.detach()), b.detach()) * 2.0
        return trained, frozen

    assert matched(checked(Call(fn), x_like(2, 3, 8, grad=False))) == {"lora": 2}
