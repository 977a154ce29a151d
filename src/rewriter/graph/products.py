"""Products of two tensors, summed over what they share: einsum, and a broadcast multiplication with a sum behind it.

Each dimension of a tensor has a name. Names of both operands and the result are a batch, those of both operands alone are summed
over, the others are rows and columns: permuted and viewed, that is a matrix product, or a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from sloth.rewriter.graph.canonical import Call, Normal, rule
from sloth.rewriter.graph.value import Value, same_literal

Names = Sequence[str | int]


@rule("einsum")
def contraction(n: Normal, c: Call, equation, tensors, path=None):
    """einsum("bid,bjd->bij", a, b) = a bᵀ; what stands in one operand and the result is rows or columns, in both a batch."""
    if len(tensors) != 2 or not isinstance(equation, str):
        return None
    given, _, result = equation.replace(" ", "").partition("->")
    (left, right), free = given.split(","), max(len(x.meta.shape) for x in tensors)
    a, b = (_names(e, len(x.meta.shape), free) for e, x in zip((left, right), tensors, strict=True))
    if "->" not in equation:
        once = sorted(x for x in {*left, *right} - {"."} if (left + right).count(x) == 1)
        result = "..." * ("..." in given) + "".join(once)
    return product(n, c, *tensors, a, b, _names(result, len(c.meta.shape), free))


@rule("sum")
def product_summed(n: Normal, c: Call, x: Value, dims=None, keepdim=False, dtype=None):
    """(a[:, :, None] · b[:, None]).sum(−1) = a bᵀ, where each operand has dimensions that the other lacks."""
    one = dims if isinstance(dims, int) else dims[0] if isinstance(dims, tuple) and len(dims) == 1 else None
    if one is None or keepdim or dtype is not None or not n.near(x, "mul"):
        return None
    if not all(isinstance(v, Value) and n.near(v, v.op) and v.meta.dtype == x.meta.dtype for v in x.args):
        return None
    rank, operands = len(x.meta.shape), []
    for v in x.args:
        shift = rank - len(v.meta.shape)
        kept = [i for i, s in enumerate(v.meta.shape) if not same_literal(s, 1) or same_literal(x.meta.shape[i + shift], 1)]
        operands += [n.view(v, tuple(v.meta.shape[i] for i in kept)), [i + shift for i in kept]]
    a, of_a, b, of_b = operands
    if not set(of_a) - set(of_b) or not set(of_b) - set(of_a):
        return None
    return product(n, c, a, b, of_a, of_b, [i for i in range(rank) if i != one % rank])


def product(n: Normal, c: Call, a: Value, b: Value, of_a: Names, of_b: Names, result: Names):
    """The sum over what `result` does not name of a · b, whose dimensions are named; None where it is no matrix product."""
    if any(len(set(names)) != len(names) for names in (of_a, of_b, result)) or a.meta.dtype != c.meta.dtype:
        return None
    sizes = dict(zip(of_a, a.meta.shape, strict=True))
    if not all(same_literal(sizes.setdefault(x, s), s) for x, s in zip(of_b, b.meta.shape, strict=True)):
        return None
    batch = [x for x in result if x in of_a and x in of_b]
    rows, columns = ([x for x in result if x in own and x not in batch] for own in (of_a, of_b))
    turned = rows and columns and result.index(columns[0]) < result.index(rows[0])
    if (len(rows) == 1 and (turned or len(columns) != 1)) if not batch else turned:  # a bᵀ is (b aᵀ)ᵀ
        a, b, of_a, of_b, rows, columns = b, a, of_b, of_a, columns, rows
    over = [x for x in of_a if x in of_b and x not in batch]
    if not over or len(batch) + len(rows) + len(over) != len(of_a) or len(batch) + len(columns) + len(over) != len(of_b):
        return None
    size = lambda names: tuple(sizes[x] for x in names)  # noqa: E731

    def laid(x: Value, names: Names, *groups: Names) -> Value:
        x = n.permute(x, tuple(names.index(d) for group in groups for d in group))
        return n.view(x, (*size(groups[0]), *(prod(size(g)) for g in groups[1:])))

    if not batch and len(columns) == 1:
        x = n.permute(a, tuple(of_a.index(d) for d in (*rows, *over)))
        x, w = n.view(x, (*size(rows), prod(size(over)))), laid(b, of_b, (), columns, over)
        found = n.add("linear", (x, w, None), c.meta._replace(shape=(*size(rows), *size(columns))))
    else:
        if not batch or not rows or not columns:
            return None
        x, y = laid(a, of_a, batch, rows, over), laid(b, of_b, batch, over, columns)
        shape = (*size(batch), prod(size(rows)), prod(size(columns)))
        found = n.view(n.call("matmul", (x, y), (c.meta._replace(shape=shape),)), size((*batch, *rows, *columns)))
    order = [*batch, *rows, *columns]
    return n.permute(found, tuple(order.index(d) for d in result))


def _names(part: str, rank: int, free: int) -> list[str]:
    """Of each dimension; those that "..." stands for are numbered from the last."""
    before, dots, behind = part.partition("...")
    between = rank - len(before) - len(behind) if dots else 0
    return [*before, *(str(free - between + i) for i in range(between)), *behind]
