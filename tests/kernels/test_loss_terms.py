"""Label smoothing, class weights and z-loss in sloth.kernels.loss.linear_cross_entropy, against torch's own code of them."""

from unittest import mock

import pytest
import sympy
import torch
import torch.nn.functional as F
from common import DEVICE, cases, compare, dtypes, make, wide
from hypothesis import given
from hypothesis import strategies as st
from recorder import interpret
from test_cross_entropy import random_targets

from sloth.kernels.loss import cross_entropy, loss_terms
from sloth.kernels.loss import linear_cross_entropy as module
from sloth.kernels.loss.linear_cross_entropy import linear_cross_entropy


def eager(hidden, weight, target, classes, bias, items, ignore_index, reduction, softcap, scale, smoothing, z_loss):
    z = F.linear(hidden, weight, bias)
    z = wide(z) * scale
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    flat = z.reshape(-1, z.shape[-1])
    how = {"weight": None if classes is None else classes.to(z.dtype), "label_smoothing": smoothing, "reduction": reduction}
    loss = F.cross_entropy(flat, target.reshape(-1), ignore_index=ignore_index, **how)
    loss = loss if items is None else loss / items
    return loss + z_loss * flat.logsumexp(-1).pow(2).mean() if z_loss else loss


def ours(hidden, weight, target, classes, bias, items, ignore_index, reduction, softcap, scale, smoothing, z_loss, budget=0):
    how = ignore_index, reduction, softcap, scale, budget
    return linear_cross_entropy(hidden, weight, target, bias, items, *how, classes, smoothing, z_loss)[0]


@st.composite
def problems(draw, dtypes):
    N, H, V, seed = draw(st.integers(1, 30)), draw(st.integers(1, 40)), draw(st.integers(1, 200)), draw(st.integers(0, 2**20))
    dtype, ignore_index = draw(dtypes), draw(st.sampled_from([-100, 0]))
    hidden = make((N, H), dtype, seed=4 * seed, scale=draw(st.sampled_from([0.3, 2.0])))
    weight = make((V, H), dtype, seed=4 * seed + 1)
    bias = make((V,), dtype, seed=4 * seed + 2, mean=draw(st.sampled_from([0.0, 30.0]))) if draw(st.booleans()) else None
    classes = make((V,), dtype, seed=4 * seed + 3).abs() + 0.1 if draw(st.booleans()) else None
    target = random_targets((N,), V, draw(st.sampled_from([0.0, 0.3])), seed, ignore_index)
    reduction = draw(st.sampled_from(["mean", "sum"]))
    items = torch.tensor(7, device=DEVICE) if reduction == "sum" and draw(st.booleans()) else None
    terms = draw(st.sampled_from([0.0, 0.1, 1.0])), draw(st.sampled_from([0.0, 0.01]))
    how = ignore_index, reduction, draw(st.sampled_from([None, None, 5.0])), draw(st.sampled_from([1.0, 0.3]))
    return hidden, weight, target, classes, bias, items, *how, *terms


def check(problem, dloss=0.7, rows=4, budget=0, again=None, **tolerance):
    """`again(salt)` makes other problems like it, of which `MANY` draws would take long."""
    hidden, weight, target, classes, bias, items, *how = problem
    upstream = [torch.tensor(dloss, device=DEVICE)]
    if bool((target == how[0]).all()) and how[1] == "mean":
        return
    if not tolerance:  # the rounding of a few low-precision logits, by which eager may be lucky, moves all that follows
        tolerance = {"slack": 4 + 0.5 * torch.finfo(hidden.dtype).eps * 2**23, "scale": weight.double().norm().item()}
    with mock.patch.object(module, "chunk_rows", lambda N, *_: min(max(N, 1), rows)):
        compare(
            lambda *tensors: ours(*tensors, *how, budget), lambda *tensors: eager(*tensors, *how),
            [hidden, weight, target, classes, bias, items], [True, True, False, False, bias is not None, False],
            upstream, again=again and (lambda salt: (again(salt)[:6], upstream)), draws=again and 256, **tolerance,
        )  # fmt: skip


@cases
@given(problems(dtypes), st.sampled_from([1.0, 2.0**-3]), st.sampled_from([0, 1]))
def test_operator(problem, dloss, budget):
    check(problem, dloss=dloss, budget=budget)


@cases
@given(problems(st.sampled_from([torch.float32, torch.float16])), st.sampled_from([0, 1]))
def test_kernels(problem, budget):
    tiles = mock.patch.multiple(cross_entropy, FORWARD_LANES=16, FORWARD_UNROLL=2)
    more = mock.patch.multiple(loss_terms, BACKWARD_BLOCK=64)
    with interpret(), tiles, more:
        check(problem, budget=budget, rows=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", [(0.1, 0.0), (0.0, 1e-3), (0.1, 1e-3)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_larger(dtype, terms, weighted, reduction):
    """No slack: where luck averages out, of the loss, a single number, over many draws."""

    def problem(salt):
        hidden, weight = make((192, 64), dtype, seed=1 + salt), make((1000, 64), dtype, seed=2 + salt, scale=0.3)
        classes = make((1000,), dtype, seed=4 + salt).abs() + 0.1 if weighted else None
        target = random_targets((192,), 1000, 0.2, 3 + salt)
        return hidden, weight, target, classes, None, None, -100, reduction, None, 1.0, *terms

    check(problem(0), dloss=1.0, rows=40, slack=64.0 if dtype == torch.float32 else 0.0, again=problem)


@pytest.mark.parametrize("path", ["operator", "kernels"])
@pytest.mark.parametrize("terms", [(0.0, 0.0, True), (0.2, 0.0, True), (0.2, 0.0, False), (0.0, 0.1, False)], ids=str)
def test_rows_that_do_not_count(path, terms):
    """All of them ignored: only the z-loss has a gradient. One of them out of range: an error, or nan from a kernel."""
    smoothing, z_loss, weighted = terms
    hidden, weight = make((3, 8), torch.float32).requires_grad_(), make((30, 8), torch.float32, seed=2)
    classes = torch.rand(30, device=DEVICE) if weighted else None
    how = classes, None, None, -100, "sum", None, 1.0, smoothing, z_loss
    with interpret(path == "kernels"):
        ignored = torch.full((3,), -100, device=DEVICE)
        (got,) = torch.autograd.grad(ours(hidden, weight, ignored, *how), hidden)
        (expected,) = torch.autograd.grad(eager(hidden, weight, ignored, *how), hidden)
        torch.testing.assert_close(got, expected)
        assert bool(got.any()) == bool(z_loss)
        wrong = torch.tensor([1, 30, -100], device=DEVICE)
        if path == "operator" and DEVICE == "cuda":
            return  # torch's gather stops the device: no test after it would run
        if path == "operator":
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                ours(hidden, weight, wrong, *how)
        else:
            loss = ours(hidden, weight, wrong, *how)
            (got,) = torch.autograd.grad(loss, hidden)
            assert loss.isnan() and got[1].isnan().all() and got[0].isfinite().all()


def test_wrong_arguments():
    hidden, weight, target = make((2, 8), torch.float32), make((30, 8), torch.float32), torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(RuntimeError, match="weights of other classes"):
        linear_cross_entropy(hidden, weight, target, class_weight=torch.ones(29, device=DEVICE))
    with pytest.raises(RuntimeError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        linear_cross_entropy(hidden, weight, target, label_smoothing=1.5)


def test_closed_form():
    """The coefficients in the module's docstring give the derivative of its loss, at a point to 40 digits."""
    z, w = sympy.symbols("z:3", real=True), sympy.symbols("w:3", positive=True)
    s, c, G, Gz = sympy.symbols("s c G H", positive=True)
    lse, t, V = sympy.log(sum(map(sympy.exp, z))), 1, 3
    row = (1 - s) * w[t] * (lse - z[t]) + s / V * sum(wj * (lse - zj) for wj, zj in zip(w, z, strict=True))
    b, u = G * (1 - s) * w[t], G * s / V
    a = b + u * sum(w) + 2 * c * Gz * lse
    point = dict(
        zip((*z, *w, s, c, G, Gz), sympy.sympify(["1/3", "-5/7", "2", "3/2", "7/4", "1/5", "1/9", "3", "5", "7"]), strict=True)
    )
    for j in range(3):
        claimed = a * sympy.exp(z[j] - lse) - b * int(j == t) - u * w[j]
        difference = sympy.diff(G * row + Gz * c * lse**2, z[j]) - claimed
        assert abs(sympy.N(difference.subs(point), 40)) < 1e-35


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction):
    hidden, weight, classes = (make(s, torch.float64, seed=i) for i, s in enumerate([(5, 3), (6, 3), (6,)]))
    target = random_targets((5,), 6, 0.3, 3)
    how = None, None, -100, reduction, 2.0, 0.7, 0.2, 0.1
    function = lambda h, w: ours(h, w, target, classes.abs(), *how)  # noqa: E731
    torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))
