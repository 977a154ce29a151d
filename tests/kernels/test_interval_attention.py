"""sloth.kernels.attention.attention with masks that are intervals, and the kernels of interval_attention.py, against eager."""

import pytest
import sympy
import torch
import torch.nn.functional as F
from common import DEVICE, cases, compare, make
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, interpret
from torch.nn.attention import SDPBackend, sdpa_kernel

from sloth.kernels.attention import attention as module
from sloth.kernels.attention import interval_attention as kernels
from sloth.kernels.attention.attention import attention, intervals
from sloth.kernels.attention.interval_attention import Tile
from sloth.kernels.common.device import Device, pretending

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter cannot round to bf16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many of them in a short sequence, of another size for queries than for keys."""
    for name in ("FORWARD", "BACKWARD_Q"):
        monkeypatch.setattr(kernels, name, dict.fromkeys((64, 128, 256), (Tile(32, 16, 4, 1),)))
    monkeypatch.setattr(kernels, "BACKWARD_KV", dict.fromkeys((64, 128, 256), (Tile(16, 32, 4, 1),)))
    monkeypatch.setattr(kernels, "SMALL", Tile(16, 16, 4, 1))


def mask_of(S, documents=(), valid=(), ahead=None, behind=None):
    """[B or 1, 1, S, S], as a model writes it."""
    i = torch.arange(S, device=DEVICE)
    mask = torch.ones(1, 1, S, S, dtype=torch.bool, device=DEVICE)
    for ids in documents:
        mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])
    for v in valid:
        mask = mask & v[:, None, None, :]
    if ahead is not None:
        mask = mask & (i[None, :] <= i[:, None] + ahead)
    return mask if behind is None else mask & (i[None, :] >= i[:, None] - behind)


def eager(how, scale):
    """As models write it: torch's fused kernels take a mask, but not with fewer heads of keys."""

    def function(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        given = q, k, v, mask_of(q.shape[2], *how)
        try:
            return F.scaled_dot_product_attention(*given, scale=scale)
        except RuntimeError:  # on a GPU torch picks a kernel that it then has not, where heads have a single channel
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(*given, scale=scale)

    return function


def ours(how, scale):
    documents, valid, ahead, behind = how
    return lambda q, k, v: attention(q, k, v, list(documents), list(valid), ahead, behind, 0.0, scale)


def check(q, k, v, how, scale=0.3, grads=(True, True, True), **bounds):
    with interpret():
        compare(ours(how, scale), eager(how, scale), [q, k, v], grads, strides=False, **bounds)


def ids(B, S, seed, density=0.1):
    """[B, S], runs of random lengths."""
    return (torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < density).cumsum(-1).to(DEVICE)


def padding(B, S, kind, seed=0):
    """[B, S] of which each row has another number of valid keys."""
    length = torch.randint(1, S + 1, (B, 1), generator=torch.Generator().manual_seed(seed))
    at = torch.arange(S)
    holes = torch.rand(B, S, generator=torch.Generator().manual_seed(seed + 1)) > 0.3
    return {"right": at < length, "left": at >= S - length, "holes": holes, "nothing": at < 0 * length, "all": at >= 0 * length}[
        kind
    ].to(DEVICE)


PADDINGS = ("right", "left", "holes", "nothing", "all")


@st.composite
def masks(draw, B, S):
    some = st.one_of(st.none(), st.integers(0, S))
    documents = [ids(draw(st.sampled_from([1, B])), S, draw(st.integers(0, 99))) for _ in range(draw(st.integers(0, 2)))]
    valid = [
        padding(draw(st.sampled_from([1, B])), S, draw(st.sampled_from(PADDINGS)), draw(st.integers(0, 99)))
        for _ in range(draw(st.integers(0, 2)))
    ]
    return documents, valid, draw(st.one_of(st.just(0), some, st.integers(-3, 3))), draw(some)


@cases
@given(st.data())
def test_any_mask(data):
    B, G, per_group, S = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 50))
    D, dtype, seed = 8 * data.draw(st.integers(1, 5)), data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 999))
    layout = data.draw(st.sampled_from(["contiguous", "permuted", "padded", "strided"]))
    q = make((B, G * per_group, S, D), dtype, layout, seed)
    k, v = (make((B, G, S, D), dtype, layout, seed + n) for n in (1000, 2000))
    terms = float(q.numel()) ** 0.5  # gradients of scores cancel where a query sees one key
    with interpret():
        how = data.draw(masks(B, S))
        compare(ours(how, 0.3), eager(how, 0.3), [q, k, v], strides=False, few=10**6, scale=terms)


L = 100  # positions: the interpreter is slow
HOW = {
    "window": ([], [], 0, 20),
    "both sides": ([], [], 9, 9),
    "strict": ([], [], -1, None),
    "documents": ([ids(2, L, 0, 0.04)], [], 0, None),
    "bidirectional documents": ([ids(2, L, 0, 0.04)], [], None, None),
    "chunks": ([torch.arange(L, device=DEVICE)[None] // 40], [], 0, None),
    **{f"{kind} padding": ([], [padding(2, L, kind)], 0, None) for kind in PADDINGS},
    "all of these": ([ids(2, L, 0, 0.03), ids(1, L, 1, 0.02)], [padding(2, L, "holes"), padding(1, L, "left")], 0, 60),
}


ROUNDED = HOW if DEVICE == "cuda" else ("window", "holes padding", "all of these")  # the interpreter is slow


@pytest.mark.parametrize(("name", "dtype"), [(n, t) for n in HOW for t in DTYPES if t == torch.float32 or n in ROUNDED])
def test_masks(name, dtype):
    """Many tiles, whole and partial ones, odd sizes."""
    q, (k, v) = make((2, 2, L, 24), dtype), (make((2, 1, L, 24), dtype, seed=n) for n in (1, 2))
    check(q, k, v, HOW[name], slack=1.0)


@pytest.mark.parametrize("D", [8, 64, 80, 136, 256])
def test_widths(D):
    q, k, v = (make((1, 4, 70, D), torch.float16, seed=n) for n in range(3))
    check(q, k, v, ([], [], 0, 30), D**-0.5)


@pytest.mark.parametrize("table", ["FORWARD", "BACKWARD_Q", "BACKWARD_KV"])
def test_the_tiles_in_use(table, monkeypatch):
    """Larger than the sequence, and than each other."""
    monkeypatch.undo()
    q, (k, v) = make((1, 2, 300, 64), torch.float16), (make((1, 1, 300, 64), torch.float16, seed=n) for n in (1, 2))
    for name in {"FORWARD", "BACKWARD_Q", "BACKWARD_KV"} - {table}:
        monkeypatch.setattr(kernels, name, {64: (Tile(64, 64, 4, 1),)})
    check(q, k, v, ([ids(1, 300, 3, 0.01)], [padding(1, 300, "holes")], 0, 200), 0.125)


@pytest.mark.parametrize(
    "kib, width, masked, index",
    [
        (227, 256, False, 0), (163, 256, False, 1), (99, 256, False, 2), (99, 128, False, 1), (99, 64, False, 0),
        (64, 256, False, None), (227, 256, True, 0), (163, 256, True, 2), (124, 128, False, 0), (124, 128, True, 1),
    ],
)  # fmt: skip
def test_tiles_by_shared_memory(kib, width, masked, index, monkeypatch):
    """H100, A100, RTX 4090 and T4; a mask takes some."""
    monkeypatch.undo()
    x = torch.empty(1, 1, 1, width, dtype=torch.float16)
    with pretending(Device(shared_memory=kib * 1024)):
        tile = kernels.tile_of(kernels.FORWARD, x, masked=masked)
    assert tile == (kernels.SMALL if index is None else kernels.FORWARD[width][index])


@cases
@given(st.data())
def test_intervals(data):
    """Both descriptions of who sees what say what the mask says."""
    B, S = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    documents, valid, ahead, behind = data.draw(masks(B, S))
    at = torch.arange(S, dtype=torch.int32, device=DEVICE)[None]
    usable = torch.stack([v.expand(B, S) for v in valid]).all(0) if valid else None
    lo, hi, first, last = intervals(documents, usable, ahead, behind, at)
    assert all(t.dtype == torch.int32 for t in (lo, hi, first, last))
    mask = mask_of(S, documents, valid, ahead, behind)[:, 0]
    of_queries = module.Bounds(lo, hi, first, last, usable).mask(at)[:, 0]
    of_keys = (first[:, None] <= at[..., None]) & (at[..., None] <= last[:, None])
    for found in (of_queries, of_keys):
        assert torch.equal(*torch.broadcast_tensors(found, mask))
    if usable is not None:  # no tile of padding is looked at
        none = lo > hi
        assert (none == ~mask.any(-1).expand_as(none)).all()
        assert usable.expand_as(lo).gather(-1, lo.clamp(max=S - 1).long())[~none].all()
        between = (lo[..., None] <= at) & (at <= hi[..., None])
        assert torch.equal(module.holed(lo, hi, usable), (between & ~usable[:, None]).any(-1))


def test_who_sees_nothing():
    """0 and no gradient, as torch's own attention."""
    q, k, v = (make((1, 2, 40, 8), torch.float32, seed=n).requires_grad_() for n in range(3))
    how = [], [padding(1, 40, "left", 5)], 0, None
    blind = ~mask_of(40, *how).any(-1)[0, 0]
    assert blind.any() and not blind.all()
    with interpret():
        out = ours(how, 0.3)(q, k, v)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not out[:, :, blind].any() and out[:, :, ~blind].any()
    assert not grads[0][:, :, blind].any() and not any(g.isnan().any() for g in grads)
    assert not eager(how, 0.3)(q, k, v)[:, :, blind].any()


@pytest.mark.parametrize("grads", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)])
def test_nothing_in_vain(grads):
    q, k, v = (make((1, 2, 20, 8), torch.float32, seed=n).requires_grad_(g) for n, g in enumerate(grads))
    with interpret():
        out = ours(([], [], 0, 5), 0.3)(q, k, v)
        with Recorder() as calls:
            out.sum().backward()
    assert len(calls.named("interval_attention_dq")) == grads[0]
    assert len(calls.named("interval_attention_dkv")) == (grads[1] or grads[2])


def test_layout():
    """Outputs and gradients as the projections around want them."""
    q, k, v = (make((2, 20, 4, 8), torch.float32, seed=n).transpose(1, 2).requires_grad_() for n in range(3))
    with interpret():
        out = ours(([], [], 0, 5), 0.3)(q, k, v)
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


def test_large_scores():
    """No overflow: the greatest score of a row is taken off before the power."""
    q, k, v = (make((1, 1, 40, 16), torch.float16, seed=n, scale=30.0 if n < 2 else 1.0).requires_grad_() for n in range(3))
    how = ([], [], 0, 20), 1.0
    with interpret():
        out = ours(*how)(q, k, v)
    torch.testing.assert_close(out, eager(*how)(q, k, v), rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_causal_and_full_are_torch_s():
    q, k, v = (make((1, 2, 20, 8), torch.float32, seed=n) for n in range(3))
    with interpret(), Recorder() as calls:
        for ahead in (0, None):
            out = ours(([], [], ahead, None), 0.3)(q, k, v)
            assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=ahead == 0, scale=0.3))
    assert not calls.named("interval_attention")


def test_autocast():
    q, k, v = (make((1, 2, 20, 8), torch.float32, seed=n).requires_grad_() for n in range(3))
    with interpret(), torch.autocast(DEVICE, torch.float16):
        out = ours(([], [], 0, 5), 0.3)(q, k, v)
    assert out.dtype == torch.float16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_differentiated_once():
    q = make((1, 1, 8, 8), torch.float32).requires_grad_()
    with interpret():
        (dq,) = torch.autograd.grad(ours(([], [], 0, 2), 0.3)(q, q, q).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError):
            dq.sum().backward()


def test_opcheck():
    q, k, v = (make((1, 2, 8, 4), torch.float32, seed=n).requires_grad_() for n in range(3))
    bounds = [b.contiguous() for b in intervals([], None, 0, 3, torch.arange(8, dtype=torch.int32, device=DEVICE)[None])]
    tests = ["test_schema", "test_autograd_registration"]  # the interpreter takes no fake tensors
    tests += ["test_faketensor", "test_aot_dispatch_dynamic"] * (DEVICE == "cuda")
    torch.library.opcheck(
        kernels.interval_attention, (q, k, v, *bounds, None, None, None, 0.3, None, None, None, None), test_utils=tests
    )


def test_formula():
    """The closed form of the docstring is the symbolic derivative: three keys, of which a query sees two."""
    q, k, v, g = (sympy.Matrix(2, 2 if n in "qg" else 3, sympy.symbols(f"{n}:{4 if n in 'qg' else 6}")) for n in "qkvg")
    scale, visible = sympy.Symbol("scale"), [[0, 1], [1, 2]]
    loss, p = 0, {}
    for i, keys in enumerate(visible):
        weights = {j: sympy.exp(scale * q[:, i].dot(k[:, j])) for j in keys}
        p |= {(i, j): w / sum(weights.values()) for j, w in weights.items()}
        loss += sum((p[i, j] * g[:, i].dot(v[:, j]) for j in keys), 0)
    numbers = {s: sympy.Rational(n + 2, 7 + 3 * n) for n, s in enumerate(sorted(loss.free_symbols, key=str))}

    def value(e):
        return e.subs(numbers).evalf(30)

    def ds(i, j):
        delta = g[:, i].dot(sum((p[i, m] * v[:, m] for m in visible[i]), sympy.zeros(2, 1)))
        return p[i, j] * (g[:, i].dot(v[:, j]) - delta)

    for c in range(2):
        for i in range(2):
            dq = scale * sum(ds(i, j) * k[c, j] for j in visible[i])
            assert abs(value(loss.diff(q[c, i])) - value(dq)) < 1e-25
        for j in range(3):
            rows = [i for i in range(2) if j in visible[i]]
            assert abs(value(loss.diff(k[c, j])) - value(scale * sum(ds(i, j) * q[c, i] for i in rows))) < 1e-25
            assert abs(value(loss.diff(v[c, j])) - value(sum(p[i, j] * g[c, i] for i in rows))) < 1e-25
