"""sloth.kernels.linear.dequantize_4bit against bitsandbytes, bit by bit."""

import pytest
import torch
from common import DEVICE, cases, dtypes, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels.linear import dequantize_4bit as module
from sloth.kernels.linear.dequantize_4bit import CODES, dequantize_4bit

bnb = pytest.importorskip("bitsandbytes.functional")


def operator(packed, *scales_and_format):
    """As the rewriter calls it, of a weight as one long row (`theirs` says why)."""
    *given, shape, dtype = scales_and_format
    return dequantize_4bit(packed, *given, [1, shape[0] * shape[1]], dtype).view(shape)


PATHS = {"operator": operator, "kernel": module._triton}
each_path = pytest.mark.parametrize("path", PATHS)
quant_types, blocksizes = st.sampled_from(sorted(CODES)), st.sampled_from([64, 128, 256])
sizes = st.tuples(st.integers(1, 90), st.integers(1, 90)).filter(lambda s: s[0] * s[1] % 2 == 0)
"""Mostly with bytes that fill neither the last block nor the last program."""


def quantized(w, quant_type="nf4", blocksize=64, double=True, storage=torch.uint8):
    return bnb.quantize_4bit(w, blocksize=blocksize, compress_statistics=double, quant_type=quant_type, quant_storage=storage)


def arguments(packed, state, dtype):
    """The operator's arguments for what bitsandbytes has quantised."""
    scales = (state.absmax, None, None, None)
    if state.nested:
        scales = (state.state2.absmax, state.absmax, state.state2.code, state.offset)
    return packed, *scales, state.blocksize, state.quant_type, list(state.shape), dtype


def theirs(packed, state, dtype):
    """The weight as one long row: bitsandbytes' kernel for AVX-512 CPUs takes the scale of another block where rows are shorter
    than a block or end within one (0.50: [3, 96] in blocks of 64).
    """
    state.dtype, shape = dtype, state.shape
    state.shape = torch.Size((1, shape.numel()))
    try:
        return bnb.dequantize_4bit(packed, state).view(shape)
    finally:
        state.shape = shape


def same(function, packed, state, dtype):
    """Equal in shape, dtype and every bit (a zero's sign aside); returns what it gives."""
    found, expected = function(*arguments(packed, state, dtype)), theirs(packed, state, dtype)
    assert found.dtype == expected.dtype == dtype and found.shape == expected.shape and found.is_contiguous()
    assert torch.equal(found, expected), f"{(found != expected).sum()} of {found.numel()} elements differ"
    return found


# ---------------------------------------------------------------- bit by bit


@each_path
@cases
@given(sizes, dtypes, dtypes, quant_types, blocksizes, st.booleans(), seeds)
def test_as_bitsandbytes(path, shape, dtype, source, quant_type, blocksize, double, seed):
    same(PATHS[path], *quantized(make(shape, source, seed=seed), quant_type, blocksize, double), dtype)


@each_path
@pytest.mark.parametrize("blocksize", [32, 512, 1024, 2048, 4096])
def test_other_blocks(path, blocksize):
    """All that bitsandbytes allows, a block of which may be more than a program's bytes."""
    same(PATHS[path], *quantized(make((91, 92), torch.float32), blocksize=blocksize), torch.bfloat16)


@each_path
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_blocks(path, dtype, quant_type, double):
    """Several programs, and several groups of 256 scales, the last of each not full."""
    w = make((301, 174), torch.float32, scale=0.02)
    found = same(PATHS[path], *quantized(w, quant_type, 64, double), dtype)
    assert (found.float() - w).norm() < 0.3 * w.norm(), "it is the weight"


@each_path
@pytest.mark.parametrize("quant_type", CODES)
def test_every_code_and_every_scale(path, quant_type):
    """All 256 bytes, with each of the 256 values that a scale in 8 bits can have."""
    w = make((256, 512), torch.float32)
    packed, state = quantized(w, quant_type, 512)
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(256).view(packed.shape)
    state.absmax = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        assert same(PATHS[path], packed, state, dtype).unique().numel() > 256


@each_path
@pytest.mark.parametrize("double", [False, True])
def test_extremes(path, double):
    """Blocks of zeros, and of what is large and small in one weight."""
    w = make((8, 64), torch.float32)
    w[0], w[1], w[2, 3] = 0.0, w[1] * 1e-30, 3e4
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        same(PATHS[path], *quantized(w, double=double), dtype)


@each_path
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
def test_other_storage(path, storage, double):
    """FSDP wants all parameters in one dtype: the same bytes under another name."""
    w = make((24, 40), torch.float32)
    packed, state = quantized(w, double=double, storage=storage)
    assert packed.dtype == storage
    plain, _ = quantized(w, double=double)
    assert torch.equal(packed.view(torch.uint8).view(-1), plain.view(-1))
    found = PATHS[path](*arguments(packed, state, torch.bfloat16))
    assert torch.equal(found, PATHS[path](*arguments(plain, state, torch.bfloat16)))
    assert torch.equal(found, theirs(plain, state, torch.bfloat16))


@each_path
def test_packed_as_a_row(path):
    """Layers hold [N·K/2, 1]; what is packed may also come as [1, N·K/2] or flat."""
    packed, state = quantized(make((6, 50), torch.float32))
    want = theirs(packed, state, torch.bfloat16)
    for shape in ((1, -1), (-1,), (-1, 1)):
        assert torch.equal(PATHS[path](*arguments(packed.reshape(shape), state, torch.bfloat16)), want)


def test_tables():
    """The 16 values are those of bitsandbytes, to the last bit."""
    for name, values in CODES.items():
        table = bnb.get_4bit_type(name, device="cpu")
        ours = torch.tensor(values, dtype=torch.float32)
        assert torch.equal(ours, table), (name, ours - table)


@pytest.mark.parametrize("shape", [(33, 46), (3, 128), (24, 256), (7, 64), (6, 35)])
def test_cpu_path_is_what_layers_get(shape):
    """In the shape of the weight: on the CPU the tensor that bitsandbytes' layers multiply with; the kernel gives the same."""
    packed, state = quantized(make(shape, torch.float32))
    given, state.dtype = arguments(packed, state, torch.bfloat16), torch.bfloat16
    want = bnb.dequantize_4bit(packed, state)
    assert torch.equal(dequantize_4bit(*given), want)
    assert torch.equal(module._bitsandbytes(*given), want) and torch.equal(module._triton(*given), want)


# ---------------------------------------------------------------- errors, registration


def test_wrong_quant_type():
    packed, state = quantized(make((4, 32), torch.float32))
    given = list(arguments(packed, state, torch.bfloat16))
    given[6] = "int4"
    with pytest.raises(ValueError, match="quant_type must be one of nf4, fp4, got 'int4'"):
        dequantize_4bit(*given)


@pytest.mark.parametrize("shape", [[4, 34], [5, 32], [4, 31], [2, 32]])
def test_wrong_size(shape):
    packed, state = quantized(make((4, 32), torch.float32))
    given = list(arguments(packed, state, torch.bfloat16))
    given[7] = shape
    with pytest.raises(RuntimeError, match="64 bytes do not hold"):
        dequantize_4bit(*given)


def test_wrong_size_of_other_storage():
    """Bytes are counted, not elements."""
    packed, state = quantized(make((4, 32), torch.float32), storage=torch.bfloat16)
    assert packed.numel() == 32
    given = list(arguments(packed, state, torch.bfloat16))
    given[7] = [2, 32]
    with pytest.raises(RuntimeError, match="64 bytes do not hold"):
        dequantize_4bit(*given)


@pytest.mark.parametrize("double", [False, True])
def test_opcheck(double):
    given = arguments(*quantized(make((6, 64), torch.float32), double=double), torch.bfloat16)
    torch.library.opcheck(dequantize_4bit, given)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.covered(1)
def test_inductor(double, dtype):
    packed, state = quantized(make((6, 64), torch.float32), double=double)
    given = arguments(packed, state, dtype)
    compiled = torch.compile(lambda p: dequantize_4bit(p, *given[1:]) * 2, fullgraph=True)
    assert torch.equal(compiled(packed), theirs(packed, state, dtype) * 2)


def test_it_has_no_gradient():
    """Scales are no parameters: what asks for their gradient must be told."""
    packed, state = quantized(make((4, 32), torch.float32), double=False)
    given = list(arguments(packed, state, torch.float32))
    given[1] = given[1].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative"):
        dequantize_4bit(*given).sum().backward()


# ---------------------------------------------------------------- several in one launch


@pytest.mark.parametrize("path", ["operator", "kernel"])
@given(st.lists(sizes, min_size=2, max_size=3), quant_types, st.booleans(), dtypes, seeds)
@cases
def test_together(path, several, quant_type, double, dtype, seed):
    """As one after the other, bit by bit."""
    if path == "kernel" and dtype == torch.float64:
        return
    calls = []
    for i, size in enumerate(several):
        packed, state = quantized(make(size, torch.float32, seed=seed + i), quant_type, double=double)
        *given, _, _ = arguments(packed, state, dtype)
        calls.append((*given, [1, size[0] * size[1]], dtype))
    expected = [dequantize_4bit(*call) for call in calls]
    many = module.together(calls)
    found = module.dequantize_4bit_together(*many) if path == "operator" else module._triton_together(*many)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_does_not_go_together():
    packed, state = quantized(make((4, 32), torch.float32, seed=0))
    w = make((4, 32), torch.float32, seed=1)
    plain, other = quantized(w, double=False), quantized(w, "fp4")
    first = arguments(packed, state, torch.bfloat16)
    for second in (arguments(*plain, torch.bfloat16), arguments(*other, torch.bfloat16), arguments(packed, state, torch.float16)):
        assert module.together([first, second]) is None
    assert module.together([first, first]) is not None
