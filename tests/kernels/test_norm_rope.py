"""sloth.kernels.norm_rope against the eager code of QK-norm and rotary embeddings."""

import pytest
import sympy
import torch
from common import DEVICE, LAYOUTS, cases, compare, dtypes, make, wide
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, interpret, saved

from sloth.kernels import norm_rope as module
from sloth.kernels import rope as rope_module
from sloth.kernels.norm_rope import norm_rope

EPS = 1e-6


def eager_norm(x, w, offset):
    h = wide(x)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (offset + wide(w))).to(x.dtype) if offset else w * h.to(x.dtype)


def rotate_half(x, interleaved):
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def turn(x, cos, sin, interleaved):
    R = cos.shape[-1]
    y = x[..., :R] * cos + rotate_half(x[..., :R], interleaved) * sin
    return torch.cat((y, x[..., R:]), -1) if x.shape[-1] > R else y


def eager(q, k, wq, wk, cos, sin, offset=0.0, interleaved=False, transpose=False):
    """As Hugging Face writes it; cos and sin [B or 1, S, R], or with the dimension of heads."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    normed = (eager_norm(x, w, offset) for x, w in ((q, wq), (k, wk)))
    return tuple(turn(x.transpose(1, 2) if transpose else x, cos, sin, interleaved) for x in normed)


def ours(q, k, wq, wk, cos, sin, offset=0.0, interleaved=False, transpose=False):
    dtype = torch.promote_types(q.dtype, torch.promote_types(cos.dtype, q.dtype if offset else wq.dtype))
    return norm_rope(q, k, wq, wk, cos, sin, EPS, dtype, offset, interleaved, transpose)


def heads(shape, dtype, layout, seed):
    """[B, heads, S, D]; "model": the transpose of a [B, S, heads, D] projection; "packed": of a part of a packed one."""
    B, H, S, D = shape
    if layout == "model":
        return make((B, S, H, D), dtype, seed=seed).transpose(1, 2)
    if layout == "packed":
        return make((B, S, 3 * H * D), dtype, seed=seed)[..., H * D : 2 * H * D].view(B, S, H, D).transpose(1, 2)
    return make(shape, dtype, layout, seed)


def sample(dtype, B=2, H=4, G=2, S=5, D=8, R=8):
    """q, k as a model gives them, wq, wk, cos, sin."""
    q, k = heads((B, H, S, D), dtype, "model", 1), heads((B, G, S, D), dtype, "model", 2)
    wq, wk = (make((D,), dtype, seed=seed) for seed in (3, 4))
    cos, sin = (make((1, S, R), dtype, seed=seed) for seed in (5, 6))
    return [q, k, wq, wk, cos, sin]


@st.composite
def problems(draw, dtypes):
    """Operands of any shape and layout, and what the operator is told. cos and sin are not of one angle, their halves differ."""
    side = st.integers(1, 5)
    B, H, G, S = draw(side), draw(side), draw(side), draw(side)
    R = 2 * draw(st.integers(1, 20))
    D = R + draw(st.sampled_from([0, 0, 1, 7, 16]))
    dtype, seed = draw(dtypes), 64 * draw(st.integers(0, 2**20))
    layouts = st.sampled_from(["model", "packed", *(name for name in LAYOUTS if name != "expanded")])
    other = st.sampled_from([dtype, torch.float32])
    weights = draw(other)
    wq, wk = make((D,), weights, seed=seed + 3), make((D,), weights, seed=seed + 4)
    table = make((draw(st.sampled_from([1, B])), S, 2 * R), draw(other), seed=seed + 2)
    q, k = heads((B, H, S, D), dtype, draw(layouts), seed), heads((B, G, S, D), dtype, draw(layouts), seed + 1)
    how = draw(st.sampled_from([0.0, 1.0])), draw(st.booleans()), draw(st.booleans())
    if how[2]:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return [q, k, wq, wk, table[..., :R], table[..., R:]], how


some_grads = st.lists(st.booleans(), min_size=4, max_size=4).filter(any)
some_douts = st.sampled_from([(True, True), (True, False), (False, True)])


def check(problem, grads, used):
    tensors, how = problem
    with torch.no_grad():
        outputs = eager(*tensors, *how)
    douts = [make(y.shape, y.dtype, seed=2**30 + i) if u else None for i, (y, u) in enumerate(zip(outputs, used, strict=True))]
    compare(
        lambda *t: ours(*t, *how), lambda *t: eager(*t, *how), tensors, [*grads, False, False], douts, slack=16, scale=1.0, few=64
    )


@cases
@given(problems(dtypes), some_grads, some_douts)
def test_operator(problem, grads, used):
    check(problem, grads, used)


@cases
@given(problems(st.sampled_from([torch.float32, torch.float16])), some_grads, some_douts)
def test_kernels(problem, grads, used):
    """As above, with the Triton kernels on every device (bf16 only on GPUs: the interpreter cannot round to it)."""
    with interpret():
        check(problem, grads, used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_large(dtype, offset):
    """A real table, many elements: luck averages out, so no slack."""
    q, k, wq, wk, _, _ = sample(dtype, H=8, S=64, D=64)
    angle = torch.arange(64.0)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    angle = torch.cat((angle, angle), -1)[None]
    cos, sin = (t.to(DEVICE, dtype) for t in (angle.cos(), angle.sin()))
    grads = [True] * 4 + [False] * 2
    slack = 1.0 if dtype == torch.float32 else 0.0  # in fp32 the order of a sum of 64 matters
    compare(lambda *t: ours(*t, offset), lambda *t: eager(*t, offset), [q, k, wq, wk, cos, sin], grads, slack=slack)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_many_heads(path, monkeypatch):
    """More heads than a program holds at a time, and more tokens than programs where weights want a gradient."""
    monkeypatch.setattr(rope_module, "CHANNELS", 64)
    monkeypatch.setattr(module, "WALKERS", 8)
    tensors = sample(torch.float32, B=1, H=11, G=5, S=7, D=24, R=16)
    for weights in (True, False):
        with interpret(path == "kernels"):
            check((tensors, (0.0, False, False)), (True, True, weights, weights), (True, True))


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_no_tokens(path):
    q, k, wq, wk, cos, sin = sample(torch.float32, S=0)
    wq.requires_grad_()
    with interpret(path == "kernels"):
        sum(y.sum() for y in ours(q.requires_grad_(), k, wq, wk, cos, sin)).backward()
    assert q.grad.shape == q.shape and not wq.grad.any()


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_no_epsilon(path):
    """Rows that a block of heads lacks are not divided by their length, which is 0."""
    q, k, wq, wk, cos, sin = sample(torch.float32, H=3)
    wq.requires_grad_()
    with interpret(path == "kernels"):
        y, _ = norm_rope(q, k, wq, wk, cos, sin, 0.0, torch.float32)
        (dw,) = torch.autograd.grad(y.sum(), wq)
    assert dw.isfinite().all()


@pytest.mark.parametrize("path", ["operator", "kernels"])
@pytest.mark.parametrize("R", [8, 6])
def test_layout(path, R):
    """Outputs lie in memory as eager's; gradients as the projection's output."""
    q, k, *others = sample(torch.float32, R=R)
    q, k = q.requires_grad_(), k.requires_grad_()
    with interpret(path == "kernels"):
        found = ours(q, k, *others)
        grads = torch.autograd.grad([y.sum() for y in found], (q, k))
    assert [y.stride() for y in found] == [y.stride() for y in eager(q, k, *others)]
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)


@pytest.mark.parametrize("path", ["operator", "kernels"])
@pytest.mark.parametrize("heads_at", [1, 2])
def test_tables_with_a_dimension_for_heads(path, heads_at):
    """[B or 1, 1, S, R] beside [B, heads, S, D], and [B or 1, S, 1, R] beside [B, S, heads, D]."""
    q, k, wq, wk, cos, sin = sample(torch.float32)
    cos, sin = cos.unsqueeze(heads_at), sin.unsqueeze(heads_at)
    if heads_at == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    with interpret(path == "kernels"):
        compare(lambda *t: ours(*t, cos, sin), lambda *t: eager(*t, cos, sin), [q, k, wq, wk], slack=16)


def test_offsets_beyond_32_bits():
    """Batches 2³¹ elements apart; untouched memory is never committed."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 2, 4, 8), (2**31, 8, 16, 1))
    values, k, *others = sample(torch.float16, H=2, S=4)
    far.copy_(values)
    found = []
    with interpret():
        for x in (far, values):
            y, _ = ours(x.requires_grad_(), k, *others)
            found.append((y, *torch.autograd.grad(y.sum(), x)))
    assert all(map(torch.equal, *found))


# ---------------------------------------------------------------- only what is needed


def test_saves_its_operands():
    tensors = [t.requires_grad_() for t in sample(torch.float32)]
    with saved() as kept:
        ours(*tensors[:4], *(t.detach() for t in tensors[4:]))
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in tensors]


@cases
@given(some_grads, some_douts)
def test_nothing_in_vain(grads, used):
    tensors = sample(torch.float32)
    for t, g in zip(tensors, grads, strict=False):
        t.requires_grad_(g)
    outputs = [y for y, u in zip(ours(*tensors), used, strict=True) if u]
    wanted = [g and u for g, u in zip(grads, (*used, *used), strict=True)]
    with Recorder() as calls:
        sum(y.sum() for y in [*outputs, *(t.sum() for t in tensors)]).backward()
    assert [args[-1] for args in calls.named("norm_rope_backward")] == [wanted] * any(wanted)


def test_same_result_in_every_run():
    """The weights' gradients are summed in a fixed order."""
    tensors = [t.requires_grad_() for t in sample(torch.float32, S=33)[:4]] + sample(torch.float32, S=33)[4:]
    with interpret():
        runs = [torch.autograd.grad([y.sum() for y in ours(*tensors)], tensors[:4]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_differentiated_once():
    tensors = sample(torch.float64)
    q = tensors[0].requires_grad_()
    (dq,) = torch.autograd.grad(ours(*tensors)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dq.sum().backward()


def test_bad_arguments():
    q, k, wq, wk, cos, sin = sample(torch.float32)
    with pytest.raises(RuntimeError, match="wq is"):
        ours(q, k, wq[:6], wk, cos, sin)
    with pytest.raises(RuntimeError, match="not \\[D\\]"):
        ours(q, k, wq, wk.expand(2, 8), cos, sin)
    with pytest.raises(RuntimeError, match="must be even"):
        ours(q, k, wq, wk, cos[..., :5], sin[..., :5])
    with pytest.raises(RuntimeError, match="positions"):
        ours(q[:, :, :2], k, wq, wk, cos, sin)


# ---------------------------------------------------------------- derivation, registration, compilation


def test_closed_form():
    """The backward formulas in the module's docstring are the derivative."""
    D = 4
    x, w, c, s, g = (sympy.Matrix(sympy.symbols(f"{name}:{D}", real=True)) for name in ("x", "w", "c", "s", "g"))
    eps = sympy.Symbol("eps", positive=True)
    M = sympy.diag(*c)
    for i in range(D // 2):
        M[i, i + D // 2], M[i + D // 2, i] = -s[i], s[i + D // 2]
    r = 1 / sympy.sqrt(x.dot(x) / D + eps)
    y = M * (x * r).multiply_elementwise(w)
    n, unit = M.T * g, x * r
    m = n.multiply_elementwise(w)
    claimed = (r * (m - unit * (m.dot(unit) / D)), n.multiply_elementwise(unit))
    at = {v: sympy.Rational(i * 7 % 11 + 1, 5) for i, v in enumerate([*x, *w, *c, *s, *g, eps])}
    for of, gradient in zip((x, w), claimed, strict=True):
        assert sympy.simplify((y.jacobian(of).T * g - gradient).subs(at)) == sympy.zeros(D, 1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("D", [4, 7])
def test_gradcheck(interleaved, D):
    *tensors, cos, sin = sample(torch.float64, H=2, G=1, S=3, D=D, R=4)
    tensors = [t.requires_grad_() for t in tensors]
    torch.autograd.gradcheck(lambda *t: ours(*t, cos, sin, 1.0, interleaved), tensors)


@pytest.mark.nightly
def test_opcheck():
    *tensors, cos, sin = sample(torch.bfloat16, R=6)
    tensors = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(norm_rope, (*tensors, cos, sin, EPS, torch.bfloat16))
    torch.library.opcheck(
        norm_rope, (*(t.transpose(1, 2) for t in tensors[:2]), *tensors[2:], cos, sin, EPS, torch.float32, 1.0, True, True)
    )
    torch.library.opcheck(torch.ops.sloth.norm_rope_forward, (*tensors, cos, sin, EPS, 0.0, False, torch.bfloat16))


def test_autocast_changes_nothing():
    tensors = sample(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = ours(*tensors)
    assert all(map(torch.equal, inside, ours(*tensors)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.nightly
def test_inductor(dynamic):
    def attention(x, w, wq, wk, cos, sin):
        B, S, _ = x.shape
        q, k = (x @ w).view(B, S, 6, 8).split([4, 2], 2)
        q, k = ours(q, k, wq, wk, cos, sin, 0.0, False, True)
        return q @ k.repeat_interleave(2, 1).transpose(2, 3)

    *_, wq, wk, _, _ = sample(torch.float32)
    w, wq, wk = (t.requires_grad_() for t in (make((8, 48), torch.float32), wq, wk))
    compiled = torch.compile(attention, dynamic=dynamic, fullgraph=True)
    for S in (5, 7) if dynamic else (5,):
        x = make((2, S, 8), torch.float32, seed=S).requires_grad_()
        cos, sin = make((1, S, 8), torch.float32, seed=1), make((1, S, 8), torch.float32, seed=2)
        got, want = compiled(x, w, wq, wk, cos, sin), attention(x, w, wq, wk, cos, sin)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(y.square().sum(), (x, w, wq, wk)) for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-2)
