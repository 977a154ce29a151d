"""The values that 4-bit codes stand for, looked up among the lanes of a warp.

Lane i holds the value of code i % 16 in a register, and `shfl.sync.idx` in segments of 16 lanes gives each lane the value of its
own code: it reads the lower four bits of an index alone, so that a shift and a shuffle are all that a code costs. A gather of
Triton's over sixteen values goes through shared memory.
"""

import struct
from functools import cache

import torch

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

# Of four bytes in $8, with a table of pairs in $9 (and in $10 to $12): the first parts of the upper nibbles' values in $0 and $1,
# their second parts in $2 and $3; those of the lower nibbles in $4 and $5, $6 and $7.
_EACH = [
    f"shr.u32 code, $8, {8 * byte + shift}; shfl.sync.idx.b32 {name}{byte}, $9, code, 0x101f, 0xffffffff;"
    for byte in range(4)
    for name, shift in (("e", 4), ("o", 0))
]
_JOINED = [
    f"prmt.b32 ${to + two}, {name}{2 * two}, {name}{2 * two + 1}, {chosen};"
    for name, first in (("e", 0), ("o", 4))
    for to, chosen in ((first, "0x7632"), (first + 2, "0x5410"))
    for two in range(2)
]
PAIRS = tl.constexpr(f"{{ .reg .b32 code; .reg .b32 e<4>, o<4>; {' '.join(_EACH + _JOINED)} }}")
PAIR_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 5))


@cache
def lane_values(quant_type: str) -> str:
    """PTX: what this lane holds, in $0."""
    return _held([struct.unpack("<I", struct.pack("<f", value))[0] for value in CODES[quant_type]])


@cache
def lane_pairs(quant_type: str, dtype: torch.dtype) -> str:
    """PTX: the value rounded to `dtype`, of 16 bits, and what is left of it, rounded too, in the upper and lower half of $0."""
    values = torch.tensor(CODES[quant_type])
    upper = values.to(dtype)
    upper, lower = ((of.view(torch.int16).int() & 0xFFFF).tolist() for of in (upper, (values - upper.float()).to(dtype)))
    return _held([u << 16 | v for u, v in zip(upper, lower, strict=True)])


def _held(bits: list[int]) -> str:
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


@triton.jit
def look_up_pairs(pair, anchor, dtype: tl.constexpr, LANES: tl.constexpr, CODE: tl.constexpr):
    """Of bytes [G, N, C], the values of their upper nibbles in `dtype` and what these are short of, and those of the lower ones.

    anchor [1, 1, 1]: any number that was loaded in the same round of a loop. Triton moves bytes to where tensor cores want the
    elements, and not the elements, if all that the lookup reads comes from loads of that round.
    """
    if LANES == "":
        table = _table(CODE)
        flat = tl.reshape(pair, [pair.shape[0] * pair.shape[1] * pair.shape[2]]).to(tl.int32)
        even = tl.reshape(tl.gather(table, flat >> 4, 0), pair.shape)
        odd = tl.reshape(tl.gather(table, flat & 15, 0), pair.shape)
        even_0, odd_0 = even.to(dtype), odd.to(dtype)
        even_1, odd_1 = (even - even_0.to(tl.float32)).to(dtype), (odd - odd_0.to(tl.float32)).to(dtype)
    else:
        lane = tl.inline_asm_elementwise(LANES, "=r,r", [anchor.to(tl.int32)], tl.int32, is_pure=True, pack=1)
        even_0, even_1, odd_0, odd_1 = tl.inline_asm_elementwise(
            PAIRS, PAIR_CONSTRAINTS, [pair, tl.broadcast_to(lane, pair.shape)], (tl.int16,) * 4, is_pure=True, pack=4
        )
        even_0, even_1 = even_0.to(dtype, bitcast=True), even_1.to(dtype, bitcast=True)
        odd_0, odd_1 = odd_0.to(dtype, bitcast=True), odd_1.to(dtype, bitcast=True)
    return even_0, even_1, odd_0, odd_1
