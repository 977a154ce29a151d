"""Widths of tensors that come with other numbers of dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import compiled

from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()


def rotated(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Qwen4's, of queries and, without a batch, of keys."""
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def call(*sizes: int, width: int = 16) -> tuple[Tensor, Tensor, Tensor, int]:
    heads = len(sizes)
    return torch.randn(*sizes, 2, width), torch.randn(*sizes, width), torch.randn(*sizes, width), heads


def test_a_width_is_a_number_whatever_the_number_of_dimensions() -> None:
    run = compiled(rotated)
    with listening() as graphs:
        for args in (call(2, 5), call(3), call(4), call(6)):
            torch.testing.assert_close(run(*args), rotated(*args))
    assert [[s.status for s in g.sites] for g in graphs] == [[MATCHED], [MATCHED]], "other lengths compile nothing"


def test_a_width_that_differs_is_a_symbol() -> None:
    """As without sloth: the third and the fourth are one graph."""
    run = compiled(lambda x: x * 2 + x.shape[-1])
    with listening() as graphs:
        for shape in ((2, 3, 8), (3, 16), (3, 24), (3, 40)):
            torch.testing.assert_close(run(x := torch.randn(shape)), x * 2 + shape[-1])
    assert len(graphs) == 2


def test_lengths_that_happen_to_be_the_same_cost_one_graph() -> None:
    """However many inputs have them, and whenever these turn out to differ."""

    def total(*xs: Tensor) -> Tensor:
        return sum(x.sum() for x in xs)

    def calls() -> list[list[Tensor]]:
        lengths = [[7] * 4, [7] * 4, *([8] * n + [7] * (4 - n) for n in range(1, 5)), [9] * 4]
        return [[torch.randn(n) if i == 0 else torch.randn(2, n) for n in of] for i, of in enumerate(lengths)]

    run = compiled(total)
    with listening() as graphs:
        for xs in calls():
            torch.testing.assert_close(run(*xs), total(*xs))
    assert len(graphs) <= 3


def test_who_marks_a_width_has_a_symbol() -> None:
    run = compiled(lambda x: x * 2)
    with listening() as graphs:
        run(torch.randn(2, 3, 8))
        x = torch.randn(3, 8)
        torch._dynamo.mark_dynamic(x, 1)
        run(x)
        run(torch.randn(3, 16))
    assert len(graphs) == 2
