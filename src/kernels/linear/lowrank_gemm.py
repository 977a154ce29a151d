"""A thin product and a big one in one kernel, on Hopper GPUs:  y = bias + s T U + X W

Shapes   T [M, R], U [R, N] with R small, X [M, K], W [K, N], bias [N] or None; U and W in either order in memory.
Dtypes   one of bf16 and fp16, for all; fp32 accumulation, one rounding at the end.
Method   persistent programs walk over the tiles of y, in groups that share columns of W in the L2 cache; operands come by TMA.
         The thin product is one more step of the walk along K (the last: as the first it keeps Triton from pipelining the tiles).
Scale    s T is formed in registers. Where s is no power of two, or in fp16, its rounding error is multiplied with U too.
Bytes    each operand once (tiles of X and W again for each row and column of tiles, from L2), y once. cuBLAS alone is no slower
         than this kernel, but beside the thin product it reads and writes y once more. At the clock that a H200 keeps in a long
         run, [4096, 4096] × [4096, 14336] and rank 16: 728 µs here, 717 by cuBLAS alone, 758 … 802 with a thin product before.
"""

import math

import torch
from torch import Tensor

from sloth.kernels.common.device import device_of
from sloth.kernels.common.faults import without_kernels
from sloth.kernels.common.language import TensorDescriptor, tl, triton
from sloth.kernels.common.launch import launch_cached
from sloth.kernels.common.row_reduction import multiprocessors

MAX_RANK = 64

# Tuned on an H200.
BM, BN, BK = 128, 256, 64
GROUP = 16  # rows of tiles
OPTIONS = {"num_warps": 8, "num_stages": 3}
FULL = 0.85  # of the multiprocessors must have work on average, or cuBLAS has better tiles
LEAST = 4e11  # multiplications and additions: with less to do, a GPU waits for its host, which two launches of cuBLAS cost less


@triton.jit(do_not_specialize=["M"])
def _lowrank_gemm_kernel(
    x_desc, w_desc, t_desc, u_desc, y_desc, bias_ptr, M, N, K,
    SCALE: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, W_BY_COLUMNS: tl.constexpr, U_BY_COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th tile [BM, BN] of y. BY_COLUMNS: the descriptor is of the transposed matrix."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        first = tile // (GROUP * columns) * GROUP
        height = tl.minimum(rows - first, GROUP)
        m = (first + tile % (GROUP * columns) % height) * BM
        n = tile % (GROUP * columns) // height * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            w = w_desc.load([n, k]).T if W_BY_COLUMNS else w_desc.load([k, n])
            acc = tl.dot(x_desc.load([m, k]), w, acc, input_precision="ieee")
        t = t_desc.load([m, 0])
        u = u_desc.load([n, 0]).T if U_BY_COLUMNS else u_desc.load([0, n])
        if SCALE != 1:
            wide = t.to(tl.float32) * SCALE
            t = wide.to(u.dtype)
            if SPLIT:
                acc = tl.dot((wide - t.to(tl.float32)).to(u.dtype), u, acc, input_precision="ieee")
        acc = tl.dot(t, u, acc, input_precision="ieee")
        if HAS_BIAS:
            at = n + tl.arange(0, BN)
            acc += tl.load(bias_ptr + at, at < N, 0.0).to(tl.float32)[None, :]
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))  # less shared memory at a time
        y_desc.store([m, n], left.to(y_desc.dtype))
        y_desc.store([m, n + BN // 2], right.to(y_desc.dtype))


def _by_columns(x: Tensor) -> bool:
    return x.stride(1) != 1


def _addressable(x: Tensor) -> bool:
    """By TMA: 16 bytes are its unit."""
    outer, inner = sorted(x.stride(), reverse=True)
    return inner == 1 and outer * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0


def _tiles(M: int, N: int) -> int:
    return -(-M // BM) * -(-N // BN)


def _hopper(device: torch.device) -> bool:
    return device_of(device).hopper


def serves(t: Tensor, u: Tensor, x: Tensor, w: Tensor, scale: float) -> bool:
    """Is the kernel made for these operands, and the product large enough for the GPU?"""
    return (
        2 * x.numel() * w.shape[1] >= LEAST
        and x.dtype in (torch.bfloat16, torch.float16)
        and (x.dtype == torch.bfloat16 or abs(scale) <= 1)  # s T does not overflow where s T U would not
        and t.shape[1] <= MAX_RANK
        and not (_by_columns(t) or _by_columns(x))
        and all(map(_addressable, (t, u, x, w)))
        and w.shape[1] % 8 == 0  # so that y is too
        and _hopper(x.device)
        and not without_kernels()
        and (waves := _tiles(x.shape[0], w.shape[1]) / multiprocessors(x.device)) > FULL * math.ceil(waves)
    )


def lowrank_gemm(t: Tensor, u: Tensor, x: Tensor, w: Tensor, scale: float, bias: Tensor | None, y: Tensor) -> None:
    """y = bias + scale · t u + x w. For operands that `serves` accepts, by Triton."""
    (M, K), N, R = x.shape, w.shape[1], max(16, triton.next_power_of_2(t.shape[1]))

    def tiles_of(a: Tensor, *block: int) -> TensorDescriptor:
        if _by_columns(a):
            a, block = a.t(), block[::-1]
        return TensorDescriptor(a, list(a.shape), list(a.stride()), list(block))

    programs = multiprocessors(x.device)
    launch_cached(
        _lowrank_gemm_kernel,
        (min(programs, _tiles(M, N)),),
        [tiles_of(x, BM, BK), tiles_of(w, BK, BN), tiles_of(t, BM, R), tiles_of(u, R, BN), tiles_of(y, BM, BN // 2),
         y if bias is None else bias.contiguous()],
        [M, N, K],
        {"SCALE": scale, "SPLIT": x.dtype == torch.float16 or abs(math.frexp(scale)[0]) != 0.5, "HAS_BIAS": bias is not None,
         "W_BY_COLUMNS": _by_columns(w), "U_BY_COLUMNS": _by_columns(u),
         "BM": BM, "BN": BN, "BK": BK, "GROUP": GROUP, "PROGRAMS": programs},
        **OPTIONS,
    )  # fmt: skip


def _compile_case(R: int, **how):
    signature = {"x_desc": [BM, BK], "w_desc": [BK, BN], "t_desc": [BM, R], "u_desc": [R, BN], "y_desc": [BM, BN // 2]}
    for name in ("w", "u"):
        if how[f"{name.upper()}_BY_COLUMNS"]:
            signature[f"{name}_desc"].reverse()
    signature = {name: f"tensordesc<bf16{block}>" for name, block in signature.items()}
    signature |= {"bias_ptr": "*bf16"} | dict.fromkeys("MNK", "i32")
    constants = {"BM": BM, "BN": BN, "BK": BK, "GROUP": GROUP, "PROGRAMS": 132} | how
    return _lowrank_gemm_kernel, signature, constants, OPTIONS | {"only": [("sm_90", "bf16"), ("sm_90", "fp16")]}


COMPILE = [
    _compile_case(16, SCALE=0.3, SPLIT=True, HAS_BIAS=True, W_BY_COLUMNS=True, U_BY_COLUMNS=True),
    _compile_case(64, SCALE=1.0, SPLIT=False, HAS_BIAS=False, W_BY_COLUMNS=False, U_BY_COLUMNS=False),
]
