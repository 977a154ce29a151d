"""sloth.kernels.gated_act against the eager code of gated MLPs."""

import pytest
import sympy
import torch
import torch.nn.functional as F
from common import DEVICE, cases, compare, dtypes, make, shapes, tensors
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, interpret, saved

from sloth.kernels import gated_act as module
from sloth.kernels.gated_act import ACTIVATIONS, gated_act, gated_act_packed

EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}
acts = st.sampled_from(ACTIVATIONS)
one_or_both = st.sampled_from([(True, True), (True, False), (False, True)])


def packed_eager(act, up_first):
    def eager(x):
        first, second = x.chunk(2, -1)
        gate, up = (second, first) if up_first else (first, second)
        return EAGER[act](gate) * up

    return eager


@cases
@given(st.data(), shapes(), dtypes, acts, one_or_both)
def test_operator(data, shape, dtype, act, grads):
    gate, up = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    compare(lambda g, u: gated_act(g, u, act), lambda g, u: EAGER[act](g) * u, [gate, up], grads)


@cases
@given(st.data(), shapes(), dtypes, acts, st.booleans())
def test_packed(data, shape, dtype, act, up_first):
    x = data.draw(tensors((*shape[:-1], 2 * shape[-1]), dtype))
    compare(lambda x: gated_act_packed(x, act, up_first), packed_eager(act, up_first), [x])


@cases
@given(st.data(), shapes(), st.sampled_from([torch.float32, torch.float16]), acts, one_or_both, st.booleans())
def test_kernels(data, shape, dtype, act, grads, up_first):
    """As above, with the Triton kernels on every device (bf16 only on GPUs: the interpreter cannot round to it)."""
    gate, up = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    x = data.draw(tensors((*shape[:-1], 2 * shape[-1]), dtype))
    with interpret():
        compare(lambda g, u: gated_act(g, u, act), lambda g, u: EAGER[act](g) * u, [gate, up], grads)
        compare(lambda x: gated_act_packed(x, act, up_first), packed_eager(act, up_first), [x])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large(act, dtype):
    """Many elements: luck averages out, so no slack."""
    gate, up = make((256, 1000), dtype, "padded", scale=3.0), make((256, 1000), dtype, seed=1, scale=3.0)
    slack = 0.5 if dtype == torch.float32 else 0.0
    compare(lambda g, u: gated_act(g, u, act), lambda g, u: EAGER[act](g) * u, [gate, up], slack=slack)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_mixed_dtypes(path):
    gate, up = make((3, 40), torch.float16), make((3, 40), torch.float32, seed=1)
    with interpret(path == "kernels"):
        compare(lambda g, u: gated_act(g, u, "silu"), lambda g, u: F.silu(g) * u, [gate, up])


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_no_rows(path):
    gate = torch.zeros(2, 0, 8, device=DEVICE, requires_grad=True)
    with interpret(path == "kernels"):
        gated_act(gate, gate, "silu").sum().backward()
        assert gate.grad.shape == gate.shape
        assert gated_act_packed(gate, "silu").shape == (2, 0, 4)


def test_offsets_beyond_32_bits():
    """Rows 2³¹ elements apart; untouched memory is never committed."""
    x = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE).as_strided((2, 16), (2**31, 1))
    values = make((2, 16), torch.float16)
    x.copy_(values)
    with interpret():
        assert torch.equal(gated_act_packed(x, "silu"), gated_act_packed(values, "silu"))
        dh = make((2, 8), torch.float16, seed=1)
        assert torch.equal(
            module.backward_packed_triton(dh, x, "silu", False), module.backward_packed_triton(dh, values, "silu", False)
        )


def test_extremes():
    """No nan where eager has none."""
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=DEVICE)
    for path in (False, True):
        with interpret(path):
            for act in ACTIVATIONS:
                compare(lambda g, u, act=act: gated_act(g, u, act), lambda g, u, act=act: EAGER[act](g) * u, [gate, gate.flip(0)])


# ---------------------------------------------------------------- only what is needed


@pytest.mark.parametrize("grads", [(True, False), (False, True), (True, True)])
def test_nothing_in_vain(grads):
    gate, up = make((3, 8), torch.float32).requires_grad_(grads[0]), make((3, 8), torch.float32, seed=1).requires_grad_(grads[1])
    with saved() as kept:
        h = gated_act(gate, up, "silu")
    expected = [gate, up] if grads[0] else [gate]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in expected]
    with Recorder() as calls:
        h.sum().backward()
    assert calls.named("gated_act_backward")[0][-2:] == grads
    assert [t.grad is not None for t in (gate, up)] == list(grads)


def test_packed_saves_x():
    x = make((3, 8), torch.float32).requires_grad_()
    with saved() as kept:
        gated_act_packed(x, "silu")
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_differentiated_once():
    x = make((2, 8), torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(gated_act_packed(x, "silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_bad_arguments():
    x = make((2, 8), torch.float32)
    with pytest.raises(ValueError, match="act must be"):
        gated_act(x, x, "tanh")
    with pytest.raises(RuntimeError, match="differ in shape"):
        gated_act(x, x[:1], "silu")
    with pytest.raises(RuntimeError, match="even last dimension"):
        gated_act_packed(x[:, :7], "silu")


# ---------------------------------------------------------------- derivation, registration, compilation


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_closed_form(act):
    """The derivatives in the module's docstring are those of the activations, symbolically."""
    g = sympy.symbols("g", real=True)
    k, a = sympy.sqrt(2 / sympy.pi), sympy.Rational(44715, 1000000)
    if act == "silu":
        s = 1 / (1 + sympy.exp(-g))
        f, claimed = g * s, s * (1 + g * (1 - s))
    elif act == "gelu":
        cdf = (1 + sympy.erf(g / sympy.sqrt(2))) / 2
        f, claimed = g * cdf, cdf + g * sympy.exp(-(g**2) / 2) / sympy.sqrt(2 * sympy.pi)
    elif act == "quick_gelu":
        alpha = sympy.Rational(1702, 1000)
        s = 1 / (1 + sympy.exp(-alpha * g))
        f, claimed = g * s, s * (1 + alpha * g * (1 - s))
    elif act == "relu":
        f, claimed = sympy.Max(g, 0), sympy.Heaviside(g)
    elif act == "sigmoid":
        f = 1 / (1 + sympy.exp(-g))
        claimed = f * (1 - f)
    else:
        z = k * (g + a * g**3)
        s = 1 / (1 + sympy.exp(-2 * z))
        assert sympy.simplify((s - (1 + sympy.tanh(z)) / 2).rewrite(sympy.exp)) == 0
        f, claimed = g * s, s + g * s * (1 - s) * 2 * k * (1 + 3 * a * g**2)
    assert sympy.simplify(sympy.diff(f, g) - claimed) == 0


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act):
    gate, up = (make((2, 5), torch.float64, seed=i).requires_grad_() for i in range(2))
    torch.autograd.gradcheck(lambda g, u: gated_act(g, u, act), (gate, up))
    x = make((2, 6), torch.float64).requires_grad_()
    for up_first in (False, True):
        torch.autograd.gradcheck(lambda x, first=up_first: gated_act_packed(x, act, first), (x,))


def test_opcheck():
    gate, up = (make((2, 3, 6), torch.bfloat16, seed=i).requires_grad_() for i in range(2))
    torch.library.opcheck(gated_act, (gate, up, "silu"))
    torch.library.opcheck(gated_act, (gate.detach(), up, "gelu"))
    torch.library.opcheck(gated_act_packed, (gate, "gelu_tanh", True))


def test_autocast_changes_nothing():
    gate, up = (make((3, 8), torch.float32, seed=i) for i in range(2))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(gated_act(gate, up, "silu"), gated_act(gate.clone(), up, "silu"))
        assert gated_act(gate, up, "silu").dtype == torch.float32


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    def mlp(x, w):
        gate, up = (x @ w).chunk(2, -1)
        return gated_act(gate, up, "silu") + gated_act_packed(x @ w, "gelu", True)

    w = make((8, 24), torch.float32).requires_grad_()
    compiled = torch.compile(mlp, dynamic=dynamic, fullgraph=True)
    for rows in (5, 7) if dynamic else (5,):
        x = make((2, rows, 8), torch.float32, seed=rows).requires_grad_()
        got, want = compiled(x, w), mlp(x, w)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y.square().sum(), (x, w)) for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
