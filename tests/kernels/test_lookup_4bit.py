"""The PTX that looks up 4-bit codes, run here instruction by instruction; on a GPU, by the kernels that hold it."""

import re
import struct

import pytest
import torch

from sloth.kernels.linear.dequantize_4bit import CODES
from sloth.kernels.linear.lookup_4bit import SHUFFLES, lane_values


def run(ptx, lane, held):
    """The registers after it in one lane, where every lane holds the value of its own number in $9."""
    value = lambda name: held[name] if name in held else lane if name == "%laneid" else int(name, 0)  # noqa: E731
    for line in re.findall(r"[^;{}]+;", ptx):
        name, *given = line.strip(" ;").replace(",", " ").split()
        if name == ".reg":
            continue
        to, *of = given
        if name == "selp.b32":
            held[to] = value(of[0]) if held[of[2]] else value(of[1])
        elif name == "shfl.sync.idx.b32":
            source, index, bounds, mask = of
            assert (source, int(bounds, 0), int(mask, 0)) == ("$9", (16 << 8) | 31, 2**32 - 1)  # segments of 16 lanes
            held[to] = held[source][lane & 16 | value(index) & 15]
        else:
            a, b = (value(of[0]), value(of[-1]))
            held[to] = {"mov.u32": a, "mov.b32": a, "and.b32": a & b, "shr.u32": a >> b, "setp.eq.u32": a == b}[name]
    return held


@pytest.mark.parametrize("quant_type", sorted(CODES))
def test_every_byte_in_every_place(quant_type):
    codes = torch.tensor(CODES[quant_type])
    bits = [run(lane_values(quant_type), lane, {})["$0"] for lane in range(32)]
    values = [struct.unpack("<f", struct.pack("<I", of))[0] for of in bits]
    assert values == [*codes.tolist(), *codes.tolist()]
    for byte in range(256):
        word = [(byte + 77 * i) % 256 for i in range(4)]
        found = run(SHUFFLES.value, byte % 32, {"$8": int.from_bytes(bytes(word), "little"), "$9": values})
        assert [found[f"${i}"] for i in range(4)] == [codes[b >> 4] for b in word]
        assert [found[f"${4 + i}"] for i in range(4)] == [codes[b & 15] for b in word]
