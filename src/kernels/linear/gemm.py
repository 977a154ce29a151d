"""A sum of matrix products in one buffer:  y = bias + α₁ A₁ B₁ + α₂ A₂ B₂ + …

Shapes   A_i [M, K_i], B_i [K_i, N] (any strides that cuBLAS takes), bias [N] or None, all of one dtype; y [M, N] in `dtype`, by
         default that one.
Order    as given. Put thin products first and the big one last: a big product that adds to what is there reads it while it
         computes (H200, [4096, 4096] × [4096, 14336] and rank 16: 42 + 629 µs; the other way round 620 + 100).
Joined   big products whose B_i lie one below the other in memory, as weights do that are dequantised together, are one:
         [A_2, A_3, …] [B_2; B_3; …]. A_i that do not lie side by side are copied so, if there are few columns (NARROW).
Error    each product is accumulated in fp32 by cuBLAS. A thin product is rounded before the big one is added to it. A sum of more
         than two, joined ones counted as one, or on a CPU, is fp32 until it is whole: of what autocast casts for each layer,
         eager adds gradients up in fp32.
Bytes    y is written once for each product and read once for each but the first; on Hopper GPUs a thin product and the big one
         behind it are one kernel, which writes y once (lowrank_gemm.py). Joined, A_2, A_3, … are read and written once more.

The products are torch's own; what is added is that they go into one buffer, which a functional `addmm` cannot do for a sum in two
dimensions (it copies first). The operator has no derivative: it is what backward passes are made of.
"""

import torch

from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.launch import compute_dtype, no_derivative
from sloth.kernels.linear.lowrank_gemm import lowrank_gemm, serves

NARROW = 3  # times as many columns as x, at the most, have layers of the same x together that are one product


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K], in whatever strides: products take any."""
    return x.reshape(-1, x.shape[-1])


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float = 1.0) -> None:
    """out = alpha a b, rounded once."""
    if out.dtype == a.dtype and alpha == 1:
        torch.mm(a, b, out=out)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        if alpha != 1:
            out.mul_(alpha)
    else:
        product(a.to(out.dtype), b.to(out.dtype), out, alpha)


def add_product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor, alpha: float = 1.0) -> None:
    """total += alpha a b, in total's precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=alpha)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=alpha, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=alpha)


def in_memory(parts: list[torch.Tensor], dim: int) -> torch.Tensor | None:
    """Matrices one behind the other along `dim`, as the one that they are in memory already: weights that are dequantised
    together, or columns of one result. None where they are not.
    """
    first, at, count = parts[0], parts[0].storage_offset(), sum(part.shape[dim] for part in parts)
    shape = (first.shape[0], count) if dim else (count, first.shape[1])
    if first.is_meta:  # compiled ahead: where tensors will lie is not known, and they are made to lie so
        return first.new_empty(shape) if first.stride(1) == 1 else first.new_empty(shape[::-1]).t()
    stride, held = first.stride(), first.untyped_storage()._cdata
    for part in parts:
        alike = part.stride() == stride and part.shape[1 - dim] == first.shape[1 - dim]
        if not alike or part.storage_offset() != at or part.untyped_storage()._cdata != held:
            return None
        at += part.shape[dim] * stride[dim]
    return first.as_strided(shape, stride)


def _check(a: list[torch.Tensor], b: list[torch.Tensor], alpha: list[float]) -> None:
    no_derivative(*a, *b)
    torch._check(0 < len(a) == len(b) == len(alpha), lambda: "sum_of_products: as many factors on each side, and one at least")


torch.library.define(
    "sloth::sum_of_products",
    "(Tensor[] a, Tensor[] b, float[] alpha, Tensor? bias=None, ScalarType? dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@falls_back("sloth::sum_of_products", "lora")
def compute_sum_of_products(a, b, alpha, bias=None, dtype=None) -> torch.Tensor:
    """The operator's result, for operands that were checked when the graph was traced."""
    dtype, wide = dtype or a[0].dtype, compute_dtype(a[0])
    if len(a) > 2 and all(s == alpha[1] for s in alpha[2:]) and (whole := in_memory(b[1:], 0)) is not None:
        beside = in_memory(a[1:], 1)
        if beside is None and whole.shape[0] <= NARROW * whole.shape[1]:
            # It takes a GPU less than to read and write y in fp32 for each of them, and its host one launch for each two.
            beside = torch.cat(a[1:], 1)
        if beside is not None:
            a, b, alpha = [a[0], beside], [b[0], whole], alpha[:2]
    if len(a) == 2 and dtype == a[0].dtype and alpha[1] == 1 and serves(a[0], b[0], a[1], b[1], alpha[0]):
        out = a[0].new_empty(a[0].shape[0], b[0].shape[1])
        lowrank_gemm(a[0], b[0], a[1], b[1], alpha[0], bias, out)
        return out
    if dtype == a[0].dtype and len(a) <= (1 if a[0].device.type == "cpu" else 2):
        return _sum(a, b, alpha, bias, dtype)
    return _sum(a, b, alpha, None if bias is None else bias.to(wide), wide).to(dtype)


def _sum(a, b, alpha, bias, dtype: torch.dtype) -> torch.Tensor:
    """In a buffer of this dtype."""
    out = a[0].new_empty(a[0].shape[0], b[0].shape[1], dtype=dtype)
    if bias is None:
        product(a[0], b[0], out, alpha[0])
    elif dtype == a[0].dtype:
        torch.addmm(bias, a[0], b[0], alpha=alpha[0], out=out)
    else:
        add_product(a[0], b[0], out.copy_(bias), alpha[0])
    for x, y, scale in zip(a[1:], b[1:], alpha[1:], strict=True):
        add_product(x, y, out, scale)
    return out


@torch.library.impl("sloth::sum_of_products", "CompositeExplicitAutograd")
def sum_of_products_impl(a, b, alpha, bias=None, dtype=None):
    _check(a, b, alpha)
    return compute_sum_of_products(a, b, alpha, bias, dtype)


@torch.library.register_fake("sloth::sum_of_products")
def sum_of_products_fake(a, b, alpha, bias=None, dtype=None):
    _check(a, b, alpha)
    return a[0].new_empty(a[0].shape[0], b[0].shape[1], dtype=dtype or a[0].dtype)


sum_of_products = torch.ops.sloth.sum_of_products.default
"""sum_of_products(a, b: lists of matrices, alpha: list of numbers, bias [N] or None, dtype=None) -> [M, N]"""
