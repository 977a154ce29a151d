"""sloth.kernels.loss.linear_cross_entropy against a linear layer and F.cross_entropy of its float32 logits."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, LAYOUTS, cases, compare, dtypes, make
from hypothesis import given
from hypothesis import strategies as st
from recorder import interpret
from test_cross_entropy import eager as cross_entropy_of
from test_cross_entropy import random_targets

from sloth.kernels.common import device
from sloth.kernels.loss import cross_entropy
from sloth.kernels.loss import linear_cross_entropy as module
from sloth.kernels.loss.linear_cross_entropy import chunk_rows, linear_cross_entropy


def eager(hidden, weight, target, bias=None, items=None, *how):
    loss = cross_entropy_of(F.linear(hidden, weight, bias), target, *how)
    return loss if items is None else loss / items


def ours(*arguments):
    return linear_cross_entropy(*arguments)[0]


@st.composite
def problems(draw, dtypes, most=9):
    lead = draw(st.lists(st.integers(1, most), min_size=1, max_size=2))
    H, V, seed = draw(st.integers(1, 40)), draw(st.integers(1, 200)), draw(st.integers(0, 2**20))
    dtype, layout = draw(dtypes), st.sampled_from(LAYOUTS)
    hidden = make((*lead, H), dtype, draw(layout), 3 * seed, scale=draw(st.sampled_from([0.3, 2.0])))
    weight = make((V, H), dtype, draw(st.sampled_from(["contiguous", "padded"])), 3 * seed + 1)
    bias = make((V,), dtype, "contiguous", 3 * seed + 2) if draw(st.booleans()) else None
    ignore_index, reduction = draw(st.sampled_from([-100, 0])), draw(st.sampled_from(["mean", "sum"]))
    target = random_targets(lead, V, draw(st.sampled_from([0.0, 0.3])), seed, ignore_index)
    items = torch.tensor(draw(st.sampled_from([3, 7.5])), device=DEVICE) if reduction == "sum" and draw(st.booleans()) else None
    softcap = draw(st.sampled_from([None, None, 5.0]))
    return hidden, weight, target, bias, items, ignore_index, reduction, softcap, draw(st.sampled_from([1.0, 1.0, 0.3]))


def check(problem, grads=None, dloss=0.7, rows=4, budget=0, **tolerance):
    hidden, weight, target, bias, items, *how = problem
    if bool((target == how[0]).all()) and how[1] == "mean":
        return None  # nan: test_nothing_counts
    if not tolerance:  # the rounding of a few low-precision logits, by which eager may be lucky, moves all that follows
        tolerance = {"slack": 4 + 0.5 * torch.finfo(hidden.dtype).eps * 2**23, "scale": weight.double().norm().item()}
    with mock.patch.object(module, "chunk_rows", lambda N, *_: min(max(N, 1), rows)):
        return compare(
            lambda *tensors: ours(*tensors, *how, budget), lambda *tensors: eager(*tensors, *how),
            [hidden, weight, target, bias, items], grads or [True, True, False, bias is not None, False],
            [torch.tensor(dloss, device=DEVICE)], **tolerance,
        )  # fmt: skip


@cases
@given(problems(dtypes), st.sampled_from([0.7, 1.0, 2.0**-3]), st.sampled_from([0, 1]))
def test_operator(problem, dloss, budget):
    """Several chunks, the last one partial; slabs of the vocabulary."""
    check(problem, dloss=dloss, budget=budget)


@cases
@given(problems(st.sampled_from([torch.float32, torch.float16]), 4), st.sampled_from([0, 1]))
def test_kernels(problem, budget):
    tiles = mock.patch.multiple(cross_entropy, FORWARD_LANES=16, FORWARD_UNROLL=2, BACKWARD_BLOCK=64)
    with interpret(), tiles:
        check(problem, budget=budget, rows=9)


HOW = {
    "mean": (False, None, "mean", None, 1.0),
    "bias": (True, None, "mean", None, 1.0),
    "divided": (False, 37.0, "sum", None, 1.0),
    "capped": (False, None, "sum", 5.0, 1.0),
    "scaled": (False, None, "mean", None, 0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dloss", [1.0, 0.3, 65536.0])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("budget", [0, 1])
def test_larger(dtype, dloss, how, budget):
    """No slack: where luck averages out. 65536 is a loss scale. With a budget only powers of 2 round once."""
    bias, items, reduction, *rest = HOW[how]
    hidden, weight = make((2, 96, 64), dtype, seed=1), make((1000, 64), dtype, seed=2, scale=0.3)
    bias = make((1000,), dtype, seed=4) if bias else None
    items = None if items is None else torch.tensor(items, device=DEVICE)
    problem = hidden, weight, random_targets((2, 96), 1000, 0.2, 3), bias, items, -100, reduction, *rest
    if reduction == "sum" and items is None and dtype == torch.float16:
        dloss = min(dloss, 1.0)  # fp16 ends at 65504
    dloss = 0.5 if budget and dloss < 1 else dloss
    check(problem, dloss=dloss, rows=40, budget=budget, slack=64.0 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_wanted(wanted):
    hidden, weight, bias = make((6, 8), torch.float32, seed=1), make((30, 8), torch.float32, seed=2), make((30,), torch.float32)
    target = random_targets((6,), 30, 0.2, 3)
    check((hidden, weight, target, bias, None, -100, "mean", None, 1.0), grads=[*wanted[:2], False, wanted[2], False])
    leaves = [t.clone().requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
    loss = ours(leaves[0], leaves[1], target, leaves[2])
    assert [t.numel() > 0 for t in loss.grad_fn.saved_tensors[1:]] == [*wanted, False, False]


def test_evaluation_computes_no_gradient():
    hidden, weight, target = make((6, 8), torch.float32), make((30, 8), torch.float32, seed=2), random_targets((6,), 30, 0.2, 3)
    with torch.no_grad(), mock.patch.object(module, "product") as backward:
        loss = ours(hidden.requires_grad_(), weight.requires_grad_(), target)
    assert not backward.called and not loss.requires_grad
    torch.testing.assert_close(loss, eager(hidden, weight, target).detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(reduction):
    hidden, weight = make((6, 8), torch.float32).requires_grad_(), make((30, 8), torch.float32, seed=2).requires_grad_()
    target = torch.full((6,), -100, device=DEVICE)
    loss = ours(hidden, weight, target, None, None, -100, reduction)
    torch.testing.assert_close(loss, eager(hidden, weight, target, None, None, -100, reduction), equal_nan=True)
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_no_rows_and_one():
    weight = make((30, 8), torch.float32, seed=2)
    for rows in (0, 1):
        hidden, target = make((rows, 8), torch.float32).requires_grad_(), random_targets((rows,), 30, 0.0, 3)
        loss = ours(hidden, weight, target, None, None, -100, "sum")
        torch.testing.assert_close(loss, eager(hidden, weight, target, None, None, -100, "sum"))
        assert torch.autograd.grad(loss, hidden)[0].shape == hidden.shape


def test_a_target_out_of_range():
    weight = make((30, 8), torch.float32, seed=2)
    if DEVICE == "cpu":
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            ours(make((2, 8), torch.float32), weight, torch.tensor([1, 30]))
    else:
        hidden, target = make((2, 8), torch.bfloat16).requires_grad_(), torch.tensor([1, 30], device=DEVICE)
        weight = weight.bfloat16().requires_grad_()
        for fn in (ours, torch.compile(ours)):
            loss = fn(hidden, weight, target)
            assert loss.isnan() and torch.autograd.grad(loss, hidden)[0][1].isnan().all()


def test_wrong_arguments():
    hidden, weight, target = (
        make((2, 8), torch.float32),
        make((30, 8), torch.float32),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )
    for wrong in ((hidden, weight[:, 1:], target), (hidden, weight.half(), target), (hidden, weight, target[:1])):
        with pytest.raises(RuntimeError, match=r"linear_cross_entropy|targets"):
            ours(*wrong)
    with pytest.raises(ValueError, match="none"):
        ours(hidden, weight, target, None, None, -100, "none")


@pytest.mark.parametrize("budget", [0, 4096])
def test_a_budget_bounds_the_chunk(budget):
    """The same loss; the gradient that waits for the backward pass in the dtype of what it belongs to, dW does not wait."""
    hidden, weight = make((40, 8), torch.bfloat16).requires_grad_(), make((50, 8), torch.bfloat16, seed=2).requires_grad_()
    target = random_targets((40,), 50, 0.2, 3)
    loss = ours(hidden, weight, target, None, None, -100, "mean", None, 1.0, budget)
    dhidden, dweight = loss.grad_fn.saved_tensors[1:3]
    assert (dhidden.dtype, len(dweight)) == ((torch.bfloat16, 0) if budget else (torch.float32, 50))
    got = torch.autograd.grad(loss, (hidden, weight))
    expected = torch.autograd.grad(eager(hidden, weight, target), (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("rows, vocabulary, budget", [(8192, 128256, 2**28), (5, 100, 1), (4096, 32000, 2**24), (100, 10, 2**20)])
def test_chunks(rows, vocabulary, budget):
    chunk = chunk_rows(rows, vocabulary, 2, budget)
    assert 1 <= chunk <= rows and chunk * vocabulary * 2 <= max(budget, vocabulary * 2)
    assert chunk == rows or chunk % 64 == 0 or budget < 64 * vocabulary * 2


def test_chunks_are_even():
    assert chunk_rows(8192, 128256, 2, 256 * 2**20) == 1024
    assert chunk_rows(8192, 128256, 2, 902 * 2**20) == 3072
    assert chunk_rows(8192, 128256, 2, 80 * 2**20) == 320
    assert chunk_rows(100, 1000, 2, 60 * 2000) == 60


@pytest.mark.parametrize("how", [pytest.param(h, marks=[pytest.mark.nightly] * (h != "bias")) for h in HOW])
def test_whole(how, monkeypatch):
    """Where a compiler sees it and the logits are no larger than dW in fp32: no chunks. A rounded loss scale is no reason to."""
    monkeypatch.setitem(device._pretended, "cpu", device.Device(roomy=True))
    bias, items, reduction, *rest = HOW[how]
    hidden, weight = make((2, 60, 64), torch.bfloat16, seed=1), make((1000, 64), torch.bfloat16, seed=2, scale=0.3)
    bias = make((1000,), torch.bfloat16, seed=4) if bias else None
    items = None if items is None else torch.tensor(items, device=DEVICE)
    target = random_targets((2, 60), 1000, 0.2, 3)
    torch._dynamo.reset()
    whole = torch.compile(lambda *tensors: ours(*tensors, -100, reduction, *rest), fullgraph=True, dynamic=False)
    with mock.patch.object(module, "_by_rows") as chunked:
        compare(
            whole, lambda *tensors: eager(*tensors, -100, reduction, *rest), [hidden, weight, target, bias, items],
            [True, True, False, bias is not None, False], [torch.tensor(0.3, device=DEVICE)], slack=0.0,
        )  # fmt: skip
    assert not chunked.called


@pytest.mark.parametrize("case", ["frozen", "budget", "many rows", "any number of rows", "fp32"])
def test_not_whole(case, monkeypatch):
    monkeypatch.setitem(device._pretended, "cpu", device.Device(roomy=True))
    dtype, rows = torch.float32 if case == "fp32" else torch.bfloat16, 17 if case == "many rows" else 16
    hidden, weight = make((rows, 8), dtype).requires_grad_(), make((50, 8), dtype, seed=2).requires_grad_(case != "frozen")
    target = random_targets((rows,), 50, 0.2, 3)
    torch._dynamo.reset()
    chunked = lambda h, w: ours(h, w, target, None, None, -100, "mean", None, 1.0, int(case == "budget"))  # noqa: E731
    with mock.patch.object(module, "_by_rows", wraps=module._by_rows) as spy:
        torch.compile(chunked, backend="aot_eager", dynamic=case == "any number of rows")(hidden, weight).backward()
    assert spy.called


def test_compiled():
    """One graph, in training and in evaluation."""
    hidden, weight, target = make((6, 8), torch.float32), make((30, 8), torch.float32, seed=2), random_targets((6,), 30, 0.2, 3)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    loss = compiled(hidden, weight, target)
    torch.testing.assert_close(
        torch.autograd.grad(loss * 3, (hidden, weight)), torch.autograd.grad(eager(hidden, weight, target) * 3, (hidden, weight))
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, weight, target), loss.detach())
