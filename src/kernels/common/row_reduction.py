"""What the row kernels share: the tuning of a launch, and sums over rows that end in one row (gradients of weights).

A sum over N rows is made in two steps, both in a fixed order: a few programs per multiprocessor each keep a sum of their rows in
registers and write it to a row of a partial buffer [P, D] in fp32; then `sum_partials` adds the P rows. No atomics, so
the result is the same in every run. Cost over the pass itself: P·D·8 bytes, which mostly stay in the L2 cache.
"""

from dataclasses import dataclass

import torch

from sloth.kernels.common.device import device_of
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import launch


@dataclass(frozen=True)
class Tuning:
    """How a row kernel is launched. To sweep: assign another Tuning to the kernel module's constant.

    tile      elements a program handles at once: small D takes several rows, never less than one
    per_warp  elements of the tile for each warp
    programs  programs for each multiprocessor, each walking over many tiles; 0: one program a tile
    stages    loads in flight in the walk (software pipelining)
    shared    bytes of shared memory that the pipelined loads of one program may take
    """

    tile: int = 2048
    per_warp: int = 512
    programs: int = 0
    stages: int = 1
    shared: int = 64 * 1024

    def block(self, D: int) -> tuple[int, int, int]:
        """(rows of a tile, columns of a tile, warps) for rows of D elements."""
        columns = max(16, triton.next_power_of_2(D))
        rows = max(1, self.tile // columns)
        return rows, columns, min(max(rows * columns // self.per_warp, 1), 32)

    def depth(self, row_bytes: int, D: int) -> int:
        """Stages that fit in shared memory, where one step of the walk loads `row_bytes` for each row."""
        rows, columns, _ = self.block(D)
        return max(1, min(self.stages, self.shared // max(1, rows * columns * row_bytes // D)))

    def grid(self, N, D: int, device: torch.device):
        """Number of programs for N rows (N may be symbolic)."""
        rows, _, _ = self.block(D)
        return self.programs * multiprocessors(device) if self.programs else (N + rows - 1) // rows


def multiprocessors(device: torch.device) -> int:
    return device_of(device).multiprocessors


@triton.jit
def _sum_kernel(part_ptr, out_ptr, P: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """out[D] = Σ over P of part[P, D]."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.arange(0, STEP)[:, None]
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for start in range(0, P, STEP):
        total += tl.load(part_ptr + (start + row).to(tl.int64) * D + col, (start + row < P) & (col < D), 0.0)
    out = tl.sum(total, 0)[None, :]
    tl.store(out_ptr + col, out.to(out_ptr.dtype.element_ty), col < D)


SUM_STEP, SUM_BLOCK, SUM_WARPS = 64, 32, 4


def sum_partials(part_PD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[P, D] fp32, summed over P in a fixed order, rounded once to `dtype`. By Triton."""
    P, D = part_PD.shape
    out = torch.empty(D, dtype=dtype, device=part_PD.device)
    grid = (triton.cdiv(D, SUM_BLOCK),)
    launch(_sum_kernel)[grid](part_PD, out, P, D, SUM_STEP, SUM_BLOCK, num_warps=SUM_WARPS)
    return out


def check_vectors(op: str, x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    """Refuse parameters that are not one vector for all rows [..., D]: a weight for each head is another operator."""
    for name, v in vectors.items():
        if v is not None:
            torch._check(v.dim() == 1, lambda: f"{op}: {name} is {list(v.shape)}, not [D]")  # noqa: B023
            torch._check(v.shape[0] == x.shape[-1], lambda: f"{op}: {name} is {list(v.shape)}, x {list(x.shape)}")  # noqa: B023


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] summed to [D], always a fresh tensor. By ATen."""
    return x.unsqueeze(0).sum(list(range(x.dim())))


def raise_on_double_backward(ctx, *_):
    """Backward formula of backward operators: a second derivative is refused, not silently zero."""
    raise RuntimeError("sloth's operators can be differentiated once, not twice")


COMPILE = [
    (_sum_kernel, {"part_ptr": "*fp32", "out_ptr": "*bf16"}, {"P": 264, "D": 4096, "STEP": SUM_STEP, "BLOCK": SUM_BLOCK}),
]
