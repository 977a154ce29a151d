"""Both gradients that need the gradients g_i of adapters' outputs, in one pass over each g_i:

    u_i = s_i · g_i B_i   [M, R_i]         dB_i = s_i · g_iᵀ t_i   [N_i, R_i]          g_i [M, N_i], B_i [N_i, R_i], R_i small

Layers   t = [t_1, t_2, …] and u = [u_1, u_2, …] are one matrix each, side by side, [M, Σ R_i]: adapters that read one x are one
         product with it, forward and backward. Up to three layers of one rank and scale are one launch (q, k and v).
Method   a program walks down a strip of a g_i, BN columns wide: each tile is read once, multiplied with its rows of B (a part of
         u) and, transposed, with its rows of t (added to a part of dB kept in registers). Parts are fp32; a second kernel adds
         both, in a fixed order: the result is the same in every run.
Opaque   to the compiler, like the other operators that a model has hundreds of (dequantize_4bit.py).
Dtypes   B, t and u of one dtype; dB in `dtype`, by default that one; g of any: tiles are cast to B's dtype. fp32 products are
         exact fp32 (no TF32).
Bytes    g once, where two matmuls read it twice, and 8·R bytes for each row and strip in parts: for N = 14336, R = 16 a quarter
         of g.
Tile and strip were chosen on an H200; ranks beyond MAX_RANK, dtypes and devices that Triton does not serve: two matmuls.
"""

from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import launch_cached, no_derivative
from sloth.kernels.common.row_reduction import multiprocessors
from sloth.kernels.linear.gemm import compute_sum_of_products
from sloth.kernels.linear.gemm_rows import apart, compute_product_in_rows, rows_of

MAX_RANK = 64
MOST = 3  # layers in one launch

# Tuning: rows and columns of a tile, programs for each multiprocessor, warps, tiles in flight, and how parts are added up.
BM, BN = 32, 256
PROGRAMS = 2
NUM_WARPS = 4
SHARED = 64 * 1024  # bytes of tiles in flight: every device has this much
SUM_STEP, SUM_BLOCK = 16, 128


@triton.jit(do_not_specialize=["M", "per_split", "end_0", "end_1"])
def _strip_kernel(
    g_0_ptr, g_1_ptr, g_2_ptr, b_0_ptr, b_1_ptr, b_2_ptr, t_ptr, u_ptr, db_ptr,
    g_0_stride, g_1_stride, g_2_stride, N_0, N_1, N_2, t_stride, M, per_split, end_0, end_1,
    scale: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Strip `pid 0`, rows [pid 1 · per_split, …): parts u_ptr[strip, M, R] and db_ptr[split, N_0 + N_1 + N_2, R]. Strips before
    `end_0` are the first layer's, those before `end_1` the second's. RP: R's power of two.
    """
    strip, split = tl.program_id(0), tl.program_id(1)
    if strip < end_0:
        g_ptr, b_ptr, g_stride, N, layer, start_of_strips, start_of_db = g_0_ptr, b_0_ptr, g_0_stride, N_0, 0, 0, 0
    elif strip < end_1:
        g_ptr, b_ptr, g_stride, N, layer, start_of_strips, start_of_db = g_1_ptr, b_1_ptr, g_1_stride, N_1, 1, end_0, N_0
    else:
        g_ptr, b_ptr, g_stride, N, layer, start_of_strips, start_of_db = g_2_ptr, b_2_ptr, g_2_stride, N_2, 2, end_1, N_0 + N_1
    col, rank = (strip - start_of_strips) * BN + tl.arange(0, BN), tl.arange(0, RP)
    in_rank = rank[None, :] < R
    b = tl.load(b_ptr + col[:, None] * R + rank[None, :], (col[:, None] < N) & in_rank, 0.0)
    total = tl.zeros([BN, RP], tl.float32)
    first = split * per_split
    for start in tl.range(first, tl.minimum(first + per_split, M), BM, num_stages=STAGES):
        row = start + tl.arange(0, BM)
        at = row.to(tl.int64)[:, None]
        g = tl.load(g_ptr + at * g_stride + col[None, :], (row[:, None] < M) & (col[None, :] < N), 0.0).to(b.dtype)
        t = tl.load(t_ptr + at * t_stride + layer * R + rank[None, :], (row[:, None] < M) & in_rank, 0.0)
        part = tl.dot(g, b, input_precision="ieee") * scale
        tl.store(u_ptr + (strip.to(tl.int64) * M + at) * R + rank[None, :], part, (row[:, None] < M) & in_rank)
        total = tl.dot(tl.trans(g), t, total, input_precision="ieee")
    at = (split.to(tl.int64) * (N_0 + N_1 + N_2) + start_of_db + col[:, None]) * R + rank[None, :]
    tl.store(db_ptr + at, total * scale, (col[:, None] < N) & in_rank)


@triton.jit(do_not_specialize=["end_0", "end_1", "strips", "splits", "u_size", "db_size"])
def _sum_kernel(
    u_ptr, db_ptr, u_out_ptr, db_out_ptr, u_stride, end_0, end_1, strips, splits, u_size, db_size,
    LAYERS: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs, as many for each layer: its u_size = M · R elements of u_out, which are R columns, as the sum of its
    strips. The others: db_out[db_size] = Σ db[splits, db_size].
    """
    block, of_u = tl.program_id(0), tl.cdiv(u_size, BLOCK)
    if block < LAYERS * of_u:
        layer = block // of_u
        first, end = 0, end_0
        if layer == 1:
            first, end = end_0, end_1
        if layer == 2:
            first, end = end_1, strips
        at = (block - layer * of_u) * BLOCK + tl.arange(0, BLOCK)
        to = (at // R).to(tl.int64) * u_stride + layer * R + at % R
        _sum_block(u_ptr, u_out_ptr, first, end, u_size, at, to, STEP, BLOCK)
    else:
        at = (block - LAYERS * of_u) * BLOCK + tl.arange(0, BLOCK)
        _sum_block(db_ptr, db_out_ptr, 0, splits, db_size, at, at, STEP, BLOCK)


@triton.jit
def _sum_block(part_ptr, out_ptr, first, end, size, at, to, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """out[to] = Σ part[first … end, at], STEP parts at a time."""
    i = tl.arange(0, STEP)[:, None]
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for start in range(first, end, STEP):
        inside = (start + i < end) & (at[None, :] < size)
        total += tl.load(part_ptr + (start + i).to(tl.int64) * size + at[None, :], inside, 0.0)
    tl.store(out_ptr + to, tl.sum(total, 0).to(out_ptr.dtype.element_ty), at < size)


def _triton(g: list[Tensor], b: list[Tensor], t: Tensor, scale: list[float], dtype: torch.dtype | None) -> list[Tensor]:
    """u, dB_1, …: of up to MOST layers of one rank and scale."""
    g = [gi if gi.stride(1) == 1 else gi.contiguous() for gi in g]
    b, t = [bi.contiguous() for bi in b], t if t.stride(1) == 1 else t.contiguous()
    M, R = g[0].shape[0], b[0].shape[1]
    widths = tuple([gi.shape[1] for gi in g])
    (*ends, strips), N = _strips(widths), sum(widths)
    splits = max(1, PROGRAMS * multiprocessors(t.device) // strips)
    per_split = (M + splits * BM - 1) // (splits * BM) * BM
    u, db = t.new_empty(strips, M, R, dtype=torch.float32), t.new_empty(splits, N, R, dtype=torch.float32)
    absent = MOST - len(g)
    filled = g + g[-1:] * absent
    operands = [*filled, *b, *b[-1:] * absent, t, u, db]
    numbers = [*[gi.stride(0) for gi in filled], *widths, *(0,) * absent, t.stride(0), M, per_split, *ends]
    constants = _constants(scale[0], R, g[0].element_size())
    launch_cached(_strip_kernel, (strips, splits), operands, numbers, constants, num_warps=NUM_WARPS)
    u_out, db_out = torch.empty_like(t, memory_format=torch.contiguous_format), t.new_empty(N, R, dtype=dtype or t.dtype)
    grid = (-(-M * R // SUM_BLOCK) * len(g) - (-N * R // SUM_BLOCK),)
    numbers = [u_out.stride(0), *ends, strips, splits, M * R, N * R]
    constants = {"LAYERS": len(g), "R": R, "STEP": SUM_STEP, "BLOCK": SUM_BLOCK}
    launch_cached(_sum_kernel, grid, [u, db, u_out, db_out], numbers, constants, num_warps=4)
    return [u_out, *rows_of(db_out, widths)]


@cache
def _constants(scale: float, R: int, size: int) -> dict[str, Any]:
    """Of the strips, for elements of so many bytes."""
    padded, stages = max(16, 1 << (R - 1).bit_length()), SHARED // (BM * BN * size)
    return {"scale": scale, "R": R, "RP": padded, "BM": BM, "BN": BN, "STAGES": stages}


@cache
def _strips(widths: tuple[int, ...]) -> list[int]:
    """Where those of each of MOST layers end."""
    ends = list(accumulate((n + BN - 1) // BN for n in widths))
    return ends + ends[-1:] * (MOST - len(ends))


torch.library.define(
    "sloth::up_gradients",
    "(Tensor[] g, Tensor[] b, Tensor t, float[] scale, ScalarType? dtype=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@falls_back("sloth::up_gradients", "lora")
def compute_lora_grad_b(g, b, t, scale, dtype=None) -> list[Tensor]:
    """The operator's results, for operands that were checked when the graph was traced. They may be parts of one buffer."""
    if len(g) == 1 or _alike(g, b, scale):
        served = b[0].shape[1] <= MAX_RANK and b[0].dtype == t.dtype
        return (_lora_grad_b_for(g[0], b[0]) if served else _aten)(g, b, t, scale, dtype)
    columns = t.split([bi.shape[1] for bi in b], 1)
    each = [compute_lora_grad_b([gi], [bi], ti, [s], dtype) for gi, bi, ti, s in zip(g, b, columns, scale, strict=True)]
    return [torch.cat([u for u, _ in each], 1), *(db for _, db in each)]


def _alike(g: list[Tensor], b: list[Tensor], scale: list[float]) -> bool:
    """Are these layers one launch?"""
    ranks, dtypes = {bi.shape[1] for bi in b}, {(gi.dtype, bi.dtype) for gi, bi in zip(g, b, strict=True)}
    return len(g) <= MOST and len(ranks) == len(dtypes) == len(set(scale)) == 1


def _aten(g: list[Tensor], b: list[Tensor], t: Tensor, scale: list[float], dtype: torch.dtype | None) -> list[Tensor]:
    g, columns = [gi.to(t.dtype) for gi in g], t.split([bi.shape[1] for bi in b], 1)
    u = [compute_sum_of_products([gi], [bi], [s]) for gi, bi, s in zip(g, b, scale, strict=True)]
    db = [compute_product_in_rows(gi.t(), ti, gi.shape[1:], s, dtype)[0] for gi, ti, s in zip(g, columns, scale, strict=True)]
    return [u[0] if len(u) == 1 else torch.cat(u, 1), *db]


def _check(g, b, t, scale) -> None:
    no_derivative(*g, *b, t)
    told = lambda: f"up_gradients: of {len(g)} layers, B {[list(bi.shape) for bi in b]}, t {list(t.shape)}"  # noqa: E731
    torch._check(0 < len(g) == len(b) == len(scale) and t.shape[1] == sum(bi.shape[1] for bi in b), told)


_lora_grad_b_for = implementations("sloth::up_gradients", triton=_triton, aten=_aten)


@torch.library.impl("sloth::up_gradients", "CompositeExplicitAutograd")
def up_gradients_impl(g, b, t, scale, dtype=None):
    _check(g, b, t, scale)
    u, *db = compute_lora_grad_b(g, b, t, scale, dtype)
    return [u, *apart(db)]


@torch.library.register_fake("sloth::up_gradients")
def up_gradients_fake(g, b, t, scale, dtype=None):
    _check(g, b, t, scale)
    return [t.new_empty(t.shape), *(bi.new_empty(bi.shape, dtype=dtype or t.dtype) for bi in b)]


lora_grad_b = torch.ops.sloth.up_gradients.default
"""lora_grad_b(g: [M, N_i], b: [N_i, R_i], t [M, Σ R_i], scale: lists, dtype=None) -> [u [M, Σ R_i], dB_1 [N_1, R_1], …]

u in t's dtype, dB_i in `dtype`. It has no derivative.
"""


def _compile_case(kernel, pointers: dict[str, str], constants: dict, **options):
    numbers = [name for name in kernel.arg_names if name not in pointers and name not in constants]
    return kernel, pointers | dict.fromkeys(numbers, "i32"), constants, options


def _strip_case(dtype: str, R: int):
    pointers = {f"{name}_{i}_ptr": kind for name, kind in (("g", "*bf16"), ("b", dtype)) for i in range(MOST)}
    pointers |= {"t_ptr": dtype, "u_ptr": "*fp32", "db_ptr": "*fp32"}
    constants = {"scale": 0.5, "R": R, "RP": 16, "BM": BM, "BN": BN, "STAGES": 4}
    return _compile_case(_strip_kernel, pointers, constants, num_warps=NUM_WARPS)


def _sum_case(dtype: str):
    pointers = {"u_ptr": "*fp32", "db_ptr": "*fp32", "u_out_ptr": "*bf16", "db_out_ptr": dtype}
    return _compile_case(_sum_kernel, pointers, {"LAYERS": 3, "R": 16, "STEP": SUM_STEP, "BLOCK": SUM_BLOCK})


COMPILE = [_strip_case("*bf16", 16), _strip_case("*fp32", 8), _sum_case("*bf16"), _sum_case("*fp32")]
