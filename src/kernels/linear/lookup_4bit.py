"""The values that 4-bit codes stand for, looked up among the lanes of a warp.

Lane i holds the value of code i % 16 in a register, and `shfl.sync.idx` in segments of 16 lanes gives each lane the value of its
own code: it reads the lower four bits of an index alone, so that a shift and a shuffle are all that a code costs. A gather of
Triton's over sixteen values goes through shared memory.
"""

import struct
from functools import cache

from sloth.kernels.common.language import tl, triton
from sloth.kernels.linear.dequantize_4bit import CODES, _table

# Of four bytes in $8, with the table in $9: the values of their upper nibbles in $0 to $3, and of the lower ones in $4 to $7.
_SHUFFLES = [
    f"shr.u32 code, $8, {8 * byte + 4 * upper}; shfl.sync.idx.b32 ${byte if upper else 4 + byte}, $9, code, 0x101f, 0xffffffff;"
    for byte in range(4)
    for upper in (1, 0)
]
SHUFFLES = tl.constexpr(f"{{ .reg .b32 code; {' '.join(_SHUFFLES)} }}")
CONSTRAINTS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 2))


@cache
def lane_values(quant_type: str) -> str:
    """PTX: what this lane holds, in $0."""
    bits = [struct.unpack("<I", struct.pack("<f", value))[0] for value in CODES[quant_type]]
    lines = [".reg .pred is; .reg .b32 lane;", "mov.u32 lane, %laneid;", "and.b32 lane, lane, 15;", f"mov.b32 $0, {bits[0]:#x};"]
    lines += [f"setp.eq.u32 is, lane, {i}; selp.b32 $0, {of:#x}, $0, is;" for i, of in enumerate(bits) if i]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def table_of(LANES: tl.constexpr, CODE: tl.constexpr):
    """What `look_up` is given: a register of each lane, or where LANES is "" a tensor of sixteen values."""
    if LANES == "":
        table = _table(CODE)
    else:
        table = tl.inline_asm_elementwise(LANES, "=r,r", [tl.program_id(0)], tl.int32, is_pure=True, pack=1)
    return table


@triton.jit
def _of_nibble(word, table, SHIFT: tl.constexpr):
    return tl.reshape(tl.gather(table, tl.reshape(word >> SHIFT & 15, [word.shape[0] * word.shape[1]]), 0), word.shape)


@triton.jit
def look_up(word, table, LANES: tl.constexpr):
    """Of four bytes in an int32 each [R, C], the values of the eight elements in their order, in fp32."""
    if LANES == "":
        e0, e1, e2, e3 = (
            _of_nibble(word, table, 4),
            _of_nibble(word, table, 0),
            _of_nibble(word, table, 12),
            _of_nibble(word, table, 8),
        )
        e4, e5, e6, e7 = (
            _of_nibble(word, table, 20),
            _of_nibble(word, table, 16),
            _of_nibble(word, table, 28),
            _of_nibble(word, table, 24),
        )
    else:
        e0, e2, e4, e6, e1, e3, e5, e7 = tl.inline_asm_elementwise(
            SHUFFLES, CONSTRAINTS, [word, table], (tl.float32,) * 8, is_pure=True, pack=1
        )
    return e0, e1, e2, e3, e4, e5, e6, e7
