"""What Values in normal form are made with: the canonical operations, and the table of rules that bring all others to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from sloth.rewriter.graph.record import Trace, is_factory, op_name, positional, resolve
from sloth.rewriter.graph.value import Meta, Region, Value, ValueGraph, same_literal, values_in

Rule = Callable[..., "Value | tuple | None"]
Metas = tuple[Meta | None, ...]
RULES: dict[str, list[Rule]] = {}
COMMUTATIVE = frozenset({"add", "mul"})
VIEWS = frozenset({"view", "expand", "permute", "slice", "cast"})  # cheap to have twice
ALIASES = VIEWS - {"cast"} | {"detach", "no_grad", "bitcast"}  # share the memory of their first argument
POINTWISE = frozenset({"add", "sub", "mul", "div", "neg", "silu", "gelu", "sigmoid", "tanh", "rsqrt", "sqrt", "exp", "relu"})
FACTORIES = frozenset({"empty", "zeros", "ones", "full", "arange", "scalar_tensor"})  # of numbers alone
FRESH = POINTWISE | FACTORIES | {"cast", "triu", "tril", "fill", "where", "masked_fill"}  # in memory of their own for sure
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

    def __init__(self, shadow: ValueGraph):
        self.shadow = shadow
        self.region = Region()
        self.origin: fx.Node | None = None
        self.mutated_storage = False  # what is made now lies in memory that somebody writes
        self.random = False  # … or is random: two calls are two values
        self.mutated: set[Value] = set()  # written in place by some call
        self.rebound: set[Value] = set()  # made to be another tensor by `set_`: the memory itself is not written
        self.last_use = False  # is the first operand of the current call in memory that nobody else reads?
        self.fills = False  # does the current call write a constant that is being made (`fills.py`)?
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
        elif written == [args[0]] and name.endswith("_") and (self.fills or self.last_use and _fresh(args[0])):
            self.mutated.discard(args[0])
            self.consumed.add(args[0])
            promoted = functools.reduce(torch.promote_types, (v.meta.dtype for v in values_in(args)))
            return self.cast(self.call(name[:-1], args, (metas[0]._replace(dtype=promoted),)), metas[0].dtype)
        return self.call(name, args, metas)

    def add(self, op: str, args: tuple, meta: Meta | None) -> Value:
        if meta is not None:
            floating = meta.dtype.is_floating_point or meta.dtype.is_complex
            grad = floating and self.region.grad and op != "detach" and not is_factory(op)
            meta = meta._replace(requires_grad=grad and any(_wants_grad(a) for a in args))
        mutated_storage = self.mutated_storage or op in ALIASES and args[0].mutated_storage
        return self.shadow.add(op, args, meta, self.region, mutated_storage, self.origin, self.random)

    def cut(self, x: Value | None) -> Value | None:
        """Where gradients are off, a no-op's result is not its argument: a copy has no gradient, x.to(x.dtype) still has."""
        if self.region.grad or x is None or x.meta is None or not x.meta.requires_grad:
            return x
        return self.shadow.add("no_grad", (x,), x.meta, self.region, self.mutated_storage or x.mutated_storage, self.origin)

    def near(self, x: Any, op: str) -> bool:
        """Is it an `op` to look through? Not across a change of grad mode or autocast: it may have no gradient, where the whole
        has one. Nor if somebody writes it: then it is not what it was computed as.
        """
        return isinstance(x, Value) and x.op == op and x.region == self.region and not x.mutated_storage

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
    return v.op in FRESH or "::" in v.op


def _wants_grad(a: Any) -> bool:
    if isinstance(a, Value):
        return a.meta is not None and a.meta.requires_grad or a.meta is None and any(_wants_grad(x) for x in a.args)
    return isinstance(a, tuple | list) and any(_wants_grad(x) for x in a)
