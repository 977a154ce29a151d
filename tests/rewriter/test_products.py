"""Products by einsum and by broadcast multiplication are matrix products, and compute what they did."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from test_normal_form import evaluate
from torch import Tensor
from toys import Call, checked, inputs_like, matched, normalise

from sloth.rewriter.graph.value import Value, ValueGraph
from sloth.rewriter.match.registry import patterns

SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "d": 6, "e": 7}


def equations() -> list[str]:
    """Orders of dimensions of q kᵀ and p v, batches before, between and behind."""
    found = []
    for left, right, result in (("bhid", "bhjd", "bhij"), ("bhij", "bhjd", "bhid"), ("bid", "bjd", "bij"), ("bid", "ed", "bie")):
        orders = itertools.product(*(itertools.permutations(x) for x in (left, right, result)))
        found += [",".join(map("".join, o[:2])) + "->" + "".join(o[2]) for o in orders]
    return found


def values(fn: Callable[..., Tensor], *tensors: Tensor) -> Value:
    shadow = ValueGraph()
    return normalise(shadow, fn, inputs_like(shadow, list(tensors)))


def of(v: Value) -> set[str]:
    """The operations that it is made of."""
    return {v.op} | {op for x in v.inputs for op in of(x)}


@pytest.mark.parametrize("equation", random.Random(0).sample(equations(), 40))
def test_equations(equation: str) -> None:
    a, b = (torch.randn([SIZES[x] for x in names]) for names in equation.partition("->")[0].split(","))
    product = values(lambda a, b: torch.einsum(equation, a, b), a, b)
    assert of(product) & {"matmul", "matmul_transposed", "linear"} and "einsum" not in of(product)
    found = evaluate(product, {"x0": a, "x1": b}, {})
    torch.testing.assert_close(found, torch.einsum(equation, a, b))


SPELLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.transpose(2, 3),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "with dots": lambda q, k: torch.einsum("...id, ...jd -> ...ij", q, k),
    "implied": lambda q, k: torch.einsum("abcd,abed", q, k),
    "broadcast": lambda q, k: (q[:, :, :, None] * k[:, :, None]).sum(-1),
    "broadcast, in another order": lambda q, k: torch.sum(k.unsqueeze(2) * q.unsqueeze(3), dim=4),
}


def test_spellings_meet() -> None:
    shadow, q = ValueGraph(), torch.randn(2, 3, 4, 6)
    inputs = inputs_like(shadow, [q, torch.randn(2, 3, 5, 6)])
    found = {name: normalise(shadow, fn, inputs) for name, fn in SPELLED.items() if name != "implied"}
    assert len(set(found.values())) == 1, found


OTHERS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda q, k: torch.einsum("bhid,bhid->bhi", q, q),
    lambda q, k: torch.einsum("bhid,bhjd->hij", q, k),
    lambda q, k: torch.einsum("bhid,bhjd->bhijd", q, k),
    lambda q, k: torch.einsum("bhid,bhjd,bhjd->bhij", q, k, k),
    lambda q, k: torch.einsum("bhii->bhi", q @ q.mT),
    lambda q, k: (q * q).sum(-1),
    lambda q, k: (q[:, :, :, None] * k[:, :, None]).sum((-1, 0)),
    lambda q, k: (q[:, :, :, None] * k[:, :, None]).sum(-2),
]


@pytest.mark.parametrize("fn", OTHERS)
def test_what_is_no_product_of_two(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    q, k = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 6)
    v = values(fn, q, k)
    if "einsum" not in of(v):
        torch.testing.assert_close(evaluate(v, {"x0": q, "x1": k}, {}), fn(q, k))


def attention(scores: Callable, weigh: Callable) -> Callable:
    def fn(m, x):
        q = (x * m.w).unflatten(-1, (2, 4))
        seen = torch.arange(6) <= torch.arange(6)[:, None]
        return weigh((scores(q) / math.sqrt(4)).masked_fill(~seen, -torch.inf).softmax(-1), q)

    return fn


@pytest.mark.parametrize(
    ("scores", "weigh"),
    [
        (lambda q: torch.einsum("bihd,bjhd->bhij", q, q), lambda p, v: torch.einsum("bhij,bjhd->bihd", p, v)),
        (lambda q: torch.einsum("bihd,bjhd->bhij", q, q), lambda p, v: torch.einsum("bhij,bjhd->bihd", p, v).flatten(2) * 2),
        (
            lambda q: (q.transpose(1, 2)[:, :, :, None] * q.transpose(1, 2)[:, :, None]).sum(-1),
            lambda p, v: p @ v.transpose(1, 2),
        ),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_results_inside_of_one_call(scores: Callable, weigh: Callable, dynamic: bool) -> None:
    """No node holds the product itself: what holds a view of it is written anew."""
    assert patterns()
    report = checked(Call(attention(scores, weigh)), torch.randn(2, 6, 8), dynamic=dynamic)
    assert matched(report)["eager_attention"] == 1
