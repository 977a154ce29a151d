"""Attention in which each query sees an interval of the keys, less those that are not valid: the triangle of scores that a causal
window, packed documents, chunks or padding leave, and nothing beside it.

    out_i = Σ_j p_ij v_j,   p_ij = exp(s_ij − L_i),   L_i = log(Σ_j exp(s_ij) + exp(sink_h)),
    both sums over the keys that i sees:   lo_i ≤ j ≤ hi_i  and  valid_j
    s_ij = cap(x_ij) + bias_hj,   x_ij = scale · q_i·k_j,   cap(x) = c · tanh(x / c)

sink_h is the score of a key without a value (Xiao et al., "Efficient streaming language models with attention sinks", 2023),
bias_hj is the same for all queries, as ALiBi's slope_h · j (Press, Smith, Lewis, "Train short, test long", 2022); added is
bias_hj − bias_hi, which leaves p_ij as it is. Not given: no exp(sink_h), no bias, cap(x) = x.

Shapes   query [B, H, S, D], key [B, G, T, D] and value [B, G, T, E] with H a multiple of G, each for H / G heads in a row, D and
         E ≤ 256; lo, hi [B or 1, S], first, last [B or 1, T] int32, valid [B or 1, T] bool or None. first and last say the same
         of a key: it is seen from the queries first_j ≤ i ≤ last_j, from none where it is not valid (`intervals` makes all four).
         Or valid is the mask itself, [B or 1, S, T] dense: what is seen where it is true, which must be between the bounds only.
         holes [B or 1, S] bool, with valid: is a key between a query's bounds not valid? The padding of most batches leaves none.
         gaps [B or 1, T] bool, with a mask: is a query between a key's bounds one that does not see it?
         sinks [H], or bias [B or 1, H, T] with unit stride along T, finite, where S = T. fully_masked [B or 1, 2] int32: the
         first and the last query that sees nothing, or None.
Forward  a program holds a tile of queries and walks the tiles of keys between the least lo and the greatest hi of its rows. Their
         maximum m and sum l are kept up online (Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018):
             m' = max(m, max_j s_j),   l' = l·e^(m−m') + Σ_j e^(s_j−m'),   out' = out·e^(m−m') + Σ_j e^(s_j−m') v_j
         from m = −∞, l = 0, or with a sink from m = sink_h, l = 1.
         Tiles that all rows see whole, from the greatest lo to the least hi, are walked apart, without the comparisons and the
         mask; there are none where a row has holes.
         A query that sees nothing gives 0 and has no gradient, as in torch's scaled_dot_product_attention. Or, with
         `fully_masked`, it weighs all keys alike, as where a mask adds the least number there is: lo_i = −1, hi_i = T − 1, and
         s_ij = 0 for it.
Backward with g = ∂L/∂out, after Dao, "FlashAttention-2" (2023):
             dv_j = Σ_i p_ij g_i            dp_ij = g_i·v_j
             ds_ij = p_ij (dp_ij − Σ_m p_im dp_im) = p_ij (dp_ij − δ_i),   δ_i = g_i·out_i   as Σ_m p_im v_m = out_i
             dx_ij = ds_ij (1 − tanh²(x_ij / c))
             dq_i = scale Σ_j dx_ij k_j     dk_j = scale Σ_i dx_ij q_i
             dsink_h = −Σ_i exp(sink_h − L_i) δ_i, as its dp is 0
         Nothing is given to bias. A fully masked query has the gradient of a sum that swallowed x_ij: as if s_ij were x_ij's
         function.
         p is computed again from L. dq by tiles of queries; dk and dv by tiles of keys, each program walking over the H / G heads
         of its group: no atomics, the same result in every run, and no copies of key and value.
Numbers  scores, sums and accumulators in fp32; p and dx are rounded to the inputs' dtype for their products, fp32 inputs are
         multiplied in fp32 (no TF32). Powers are of 2: log₂e goes into the scores, and L is kept in units of log 2.
         δ is made of out as it was rounded. In half precision dq's error is a half to two thirds of eager's where queries see a
         fifth of 60 keys or all, as large as eager's at three keys each, and 1.15 of it (up to 1.34) at one key each.
Saved    q, k, v, out, L [B, H, S] in fp32. lo, hi … are made once a step by ATen operations that all layers have in common.
Floor    2·(D + E) (forward) and 6·D + 4·E (backward, which does 8·D + 6·E) FLOPs for each seen pair (i, j) and each of B·H heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sloth.kernels.attention.interval_kernels import LOG2E, backward_kv_kernel, backward_q_kernel, forward_kernel
from sloth.kernels.common.device import device_of
from sloth.kernels.common.language import triton
from sloth.kernels.common.launch import launch, triton_op
from sloth.kernels.common.row_reduction import raise_on_double_backward


class Tile(NamedTuple):
    """Queries and keys of one step, warps of a program, loads in flight, and KiB of shared memory that an H100 takes for them."""

    queries: int
    keys: int
    warps: int
    stages: int
    shared: int = 0

    def kib(self, masked: bool) -> int:
        """With tiles of a mask, which are loaded ahead too; compiled for sm_90 it was two more than there are stages at most."""
        return self.shared + masked * self.queries * self.keys * (self.stages + 2) // 1024


# Tuning for 16-bit elements on an H200, by the width of a head padded to a power of two; the smallest that is wide enough. The
# first that fits is taken: 227 KiB are there on an H100, 163 on an A100, 99 on an RTX 4090.
FORWARD = {
    64: (Tile(64, 64, 4, 3, 56),),
    128: (Tile(64, 64, 4, 3, 112), Tile(64, 64, 4, 2, 80)),
    256: (Tile(128, 64, 8, 2, 192), Tile(64, 64, 4, 2, 160), Tile(64, 32, 4, 2, 96)),
}
BACKWARD_Q = {
    64: (Tile(64, 64, 4, 3, 64),),
    128: (Tile(64, 64, 4, 2, 96),),
    256: (Tile(128, 32, 8, 3, 224), Tile(64, 32, 4, 2, 128), Tile(64, 32, 4, 1, 96)),
}
BACKWARD_KV = {
    64: (Tile(64, 64, 4, 3, 65),),
    128: (Tile(32, 64, 4, 3, 81),),
    256: (Tile(64, 64, 8, 2, 193), Tile(32, 64, 8, 2, 128), Tile(32, 32, 4, 1, 80)),
}
SMALL = Tile(32, 32, 4, 1)  # for fp32, which tensor cores do not multiply, and where nothing else fits


# ---------------------------------------------------------------- operators


def _width(*heads: Tensor) -> int:
    return max(16, triton.next_power_of_2(max(x.shape[-1] for x in heads)))


def tile_of(table: dict[int, tuple[Tile, ...]], *heads: Tensor, masked: bool = False) -> Tile:
    """For heads of these widths; all are alike otherwise."""
    x, width = heads[0], _width(*heads)
    tiles = next(tiles for most, tiles in table.items() if width <= most) if x.element_size() == 2 else ()
    most = device_of(x.device).shared_memory
    return next((tile for tile in tiles if most is None or tile.kib(masked) * 1024 <= most), SMALL)


def _options(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, bias: Tensor | None, tile: Tile) -> dict:
    return dict(
        SCALE=scale, SOFTCAP=softcap, BIAS=bias is not None, GROUP=q.shape[1] // k.shape[1], D=q.shape[-1], BD=_width(q),
        E=v.shape[-1], BE=_width(v), BM=tile.queries, BN=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
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


def _dimensions(valid: Tensor | None) -> int:
    """Of what is seen, beside the batch."""
    return 0 if valid is None else valid.dim() - 1


def _bias_strides(bias: Tensor | None) -> tuple[int, int]:
    """By batch and head."""
    return (0, 0) if bias is None else (_batch_stride(bias), bias.stride(1))


def _like(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A buffer in [B, S, heads, width] order, as the projections around want it, which kernels write, and its view as x."""
    B, heads, S, _ = x.shape
    buffer = torch.empty(B, S, heads, width, dtype=x.dtype, device=x.device)  # not new_empty: of equal ones AOTAutograd makes one
    return buffer, buffer.transpose(1, 2)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is passed to kernels that do not read it."""
    return other if x is None else x


@triton_op("sloth::interval_attention", "attention")
def _interval_attention(
    query: Tensor, key: Tensor, value: Tensor, lo: Tensor, hi: Tensor, first: Tensor, last: Tensor, valid: Tensor | None,
    holes: Tensor | None, gaps: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None, bias: Tensor | None,
    fully_masked: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = map(_unit_stride, (query, key, value))
    B, H, S, _ = q.shape
    (buffer, out), lse = _like(q, v.shape[-1]), torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    tile, seen = tile_of(FORWARD, q, v, masked=_dimensions(valid) == 2), _or(valid, lo)
    launch(forward_kernel)[(_blocks(S, tile.queries), B * H)](
        q, k, v, buffer, lse, lo, hi, seen, _or(holes, lo), _or(sinks, lse), _or(bias, lse), S, k.shape[2], H,
        *_strides(q, k, v, out), _batch_stride(lo), _batch_stride(seen), *_bias_strides(bias),
        VALID=_dimensions(valid), SINKS=sinks is not None, FULLY_MASKED=fully_masked is not None,
        **_options(q, k, v, scale, softcap, bias, tile),
    )  # fmt: skip
    return out, lse


@triton_op("sloth::interval_attention_dq", "attention")
def _interval_attention_dq(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, lo: Tensor, hi: Tensor,
    valid: Tensor | None, holes: Tensor | None, scale: float, softcap: float | None, bias: Tensor | None, fully_masked: bool,
) -> Tensor:  # fmt: skip
    g, q, k, v = map(_unit_stride, (dout, query, key, value))
    B, H, S, D = q.shape
    buffer, dq = _like(q, D)
    tile, seen = tile_of(BACKWARD_Q, q, v, masked=_dimensions(valid) == 2), _or(valid, lo)
    launch(backward_q_kernel)[(_blocks(S, tile.queries), B * H)](
        q, k, v, g, buffer, lse, delta, lo, hi, seen, _or(holes, lo), _or(bias, lse), S, k.shape[2], H,
        *_strides(q, k, v, g, dq), _batch_stride(lo), _batch_stride(seen), *_bias_strides(bias),
        VALID=_dimensions(valid), FULLY_MASKED=fully_masked, **_options(q, k, v, scale, softcap, bias, tile),
    )  # fmt: skip
    return dq


@triton_op("sloth::interval_attention_dkv", "attention")
def _interval_attention_dkv(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, first: Tensor, last: Tensor, lo: Tensor,
    valid: Tensor | None, gaps: Tensor | None, scale: float, softcap: float | None, bias: Tensor | None,
    fully_masked: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    g, q, k, v = map(_unit_stride, (dout, query, key, value))
    B, G, T, D = k.shape
    (k_buffer, dk), (v_buffer, dv) = _like(k, D), _like(v, v.shape[-1])
    tile = tile_of(BACKWARD_KV, q, v, masked=_dimensions(valid) == 2)
    bounds, seen = _or(fully_masked, lo), _or(valid, lo)
    launch(backward_kv_kernel)[(_blocks(T, tile.keys), B * G)](
        q, k, v, g, k_buffer, v_buffer, lse, delta, first, last, lo, bounds, _or(bias, lse), seen, _or(gaps, lo),
        q.shape[2], T, G,
        *_strides(q, k, v, g, dk, dv), *map(_batch_stride, (first, lo, bounds)), *_bias_strides(bias), _batch_stride(seen),
        VALID=_dimensions(valid), FULLY_MASKED=fully_masked is not None, **_options(q, k, v, scale, softcap, bias, tile),
    )  # fmt: skip
    return dk, dv


interval_attention = torch.ops.sloth.interval_attention.default
"""interval_attention(query, key, value, lo, hi, first, last, valid, holes, gaps, scale, softcap, sinks, bias, fully_masked)
-> (out [B, H, S, E], L [B, H, S] over log 2)"""
interval_attention_dq = torch.ops.sloth.interval_attention_dq.default
interval_attention_dkv = torch.ops.sloth.interval_attention_dkv.default


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.softcap, sinks, bias, fully_masked = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, sinks, bias, fully_masked, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 15
    q, k, v, lo, hi, first, last, valid, holes, gaps, sinks, bias, fully_masked, out, lse = ctx.saved_tensors
    delta = (dout.float() * out.float()).sum(-1).contiguous()
    dq = dk = dv = dsinks = None
    if ctx.needs_input_grad[0]:
        more = (ctx.scale, ctx.softcap, bias, fully_masked is not None)
        dq = interval_attention_dq(dout, q, k, v, lse, delta, lo, hi, valid, holes, *more)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        more = (ctx.scale, ctx.softcap, bias, fully_masked)
        dk, dv = interval_attention_dkv(dout, q, k, v, lse, delta, first, last, lo, valid, gaps, *more)
    if ctx.needs_input_grad[12]:
        p = torch.exp2(sinks.float()[:, None] * LOG2E.value - lse)
        dsinks = -(p * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, *[None] * 9, dsinks, None, None


_interval_attention.register_autograd(_backward, setup_context=_setup)
_interval_attention_dq.register_autograd(raise_on_double_backward)
_interval_attention_dkv.register_autograd(raise_on_double_backward)


# ---------------------------------------------------------------- compiled for every target by the tests


def _compile_case(kernel, tile: Tile, D: int, E: int, dtype: str, softcap: float | None = None, sweep=(), **flags: int):
    """Tiles belong to a dtype, so it stands here and is not the target's. For the targets in `sweep` it takes long."""
    flags = dict.fromkeys(("VALID", "SINKS", "BIAS", "FULLY_MASKED"), 0) | flags
    types = dict.fromkeys(("valid_ptr", "holes_ptr", "gaps_ptr"), "*i1" if flags["VALID"] else "*i32")
    types |= dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32")
    types |= dict.fromkeys(("lo_ptr", "hi_ptr", "first_ptr", "last_ptr", "fully_masked_ptr"), "*i32")
    constants = dict(SCALE=0.1, SOFTCAP=softcap, GROUP=4, D=D, BD=D, E=E, BE=E, BM=tile.queries, BN=tile.keys, **flags)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    others = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, dtype if name.endswith("_ptr") else "i32") for name in others}
    shared = tile.shared and tile.kib(flags["VALID"] == 2)
    return kernel, signature, constants, {"num_warps": tile.warps, "num_stages": tile.stages, "shared": shared, "sweep": sweep}


def _holds(tiles: list[Tile]) -> Tile:
    """The first that a Hopper GPU's shared memory holds, the mask included."""
    return next(tile for tile in tiles if tile.kib(True) <= 227)


COMPILE = [
    case
    for kernel, table in ((forward_kernel, FORWARD), (backward_q_kernel, BACKWARD_Q), (backward_kv_kernel, BACKWARD_KV))
    for case in (
        _compile_case(kernel, table[64][0], 64, 64, "*fp16", VALID=1),
        _compile_case(kernel, table[128][0], 128, 64, "*fp16", 50.0, VALID=1, FULLY_MASKED=True, BIAS=True),
        _compile_case(kernel, table[128][0], 128, 128, "*fp16", VALID=2, sweep=("sm_75", "gfx942")),
        _compile_case(kernel, _holds(table[256]), 256, 256, "*fp16", VALID=2, sweep=("sm_75", "gfx942")),
        _compile_case(
            kernel, SMALL, 128, 128, "*fp32", 50.0, VALID=2, FULLY_MASKED=True, sweep=("sm_75", "sm_80", "sm_100", "gfx942")
        ),
        _compile_case(kernel, SMALL, 128, 128, "*fp32", 50.0, SINKS=True),
    )
]
