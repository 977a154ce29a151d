"""sloth.kernels.linear.linear_4bit_rows against bitsandbytes' weights, multiplied as PEFT's layers do."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from common import assert_no_worse, cases, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels.linear import linear_4bit_rows as module
from sloth.kernels.linear.linear_4bit_rows import linear_4bit_rows

bnb = pytest.importorskip("bitsandbytes.functional")


def copy(state, dtype):
    """A state of bitsandbytes, of a weight of another dtype."""
    found = deepcopy(state)
    found.dtype = dtype
    return found


class Layer:
    """A weight in 4 bits, and what PEFT puts beside it."""

    def __init__(
        self, n, k, dtype, *, rank=0, bias=False, adapter=torch.float32, double=True, quant_type="nf4", blocksize=64, seed=0
    ):
        w = make((n, k), dtype, seed=seed, scale=k**-0.5)
        packed, state = bnb.quantize_4bit(w, blocksize=blocksize, compress_statistics=double, quant_type=quant_type)
        self.dense = bnb.dequantize_4bit(packed, state)
        self.exact = bnb.dequantize_4bit(packed, copy(state, torch.float32))  # which eager rounds to x's dtype
        scales = (state.absmax, None, None, None)
        if state.nested:
            scales = (state.state2.absmax, state.absmax, state.state2.code, state.offset)
        self.weight = packed, *scales, n
        self.bias = make((n,), dtype, seed=seed + 1) if bias else None
        self.a = make((rank, k), adapter, seed=seed + 2, scale=k**-0.5) if rank else None
        self.b = make((n, rank), adapter, seed=seed + 3, scale=0.5) if rank else None
        self.format = blocksize, quant_type

    def eager(self, x, scale, wide=None):
        """In x's dtypes, or all of it in a wider one."""
        of = lambda t: t if t is None or wide is None else t.to(wide)  # noqa: E731
        y = F.linear(of(x), self.dense if wide is None else self.exact.to(wide), of(self.bias))
        if self.a is None:
            return y
        return y + (F.linear(F.linear(of(x).to(of(self.a).dtype), of(self.a)), of(self.b)) * scale).to(y.dtype)


def lists(layers):
    """As the operator takes them: each a list of one element a layer."""
    columns = [list(c) for c in zip(*(layer.weight for layer in layers), strict=True)]
    return columns[:5], [layer.bias for layer in layers], [layer.a for layer in layers], [layer.b for layer in layers], columns[5]


def kernel(x, layers, scale):
    weights, (_, bias, a, b, _) = [layer.weight for layer in layers], lists(layers)
    return module._triton(x.reshape(-1, x.shape[-1]), weights, bias, a, b, scale, *layers[0].format, x.dtype)


def operator(x, layers, scale):
    tensors, bias, a, b, rows = lists(layers)
    return linear_4bit_rows(x, *tensors, bias, a, b, scale, rows, *layers[0].format)


def judged(found, x, layers, scale):
    for y, layer, s in zip(found, layers, scale, strict=True):
        eager, exact = layer.eager(x, s), layer.eager(x, s, torch.float64)
        assert_no_worse(y.view(eager.shape), eager, exact, few=1000)


each_path = pytest.mark.parametrize("path", [kernel, operator])


@each_path
@cases
@given(
    st.integers(1, 16), st.integers(1, 70), st.integers(1, 10), st.sampled_from([0, 3, 16]), st.booleans(), st.booleans(),
    st.sampled_from(["nf4", "fp4"]), st.sampled_from([64, 128]), st.sampled_from([torch.bfloat16, torch.float16]), seeds,
)  # fmt: skip
def test_as_layers_of_peft(path, m, n, blocks, rank, bias, double, quant_type, blocksize, dtype, seed):
    """Rows of W and of x that fill no program, blocks that fill no step."""
    layer = Layer(
        n, blocks * blocksize, dtype, rank=rank, bias=bias, double=double, quant_type=quant_type, blocksize=blocksize, seed=seed
    )
    x = make((m, blocks * blocksize), dtype, seed=seed + 9)
    judged(path(x, [layer], [0.5]), x, [layer], [0.5])


@each_path
@pytest.mark.parametrize("m", [1, 2, 5])
def test_three_at_once(path, m):
    """q, k and v: one with a bias, one without an adapter, ranks and scales of their own; several programs each."""
    layers = [
        Layer(72, 1088, torch.bfloat16, rank=16, bias=True, seed=1),
        Layer(40, 1088, torch.bfloat16, rank=4, adapter=torch.bfloat16, seed=11),
        Layer(33, 1088, torch.bfloat16, seed=21),
    ]
    x, scale = make((m, 1088), torch.bfloat16, seed=5), [2.0, 0.25, 1.0]
    judged(path(x, layers, scale), x, layers, scale)


@pytest.mark.parametrize("m", [1, 3, 16])
def test_parts_of_adapters_products(m, monkeypatch):
    """More programs share a row of t than are read at a time, and the last has fewer columns."""
    monkeypatch.setattr(module, "T_TILE", 2 * 128 * (1 if m == 1 else 16))
    module._constants.cache_clear()
    layer, x = Layer(24, 2496, torch.bfloat16, rank=100, seed=3), make((m, 2496), torch.bfloat16, seed=5)
    constants = module._constants(m, 2496, (100,), (False,), 64, True, "nf4", 24, torch.bfloat16, False)
    assert module._splits(2496) == (5, 512) and constants["SP"] == 2
    judged(kernel(x, [layer], [0.5]), x, [layer], [0.5])
    module._constants.cache_clear()


def test_adapters_of_a_large_rank(monkeypatch):
    """A program would hold a row of B for each row of x: the weights are dequantised."""
    layer, x = Layer(24, 128, torch.bfloat16, rank=module.MOST_RANK + 1), make((3, 128), torch.bfloat16)
    monkeypatch.setattr(module, "_rows_for", lambda x: pytest.fail("by the kernels"))
    judged(operator(x, [layer], [1.0]), x, [layer], [1.0])


def test_operands_that_begin_anywhere():
    """Eight bytes are read at once."""
    layer, x = Layer(24, 128, torch.bfloat16), make((1, 129), torch.bfloat16)[:, 1:]
    packed, *rest = layer.weight
    moved = torch.cat([packed.new_zeros(1), packed.flatten()])[1:]
    (found,) = module._in_launches(x, [(moved, *rest)], [None], [None], [None], [1.0], *layer.format, x.dtype)
    judged([found], x, [layer], [1.0])


def test_what_the_kernels_do_not_take():
    """No rows and seventeen, fp32, lengths that end within a block, layers of two kinds: dequantised, or launched in turn."""
    for m, k, dtype in ((0, 128, torch.bfloat16), (17, 128, torch.bfloat16), (2, 128, torch.float32), (1, 96, torch.bfloat16)):
        layer, x = Layer(24, k, dtype, rank=4), make((m, k), dtype)
        judged(operator(x, [layer], [1.0]), x, [layer], [1.0])
    layers = [Layer(8, 64, torch.bfloat16, double=i != 1, seed=i) for i in range(4)]
    assert module._launches([layer.weight for layer in layers]) == [slice(0, 1), slice(1, 2), slice(2, 4)]
    x = make((2, 3, 64), torch.bfloat16)
    found = operator(x, layers, [1.0] * 4)
    assert found[0].shape == (2, 3, 8)
    judged(found, x, layers, [1.0] * 4)


def test_bad_operands_are_refused():
    layer, x = Layer(8, 64, torch.bfloat16, rank=4), make((2, 64), torch.bfloat16)
    tensors, bias, a, b, rows = lists([layer])
    with pytest.raises(RuntimeError, match="do not hold 9 rows"):
        linear_4bit_rows(x, *tensors, bias, a, b, [1.0], [9], 64, "nf4")
    with pytest.raises(ValueError, match="nf4, fp4"):
        linear_4bit_rows(x, *tensors, bias, a, b, [1.0], rows, 64, "int4")
    with pytest.raises(RuntimeError, match="every list"):
        linear_4bit_rows(x, *tensors, bias, a, b, [], rows, 64, "nf4")
    with pytest.raises(RuntimeError, match="no derivative"):
        linear_4bit_rows(x.requires_grad_(), *tensors, bias, a, b, [1.0], rows, 64, "nf4")


def test_operator_is_well_formed():
    layer, x = Layer(8, 64, torch.bfloat16, rank=4), make((2, 64), torch.bfloat16)
    tensors, bias, a, b, rows = lists([layer])
    torch.library.opcheck(linear_4bit_rows, (x, *tensors, bias, a, b, [1.0], rows, 64, "nf4"))
