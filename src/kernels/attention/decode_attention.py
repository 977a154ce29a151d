"""Attention of one query a row over a cache of keys and values, as in generating, split along the cache.

    out = Σ_j p_j v_j,   p_j = exp(s_j − L),   s_j = cap(scale · q·k_j),   L = log Σ_j exp(s_j),   over the keys that are seen
    cap(x) = softcap · tanh(x / softcap)

Shapes   query [B, H, 1, D], key [B, G, T, D] and value [B, G, T, E] with H a multiple of G, each for H / G heads in a row, unit
         stride along D and E; seen [B or 1, T] bool; out [B, H, 1, E].
Dtypes   query, key and value in one: bf16, fp16 or fp32. Scores, sums and accumulators in fp32.

Nothing is differentiable. Two launches. A program takes some keys of one group: the queries of its heads are one tile, so that
keys and values are read once, and tiles of keys that are not seen are not read at all. It leaves m = max s_j, l = Σ e^(s_j − m)
and a = Σ e^(s_j − m) v_j. With M the largest m of all parts, out = Σ e^(m − M) a / Σ e^(m − M) l (Dao et al., "Flash-Decoding for
long-context inference", 2023). A query that sees nothing gives 0, or the mean of all values where `uniform`.
Bytes    those of the keys and values in tiles of which some key is seen, once: the floor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import launch_cached, no_derivative

TILE = 64  # keys of a step
KEYS, PARTS = 128, 64  # the least keys of a program, and the most programs that share a group
LEAST = tl.constexpr(-1e30)  # a score that is swallowed
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T"])
def _part_kernel(
    q_ptr, k_ptr, v_ptr, seen_ptr, m_ptr, l_ptr, a_ptr, T, q_b, q_h, k_b, k_g, k_t, v_b, v_g, v_t, seen_b, seen_t,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIFORM: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, KEYS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """m, l [B·H, parts] and a [B·H, parts, E] of KEYS keys. m is in units of log 2."""
    b, g = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64)  # a cache may have 2^31 elements
    part, parts = tl.program_id(1), tl.num_programs(1)
    h, d, e, n = tl.arange(0, GP), tl.arange(0, BD), tl.arange(0, BE), tl.arange(0, BN)
    q_at = b * q_b + (g * GROUP + h[:, None]) * q_h + d[None, :]
    q = tl.load(q_ptr + q_at, (h < GROUP)[:, None] & (d < D)[None, :], 0.0)
    m = tl.full([GP], LEAST, tl.float32)
    l = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, BE], tl.float32)
    for start in range(part * KEYS, tl.minimum(T, (part + 1) * KEYS), BN):
        t = start + n
        inside = t < T
        seen = tl.load(seen_ptr + b * seen_b + t * seen_t, inside, 0).to(tl.int1)
        wanted = 1 if UNIFORM else tl.max(seen.to(tl.int32), 0)
        if wanted > 0:
            at = t.to(tl.int64)
            k = tl.load(k_ptr + b * k_b + g * k_g + at[None, :] * k_t + d[:, None], inside[None, :] & (d < D)[:, None], 0.0)
            s = tl.dot(q, k, input_precision="ieee") * SCALE
            if SOFTCAP is not None:
                s = SOFTCAP * (2 * tl.sigmoid(2 * s / SOFTCAP) - 1)
            s *= LOG2E
            s = tl.where(seen[None, :], s, LEAST)
            newest = tl.maximum(m, tl.max(s, 1))
            p = tl.where(inside[None, :] if UNIFORM else seen[None, :], tl.exp2(s - newest[:, None]), 0.0)
            shrink = tl.exp2(m - newest)
            v = tl.load(v_ptr + b * v_b + g * v_g + at[:, None] * v_t + e[None, :], inside[:, None] & (e < E)[None, :], 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            l = l * shrink + tl.sum(p, 1)
            m = newest
    to = (b * G * GROUP + g * GROUP + h) * parts + part
    tl.store(m_ptr + to, m, h < GROUP)
    tl.store(l_ptr + to, l, h < GROUP)
    tl.store(a_ptr + to[:, None] * E + e[None, :], acc, (h < GROUP)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(m_ptr, l_ptr, a_ptr, out_ptr, parts, PARTS: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """One row of out."""
    row = tl.program_id(0)
    i, e = tl.arange(0, PARTS), tl.arange(0, BE)
    there = i < parts
    m = tl.load(m_ptr + row * parts + i, there, LEAST)
    weight = tl.where(there, tl.exp2(m - tl.max(m, 0)), 0.0)
    total = tl.sum(weight * tl.load(l_ptr + row * parts + i, there, 0.0), 0)
    a = tl.load(a_ptr + (row * parts + i[:, None]) * E + e[None, :], there[:, None] & (e < E)[None, :], 0.0)
    out = tl.sum(a * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * E + e, out.to(out_ptr.dtype.element_ty), e < E)


# ---------------------------------------------------------------- launches


def _width(n: int) -> int:
    """A power of two that a tensor core's product takes."""
    return max(16, 1 << (n - 1).bit_length())


def _constants(scale: float, softcap: float | None, uniform: bool, H: int, G: int, D: int, E: int, keys: int) -> dict:
    group = H // G
    return {
        "SCALE": scale, "SOFTCAP": softcap, "UNIFORM": uniform, "G": G, "GROUP": group, "GP": _width(group),
        "D": D, "BD": _width(D), "E": E, "BE": _width(E), "KEYS": keys, "BN": TILE,
    }  # fmt: skip


def _triton(query, key, value, seen, scale: float, softcap: float | None, uniform: bool) -> Tensor:
    (B, H, _, D), (_, G, T, E) = query.shape, value.shape
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    keys = KEYS
    while -(-T // keys) > PARTS:
        keys *= 2
    parts = -(-T // keys)
    m, l, a = (query.new_empty(B * H, parts, n, dtype=torch.float32) for n in (1, 1, E))
    out = query.new_empty(B, H, 1, E, dtype=value.dtype)
    strides = [query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3], seen.stride(0) * (seen.shape[0] > 1)]
    constants = _constants(scale, softcap, uniform, H, G, D, E, keys)
    launch_cached(
        _part_kernel, (B * G, parts), [query, key, value, seen, m, l, a], [T, *strides, seen.stride(1)], constants, num_warps=4
    )
    most = {"PARTS": 1 << (parts - 1).bit_length(), "E": E, "BE": constants["BE"]}
    launch_cached(_merge_kernel, (B * H,), [m, l, a, out], [parts], most, num_warps=4)
    return out


def _aten(query, key, value, seen, scale: float, softcap: float | None, uniform: bool) -> Tensor:
    mask, grouped = seen[:, None, None], query.shape[1] != key.shape[1]
    if softcap is None and not uniform:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
    dtype = torch.promote_types(query.dtype, torch.float32)
    k, v = (t.to(dtype).repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    s = query.to(dtype) @ k.mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    p = s.masked_fill(~mask, torch.finfo(dtype).min).softmax(-1)
    return ((p if uniform else p * mask) @ v).to(value.dtype)


# ---------------------------------------------------------------- the operator

torch.library.define(
    "sloth::decode_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor seen, float scale, float? softcap=None, bool uniform=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def takes(query: Tensor, value: Tensor) -> bool:
    """Are the kernels made for heads of these widths? In fp32, which no tensor core multiplies, a tile must fit in registers."""
    width = max(query.shape[3], value.shape[3])
    return width <= (256 if query.element_size() == 2 else 64)


@falls_back("sloth::decode_attention", "attention_by_mask")
def compute_decode_attention(query, key, value, seen, scale, softcap=None, uniform=False) -> Tensor:
    """The operator's result, for operands that were checked when the graph was traced."""
    return _decode_for(query)(query, key, value, seen, scale, softcap, uniform)


_decode_for = implementations("sloth::decode_attention", triton=_triton, aten=_aten)


def _check(query, key, value, seen) -> None:
    """What holds for all lengths; these are compared where they are computed with, as no graph is for one of them."""
    no_derivative(query, key, value)
    (B, H, S, D), G = query.shape, key.shape[1]
    told = (
        f"decode_attention: query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}, seen {list(seen.shape)}"
    )
    torch._check(S == 1 and H % G == 0 and key.shape[3] == D and value.shape[1] == G, lambda: told)
    torch._check(key.shape[0] == value.shape[0] == B and seen.dim() == 2 and seen.dtype == torch.bool, lambda: told)


@torch.library.impl("sloth::decode_attention", "CompositeExplicitAutograd")
def decode_attention_impl(query, key, value, seen, scale, softcap=None, uniform=False):
    _check(query, key, value, seen)
    lengths = key.shape[2], value.shape[2], seen.shape[1]
    torch._check(
        seen.shape[0] in (1, query.shape[0]), lambda: f"decode_attention: {seen.shape[0]} masks of {query.shape[0]} rows"
    )
    torch._check(len(set(lengths)) == 1, lambda: f"decode_attention: keys, values and mask of lengths {lengths}")
    return compute_decode_attention(query, key, value, seen, scale, softcap, uniform)


@torch.library.register_fake("sloth::decode_attention")
def decode_attention_fake(query, key, value, seen, scale, softcap=None, uniform=False):
    _check(query, key, value, seen)
    return query.new_empty(*query.shape[:3], value.shape[3], dtype=value.dtype)


decode_attention = torch.ops.sloth.decode_attention.default
"""decode_attention(query, key, value, seen, scale, softcap=None, uniform=False) -> [B, H, 1, E]"""


def _compile_case(**more):
    strides = ("q_b", "q_h", "k_b", "k_g", "k_t", "v_b", "v_g", "v_t", "seen_b", "seen_t")
    pointers = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "seen_ptr": "*i1"}
    signature = pointers | dict.fromkeys(("m_ptr", "l_ptr", "a_ptr"), "*fp32") | dict.fromkeys(("T", *strides), "i32")
    given = {"scale": 0.1, "softcap": None, "uniform": False, "H": 32, "G": 8, "D": 128, "E": 128, "keys": 128} | more
    return _part_kernel, signature, _constants(**given), {"num_warps": 4}


COMPILE = [
    _compile_case(),
    _compile_case(softcap=30.0, uniform=True, H=8, D=256, E=256, keys=256),
    (
        _merge_kernel,
        {"m_ptr": "*fp32", "l_ptr": "*fp32", "a_ptr": "*fp32", "out_ptr": "*bf16", "parts": "i32"},
        {"PARTS": 32, "E": 128, "BE": 128},
        {"num_warps": 4},
    ),
]
