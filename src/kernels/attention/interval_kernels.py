"""The Triton kernels of `interval_attention.py`, which has the formulas.

Names end in the sizes of a tile: M queries, N keys, D channels of queries and keys, E of values. Strides: tensor_dimension.
What masks and scores may have besides is constant (VALID, SOFTCAP, SINKS, BIAS, FULLY_MASKED): a kernel holds what it needs.
VALID is how many dimensions `valid` has beside the batch: 0, none is given; 1, keys; 2, it is the mask, of queries and keys.
"""

from sloth.kernels.common.language import tl, triton
from sloth.kernels.loss.cross_entropy import _tanh

LOG2E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------- tiles


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
    start = tl.maximum(least, 0) // BLOCK * BLOCK
    tiles = tl.maximum(tl.cdiv(most + 1 - start, BLOCK), 0)
    whole = tl.maximum(tl.cdiv(tl.maximum(whole_from, 0), BLOCK) * BLOCK, start)
    return start, tiles, whole, tl.minimum(tl.maximum((whole_to + 1 - whole) // BLOCK, 0), tiles)


@triton.jit
def _tile(i, start, whole, wholes, REST: tl.constexpr, BLOCK: tl.constexpr):
    """Where the i-th of the whole tiles begins, or of the others, which lie before and behind them."""
    if REST:
        at = start + i * BLOCK
        return tl.where(at < whole, at, at + wholes * BLOCK)
    return whole + i * BLOCK


@triton.jit
def _place(H, BM: tl.constexpr):
    """Of program (tile, b·H + h): b, h and its queries. The last tile comes first: in causal masks it is the longest.

    By itself, since results are stored where it says: torch takes every pointer that has a part in an address, as an argument of
    a call whose result is one, to be written to.
    """
    pid = tl.program_id(1).to(tl.int64)
    return pid // H, pid % H, (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)


@triton.jit
def _queries(S, at_M, b, lo_ptr, hi_ptr, holes_ptr, lo_b, BN: tl.constexpr, VALID: tl.constexpr):
    """The intervals of these queries, and the walk over all of them."""
    bounds = b * lo_b + tl.minimum(at_M, S - 1)  # rows beyond the last do as it does
    lo_M, hi_M = tl.load(lo_ptr + bounds), tl.load(hi_ptr + bounds)
    start, tiles, whole, wholes = _walk(tl.min(lo_M), tl.max(hi_M), tl.max(lo_M), tl.min(hi_M), BN)
    if VALID:
        wholes = tl.where(tl.max(tl.load(holes_ptr + bounds).to(tl.int32)) > 0, 0, wholes)
    return lo_M, hi_M, start, tiles, whole, wholes


# ---------------------------------------------------------------- scores


@triton.jit
def _scores(qk, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Scores of products q·k, over log 2, and their derivatives by SCALE · q·k."""
    if SOFTCAP is not None:
        t, derivative = _tanh(qk * (SCALE / SOFTCAP), EXACT)
        s = t * (SOFTCAP * LOG2E)
    else:
        s, derivative = qk * (SCALE * LOG2E), 1.0
    return s, derivative


@triton.jit
def _bias(bias_ptr, at, limit, BIAS: tl.constexpr):
    """The bias of these keys. Scores are given its difference to that of the query's own position, which changes no softmax:
    where biases count positions, that is small for the keys that weigh most."""
    if BIAS:
        return tl.load(bias_ptr + at, at < limit, 0.0).to(tl.float32)
    else:  # or Triton looks at both returns
        return 0.0


@triton.jit
def _seen_scores(
    q_MD, k_ND, at_N, bias_M, bias_ptr, lo_M, hi_M, valid_ptr, T,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr, VALID: tl.constexpr,
    FULLY_MASKED: tl.constexpr,
):  # fmt: skip
    """Scores [M, N], −∞ for what is not seen (of a whole tile all is), all alike for fully masked queries; derivatives."""
    qk = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
    s, derivative = _scores(qk, SCALE, SOFTCAP, k_ND.dtype == tl.float32)
    if BIAS:
        s += (_bias(bias_ptr, at_N, T, BIAS)[None, :] - bias_M[:, None]) * LOG2E
    if not WHOLE and VALID < 2:
        s = tl.where((lo_M[:, None] <= at_N[None, :]) & (at_N[None, :] <= hi_M[:, None]), s, -float("inf"))
    if not WHOLE and VALID == 1:
        s = tl.where(tl.load(valid_ptr + at_N, at_N < T, 0).to(tl.int1)[None, :], s, -float("inf"))
    if not WHOLE and VALID == 2:  # a pointer for each query
        s = tl.where(tl.load(valid_ptr[:, None] + at_N[None, :], (at_N < T)[None, :], 0).to(tl.int1), s, -float("inf"))
    if FULLY_MASKED:
        s = tl.where((lo_M < 0)[:, None] & (at_N < T)[None, :], 0.0, s)
    return s, derivative


@triton.jit
def _valid(valid_ptr, at_M, S, T, VALID: tl.constexpr):
    """A pointer to the row of keys that all of these queries have, or to that of each."""
    if VALID == 2:
        return valid_ptr + tl.minimum(at_M, S - 1).to(tl.int64) * T
    else:
        return valid_ptr


# ---------------------------------------------------------------- forward


@triton.jit
def _attend(
    acc_ME, m_M, l_M, q_MD, bias_M, bias_ptr, k_ptr, v_ptr, k_t, v_t, start, lo_M, hi_M, valid_ptr, T,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, VALID: tl.constexpr, FULLY_MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, in the online softmax."""
    at_N = start + tl.arange(0, BN)
    k_ND = _rows(k_ptr, at_N, k_t, T, D, BD)
    s, _ = _seen_scores(
        q_MD, k_ND, at_N, bias_M, bias_ptr, lo_M, hi_M, valid_ptr, T, SCALE, SOFTCAP, BIAS, WHOLE, VALID, FULLY_MASKED
    )
    new_M = tl.maximum(m_M, tl.max(s, 1))
    finite_M = tl.where(new_M == -float("inf"), 0.0, new_M)  # nothing seen yet: no −∞ − (−∞)
    p = tl.exp2(s - finite_M[:, None])
    shrunk_M = tl.exp2(m_M - finite_M)
    v_NE = _rows(v_ptr, at_N, v_t, T, E, BE)
    acc_ME = tl.dot(p.to(v_NE.dtype), v_NE, acc_ME * shrunk_M[:, None], input_precision="ieee")
    return acc_ME, new_M, l_M * shrunk_M + tl.sum(p, 1)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr, valid_ptr, holes_ptr, sinks_ptr, bias_ptr, S, T, H,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_s, lo_b, valid_b, bias_b, bias_h,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, VALID: tl.constexpr, SINKS: tl.constexpr, BIAS: tl.constexpr,
    FULLY_MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one head."""
    b, h, at_M = _place(H, BM)
    lo_M, hi_M, start, tiles, whole, wholes = _queries(S, at_M, b, lo_ptr, hi_ptr, holes_ptr, lo_b, BN, VALID)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    valid_ptr = _valid(valid_ptr + b * valid_b, at_M, S, T, VALID)
    q_MD = _rows(q_ptr + b * q_b + h * q_h, at_M, q_s, S, D, BD)
    bias_ptr += b * bias_b + h * bias_h
    bias_M = _bias(bias_ptr, at_M, S, BIAS)
    acc_ME = tl.zeros([BM, BE], tl.float32)
    m_M = tl.full([BM], -float("inf"), tl.float32)
    l_M = tl.zeros([BM], tl.float32)
    if SINKS:
        m_M = l_M + tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        l_M += 1.0
    for rest in tl.static_range(2):
        for i in range(tiles - wholes if rest else wholes):
            acc_ME, m_M, l_M = _attend(
                acc_ME, m_M, l_M, q_MD, bias_M, bias_ptr, k_ptr, v_ptr, k_t, v_t, _tile(i, start, whole, wholes, rest, BN),
                lo_M, hi_M, valid_ptr, T, SCALE, SOFTCAP, BIAS, D, BD, E, BE, BN, rest == 0, VALID, FULLY_MASKED,
            )  # fmt: skip
    seen_M = l_M > 0
    lse_M = tl.where(seen_M, m_M + tl.log2(tl.where(seen_M, l_M, 1.0)), float("inf"))  # ∞: every p of the backward pass is 0
    out_ME = acc_ME / tl.where(seen_M, l_M, 1.0)[:, None]
    _store_rows(out_ptr + b * out_b + h * out_h, out_ME, at_M, out_s, S, E, BE)
    tl.store(lse_ptr + (b * H + h) * S + at_M, lse_M, at_M < S)


# ---------------------------------------------------------------- backward


@triton.jit
def _add_dq(
    dq_MD, q_MD, g_ME, lse_M, delta_M, bias_M, bias_ptr, k_ptr, v_ptr, k_t, v_t, start, lo_M, hi_M, valid_ptr, T,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, VALID: tl.constexpr, FULLY_MASKED: tl.constexpr,
):  # fmt: skip
    at_N = start + tl.arange(0, BN)
    k_ND, v_NE = _rows(k_ptr, at_N, k_t, T, D, BD), _rows(v_ptr, at_N, v_t, T, E, BE)
    s, derivative = _seen_scores(
        q_MD, k_ND, at_N, bias_M, bias_ptr, lo_M, hi_M, valid_ptr, T, SCALE, SOFTCAP, BIAS, WHOLE, VALID, FULLY_MASKED
    )
    p = tl.exp2(s - lse_M[:, None])
    ds = p * (tl.dot(g_ME, tl.trans(v_NE), input_precision="ieee") - delta_M[:, None]) * derivative
    return tl.dot(ds.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")


@triton.jit
def backward_q_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, dq_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, valid_ptr, holes_ptr, bias_ptr, S, T, H,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_s, dq_b, dq_h, dq_s, lo_b, valid_b, bias_b, bias_h,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, VALID: tl.constexpr, BIAS: tl.constexpr, FULLY_MASKED: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, programs as in the forward pass."""
    b, h, at_M = _place(H, BM)
    lo_M, hi_M, start, tiles, whole, wholes = _queries(S, at_M, b, lo_ptr, hi_ptr, holes_ptr, lo_b, BN, VALID)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    valid_ptr = _valid(valid_ptr + b * valid_b, at_M, S, T, VALID)
    q_MD = _rows(q_ptr + b * q_b + h * q_h, at_M, q_s, S, D, BD)
    g_ME = _rows(g_ptr + b * g_b + h * g_h, at_M, g_s, S, E, BE)
    bias_ptr += b * bias_b + h * bias_h
    bias_M = _bias(bias_ptr, at_M, S, BIAS)
    lse_M = tl.load(lse_ptr + (b * H + h) * S + at_M, at_M < S, float("inf"))
    delta_M = tl.load(delta_ptr + (b * H + h) * S + at_M, at_M < S, 0.0)
    dq_MD = tl.zeros([BM, BD], tl.float32)
    for rest in tl.static_range(2):
        for i in range(tiles - wholes if rest else wholes):
            dq_MD = _add_dq(
                dq_MD, q_MD, g_ME, lse_M, delta_M, bias_M, bias_ptr, k_ptr, v_ptr, k_t, v_t,
                _tile(i, start, whole, wholes, rest, BN), lo_M, hi_M, valid_ptr, T,
                SCALE, SOFTCAP, BIAS, D, BD, E, BE, BN, rest == 0, VALID, FULLY_MASKED,
            )  # fmt: skip
    _store_rows(dq_ptr + b * dq_b + h * dq_h, dq_MD * SCALE, at_M, dq_s, S, D, BD)


REST, OF_FULLY_MASKED = tl.constexpr(1), tl.constexpr(2)  # parts of the keys' walk; 0: tiles of queries that see them all


@triton.jit
def _add_dkv(
    dk_ND, dv_NE, k_ND, v_NE, at_N, bias_N, bias_ptr, q_ptr, g_ptr, lse_ptr, delta_ptr, lo_ptr, valid_ptr, q_s, g_s, start,
    first_N, last_N, S, T,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, BM: tl.constexpr, VALID: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    at_M = start + tl.arange(0, BM)
    q_MD, g_ME = _rows(q_ptr, at_M, q_s, S, D, BD), _rows(g_ptr, at_M, g_s, S, E, BE)
    lse_M = tl.load(lse_ptr + at_M, at_M < S, float("inf"))
    delta_M = tl.load(delta_ptr + at_M, at_M < S, 0.0)
    qk = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee")
    s, derivative = _scores(qk, SCALE, SOFTCAP, k_ND.dtype == tl.float32)
    if BIAS:
        s += (bias_N[:, None] - _bias(bias_ptr, at_M, S, BIAS)[None, :]) * LOG2E
    if PART == OF_FULLY_MASKED:
        fully_masked_M = tl.load(lo_ptr + at_M, at_M < S, 0) < 0
        s = tl.where(fully_masked_M[None, :], 0.0, -float("inf")) + tl.zeros_like(s)
    p = tl.exp2(s - lse_M[None, :])
    if PART == REST and VALID == 2:
        seen = tl.load(_valid(valid_ptr, at_M, S, T, VALID)[None, :] + at_N[:, None], (at_N < T)[:, None], 0)
        p = tl.where(seen.to(tl.int1), p, 0.0)
    elif PART == REST:
        p = tl.where((first_N[:, None] <= at_M[None, :]) & (at_M[None, :] <= last_N[:, None]), p, 0.0)
    dv_NE = tl.dot(p.to(g_ME.dtype), g_ME, dv_NE, input_precision="ieee")
    ds = p * (tl.dot(v_NE, tl.trans(g_ME), input_precision="ieee") - delta_M[None, :]) * derivative
    return tl.dot(ds.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee"), dv_NE


@triton.jit
def backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, lo_ptr, fully_masked_ptr, bias_ptr,
    valid_ptr, gaps_ptr, S, T, G,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_s, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    first_b, lo_b, fully_masked_b, bias_b, bias_h, valid_b,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, VALID: tl.constexpr, BIAS: tl.constexpr, FULLY_MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, tile by tile of the queries of its group's heads: program (tile, b·G + group)."""
    pid = tl.program_id(1).to(tl.int64)
    b, kv_h = pid // G, pid % G
    at_N = tl.program_id(0) * BN + tl.arange(0, BN)
    bounds = b * first_b + tl.minimum(at_N, T - 1)
    first_N, last_N = tl.load(first_ptr + bounds), tl.load(last_ptr + bounds)
    start, tiles, whole, wholes = _walk(tl.min(first_N), tl.max(last_N), tl.max(first_N), tl.min(last_N), BM)
    if VALID == 2:
        wholes = tl.where(tl.max(tl.load(gaps_ptr + bounds).to(tl.int32)) > 0, 0, wholes)
    fully_masked_start, fully_masked_tiles = 0, 0
    if FULLY_MASKED:
        fully_masked_ptr += b * fully_masked_b
        fully_masked_start = tl.load(fully_masked_ptr) // BM * BM
        fully_masked_tiles = tl.maximum(tl.cdiv(tl.load(fully_masked_ptr + 1) + 1 - fully_masked_start, BM), 0)
    k_ND = _rows(k_ptr + b * k_b + kv_h * k_h, at_N, k_t, T, D, BD)
    v_NE = _rows(v_ptr + b * v_b + kv_h * v_h, at_N, v_t, T, E, BE)
    dk_ND = tl.zeros([BN, BD], tl.float32)
    dv_NE = tl.zeros([BN, BE], tl.float32)
    for member in range(GROUP):
        h = kv_h * GROUP + member
        q_at, g_at, row = q_ptr + b * q_b + h * q_h, g_ptr + b * g_b + h * g_h, (b * G * GROUP + h) * S
        bias_at = bias_ptr + b * bias_b + h * bias_h
        bias_N = _bias(bias_at, at_N, T, BIAS)
        for part in tl.static_range(3 if FULLY_MASKED else 2):
            for i in range(fully_masked_tiles if part == OF_FULLY_MASKED else tiles - wholes if part == REST else wholes):
                at = fully_masked_start + i * BM if part == OF_FULLY_MASKED else _tile(i, start, whole, wholes, part == REST, BM)
                dk_ND, dv_NE = _add_dkv(
                    dk_ND, dv_NE, k_ND, v_NE, at_N, bias_N, bias_at, q_at, g_at, lse_ptr + row, delta_ptr + row,
                    lo_ptr + b * lo_b, valid_ptr + b * valid_b, q_s, g_s, at, first_N, last_N, S, T,
                    SCALE, SOFTCAP, BIAS, D, BD, E, BE, BM, VALID, part,
                )  # fmt: skip
    _store_rows(dk_ptr + b * dk_b + kv_h * dk_h, dk_ND * SCALE, at_N, dk_t, T, D, BD)
    _store_rows(dv_ptr + b * dv_b + kv_h * dv_h, dv_NE, at_N, dv_t, T, E, BE)
