"""A low-rank adapter on the head, in sloth.kernels.loss.linear_cross_entropy, against the layer as PEFT writes it."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, cases, compare, make
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder import interpret
from test_cross_entropy import eager as cross_entropy_of
from test_cross_entropy import random_targets

from sloth.kernels.loss import cross_entropy
from sloth.kernels.loss import linear_cross_entropy as module
from sloth.kernels.loss.linear_cross_entropy import linear_cross_entropy

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def eager(hidden, weight, target, bias, lora_a_out, lora_b, up_scale, *how):
    """In the adapter's dtype where that is wider, and rounded to that of the layer."""
    base = F.linear(hidden, weight, bias)
    return cross_entropy_of((base + F.linear(lora_a_out, lora_b) * up_scale).to(base.dtype), target, *how)


def ours(hidden, weight, target, bias, lora_a_out, lora_b, up_scale, ignore_index, reduction, softcap, scale, budget=0):
    how = ignore_index, reduction, softcap, scale, budget, None, 0.0, 0.0
    return linear_cross_entropy(hidden, weight, target, bias, None, *how, lora_a_out, lora_b, up_scale)[0]


@st.composite
def problems(draw, dtypes, most=9):
    """Leading sizes, with targets; the adapter in the layer's dtype or in fp32."""
    lead = draw(st.lists(st.integers(1, most), min_size=1, max_size=2))
    H, V, R, seed = draw(st.integers(1, 40)), draw(st.integers(1, 200)), draw(st.integers(1, 8)), 5 * draw(st.integers(0, 2**20))
    dtype = draw(st.sampled_from(dtypes))
    wide = draw(st.sampled_from([dtype, FP32]))
    hidden, weight = make((*lead, H), dtype, seed=seed), make((V, H), dtype, seed=seed + 1)
    bias = make((V,), dtype, seed=seed + 2) if draw(st.booleans()) else None
    lora_a_out, lora_b = (
        make((*lead, R), wide, draw(st.sampled_from(["contiguous", "padded"])), seed + 3),
        make((V, R), wide, seed=seed + 4),
    )
    target = random_targets(lead, V, draw(st.sampled_from([0.0, 0.3])), seed, -100)
    how = (
        -100,
        draw(st.sampled_from(["mean", "sum"])),
        draw(st.sampled_from([None, None, 5.0])),
        draw(st.sampled_from([1.0, 0.3])),
    )
    return hidden, weight, target, bias, lora_a_out, lora_b, draw(st.sampled_from([2.0, 0.7])), *how


def check(problem, dloss=0.7, rows=4, budget=0, frozen=False, **tolerance):
    *tensors, up_scale, ignore_index, reduction, softcap, scale = problem
    if bool((problem[2] == ignore_index).all()) and reduction == "mean":
        return None
    if not tolerance:  # as in test_linear_cross_entropy.py
        tolerance = {"slack": 4 + 0.5 * torch.finfo(problem[0].dtype).eps * 2**23, "scale": problem[1].double().norm().item()}
    how = up_scale, ignore_index, reduction, softcap, scale
    with mock.patch.object(module, "chunk_rows", lambda N, *_: min(max(N, 1), rows)):
        return compare(
            lambda *leaves: ours(*leaves, *how, budget), lambda *leaves: eager(*leaves, *how), tensors,
            [True, not frozen, False, tensors[3] is not None and not frozen, True, True],
            [torch.tensor(dloss, device=DEVICE)], **tolerance,
        )  # fmt: skip


@cases
@given(problems([FP32, BF16, FP16]), st.sampled_from([1.0, 2.0**-3]), st.sampled_from([0, 1]), st.booleans())
def test_operator(problem, dloss, budget, frozen):
    """Several chunks, the last one partial; slabs of the vocabulary."""
    check(problem, dloss=dloss, budget=budget, frozen=frozen)


@settings(cases, max_examples=8)
@given(problems([FP32, FP16], 4), st.sampled_from([0, 1]))
def test_kernels(problem, budget):
    tiles = mock.patch.multiple(cross_entropy, FORWARD_LANES=16, FORWARD_UNROLL=2, BACKWARD_BLOCK=64)
    with interpret(), tiles:
        check(problem, budget=budget, rows=9)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)], ids=str)
@pytest.mark.parametrize("up_scale", [2.0, 0.7])
@pytest.mark.parametrize("budget", [0, 1])
@pytest.mark.parametrize("size", [0.3, 3.0], ids=["small", "large"])
def test_larger(dtypes, up_scale, budget, size):
    """Where luck averages out but in the loss. An adapter that changes little, and one that is most of the logits."""
    dtype, wide = dtypes
    hidden, weight = make((2, 96, 64), dtype, seed=1), make((1000, 64), dtype, seed=2, scale=0.1)
    lora_a_out, lora_b = make((2, 96, 8), wide, seed=4), make((1000, 8), wide, seed=5, scale=size / 3)
    problem = hidden, weight, random_targets((2, 96), 1000, 0.2, 3), None, lora_a_out, lora_b, up_scale, -100, "mean", None, 1.0
    check(problem, dloss=1.0, rows=40, budget=budget, slack=64.0 if dtype == FP32 else 0.02 * torch.finfo(dtype).eps * 2**23)


def test_gradients_that_nobody_wants_are_not_computed():
    hidden, weight = make((6, 8), FP32, seed=1), make((30, 8), FP32, seed=2)
    lora_a_out, lora_b = make((6, 2), FP32, seed=3), make((30, 2), FP32, seed=4).requires_grad_()
    loss = ours(hidden, weight, random_targets((6,), 30, 0.2, 3), None, lora_a_out, lora_b, 2.0, -100, "mean", None, 1.0)
    assert [t.numel() > 0 for t in loss.grad_fn.saved_tensors[1:]] == [False] * 4 + [True]


def test_gradcheck():
    tensors = [make(size, torch.float64, seed=i).requires_grad_() for i, size in enumerate([(5, 3), (6, 3), (5, 2), (6, 2)])]
    target = random_targets((5,), 6, 0.3, 3)
    torch.autograd.gradcheck(lambda h, w, t, u: ours(h, w, target, None, t, u, 0.7, -100, "mean", 2.0, 0.5), tensors)


def test_wrong_arguments():
    hidden, weight, target = make((2, 8), FP32), make((30, 8), FP32), torch.tensor([1, 2], device=DEVICE)
    lora_a_out, lora_b = make((2, 3), FP32), make((30, 3), FP32)
    for wrong in (
        (lora_a_out, None),
        (lora_a_out[:, 1:], lora_b),
        (lora_a_out[:1], lora_b),
        (lora_a_out, lora_b[1:]),
        (lora_a_out.half(), lora_b),
    ):
        with pytest.raises(RuntimeError, match="lora_a_out"):
            linear_cross_entropy(hidden, weight, target, lora_a_out=wrong[0], lora_b=wrong[1])
