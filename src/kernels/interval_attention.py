"""Attention in which each query sees an interval of the keys, less those that are not valid: the triangle of scores that a causal
window, packed documents, chunks or padding leave, and nothing beside it.

    out_i = Σ_j p_ij v_j,   p_ij = exp(s_ij − L_i),   s_ij = scale · q_i·k_j,   L_i = log Σ_j exp(s_ij),
    both sums over the keys that i sees:   lo_i ≤ j ≤ hi_i  and  valid_j

Shapes   query [B, H, S, D], key and value [B, G, T, D] with H a multiple of G, each for H / G heads in a row, D ≤ 256;
         lo, hi [B or 1, S], first, last [B or 1, T] int32, valid [B or 1, T] bool or None. first and last say the same of a
         key: it is seen from the queries first_j ≤ i ≤ last_j, from none where it is not valid (`intervals` makes all four).
Forward  a program holds a tile of queries and walks the tiles of keys between the least lo and the greatest hi of its rows. Their
         maximum m and sum l are kept up online (Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018):
             m' = max(m, max_j s_j),   l' = l·e^(m−m') + Σ_j e^(s_j−m'),   out' = out·e^(m−m') + Σ_j e^(s_j−m') v_j
         Tiles that all rows see whole, from the greatest lo to the least hi, are walked apart, without the comparisons.
         A query that sees nothing gives 0 and has no gradient, as in torch's scaled_dot_product_attention.
Backward with g = ∂L/∂out, after Dao, "FlashAttention-2" (2023):
             dv_j = Σ_i p_ij g_i            dp_ij = g_i·v_j
             ds_ij = p_ij (dp_ij − Σ_m p_im dp_im) = p_ij (dp_ij − δ_i),   δ_i = g_i·out_i   as Σ_m p_im v_m = out_i
             dq_i = scale Σ_j ds_ij k_j     dk_j = scale Σ_i ds_ij q_i
         p is computed again from L. dq by tiles of queries; dk and dv by tiles of keys, each program walking over the H / G heads
         of its group: no atomics, the same result in every run, and no copies of key and value.
Numbers  scores, sums and accumulators in fp32; p and ds are rounded to the inputs' dtype for their products, fp32 inputs are
         multiplied in fp32 (no TF32). Powers are of 2: log₂e goes into the scale, and L is kept in units of log 2.
Saved    q, k, v, out, L [B, H, S] in fp32. lo, hi … are made once a step by ATen operations that all layers have in common.
Floor    4·D (forward) and 10·D (backward, which does 14·D) FLOPs for each seen pair (i, j) and each of B·H heads.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from sloth.kernels.launch import launch
from sloth.kernels.tiles import once

LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """Queries and keys of one step, warps of a program, loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# Tuning for GPUs like H100, by the width of a head padded to a power of two (the smallest that fits). 0: for GPUs with less than
# SHARED, but 96 KiB of shared memory, up to a width of 128 (RTX 30 and 40: what fits, not measured).
FORWARD = {0: Tile(128, 64, 8, 2), 64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 4, 2)}
BACKWARD_Q = {0: Tile(64, 64, 4, 1), 64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2)}
BACKWARD_KV = {0: Tile(64, 64, 4, 1), 64: Tile(64, 128, 8, 2), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 2)}
SMALL = Tile(32, 32, 4, 1)  # for fp32, which tensor cores do not multiply, and for all others
SHARED, LESS = 160 * 1024, 96 * 1024


# ---------------------------------------------------------------- Triton
#
# Names end in the sizes of a tile: M queries, N keys, D channels. Strides are named tensor_dimension.


@triton.jit
def _rows(ptr, at, stride, limit, D: tl.constexpr, BD: tl.constexpr):
    """Rows `at` of a matrix with unit stride along D; zeros beyond `limit` and D."""
    col = tl.arange(0, BD)
    return tl.load(ptr + at[:, None].to(tl.int64) * stride + col[None, :], (at[:, None] < limit) & (col[None, :] < D), 0.0)


@triton.jit
def _store_rows(ptr, x, at, stride, limit, D: tl.constexpr, BD: tl.constexpr):
    col = tl.arange(0, BD)
    to = ptr + at[:, None].to(tl.int64) * stride + col[None, :]
    tl.store(to, x.to(ptr.dtype.element_ty), (at[:, None] < limit) & (col[None, :] < D))


@triton.jit
def _walk(least, most, whole_from, whole_to, BLOCK: tl.constexpr):
    """Tiles of the range least … most: (start of the first, tiles in all, where whole tiles begin, how many they are)."""
    start = least // BLOCK * BLOCK
    tiles = tl.maximum(tl.cdiv(most + 1 - start, BLOCK), 0)
    whole = tl.maximum(tl.cdiv(whole_from, BLOCK) * BLOCK, start)
    return start, tiles, whole, tl.minimum(tl.maximum((whole_to + 1 - whole) // BLOCK, 0), tiles)


@triton.jit
def _tile(i, start, whole, wholes, REST: tl.constexpr, BLOCK: tl.constexpr):
    """Where the i-th of the whole tiles begins, or of the others, which lie before and behind them."""
    if REST:
        at = start + i * BLOCK
        return tl.where(at < whole, at, at + wholes * BLOCK)
    return whole + i * BLOCK


@triton.jit
def _of_query(s, at_N, lo_M, hi_M, valid_ptr, T, WHOLE: tl.constexpr, VALID: tl.constexpr):
    """Scores [M, N] with −∞ for what is not seen; of a whole tile only what is not valid has to go."""
    if not WHOLE:
        s = tl.where((lo_M[:, None] <= at_N[None, :]) & (at_N[None, :] <= hi_M[:, None]), s, -float("inf"))
    if VALID:
        s = tl.where(tl.load(valid_ptr + at_N, at_N < T, 0).to(tl.int1)[None, :], s, -float("inf"))
    return s


@triton.jit
def _attend(
    acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, k_t, v_t, start, lo_M, hi_M, valid_ptr, T,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """One tile of keys, in the online softmax."""
    at_N = start + tl.arange(0, BN)
    k_ND = _rows(k_ptr, at_N, k_t, T, D, BD)
    s = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * SCALE
    s = _of_query(s, at_N, lo_M, hi_M, valid_ptr, T, WHOLE, VALID)
    new_M = tl.maximum(m_M, tl.max(s, 1))
    finite_M = tl.where(new_M == -float("inf"), 0.0, new_M)  # nothing seen yet: no −∞ − (−∞)
    p = tl.exp2(s - finite_M[:, None])
    shrunk_M = tl.exp2(m_M - finite_M)
    v_ND = _rows(v_ptr, at_N, v_t, T, D, BD)
    acc_MD = tl.dot(p.to(v_ND.dtype), v_ND, acc_MD * shrunk_M[:, None], input_precision="ieee")
    return acc_MD, new_M, l_M * shrunk_M + tl.sum(p, 1)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr, valid_ptr, S, T, H,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_s, lo_b, valid_b,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    VALID: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one head: program (tile, b·H + h), the last tile first: in causal masks it is the longest."""
    pid = tl.program_id(1).to(tl.int64)
    b, h = pid // H, pid % H
    g = h // GROUP
    at_M = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    bounds = b * lo_b + tl.minimum(at_M, S - 1)  # rows beyond the last do as it does
    lo_M, hi_M = tl.load(lo_ptr + bounds), tl.load(hi_ptr + bounds)
    start, tiles, whole, wholes = _walk(tl.min(lo_M), tl.max(hi_M), tl.max(lo_M), tl.min(hi_M), BN)
    k_ptr += b * k_b + g * k_h
    v_ptr += b * v_b + g * v_h
    valid_ptr += b * valid_b
    q_MD = _rows(q_ptr + b * q_b + h * q_h, at_M, q_s, S, D, BD)
    acc_MD = tl.zeros([BM, BD], tl.float32)
    m_M = tl.full([BM], -float("inf"), tl.float32)
    l_M = tl.zeros([BM], tl.float32)
    for rest in tl.static_range(2):
        for i in range(tiles - wholes if rest else wholes):
            acc_MD, m_M, l_M = _attend(
                acc_MD, m_M, l_M, q_MD, k_ptr, v_ptr, k_t, v_t, _tile(i, start, whole, wholes, rest, BN),
                lo_M, hi_M, valid_ptr, T, SCALE, D, BD, BN, rest == 0, VALID,
            )  # fmt: skip
    seen_M = l_M > 0
    lse_M = tl.where(seen_M, m_M + tl.log2(tl.where(seen_M, l_M, 1.0)), float("inf"))  # ∞: every p of the backward pass is 0
    out_MD = acc_MD / tl.where(seen_M, l_M, 1.0)[:, None]
    _store_rows(out_ptr + b * out_b + h * out_h, out_MD, at_M, out_s, S, D, BD)
    tl.store(lse_ptr + pid * S + at_M, lse_M, at_M < S)


@triton.jit
def _add_dq(
    dq_MD, q_MD, g_MD, lse_M, delta_M, k_ptr, v_ptr, k_t, v_t, start, lo_M, hi_M, valid_ptr, T,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    at_N = start + tl.arange(0, BN)
    k_ND, v_ND = _rows(k_ptr, at_N, k_t, T, D, BD), _rows(v_ptr, at_N, v_t, T, D, BD)
    s = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * SCALE
    p = tl.exp2(_of_query(s, at_N, lo_M, hi_M, valid_ptr, T, WHOLE, VALID) - lse_M[:, None])
    ds = p * (tl.dot(g_MD, tl.trans(v_ND), input_precision="ieee") - delta_M[:, None])
    return tl.dot(ds.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")


@triton.jit
def _backward_q_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, dq_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, valid_ptr, S, T, H,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_s, dq_b, dq_h, dq_s, lo_b, valid_b,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, programs as in the forward pass. FACTOR is the scale without log₂e."""
    pid = tl.program_id(1).to(tl.int64)
    b, h = pid // H, pid % H
    kv_h = h // GROUP
    at_M = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    bounds = b * lo_b + tl.minimum(at_M, S - 1)
    lo_M, hi_M = tl.load(lo_ptr + bounds), tl.load(hi_ptr + bounds)
    start, tiles, whole, wholes = _walk(tl.min(lo_M), tl.max(hi_M), tl.max(lo_M), tl.min(hi_M), BN)
    k_ptr += b * k_b + kv_h * k_h
    v_ptr += b * v_b + kv_h * v_h
    valid_ptr += b * valid_b
    q_MD = _rows(q_ptr + b * q_b + h * q_h, at_M, q_s, S, D, BD)
    g_MD = _rows(g_ptr + b * g_b + h * g_h, at_M, g_s, S, D, BD)
    lse_M = tl.load(lse_ptr + pid * S + at_M, at_M < S, float("inf"))
    delta_M = tl.load(delta_ptr + pid * S + at_M, at_M < S, 0.0)
    dq_MD = tl.zeros([BM, BD], tl.float32)
    for rest in tl.static_range(2):
        for i in range(tiles - wholes if rest else wholes):
            dq_MD = _add_dq(
                dq_MD, q_MD, g_MD, lse_M, delta_M, k_ptr, v_ptr, k_t, v_t, _tile(i, start, whole, wholes, rest, BN),
                lo_M, hi_M, valid_ptr, T, SCALE, D, BD, BN, rest == 0, VALID,
            )  # fmt: skip
    _store_rows(dq_ptr + b * dq_b + h * dq_h, dq_MD * FACTOR, at_M, dq_s, S, D, BD)


@triton.jit
def _add_dkv(
    dk_ND, dv_ND, k_ND, v_ND, q_ptr, g_ptr, lse_ptr, delta_ptr, q_s, g_s, start, first_N, last_N, S,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at_M = start + tl.arange(0, BM)
    q_MD, g_MD = _rows(q_ptr, at_M, q_s, S, D, BD), _rows(g_ptr, at_M, g_s, S, D, BD)
    lse_M = tl.load(lse_ptr + at_M, at_M < S, float("inf"))
    delta_M = tl.load(delta_ptr + at_M, at_M < S, 0.0)
    p = tl.exp2(tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * SCALE - lse_M[None, :])
    if not WHOLE:
        p = tl.where((first_N[:, None] <= at_M[None, :]) & (at_M[None, :] <= last_N[:, None]), p, 0.0)
    dv_ND = tl.dot(p.to(g_MD.dtype), g_MD, dv_ND, input_precision="ieee")
    ds = p * (tl.dot(v_ND, tl.trans(g_MD), input_precision="ieee") - delta_M[None, :])
    return tl.dot(ds.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee"), dv_ND


@triton.jit
def _backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, S, T, G,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_s, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, first_b,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, tile by tile of the queries of its group's heads: program (tile, b·G + group)."""
    pid = tl.program_id(1).to(tl.int64)
    b, kv_h = pid // G, pid % G
    at_N = tl.program_id(0) * BN + tl.arange(0, BN)
    bounds = b * first_b + tl.minimum(at_N, T - 1)
    first_N, last_N = tl.load(first_ptr + bounds), tl.load(last_ptr + bounds)
    start, tiles, whole, wholes = _walk(tl.min(first_N), tl.max(last_N), tl.max(first_N), tl.min(last_N), BM)
    k_ND = _rows(k_ptr + b * k_b + kv_h * k_h, at_N, k_t, T, D, BD)
    v_ND = _rows(v_ptr + b * v_b + kv_h * v_h, at_N, v_t, T, D, BD)
    dk_ND = tl.zeros([BN, BD], tl.float32)
    dv_ND = tl.zeros([BN, BD], tl.float32)
    for member in range(GROUP):
        h = kv_h * GROUP + member
        q_at, g_at, row = q_ptr + b * q_b + h * q_h, g_ptr + b * g_b + h * g_h, (b * G * GROUP + h) * S
        for rest in tl.static_range(2):
            for i in range(tiles - wholes if rest else wholes):
                dk_ND, dv_ND = _add_dkv(
                    dk_ND, dv_ND, k_ND, v_ND, q_at, g_at, lse_ptr + row, delta_ptr + row, q_s, g_s,
                    _tile(i, start, whole, wholes, rest, BM), first_N, last_N, S, SCALE, D, BD, BM, rest == 0,
                )  # fmt: skip
    _store_rows(dk_ptr + b * dk_b + kv_h * dk_h, dk_ND * FACTOR, at_N, dk_t, T, D, BD)
    _store_rows(dv_ptr + b * dv_b + kv_h * dv_h, dv_ND, at_N, dv_t, T, D, BD)


# ---------------------------------------------------------------- operators


def _width(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def tile_of(table: dict[int, Tile], x: Tensor) -> Tile:
    width, shared = _width(x.shape[-1]), _shared(x.device) if x.is_cuda else SHARED
    if x.dtype == torch.float32 or shared < LESS or shared < SHARED and width > 128:
        return SMALL
    return table[0] if shared < SHARED else next(tile for most, tile in table.items() if width <= most)


@cache
def _shared(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def _options(q: Tensor, k: Tensor, scale: float, tile: Tile) -> dict:
    return dict(
        SCALE=scale * LOG2E, GROUP=q.shape[1] // k.shape[1], D=q.shape[-1], BD=_width(q.shape[-1]),
        BM=tile.queries, BN=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _blocks(n, block: int):
    return (n + block - 1) // block


def _strides(*tensors: Tensor) -> list[int]:
    return [t.stride(d) for t in tensors for d in range(3)]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _batch_stride(x: Tensor) -> int:
    """0 where one row stands for all."""
    return x.stride(0) if x.shape[0] > 1 else 0


def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer in [B, S, heads, D] order, as the projections before and after want it, which kernels write, and its view as x."""
    B, heads, S, D = x.shape
    buffer = torch.empty(B, S, heads, D, dtype=x.dtype, device=x.device)  # not new_empty: of equal ones AOTAutograd makes one
    return buffer, buffer.transpose(1, 2)


@triton_op("sloth::interval_attention", mutates_args={})
def _interval_attention(
    query: Tensor, key: Tensor, value: Tensor, lo: Tensor, hi: Tensor, first: Tensor, last: Tensor, valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = map(_unit_stride, (query, key, value))
    B, H, S, _ = q.shape
    (buffer, out), lse = _like(q), torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    tile, seen = tile_of(FORWARD, q), lo if valid is None else valid
    launch(_forward_kernel)[(_blocks(S, tile.queries), B * H)](
        q, k, v, buffer, lse, lo, hi, seen, S, k.shape[2], H, *_strides(q, k, v, out), _batch_stride(lo), _batch_stride(seen),
        VALID=valid is not None, **_options(q, k, scale, tile),
    )  # fmt: skip
    return out, lse


@triton_op("sloth::interval_attention_dq", mutates_args={})
def _interval_attention_dq(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, lo: Tensor, hi: Tensor,
    valid: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    g, q, k, v = map(_unit_stride, (dout, query, key, value))
    B, H, S, _ = q.shape
    buffer, dq = _like(q)
    tile, seen = tile_of(BACKWARD_Q, q), lo if valid is None else valid
    launch(_backward_q_kernel)[(_blocks(S, tile.queries), B * H)](
        q, k, v, g, buffer, lse, delta, lo, hi, seen, S, k.shape[2], H, *_strides(q, k, v, g, dq), _batch_stride(lo),
        _batch_stride(seen), FACTOR=scale, VALID=valid is not None, **_options(q, k, scale, tile),
    )  # fmt: skip
    return dq


@triton_op("sloth::interval_attention_dkv", mutates_args={})
def _interval_attention_dkv(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    g, q, k, v = map(_unit_stride, (dout, query, key, value))
    B, G, T, _ = k.shape
    (k_buffer, dk), (v_buffer, dv) = _like(k), _like(v)
    tile = tile_of(BACKWARD_KV, q)
    launch(_backward_kv_kernel)[(_blocks(T, tile.keys), B * G)](
        q, k, v, g, k_buffer, v_buffer, lse, delta, first, last, q.shape[2], T, G, *_strides(q, k, v, g, dk, dv),
        _batch_stride(first), FACTOR=scale, **_options(q, k, scale, tile),
    )  # fmt: skip
    return dk, dv


interval_attention = torch.ops.sloth.interval_attention.default
"""interval_attention(query, key, value, lo, hi, first, last, valid, scale) -> (out [B, H, S, D], L [B, H, S] over log 2)"""
interval_attention_dq = torch.ops.sloth.interval_attention_dq.default
interval_attention_dkv = torch.ops.sloth.interval_attention_dkv.default


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 9
    q, k, v, lo, hi, first, last, valid, out, lse = ctx.saved_tensors
    delta = (dout.float() * out.float()).sum(-1).contiguous()
    dq = dk = dv = None
    if ctx.needs_input_grad[0]:
        dq = interval_attention_dq(dout, q, k, v, lse, delta, lo, hi, valid, ctx.scale)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dk, dv = interval_attention_dkv(dout, q, k, v, lse, delta, first, last, ctx.scale)
    return dq, dk, dv, *[None] * 6


_interval_attention.register_autograd(_backward, setup_context=_setup)
_interval_attention_dq.register_autograd(once)
_interval_attention_dkv.register_autograd(once)


# ---------------------------------------------------------------- compiled for every target by the tests


def _compile_case(kernel, tile: Tile, D: int, valid: bool, dtype: str):
    """Tiles belong to a dtype, so it stands here and is not the target's."""
    types = {"valid_ptr": "*i1" if valid else "*i32"} | dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32")
    types |= dict.fromkeys(("lo_ptr", "hi_ptr", "first_ptr", "last_ptr"), "*i32")
    constants = dict(SCALE=0.1, FACTOR=0.1, GROUP=4, D=D, BD=_width(D), BM=tile.queries, BN=tile.keys, VALID=valid)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    others = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, dtype if name.endswith("_ptr") else "i32") for name in others}
    return kernel, signature, constants, {"num_warps": tile.warps, "num_stages": tile.stages}


COMPILE = [
    case
    for kernel, table in ((_forward_kernel, FORWARD), (_backward_q_kernel, BACKWARD_Q), (_backward_kv_kernel, BACKWARD_KV))
    for case in (_compile_case(kernel, table[64], 64, True, "*fp16"), _compile_case(kernel, SMALL, 128, False, "*fp32"))
]
