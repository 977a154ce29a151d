"""The PTX that looks up 4-bit codes, run here instruction by instruction; on a GPU, by the kernels that hold it."""

import re
import struct

import pytest
import torch

from sloth.kernels.linear.dequantize_4bit import CODES
from sloth.kernels.linear.lookup_4bit import PAIRS, SHUFFLES, lane_pairs, lane_values


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
        elif name == "prmt.b32":
            eight = (value(of[1]) << 32 | value(of[0])).to_bytes(8, "little")
            held[to] = int.from_bytes(bytes(eight[int(at)] for at in of[2][:1:-1]), "little")
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", sorted(CODES))
def test_every_byte_as_two_parts(quant_type, dtype):
    """The parts' sum is the value, but for what two numbers of `dtype` cannot hold."""
    codes = torch.tensor(CODES[quant_type])
    table = [run(lane_pairs(quant_type, dtype), lane, {})["$0"] for lane in range(32)]
    for byte in range(256):
        word = [(byte + 77 * i) % 256 for i in range(4)]
        found = run(PAIRS.value, byte % 32, {"$8": int.from_bytes(bytes(word), "little"), "$9": table})
        registers = torch.tensor([found[f"${i}"] for i in range(8)], dtype=torch.int64).to(torch.int32)
        even_0, even_1, odd_0, odd_1 = registers.view(torch.int16).view(dtype).float().view(4, 4)
        for first, second, shift in ((even_0, even_1, 4), (odd_0, odd_1, 0)):
            wanted = codes[[b >> shift & 15 for b in word]]
            assert torch.equal(first, wanted.to(dtype).float())
            assert (first + second - wanted).abs().max() <= torch.finfo(dtype).eps ** 2
