"""sloth.kernels.layer_norm against F.layer_norm, fp64 and calculus."""

import pytest
import sympy
import torch
import torch.nn.functional as F
from common import DEVICE, DTYPES, LAYOUTS, cases, compare, dtypes, evaluate, make, shapes, tensors
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels import layer_norm as module
from sloth.kernels.common.dispatch import IMPLEMENTATIONS
from sloth.kernels.layer_norm import layer_norm

EPS = 1e-5
flags = st.tuples(*[st.booleans()] * 3)


def eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def op(x, weight, bias):
    return layer_norm(x, weight, bias, EPS)


class Kernels(torch.autograd.Function):
    """The Triton path, interpreted where there is no GPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        y, mean, rstd = module.forward_triton(x, weight, bias, EPS)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        return module.backward_triton(dy, *ctx.saved_tensors, ctx.bias_dtype, *ctx.needs_input_grad)


def parameters(x, present, dtype=None):
    """(weight or None, bias or None)"""
    made = [make(x.shape[-1:], dtype or x.dtype, seed=5 + i, scale=0.3, mean=1.0 - i) for i in range(2)]
    return [t if there else None for t, there in zip(made, present, strict=True)]


presence = st.tuples(st.booleans(), st.booleans())


@pytest.mark.parametrize("function", [op, Kernels.apply], ids=["operator", "triton"])
@cases
@given(st.data(), shapes(st.integers(3, 200)), dtypes, presence, flags)
def test_layer_norm(function, data, shape, dtype, present, grads):
    x = data.draw(tensors(shape, dtype, mean=0.5))
    w, b = parameters(x, present)
    wanted = [g and t is not None for g, t in zip(grads, (x, w, b), strict=True)]
    dy = data.draw(tensors(shape, dtype, salt=1))
    compare(function, eager, [x, w, b], wanted, [dy], slack=8)


@pytest.mark.parametrize("function", [op, Kernels.apply], ids=["operator", "triton"])
@pytest.mark.parametrize("dtype, parameter_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes(function, dtype, parameter_dtype):
    """bf16 x with fp32 parameters and the reverse (which F.layer_norm refuses): eager is the code with casts."""

    def mixed(x, w, b):
        return F.layer_norm(x.to(w.dtype), x.shape[-1:], w, b, EPS).to(x.dtype)

    x = make((7, 5, 33), dtype, seed=1)
    compare(function, mixed, [x, *parameters(x, (True, True), parameter_dtype)], slack=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_eager_where_luck_averages_out(dtype):
    x = make((256, 1025), dtype, seed=1, scale=3.0, mean=0.5)
    compare(op, eager, [x, *parameters(x, (True, True))], slack=0.5 if dtype == torch.float32 else 0)


def test_mean_much_larger_than_deviation():
    """The variance is of centred values: no cancellation."""
    x = make((16, 512), torch.float32, seed=1, mean=1000.0)
    for function in (op, Kernels.apply):
        compare(function, eager, [x, *parameters(x, (True, True))], slack=8, scale=1000 * x.numel() ** 0.5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1,), (7, 1), (5,)])
def test_degenerate_shapes(shape):
    x = make(shape, torch.float32)
    w, b = parameters(x, (True, True))
    for function in (op, Kernels.apply):
        (y,), grads = evaluate(function, [x, w, b], [True] * 3, [torch.ones_like(x)])
        _, expected = evaluate(eager, [x, w, b], [True] * 3, [torch.ones_like(x)])
        torch.testing.assert_close(y, eager(x, w, b))
        torch.testing.assert_close(grads, expected, atol=1e-4, rtol=1e-5)  # D = 1: the exact x̂ is 0, eager's is not


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [40, 64, 1000])
def test_triton_with_many_rows_for_each_program(D, layout):
    x = make((3, 29, D), torch.bfloat16, layout, 1)
    compare(Kernels.apply, eager, [x, *parameters(x, (True, True))], slack=8)


def test_nothing_is_computed_that_is_not_needed(monkeypatch):
    seen = []
    of, here = IMPLEMENTATIONS["sloth::layer_norm_backward"], "triton" if DEVICE == "cuda" else "aten"
    backward = of[here]

    def spy(*args):
        seen.append(args[-3:])
        return backward(*args)

    monkeypatch.setitem(of, here, spy)
    x = make((4, 8), torch.float32)
    w, b = parameters(x, (True, True))
    asked = [(True, False, False), (False, True, False), (False, False, True), (True, True, True), (False, False, False)]
    for grads in asked:
        evaluate(op, [x, w, b], grads, [torch.ones_like(x)])
    assert seen == asked[:-1]


def test_second_derivative_is_refused():
    x = make((4, 8), torch.float32).requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x, None, None, EPS).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        dx.sum().backward()


def test_closed_form_is_the_derivative():
    """The module's dx, dw, db, symbolically, for one row of two."""
    D = 2
    x, w, b, g = (sympy.symbols(f"{name}:{D}", real=True) for name in "xwbg")
    eps = sympy.Symbol("eps", positive=True)
    mean = sum(x) / D
    r = (sum((v - mean) ** 2 for v in x) / D + eps) ** sympy.Rational(-1, 2)
    hat = [(v - mean) * r for v in x]
    loss = sum(g[i] * (hat[i] * w[i] + b[i]) for i in range(D))
    m = [g[i] * w[i] for i in range(D)]
    for i in range(D):
        dx = r * (m[i] - sum(m) / D - hat[i] * sum(p * q for p, q in zip(m, hat, strict=True)) / D)
        assert sympy.simplify(sympy.diff(loss, x[i]) - dx) == 0
        assert sympy.simplify(sympy.diff(loss, w[i]) - g[i] * hat[i]) == 0
        assert sympy.simplify(sympy.diff(loss, b[i]) - g[i]) == 0


def test_gradcheck():
    x, w, b = (make(s, torch.float64, seed=i).requires_grad_() for i, s in enumerate([(2, 3, 5), (5,), (5,)]))
    assert torch.autograd.gradcheck(op, (x, w, b))
    assert torch.autograd.gradcheck(lambda x, b: op(x, None, b), (x, b))


@pytest.mark.parametrize("layout", ["contiguous", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("permuted", "padded"))])
def test_opcheck(layout):
    x = make((2, 3, 8), torch.float32, layout).requires_grad_()
    w, b = (p.requires_grad_() for p in parameters(x, (True, True)))
    torch.library.opcheck(torch.ops.sloth.layer_norm_forward, (x, w, b, EPS))
    torch.library.opcheck(torch.ops.sloth.layer_norm_forward, (x, None, b, EPS))
    y, mean, rstd = (t.detach() for t in torch.ops.sloth.layer_norm_forward(x, w, b, EPS))
    args = (y, x.detach(), w.detach(), mean, rstd, torch.float32)
    for need in ((True, True, True), (True, False, False), (False, False, True)):
        torch.library.opcheck(torch.ops.sloth.layer_norm_backward, (*args, *need))


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, b: op(torch.sin(x), w, b).cos(), backend="inductor", dynamic=dynamic, fullgraph=True)
    for batch in (3, 5):
        x = make((batch, 4, 16), torch.float32, seed=1)
        compare(compiled, lambda x, w, b: eager(torch.sin(x), w, b).cos(), [x, *parameters(x, (True, True))], slack=16)


def test_a_weight_for_each_head_is_refused():
    """Its gradient has another shape (Cohere's QK-norm)."""
    with pytest.raises(RuntimeError, match=r"weight is \[4, 16\]"):
        torch.ops.sloth.layer_norm(torch.randn(2, 3, 4, 16), torch.randn(4, 16), None, 1e-6)
