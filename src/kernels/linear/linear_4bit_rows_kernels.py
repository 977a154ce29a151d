"""The kernels of linear_4bit_rows.py: what few rows of x and adapters give, and the rows of y by packed weights."""

from sloth.kernels.common.language import tl, triton
from sloth.kernels.linear.dequantize_4bit import _table
from sloth.kernels.linear.lookup_4bit import look_up, table_of


@triton.jit
def _down(
    x_ptr, a_ptr, t_ptr, K, n_t, M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, AT: tl.constexpr, S: tl.constexpr,
    COLUMNS: tl.constexpr, BK: tl.constexpr, TENSOR_CORES: tl.constexpr,
):  # fmt: skip
    """t[split, m, AT + r]: of COLUMNS columns."""
    MP: tl.constexpr = 16 if TENSOR_CORES else M
    split = tl.program_id(1)
    m = tl.arange(0, MP)
    r = tl.arange(0, RP)
    acc = tl.zeros([MP, RP] if TENSOR_CORES else [MP, RP, BK], tl.float32)
    for start in range(0, COLUMNS, BK):
        k = split * COLUMNS + start + tl.arange(0, BK)
        a = tl.load(a_ptr + r[:, None] * K + k[None, :], (r < R)[:, None] & (k < K)[None, :], 0.0)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], 0.0)
        if not TENSOR_CORES:
            acc += x.to(tl.float32)[:, None, :] * a.to(tl.float32)[None, :, :]
        elif a.dtype == x.dtype:
            acc = tl.dot(x, tl.trans(a), acc)
        else:
            acc = tl.dot(x.to(tl.float32), tl.trans(a.to(tl.float32)), acc, input_precision="ieee")
    t = (acc if TENSOR_CORES else tl.sum(acc, 2)) * S
    tl.store(t_ptr + (split * M + m[:, None]) * n_t + AT + r[None, :], t, (m < M)[:, None] & (r < R)[None, :])


@triton.jit
def down_kernel(
    x_ptr, a_0_ptr, a_1_ptr, a_2_ptr, t_ptr, K, n_t,
    M: tl.constexpr, R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,
    RP_0: tl.constexpr, RP_1: tl.constexpr, RP_2: tl.constexpr, S_0: tl.constexpr, S_1: tl.constexpr, S_2: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, TENSOR_CORES: tl.constexpr,
):  # fmt: skip
    """A program for one of up to three adapters and some columns."""
    i = tl.program_id(0)
    if i == 0:
        _down(x_ptr, a_0_ptr, t_ptr, K, n_t, M, R_0, RP_0, 0, S_0, COLUMNS, TILE // RP_0, TENSOR_CORES)
    elif i == 1:
        _down(x_ptr, a_1_ptr, t_ptr, K, n_t, M, R_1, RP_1, R_0, S_1, COLUMNS, TILE // RP_1, TENSOR_CORES)
    else:
        _down(x_ptr, a_2_ptr, t_ptr, K, n_t, M, R_2, RP_2, R_0 + R_1, S_2, COLUMNS, TILE // RP_2, TENSOR_CORES)


@triton.jit
def _widened(four, dtype: tl.constexpr):
    """The four elements of 16 bits that an int64 holds, in fp32."""
    one, two = four.to(tl.int32), (four >> 32).to(tl.int32)
    if dtype == tl.bfloat16:  # the upper half of a float
        x0, x1 = (one << 16).to(tl.float32, bitcast=True), (one & -65536).to(tl.float32, bitcast=True)
        x2, x3 = (two << 16).to(tl.float32, bitcast=True), (two & -65536).to(tl.float32, bitcast=True)
    else:
        x0 = (one & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x1 = (one >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x2 = (two & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x3 = (two >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def _products(x_ptr, at, inside, word, table, sums, LANES: tl.constexpr):
    """sums [M, BN, C] and the products of eight elements of x, from fours at `at` [M, C] on, with those of word [BN, C]."""
    four = x_ptr.to(tl.pointer_type(tl.int64))
    x0, x1, x2, x3 = _widened(tl.load(four + at, inside, 0), x_ptr.dtype.element_ty)
    x4, x5, x6, x7 = _widened(tl.load(four + at + 1, inside, 0), x_ptr.dtype.element_ty)
    e0, e1, e2, e3, e4, e5, e6, e7 = look_up(word, table, LANES)
    sums += x0[:, None, :] * e0[None, :, :]
    sums += x1[:, None, :] * e1[None, :, :]
    sums += x2[:, None, :] * e2[None, :, :]
    sums += x3[:, None, :] * e3[None, :, :]
    sums += x4[:, None, :] * e4[None, :, :]
    sums += x5[:, None, :] * e5[None, :, :]
    sums += x6[:, None, :] * e6[None, :, :]
    sums += x7[:, None, :] * e7[None, :, :]
    return sums


@triton.jit
def _scales(absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, at, inside, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr):
    if NESTED:
        q = tl.load(absmax_8bit_ptr + at, inside, 0).to(tl.int32)
        outer = tl.load(absmax_ptr + at.to(tl.uint32) // NESTED_BLOCK, inside, 0.0)  # unsigned: one shift
        product = tl.where(inside, tl.load(code8_ptr + q) * outer, 0.0)  # rounded: no compiler adds through a choice
        scale = tl.where(inside, product + tl.load(offset_ptr), 0.0)
    else:
        scale = tl.load(absmax_ptr + at, inside, 0.0)
    return scale


@triton.jit
def _by_element(
    x_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, n, n_inside, HALF_K,
    M: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[M, BN]. A thread has eight bytes of some rows at a time, so that the 16 elements of x in its registers serve all of these,
    and nothing is exchanged before the end. No size says that more bytes lie side by side: they would go to one thread.
    """
    WORDS: tl.constexpr = BLOCKS * HALF // 8
    m = tl.arange(0, M)
    table = table_of(LANES, CODE)
    row, row_blocks = n * (HALF_K // 8), n * (HALF_K // HALF)
    acc = tl.zeros([M, BN, WORDS], tl.float32)
    for step in tl.range(0, (HALF_K // 8 + WORDS - 1) // WORDS, num_stages=STAGES):
        w = step * WORDS + tl.arange(0, WORDS)
        inside = w < HALF_K // 8
        both = n_inside[:, None] & inside[None, :]
        word = tl.load(packed_ptr.to(tl.pointer_type(tl.int64)) + (row[:, None] + w[None, :]), both, 0)
        block = row_blocks[:, None] + (w // (HALF // 8))[None, :]
        scale = _scales(absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, block, both, NESTED, NESTED_BLOCK)
        x_at, x_inside = m[:, None] * (HALF_K // 2) + 4 * w[None, :], inside[None, :]
        sums = _products(x_ptr, x_at, x_inside, word.to(tl.int32), table, tl.zeros([M, BN, WORDS], tl.float32), LANES)
        sums = _products(x_ptr, x_at + 2, x_inside, (word >> 32).to(tl.int32), table, sums, LANES)
        acc += sums * scale[None, :, :]
    return tl.sum(acc, 2)


@triton.jit
def _by_tensor_cores(
    x_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, n, n_inside, HALF_K,
    M: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[16, BN], of M rows: the even columns and the odd ones each by themselves. The values are gathered in shared memory, which
    the tiles of W pass anyway on their way to tensor cores: shuffles were no faster.
    """
    STEP: tl.constexpr = BLOCKS * HALF
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.arange(0, 16)
    row = n.to(tl.int64) * HALF_K
    n_blocks = HALF_K // HALF  # of a row
    table = _table(CODE)
    acc = tl.zeros([16, BN], tl.float32)
    for step in tl.range(0, (n_blocks + BLOCKS - 1) // BLOCKS, num_stages=STAGES):
        block = step * BLOCKS + tl.arange(0, BLOCKS)
        b_inside = n_inside[:, None] & (block < n_blocks)[None, :]
        scale_at = n[:, None].to(tl.int64) * n_blocks + block[None, :]
        scale = _scales(absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, scale_at, b_inside, NESTED, NESTED_BLOCK)
        here = step * STEP + tl.arange(0, STEP)
        pair = tl.load(packed_ptr + row[:, None] + here[None, :], n_inside[:, None] & (here < HALF_K)[None, :], 0)
        flat = tl.reshape(pair, [BN * STEP]).to(tl.int32)
        even, odd = tl.gather(table, flat >> 4, 0), tl.gather(table, flat & 15, 0)
        even = tl.reshape(tl.reshape(even, [BN, BLOCKS, HALF]) * scale[:, :, None], [BN, STEP]).to(dtype)
        odd = tl.reshape(tl.reshape(odd, [BN, BLOCKS, HALF]) * scale[:, :, None], [BN, STEP]).to(dtype)
        k = step * (2 * STEP) + tl.arange(0, 2 * STEP)
        x_inside = (m < M)[:, None] & (k < 2 * HALF_K)[None, :]
        x = tl.load(x_ptr + m[:, None] * (2 * HALF_K) + k[None, :], x_inside, 0.0)
        x_even, x_odd = tl.split(tl.reshape(x, [16, STEP, 2]))
        acc = tl.dot(x_even, tl.trans(even), acc)
        acc = tl.dot(x_odd, tl.trans(odd), acc)
    return acc


@triton.jit
def _rows(
    program, x_ptr, t_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, bias_ptr, b_ptr, y_ptr,
    N, HALF_K, n_t,
    M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, AT: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr,
    BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr,
    LANES: tl.constexpr, TENSOR_CORES: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BN elements of each row of y. M: rows of x; RP: the rank R in a power of two, from column AT of t on; 0: no adapter."""
    n = program * BN + tl.arange(0, BN)
    n_inside = n < N
    if TENSOR_CORES:
        MP: tl.constexpr = 16
        m = tl.arange(0, MP)
        y = _by_tensor_cores(
            x_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, n, n_inside,
            HALF_K // 16 * 16,  # the same, and said to be a multiple: 16 bytes lie side by side
            M, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE, STAGES,
        )  # fmt: skip
    else:
        MP: tl.constexpr = M
        m = tl.arange(0, MP)
        y = _by_element(
            x_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, n, n_inside, HALF_K,
            M, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE, LANES, STAGES,
        )  # fmt: skip
    if RP > 0:
        r = tl.arange(0, RP)
        s = tl.arange(0, SP)
        t_inside = (s < S)[:, None, None] & (m < M)[None, :, None] & (r < R)[None, None, :]
        t_at = (s[:, None, None] * M + m[None, :, None]) * n_t + AT + r[None, None, :]
        t = tl.sum(tl.load(t_ptr + t_at, t_inside, 0.0), 0)
        b = tl.load(b_ptr + n[:, None] * R + r[None, :], n_inside[:, None] & (r < R)[None, :], 0.0).to(tl.float32)
        if TENSOR_CORES:
            y = tl.dot(t, tl.trans(b), y, input_precision="ieee")
        else:
            y += tl.sum(t[:, None, :] * b[None, :, :], 2)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, n_inside, 0.0).to(tl.float32)[None, :]
    y_inside = (m < M)[:, None] & n_inside[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), y_inside)


@triton.jit(do_not_specialize=["HALF_K"])
def rows_kernel(
    x_ptr, t_ptr,
    packed_0_ptr, absmax_0_ptr, absmax_8bit_0_ptr, code8_0_ptr, offset_0_ptr, bias_0_ptr, b_0_ptr, y_0_ptr,
    packed_1_ptr, absmax_1_ptr, absmax_8bit_1_ptr, code8_1_ptr, offset_1_ptr, bias_1_ptr, b_1_ptr, y_1_ptr,
    packed_2_ptr, absmax_2_ptr, absmax_8bit_2_ptr, code8_2_ptr, offset_2_ptr, bias_2_ptr, b_2_ptr, y_2_ptr,
    N_0, N_1, N_2, end_0, end_1, HALF_K, n_t,
    M: tl.constexpr, R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,
    RP_0: tl.constexpr, RP_1: tl.constexpr, RP_2: tl.constexpr,
    BIAS_0: tl.constexpr, BIAS_1: tl.constexpr, BIAS_2: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
    HALF: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr, LANES: tl.constexpr,
    TENSOR_CORES: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Up to three layers: the first by programs before `end_0`, the second by those before `end_1`."""
    program = tl.program_id(0)
    if program < end_0:
        _rows(
            program, x_ptr, t_ptr, packed_0_ptr, absmax_0_ptr, absmax_8bit_0_ptr, code8_0_ptr, offset_0_ptr, bias_0_ptr, b_0_ptr,
            y_0_ptr, N_0, HALF_K, n_t, M, R_0, RP_0, 0, BIAS_0, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE, LANES,
            TENSOR_CORES, S, SP, STAGES,
        )  # fmt: skip
    elif program < end_1:
        _rows(
            program - end_0, x_ptr, t_ptr, packed_1_ptr, absmax_1_ptr, absmax_8bit_1_ptr, code8_1_ptr, offset_1_ptr, bias_1_ptr,
            b_1_ptr, y_1_ptr, N_1, HALF_K, n_t, M, R_1, RP_1, R_0, BIAS_1, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE,
            LANES, TENSOR_CORES, S, SP, STAGES,
        )  # fmt: skip
    else:
        _rows(
            program - end_1, x_ptr, t_ptr, packed_2_ptr, absmax_2_ptr, absmax_8bit_2_ptr, code8_2_ptr, offset_2_ptr, bias_2_ptr,
            b_2_ptr, y_2_ptr, N_2, HALF_K, n_t, M, R_2, RP_2, R_0 + R_1, BIAS_2, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE,
            LANES, TENSOR_CORES, S, SP, STAGES,
        )  # fmt: skip
