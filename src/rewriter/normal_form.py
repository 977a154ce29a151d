"""Normal form: one spelling for each piece of mathematics. The rules are a table; each is a function with its law as docstring.

A rule `(n, c, *args)` sees one ATen call `c` whose arguments are in normal form already (positional, defaults filled in) and
returns the Value, or the tuple of Values, that stands for it, or None where it does not apply. Rules for one operator are tried
in the order written; where none applies the call stands for itself. A rule may only use what is proven of its arguments: shapes,
dtypes, constants.

`python -m sloth patterns --rules` prints the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from sloth.rewriter.ir import Meta, Region, Shadow, Symbol, Value, same_literal, values_in
from sloth.rewriter.trace import Trace, op_name, positional, resolve

Rule = Callable[..., "Value | tuple | None"]
Metas = tuple[Meta | None, ...]
RULES: dict[str, list[Rule]] = {}
COMMUTATIVE = frozenset({"add", "mul"})
VIEWS = frozenset({"view", "expand", "permute", "slice", "cast"})  # cheap to have twice
ALIASES = VIEWS - {"cast"} | {"detach", "no_grad", "bitcast"}  # share the memory of their first argument
POINTWISE = frozenset({"add", "sub", "mul", "div", "neg", "silu", "gelu", "sigmoid", "tanh", "rsqrt", "sqrt", "exp", "relu"})
INT_MAX = 2**63 - 1


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table under the ATen names it rewrites."""

    def enter(fn: Rule) -> Rule:
        for op in ops:
            RULES.setdefault(op, []).append(fn)
        return fn

    return enter


class Call(NamedTuple):
    """An ATen call: name without overload, and what its tensor results look like."""

    op: str
    metas: Metas

    @property
    def meta(self) -> Meta:
        return self.metas[0]


class Normal:
    """Builds Values in normal form: `call` for an ATen operation, the others for the canonical operations the rules speak of."""

    def __init__(self, shadow: Shadow):
        self.shadow = shadow
        self.region = Region()
        self.origin: fx.Node | None = None
        self.pinned = False  # what is made now lies in memory that somebody writes
        self.random = False  # … or is random: two calls are two values
        self.mutated: set[Value] = set()  # written in place by some call
        self.rebound: set[Value] = set()  # made to be another tensor by `set_`: the memory itself is not written
        self.last_use = False  # is the first operand of the current call in memory that nobody else reads?
        self.consumed: set[Value] = set()  # by a call that wrote to such memory

    def call(self, op: str, args: tuple, metas: Metas) -> Any:
        """The normal form of `op(*args)`, whose tensor results `metas` describes."""
        for r in RULES.get(op, ()):
            if (result := r(self, Call(op, metas), *args)) is not None:
                return result
        if len(metas) == 1:
            return self.add(op, args, metas[0])
        node = self.add(op, args, None)
        return tuple(None if m is None else self.add("getitem", (node, i), m) for i, m in enumerate(metas))

    def replay(self, traced: Trace, leaves: list[Value]) -> Any:
        """The results of a recorded call, on these Values, in normal form."""
        steps: list[tuple] = []
        lookup = lambda r: leaves[r.index] if r.step < 0 else steps[r.step][r.index]  # noqa: E731
        for step in traced.steps:
            args = positional(step, lookup)
            self.random = torch.Tag.nondeterministic_seeded in step.op.tags
            result = self.step(op_name(step.op), step.op._schema, args, step.metas)
            steps.append(tuple(map(self.cut, result)) if isinstance(result, tuple) else (self.cut(result),))
        self.random = False
        return resolve(traced.output, lookup)

    def step(self, name: str, schema: torch.FunctionSchema, args: tuple, metas: Metas) -> Any:
        """One recorded call. What writes is told apart: into a fresh tensor that nobody else reads it is a function like any."""
        if not schema.is_mutable:
            return self.call(name, args, metas)
        written = [a for a, p in zip(args, schema.arguments, strict=True) if p.alias_info and p.alias_info.is_write]
        (self.rebound if name == "set_" else self.mutated).update(values_in(written))
        if any(p.is_out for p in schema.arguments):  # no rule is about writing
            name += ".out"
        elif written == [args[0]] and self.last_use and _fresh(args[0]) and name.endswith("_"):
            self.mutated.discard(args[0])
            self.consumed.add(args[0])
            promoted = functools.reduce(torch.promote_types, (v.meta.dtype for v in values_in(args)))
            return self.cast(self.call(name[:-1], args, (metas[0]._replace(dtype=promoted),)), metas[0].dtype)
        return self.call(name, args, metas)

    def add(self, op: str, args: tuple, meta: Meta | None) -> Value:
        if meta is not None:
            floating = meta.dtype.is_floating_point or meta.dtype.is_complex
            grad = floating and self.region.grad and op != "detach"
            meta = meta._replace(requires_grad=grad and any(_wants_grad(a) for a in args))
        pinned = self.pinned or op in ALIASES and args[0].pinned
        return self.shadow.add(op, args, meta, self.region, pinned, self.origin, self.random)

    def cut(self, x: Value | None) -> Value | None:
        """Where gradients are off, a no-op's result is not its argument: a copy has no gradient, x.to(x.dtype) still has."""
        if self.region.grad or x is None or x.meta is None or not x.meta.requires_grad:
            return x
        return self.shadow.add("no_grad", (x,), x.meta, self.region, self.pinned or x.pinned, self.origin)

    def near(self, x: Any, op: str) -> bool:
        """Is it an `op` to look through? Not across a change of grad mode or autocast: it may have no gradient, where the whole
        has one. Nor if somebody writes it: then it is not what it was computed as.
        """
        return isinstance(x, Value) and x.op == op and x.region == self.region and not x.pinned

    # the canonical operations

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        return x if x.meta.dtype == dtype else self.add("cast", (x, dtype), x.meta._replace(dtype=dtype))

    def view(self, x: Value, shape: tuple) -> Value:
        """Row-major reinterpretation; a view of a view is one view."""
        shape = tuple(shape)
        while self.near(x, "view"):
            x = x.args[0]
        return x if same_literal(x.meta.shape, shape) else self.add("view", (x, shape), x.meta._replace(shape=shape))

    def expand(self, x: Value, shape: tuple) -> Value:
        shape = tuple(shape)
        return x if same_literal(x.meta.shape, shape) else self.add("expand", (x, shape), x.meta._replace(shape=shape))

    def permute(self, x: Value, dims: tuple[int, ...]) -> Value:
        if self.near(x, "permute"):
            x, dims = x.args[0], tuple(x.args[1][d] for d in dims)
        if dims == tuple(range(len(dims))):
            return x
        return self.add("permute", (x, dims), x.meta._replace(shape=tuple(x.meta.shape[d] for d in dims)))

    def cat(self, xs: tuple[Value, ...], dim: int, meta: Meta) -> Value:
        return xs[0] if len(xs) == 1 else self.add("cat", (tuple(xs), dim), meta)

    def slice(self, x: Value, dim: int, start: Any, end: Any, step: Any = 1) -> Value:
        """x[..., start:end:step, ...] with 0 <= start <= end <= size where that is known."""
        size = x.meta.shape[dim]
        if same_literal(start, 0) and same_literal(end, size) and step == 1:
            return x
        length = (end - start + step - 1) // step
        shape = (*x.meta.shape[:dim], length, *x.meta.shape[dim + 1 :])
        return self.add("slice", (x, dim, start, end, step), x.meta._replace(shape=shape))


def _fresh(v: Value) -> bool:
    """Is it in memory of its own for sure? Custom operators (with a namespace) may not return their operands."""
    return v.op in POINTWISE or v.op == "cast" or "::" in v.op


def _wants_grad(a: Any) -> bool:
    if isinstance(a, Value):
        return a.meta is not None and a.meta.requires_grad or a.meta is None and any(_wants_grad(x) for x in a.args)
    return isinstance(a, tuple | list) and any(_wants_grad(x) for x in a)


# ---------------------------------------------------------------- dtypes and copies


@rule("to", "_to_copy", "type_as")
def cast(n: Normal, c: Call, x: Value, *_):
    """x.to(dtype), x.float(), x.type_as(y) = cast(x, dtype), and nothing where that is x's dtype already."""
    return n.cast(x, c.meta.dtype) if c.meta.device == x.meta.device else None


@rule("contiguous", "clone", "alias", "lift_fresh", "lift_fresh_copy", "resolve_conj", "resolve_neg")
def copy(n: Normal, c: Call, x: Value, *_):
    """contiguous(x), clone(x), alias(x) = x: memory layout is no mathematics."""
    return x


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def no_dropout(n: Normal, c: Call, x: Value, p, train):
    """dropout(x) = x with p = 0 or outside of training."""
    return x if train is False or (_number(p) and p == 0) else None


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


@rule("matmul", "bmm")
def batched_product(n: Normal, c: Call, a: Value, b: Value):
    """bmm = matmul;  a bᵀ = matmul_transposed(a, b), where the permutation bᵀ, cast or not, has b's last dimension as its row."""
    rank = len(b.meta.shape)
    if len(a.meta.shape) < 3 or rank < 3:
        return None
    x = b.args[0] if n.near(b, "cast") else b  # autocast's
    if n.near(x, "permute") and x.args[1][-2] == rank - 1:
        *dims, last, row = x.args[1]
        return n.add("matmul_transposed", (a, n.cast(n.permute(x.args[0], (*dims, row, last)), b.meta.dtype)), c.meta)
    return n.add("matmul", (a, b), c.meta)


@rule("baddbmm")
def product_added(n: Normal, c: Call, x: Value, a: Value, b: Value, beta=1, alpha=1):
    """baddbmm(x, a, b, alpha) = alpha · a b + x, or without x where that is zeros."""
    if beta != 1:
        return None
    product = n.call("mul", (n.call("bmm", (a, b), c.metas), alpha), c.metas)
    return product if x.op == "zeros" and not x.pinned else n.call("add", (product, x), c.metas)


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
