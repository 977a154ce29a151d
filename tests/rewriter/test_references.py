"""What references and operators are tried on: as little as says the same."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sloth.compat.dispatch import enable_python_dispatcher
from sloth.rewriter.graph.record import linear_of_fakes

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def fakes(*shapes: tuple, dtypes: tuple = (torch.float32,) * 3) -> list[torch.Tensor]:
    """Their sizes are symbols, equal ones the same."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [mode.from_tensor(torch.empty(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=False)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 8), (5, 4, 8), (2, 5, 4, 8), (1, 4, 8), (0, 4, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_of_fakes_is_torchs(shape: tuple, autocast: torch.dtype | None, transposed: bool) -> None:
    """Its sizes, its dtype and how it lies in memory; or nothing, where torch is to be asked."""
    for x_dtype, w_dtype, biased in itertools.product(DTYPES, DTYPES, (False, True)):
        x, weight, bias = fakes(shape, (6, 8), (6,), dtypes=(x_dtype, w_dtype, w_dtype))
        x = x.transpose(0, -2) if transposed else x
        with enable_python_dispatcher(), torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
            found = linear_of_fakes(x, weight, bias if biased else None)
            if found is not None:
                told = F.linear(x, weight, bias if biased else None)
                assert (found.shape, found.stride(), found.dtype) == (told.shape, told.stride(), told.dtype)
        plain = torch.float64 not in (x_dtype, w_dtype) and (autocast is not None or x_dtype == w_dtype)
        assert (found is not None) == plain


def test_linear_that_fits_not_is_left_to_torch() -> None:
    x, weight, bias = fakes((4, 7), (6, 8), (6,))
    assert linear_of_fakes(x, weight) is None
    x, weight, bias = fakes((4, 8), (6, 8), (1,))
    assert linear_of_fakes(x, weight, bias) is None
    assert linear_of_fakes(torch.empty(4, 8), torch.empty(6, 8)) is None
    assert linear_of_fakes(x[0], weight) is None
