"""sloth.kernels.linear.lora against linear layers with adapters as PEFT computes them."""

from collections import defaultdict

import pytest
import sympy
import torch
import torch.nn.functional as F
from common import DEVICE, DTYPES, assert_no_worse, cases, compare, dtypes, evaluate, make, seeds, tensors
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, saved
from torch._dynamo.backends.common import aot_autograd

from sloth.kernels.common.device import H100, pretending
from sloth.kernels.linear import gemm
from sloth.kernels.linear.gemm import in_memory, sum_of_products
from sloth.kernels.linear.gemm_columns import products_in_columns
from sloth.kernels.linear.gemm_rows import product_in_rows
from sloth.kernels.linear.lora import lora_linear
from sloth.kernels.linear.lora_grad_b import lora_grad_b

PARTS = 5  # weight, bias, lora_input, a, b of each layer
forward = torch.ops.sloth.lora_linear_forward.default


def operator(scale, dtype=None):
    """The operator as a function of x and then of each layer's five tensors."""

    def function(x, *flat):
        return tuple(lora_linear(x, *(list(flat[i::PARTS]) for i in range(PARTS)), scale, dtype))

    return function


def peft(scale, dtype=None):
    """What PEFT's layers do one after the other."""

    def function(x, *flat):
        out = []
        for i, s in enumerate(scale):
            weight, bias, lora_input, a, b = flat[PARTS * i : PARTS * (i + 1)]
            y = F.linear(x, weight, bias)
            given = y.dtype if dtype is None or x.dtype == torch.float64 else dtype
            if a is not None:
                y = y + F.linear(F.linear((x if lora_input is None else lora_input).to(a.dtype), a), b) * s
            out.append(y.to(given))
        return tuple(out)

    return function


def layer(x, n, r, seed, *, bias=False, own=None, adapter=None):
    """The tensors of one layer over x: `own` is the dtype of the adapter's own input, `adapter` that of A and B; None: absent."""
    k, drawn = x.shape[-1], range(PARTS * seed + 64, PARTS * seed + 64 + PARTS)
    return [
        make((n, k), x.dtype, seed=drawn[0], scale=k**-0.5),
        make((n,), x.dtype, seed=drawn[1]) if bias else None,
        make(x.shape, own, seed=drawn[2]) if own and adapter else None,
        make((r, k), adapter, seed=drawn[3], scale=k**-0.5) if adapter else None,
        make((n, r), adapter, seed=drawn[4], scale=0.5) if adapter else None,
    ]


def trained(flat):
    """Which of a layer's tensors want a gradient: all but the weight."""
    return [t is not None and i % PARTS != 0 for i, t in enumerate(flat)]


# ---------------------------------------------------------------- against eager

small = {"few": 256, "scale": 4.0}  # few rows: dA sums a handful of products, much of which may cancel
scales = st.sampled_from([1.0, 0.5, 2.0, 1.37])
leading = st.lists(st.integers(1, 5), max_size=3)


@st.composite
def layers(draw, x, count=(1, 3)):
    """Layers over x, each with or without bias, adapter, and an input of the adapter's own."""
    flat, scale, dtype = [], [], draw(st.sampled_from([x.dtype, torch.float32]))
    for i in range(draw(st.integers(*count))):
        adapter = dtype if draw(st.booleans()) else None
        own = draw(st.sampled_from([None, x.dtype, dtype]))
        flat += layer(x, draw(st.integers(3, 40)), draw(st.integers(1, 4)), i, bias=draw(st.booleans()), own=own, adapter=adapter)
        scale.append(draw(scales))
    return flat, scale


@cases
@given(st.data(), leading, st.integers(3, 40), dtypes)
def test_operator(data, lead, k, dtype):
    x = data.draw(tensors((*lead, k), dtype))
    flat, scale = data.draw(layers(x))
    compare(operator(scale), peft(scale), [x, *flat], [True, *trained(flat)], **small)


@cases
@given(st.data(), leading, st.integers(3, 40), dtypes, st.randoms(use_true_random=False))
def test_some_gradients(data, lead, k, dtype, random):
    """Any inputs frozen: x, some of A and B, biases."""
    x = data.draw(tensors((*lead, k), dtype))
    flat, scale = data.draw(layers(x))
    compare(operator(scale), peft(scale), [x, *flat], [g and random.random() < 0.5 for g in (True, *trained(flat))], **small)


@cases
@given(st.data(), st.integers(3, 40), dtypes)
def test_other_layouts_of_the_factors(data, k, dtype):
    """Weights, A and B that are views: transposed, cut from wider ones, not aligned."""
    x = data.draw(tensors((4, 3, k), dtype))
    flat, scale = data.draw(layers(x))
    layouts = ("padded", "offset", "strided")
    flat = [
        data.draw(tensors(t.shape, t.dtype, layouts, salt=1 + i, scale=0.3)) if t is not None else None
        for i, t in enumerate(flat)
    ]
    compare(operator(scale), peft(scale), [x, *flat], [True, *trained(flat)], **small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", ["same", "fp32", "bf16"])
@pytest.mark.parametrize("own", [False, True])
def test_large(dtype, adapter, own):
    """Many elements: luck averages out. Two layers that share x, as k and v do."""
    x = make((2, 96, 160), dtype)
    kind = {"same": dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[adapter]
    parts = [layer(x, n, 8, i, bias=i == 0, own=kind if own else None, adapter=kind) for i, n in enumerate((192, 64))]
    flat = [t for part in parts for t in part]
    compare(operator([2.0, 0.5]), peft([2.0, 0.5]), [x, *flat], [True, *trained(flat)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_result_in_another_dtype(dtype, adapter):
    """fp32 hidden states into a layer that computes in bf16, and autocast's bf16 results."""
    x = make((3, 5, 24), torch.bfloat16)
    flat = layer(x, 16, 4, 0, bias=True, own=torch.float32, adapter=adapter)
    compare(operator([2.0], dtype), peft([2.0], dtype), [x, *flat], [True, *trained(flat)], few=512)


@pytest.mark.parametrize("layers", [pytest.param(1, marks=pytest.mark.skipif(DEVICE != "cpu", reason="a sum of two")), 3])
def test_of_what_autocast_casts(layers):
    """fp32 hidden states that base and adapter of each layer cast by themselves: eager adds their gradients up in fp32."""
    x = make((2, 96, 96), torch.float32)
    narrow = x.detach().to(torch.bfloat16)
    flat = [t for i in range(layers) for t in layer(narrow, 64, 8, i, adapter=torch.bfloat16)]
    scale = [2.0] * layers

    def eager(x, *flat):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.bfloat16
        read = [None if t is None else x.to(dtype) if i % PARTS == 2 else t for i, t in enumerate(flat)]
        parts = [read[PARTS * i : PARTS * (i + 1)] for i in range(layers)]
        return tuple(y for part, s in zip(parts, scale, strict=True) for y in peft([s])(x.to(dtype), *part))

    compare(lambda x, *flat: operator(scale)(x.to(torch.bfloat16), *flat), eager, [x, *flat], [True, *trained(flat)], slack=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_one_row(lead, dtype):
    x = make((*lead, 24), dtype)
    flat = [*layer(x, 16, 4, 0, adapter=dtype), *layer(x, 8, 2, 1, bias=True, adapter=dtype)]
    compare(operator([2.0, 1.0]), peft([2.0, 1.0]), [x, *flat], [True, *trained(flat)], few=512)


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_no_rows(lead, adapter):
    """As in eager: no results, gradients of zeros."""
    x = make((*lead, 24), torch.bfloat16)
    flat = [*layer(x, 16, 4, 0, bias=True, adapter=adapter), *layer(x, 8, 2, 1, own=adapter, adapter=adapter)]
    _, gradients = compare(operator([2.0, 1.0]), peft([2.0, 1.0]), [x, *flat], [True, *trained(flat)])
    assert all(not g.any() for g in gradients if g is not None)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_used(used):
    """The other layer's gradients are none or zeros, and x gets only its own."""
    x = make((4, 24), torch.float32)
    flat = [*layer(x, 16, 4, 0, adapter=torch.float32), *layer(x, 8, 2, 1, adapter=torch.float32)]
    douts = [make((4, n), torch.float32, seed=7) if i == used else None for i, n in enumerate((16, 8))]
    grads = [True, *trained(flat)]
    _, ours = evaluate(operator([2.0, 1.0]), [x, *flat], grads, douts)
    _, eager = evaluate(peft([2.0, 1.0]), [x, *flat], grads, douts)
    for mine, theirs in zip(ours, eager, strict=True):
        if theirs is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- only what is needed


def test_the_weight_gets_no_gradient():
    x = make((4, 24), torch.float32).requires_grad_()
    flat = layer(x, 16, 4, 0, bias=True, adapter=torch.float32)
    for t in (flat[0], flat[3]):
        t.requires_grad_()
    operator([2.0])(x, *flat)[0].sum().backward()
    assert flat[0].grad is None and x.grad is not None and flat[3].grad is not None


@pytest.mark.parametrize("wanted", ["x", "a", "b", "lora_input", "bias"])
def test_nothing_in_vain(wanted):
    """The backward pass is told of what is wanted, and gives as many tensors."""
    x = make((4, 24), torch.float32)
    own = torch.float32 if wanted == "lora_input" else None
    weight, bias, lora_input, a, b = layer(x, 16, 4, 0, bias=True, own=own, adapter=torch.float32)
    {"x": x, "a": a, "b": b, "lora_input": lora_input, "bias": bias}[wanted].requires_grad_()
    with Recorder() as calls:
        lora_linear(x, [weight], [bias], [lora_input], [a], [b], [2.0])[0].sum().backward()
    ((*_, need_x, need_lora_input, need_a, need_b),) = calls.named("lora_linear_backward")
    found = {"x": need_x, "lora_input": any(need_lora_input), "a": any(need_a), "b": any(need_b)}
    assert found == {name: name == wanted for name in found}


def test_what_is_saved():
    """The inputs and t [M, r]: nothing of M × N or N × K is made for the backward pass."""
    x = make((6, 24), torch.float32).requires_grad_()
    parts = [layer(x, n, r, i, bias=True, adapter=torch.float32) for i, (n, r) in enumerate(((16, 4), (8, 2)))]
    flat = [t for part in parts for t in part]
    for t, want in zip(flat, trained(flat), strict=True):
        if want:
            t.requires_grad_()
    with saved() as kept:
        operator([2.0, 1.0])(x, *flat)
    given = {t.data_ptr() for t in (x, *flat) if t is not None}
    assert sorted(tuple(t.shape) for t in kept if t.data_ptr() not in given) == [(6, 6)]


def test_adapters_that_share_x_are_one_product():
    """x [M, K] is read once for all of them, forward and backward."""
    x = make((6, 24), torch.float32).requires_grad_()
    parts = [layer(x, 16, 4, i, adapter=torch.float32) for i in range(3)]
    flat = [t.requires_grad_() if want else t for part in parts for t, want in zip(part, trained(part), strict=True)]
    before, after = products_of(lambda *t: sum(y.sum() for y in operator([1.0] * 3)(*t)), x, *flat)
    assert before[torch.ops.aten.mm.default] == [((6, 24), (24, 12))], "x [A₁; A₂; A₃]ᵀ"
    assert after[product_in_rows] == [((12, 6), (6, 24))] and not after[torch.ops.aten.mm.default], "[u₁ u₂ u₃]ᵀ x"


def products_of(function, *inputs):
    """Of the forward and the backward graph, by operator: the shapes of its first two factors."""
    seen = []

    def look(gm, _):
        seen.append(defaultdict(list))
        for target in (torch.ops.aten.mm.default, product_in_rows):
            for n in gm.graph.find_nodes(op="call_function", target=target):
                seen[-1][target].append(tuple(tuple(a.meta["val"].shape) for a in n.args[:2]))
        return make_boxed_func(gm.forward)

    torch.compile(function, backend=aot_autograd(fw_compiler=look))(*inputs).backward()
    return seen


class OnGpu:
    """Compiled as for a GPU, with tensors of a CPU: what runs then is the operators' formulas."""

    def __init__(self, function):
        self.graphs = []
        self.compiled = torch.compile(function, backend=aot_autograd(fw_compiler=self.keep))

    def keep(self, gm, _):
        self.graphs.append([n.target for n in gm.graph.nodes])
        return make_boxed_func(gm.forward)

    def __call__(self, *inputs):
        if not self.graphs:
            with pretending(H100):
                self.compiled(*(t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs))
        return self.compiled(*inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_layers_are_one_product_on_a_gpu(dtype):
    """Results are its columns, which can be written in place; gradients are those of layers by themselves."""
    x = make((3, 7, 24), dtype)
    flat = [t for i, (n, r) in enumerate(((32, 4), (16, 2), (16, 4))) for t in layer(x, n, r, i, adapter=dtype)]
    ours = OnGpu(lambda *t: tuple(y * 2 if i else y.mul_(2.0) for i, y in enumerate(operator([0.5] * 3)(*t))))
    compare(
        ours, lambda *t: tuple(y * 2 for y in peft([0.5] * 3)(*t)), [x, *flat], [True, *trained(flat)], few=512, scale=4.0
    )  # fmt: skip
    assert ours.graphs[0].count(products_in_columns) == 1 and sum_of_products not in ours.graphs[0]


@pytest.mark.parametrize("why", ["wide", "bias", "own", "scales", "ranks", "fp32 adapters", "no adapter"])
def test_layers_that_are_no_one_product(why):
    x = make((5, 24), torch.bfloat16)
    widths, r = ((48, 48) if why == "wide" else (16, 8)), 40 if why == "ranks" else 4
    adapter = torch.float32 if why == "fp32 adapters" else torch.bfloat16
    flat = [
        *layer(x, widths[0], r, 0, bias=why == "bias", own=torch.bfloat16 if why == "own" else None, adapter=adapter),
        *layer(x, widths[1], r, 1, adapter=None if why == "no adapter" else adapter),
    ]
    ours = OnGpu(operator([1.0, 2.0 if why == "scales" else 1.0]))
    ours(x, *flat)
    assert products_in_columns not in ours.graphs[0]


def test_deterministic():
    x = make((64, 96), torch.bfloat16)
    flat = [*layer(x, 80, 8, 0, bias=True, adapter=torch.bfloat16), *layer(x, 48, 8, 1, adapter=torch.bfloat16)]
    douts = [make((64, n), torch.bfloat16, seed=n) for n in (80, 48)]
    first, second = (evaluate(operator([2.0, 0.5]), [x, *flat], [True, *trained(flat)], douts) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_differentiated_once():
    x = make((2, 8), torch.float64).requires_grad_()
    flat = layer(x, 6, 2, 0, adapter=torch.float64)
    (dx,) = torch.autograd.grad(operator([2.0])(x, *flat)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.sum().backward()


# ---------------------------------------------------------------- arguments


def test_bad_arguments():
    x = make((4, 24), torch.float32)
    weight, _, _, a, b = layer(x, 16, 4, 0, adapter=torch.float32)

    def call(w=weight, down=a, up=b, s=(1.0,), **changed):
        return lora_linear(changed.get("x", x), [w], [None], [None], [down], [up], list(s))

    call()
    with pytest.raises(RuntimeError, match="an element for each layer"):
        call(s=(1.0, 2.0))
    with pytest.raises(RuntimeError, match="an element for each layer"):
        lora_linear(x, [], [], [], [], [], [])
    with pytest.raises(RuntimeError, match=r"x torch.float32 \[4, 24\], weight torch.float32 \[16, 20\]"):
        call(w=weight[:, :20])
    with pytest.raises(RuntimeError, match=r"weight torch.bfloat16"):
        call(w=weight.bfloat16())
    for down, up in ((a[:, :20], b), (a, b[:8]), (a[:2], b), (a.bfloat16(), b)):
        with pytest.raises(RuntimeError, match="A torch"):
            call(down=down, up=up)


def test_autocast_changes_nothing():
    x = make((4, 24), torch.float32)
    flat = layer(x, 16, 4, 0, bias=True, adapter=torch.float32)
    want = operator([2.0])(x, *flat)[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        (found,) = operator([2.0])(x, *flat)
    assert found.dtype == torch.float32 and torch.equal(found, want)


# ---------------------------------------------------------------- derivation, registration, compilation


def symbols(name, rows, columns):
    return sympy.Matrix(rows, columns, lambda i, j: sympy.Symbol(f"{name}_{i}{j}"))


def derivative(loss, matrix):
    return matrix.applyfunc(lambda v: sympy.diff(loss, v))


@pytest.mark.parametrize("own", [False, True])
def test_closed_form(own):
    """The formulas in the module's docstring are the derivatives of L = Σ g ⊙ y, for two layers over one x."""
    m, k, n, r = 2, 3, 2, 2
    x, loss, expected = symbols("x", m, k), 0, []
    dx = sympy.zeros(m, k)
    for i in "12":
        w, bias, a, b, g = (
            symbols(s + i, *size) for s, size in zip("wcabg", ((n, k), (1, n), (r, k), (n, r), (m, n)), strict=True)
        )
        s, lora_input = sympy.Symbol(f"s{i}"), symbols(f"z{i}", m, k) if own and i == "2" else x
        t = lora_input * a.T
        y = x * w.T + sympy.ones(m, 1) * bias + s * t * b.T
        loss += sum(g.multiply_elementwise(y))
        u = s * g * b
        dx += g * w + (u * a if lora_input is x else sympy.zeros(m, k))
        expected += [(b, s * g.T * t), (a, u.T * lora_input), (bias, sympy.ones(1, m) * g)]
        if lora_input is not x:
            expected.append((lora_input, u * a))
    for matrix, claimed in (*expected, (x, dx)):
        assert (derivative(loss, matrix) - claimed).expand() == sympy.zeros(*matrix.shape)


@pytest.mark.parametrize("own", [None, torch.float64])
def test_gradcheck(own):
    x = make((2, 2, 5), torch.float64).requires_grad_()
    flat = [*layer(x, 4, 2, 0, bias=True, own=own, adapter=torch.float64), *layer(x, 3, 1, 1, adapter=torch.float64)]
    flat = [t.requires_grad_() if want else t for t, want in zip(flat, trained(flat), strict=True)]
    torch.autograd.gradcheck(operator([2.0, 0.5]), (x, *flat))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.covered(1)
def test_opcheck(adapter, own):
    x = make((2, 3, 12), torch.bfloat16).requires_grad_()
    first = layer(x, 8, 4, 0, bias=True, own=adapter if own else None, adapter=adapter)
    second = layer(x, 6, 2, 1)
    for t in first[1:]:
        if t is not None:
            t.requires_grad_()
    each = [list(pair) for pair in zip(first, second, strict=True)]
    torch.library.opcheck(lora_linear, (x, *each, [2.0, 1.0]))
    places = [int(t is not None) for part in each[1:4] for t in part]
    present = [[t for t in part if t is not None] for part in each]
    torch.library.opcheck(forward, (x, *present, [2.0, 1.0], places, torch.bfloat16, False))


def test_results_can_be_written_in_place():
    """As those of the layers can: they are no views of what the operator holds."""
    x = make((2, 5, 24), torch.float32).requires_grad_()
    flat = [*layer(x, 8, 4, 0, adapter=torch.float32), *layer(x, 6, 4, 1, adapter=torch.float32)]
    compare(
        lambda *t: tuple(y.mul_(2.0) for y in operator([1.0, 0.5])(*t)),
        lambda *t: tuple(y.mul_(2.0) for y in peft([1.0, 0.5])(*t)),
        [x, *flat], [True, *trained(flat)], **small,
    )  # fmt: skip


def test_matrices_that_lie_side_by_side():
    """Are one, but only where one buffer holds them."""
    held = torch.randn(10, 6)
    joined = in_memory([w.t() for w in held.split([4, 3, 3])], 1)
    assert joined.data_ptr() == held.data_ptr() and torch.equal(joined, held.t())
    assert torch.equal(in_memory(list(held.split([4, 3, 3])), 0), held)
    a, b, c = held.split([4, 3, 3])
    for apart in ([a, c], [b, a], [a, b.clone()], [a, b[:, :4]], [a, held[4:7].clone().resize_(3, 6)]):
        assert in_memory([w.t() for w in apart], 1) is None and in_memory(apart, 0) is None
    assert in_memory([a, b], 1) is None, "not transposed"
    other = torch.empty(0).set_(held.untyped_storage(), 0, (4, 6))
    behind = torch.frombuffer(bytearray(held[4:].numpy().tobytes()), dtype=torch.float32).view(6, 6)
    assert in_memory([other.t(), behind.t()], 1) is None


@cases
@given(st.integers(0, 5), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3), dtypes, st.booleans(), seeds)
def test_products_in_columns(m, k, widths, dtype, joined, seed):
    """α T U + X [W_0, W_1, …], W_i together or apart."""
    t, x = make((m, 4), dtype, seed=8 * seed), make((m, k), dtype, seed=8 * seed + 1)
    w, u = make((sum(widths), k), dtype, seed=8 * seed + 2), make((4, sum(widths)), dtype, seed=8 * seed + 3)
    parts = [p.t() if joined else p.clone().t() for p in w.split(widths)]
    found = products_in_columns(t, u, x, parts, 0.3)
    exact = 0.3 * (t.double() @ u.double()) + x.double() @ w.double().t()
    assert_no_worse(found, 0.3 * (t @ u) + x @ w.t(), exact, few=256, scale=1.0)


@cases
@given(st.integers(0, 5), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3), dtypes, st.booleans(), seeds)
def test_product_in_rows(k, n, rows, dtype, wide, seed):
    a, b = make((sum(rows), k), dtype, seed=2 * seed), make((k, n), dtype, seed=2 * seed + 1)
    for alpha in (1.0, 0.3):
        found = product_in_rows(a, b, rows, alpha, torch.float32 if wide else None)
        exact = alpha * (a.double() @ b.double())
        assert [len(y) for y in found] == rows and all(y.data_ptr() % 16 == 0 for y in found)
        y = torch.cat(found)
        assert_no_worse(y, (alpha * (a @ b)).to(y.dtype), exact, few=256, scale=1.0)


def test_opcheck_of_products():
    a, b = [make((4, 3), torch.float32), make((4, 6), torch.float32)], [make((3, 5), torch.float32), make((6, 5), torch.float32)]
    torch.library.opcheck(sum_of_products, (a, b, [2.0, 1.0]))
    torch.library.opcheck(sum_of_products, (a, b, [2.0, 1.0], make((5,), torch.float32)))
    w = [make((5, 6), torch.float32, seed=i).t() for i in range(2)]
    torch.library.opcheck(products_in_columns, (a[0], make((3, 10), torch.float32), a[1], w, 0.5))
    torch.library.opcheck(product_in_rows, (a[0], b[0], [3, 1], 0.5, torch.float32))
    with pytest.raises(RuntimeError, match="product_in_rows: A"):
        product_in_rows(a[0], b[0], [3, 2])
    with pytest.raises(RuntimeError, match="products_in_columns: U"):
        products_in_columns(a[0], b[0], a[1], w, 0.5)
    with pytest.raises(RuntimeError, match="as many factors on each side"):
        sum_of_products(a, b, [2.0])


def test_parts_have_no_derivative():
    """What asks for their gradient must be told; where none is asked for they are as good with parameters as without."""
    a, b = make((4, 3), torch.float32).requires_grad_(), make((3, 5), torch.float32)
    calls = lambda: sum_of_products([a], [b], [1.0]), lambda: lora_grad_b([b], [make((5, 2), b.dtype)], a[:3, :2], [1.0])
    for call in calls:
        with pytest.raises(RuntimeError, match="no derivative"):
            call()
        with torch.no_grad():
            call()


@cases
@given(st.integers(0, 5), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3), dtypes, st.booleans(), seeds)
def test_sums_of_products(m, n, inner, dtype, bias, seed):
    """bias + Σ α A B, no worse than the sum written out; what was in the buffer before does not matter (it may be nan)."""
    drawn = iter(range(64 * seed, 64 * seed + 64))
    pairs = [(make((m, k), dtype, seed=next(drawn)), make((n, k), dtype, "padded", seed=next(drawn)).t()) for k in inner]
    added, alpha = make((n,), dtype, seed=next(drawn)) if bias else None, [2.0, 1.0, 0.3][: len(inner)]

    def written_out(convert):
        total = sum(s * (convert(x) @ convert(y)) for (x, y), s in zip(pairs, alpha, strict=True))
        return total if added is None else total + convert(added)

    for wide in (None, torch.float32):
        found = sum_of_products([x for x, _ in pairs], [y for _, y in pairs], alpha, added, wide)
        assert found.dtype == (wide or dtype)
        eager = written_out(torch.Tensor.float if wide else lambda t: t)
        assert_no_worse(found, eager, written_out(torch.Tensor.double), few=256, scale=1.0)


@cases
@given(st.integers(0, 5), st.integers(4, 9), st.lists(st.integers(1, 7), min_size=2, max_size=3), dtypes, st.booleans(), seeds)
def test_sums_of_products_with_weights_in_one_buffer(m, n, rows, dtype, wide, seed):
    """A thin product and others, which are one where they are narrow. What is between them in memory is no part of them."""
    t, u = make((m, 2), dtype, seed=8 * seed), make((2, n), dtype, seed=8 * seed + 1)
    held = make((sum(rows) + 1, n), dtype, seed=8 * seed + 2)
    g = [make((m, k), dtype, seed=8 * seed + 3 + i) for i, k in enumerate(rows)]
    for gap in (0, 1):
        weights = [*held[: rows[0]].split(rows[:1]), *held[rows[0] + gap : sum(rows) + gap].split(rows[1:])]
        found = sum_of_products([t, *g], [u, *weights], [0.3] + [1.0] * len(g), None, torch.float32 if wide else None)
        of = lambda convert, w=weights: 0.3 * (convert(t) @ convert(u)) + sum(convert(x) @ convert(y) for x, y in zip(g, w))  # noqa: B905, E731
        assert_no_worse(found, of(torch.Tensor.float if wide else lambda x: x), of(torch.Tensor.double), few=256, scale=1.0)


@pytest.mark.parametrize("columns, products", [(4, 2), (3, 3)])
def test_narrow_layers_are_one_product(columns, products, monkeypatch):
    """With a copy of what is multiplied: not of wide ones."""
    made = []
    for name in ("product", "add_product"):
        of = getattr(gemm, name)
        monkeypatch.setattr(gemm, name, lambda *args, of=of: (made.append(of), of(*args)))
    w, g = list(torch.randn(12, columns).split([6, 6])), [torch.randn(5, 6)] * 2
    gemm.compute_sum_of_products([torch.randn(5, 2), *g], [torch.randn(2, columns), *w], [1.0, 1.0, 1.0])
    assert len(made) == products


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    def model(x, *flat):
        q, k = operator([2.0, 0.5])(x * 2, *flat)
        return (q * k).sum()

    compiled = torch.compile(model, dynamic=dynamic, fullgraph=True)
    for rows in (5, 7) if dynamic else (5,):
        x = make((2, rows, 24), torch.float32, seed=rows).requires_grad_()
        flat = [
            *layer(x, 8, 4, 0, bias=True, adapter=torch.float32),
            *layer(x, 8, 2, 1, own=torch.float32, adapter=torch.float32),
        ]
        flat = [t.requires_grad_() if want else t for t, want in zip(flat, trained(flat), strict=True)]
        wanted = [t for t in (x, *flat) if t is not None and t.requires_grad]
        got, want = compiled(x, *flat), model(x, *flat)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(y, wanted) for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
