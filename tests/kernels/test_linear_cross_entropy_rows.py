"""sloth.kernels.loss.linear_cross_entropy_rows against a linear layer and F.cross_entropy(…, reduction="none")."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, cases, compare, dtypes, make, wide
from hypothesis import given
from hypothesis import strategies as st
from recorder import interpret, saved
from test_cross_entropy import random_targets

from sloth.kernels.loss import cross_entropy, loss_terms
from sloth.kernels.loss import linear_cross_entropy_rows as module
from sloth.kernels.loss.linear_cross_entropy_rows import linear_cross_entropy_rows


def eager(hidden, weight, target, bias, classes, ignore_index=-100, softcap=None, scale=1.0, smoothing=0.0):
    z = wide(F.linear(hidden, weight, bias)) * scale
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    how = {"weight": None if classes is None else classes.to(z.dtype), "label_smoothing": smoothing, "reduction": "none"}
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), target.reshape(-1), ignore_index=ignore_index, **how).view(target.shape)


@st.composite
def problems(draw, dtypes):
    lead = draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))
    H, V, seed = draw(st.integers(1, 40)), draw(st.integers(1, 200)), draw(st.integers(0, 2**20))
    dtype, ignore_index = draw(dtypes), draw(st.sampled_from([-100, 0]))
    hidden, weight = make((*lead, H), dtype, seed=4 * seed), make((V, H), dtype, seed=4 * seed + 1)
    bias = make((V,), dtype, seed=4 * seed + 2) if draw(st.booleans()) else None
    classes = make((V,), dtype, seed=4 * seed + 3).abs() if draw(st.booleans()) else None
    target = random_targets(lead, V, draw(st.sampled_from([0.0, 0.3])), seed, ignore_index)
    how = ignore_index, draw(st.sampled_from([None, None, 5.0])), draw(st.sampled_from([1.0, 0.3]))
    return hidden, weight, target, bias, classes, *how, draw(st.sampled_from([0.0, 0.2]))


def check(problem, size=1.0, rows=4, **tolerance):
    hidden, weight, target, bias, classes, *how = problem
    dloss = size * make((target.numel(), 1), torch.float32, seed=11).view(target.shape)
    if not tolerance:  # the rounding of a few low-precision logits, by which eager may be lucky, moves all that follows
        luck = weight.double().norm().item() * max(size, 1.0)
        tolerance = {"slack": 4 + 0.5 * torch.finfo(hidden.dtype).eps * 2**23, "scale": luck}
    with mock.patch.object(module, "chunk_rows", lambda N, *_: min(max(N, 1), rows)):
        compare(
            lambda *tensors: linear_cross_entropy_rows(*tensors, *how), lambda *tensors: eager(*tensors, *how),
            [hidden, weight, target, bias, classes], [True, True, False, bias is not None, False], [dloss], **tolerance,
        )  # fmt: skip


@cases
@given(problems(dtypes), st.sampled_from([1.0, 2.0**-12]))
def test_operator(problem, size):
    check(problem, size)


@cases
@given(problems(st.sampled_from([torch.float32, torch.float16])))
def test_kernels(problem):
    tiles = mock.patch.multiple(cross_entropy, FORWARD_LANES=16, FORWARD_UNROLL=2)
    with interpret(), tiles, mock.patch.object(loss_terms, "BACKWARD_BLOCK", 64):
        check(problem, rows=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [2.0**-12, 1.0])
def test_larger(dtype, size):
    """No slack: where luck averages out. Gradients of a mean over many rows are small."""
    hidden, weight = make((2, 96, 64), dtype, seed=1), make((1000, 64), dtype, seed=2, scale=0.3)
    problem = hidden, weight, random_targets((2, 96), 1000, 0.2, 3), None, None, -100, None, 1.0, 0.0
    check(problem, size, rows=40, slack=64.0 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_wanted(wanted):
    hidden, weight, bias = make((6, 8), torch.float32, seed=1), make((30, 8), torch.float32, seed=2), make((30,), torch.float32)
    leaves = [t.requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
    target = random_targets((6,), 30, 0.2, 3)
    (own,) = (t for t in leaves if t.requires_grad)
    got, expected = (
        torch.autograd.grad(f(leaves[0], leaves[1], target, leaves[2], None).mean(), own)
        for f in (linear_cross_entropy_rows, eager)
    )
    torch.testing.assert_close(got, expected)


def test_a_budget_bounds_the_chunk():
    hidden, weight = make((40, 8), torch.float32).requires_grad_(), make((50, 8), torch.float32, seed=2).requires_grad_()
    target, found = random_targets((40,), 50, 0.2, 3), []
    with mock.patch.object(module, "logits_of", wraps=module.logits_of) as chunks:
        for budget in (0, 7 * 50 * 4):
            loss = linear_cross_entropy_rows(hidden, weight, target, budget=budget)
            found.append((loss, *torch.autograd.grad(loss.mean(), (hidden, weight))))
    torch.testing.assert_close(*found)
    assert [len(c.args[0]) for c in chunks.call_args_list] == [40] * 2 + [*[7] * 5, 5] * 2


def test_saves_no_logits():
    hidden, weight = make((6, 8), torch.float32).requires_grad_(), make((50, 8), torch.float32, seed=2).requires_grad_()
    with saved() as kept:
        linear_cross_entropy_rows(hidden, weight, random_targets((6,), 50, 0.2, 3))
    assert sorted(t.numel() for t in kept) == [6, 6, 6, 48, 400]


def test_ignored_rows_and_no_rows():
    weight = make((30, 8), torch.float32, seed=2).requires_grad_()
    for rows in (0, 3):
        hidden, target = make((rows, 8), torch.float32).requires_grad_(), torch.full((rows,), -100, device=DEVICE)
        loss = linear_cross_entropy_rows(hidden, weight, target)
        assert not loss.any() and loss.shape == (rows,)
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (hidden, weight)))


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_a_target_out_of_range(path):
    hidden, weight = make((3, 8), torch.float32).requires_grad_(), make((30, 8), torch.float32, seed=2)
    target = torch.tensor([1, 30, -100], device=DEVICE)
    with interpret(path == "kernels"):
        if path == "operator" and DEVICE == "cpu":
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                linear_cross_entropy_rows(hidden, weight, target)
        else:
            loss = linear_cross_entropy_rows(hidden, weight, target)
            (got,) = torch.autograd.grad(loss.sum(), hidden)
            assert loss.isnan().tolist() == [False, True, False] and got[1].isnan().all() and got[0].isfinite().all()


def test_gradcheck_and_opcheck():
    hidden, weight, bias, classes = (make(s, torch.float64, seed=i) for i, s in enumerate([(5, 3), (6, 3), (6,), (6,)]))
    target = random_targets((5,), 6, 0.3, 3)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    function = lambda h, w, b: linear_cross_entropy_rows(h, w, target, b, classes.abs(), -100, 2.0, 0.7, 0.2)  # noqa: E731
    torch.autograd.gradcheck(function, leaves)
    torch.library.opcheck(linear_cross_entropy_rows, (hidden, weight, target, bias, classes.abs()))


def test_wrong_arguments():
    hidden, weight, target = make((2, 8), torch.float32), make((30, 8), torch.float32), torch.tensor([1, 2], device=DEVICE)
    for wrong in ((hidden, weight[:, 1:], target), (hidden, weight.half(), target), (hidden, weight, target[:1])):
        with pytest.raises(RuntimeError, match=r"linear_cross_entropy|targets"):
            linear_cross_entropy_rows(*wrong)
