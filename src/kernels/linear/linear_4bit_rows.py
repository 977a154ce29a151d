"""Linear layers over 4-bit weights for a few rows, as in generating, up to three that read the same x, with their adapters:

    y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ          W_i[n, k] = code[q] · s_block  in x's dtype, as dequantize_4bit gives it

Shapes   x [..., K], packed_i as in dequantize_4bit.py, A_i [r_i, K] and B_i [N_i, r_i] or None, y_i [..., N_i].
Dtypes   x in bf16 or fp16 for the kernels; adapters in a dtype of their own; y_i in `dtype`, by default x's.

Nothing is differentiable. Two launches, one without adapters: t = s x Aᵀ for all adapters, in fp32, a program for a row of A;
then a program computes a few rows of one W_i, whose bytes are read once and become elements in registers: rounded to x's dtype as
the weight is, multiplied and added up in fp32, the adapter's product added, rounded once. One or two rows of x are multiplied
element by element; up to 16 by tensor cores, the even and the odd columns each by themselves, as a byte holds them.
More rows than that, other dtypes and devices: the weights are dequantised, and lora_linear has them.
Bytes    N·K/2 and N·K/64 of scales, once: the floor. x and t come from L1 and L2.
"""

from functools import cache

import torch
from torch import Tensor

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import launch_cached, no_derivative
from sloth.kernels.linear.dequantize_4bit import CODES, NESTED_BLOCK, _operands, _table, compute_dequantize_4bit
from sloth.kernels.linear.lora import lora_linear

MOST = 16  # rows of x that the kernels take
ROWS_DTYPES = (torch.bfloat16, torch.float16)  # of x
BY_ELEMENT = 2  # rows up to which no tensor core is used
TOGETHER = 3  # layers of one launch
# Rows of W to a program, blocks of 4 bits to a step, and how it is launched: by element, and by tensor cores.
ELEMENT = {"BN": 8, "BLOCKS": 8, "num_warps": 4, "num_stages": 3}
TENSOR = {"BN": 32, "BLOCKS": 4, "num_warps": 4, "num_stages": 3}
DOWN = {"BK": 2048, "num_warps": 4}


@triton.jit
def _down_kernel(
    x_ptr, a_0_ptr, a_1_ptr, a_2_ptr, t_ptr, K, end_0, end_1, end_2,
    M: tl.constexpr, MP: tl.constexpr, BK: tl.constexpr, S_0: tl.constexpr, S_1: tl.constexpr, S_2: tl.constexpr,
):  # fmt: skip
    """t[m, r] = s x[m] · A[r]: a row r of up to three A, one below the other, to a program."""
    r = tl.program_id(0)
    k = tl.arange(0, BK)
    m = tl.arange(0, MP)
    acc = tl.zeros([MP, BK], tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        if r < end_0:
            a = tl.load(a_0_ptr + r * K + start + k, inside, 0.0).to(tl.float32) * S_0
        elif r < end_1:
            a = tl.load(a_1_ptr + (r - end_0) * K + start + k, inside, 0.0).to(tl.float32) * S_1
        else:
            a = tl.load(a_2_ptr + (r - end_1) * K + start + k, inside, 0.0).to(tl.float32) * S_2
        x = tl.load(x_ptr + m[:, None] * K + start + k[None, :], (m < M)[:, None] & inside[None, :], 0.0).to(tl.float32)
        acc += x * a[None, :]
    tl.store(t_ptr + m * end_2 + r, tl.sum(acc, 1), m < M)


@triton.jit
def _rows(
    program, x_ptr, t_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, bias_ptr, b_ptr, y_ptr,
    N, HALF_K, n_t,
    M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, AT: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr,
    BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr,
    TENSOR_CORES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BN elements of each row of y. M: rows of x; RP: the rank R in a power of two, from column AT of t on; 0: no adapter."""
    STEP: tl.constexpr = BLOCKS * HALF
    MP: tl.constexpr = 16 if TENSOR_CORES else M
    n = program * BN + tl.arange(0, BN)
    n_inside = n < N
    n_blocks = HALF_K // HALF  # of a row
    table = _table(CODE)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.arange(0, MP)
    at = tl.arange(0, STEP)
    row = n.to(tl.int64) * HALF_K
    acc = tl.zeros([MP, BN] if TENSOR_CORES else [MP, BN, STEP], tl.float32)
    for step in tl.range(0, (n_blocks + BLOCKS - 1) // BLOCKS, num_stages=STAGES):
        block = step * BLOCKS + tl.arange(0, BLOCKS)
        b_inside = n_inside[:, None] & (block < n_blocks)[None, :]
        scale_at = n[:, None].to(tl.int64) * n_blocks + block[None, :]
        if NESTED:
            q = tl.load(absmax_8bit_ptr + scale_at, b_inside, 0).to(tl.int32)
            outer = tl.load(absmax_ptr + scale_at // NESTED_BLOCK, b_inside, 0.0)
            product = tl.where(b_inside, tl.load(code8_ptr + q) * outer, 0.0)  # rounded: no compiler adds through a choice
            scale = tl.where(b_inside, product + tl.load(offset_ptr), 0.0)
        else:
            scale = tl.load(absmax_ptr + scale_at, b_inside, 0.0)
        here = step * STEP + at
        k_inside = here < HALF_K
        pair = tl.load(packed_ptr + row[:, None] + here[None, :], n_inside[:, None] & k_inside[None, :], 0).to(tl.int32)
        flat = tl.reshape(pair, [BN * STEP])
        even = tl.reshape(tl.gather(table, flat >> 4, 0), [BN, BLOCKS, HALF]) * scale[:, :, None]
        odd = tl.reshape(tl.gather(table, flat & 15, 0), [BN, BLOCKS, HALF]) * scale[:, :, None]
        even = tl.reshape(even.to(dtype), [BN, STEP])
        odd = tl.reshape(odd.to(dtype), [BN, STEP])
        k = step * (2 * STEP) + tl.arange(0, 2 * STEP)
        x_inside = (m < M)[:, None] & (k < 2 * HALF_K)[None, :]
        x = tl.load(x_ptr + m[:, None] * (2 * HALF_K) + k[None, :], x_inside, 0.0)
        x_even, x_odd = tl.split(tl.reshape(x, [MP, STEP, 2]))
        if TENSOR_CORES:
            acc = tl.dot(x_even, tl.trans(even), acc)
            acc = tl.dot(x_odd, tl.trans(odd), acc)
        else:
            acc += x_even.to(tl.float32)[:, None, :] * even.to(tl.float32)[None, :, :]
            acc += x_odd.to(tl.float32)[:, None, :] * odd.to(tl.float32)[None, :, :]
    y = acc if TENSOR_CORES else tl.sum(acc, 2)
    if RP > 0:
        r = tl.arange(0, RP)
        t = tl.load(t_ptr + m[:, None] * n_t + AT + r[None, :], (m < M)[:, None] & (r < R)[None, :], 0.0)
        b = tl.load(b_ptr + n[:, None] * R + r[None, :], n_inside[:, None] & (r < R)[None, :], 0.0).to(tl.float32)
        if TENSOR_CORES:
            y = tl.dot(t, tl.trans(b), y, input_precision="ieee")
        else:
            y += tl.sum(t[:, None, :] * b[None, :, :], 2)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, n_inside, 0.0).to(tl.float32)[None, :]
    y_inside = (m < M)[:, None] & n_inside[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), y_inside)


@triton.jit
def _rows_kernel(
    x_ptr, t_ptr,
    packed_0_ptr, absmax_0_ptr, absmax_8bit_0_ptr, code8_0_ptr, offset_0_ptr, bias_0_ptr, b_0_ptr, y_0_ptr,
    packed_1_ptr, absmax_1_ptr, absmax_8bit_1_ptr, code8_1_ptr, offset_1_ptr, bias_1_ptr, b_1_ptr, y_1_ptr,
    packed_2_ptr, absmax_2_ptr, absmax_8bit_2_ptr, code8_2_ptr, offset_2_ptr, bias_2_ptr, b_2_ptr, y_2_ptr,
    N_0, N_1, N_2, end_0, end_1, HALF_K, n_t,
    M: tl.constexpr, R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,
    RP_0: tl.constexpr, RP_1: tl.constexpr, RP_2: tl.constexpr,
    BIAS_0: tl.constexpr, BIAS_1: tl.constexpr, BIAS_2: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
    HALF: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr, TENSOR_CORES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Up to three layers: the first by programs before `end_0`, the second by those before `end_1`."""
    program = tl.program_id(0)
    if program < end_0:
        _rows(
            program, x_ptr, t_ptr, packed_0_ptr, absmax_0_ptr, absmax_8bit_0_ptr, code8_0_ptr, offset_0_ptr, bias_0_ptr, b_0_ptr,
            y_0_ptr, N_0, HALF_K, n_t, M, R_0, RP_0, 0, BIAS_0, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE, TENSOR_CORES,
            STAGES,
        )  # fmt: skip
    elif program < end_1:
        _rows(
            program - end_0, x_ptr, t_ptr, packed_1_ptr, absmax_1_ptr, absmax_8bit_1_ptr, code8_1_ptr, offset_1_ptr, bias_1_ptr,
            b_1_ptr, y_1_ptr, N_1, HALF_K, n_t, M, R_1, RP_1, R_0, BIAS_1, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE,
            TENSOR_CORES, STAGES,
        )  # fmt: skip
    else:
        _rows(
            program - end_1, x_ptr, t_ptr, packed_2_ptr, absmax_2_ptr, absmax_8bit_2_ptr, code8_2_ptr, offset_2_ptr, bias_2_ptr,
            b_2_ptr, y_2_ptr, N_2, HALF_K, n_t, M, R_2, RP_2, R_0 + R_1, BIAS_2, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE,
            TENSOR_CORES, STAGES,
        )  # fmt: skip


# ---------------------------------------------------------------- launches


def _padded(rank: int) -> int:
    """A power of two that a tensor core's product takes."""
    return 0 if rank == 0 else max(16, 1 << (rank - 1).bit_length())


@cache
def _constants(m: int, ranks: tuple[int, ...], biases: tuple[bool, ...], blocksize: int, nested: bool, quant_type: str) -> dict:
    tensor_cores = m > BY_ELEMENT
    how = TENSOR if tensor_cores else ELEMENT
    ranks, biases = (*ranks, 0, 0)[:TOGETHER], (*biases, False, False)[:TOGETHER]
    return {
        "M": m,
        **{f"R_{i}": r for i, r in enumerate(ranks)},
        **{f"RP_{i}": _padded(r) for i, r in enumerate(ranks)},
        **{f"BIAS_{i}": b for i, b in enumerate(biases)},
        "BN": how["BN"],
        "BLOCKS": max(1, how["BLOCKS"] * 64 // blocksize),
        "HALF": blocksize // 2,
        "NESTED": nested,
        "NESTED_BLOCK": NESTED_BLOCK,
        "CODE": CODES[quant_type],
        "TENSOR_CORES": tensor_cores,
        "STAGES": how["num_stages"],
    }


def _down(x: Tensor, a: list[Tensor], scale: list[float]) -> Tensor:
    """t [M, Σ r_i] in fp32."""
    m, ends = x.shape[0], [0]
    for of in a:
        ends.append(ends[-1] + of.shape[0])
    t = x.new_empty(m, ends[-1], dtype=torch.float32)
    given = [*a, *a[-1:] * (TOGETHER - len(a))]
    ends = (ends[1:] + ends[-1:] * TOGETHER)[:TOGETHER]
    scales = (*scale, 1.0, 1.0)[:TOGETHER]
    padded = 1 << (m - 1).bit_length()
    constants = {"M": m, "MP": padded, "BK": DOWN["BK"] // min(padded, 8), **{f"S_{i}": s for i, s in enumerate(scales)}}
    launch_cached(_down_kernel, (ends[-1],), [x, *given, t], [x.shape[1], *ends], constants, num_warps=DOWN["num_warps"])
    return t


def _triton(x: Tensor, weights: list[tuple], bias, a, b, scale, blocksize: int, quant_type: str, dtype) -> list[Tensor]:
    """At most three layers, with scales of one kind, each as (packed, absmax, absmax_8bit, code8, offset, N)."""
    M, K = x.shape
    adapted = [i for i, of in enumerate(a) if of is not None]
    t = _down(x, [a[i].contiguous() for i in adapted], [scale[i] for i in adapted]) if adapted else x
    operands, ranks, out = [x, t], [0 if of is None else of.shape[0] for of in a], []
    for (*tensors, n), bi, up in zip(weights, bias, b, strict=True):
        *tensors, y = _operands(*tensors, x.new_empty(M, n, dtype=dtype))
        operands += [*tensors, x if bi is None else bi.contiguous(), x if up is None else up.contiguous(), y]
        out.append(y)
    operands += operands[-8:] * (TOGETHER - len(weights))
    nested, biased = weights[0][2] is not None, tuple(of is not None for of in bias)
    constants = _constants(M, tuple(ranks), biased, blocksize, nested, quant_type)
    sizes = [w[-1] for w in weights]
    ends = [0]
    for n in sizes:
        ends.append(ends[-1] + -(-n // constants["BN"]))
    numbers = [*sizes, *sizes[-1:] * (TOGETHER - len(sizes)), *(ends[1:] + ends[-1:])[:2], K // 2, t.shape[1]]
    how = TENSOR if constants["TENSOR_CORES"] else ELEMENT
    launch_cached(_rows_kernel, (ends[-1],), operands, numbers, constants, num_warps=how["num_warps"])
    return out


def takes(dtype: torch.dtype, columns: int, blocksize: int) -> bool:
    """Are the kernels made for x of such a dtype, with so many columns, if its rows are few?"""
    return dtype in ROWS_DTYPES and columns % blocksize == 0 and blocksize <= 256


def serves(x: Tensor, blocksize: int) -> bool:
    """Are the kernels made for these operands?"""
    return x.shape[0] <= MOST and takes(x.dtype, x.shape[1], blocksize)


# ---------------------------------------------------------------- the operator

torch.library.define(
    "sloth::linear_4bit_rows",
    "(Tensor x, Tensor[] packed, Tensor[] absmax, Tensor?[] absmax_8bit, Tensor?[] code8, Tensor?[] offset, Tensor?[] bias,"
    " Tensor?[] a, Tensor?[] b, float[] scale, int[] rows, int blocksize, str quant_type, ScalarType? dtype=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@falls_back("sloth::linear_4bit_rows", "lora_rows,linear_4bit_rows")
def compute_linear_4bit_rows(
    x, packed, absmax, absmax_8bit, code8, offset, bias, a, b, scale, rows, blocksize, quant_type, dtype=None
) -> list[Tensor]:
    """The operator's results, for operands that were checked when the graph was traced."""
    dtype = dtype or x.dtype
    weights = list(zip(packed, absmax, absmax_8bit, code8, offset, rows, strict=True))
    x2 = x.reshape(-1, x.shape[-1])
    compute = _rows_for(x) if serves(x2, blocksize) else _aten
    out = compute(x2, weights, bias, a, b, scale, blocksize, quant_type, dtype)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in out]


def _aten(x: Tensor, weights: list[tuple], bias, a, b, scale, blocksize: int, quant_type: str, dtype) -> list[Tensor]:
    out: list[Tensor] = []
    for w, *others in zip(weights, bias, a, b, scale, strict=True):
        dense = compute_dequantize_4bit(*w[:5], blocksize, quant_type, [w[5], x.shape[-1]], x.dtype)
        bi, down, up, s = ([value] for value in others)
        out += lora_linear(x, [dense], bi, [None], down, up, s, dtype)
    return out


def _in_launches(x: Tensor, weights: list[tuple], bias, a, b, scale, blocksize: int, quant_type: str, dtype) -> list[Tensor]:
    out: list[Tensor] = []
    for at in _launches(weights):
        parts = (list(values[at]) for values in (weights, bias, a, b, scale))
        out += _triton(x.contiguous(), *parts, blocksize, quant_type, dtype)
    return out


_rows_for = implementations("sloth::linear_4bit_rows", triton=_in_launches, aten=_aten)


def _launches(weights: list[tuple]) -> list[slice]:
    """Neighbours of one kind of scales, three at a time."""
    found, start = [], 0
    for end in range(1, len(weights) + 1):
        other = end == len(weights) or (weights[end][2] is None) != (weights[start][2] is None)
        if other or end - start == TOGETHER:
            found.append(slice(start, end))
            start = end
    return found


def _check(x, packed, absmax, absmax_8bit, bias, a, b, scale, rows, blocksize: int, quant_type: str) -> None:
    no_derivative(x, *packed, *bias, *a, *b)
    if quant_type not in CODES:
        raise ValueError(f"quant_type must be one of {', '.join(CODES)}, got {quant_type!r}")
    lengths = {len(values) for values in (packed, absmax, absmax_8bit, bias, a, b, scale, rows)}
    torch._check(lengths == {len(packed)} and len(packed) > 0, lambda: "linear_4bit_rows: every list needs an element a layer")
    for p, up, down, n in zip(packed, b, a, rows, strict=True):
        size = p.numel() * p.element_size()
        told = f"linear_4bit_rows: {size} bytes do not hold {n} rows of {x.shape[-1]} elements"
        torch._check(2 * size == n * x.shape[-1], lambda told=told: told)
        if down is not None:
            told = f"linear_4bit_rows: x {list(x.shape)}, {n} rows, A {list(down.shape)}, B {list(up.shape)}"
            fits = down.shape[1] == x.shape[-1] and up.shape == (n, down.shape[0])
            torch._check(fits, lambda told=told: told)


@torch.library.impl("sloth::linear_4bit_rows", "CompositeExplicitAutograd")
def linear_4bit_rows_impl(
    x, packed, absmax, absmax_8bit, code8, offset, bias, a, b, scale, rows, blocksize, quant_type, dtype=None
):
    _check(x, packed, absmax, absmax_8bit, bias, a, b, scale, rows, blocksize, quant_type)
    given = x, packed, absmax, absmax_8bit, code8, offset, bias, a, b, scale, rows, blocksize, quant_type, dtype
    return compute_linear_4bit_rows(*given)


@torch.library.register_fake("sloth::linear_4bit_rows")
def linear_4bit_rows_fake(
    x, packed, absmax, absmax_8bit, code8, offset, bias, a, b, scale, rows, blocksize, quant_type, dtype=None
):
    _check(x, packed, absmax, absmax_8bit, bias, a, b, scale, rows, blocksize, quant_type)
    return [x.new_empty(*x.shape[:-1], n, dtype=dtype or x.dtype) for n in rows]


linear_4bit_rows = torch.ops.sloth.linear_4bit_rows.default
"""linear_4bit_rows(x, packed, …, offset, bias, a, b: lists, scale, rows: lists, blocksize, quant_type, dtype=None) -> [y_i]"""


def _compile_case(m: int, nested: bool, rank: int):
    kinds = {"packed": "*u8", "absmax": "*fp32", "absmax_8bit": "*u8", "code8": "*fp32", "offset": "*fp32", "t": "*fp32"}
    names = [name for name in _rows_kernel.arg_names if name.endswith("_ptr")]
    signature = {name: kinds.get(name.removesuffix("_ptr").rstrip("_012"), "*bf16") for name in names}
    signature |= dict.fromkeys(("N_0", "N_1", "N_2", "end_0", "end_1", "HALF_K", "n_t"), "i32")
    constants = _constants(m, (rank,) * 3, (True, False, False), 64, nested, "nf4")
    how = TENSOR if m > BY_ELEMENT else ELEMENT
    only = [("sm_75", "fp16"), *((target, "bf16") for target in ("sm_80", "sm_90", "sm_100", "gfx942")), ("sm_90", "fp16")]
    return _rows_kernel, signature, constants, {"num_warps": how["num_warps"], "only": only}


_DOWN_SIGNATURE = {"x_ptr": "*bf16", "t_ptr": "*fp32", "K": "i32", "end_0": "i32", "end_1": "i32", "end_2": "i32"}
COMPILE = [
    _compile_case(1, True, 16),
    _compile_case(8, True, 16),
    _compile_case(2, False, 0),
    (
        _down_kernel,
        _DOWN_SIGNATURE | dict.fromkeys(("a_0_ptr", "a_1_ptr", "a_2_ptr"), "*fp32"),
        {"M": 8, "MP": 8, "BK": 256, "S_0": 1.0, "S_1": 0.5, "S_2": 1.0},
        {"num_warps": DOWN["num_warps"]},
    ),
]
