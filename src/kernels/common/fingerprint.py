"""A number for what a tensor holds: whoever reads it later finds out whether anybody has changed it meanwhile.

    part[p] = Σ word_i · k_i  (mod 2⁶⁴)      over the words i of part p; word: 32 bits of the tensor, k_i: an odd hash of i

Versions of tensors do not tell: `.data`, NumPy, kernels of fused optimizers and tensors of inference mode do not count them up.
Any change of one word changes its part, since k_i is odd; of several, with all but one chance in some 2³². Equal bits give equal
parts: integers add up to the same in any order. The parts are compared as they are, so there is one kernel, and nobody waits.

Without a kernel that many products cost more than a head's matmul. There words of 64 bits are added up, along rows and along
columns of a matrix that they are laid out as: adding is all that ATen does at the speed of memory, and an exchange of words
changes one of the two, unless others are exchanged that make up for it.

Bytes moved: those of the tensor, once; twice without a kernel. A head of 128,256 × 4,096 in bf16 (1 GiB) takes an H200 0.32 ms.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sloth.kernels.common.device import device_of
from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import compiling, launch_cached

BLOCK, WARPS, PROGRAMS = 2048, 8, 16  # words a step; programs for each multiprocessor
COLUMNS = 2**10  # of 64 bits, without a kernel
CHUNK = 2**16  # words of a part, without a kernel: they stay in the cache
GOLDEN, MIXER = -7046029254386353131, -4658895280553007687  # of splitmix64 (Steele, Lea, Flood: Fast splittable generators, 2014)


@triton.jit(do_not_specialize=["N"])
def _fingerprint_kernel(x_ptr, part_ptr, N, BLOCK: tl.constexpr):
    """part[p] = Σ word_i k_i of each P-th block."""
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(program * BLOCK, N, step):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        word = tl.load(x_ptr + i, i < N, 0).to(tl.int64)
        k = i * -7046029254386353131
        k = (k ^ (k >> 29)) * -4658895280553007687
        total += word * (k | 1)
    tl.store(part_ptr + program, tl.sum(total))


@falls_back("sloth::fingerprint", "head")
def fingerprint(x: Tensor) -> Tensor:
    """int64 parts, on the device of `x`, of any shape, strides and dtype. Compare those of one device with `torch.equal`."""
    words = _words(x)
    return (_parts_for(words) if words.numel() else _by_sums)(words)


def _by_kernel(words: Tensor) -> Tensor:
    parts = device_of(words.device).multiprocessors * PROGRAMS
    found = torch.empty(parts, dtype=torch.int64, device=words.device)
    with torch.cuda.device_of(words):
        launch_cached(_fingerprint_kernel, (parts,), [words, found], [words.numel()], {"BLOCK": BLOCK}, num_warps=WARPS)
    return found


def _words(x: Tensor) -> Tensor:
    """Its bits as they lie in memory, 32 at a time where that is aligned. A copy where it is not dense."""
    x = x.detach()
    if not x.is_contiguous():
        x = x.mT if x.dim() == 2 and x.mT.is_contiguous() else x.contiguous()
    x = x.view(-1)
    aligned = x.numel() * x.itemsize % 4 == 0 and x.storage_offset() * x.itemsize % 4 == 0
    return x.view(torch.int32 if aligned else torch.int16 if x.itemsize == 2 else torch.uint8)


def _keys(device: torch.device) -> Tensor:
    """Of each device's CHUNK words, made once; but in a graph that is traced, where they are no numbers (DDP runs one so)."""
    return _make_keys(device) if compiling() else _kept_keys(device)


def _make_keys(device: torch.device) -> Tensor:
    k = torch.arange(CHUNK, device=device) * GOLDEN
    return (k ^ (k >> 29)).mul_(MIXER).bitwise_or_(1)


_kept_keys = cache(_make_keys)


def _by_sums(words: Tensor) -> Tensor:
    n = words.numel() * words.itemsize // 8 // COLUMNS * COLUMNS
    if not n or words.storage_offset() * words.itemsize % 8:
        return _by_aten(words)
    whole, rest = words.split([n * 8 // words.itemsize, words.numel() - n * 8 // words.itemsize])
    rows = whole.view(torch.int64).view(-1, COLUMNS)
    return torch.cat([rows.sum(0), rows.sum(1), *([_by_aten(rest)] if rest.numel() else [])])


def _by_aten(words: Tensor) -> Tensor:
    keys = _keys(words.device)
    return torch.stack([part.to(torch.int64).mul_(keys[: len(part)]).sum() for part in words.split(CHUNK)])


_parts_for = implementations("sloth::fingerprint", triton=_by_kernel, aten=_by_sums)

COMPILE = [
    (_fingerprint_kernel, {"x_ptr": "*i32", "part_ptr": "*i64", "N": "i64"}, {"BLOCK": BLOCK}),
]
