"""The kernels of linear_4bit_rows.py: what few rows of x and adapters give, and the rows of y by packed weights."""

from sloth.kernels.common.language import tl, triton
from sloth.kernels.linear.lookup_4bit import look_up, look_up_pairs, table_of


@triton.jit
def _down(
    x_ptr, a_ptr, t_ptr, K, n_t, M: tl.constexpr, R: tl.constexpr, AT: tl.constexpr, S: tl.constexpr,
    COLUMNS: tl.constexpr, MP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """t[split, m, AT + r]: of COLUMNS columns, for BR rows of A. Each thread has columns of its own."""
    split = tl.program_id(1)
    m, r = tl.arange(0, MP), tl.program_id(2) * BR + tl.arange(0, BR)
    if tl.program_id(2) * BR < R:
        acc = tl.zeros([MP, BR, BK], tl.float32)
        for start in range(0, COLUMNS, BK):
            k = split * COLUMNS + start + tl.arange(0, BK)
            a = tl.load(a_ptr + r[:, None] * K + k[None, :], (r < R)[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
            acc += x[:, None, :] * a[None, :, :]
        t = tl.sum(acc, 2) * S
        tl.store(t_ptr + (split * M + m[:, None]) * n_t + AT + r[None, :], t, (m < M)[:, None] & (r < R)[None, :])


@triton.jit
def down_kernel(
    x_ptr, a_0_ptr, a_1_ptr, a_2_ptr, t_ptr, K, n_t,
    M: tl.constexpr, R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,
    S_0: tl.constexpr, S_1: tl.constexpr, S_2: tl.constexpr,
    COLUMNS: tl.constexpr, MP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program for one of up to three adapters, some columns, and some rows of its A."""
    i = tl.program_id(0)
    if i == 0:
        _down(x_ptr, a_0_ptr, t_ptr, K, n_t, M, R_0, 0, S_0, COLUMNS, MP, BR, BK)
    elif i == 1:
        _down(x_ptr, a_1_ptr, t_ptr, K, n_t, M, R_1, R_0, S_1, COLUMNS, MP, BR, BK)
    else:
        _down(x_ptr, a_2_ptr, t_ptr, K, n_t, M, R_2, R_0 + R_1, S_2, COLUMNS, MP, BR, BK)


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
    """sums [BN, C] and the products of eight elements of x, from fours at `at` [C] on, with those of word [BN, C]."""
    four = x_ptr.to(tl.pointer_type(tl.int64))
    x0, x1, x2, x3 = _widened(tl.load(four + at, inside, 0), x_ptr.dtype.element_ty)
    x4, x5, x6, x7 = _widened(tl.load(four + at + 1, inside, 0), x_ptr.dtype.element_ty)
    e0, e1, e2, e3, e4, e5, e6, e7 = look_up(word, table, LANES)
    sums += x0[None, :] * e0
    sums += x1[None, :] * e1
    sums += x2[None, :] * e2
    sums += x3[None, :] * e3
    sums += x4[None, :] * e4
    sums += x5[None, :] * e5
    sums += x6[None, :] * e6
    sums += x7[None, :] * e7
    return sums


@triton.jit
def _scales(absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, at, inside, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr):
    if NESTED:
        q = tl.load(absmax_8bit_ptr + at, inside, 0).to(tl.int32)
        outer = tl.load(absmax_ptr + at.to(tl.uint32) // NESTED_BLOCK, inside, 0.0)  # unsigned: one shift
        scale = tl.where(inside, tl.load(code8_ptr + q) * outer + tl.load(offset_ptr), 0.0)
    else:
        scale = tl.load(absmax_ptr + at, inside, 0.0)
    return scale


@triton.jit
def _by_element(
    x_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, n, n_inside, HALF_K,
    BN: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BN, 1], of one row of x. A thread has eight bytes of some rows of W at a time, so that the 16 elements of x in its
    registers serve all of these, and nothing is exchanged before the end. No size says that more bytes lie side by side: they
    would go to one thread.
    """
    WORDS: tl.constexpr = BLOCKS * HALF // 8
    table = table_of(LANES, CODE)
    row, row_blocks = n * (HALF_K // 8), n * (HALF_K // HALF)
    acc = tl.zeros([BN, WORDS], tl.float32)
    for step in tl.range(0, (HALF_K // 8 + WORDS - 1) // WORDS, num_stages=STAGES):
        w = step * WORDS + tl.arange(0, WORDS)
        inside = w < HALF_K // 8
        both = n_inside[:, None] & inside[None, :]
        word = tl.load(packed_ptr.to(tl.pointer_type(tl.int64)) + (row[:, None] + w[None, :]), both, 0)
        block = row_blocks[:, None] + (w // (HALF // 8))[None, :]
        scale = _scales(absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, block, both, NESTED, NESTED_BLOCK)
        sums = _products(x_ptr, 4 * w, inside, word.to(tl.int32), table, tl.zeros([BN, WORDS], tl.float32), LANES)
        sums = _products(x_ptr, 4 * w + 2, inside, (word >> 32).to(tl.int32), table, sums, LANES)
        acc += sums * scale
    return tl.sum(acc, 1)[:, None]


@triton.jit
def _by_tensor_cores(
    x_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, n, n_inside, HALF_K,
    M: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, CODE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BN, MP], of M rows of x. Blocks lie side by side in one product of matrices, a warp has some of them, and the sum of each
    is scaled. Elements are never in memory: a byte becomes two values in the registers that tensor cores read.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m, j = tl.arange(0, MP), tl.arange(0, HALF)
    row = n.to(tl.int64) * HALF_K
    n_blocks = HALF_K // HALF  # of a row
    two = x_ptr.to(tl.pointer_type(tl.int32))  # elements that are multiplied with one byte
    acc = tl.zeros([BLOCKS, BN, MP], tl.float32)
    for step in tl.range(0, (n_blocks + BLOCKS - 1) // BLOCKS, num_stages=STAGES):
        block = step * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < n_blocks
        both = inside[:, None] & n_inside[None, :]
        scale_at = n[None, :].to(tl.int64) * n_blocks + block[:, None]
        scale = _scales(absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, scale_at, both, NESTED, NESTED_BLOCK)
        here = (block * HALF)[:, None, None]
        pair = tl.load(packed_ptr + (row[None, :, None] + here + j[None, None, :]), both[:, :, None], 0)
        anchor = tl.load(packed_ptr + step + tl.zeros([1, 1, 1], tl.int32))
        even_0, even_1, odd_0, odd_1 = look_up_pairs(pair, anchor, dtype, LANES, CODE)
        x_inside = inside[:, None, None] & (m < M)[None, None, :]
        x = tl.load(two + (m[None, None, :] * HALF_K + here + j[None, :, None]), x_inside, 0)
        x_even, x_odd = x.to(tl.int16).to(dtype, bitcast=True), (x >> 16).to(tl.int16).to(dtype, bitcast=True)
        sums = tl.dot(even_0, x_even)
        sums = tl.dot(even_1, x_even, sums)
        sums = tl.dot(odd_0, x_odd, sums)
        sums = tl.dot(odd_1, x_odd, sums)
        acc += sums * scale[:, :, None]
    return tl.sum(acc, 0)


@triton.jit
def _rows(
    program, x_ptr, t_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, bias_ptr, b_ptr, y_ptr,
    N, HALF_K, n_t,
    M: tl.constexpr, MP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, AT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BN: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    CODE: tl.constexpr, LANES: tl.constexpr, TENSOR_CORES: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BN elements of each row of y. M: rows of x, MP: in a power of two; RP: the rank R likewise, from column AT of t on; 0: no
    adapter. SP: the parts of t that are read at a time.
    """
    n, m = program * BN + tl.arange(0, BN), tl.arange(0, MP)
    n_inside = n < N
    if TENSOR_CORES:
        y = _by_tensor_cores(
            x_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, n, n_inside,
            HALF_K // 16 * 16,  # the same, and said to be a multiple: 16 bytes lie side by side
            M, MP, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE, LANES, STAGES,
        )  # fmt: skip
    else:
        y = _by_element(
            x_ptr, packed_ptr, absmax_ptr, absmax_8bit_ptr, code8_ptr, offset_ptr, n, n_inside, HALF_K,
            BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE, LANES, STAGES,
        )  # fmt: skip
    if RP > 0:
        r = tl.arange(0, RP)
        t = tl.zeros([RP, MP], tl.float32)
        for first in range(0, S, SP):
            s = first + tl.arange(0, SP)
            t_inside = (s < S)[:, None, None] & (r < R)[None, :, None] & (m < M)[None, None, :]
            t_at = (s[:, None, None] * M + m[None, None, :]) * n_t + AT + r[None, :, None]
            t += tl.sum(tl.load(t_ptr + t_at, t_inside, 0.0), 0)
        b = tl.load(b_ptr + n[:, None] * R + r[None, :], n_inside[:, None] & (r < R)[None, :], 0.0).to(tl.float32)
        if TENSOR_CORES:
            y = tl.dot(b, t, y, input_precision="ieee")
        else:
            y += tl.sum(b[:, :, None] * t[None, :, :], 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, n_inside, 0.0).to(tl.float32)[:, None]
    y_inside = n_inside[:, None] & (m < M)[None, :]
    tl.store(y_ptr + m[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), y_inside)


@triton.jit(do_not_specialize=["HALF_K"])
def rows_kernel(
    x_ptr, t_ptr,
    packed_0_ptr, absmax_0_ptr, absmax_8bit_0_ptr, code8_0_ptr, offset_0_ptr, bias_0_ptr, b_0_ptr, y_0_ptr,
    packed_1_ptr, absmax_1_ptr, absmax_8bit_1_ptr, code8_1_ptr, offset_1_ptr, bias_1_ptr, b_1_ptr, y_1_ptr,
    packed_2_ptr, absmax_2_ptr, absmax_8bit_2_ptr, code8_2_ptr, offset_2_ptr, bias_2_ptr, b_2_ptr, y_2_ptr,
    N_0, N_1, N_2, end_0, end_1, HALF_K, n_t,
    M: tl.constexpr, MP: tl.constexpr, R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,
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
            y_0_ptr, N_0, HALF_K, n_t, M, MP, R_0, RP_0, 0, BIAS_0, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE, LANES,
            TENSOR_CORES, S, SP, STAGES,
        )  # fmt: skip
    elif program < end_1:
        _rows(
            program - end_0, x_ptr, t_ptr, packed_1_ptr, absmax_1_ptr, absmax_8bit_1_ptr, code8_1_ptr, offset_1_ptr, bias_1_ptr,
            b_1_ptr, y_1_ptr, N_1, HALF_K, n_t, M, MP, R_1, RP_1, R_0, BIAS_1, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE,
            LANES, TENSOR_CORES, S, SP, STAGES,
        )  # fmt: skip
    else:
        _rows(
            program - end_1, x_ptr, t_ptr, packed_2_ptr, absmax_2_ptr, absmax_8bit_2_ptr, code8_2_ptr, offset_2_ptr, bias_2_ptr,
            b_2_ptr, y_2_ptr, N_2, HALF_K, n_t, M, MP, R_2, RP_2, R_0 + R_1, BIAS_2, BN, BLOCKS, HALF, NESTED, NESTED_BLOCK, CODE,
            LANES, TENSOR_CORES, S, SP, STAGES,
        )  # fmt: skip
