"""Rows in the order in which they lie in memory.

An element-wise chain of eager PyTorch keeps the dimension order of its input: the norm of `q.view(B, S, H, D).transpose(1, 2)`
is again a [B, H, S, D] over memory in [B, S, H, D] order. A kernel that walks rows gets there without a copy by walking them in
memory order and giving its outputs that order:

    order = row_order(x)
    x_ND = ordered_rows(x, order)                       a view wherever the strides allow it
    y = from_rows(y_ND, x.shape, order)                 a view, strides as eager's
"""

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from sloth.kernels.common.launch import rows


def row_order(*operands: torch.Tensor) -> list[int]:
    """Leading dimensions of a result of `operands` (all of one shape) from outermost to innermost: TensorIterator's rule, by
    which a dimension with a smaller stride goes inside, the first operand decides and broadcast dimensions do not count."""

    def swap(a: int, b: int) -> bool | None:
        """Whether dimension `a` must move inside of `b`; None where no operand can tell."""
        for x in operands:
            if guard_or_false(x.stride(a) == 0) or guard_or_false(x.stride(b) == 0):
                continue
            if guard_or_false(x.stride(a) < x.stride(b)):
                return True
            if guard_or_false(x.stride(a) > x.stride(b)):
                return False
        return None

    order = list(range(operands[0].dim() - 1))
    for i in range(1, len(order)):
        here = i
        for before in range(i - 1, -1, -1):
            verdict = swap(order[before], order[here])
            if verdict:
                order[before], order[here] = order[here], order[before]
                here = before
            elif verdict is False:
                break
    return order


def ordered_rows(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """`x` [..., D] as [N, D], rows in this order, unit stride along D."""
    return rows(x.permute([*order, x.dim() - 1]))


def from_rows(x: torch.Tensor, shape, order: list[int]) -> torch.Tensor:
    """A contiguous [N, D] back to `shape` [..., D]; a contiguous [N] to `shape` [...]: the inverse of `ordered_rows`."""
    lead, tail = [shape[i] for i in order], list(shape[len(order) :])
    inverse = [order.index(i) for i in range(len(order))]
    return x.view(lead + tail).permute([*inverse, *range(len(order), len(shape))])
