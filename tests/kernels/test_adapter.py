"""sloth.kernels.linear.adapter against LoRA and DoRA as PEFT computes them on top of a layer."""

import pytest
import sympy
import torch
import torch.nn.functional as F
from common import DEVICE, DTYPES, cases, compare, dtypes, evaluate, make, shapes, tensors
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, saved

from sloth.kernels.linear.adapter import adapter

NAMES = ("base", "inner", "m", "lora_input", "a", "b")
forward = torch.ops.sloth.adapter_forward.default


def operator(scale, dtype=None):
    return lambda *tensors: adapter(*tensors, scale, dtype)


def peft(scale, dtype=None):
    """What PEFT's layers do. DoRA as in `peft.tuners.lora.dora`: (m − 1) · layer(x) + m · lora(x) · scale."""

    def function(base, inner, m, lora_input, a, b):
        given = base.dtype if dtype is None or base.dtype == torch.float64 else dtype
        change = F.linear(F.linear(lora_input.to(a.dtype), a), b)
        if m is None:
            return (base + change * scale).to(given)
        return (base + ((m - 1) * inner + m * change * scale)).to(given)

    return function


def inputs(shape, dtype, n, r, *, adapters=None, dora=False, seed=0, lora_input=None):
    """The six tensors for a layer of n channels over x of this shape."""
    seeds = range(64 * seed + 8, 64 * seed + 16)
    adapters, k = adapters or dtype, shape[-1]
    out = (*shape[:-1], n)
    return [
        make(out, dtype, seed=seeds[0]),
        make(out, dtype, seed=seeds[1]) if dora else None,
        make((1, n), adapters, seed=seeds[2], mean=1.0, scale=0.1) if dora else None,
        make(shape, dtype, seed=seeds[3]) if lora_input is None else lora_input,
        make((r, k), adapters, seed=seeds[4], scale=k**-0.5),
        make((n, r), adapters, seed=seeds[5], scale=0.5),
    ]


scales = st.sampled_from([1.0, 0.5, 2.0, 1.37])
small = {"few": 256, "scale": 4.0}  # few rows: dA and dm sum a handful of products, much of which may cancel


@cases
@given(
    st.data(),
    shapes(st.integers(3, 40), (1, 3)),
    dtypes,
    st.integers(3, 40),
    st.integers(1, 4),
    scales,
    st.booleans(),
    st.booleans(),
)
def test_operator(data, shape, dtype, n, r, scale, dora, fp32):
    given = inputs(shape, dtype, n, r, adapters=torch.float32 if fp32 else None, dora=dora)
    layouts = ("contiguous", "permuted", "padded")  # of what the model computes
    for i in (1, 3):
        if given[i] is not None:
            given[i] = data.draw(tensors(given[i].shape, dtype, layouts, salt=i))
    grads = [t is not None and data.draw(st.booleans()) for t in given]
    compare(operator(scale), peft(scale), given, grads, **small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("dora", [False, True])
def test_large(dtype, adapters, dora):
    """Many elements: luck averages out."""
    compare(operator(1.5), peft(1.5), inputs((2, 96, 80), dtype, 192, 8, adapters=adapters, dora=dora))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_in_another_dtype(dtype):
    """fp32 adapters over a bf16 layer: PEFT rounds the sum, autocast leaves it in fp32."""
    given = inputs((3, 5, 24), torch.bfloat16, 16, 4, adapters=torch.float32)
    compare(operator(2.0, dtype), peft(2.0, dtype), given, few=512)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("lead", [(1,), (1, 1), (0,), (2, 0)])
def test_one_row_and_none(lead, dora):
    compare(operator(2.0), peft(2.0), inputs((*lead, 24), torch.float32, 16, 4, dora=dora), few=512)


def test_inner_that_is_base():
    """A layer without bias: inner is base, which gets both gradients."""
    _, _, m, *rest = inputs((3, 24), torch.float32, 16, 4, dora=True)
    base = make((3, 16), torch.float32)
    op, eager = operator(2.0), peft(2.0)
    compare(lambda y, *more: op(y, y, *more), lambda y, *more: eager(y, y, *more), [base, m, *rest])


# ---------------------------------------------------------------- only what is needed


@pytest.mark.parametrize("wanted", NAMES)
def test_nothing_in_vain(wanted):
    given = dict(zip(NAMES, inputs((3, 24), torch.float32, 16, 4, dora=True), strict=True))
    given[wanted].requires_grad_()
    with Recorder() as calls:
        adapter(*given.values(), 2.0).sum().backward()
    if wanted == "base":
        assert not calls.named("adapter_backward"), "its gradient is that of the result"
    else:
        ((*_, need_inner, need_m, need_lora_input, need_a, need_b),) = calls.named("adapter_backward")
        found = {"inner": need_inner, "m": need_m, "lora_input": need_lora_input, "a": need_a, "b": need_b}
        assert found == {name: name == wanted for name in found}
    assert {name for name, t in given.items() if t.grad is not None} == {wanted}


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_saved(dora):
    """The inputs and t [M, r]: neither the adapter's output [M, N] nor base."""
    given = [t if t is None else t.requires_grad_() for t in inputs((6, 24), torch.float32, 16, 4, dora=dora)]
    with saved() as kept:
        operator(2.0)(*given)
    own = {t.data_ptr(): name for name, t in zip(NAMES, given, strict=True) if t is not None}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(6, 4)]
    assert "base" not in {own.get(t.data_ptr()) for t in kept}


def test_deterministic():
    given = inputs((64, 96), torch.bfloat16, 80, 8, dora=True)
    dout = [make((64, 80), torch.bfloat16, seed=1)]
    first, second = (evaluate(operator(2.0), given, [True] * 6, dout) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


def test_differentiated_once():
    given = [t if t is None else t.requires_grad_() for t in inputs((2, 8), torch.float64, 6, 2)]
    (dx,) = torch.autograd.grad(operator(2.0)(*given).square().sum(), given[3], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.sum().backward()


def test_bad_arguments():
    base, inner, m, *rest = inputs((2, 8), torch.float32, 6, 2, dora=True)
    with pytest.raises(RuntimeError, match="inner and m go together"):
        adapter(base, inner, None, *rest, 1.0)
    with pytest.raises(RuntimeError, match="inner and m go together"):
        adapter(base, None, m, *rest, 1.0)
    with pytest.raises(RuntimeError, match=r"A is torch.float32, B torch.bfloat16"):
        adapter(base, None, None, *rest[:2], rest[2].bfloat16(), 1.0)


def test_autocast_changes_nothing():
    given = inputs((4, 24), torch.float32, 16, 4, dora=True)
    want = adapter(*given, 2.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = adapter(*given, 2.0)
    assert found.dtype == torch.float32 and torch.equal(found, want)


# ---------------------------------------------------------------- derivation, registration, compilation


def symbols(name, rows, columns):
    return sympy.Matrix(rows, columns, lambda i, j: sympy.Symbol(f"{name}_{i}{j}"))


@pytest.mark.parametrize("dora", [False, True])
def test_closed_form(dora):
    """The formulas in the module's docstring are the derivatives of L = Σ g ⊙ y."""
    rows, k, n, r = 2, 3, 2, 2
    sizes = ((rows, n), (rows, n), (1, n), (rows, k), (r, k), (n, r), (rows, n))
    base, inner, m, x, a, b, g = (symbols(s, *size) for s, size in zip(("h", "i", "m", "x", "a", "b", "g"), sizes, strict=True))
    s, each = sympy.Symbol("s"), sympy.Matrix.multiply_elementwise
    t = x * a.T
    low, ones = t * b.T, sympy.ones(rows, 1)
    wide = ones * m if dora else sympy.ones(rows, n)  # m in every row
    y = base + s * each(wide, low) + (each(wide - sympy.ones(rows, n), inner) if dora else sympy.zeros(rows, n))
    loss = sum(each(g, y))

    dl = s * each(wide, g)
    dt = dl * b
    claimed = [(base, g), (b, dl.T * t), (a, dt.T * x), (x, dt * a)]
    if dora:
        claimed += [(inner, each(wide - sympy.ones(rows, n), g)), (m, ones.T * each(g, inner + s * low))]
    for matrix, formula in claimed:
        found = matrix.applyfunc(lambda v: sympy.diff(loss, v))
        assert (found - formula).expand() == sympy.zeros(*matrix.shape)


@pytest.mark.parametrize("dora", [False, True])
def test_gradcheck(dora):
    given = inputs((2, 2, 5), torch.float64, 4, 2, dora=dora)
    leaves = [t.requires_grad_() for t in given if t is not None]

    def function(*leaves):
        left = iter(leaves)
        return operator(2.0)(*(None if t is None else next(left) for t in given))

    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.covered(1)
def test_opcheck(dora, adapters):
    given = inputs((2, 3, 12), torch.bfloat16, 8, 4, adapters=adapters, dora=dora)
    given = [t if t is None else t.requires_grad_() for t in given]
    torch.library.opcheck(adapter, (*given, 2.0))
    torch.library.opcheck(forward, (*given, 2.0, torch.bfloat16))


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    def model(*tensors):
        return (operator(2.0)(*tensors) * 3).square().mean()

    compiled = torch.compile(model, dynamic=dynamic, fullgraph=True)
    for rows in (5, 7) if dynamic else (5,):
        given = [t.requires_grad_() for t in inputs((2, rows, 24), torch.float32, 16, 4, dora=True, seed=rows)]
        got, want = compiled(*given), model(*given)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y, given) for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
