"""What references and operators are tried on: as little as says the same."""

from __future__ import annotations

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from toys import Call, compiled

from sloth.compat.dispatch import enable_python_dispatcher
from sloth.patterns.lora import fused
from sloth.rewriter.graph.record import linear_of_fakes
from sloth.rewriter.match.pattern import Variant
from sloth.rewriter.match.registry import patterns
from sloth.rewriter.plan import legality

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


def test_entries_that_share_a_reference_share_its_trace() -> None:
    """lora and lora_rows, linear_4bit and linear_4bit_rows."""
    seen: Counter = Counter()
    graph = Variant.graph

    def counted(self: Variant, metas, numbers, mode, sentinels=None):
        if mode is not None:
            seen[self.reference, str(metas), str(numbers), torch.is_autocast_enabled("cpu")] += 1
        return graph(self, metas, numbers, mode, sentinels)

    def adapted(m, x):
        return F.linear(x, m.base) + F.linear(F.linear(x, m.a), m.b) * 2.0

    model = Call(adapted)
    model.base = torch.nn.Parameter(torch.randn(6, 8), requires_grad=False)
    model.a, model.b = torch.nn.Parameter(torch.randn(2, 8)), torch.nn.Parameter(torch.randn(6, 2))
    with mock.patch.object(Variant, "graph", counted):
        compiled(model)(torch.randn(3, 4, 8))
    entries = [e.name for e in patterns() if fused in {v.reference for v in e.variants}]
    assert len(entries) > 1 and set(seen.values()) == {1} and fused in {key[0] for key in seen}


def test_entries_that_share_a_reference_share_its_example() -> None:
    examples: dict = {}
    for variant in (v for e in patterns() for v in e.variants):
        known = examples.setdefault((variant.reference, tuple(variant.sample_metas())), variant.loose())
        assert known is variant.loose()
    assert len(examples) < sum(len(e.variants) for e in patterns())


def test_an_operator_is_called_once_for_its_results_and_its_gradients() -> None:
    calls: Counter = Counter()
    called = legality._called

    def counted(match, context, grad):
        calls[legality._kind_of_call(match), str([v.meta.shape for v in legality.operands_of(match)])] += 1
        return called(match, context, grad)

    legality._GRADIENTS.clear()
    with mock.patch.object(legality, "_called", counted):
        compiled(Call(lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))))(torch.randn(2, 3, 8))
    assert legality._GRADIENTS and set(calls.values()) == {1}
