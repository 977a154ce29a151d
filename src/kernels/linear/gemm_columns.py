"""Products with one matrix, side by side in the columns of one result, and thin ones added to them:

    y = [y_0, y_1, …]      y_i = X W_i + (α T U)_i

Shapes   X [M, K], W_i [K, N_i], T [M, R], U [R, Σ N_i] with R small, y [M, Σ N_i].
Dtypes   one for all, and y.
Order    the thin product first, then the big ones on top of it (gemm.py).
Launches two where the W_i lie side by side in memory too, as those do that are dequantised together: then X [W_0, W_1, …] is one
         product. Otherwise one for each W_i, and the thin one. Three layers by themselves take six, which a GPU with a few rows
         for each waits for.
The operator has no derivative: it is what forward passes are made of.
"""

import torch

from sloth.kernels.common.launch import no_derivative
from sloth.kernels.linear.gemm import add_product, compute_sum_of_products, in_memory

torch.library.define(
    "sloth::products_in_columns",
    "(Tensor t, Tensor u, Tensor x, Tensor[] w, float alpha) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(t: torch.Tensor, u: torch.Tensor, x: torch.Tensor, w: list[torch.Tensor]) -> None:
    no_derivative(t, u, x, *w)
    told = lambda: f"products_in_columns: U {list(u.shape)}, W {[list(wi.shape) for wi in w]}"  # noqa: E731
    torch._check(u.shape[1] == sum(wi.shape[1] for wi in w), told)


def compute_products_in_columns(t, u, x, w, alpha) -> torch.Tensor:
    """The operator's result, for operands that were checked when the graph was traced."""
    if (whole := in_memory(w, 1)) is not None:
        return compute_sum_of_products([t, x], [u, whole], [alpha, 1.0])
    y, at = compute_sum_of_products([t], [u], [alpha]), 0
    for wi in w:
        add_product(x, wi, y.narrow(1, at, wi.shape[1]))
        at += wi.shape[1]
    return y


@torch.library.impl("sloth::products_in_columns", "CompositeExplicitAutograd")
def products_in_columns_impl(t, u, x, w, alpha):
    _check(t, u, x, w)
    return compute_products_in_columns(t, u, x, w, alpha)


@torch.library.register_fake("sloth::products_in_columns")
def products_in_columns_fake(t, u, x, w, alpha):
    _check(t, u, x, w)
    return x.new_empty(x.shape[0], u.shape[1])


products_in_columns = torch.ops.sloth.products_in_columns.default
"""products_in_columns(t [M, R], u [R, Σ N_i], x [M, K], w: list of [K, N_i], alpha) -> y [M, Σ N_i]"""
