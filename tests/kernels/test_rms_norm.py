"""sloth.kernels.rms_norm against the eager code it replaces, fp64 and calculus."""

import pytest
import sympy
import torch
from common import DEVICE, DTYPES, LAYOUTS, assert_no_worse, cases, compare, dtypes, evaluate, make, seeds, shapes, tensors, wide
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels import rms_norm as module
from sloth.kernels.common.dispatch import IMPLEMENTATIONS
from sloth.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-6


def normed(x):
    x = wide(x)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def llama(x, weight):
    return weight * normed(x).to(x.dtype)


def gemma(x, weight):
    return (normed(x) * (1.0 + wide(weight))).to(x.dtype)


def olmo2(x, weight):
    return (weight * normed(x)).to(x.dtype)


def bare(x, weight):
    return normed(x).to(x.dtype)


def unit(x, weight):
    x_ = wide(x)
    return weight * (x_ * torch.rsqrt(x_.pow(2).sum(-1, keepdim=True) + EPS)).to(x.dtype)


VARIANTS = {  # eager code, (offset, promote, …)
    "llama": (llama, (0.0, True)),
    "gemma": (gemma, (1.0, False)),
    "olmo2": (olmo2, (0.0, False)),
    "bare": (bare, (0.0, False)),
    "unit": (unit, (0.0, True, None, True)),
}
variants = st.sampled_from(sorted(VARIANTS))


def added(eager):
    def function(x, residual, weight):
        h = x + residual
        return h, eager(h, weight)

    return function


def plain_op(options):
    return lambda x, w: rms_norm(x, w, EPS, *options)


def add_op(options):
    return lambda x, r, w: add_rms_norm(x, r, w, EPS, *options)


def triton_op(options):
    """The Triton path, interpreted where there is no GPU, as a differentiable function."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, residual, weight):
            h, y, rstd = module.forward_triton(x, residual, weight, EPS, *options)
            ctx.save_for_backward(x if h is None else h, weight, rstd)
            ctx.dtypes = x.dtype, None if residual is None else residual.dtype
            ctx.set_materialize_grads(False)
            return y if h is None else (h, y)

        @staticmethod
        def backward(ctx, *grads):
            x, weight, rstd = ctx.saved_tensors
            dh, dy = grads if len(grads) == 2 else (None, *grads)
            need = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
            dx, dw = module.backward_triton(dy, dh, x, weight, rstd, options[0], *need, *options[3:])
            dr = dx.to(ctx.dtypes[1]) if dx is not None and ctx.dtypes[1] else None
            return dx if dx is None else dx.to(ctx.dtypes[0]), dr, dw

    return Function.apply


def weight_like(x, dtype, offset=0.0, seed=5):
    return make(x.shape[-1:], dtype, seed=seed, scale=0.3, mean=1.0 - offset)


# ---------------------------------------------------------------- operators


@cases
@given(st.data(), shapes(), dtypes, dtypes, variants, st.tuples(st.booleans(), st.booleans()))
def test_rms_norm(data, shape, dtype, weight_dtype, variant, grads):
    eager, options = VARIANTS[variant]
    x = data.draw(tensors(shape, dtype))
    w = None if variant == "bare" else weight_like(x, weight_dtype, options[0])
    compare(plain_op(options), eager, [x, w], [grads[0], grads[1] and w is not None], slack=8)


@cases
@given(st.data(), shapes(), dtypes, dtypes, dtypes, variants, st.tuples(*[st.booleans()] * 5))
def test_add_rms_norm(data, shape, dtype, residual_dtype, weight_dtype, variant, flags):
    """Inputs that need a gradient and outputs that are used, in every combination."""
    eager, options = VARIANTS[variant]
    x, r = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, residual_dtype, salt=1))
    w = None if variant == "bare" else weight_like(x, weight_dtype, options[0])
    with torch.no_grad():
        outputs = added(eager)(x, r, w)
    douts = [
        make(o.shape, o.dtype, seed=63 - i) if used else None for i, (o, used) in enumerate(zip(outputs, flags, strict=False))
    ]
    compare(add_op(options), added(eager), [x, r, w], [*flags[2:4], flags[4] and w is not None], douts, slack=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_no_worse_than_eager_where_luck_averages_out(variant, dtype):
    eager, options = VARIANTS[variant]
    torch.manual_seed(0)
    x, r = make((256, 1025), dtype, seed=1, scale=3.0), make((256, 1025), dtype, seed=2)
    w = None if variant == "bare" else weight_like(x, dtype, options[0])
    grads = [True, w is not None]
    slack = 0.5 if dtype == torch.float32 else 0
    compare(plain_op(options), eager, [x, w], grads, slack=slack)
    compare(add_op(options), added(eager), [x, r, w], [True, *grads], slack=slack)


@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e18])
def test_extreme_scales(scale):
    x, w = make((8, 64), torch.bfloat16, seed=1, scale=scale), make((64,), torch.bfloat16, seed=2)
    compare(plain_op((0.0, True)), llama, [x, w], slack=8)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1,), (7, 1)])
def test_degenerate_shapes(shape):
    x, w = make(shape, torch.float32), make(shape[-1:], torch.float32, seed=1)
    (y,), grads = evaluate(plain_op((0.0, False)), [x, w], [True, True], [torch.ones_like(x)])
    assert y.shape == grads[0].shape == x.shape and grads[1].shape == w.shape
    torch.testing.assert_close(y, llama(x, w))
    h, y, rstd = module.forward_triton(x, x, w, EPS, 0.0, False)
    torch.testing.assert_close(y, llama(x + x, w))
    dx, dw = module.backward_triton(y, None, h, w, rstd, 0.0, True, True)
    expected = module.backward_aten(y, None, h, w, rstd, 0.0, True, True)
    torch.testing.assert_close((dx, dw), expected)


def test_nothing_is_computed_that_is_not_needed(monkeypatch):
    """The backward operator is called with the flags of what is wanted, and not at all where only h is used."""
    seen = []
    of, here = IMPLEMENTATIONS["sloth::rms_norm_backward"], "triton" if DEVICE == "cuda" else "aten"
    backward = of[here]

    def spy(*args):
        seen.append(args[-3:-1])
        return backward(*args)

    monkeypatch.setitem(of, here, spy)
    x, r, w = make((4, 8), torch.float32), make((4, 8), torch.float32), make((8,), torch.float32)
    d = torch.ones_like(x)
    evaluate(plain_op((0.0, True)), [x, w], [True, False], [d])
    evaluate(plain_op((0.0, True)), [x, w], [False, True], [d])
    evaluate(plain_op((0.0, True)), [x, w], [True, True], [d])
    evaluate(add_op((0.0, True)), [x, r, w], [False, True, False], [d, d])
    assert seen == [(True, False), (False, True), (True, True), (True, False)]
    evaluate(add_op((0.0, True)), [x, r, w], [True, True, True], [d, None])
    assert len(seen) == 4


def test_second_derivative_is_refused():
    x = make((4, 8), torch.float32).requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(x, None, EPS).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        dx.sum().backward()


def test_autocast_changes_nothing():
    x, w = make((4, 8), torch.float32), make((8,), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = rms_norm(x, w, EPS)
    assert torch.equal(y, rms_norm(x, w, EPS))


# ---------------------------------------------------------------- Triton


@cases
@given(st.data(), shapes(st.integers(3, 300)), dtypes, dtypes, variants, st.tuples(st.booleans(), st.booleans()))
def test_triton(data, shape, dtype, weight_dtype, variant, grads):
    eager, options = VARIANTS[variant]
    x = data.draw(tensors(shape, dtype))
    w = None if variant == "bare" else weight_like(x, weight_dtype, options[0])
    op = triton_op(options)
    compare(lambda x, w: op(x, None, w), eager, [x, w], [grads[0], grads[1] and w is not None], slack=8)


@cases
@given(st.data(), shapes(st.integers(3, 300)), dtypes, dtypes, variants, st.booleans())
def test_triton_with_residual(data, shape, dtype, residual_dtype, variant, wide_dh):
    eager, options = VARIANTS[variant]
    x, r = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, residual_dtype, salt=1))
    w = None if variant == "bare" else weight_like(x, dtype, options[0])
    with torch.no_grad():
        outputs = added(eager)(x, r, w)
    dh = data.draw(tensors(shape, outputs[0].dtype, salt=2)) if wide_dh else None  # a gradient in any layout, or none
    dy = data.draw(tensors(shape, outputs[1].dtype, salt=3))
    compare(triton_op(options), added(eager), [x, r, w], [True, True, w is not None], [dh, dy], slack=8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [40, 64, 1000])
def test_triton_with_many_rows_for_each_program(D, layout):
    x, w = make((3, 29, D), torch.bfloat16, layout, 1), make((D,), torch.float32, seed=2)
    compare(lambda x, w: triton_op((0.0, True))(x, None, w), llama, [x, w], slack=8)


@pytest.mark.parametrize("D", [4096, 65536])
def test_triton_with_wide_rows(D):
    x, r, w = make((2, D), torch.bfloat16, seed=1), make((2, D), torch.bfloat16, seed=2), make((D,), torch.bfloat16, seed=3)
    compare(triton_op((0.0, True)), added(llama), [x, r, w], slack=0)


def test_deterministic():
    x, w, dy = (make((333, 96), torch.float32, seed=i) for i in range(3))
    _, _, rstd = module.forward_triton(x, None, w[0], EPS, 0.0, False)
    first, second = (module.backward_triton(dy, None, x, w[0], rstd, 0.0, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- calculus, registration, compiler


@pytest.mark.parametrize("over", [1, 2])
def test_closed_form_is_the_derivative(over):
    """The module's dx and dweight, symbolically, for one row of two; over 1 where means are sums."""
    x, s, g = (sympy.symbols(f"{name}:2", real=True) for name in "xsg")
    eps = sympy.Symbol("eps", positive=True)
    r = (sum(v**2 for v in x) / over + eps) ** sympy.Rational(-1, 2)
    loss = sum(g[i] * x[i] * r * s[i] for i in range(2))
    m = [g[i] * s[i] for i in range(2)]
    hat = [v * r for v in x]
    mean = sum(a * b for a, b in zip(m, hat, strict=True)) / over
    for i in range(2):
        assert sympy.simplify(sympy.diff(loss, x[i]) - r * (m[i] - hat[i] * mean)) == 0
        assert sympy.simplify(sympy.diff(loss, s[i]) - g[i] * hat[i]) == 0


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck(offset):
    x, r, w = (make(s, torch.float64, seed=i).requires_grad_() for i, s in enumerate([(2, 3, 5), (2, 3, 5), (5,)]))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, offset), (x, w))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, EPS), (x,))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, offset, summed=True), (x, w))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS, offset), (x, r, w))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS, offset)[1], (x, r, w))


@pytest.mark.parametrize("layout", ["contiguous", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("permuted", "padded"))])
def test_opcheck(layout):
    x, r = (make((2, 3, 8), torch.float32, layout, i).requires_grad_() for i in range(2))
    w = make((8,), torch.float32, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.sloth.rms_norm_forward, (x, w, EPS, 0.0, True))
    torch.library.opcheck(torch.ops.sloth.rms_norm_forward, (x, None, EPS, 0.0, True, None, True))
    torch.library.opcheck(torch.ops.sloth.add_rms_norm_forward, (x, r, w, EPS, 1.0, False))
    rstd = torch.ops.sloth.rms_norm_forward(x, w, EPS, 0.0, True)[1].detach()
    args = [t.detach() for t in (r, x, x, w)]
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.sloth.rms_norm_backward, (*args, rstd, 0.0, *need))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.covered(1)
def test_inductor(dynamic, checkpointed):
    """Forward and backward compiled, for two batch sizes."""

    def block(x, r, w):
        h, y = add_rms_norm(torch.sin(x), r, w, EPS, 0.0, True)
        return h + rms_norm(y, w, EPS, 1.0).cos()

    def eager(x, r, w):
        h = torch.sin(x) + r
        return h + gemma(llama(h, w), w).cos()

    def model(x, r, w):
        return torch.utils.checkpoint.checkpoint(block, x, r, w, use_reentrant=False) if checkpointed else block(x, r, w)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="inductor", dynamic=dynamic, fullgraph=True)
    for batch in (3, 5):
        x, r = (make((batch, 4, 16), torch.float32, seed=i) for i in range(2))
        compare(compiled, eager, [x, r, make((16,), torch.float32, seed=2)], slack=16)


@cases
@given(seeds, st.sampled_from([("permuted", "contiguous"), ("contiguous", "permuted"), ("permuted", "expanded")]))
def test_strides_of_a_sum_are_eagers(seed, layouts):
    x, r = (make((2, 3, 4, 8), torch.float32, layout, seed) for layout in layouts)
    w = make((8,), torch.float32)
    expected = added(llama)(x, r, w)
    for outputs in (add_op((0.0, True))(x, r, w), module.forward_triton(x, r, w, EPS, 0.0, True)):
        assert [o.stride() for o in outputs[:2]] == [e.stride() for e in expected]
        assert_no_worse(outputs[:2], expected, [e.double() for e in expected])


def test_a_weight_for_each_head_is_refused():
    """Its gradient has another shape (Cohere's QK-norm, Falcon-H1's gated norm)."""
    x, w = torch.randn(2, 3, 4, 16), torch.randn(4, 16)
    with pytest.raises(RuntimeError, match=r"weight is \[4, 16\]"):
        torch.ops.sloth.rms_norm(x, w, 1e-6)
    with pytest.raises(RuntimeError, match=r"weight is \[4, 16\]"):
        torch.ops.sloth.add_rms_norm(x, x, w, 1e-6)
