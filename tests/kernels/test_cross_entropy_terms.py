"""sloth.kernels.loss.cross_entropy_terms against torch's own smoothed, weighted and penalised losses, and losses of each row."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, LAYOUTS, cases, compare, dtypes, make, wide
from hypothesis import given
from hypothesis import strategies as st
from recorder import interpret, saved
from test_cross_entropy import random_targets

from sloth.kernels.loss import cross_entropy, loss_terms
from sloth.kernels.loss import cross_entropy_terms as module
from sloth.kernels.loss.cross_entropy_terms import cross_entropy_terms


def eager(logits, target, classes, ignore_index, reduction, softcap, scale, smoothing, z_loss):
    z = wide(logits) * scale
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    flat = z.reshape(-1, z.shape[-1])
    how = {"weight": None if classes is None else classes.to(z.dtype), "label_smoothing": smoothing, "reduction": reduction}
    loss = F.cross_entropy(flat, target.reshape(-1), ignore_index=ignore_index, **how)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return loss + z_loss * flat.logsumexp(-1).pow(2).mean() if z_loss else loss


@st.composite
def problems(draw, dtypes):
    lead = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    V, seed = draw(st.integers(1, 200)), draw(st.integers(0, 2**20))
    dtype, mean = draw(dtypes), draw(st.sampled_from([0.0, 30.0]))
    logits = make((*lead, V), dtype, draw(st.sampled_from(LAYOUTS)), 2 * seed, mean=mean)
    classes = make((V,), dtype, seed=2 * seed + 1).abs() + 0.1 if draw(st.booleans()) else None
    ignore_index, reduction = draw(st.sampled_from([-100, 0])), draw(st.sampled_from(module.REDUCTIONS))
    target = random_targets(lead, V, draw(st.sampled_from([0.0, 0.3])), seed, ignore_index)
    how = ignore_index, reduction, draw(st.sampled_from([None, None, 5.0])), draw(st.sampled_from([1.0, 0.3]))
    z_loss = 0.0 if reduction == "none" else draw(st.sampled_from([0.0, 0.01]))
    return logits, target, classes, *how, draw(st.sampled_from([0.0, 0.1, 1.0])), z_loss


def check(problem):
    logits, target, classes, *how = problem
    if bool((target == how[0]).all()) and how[1] == "mean":
        return
    dloss = make((target.numel(), 1), torch.float32, seed=7)[:, 0].view(target.shape) if how[1] == "none" else torch.tensor(0.7)
    size = 0.1 * logits.double().norm().item()  # of the terms that are summed
    compare(
        lambda *tensors: cross_entropy_terms(*tensors, *how), lambda *tensors: eager(*tensors, *how),
        [logits, target, classes], [True, False, False], [dloss.to(DEVICE)], slack=8, scale=size,
    )  # fmt: skip


@cases
@given(problems(dtypes))
def test_operator(problem):
    check(problem)


@cases
@given(problems(st.sampled_from([torch.float32, torch.float16])))
def test_kernels(problem):
    tiles = mock.patch.multiple(cross_entropy, FORWARD_LANES=16, FORWARD_UNROLL=2)
    with interpret(), tiles, mock.patch.object(loss_terms, "BACKWARD_BLOCK", 64):
        check(problem)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_the_logits_stay_what_they_were(path):
    logits, target = make((2, 3, 30), torch.float32).requires_grad_(), random_targets((2, 3), 30, 0.2, 3)
    before = logits.detach().clone()
    with interpret(path == "kernels"), saved() as kept:
        loss = cross_entropy_terms(logits, target, label_smoothing=0.1)
        (dlogits,) = torch.autograd.grad(loss, logits)
    assert torch.equal(logits, before) and dlogits.shape == logits.shape and dlogits.data_ptr() != logits.data_ptr()
    assert sorted(t.numel() for t in kept) == [6, 6, 6, 180]


def test_gradcheck_and_opcheck():
    logits, classes = make((5, 6), torch.float64), make((6,), torch.float64, seed=2).abs()
    target = random_targets((5,), 6, 0.3, 3)
    for how in ((-100, "mean", 2.0, 0.7, 0.2, 0.1), (-100, "none", None, 1.0, 0.2, 0.0)):
        torch.autograd.gradcheck(lambda x, how=how: cross_entropy_terms(x, target, classes, *how), logits.requires_grad_())
        torch.library.opcheck(cross_entropy_terms, (logits, target, classes, *how))


def test_wrong_arguments():
    logits, target = make((2, 8), torch.float32), torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy_terms(logits, target, reduction="none", z_loss=0.1)
    for wrong, told in (({"class_weight": torch.ones(7)}, "other classes"), ({"label_smoothing": 2.0}, "label_smoothing")):
        with pytest.raises(RuntimeError, match=told):
            cross_entropy_terms(logits, target, **wrong)
