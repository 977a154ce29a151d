"""Normal form: one spelling for each piece of mathematics. The rules are a table; each is a function with its law as docstring.

A rule `(n, c, *args)` sees one ATen call `c` whose arguments are in normal form already (positional, defaults filled in) and
returns the Value, or the tuple of Values, that stands for it, or None where it does not apply. Rules for one operator are tried
in the order written; where none applies the call stands for itself. A rule may only use what is proven of its arguments: shapes,
dtypes, constants.

`python -m sloth patterns --rules` prints the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sloth.rewriter.graph import activations, losses, means, products  # noqa: F401  (which have rules too)
from sloth.rewriter.graph.canonical import INT_MAX, RULES, VIEWS, Call, Normal, rule
from sloth.rewriter.graph.value import Symbol, Value, same_literal

__all__ = ["RULES", "VIEWS", "Call", "Normal", "rule"]  # who builds Values, or enters rules, has these rules with it

# ---------------------------------------------------------------- dtypes and copies

WIDER = {  # that hold each number of the dtype
    **dict.fromkeys((torch.bfloat16, torch.float16), (torch.float32, torch.float64)),
    torch.float32: (torch.float64,),
}


@rule("to", "_to_copy", "type_as")
def cast(n: Normal, c: Call, x: Value, *_):
    """x.to(dtype), x.float(), x.type_as(y) = cast(x, dtype), and nothing where that is x's dtype already;
    cast(cast(x, wider), x's dtype) = x.
    """
    if c.meta.device != x.meta.device:
        return None
    if n.near(x, "cast") and x.args[0].meta.dtype == c.meta.dtype and x.meta.dtype in WIDER.get(c.meta.dtype, ()):
        return x.args[0]
    return n.cast(x, c.meta.dtype)


@rule("contiguous", "clone", "alias", "lift_fresh", "lift_fresh_copy", "resolve_conj", "resolve_neg")
def copy(n: Normal, c: Call, x: Value, *_):
    """contiguous(x), clone(x), alias(x) = x: memory layout is no mathematics."""
    return x


@rule("detach")
def nothing_to_detach(n: Normal, c: Call, x: Value):
    """detach(x) = x where x holds no floating-point numbers: it has no gradient."""
    return None if x.meta.dtype.is_floating_point or x.meta.dtype.is_complex else x


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def no_dropout(n: Normal, c: Call, x: Value, p, train):
    """dropout(x) = x with p = 0 or outside of training."""
    return x if train is False or (_number(p) and p == 0) else None


# ---------------------------------------------------------------- choices


@rule("bitwise_not", "logical_not")
def negation(n: Normal, c: Call, x: Value):
    """not not x = x, of truths;  not (a ≤ b) = a > b, of integers."""
    if x.meta.dtype != torch.bool:
        return None
    if n.near(x, "bitwise_not"):
        return x.args[0]
    contrary = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}.get(x.op, "")
    if n.near(x, x.op) and contrary and not any(v.meta.dtype.is_floating_point for v in x.inputs):
        return n.add(contrary, x.args, c.meta)
    return n.add("bitwise_not", (x,), c.meta)


@rule("masked_fill")
def filled(n: Normal, c: Call, x: Value, mask: Value, number):
    """masked_fill(x, m, number) = where(not m, x, number)."""
    number = _scalar(number, c.meta.dtype)
    if number is None or x.meta.dtype != c.meta.dtype or x.mutated_storage:
        return None
    return n.call("where", (n.call("bitwise_not", (mask,), (mask.meta,)), x, number), c.metas)


@rule("where")
def choice(n: Normal, c: Call, mask: Value, a, b):
    """where(m, number, x) = where(not m, x, number);  where(not m, a, b) = where(m, b, a), both tensors or both numbers."""
    a, b = (x if (k := _scalar(x, c.meta.dtype)) is None else k for x in (a, b))
    if c.meta.dtype.is_floating_point:
        a, b = (x if isinstance(x, Value) else float(x) for x in (a, b))
    tensor = isinstance(a, Value), isinstance(b, Value)
    if tensor == (False, True) or tensor[0] == tensor[1] and n.near(mask, "bitwise_not"):
        mask, a, b = n.call("bitwise_not", (mask,), (mask.meta,)), b, a
    return n.add("where", (mask, a, b), c.meta)


@rule("mul", "div")
def scaled_choice(n: Normal, c: Call, x, k, *rounding):
    """where(m, x, number) · k = where(m, x · k, number · k), for numbers k > 0;  / k too."""
    x, k = (x, k) if isinstance(x, Value) or c.op == "div" else (k, x)
    if any(rounding) or not _number(k) or not 0 < k < math.inf or not n.near(x, "where") or x.meta.dtype != c.meta.dtype:
        return None
    mask, inner, number = x.args
    if not isinstance(inner, Value) or not _number(number) or inner.meta.dtype != c.meta.dtype:
        return None
    scaled = n.call(c.op, (inner, k), (inner.meta,))
    number = torch.tensor(number * k if c.op == "mul" else number / k, dtype=torch.float64).to(c.meta.dtype).item()
    return n.add("where", (mask, scaled, number), c.meta)


# ---------------------------------------------------------------- arithmetic


@rule("multiply", "divide", "true_divide", "subtract", "negative")
def other_name(n: Normal, c: Call, *args):
    """multiply, divide, true_divide, subtract, negative = mul, div, div, sub, neg."""
    names = {"multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg"}
    return n.call(names[c.op], args, c.metas)


@rule("add", "sub")
def add_zero(n: Normal, c: Call, a, b, alpha=1):
    """x + 0 = x − 0 = x where the dtype stays."""
    return a if _number(b) and b == 0 and isinstance(a, Value) and a.meta.dtype == c.meta.dtype else None


@rule("add", "sub")
def plain_sum(n: Normal, c: Call, a, b, alpha=1):
    """add(a, b, alpha=1) = a + b, constants on the right."""
    if alpha != 1:
        return None
    return n.add(c.op, (b, a) if c.op == "add" and not isinstance(a, Value) else (a, b), c.meta)


@rule("rsub")
def reversed_difference(n: Normal, c: Call, a, b, alpha=1):
    """rsub(a, b) = b − a."""
    return n.add("sub", (b, a), c.meta) if alpha == 1 else None


@rule("mul", "div")
def times_one(n: Normal, c: Call, a, b, *rounding):
    """x · 1 = x / 1 = x where the dtype stays."""
    a, b = (a, b) if isinstance(a, Value) or c.op == "div" else (b, a)
    return a if not any(rounding) and _number(b) and b == 1 and isinstance(a, Value) and a.meta.dtype == c.meta.dtype else None


@rule("mul")
def swish(n: Normal, c: Call, a, b):
    """x · sigmoid(x) = silu(x)."""
    for x, s in ((a, b), (b, a)):
        if n.near(s, "sigmoid") and s.args[0] is x:
            return n.add("silu", (x,), c.meta)
    return None


@rule("mul")
def constant_right(n: Normal, c: Call, a, b):
    """c · x = x · c;  −1 · x = neg(x)."""
    a, b = (a, b) if isinstance(a, Value) else (b, a)
    return n.add("neg", (a,), c.meta) if _number(b) and b == -1 else n.add("mul", (a, b), c.meta)


@rule("pow", "square")
def powers(n: Normal, c: Call, x, exponent=2):
    """x¹ = x;  x², square(x) = x · x;  x^½ = sqrt(x);  x^−½ = rsqrt(x)."""
    if not isinstance(x, Value) or not _number(exponent):
        return None
    if exponent == 1 and x.meta.dtype == c.meta.dtype:
        return x
    if exponent == 2:
        return n.add("mul", (x, x), c.meta)
    name = {0.5: "sqrt", -0.5: "rsqrt"}.get(exponent)
    return n.add(name, (x,), c.meta) if name else None


@rule("reciprocal")
def inverse_root(n: Normal, c: Call, x: Value):
    """1 / sqrt(x) = rsqrt(x)."""
    return n.add("rsqrt", x.args, c.meta) if n.near(x, "sqrt") else None


@rule("div")
def division_by_root(n: Normal, c: Call, a, b, *rounding):
    """a / sqrt(x) = a · rsqrt(x)."""
    if any(rounding) or not isinstance(a, Value) or not n.near(b, "sqrt"):
        return None
    return n.add("mul", (a, n.add("rsqrt", b.args, b.meta)), c.meta)


@rule("div")
def true_division(n: Normal, c: Call, a, b, *rounding):
    """div(a, b, rounding_mode=None) = a / b."""
    return None if any(rounding) else n.add("div", (a, b), c.meta)


@rule("mean", "sum")
def positive_dims(n: Normal, c: Call, x: Value, dims=None, keepdim=False, dtype=None):
    """mean(x, −1, dtype) = mean(cast(x, dtype), (rank − 1,)): dimensions sorted and positive, the dtype a cast of its own."""
    if not isinstance(dims, int | tuple | list) or isinstance(dims, bool):
        return None
    dims = tuple(sorted(_dim(x, d) for d in (dims if isinstance(dims, tuple | list) else (dims,))))
    return n.add(c.op, (n.cast(x, dtype) if dtype else x, dims, keepdim), c.meta)


@rule("softmax")
def one_softmax(n: Normal, c: Call, x: Value, dim, dtype=None):
    """softmax(x, −1, dtype) = softmax(cast(x, dtype), rank − 1)."""
    return n.add("softmax", (n.cast(x, dtype) if dtype else x, _dim(x, dim)), c.meta)


@rule("matmul", "bmm", "mm")
def batched_product(n: Normal, c: Call, a: Value, b: Value):
    """bmm = matmul;  a Wᵀ = linear(a, W), W a matrix;  a bᵀ = matmul_transposed(a, b), where the permutation bᵀ, cast or not, has
    b's last dimension as its row. A permutation is a view: of memory that somebody writes, too, it is the product that reads.
    """
    rank = len(b.meta.shape)
    x = b.args[0] if n.near(b, "cast") else b  # autocast's
    if rank == 2 and len(a.meta.shape) > 1 and x.op == "permute" and x.region == n.region and b.meta.dtype == c.meta.dtype:
        return n.add("linear", (a, n.cast(x.args[0], b.meta.dtype), None), c.meta)
    if len(a.meta.shape) < 3 or rank < 3:
        return None
    if x.op == "permute" and x.region == n.region and x.args[1][-2] == rank - 1:
        *dims, last, row = x.args[1]
        return n.add("matmul_transposed", (a, n.cast(n.permute(x.args[0], (*dims, row, last)), b.meta.dtype)), c.meta)
    return n.add("matmul", (a, b), c.meta)


@rule("baddbmm")
def product_added(n: Normal, c: Call, x: Value, a: Value, b: Value, beta=1, alpha=1):
    """baddbmm(x, a, b, alpha) = alpha · a b + x, or without x where that is zeros."""
    if beta != 1:
        return None
    product = n.call("mul", (n.call("bmm", (a, b), c.metas), alpha), c.metas)
    return product if x.op == "zeros" and not x.mutated_storage else n.call("add", (product, x), c.metas)


# ---------------------------------------------------------------- shapes


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as")
def one_view(n: Normal, c: Call, x: Value, *_):
    """view, reshape, flatten, unflatten, squeeze, unsqueeze = view(x, shape);  view of view = view;  view(x, x.shape) = x."""
    return n.view(x, c.meta.shape) if c.meta.dtype == x.meta.dtype else n.add("bitcast", (x, c.meta.dtype), c.meta)


@rule("expand", "expand_as", "broadcast_to")
def one_expand(n: Normal, c: Call, x: Value, *_):
    """expand, expand_as, broadcast_to = expand(x, shape);  expand(x, x.shape) = x."""
    return n.expand(x, c.meta.shape)


@rule("transpose", "swapaxes", "swapdims")
def transposition(n: Normal, c: Call, x: Value, i, j):
    """transpose(x, i, j) = permute(x, dims)."""
    dims = list(range(len(x.meta.shape)))
    i, j = _dim(x, i), _dim(x, j)
    dims[i], dims[j] = j, i
    return n.permute(x, tuple(dims))


@rule("t", "numpy_T", "mT", "matrix_H", "mH")
def matrix_transposition(n: Normal, c: Call, x: Value):
    """t(x), x.T, x.mT = permute(x, dims)."""
    rank = len(x.meta.shape)
    if c.op in ("matrix_H", "mH") and x.meta.dtype.is_complex or rank < 2:
        return None
    dims = tuple(reversed(range(rank))) if c.op == "numpy_T" else (*range(rank - 2), rank - 1, rank - 2)
    return n.permute(x, dims)


@rule("permute")
def one_permute(n: Normal, c: Call, x: Value, dims):
    """permute of permute = permute;  the identity = x."""
    return n.permute(x, tuple(_dim(x, d) for d in dims))


@rule("slice")
def plain_slice(n: Normal, c: Call, x: Value, dim=0, start=None, end=None, step=1):
    """x[a:b:s] with a, b counted from the front and clipped to the size;  the full slice = x."""
    dim = _dim(x, dim)
    size = x.meta.shape[dim]
    start, end = _index(start, size, 0), _index(end, size, size)
    if isinstance(start, int) and isinstance(end, int):
        end = max(start, end)
    known = same_literal((end - start + step - 1) // step, c.meta.shape[dim])
    return n.slice(x, dim, start, end, step) if known else None


@rule("narrow")
def narrowed(n: Normal, c: Call, x: Value, dim, start, length):
    """narrow(x, dim, a, k) = x[a : a + k]."""
    dim = _dim(x, dim)
    start = _index(start, x.meta.shape[dim], 0)
    return n.slice(x, dim, start, start + length)


@rule("select")
def selected(n: Normal, c: Call, x: Value, dim, index):
    """x[i] = view(x[i : i + 1])."""
    dim = _dim(x, dim)
    start = _index(index, x.meta.shape[dim], 0)
    return n.view(n.slice(x, dim, start, start + 1), c.meta.shape)


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def pieces(n: Normal, c: Call, x: Value, _, dim=0):
    """chunk, split, tensor_split = slices one after the other."""
    dim, start, out = _dim(x, dim), 0, []
    for m in c.metas:
        out.append(n.slice(x, dim, start, start + m.shape[dim]))
        start = start + m.shape[dim]
    return tuple(out) if same_literal(start, x.meta.shape[dim]) else None  # tensor_split's may overlap


@rule("unbind")
def unbound(n: Normal, c: Call, x: Value, dim=0):
    """unbind(x) = (x[0], x[1], …)."""
    dim = _dim(x, dim)
    return tuple(n.view(n.slice(x, dim, i, i + 1), m.shape) for i, m in enumerate(c.metas))


@rule("cat", "concat", "concatenate")
def one_cat(n: Normal, c: Call, xs, dim=0):
    """concat(xs, −1) = cat(xs, rank − 1), without the empty ones;  cat of one = it."""
    if any(len(x.meta.shape) != len(c.meta.shape) or x.meta.dtype != c.meta.dtype for x in xs):
        return None
    dim = _dim(xs[0], dim)
    return n.cat(tuple(x for x in xs if not same_literal(x.meta.shape[dim], 0)) or tuple(xs), dim, c.meta)


@rule("stack")
def stacked(n: Normal, c: Call, xs, dim=0):
    """stack(xs, dim) = cat(unsqueezed xs, dim)."""
    dim = dim + len(c.meta.shape) if dim < 0 else dim
    shape = (*c.meta.shape[:dim], 1, *c.meta.shape[dim + 1 :])
    return n.cat(tuple(n.view(x, shape) for x in xs), dim, c.meta)


@rule("repeat_interleave")
def repeated(n: Normal, c: Call, x: Value, k, dim=None, output_size=None):
    """repeat_interleave(x, k, dim) = view(expand(unsqueeze(x, dim + 1), k)): how repeat_kv is written with expand and reshape."""
    if not isinstance(k, int) or dim is None:
        return None
    dim, shape = _dim(x, dim), x.meta.shape
    one = n.view(x, (*shape[: dim + 1], 1, *shape[dim + 1 :]))
    return n.view(n.expand(one, (*shape[: dim + 1], k, *shape[dim + 1 :])), c.meta.shape)


# ---------------------------------------------------------------- helpers


def _number(a: Any) -> bool:
    return isinstance(a, int | float) and not isinstance(a, bool)


def _scalar(a: Any, dtype: torch.dtype) -> Any:
    """The number that `a` is, or that stands in this tensor without dimensions, of this dtype; None if it is none."""
    if isinstance(a, Value) and a.op == "full" and not a.meta.shape and not a.mutated_storage and a.meta.dtype == dtype:
        a = torch.tensor(a.args[1], dtype=dtype).item() if _number(a.args[1]) else None
    return a if isinstance(a, int | float) else None


def _dim(x: Value, d: int) -> int:
    return d + len(x.meta.shape) if d < 0 else d


def _index(i: Any, size: Any, default: Any) -> Any:
    """A slice bound counted from the front and clipped, as far as that is known without a guard."""
    if i is None:
        return default
    if isinstance(i, int) and i >= INT_MAX:
        return size
    if isinstance(i, int) and i < 0:
        i = i + size if isinstance(size, Symbol) else max(i + size, 0)
    return size if not isinstance(i, Symbol) and not isinstance(size, Symbol) and i > size else i
