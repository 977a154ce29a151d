"""Both gradients that need the gradient g of an adapter's output, in one pass over g:

    u = s · g B   [M, R]         dB = s · gᵀ t   [N, R]          g [M, N], B [N, R], t [M, R], R small

Method   a program walks down a strip of g, BN columns wide: each tile is read once, multiplied with its rows of B (a part of u)
         and, transposed, with its rows of t (added to a part of dB kept in registers). Parts are fp32; a second kernel adds both,
         in a fixed order: the result is the same in every run.
Opaque   to the compiler, like the other operators that a model has hundreds of (kernels/dequantize_4bit.py).
Dtypes   B, t, u and dB of one dtype; g of any: tiles are cast to B's dtype. fp32 products are exact fp32 (no TF32).
Bytes    g once, where two matmuls read it twice, and 8·R bytes for each row and strip in parts: for N = 14336, R = 16 a quarter
         of g.
Tile and strip were chosen on an H200; ranks beyond MAX_RANK, dtypes and devices that Triton does not serve: two matmuls.
"""

import torch
from torch import Tensor

from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import launch_cached, no_derivative, use_triton
from sloth.kernels.common.row_reduction import multiprocessors
from sloth.kernels.linear.gemm import sum_of_products

MAX_RANK = 64

# Tuning: rows and columns of a tile, programs for each multiprocessor, warps, tiles in flight, and how parts are added up.
BM, BN = 32, 256
PROGRAMS = 2
NUM_WARPS = 4
SHARED = 64 * 1024  # bytes of tiles in flight: every device has this much
SUM_STEP, SUM_BLOCK = 16, 128


@triton.jit(do_not_specialize=["M", "per_split"])
def _strip_kernel(
    g_ptr,
    b_ptr,
    t_ptr,
    u_ptr,
    db_ptr,
    g_stride,
    t_stride,
    M,
    N,
    per_split,
    scale: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Strip `pid 0` of g, rows [pid 1 · per_split, …): parts u_ptr[strip, M, R] and db_ptr[split, N, R]. RP: R's power of two."""
    strip, split = tl.program_id(0), tl.program_id(1)
    col, rank = strip * BN + tl.arange(0, BN), tl.arange(0, RP)
    in_rank = rank[None, :] < R
    b = tl.load(b_ptr + col[:, None] * R + rank[None, :], (col[:, None] < N) & in_rank, 0.0)
    total = tl.zeros([BN, RP], tl.float32)
    first = split * per_split
    for start in tl.range(first, tl.minimum(first + per_split, M), BM, num_stages=STAGES):
        row = start + tl.arange(0, BM)
        at = row.to(tl.int64)[:, None]
        g = tl.load(g_ptr + at * g_stride + col[None, :], (row[:, None] < M) & (col[None, :] < N), 0.0).to(b.dtype)
        t = tl.load(t_ptr + at * t_stride + rank[None, :], (row[:, None] < M) & in_rank, 0.0)
        part = tl.dot(g, b, input_precision="ieee") * scale
        tl.store(u_ptr + (strip.to(tl.int64) * M + at) * R + rank[None, :], part, (row[:, None] < M) & in_rank)
        total = tl.dot(tl.trans(g), t, total, input_precision="ieee")
    at = (split.to(tl.int64) * N + col[:, None]) * R + rank[None, :]
    tl.store(db_ptr + at, total * scale, (col[:, None] < N) & in_rank)


@triton.jit(do_not_specialize=["strips", "splits", "u_size", "db_size"])
def _sum_kernel(u_ptr, db_ptr, u_out_ptr, db_out_ptr, strips, splits, u_size, db_size, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """u_out[u_size] = Σ u[strips, u_size] by the first programs, db_out[db_size] = Σ db[splits, db_size] by the others."""
    block, of_u = tl.program_id(0), tl.cdiv(u_size, BLOCK)
    if block < of_u:
        _sum_block(u_ptr, u_out_ptr, strips, u_size, block, STEP, BLOCK)
    else:
        _sum_block(db_ptr, db_out_ptr, splits, db_size, block - of_u, STEP, BLOCK)


@triton.jit
def _sum_block(part_ptr, out_ptr, parts, size, block, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """One block of columns, STEP parts at a time."""
    at, i = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP)[:, None]
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for start in range(0, parts, STEP):
        inside = (start + i < parts) & (at[None, :] < size)
        total += tl.load(part_ptr + (start + i).to(tl.int64) * size + at[None, :], inside, 0.0)
    tl.store(out_ptr + at, tl.sum(total, 0).to(out_ptr.dtype.element_ty), at < size)


def _triton(g: Tensor, b: Tensor, t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    g = g if g.stride(1) == 1 else g.contiguous()
    t, b = t if t.stride(1) == 1 else t.contiguous(), b.contiguous()
    (M, N), R = g.shape, b.shape[1]
    strips = (N + BN - 1) // BN
    splits = max(1, PROGRAMS * multiprocessors(g.device) // strips)
    per_split = (M + splits * BM - 1) // (splits * BM) * BM
    u = g.new_empty(strips, M, R, dtype=torch.float32)
    db = g.new_empty(splits, N, R, dtype=torch.float32)
    launch_cached(
        _strip_kernel,
        (strips, splits),
        [g, b, t, u, db],
        [g.stride(0), t.stride(0), M, N, per_split],
        {"scale": scale, "R": R, "RP": max(16, 1 << (R - 1).bit_length()), "BM": BM, "BN": BN,
         "STAGES": SHARED // (BM * BN * g.element_size())},
        num_warps=NUM_WARPS,
    )  # fmt: skip
    out = b.new_empty(M, R), b.new_empty(N, R)
    grid = (-(-M * R // SUM_BLOCK) - (-N * R // SUM_BLOCK),)
    numbers = [strips, splits, M * R, N * R]
    launch_cached(_sum_kernel, grid, [u, db, *out], numbers, {"STEP": SUM_STEP, "BLOCK": SUM_BLOCK}, num_warps=4)
    return out


torch.library.define(
    "sloth::up_gradients",
    "(Tensor g, Tensor b, Tensor t, float scale) -> (Tensor u, Tensor db)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@falls_back("sloth::up_gradients", "lora")
def compute_lora_grad_b(g, b, t, scale) -> tuple[Tensor, Tensor]:
    """The operator's results, for operands that were checked when the graph was traced."""
    if use_triton(g) and use_triton(b) and b.shape[1] <= MAX_RANK:
        return _triton(g, b, t, scale)
    g = g.to(b.dtype)
    return sum_of_products([g], [b], [scale]), sum_of_products([g.t()], [t], [scale])


@torch.library.impl("sloth::up_gradients", "CompositeExplicitAutograd")
def up_gradients_impl(g, b, t, scale):
    no_derivative(g, b, t)
    return compute_lora_grad_b(g, b, t, scale)


@torch.library.register_fake("sloth::up_gradients")
def up_gradients_fake(g, b, t, scale):
    no_derivative(g, b, t)
    return b.new_empty(g.shape[0], b.shape[1]), torch.empty_like(b, memory_format=torch.contiguous_format)


lora_grad_b = torch.ops.sloth.up_gradients.default
"""lora_grad_b(g [M, N], b [N, R], t [M, R], scale) -> (u [M, R], dB [N, R]) in b's dtype. It has no derivative."""


def _compile_case(dtype: str, R: int):
    signature = {"g_ptr": "*bf16", "b_ptr": dtype, "t_ptr": dtype, "u_ptr": "*fp32", "db_ptr": "*fp32"}
    signature |= dict.fromkeys(("g_stride", "t_stride", "M", "N", "per_split"), "i32")
    constants = {"scale": 0.5, "R": R, "RP": 16, "BM": BM, "BN": BN, "STAGES": 4}
    return _strip_kernel, signature, constants, {"num_warps": NUM_WARPS}


COMPILE = [
    _compile_case("*bf16", 16),
    _compile_case("*fp32", 8),
    (
        _sum_kernel,
        {"u_ptr": "*fp32", "db_ptr": "*fp32", "u_out_ptr": "*bf16", "db_out_ptr": "*bf16"}
        | dict.fromkeys(("strips", "splits", "u_size", "db_size"), "i32"),
        {"STEP": SUM_STEP, "BLOCK": SUM_BLOCK},
    ),
]
