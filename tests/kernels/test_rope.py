"""sloth.kernels.rope against the eager code of rotary embeddings."""

import pytest
import sympy
import torch
from common import DEVICE, LAYOUTS, cases, compare, dtypes, make
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, interpret, saved

from sloth.kernels import rope as module
from sloth.kernels.rope import rope, rope_single


def rotate_half(x, interleaved):
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def eager_single(x, cos, sin, interleaved=False, promote=False):
    """As Hugging Face writes it; without `promote` the result is cast back where cos is wider."""
    cos, sin, R = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    y = turned * cos + rotate_half(turned, interleaved) * sin
    if x.shape[-1] > R:
        y = torch.cat((y, rest), -1)
    return y if promote else y.to(x.dtype)


def eager(q, k, cos, sin, interleaved=False, promote=False):
    return tuple(eager_single(x, cos, sin, interleaved, promote) for x in (q, k))


def heads(shape, dtype, layout, seed):
    """[B, heads, S, D]; "model": the transpose of a [B, S, heads, D] projection; "packed": of a part of a packed one."""
    B, H, S, D = shape
    if layout == "model":
        return make((B, S, H, D), dtype, seed=seed).transpose(1, 2)
    if layout == "packed":
        return make((B, S, 3 * H * D), dtype, seed=seed)[..., H * D : 2 * H * D].view(B, S, H, D).transpose(1, 2)
    return make(shape, dtype, layout, seed)


@st.composite
def problems(draw, dtypes):
    """q, k, cos, sin of any shape and layout. cos and sin are not of one angle, and their halves differ."""
    side = st.integers(1, 5)
    B, H, G, S = draw(side), draw(side), draw(side), draw(side)
    R = 2 * draw(st.integers(1, 20))
    D = R + draw(st.sampled_from([0, 0, 1, 7, 16]))
    dtype, seed = draw(dtypes), draw(st.integers(0, 2**20))
    layouts = st.sampled_from(["model", "packed", *(name for name in LAYOUTS if name != "expanded")])
    table = make((draw(st.sampled_from([1, B])), S, 2 * R), draw(st.sampled_from([dtype, torch.float32])), seed=seed + 2)
    cos, sin = table[..., :R], table[..., R:]
    if draw(st.booleans()):
        cos, sin = cos.contiguous(), sin.contiguous()
    q, k = heads((B, H, S, D), dtype, draw(layouts), seed), heads((B, G, S, D), dtype, draw(layouts), seed + 1)
    return q, k, cos, sin, draw(st.booleans())


some_grads = st.sampled_from([(True, True), (True, False), (False, True)])
some_douts = st.sampled_from([(True, True), (True, False), (False, True)])


def check(problem, grads, used, promote):
    *tensors, interleaved = problem
    q, k, cos, _ = tensors
    douts = [torch.randn(x.shape, device=DEVICE) for x in (q, k)]
    douts = [d.to(torch.promote_types(x.dtype, cos.dtype) if promote else x.dtype) for d, x in zip(douts, (q, k), strict=True)]
    how = (interleaved, promote)
    compare(
        lambda *t: rope(*t, *how),
        lambda *t: eager(*t, *how),
        tensors,
        [*grads, False, False],
        [d if u else None for d, u in zip(douts, used, strict=True)],
    )
    compare(
        lambda *t: rope_single(*t, *how), lambda *t: eager_single(*t, *how), [k, *tensors[2:]], [True, False, False], [douts[1]]
    )


@cases
@given(problems(dtypes), some_grads, some_douts, st.booleans())
def test_operator(problem, grads, used, promote):
    check(problem, grads, used, promote)


@cases
@given(problems(st.sampled_from([torch.float32, torch.float16])), some_grads, some_douts, st.booleans())
def test_kernels(problem, grads, used, promote):
    """As above, with the Triton kernels on every device (bf16 only on GPUs: the interpreter cannot round to it)."""
    with interpret():
        check(problem, grads, used, promote)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_large(dtype, interleaved):
    """A real table, many elements: luck averages out, so no slack."""
    angle = torch.arange(64.0)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    cos, sin = (t[None].to(DEVICE, dtype) for t in (angle.cos(), angle.sin()))
    q, k = heads((2, 8, 64, 64), dtype, "model", 0), heads((2, 2, 64, 64), dtype, "model", 1)
    grads = [True, True, False, False]
    compare(lambda *t: rope(*t, interleaved), lambda *t: eager(*t, interleaved), [q, k, cos, sin], grads, slack=0.0)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_many_heads(path, monkeypatch):
    """More heads than a program holds at a time."""
    monkeypatch.setattr(module, "CHANNELS", 64)
    q, k = heads((1, 11, 3, 24), torch.float32, "model", 0), heads((1, 5, 3, 24), torch.float32, "model", 1)
    cos, sin = make((1, 3, 16), torch.float32, seed=2), make((1, 3, 16), torch.float32, seed=3)
    with interpret(path == "kernels"):
        check((q, k, cos, sin, False), (True, True), (True, True), False)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_no_tokens(path):
    q, cos = torch.zeros(2, 3, 0, 8, device=DEVICE, requires_grad=True), torch.zeros(1, 0, 8, device=DEVICE)
    with interpret(path == "kernels"):
        sum(y.sum() for y in rope(q, q[:, :1], cos, cos)).backward()
    assert q.grad.shape == q.shape


def test_offsets_beyond_32_bits():
    """Batches 2³¹ elements apart; untouched memory is never committed."""
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 2, 4, 8), (2**31, 8, 16, 1))
    values = make((2, 2, 4, 8), torch.float16)
    x.copy_(values)
    cos, sin = make((1, 4, 8), torch.float16, seed=1), make((1, 4, 8), torch.float16, seed=2)
    with interpret():
        assert torch.equal(rope_single(x, cos, sin), rope_single(values, cos, sin))


@pytest.mark.parametrize("path", ["operator", "kernels"])
@pytest.mark.parametrize("R", [8, 6])
def test_layout(path, R):
    """Outputs lie in memory as eager's; gradients as the projection's output."""
    q, k = (heads((2, n, 5, 8), torch.float32, "model", n).requires_grad_() for n in (4, 2))
    cos = make((1, 5, R), torch.float32)
    with interpret(path == "kernels"):
        ours = rope(q, k, cos, cos)
        grads = torch.autograd.grad([y.sum() for y in ours], (q, k))
    assert [y.stride() for y in ours] == [y.stride() for y in eager(q, k, cos, cos)]
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_tables_with_a_head_dimension(path):
    """cos and sin as [B or 1, 1, S, R], after the model's own unsqueeze."""
    q, k = (heads((2, n, 5, 8), torch.float32, "model", n) for n in (4, 2))
    cos, sin = make((1, 5, 8), torch.float32, seed=1), make((1, 5, 8), torch.float32, seed=2)
    with interpret(path == "kernels"):
        compare(lambda q, k: rope(q, k, cos[:, None], sin[:, None]), lambda q, k: eager(q, k, cos, sin), [q, k])


@pytest.mark.parametrize("path", ["operator", "kernels"])
@pytest.mark.parametrize("R", [8, 6])
def test_heads_behind_positions(path, R):
    """q and k as [B, S, heads, D], cos and sin unsqueezed at dimension 2: values, gradients and strides of eager code."""
    q, k = (make((2, 5, n, 8), torch.float32, seed=n) for n in (4, 2))
    cos, sin = (make((1, 5, 1, R), torch.float32, seed=seed) for seed in (5, 6))

    def transposed(*xs):
        return tuple(eager_single(x.transpose(1, 2), cos[:, :, 0], sin[:, :, 0]).transpose(1, 2) for x in xs)

    with interpret(path == "kernels"):
        compare(lambda q, k: rope(q, k, cos, sin), transposed, [q, k])
        compare(lambda k: rope_single(k, cos, sin), transposed, [k])


# ---------------------------------------------------------------- only what is needed


def test_saves_cos_and_sin():
    q, k = (heads((1, n, 5, 8), torch.float32, "model", n).requires_grad_() for n in (4, 2))
    cos, sin = make((1, 5, 8), torch.float32), make((1, 5, 8), torch.float32, seed=1)
    with saved() as kept:
        rope(q, k, cos, sin)
        rope_single(q, cos, sin)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (cos, sin, cos, sin)]


@pytest.mark.parametrize("grads", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("used", [(True, False), (False, True), (True, True)])
def test_nothing_in_vain(grads, used):
    q, k = (heads((1, n, 5, 8), torch.float32, "model", n).requires_grad_(g) for n, g in zip((4, 2), grads, strict=True))
    cos = make((1, 5, 8), torch.float32)
    outputs = [y for y, u in zip(rope(q, k, cos, cos), used, strict=True) if u]
    wanted = [g and u for g, u in zip(grads, used, strict=True)]
    with Recorder() as calls:
        sum(y.sum() for y in [*outputs, *(x.sum() for x in (q, k))]).backward()
    assert len(calls.named("rope_backward")) == all(wanted)
    assert len(calls.named("rope_single_backward")) == (sum(wanted) == 1)


def test_differentiated_once():
    x = heads((1, 2, 3, 8), torch.float64, "model", 0).requires_grad_()
    cos = make((1, 3, 8), torch.float64)
    (dx,) = torch.autograd.grad(rope_single(x, cos, cos).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_bad_arguments():
    x, cos = make((1, 2, 3, 8), torch.float32), make((1, 3, 8), torch.float32)
    with pytest.raises(RuntimeError, match="differ in shape"):
        rope_single(x, cos, cos[..., :6])
    with pytest.raises(RuntimeError, match="must be even"):
        rope_single(x, cos[..., :5], cos[..., :5])
    with pytest.raises(RuntimeError, match="at most"):
        rope_single(x[..., :6], cos, cos)
    with pytest.raises(RuntimeError, match="positions"):
        rope_single(x[:, :, :2], cos, cos)
    with pytest.raises(RuntimeError, match="takes x"):
        rope_single(x, cos[0], cos[0])


# ---------------------------------------------------------------- derivation, registration, compilation


@pytest.mark.parametrize("interleaved", [False, True])
def test_closed_form(interleaved):
    """The backward formula in the module's docstring is the transposed Jacobian of x·cos + rotate(x)·sin."""
    R = 6
    x, c, s, dy = (sympy.Matrix(sympy.symbols(f"{name}:{R}", real=True)) for name in ("x", "c", "s", "dy"))
    a = range(0, R, 2) if interleaved else range(R // 2)
    pairs = [(i, i + 1 if interleaved else i + R // 2) for i in a]
    rotated, claimed = sympy.zeros(R, 1), sympy.zeros(R, 1)
    for i, j in pairs:
        rotated[i], rotated[j] = -x[j], x[i]
        claimed[i] = dy[i] * c[i] + dy[j] * s[j]
        claimed[j] = dy[j] * c[j] - dy[i] * s[i]
    y = x.multiply_elementwise(c) + rotated.multiply_elementwise(s)
    assert sympy.simplify(y.jacobian(x).T * dy - claimed) == sympy.zeros(R, 1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("D", [4, 7])
def test_gradcheck(interleaved, D):
    q, k = (heads((2, n, 3, D), torch.float64, "model", n).requires_grad_() for n in (2, 1))
    cos, sin = make((1, 3, 4), torch.float64, seed=5), make((1, 3, 4), torch.float64, seed=6)
    torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved), (q, k))


@pytest.mark.nightly
def test_opcheck():
    q, k = (heads((2, n, 3, 8), torch.bfloat16, "model", n).requires_grad_() for n in (4, 2))
    cos, sin = make((1, 3, 6), torch.float32, seed=5), make((1, 3, 6), torch.float32, seed=6)
    torch.library.opcheck(rope, (q, k, cos, sin))
    torch.library.opcheck(rope, (q, k.detach(), cos, sin, True, True))
    torch.library.opcheck(rope_single, (k, cos.repeat(1, 1, 2)[..., :8], sin.repeat(1, 1, 2)[..., :8]))


def test_autocast_changes_nothing():
    x, cos = make((1, 2, 3, 8), torch.float32), make((1, 3, 8), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = rope_single(x, cos, cos)
    assert torch.equal(inside, rope_single(x, cos, cos))


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    def attention(x, w, cos, sin):
        B, S, _ = x.shape
        q, k = (x @ w).view(B, S, 6, 8).transpose(1, 2).split([4, 2], 1)
        q, k = rope(q, k, cos, sin)
        return q @ rope_single(k, cos, sin, True).repeat_interleave(2, 1).transpose(2, 3)

    w = make((8, 48), torch.float32).requires_grad_()
    compiled = torch.compile(attention, dynamic=dynamic, fullgraph=True)
    for S in (5, 7) if dynamic else (5,):
        x = make((2, S, 8), torch.float32, seed=S).requires_grad_()
        cos, sin = make((1, S, 8), torch.float32, seed=1), make((1, S, 8), torch.float32, seed=2)
        got, want = compiled(x, w, cos, sin), attention(x, w, cos, sin)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(y.square().sum(), (x, w)) for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-2)
