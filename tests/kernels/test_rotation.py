"""sloth.kernels.rotation against eager code: any rank, pairing, sign and table."""

import pytest
import sympy
import torch
from common import DEVICE, LAYOUTS, cases, compare, dtypes, make
from hypothesis import given
from hypothesis import strategies as st
from recorder import interpret, saved

from sloth.kernels.rotation import CONTIGUOUS, LIKE, rotate, rotate_both

TURN, BACK = (-1, 1), (1, -1)


def paired(x, interleaved):
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)


def joined(pair, interleaved):
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def eager(x, *given):
    """As models write it, in the dtype that x and the tables promote to, cast to the last argument."""
    *tables, axis, start, interleaved, interleaves, first, second, _, dtype = given
    cos, sin, c2, s2 = (t if t is None else over_heads(t, x, axis) for t in tables)
    c2, s2 = cos if c2 is None else c2, sin if s2 is None else s2
    width = 2 * cos.shape[-1]
    a, b = paired(x[..., start : start + width], interleaved)
    y = joined((a * cos + first * (b * sin), b * c2 + second * (a * s2)), interleaves)
    if width < x.shape[-1]:
        y = torch.cat((x[..., :start], y, x[..., start + width :]), -1)
    return y.to(dtype)


def over_heads(table, x, axis):
    """[S, h] or [B or 1, S, h] as it is broadcast to x."""
    shape = [1] * x.dim()
    shape[axis], shape[-1] = table.shape[-2:]
    if table.dim() == 3 and axis > 0:
        shape[0] = table.shape[0]
    return table.view(shape)


def both(q, k, *given):
    return eager(q, *given), eager(k, *given)


@st.composite
def problems(draw, dtypes):
    """x, another x of other heads, and all other arguments."""
    side = st.integers(1, 4)
    B, H, S, h = draw(side), draw(side), draw(side), draw(st.integers(1, 12))
    start, behind = draw(st.sampled_from([(0, 0), (0, 0), (0, 3), (5, 0), (2, 4)]))
    D = start + 2 * h + behind
    rows, axis = draw(
        st.sampled_from([((B, S, H), 1), ((B, H, S), 2), ((S, B, H), 0), ((B, S), 1), ((S, H), 0), ((S,), 0), ((B, S, H, 2), 1),
                         ((B, H, 2, S), 3), ((S, B, H, 2), 0)])
    )  # fmt: skip
    dtype, seed = draw(dtypes), draw(st.integers(0, 2**20))
    layouts = st.sampled_from([name for name in LAYOUTS if name != "expanded"])
    of_table = draw(st.sampled_from([dtype, torch.float32]))
    batch = draw(st.sampled_from([(), (1,), (B,)])) if axis else draw(st.sampled_from([(), (1,)]))
    table = make((*batch, S, h, 4), of_table, draw(layouts), seed + 2)
    tables = [table[..., i] for i in range(4)]
    if draw(st.booleans()):
        tables[2:] = [None, None]
    pairing, signs = (draw(st.booleans()), draw(st.booleans())), draw(st.sampled_from([TURN, BACK, (1, 1)]))
    given = [*tables, axis, start, *pairing, *signs, draw(st.integers(0, 1)), torch.promote_types(dtype, of_table)]
    if draw(st.booleans()):
        given[-1] = dtype
    other = [n + (n == H and d not in (0, axis)) for d, n in enumerate(rows)]
    return make((*rows, D), dtype, draw(layouts), seed), make((*other, D), dtype, draw(layouts), seed + 1), given


some = st.sampled_from([(True, True), (True, False), (False, True)])


def check(problem, grads, used):
    x, other, given = problem
    douts = [torch.randn(t.shape, device=DEVICE).to(given[-1]) for t in (x, other)]
    compare(lambda t: rotate(t, *given), lambda t: eager(t, *given), [x], [True], douts[:1], strides=False)
    compare(
        lambda *t: rotate_both(*t, *given), lambda *t: both(*t, *given), [x, other], list(grads),
        [d if u else None for d, u in zip(douts, used, strict=True)], strides=False,
    )  # fmt: skip


@cases
@given(problems(dtypes), some, some)
def test_operator(problem, grads, used):
    check(problem, grads, used)


@cases
@given(problems(st.sampled_from([torch.float32, torch.float16])), some, some)
def test_kernels(problem, grads, used):
    """As above, with the Triton kernels on every device (bf16 only on GPUs: the interpreter cannot round to it)."""
    with interpret():
        check(problem, grads, used)


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_many_heads(path, monkeypatch):
    """More heads than a program holds at a time."""
    monkeypatch.setattr("sloth.kernels.rope.CHANNELS", 64)
    q, k = make((1, 3, 11, 24), torch.float32), make((1, 3, 5, 24), torch.float32, seed=1)
    given = [make((3, 8), torch.float32, seed=seed) for seed in (2, 3)] + [None, None, 1, 4, True, False, *TURN, 0, torch.float32]
    with interpret(path == "kernels"):
        check((q, k, given), (True, True), (True, True))


@pytest.mark.parametrize("path", ["operator", "kernels"])
def test_layout(path):
    """Results lie in memory as x or contiguous; gradients as the projection's output."""
    x = make((2, 5, 4, 8), torch.float32).transpose(1, 2).requires_grad_()
    table = make((5, 4), torch.float32)
    with interpret(path == "kernels"):
        like, contiguous = (
            rotate(x, table, table, None, None, 2, 0, False, False, *TURN, layout) for layout in (LIKE, CONTIGUOUS)
        )
        dx = torch.autograd.grad(like.sum() + contiguous.sum(), x)[0]
    assert like.stride() == x.stride() and contiguous.is_contiguous()
    assert dx.transpose(1, 2).is_contiguous()


def test_offsets_beyond_32_bits():
    """Batches 2³¹ elements apart; untouched memory is never committed."""
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 4, 2, 8), (2**31, 16, 8, 1))
    values, table = make((2, 4, 2, 8), torch.float16), make((4, 4), torch.float16, seed=1)
    x.copy_(values)
    with interpret():
        assert torch.equal(rotate(x, table, table), rotate(values, table, table))


def test_saves_the_tables():
    x, cos, sin = make((1, 5, 2, 8), torch.float32).requires_grad_(), *(make((5, 4), torch.float32, seed=s) for s in (1, 2))
    with saved() as kept:
        rotate(x, cos, sin)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (cos, sin)]


def test_the_transpose_is_the_backward_formula():
    """The module's backward formula is the transposed Jacobian of its forward, and that the forward with arguments exchanged."""
    c1, c2, s1, s2, a, b, da, db, f, g = sympy.symbols("c1 c2 s1 s2 a b da db f g", real=True)
    forward = lambda c1, s1, c2, s2, f, g, a, b: sympy.Matrix([c1 * a + f * s1 * b, c2 * b + g * s2 * a])  # noqa: E731
    y = forward(c1, s1, c2, s2, f, g, a, b)
    transposed = y.jacobian([a, b]).T * sympy.Matrix([da, db])
    assert sympy.simplify(transposed - forward(c1, s2, c2, s1, g, f, da, db)) == sympy.zeros(2, 1)


@pytest.mark.nightly
def test_opcheck():
    q, k = (make((2, 3, n, 8), torch.bfloat16, seed=n).requires_grad_() for n in (4, 2))
    tables = [make((3, 3), torch.float32, seed=seed) for seed in range(4)]
    torch.library.opcheck(rotate, (q, *tables[:2], None, None, 1, 2))
    torch.library.opcheck(rotate_both, (q, k.detach(), *tables, 1, 0, True, False, *BACK, 1, torch.float32))


def test_gradcheck():
    q, k = (make((2, 3, n, 7), torch.float64, seed=n).requires_grad_() for n in (2, 1))
    tables = [make((2, 3, 3), torch.float64, seed=5 + i) for i in range(4)]
    torch.autograd.gradcheck(lambda q, k: rotate_both(q, k, *tables, 1, 1, True, False), (q, k), fast_mode=True)


def test_bad_arguments():
    x, table = make((1, 3, 2, 8), torch.float32), make((3, 4), torch.float32)
    with pytest.raises(RuntimeError, match="differ in shape"):
        rotate(x, table, table[:, :3])
    with pytest.raises(RuntimeError, match="channels"):
        rotate(x, table, table, start=1)
    with pytest.raises(RuntimeError, match="positions"):
        rotate(x, table, table, axis=2)


def test_autocast_changes_nothing():
    x, table = make((1, 3, 2, 8), torch.float32), make((3, 4), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = rotate(x, table, table)
    assert torch.equal(inside, rotate(x, table, table))


@pytest.mark.nightly
def test_inductor():
    """With symbolic sizes, in one graph."""

    def f(x, w, cos, sin):
        q, k = (x @ w).view(*x.shape[:2], 6, 8).split([4, 2], 2)
        q, k = rotate_both(q, k, cos, sin)
        return q.sum(2) * rotate(k, cos, sin, interleaved=True).sum(2)

    w = make((8, 48), torch.float32).requires_grad_()
    compiled = torch.compile(f, dynamic=True, fullgraph=True)
    for S in (5, 7):
        x, *tables = make((2, S, 8), torch.float32, seed=S), *(make((S, 4), torch.float32, seed=s) for s in (1, 2))
        got, want = (g(x, w, *tables) for g in (compiled, f))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), w) for y in (got, want)), rtol=1e-3, atol=1e-2)
