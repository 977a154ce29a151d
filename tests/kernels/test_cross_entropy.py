"""sloth.kernels.loss.cross_entropy against F.cross_entropy of float32 logits, as Hugging Face's losses write it."""

from unittest import mock

import pytest
import sympy
import torch
import torch.nn.functional as F
from common import DEVICE, LAYOUTS, assert_no_worse, cases, compare, dtypes, make, wide
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, interpret, saved

from sloth.kernels.loss import cross_entropy as module
from sloth.kernels.loss.cross_entropy import cross_entropy

cross_entropy_forward = torch.ops.sloth.cross_entropy_forward.default


def eager(logits, target, ignore_index=-100, reduction="mean", softcap=None, scale=1.0):
    z = logits * scale if scale != 1.0 else logits
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    z = wide(z).reshape(-1, z.shape[-1])
    return F.cross_entropy(z, target.reshape(-1), ignore_index=ignore_index, reduction=reduction)


def random_targets(shape, V, ignored, seed, ignore_index=-100):
    """Targets of which a share is ignored."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, V, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < ignored, ignore_index, target).to(DEVICE)


@st.composite
def problems(draw, dtypes):
    """logits, target and how the loss is taken of them."""
    lead = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    V, seed = draw(st.integers(1, 200)), draw(st.integers(0, 2**20))
    peak, offset = draw(st.sampled_from([0.1, 1.0, 10.0])), draw(st.sampled_from([0.0, 30.0]))
    logits = make((*lead, V), draw(dtypes), draw(st.sampled_from(LAYOUTS)), seed, scale=peak, mean=offset)
    ignore_index = draw(st.sampled_from([-100, 0, -1]))
    target = random_targets(lead, V, draw(st.sampled_from([0.0, 0.3])), seed, ignore_index)
    if draw(st.booleans()):
        target = target.reshape(-1)
    reduction, softcap = draw(st.sampled_from(["mean", "sum"])), draw(st.sampled_from([None, None, 5.0, 30.0]))
    return logits, target, ignore_index, reduction, softcap, draw(st.sampled_from([1.0, 1.0, 0.3, -2.0]))


def check(problem, **tolerance):
    logits, target, *how = problem
    if bool((target == how[0]).all()) and how[1] == "mean":
        return None  # nan: test_nothing_counts
    upstream = [torch.tensor(0.7, device=DEVICE)]
    return compare(
        lambda x, t: cross_entropy(x, t, *how)[0], lambda x, t: eager(x, t, *how), [logits, target], None, upstream, **tolerance
    )


@cases
@given(problems(dtypes))
def test_operator(problem):
    check(problem)


@cases
@given(problems(st.sampled_from([torch.float32, torch.float16])))
def test_kernels(problem):
    """As above, with the Triton kernels on every device (bf16 only on GPUs: the interpreter cannot round to it)."""
    tiles = {"FORWARD_LANES": 16, "FORWARD_UNROLL": 2, "BACKWARD_BLOCK": 64}  # small ones, so that a row takes several
    with interpret(), mock.patch.multiple(module, **tiles):
        check(problem)


@pytest.mark.parametrize("logit", [1e-4, 0.003, 0.3, 2.9])
def test_logits_that_are_small_beside_the_cap(logit):
    """In fp16: the loss is right to fp32's digits, as that of fp32 logits is."""
    logits, target = make((1, 2), torch.float16, scale=logit), torch.tensor([1], device=DEVICE)
    with interpret():
        found = cross_entropy(logits, target, softcap=30.0)[0]
    exact = eager(logits.double(), target, softcap=30.0)
    assert abs(found.double() - exact) <= 1e-7 + 4e-7 * logit


@pytest.mark.parametrize("path", ["operator", "kernels"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_wide_vocabulary(path, softcap):
    """Many steps of the walk over a row, the last one partial; and no slack."""
    logits, target = make((12, 20011), torch.float32, "padded", scale=4.0), random_targets((12,), 20011, 0.2, 0)
    with interpret(path == "kernels"):
        check((logits, target, -100, "mean", softcap, 1.0), slack=1.0)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_confident_rows(path):
    """Small losses under large logits, where e^(z − lse) with lse in fp32 alone would lose the gradient. The loss is
    log(1 + a little): the sum in it is what fp32 rounds, so the tolerance is half an ulp of 1."""
    logits, target = make((64, 30), torch.float32, mean=500.0), random_targets((64,), 30, 0.0, 1)
    logits.scatter_add_(1, target[:, None], torch.full_like(logits[:, :1], 9.0))
    with interpret(path == "kernels"):
        check((logits, target, -100, "mean", None, 1.0), slack=0.5, scale=1.0)


@pytest.mark.parametrize("path", ["operator", "kernels"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(path, reduction):
    logits = make((3, 7), torch.float32).requires_grad_()
    target = torch.full((3,), -100, device=DEVICE)
    with interpret(path == "kernels"):
        loss, lse, count = cross_entropy(logits, target, -100, reduction)
        loss.backward()
    torch.testing.assert_close(loss, eager(logits, target, reduction=reduction), equal_nan=True)
    assert count.item() == 0 and lse.shape == (3,)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_ignored_rows(path):
    """Exactly zero, whatever is in the row."""
    logits = make((4, 7), torch.float32)
    logits[1], logits[2] = float("nan"), float("inf")
    logits.requires_grad_()
    target = torch.tensor([3, -100, -100, 0], device=DEVICE)
    with interpret(path == "kernels"):
        loss, lse, _ = cross_entropy(logits, target)
        loss.backward()
    assert loss.isfinite() and not logits.grad[1:3].any() and logits.grad[[0, 3]].all()
    assert torch.equal(lse[1:3], torch.zeros_like(lse[1:3]))


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_masked_vocabulary(path):
    """Logits of −∞ and of the dtype's lowest value take no part."""
    logits = make((4, 9), torch.float32)
    logits[:, 2], logits[:, 5] = float("-inf"), torch.finfo(torch.float32).min
    target = torch.tensor([0, 1, 8, 3], device=DEVICE)
    with interpret(path == "kernels"):
        (loss,), (dlogits, _) = check((logits, target, -100, "mean", None, 1.0))
    assert loss.isfinite() and dlogits.isfinite().all()


def test_target_out_of_range():
    """An error on the CPU; nan for the kernels, which must not wait for the device."""
    logits = make((3, 7), torch.float32).requires_grad_()
    for wrong in (7, 10**12, -5):
        target = torch.tensor([1, wrong, 2], device=DEVICE)
        if DEVICE == "cpu":
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                cross_entropy(logits, target)
        with interpret():
            loss, _, _ = cross_entropy(logits, target)
            (dlogits,) = torch.autograd.grad(loss, logits)
        assert loss.isnan() and dlogits[1].isnan().all() and dlogits[0].isfinite().all()


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_statistics(path):
    """lse, count, dtypes; only the loss has a gradient."""
    logits, target = make((2, 3, 50), torch.float16).requires_grad_(), random_targets((6,), 50, 0.0, 0)
    with interpret(path == "kernels"):
        loss, lse, count = cross_entropy(logits, target, scale=0.5)
    assert loss.requires_grad and not lse.requires_grad and not count.requires_grad
    assert (loss.dtype, lse.dtype, count.dtype) == (torch.float32, torch.float32, torch.int64)
    exact = (logits.double() * 0.5).logsumexp(-1).flatten()
    assert_no_worse(lse, exact.float(), exact)
    assert count.item() == 6


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_no_rows(path):
    logits = torch.zeros(0, 7, device=DEVICE, requires_grad=True)
    with interpret(path == "kernels"):
        cross_entropy(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE), reduction="sum")[0].backward()
    assert logits.grad.shape == (0, 7)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_shifted_view(path):
    """logits[:, :-1], whose rows no single stride describes."""
    logits, target = make((2, 5, 11), torch.float32)[:, :-1], random_targets((2, 4), 11, 0.2, 3)
    with interpret(path == "kernels"):
        check((logits, target, -100, "mean", None, 1.0))


def test_offsets_beyond_32_bits():
    """Rows 2³¹ elements apart; untouched memory is never committed."""
    x = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE).as_strided((2, 16), (2**31, 1))
    values, target = make((2, 16), torch.float16), random_targets((2,), 16, 0.0, 0)
    x.copy_(values)
    with interpret():
        results = [cross_entropy(t.requires_grad_(), target)[0] for t in (x, values)]
        (a,), (b,) = (torch.autograd.grad(loss, t) for loss, t in zip(results, (x, values), strict=True))
    assert torch.equal(*results) and torch.equal(a, b)


# ---------------------------------------------------------------- only what is needed


def test_saves_no_softmax():
    logits, target = make((6, 50), torch.bfloat16).requires_grad_(), random_targets((6,), 50, 0.0, 0)
    with saved() as kept:
        cross_entropy(logits, target)
    assert [t.shape for t in kept] == [(6, 50), (6,), (6,), (6,), ()]
    assert kept[0].data_ptr() == logits.data_ptr()


def test_backward_is_one_call():
    logits, target = make((6, 50), torch.float32).requires_grad_(), random_targets((6,), 50, 0.0, 0)
    loss = cross_entropy(logits, target)[0]
    with Recorder() as calls:
        loss.backward()
    assert [name for name, _ in calls.calls] == ["cross_entropy_backward"]


def test_differentiated_once():
    logits, target = make((6, 5), torch.float32).requires_grad_(), random_targets((6,), 5, 0.0, 0)
    (d,) = torch.autograd.grad(cross_entropy(logits, target)[0], logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        d.sum().backward()


def test_bad_arguments():
    logits, target = make((6, 5), torch.float32), random_targets((6,), 5, 0.0, 0)
    with pytest.raises(ValueError, match="reduction must be"):
        cross_entropy(logits, target, reduction="none")
    with pytest.raises(RuntimeError, match="6 rows of logits, but 5 targets"):
        cross_entropy(logits, target[:5])


# ---------------------------------------------------------------- derivation, registration, compilation


@pytest.mark.parametrize("softcap", [False, True])
def test_closed_form(softcap):
    """The backward formula in the module's docstring is the derivative of the forward one, at random points to 40 digits."""
    x, scale, cap = sympy.symbols("x:3", real=True), sympy.Symbol("a", positive=True), sympy.Symbol("c", positive=True)
    z = [cap * sympy.tanh(scale * xi / cap) if softcap else scale * xi for xi in x]
    lse, t = sympy.log(sum(sympy.exp(zi) for zi in z)), 1
    for j in range(3):
        inner = scale * (1 - (z[j] / cap) ** 2) if softcap else scale
        claimed = (sympy.exp(z[j] - lse) - int(j == t)) * inner
        difference = sympy.diff(lse - z[t], x[j]) - claimed
        if not softcap:
            assert sympy.simplify(difference) == 0
        point = dict(zip((*x, scale, cap), sympy.sympify(["1/3", "-5/7", "2", "3/2", "7/4"]), strict=True))
        assert abs(sympy.N(difference.subs(point), 40)) < 1e-35


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(softcap, reduction):
    logits, target = make((5, 6), torch.float64).requires_grad_(), random_targets((5,), 6, 0.3, 3)
    torch.autograd.gradcheck(lambda x: cross_entropy(x, target, -100, reduction, softcap, 0.7)[0], (logits,))


def test_opcheck():
    logits, target = make((2, 3, 9), torch.bfloat16).requires_grad_(), random_targets((6,), 9, 0.3, 3)
    torch.library.opcheck(cross_entropy_forward, (logits, target, -100, "mean", None, 1.0))
    torch.library.opcheck(cross_entropy_forward, (logits, target, -100, "sum", 30.0, 0.5))


def test_autocast_changes_nothing():
    logits, target = make((6, 50), torch.bfloat16), random_targets((6,), 50, 0.0, 0)
    with torch.autocast(DEVICE, torch.float16):
        inside = cross_entropy(logits, target)[0]
    assert torch.equal(inside, cross_entropy(logits, target)[0])


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_inductor(dynamic):
    def head(x, w, target):
        return cross_entropy(x @ w, target, softcap=20.0)[0]

    w = make((8, 50), torch.float32).requires_grad_()
    compiled = torch.compile(head, dynamic=dynamic, fullgraph=True)
    for S in (5, 7) if dynamic else (5,):
        x, target = make((2, S, 8), torch.float32, seed=S).requires_grad_(), random_targets((2 * S,), 50, 0.3, S)
        got, want = compiled(x, w, target), head(x, w, target)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, (x, w)) for loss in (got, want)), rtol=1e-4, atol=1e-6)
