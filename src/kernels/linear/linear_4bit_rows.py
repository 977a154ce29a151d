"""Linear layers over 4-bit weights for a few rows, as in generating, up to three that read the same x, with their adapters:

    y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ          W_i[n, k] = code[q] · s_block

Shapes   x [..., K], packed_i as in dequantize_4bit.py, A_i [r_i, K] and B_i [N_i, r_i] or None, y_i [..., N_i].
Dtypes   x in bf16 or fp16 for the kernels; adapters in a dtype of their own; y_i in `dtype`, by default x's.

Nothing is differentiable. Two launches, one without adapters: t = s x Aᵀ for all adapters, in fp32, a program for some of the
columns and rows of A, whose sums stand side by side; then a program computes a few rows of one W_i, whose bytes are read once and
become elements in registers, added up in fp32, the adapter's product added, rounded once. W is not rounded at all: the sum of a
block is scaled, and not its elements. One row of x is multiplied element by element; up to 16 by tensor cores, the even and the
odd columns each by themselves, as a byte holds them, and a code's value as the sum of two of x's dtype.
More rows than that, other dtypes and devices: the weights are dequantised, and lora_linear has them.
Domain   x is finite: by tensor cores an infinity gives NaN, where the products alone may give an infinity.
Bytes    N·K/2 and N·K/64 of scales, once: the floor. x and t come from L1 and L2.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sloth.kernels.common.device import device_of
from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.launch import launch_cached, no_derivative
from sloth.kernels.linear.dequantize_4bit import CODES, NESTED_BLOCK, compute_dequantize_4bit, operands_of
from sloth.kernels.linear.linear_4bit_rows_kernels import down_kernel, rows_kernel
from sloth.kernels.linear.lookup_4bit import lane_pairs, lane_values
from sloth.kernels.linear.lora import lora_linear

MOST = 16  # rows of x that the kernels take
MOST_RANK = 128  # of adapters: a program holds a row of it for each row of x
ROWS_DTYPES = (torch.bfloat16, torch.float16)  # of x
TOGETHER = 3  # layers of one launch
# Rows of W to a program, blocks of 64 elements to a step (by tensor cores, of any size one to a warp at least), and how it is
# launched: for one row of x, and by tensor cores, where W has few rows and where it has many.
ELEMENT = {"BN": 4, "BLOCKS": 32, "num_warps": 4, "num_stages": 1}
TENSOR_FEW = {"BN": 16, "BLOCKS": 8, "num_warps": 4, "num_stages": 3}
TENSOR_MANY = {"BN": 32, "BLOCKS": 4, "num_warps": 4, "num_stages": 3}
MANY = 16384  # rows of W
DOWN_TILE, DOWN_COLUMNS, DOWN_WARPS = 8192, 512, 4  # products to a step, columns of x to a program
SPLITS, T_TILE = 32, 4096  # the most programs that share a row of t; its elements that are added up at a time


# ---------------------------------------------------------------- launches


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def _padded(rank: int) -> int:
    """A power of two that a tensor core's product takes."""
    return 0 if rank == 0 else max(16, _power(rank))


def _splits(columns: int) -> tuple[int, int]:
    """How many programs share a row of t, and the columns of each."""
    each = DOWN_COLUMNS * -(-columns // (DOWN_COLUMNS * SPLITS))
    return -(-columns // each), each


def _tile(m: int, rows: int) -> dict[str, int]:
    return ELEMENT if m == 1 else TENSOR_FEW if rows < MANY else TENSOR_MANY


@cache
def _constants(
    m: int, columns: int, ranks: tuple[int, ...], biases: tuple[bool, ...], blocksize: int, nested: bool, quant_type: str,
    rows: int, dtype: torch.dtype, ptx: bool,
) -> dict[str, Any]:  # fmt: skip
    """rows: of all W."""
    tensor_cores, how = m > 1, _tile(m, rows)
    splits, _ = _splits(columns)
    fewest = how["num_warps"] if tensor_cores else 1  # blocks: each warp has some
    lanes = lane_pairs(quant_type, dtype) if tensor_cores else lane_values(quant_type)
    ranks, biases = (*ranks, 0, 0)[:TOGETHER], (*biases, False, False)[:TOGETHER]
    padded = [_padded(r) for r in ranks]
    rows_of_x = (8 if m <= 8 and ptx else 16) if tensor_cores else 1
    return {
        "M": m,
        "MP": rows_of_x,
        **{f"R_{i}": r for i, r in enumerate(ranks)},
        **{f"RP_{i}": r for i, r in enumerate(padded)},
        **{f"BIAS_{i}": b for i, b in enumerate(biases)},
        "BN": how["BN"],
        "BLOCKS": max(fewest, how["BLOCKS"] * 64 // blocksize),
        "HALF": blocksize // 2,
        "NESTED": nested,
        "NESTED_BLOCK": NESTED_BLOCK,
        "CODE": CODES[quant_type],
        "LANES": lanes if ptx else "",
        "TENSOR_CORES": tensor_cores,
        "S": splits,
        "SP": min(_power(splits), T_TILE // (max(16, *padded) * rows_of_x)),
        "STAGES": how["num_stages"],
    }


@cache
def _down_constants(m: int, columns: int, ranks: tuple[int, ...], scales: tuple[float, ...]) -> dict[str, Any]:
    rows = 16 if m <= 4 else 8  # of A to a program
    return {
        "M": m,
        **{f"R_{i}": r for i, r in enumerate((*ranks, 0, 0)[:TOGETHER])},
        **{f"S_{i}": s for i, s in enumerate((*scales, 1.0, 1.0)[:TOGETHER])},
        "COLUMNS": columns,
        "MP": _power(m),
        "BR": rows,
        "BK": DOWN_TILE // (_power(m) * rows),
    }


def _down_products(x: Tensor, a: list[Tensor], scale: list[float]) -> Tensor:
    """t [splits, M, Σ r_i] in fp32."""
    m, k = x.shape
    splits, columns = _splits(k)
    ranks = tuple(of.shape[0] for of in a)
    t = x.new_empty(splits, m, sum(ranks), dtype=torch.float32)
    constants = _down_constants(m, columns, ranks, tuple(scale))
    grid = len(a), splits, -(-max(ranks) // constants["BR"])
    operands = [x, *a, *a[-1:] * (TOGETHER - len(a)), t]
    launch_cached(down_kernel, grid, operands, [k, t.shape[2]], constants, num_warps=DOWN_WARPS)
    return t


def _triton(x: Tensor, weights: list[tuple], bias, a, b, scale, blocksize: int, quant_type: str, dtype) -> list[Tensor]:
    """At most three layers, with scales of one kind, each as (packed, absmax, absmax_8bit, code8, offset, N)."""
    M, K = x.shape
    adapted = [i for i, of in enumerate(a) if of is not None]
    t = _down_products(x, [a[i].contiguous() for i in adapted], [scale[i] for i in adapted]) if adapted else x
    operands, ranks, out = [x, t], [0 if of is None else of.shape[0] for of in a], []
    for (*tensors, n), bi, up in zip(weights, bias, b, strict=True):
        *tensors, y = operands_of(*tensors, x.new_empty(M, n, dtype=dtype))
        operands += [*tensors, x if bi is None else bi.contiguous(), x if up is None else up.contiguous(), y]
        out.append(y)
    operands += operands[-8:] * (TOGETHER - len(weights))
    nested, biased = weights[0][2] is not None, tuple(of is not None for of in bias)
    sizes = [w[-1] for w in weights]
    of = sum(sizes), x.dtype, device_of(x.device).ptx
    constants = _constants(M, K, tuple(ranks), biased, blocksize, nested, quant_type, *of)
    ends = [0]
    for n in sizes:
        ends.append(ends[-1] + -(-n // constants["BN"]))
    numbers = [*sizes, *sizes[-1:] * (TOGETHER - len(sizes)), *(ends[1:] + ends[-1:])[:2], K // 2, t.shape[-1]]
    launch_cached(rows_kernel, (ends[-1],), operands, numbers, constants, num_warps=_tile(M, sum(sizes))["num_warps"])
    return out


def takes(dtype: torch.dtype, columns: int, blocksize: int) -> bool:
    """Are the kernels made for x of such a dtype, with so many columns, if its rows are few?"""
    return dtype in ROWS_DTYPES and columns % blocksize == 0 and blocksize <= 256


def serves(x: Tensor, blocksize: int) -> bool:
    """Are the kernels made for these operands?"""
    return 0 < x.shape[0] <= MOST and takes(x.dtype, x.shape[1], blocksize)


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
    compute = _rows_for(x) if serves(x2, blocksize) and all(of is None or of.shape[0] <= MOST_RANK for of in a) else _aten
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
    x = _by_eights(x)
    weights = [(_by_eights(packed), *rest) for packed, *rest in weights]
    for at in _launches(weights):
        parts = (list(values[at]) for values in (weights, bias, a, b, scale))
        out += _triton(x, *parts, blocksize, quant_type, dtype)
    return out


def _by_eights(x: Tensor) -> Tensor:
    """Contiguous, from an address on that eight bytes can be read at."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 8 else x


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


def _compile_case(m: int, nested: bool, rank: int, rows: int = 4096, dtype: str = "bf16", ptx: bool = True):
    kinds = {"packed": "*u8", "absmax": "*fp32", "absmax_8bit": "*u8", "code8": "*fp32", "offset": "*fp32", "t": "*fp32"}
    names = [name for name in rows_kernel.arg_names if name.endswith("_ptr")]
    signature = {name: kinds.get(name.removesuffix("_ptr").rstrip("_012"), "*bf16") for name in names}  # in place of `dtype`
    signature |= dict.fromkeys(("N_0", "N_1", "N_2", "end_0", "end_1", "HALF_K", "n_t"), "i32")
    x = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    constants = _constants(m, 4096, (rank,) * 3, (True, False, False), 64, nested, "nf4", rows, x, ptx)
    targets = ("sm_80", "sm_90", "sm_100") if dtype == "bf16" else ("sm_75", "sm_90")
    only = [(target, dtype) for target in targets] if ptx else [("gfx942", dtype)]
    return rows_kernel, signature, constants, {"num_warps": _tile(m, rows)["num_warps"], "only": only}


def _compile_down(m: int):
    signature = {"x_ptr": "*bf16", "t_ptr": "*fp32", "K": "i32", "n_t": "i32"}
    signature |= dict.fromkeys(("a_0_ptr", "a_1_ptr", "a_2_ptr"), "*fp32")
    return down_kernel, signature, _down_constants(m, 512, (16, 16, 4), (1.0, 0.5, 1.0)), {"num_warps": DOWN_WARPS}


COMPILE = [
    _compile_case(1, True, 16),
    _compile_case(8, True, MOST_RANK),
    _compile_case(2, False, 0, rows=2 * MANY),
    _compile_case(1, False, 0, dtype="fp16"),
    _compile_case(8, True, 16, dtype="fp16"),
    _compile_case(16, True, 16, dtype="fp16"),
    _compile_case(1, True, 16, ptx=False),
    _compile_case(8, True, 16, ptx=False),
    _compile_down(1),
    _compile_down(8),
]
