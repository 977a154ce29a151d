"""Weights that bitsandbytes keeps in 4 bits, as a matrix:  W[i] = code[q_i] · s_⌊i/B⌋, elements counted along the rows.

packed   uint8 (or any storage dtype), two elements to a byte, the first one in the upper half; N·K/2 bytes.
code     the 16 values of NF4 (quantiles of a normal distribution, Dettmers et al., "QLoRA", 2023) or of FP4 (1 sign, 2 exponent,
         1 mantissa bit, scaled to [−1, 1]).
s        one scale for each block of B elements: `absmax` in fp32, or, double-quantised, computed from 8 bits as
         s_j = code8[absmax_8bit_j] · absmax_⌊j/256⌋ + offset,  each step rounded to fp32.
W        [N, K] in fp32, bf16 or fp16: the product is computed in fp32 and rounded once. Bit by bit what bitsandbytes gives.

Nothing is differentiable. One kernel does both steps: a program takes the bytes of a few blocks, computes their scales, looks the
elements up in a table of 16 kept in registers, and writes 16-bit pairs side by side.
It is compiled without contraction: a·b + c in one rounding would give other bits in one scale of sixteen.
Bytes    N·K/2 read and 2·N·K written: the floor is 2.5·N·K over the copy rate (and N·K/64·5 for scales).
On the CPU it is bitsandbytes' own operator.
To the compiler it is one opaque call, which costs it a tenth of what a Triton kernel does that it can see: a model has hundreds.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import launch_cached, no_derivative
from sloth.kernels.linear.gemm_rows import apart, rows_of

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = _FP4 + tuple(-v for v in _FP4)
CODES = {"nf4": NF4, "fp4": FP4}
NESTED_BLOCK = 256  # scales that share one absmax

# Bytes to a program, and how it is launched.
BYTES = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
MOST = 3  # matrices in one launch


@triton.jit
def _table(CODE: tl.constexpr):
    """The 16 values as a vector."""
    i = tl.arange(0, 16)
    values = tl.zeros([16], tl.float32)
    for k in tl.static_range(16):
        values = tl.where(i == k, CODE[k], values)
    return values


@triton.jit
def _dequantize_blocks(
    program, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, out_ptr, n_bytes,
    HALF: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of HALF bytes."""
    start = program.to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    left = (n_bytes - start * HALF).to(tl.int32)  # bytes from here on: offsets within a program fit 32 bits
    inside = block * HALF < left
    if NESTED:
        q = tl.load(absmax_8bit_ptr + start + block, inside, 0).to(tl.int32)
        outer = tl.load(absmax_ptr + (start + block) // NESTED_BLOCK, inside, 0.0)
        scale = tl.load(code8_ptr + q) * outer + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + start + block, inside, 0.0)
    at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.reshape(tl.load(packed_ptr + start * HALF + at, at < left, 0).to(tl.int32), [BLOCKS * HALF])
    table = _table(CODE)
    first = tl.reshape(tl.gather(table, pair >> 4, 0), [BLOCKS, HALF]) * scale[:, None]
    second = tl.reshape(tl.gather(table, pair & 15, 0), [BLOCKS, HALF]) * scale[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    values = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), [BLOCKS, 2 * HALF])
    to = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + start * (2 * HALF) + to, values, to < 2 * left)


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, out_ptr, n_bytes,
    HALF: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    _dequantize_blocks(
        tl.program_id(0), packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, out_ptr, n_bytes,
        HALF, BLOCKS, NESTED, NESTED_BLOCK, CODE,
    )  # fmt: skip


@triton.jit
def _dequantize_together_kernel(
    packed_0_ptr, absmax_0_ptr, absmax_8bit_0_ptr, code8_0_ptr, offset_0_ptr, out_0_ptr,
    packed_1_ptr, absmax_1_ptr, absmax_8bit_1_ptr, code8_1_ptr, offset_1_ptr, out_1_ptr,
    packed_2_ptr, absmax_2_ptr, absmax_8bit_2_ptr, code8_2_ptr, offset_2_ptr, out_2_ptr,
    n_bytes_0, n_bytes_1, n_bytes_2, end_0, end_1,
    HALF: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Up to three matrices: the first by programs before `end_0`, the second by those before `end_1`."""
    program = tl.program_id(0)
    if program < end_0:
        _dequantize_blocks(
            program, packed_0_ptr, absmax_0_ptr, absmax_8bit_0_ptr, code8_0_ptr, offset_0_ptr, out_0_ptr, n_bytes_0,
            HALF, BLOCKS, NESTED, NESTED_BLOCK, CODE,
        )  # fmt: skip
    elif program < end_1:
        _dequantize_blocks(
            program - end_0, packed_1_ptr, absmax_1_ptr, absmax_8bit_1_ptr, code8_1_ptr, offset_1_ptr, out_1_ptr, n_bytes_1,
            HALF, BLOCKS, NESTED, NESTED_BLOCK, CODE,
        )  # fmt: skip
    else:
        _dequantize_blocks(
            program - end_1, packed_2_ptr, absmax_2_ptr, absmax_8bit_2_ptr, code8_2_ptr, offset_2_ptr, out_2_ptr, n_bytes_2,
            HALF, BLOCKS, NESTED, NESTED_BLOCK, CODE,
        )  # fmt: skip


def _bytes_of(packed: Tensor) -> Tensor:
    return packed if packed.dtype is torch.uint8 and packed.is_contiguous() else packed.contiguous().view(torch.uint8)


def operands_of(packed, absmax, absmax_8bit, code8, offset, out: Tensor) -> list[Tensor]:
    """What a kernel is given of a matrix; pointers of absent tensors are never read."""
    scales = (absmax, absmax, absmax) if absmax_8bit is None else (absmax_8bit, code8, offset)
    return [_bytes_of(packed), absmax, *scales, out]


@cache
def _constants(blocksize: int, nested: bool, quant_type: str) -> dict:
    half = blocksize // 2
    return {
        "HALF": half,
        "BLOCKS": max(1, BYTES // half),
        "NESTED": nested,
        "NESTED_BLOCK": NESTED_BLOCK,
        "CODE": CODES[quant_type],
    }


def _programs(n_bytes: int, half: int, blocks: int) -> int:
    each = half * blocks
    return (n_bytes + each - 1) // each


def _triton(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape, dtype) -> Tensor:
    operands = operands_of(packed, absmax, absmax_8bit, code8, offset, packed.new_empty(shape, dtype=dtype))
    constants, n = _constants(blocksize, absmax_8bit is not None, quant_type), operands[0].numel()
    programs = _programs(n, constants["HALF"], constants["BLOCKS"])
    launch_cached(_dequantize_kernel, (programs,), operands, [n], constants, **OPTIONS)
    return operands[-1]


class _Together(NamedTuple):
    """What is the same in each launch for matrices of these shapes. rows, K: of the one buffer that those of one K lie in
    (gemm_columns.py), else K is 0.
    """

    shapes: list[tuple[int, int]]
    rows: list[int]
    K: int
    constants: dict
    programs: int
    numbers: list[int]


@cache
def _together(sizes: tuple[int, ...], blocksize: int, nested: bool, quant_type: str) -> _Together:
    shapes, constants = _pairs(sizes), _constants(blocksize, nested, quant_type)
    n_bytes = [n * k // 2 for n, k in shapes]
    ends = list(accumulate(_programs(n, constants["HALF"], constants["BLOCKS"]) for n in n_bytes))
    # Of two matrices, the last stands for the third, which no program computes.
    numbers = [*n_bytes, *n_bytes[-1:] * (MOST - len(shapes)), *ends[:2]]
    K = shapes[0][1]
    return _Together(shapes, [n for n, _ in shapes], K * all(k == K for _, k in shapes), constants, ends[-1], numbers)


def _triton_together(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shapes, dtype) -> list[Tensor]:
    how, new = _together(tuple(shapes), blocksize, bool(absmax_8bit), quant_type), packed[0].new_empty
    if how.K:
        out = rows_of(new(sum(how.rows), how.K, dtype=dtype), how.rows)
    else:
        out = [new(shape, dtype=dtype) for shape in how.shapes]
    scales = (absmax_8bit, code8, offset) if absmax_8bit else (absmax,) * 3
    given: list[Tensor] = []
    for of in zip(map(_bytes_of, packed), absmax, *scales, out, strict=True):
        given += of
    given += given[-6:] * (MOST - len(packed))
    launch_cached(_dequantize_together_kernel, (how.programs,), given, how.numbers, how.constants, **OPTIONS)
    return out


def _bitsandbytes(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape, dtype) -> Tensor:
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise.default(absmax_8bit, absmax, code8, NESTED_BLOCK, torch.float32) + offset
    return ops.dequantize_4bit.default(packed.reshape(-1, 1), absmax, blocksize, quant_type, shape, dtype)


torch.library.define(
    "sloth::dequantize_4bit",
    "(Tensor packed, Tensor absmax, Tensor? absmax_8bit, Tensor? code8, Tensor? offset, int blocksize, str quant_type,"
    " int[] shape, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(packed, absmax, absmax_8bit, code8, offset, blocksize: int, quant_type: str, shape: list[int]) -> None:
    no_derivative(packed, absmax, code8, offset)
    scales = absmax if absmax_8bit is None else absmax_8bit
    if quant_type not in CODES:
        raise ValueError(f"quant_type must be one of {', '.join(CODES)}, got {quant_type!r}")
    size = packed.numel() * packed.element_size()
    if 2 * size != shape[0] * shape[1]:
        raise RuntimeError(f"{size} bytes do not hold {shape} elements of 4 bits")
    blocks = (2 * size + blocksize - 1) // blocksize
    if scales.numel() < blocks:
        raise RuntimeError(f"{shape} in blocks of {blocksize} need {blocks} scales, got {scales.numel()}")


_dequantize_for = implementations("sloth::dequantize_4bit", triton=_triton, aten=_bitsandbytes)


@falls_back("sloth::dequantize_4bit", "linear_4bit")
def compute_dequantize_4bit(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape, dtype) -> Tensor:
    """The operator's result, for operands that were checked when the graph was traced."""
    return _dequantize_for(packed)(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape, dtype)


@torch.library.impl("sloth::dequantize_4bit", "CompositeExplicitAutograd")
def dequantize_4bit_impl(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape, dtype):
    _check(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape)
    return compute_dequantize_4bit(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape, dtype)


@torch.library.register_fake("sloth::dequantize_4bit")
def dequantize_4bit_fake(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape, dtype):
    _check(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape)
    return packed.new_empty(shape, dtype=dtype)


dequantize_4bit = torch.ops.sloth.dequantize_4bit.default
"""dequantize_4bit(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shape, dtype) -> W [N, K]"""


torch.library.define(
    "sloth::dequantize_4bit_together",
    "(Tensor[] packed, Tensor[] absmax, Tensor[] absmax_8bit, Tensor[] code8, Tensor[] offset, int blocksize, str quant_type,"
    " int[] shapes, ScalarType dtype) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _matrices(packed, absmax, absmax_8bit, code8, offset, shapes) -> list[tuple]:
    nested = zip(absmax_8bit, code8, offset, strict=True) if absmax_8bit else [(None,) * 3] * len(packed)
    return [(*of, *scales, list(shape)) for *of, scales, shape in zip(packed, absmax, nested, _pairs(shapes), strict=True)]


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """N, K of each matrix."""
    return list(zip(sizes[::2], sizes[1::2], strict=True))


@falls_back("sloth::dequantize_4bit_together", "linear_4bit")
def compute_dequantize_4bit_together(
    packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shapes, dtype
) -> list[Tensor]:
    """The operator's results, for operands that were checked when the graph was traced."""
    compute = _dequantize_together_for(packed[0])
    return compute(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shapes, dtype)


def _bitsandbytes_each(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shapes, dtype) -> list[Tensor]:
    matrices = _matrices(packed, absmax, absmax_8bit, code8, offset, shapes)
    return [_bitsandbytes(*tensors, blocksize, quant_type, shape, dtype) for *tensors, shape in matrices]


_dequantize_together_for = implementations("sloth::dequantize_4bit_together", triton=_triton_together, aten=_bitsandbytes_each)


@torch.library.impl("sloth::dequantize_4bit_together", "CompositeExplicitAutograd")
def dequantize_4bit_together_impl(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shapes, dtype):
    for *tensors, shape in _matrices(packed, absmax, absmax_8bit, code8, offset, shapes):
        _check(*tensors, blocksize, quant_type, shape)
    return apart(
        compute_dequantize_4bit_together(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shapes, dtype)
    )


@torch.library.register_fake("sloth::dequantize_4bit_together")
def dequantize_4bit_together_fake(packed, absmax, absmax_8bit, code8, offset, blocksize, quant_type, shapes, dtype):
    for *tensors, shape in _matrices(packed, absmax, absmax_8bit, code8, offset, shapes):
        _check(*tensors, blocksize, quant_type, shape)
    return [packed[0].new_empty(shape, dtype=dtype) for shape in _pairs(shapes)]


dequantize_4bit_together = torch.ops.sloth.dequantize_4bit_together.default
"""dequantize_4bit_together(packed, …, offset: lists of two or three, blocksize, quant_type, shapes [N_0, K_0, …], dtype) -> Ws"""


def together(calls: list[tuple]) -> tuple | None:
    """The arguments of `dequantize_4bit_together` for those of so many calls of `dequantize_4bit`; None where they do not fit."""
    tensors, shared = list(zip(*(c[:5] for c in calls), strict=True)), {(*c[5:7], c[8], c[2] is None) for c in calls}
    if len(shared) > 1:
        return None
    blocksize, quant_type, dtype, plain = shared.pop()
    lists = [list(t) for t in tensors[:2]] + [[] if plain else list(t) for t in tensors[2:]]
    return *lists, blocksize, quant_type, [n for c in calls for n in c[7]], dtype


def _compile_case(kernel, nested: bool):
    kinds = {"packed": "*u8", "absmax": "*fp32", "absmax_8bit": "*u8", "code8": "*fp32", "offset": "*fp32", "out": "*bf16"}
    names = [name for name in kernel.arg_names if not name.isupper()]
    signature = {name: kinds.get(name.removesuffix("_ptr").rstrip("_012"), "i32") for name in names}
    return kernel, signature, _constants(64, nested, "nf4"), OPTIONS


COMPILE = [
    _compile_case(_dequantize_kernel, True),
    _compile_case(_dequantize_kernel, False),
    _compile_case(_dequantize_together_kernel, True),
]
