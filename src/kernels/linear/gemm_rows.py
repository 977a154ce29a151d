"""A matrix product that is given out in parts, so many rows each:  [y_0; y_1; …] = α A B

Shapes   A [M, K], B [K, N] (any strides that cuBLAS takes), y_i [rows_i, N] with Σ rows_i = M.
Dtypes   A and B of one; y in `dtype`, by default that one: accumulated in fp32 and rounded once. Gradients of adapters are such
         products of bf16 factors, of parameters in fp32.
The parts lie in one buffer. The operator has no derivative: it is what backward passes are made of.
"""

from collections.abc import Sequence

import torch

from sloth.kernels.common.launch import no_derivative
from sloth.kernels.linear.gemm import product


def rows_of(matrix: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
    """So many rows each, as parts of the matrix, unless one would begin where kernels do not expect a tensor to."""
    if len(rows) == 1:
        return [matrix]
    parts = list(torch.split_with_sizes(matrix, rows))  # `split` takes the host twice the time
    return [part.clone() for part in parts] if any([part.data_ptr() % 16 for part in parts]) else parts


def apart(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """As results of an operator, of which no two may share memory where torch's dispatcher calls it."""
    return [part.clone() for part in parts] if len(parts) > 1 else parts


torch.library.define(
    "sloth::product_in_rows",
    "(Tensor a, Tensor b, SymInt[] rows, float alpha=1.0, ScalarType? dtype=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(a: torch.Tensor, b: torch.Tensor, rows: Sequence[int]) -> None:
    no_derivative(a, b)
    told = lambda: f"product_in_rows: A {list(a.shape)}, B {list(b.shape)}, rows {list(rows)}"  # noqa: E731
    torch._check(a.shape[1] == b.shape[0] and a.shape[0] == sum(rows), told)


def compute_product_in_rows(a, b, rows, alpha=1.0, dtype=None) -> list[torch.Tensor]:
    """The operator's results, for operands that were checked when the graph was traced. They may be parts of one buffer."""
    out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype or a.dtype)
    product(a, b, out, alpha)
    return rows_of(out, rows)


@torch.library.impl("sloth::product_in_rows", "CompositeExplicitAutograd")
def product_in_rows_impl(a, b, rows, alpha=1.0, dtype=None):
    _check(a, b, rows)
    return apart(compute_product_in_rows(a, b, rows, alpha, dtype))


@torch.library.register_fake("sloth::product_in_rows")
def product_in_rows_fake(a, b, rows, alpha=1.0, dtype=None):
    _check(a, b, rows)
    return [a.new_empty(n, b.shape[1], dtype=dtype or a.dtype) for n in rows]


product_in_rows = torch.ops.sloth.product_in_rows.default
"""product_in_rows(a [M, K], b [K, N], rows: list, alpha=1.0, dtype=None) -> [y_0 [rows_0, N], …]"""
