"""The shadow: a hash-consed, functional view of a traced graph in which every pattern is matched.

A `Value` is one operation in normal form: `op` is an ATen name without overload ("mul", "cast", "slice" …), `args` are Values,
literals (numbers, SymInts, strings, dtypes, None) or tuples of them, in the order of the ATen schema with defaults filled in.
Sizes and other Python scalars are literals, never Values, so that every spelling of a shape is the same shape.
The shadow is only read; what is rewritten is the graph it was made from, which `Value.nodes` points back into.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import SymBool, SymFloat, SymInt, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sloth.compat.dispatch import HigherOrderOperator
from sloth.rewriter.graph.ambient import OFF, Autocast

Symbol = (SymInt, SymFloat, SymBool)


class Meta(NamedTuple):
    """What is known of a tensor: sizes (int or SymInt), dtype, device, and whether a gradient flows through it."""

    shape: tuple
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    @classmethod
    def of(cls, t: torch.Tensor, requires_grad: bool | None = None) -> Meta:
        return cls(tuple(t.shape), t.dtype, t.device, t.requires_grad if requires_grad is None else requires_grad)


class Region(NamedTuple):
    """The ambient state an operation runs under. A match never spans two regions."""

    grad: bool = True
    autocast: Autocast = OFF
    transforms: int = 0  # how many transforms of torch.func (vmap, grad …) it is inside of


@dataclass(eq=False, slots=True)
class Value:
    """One value of the shadow. Compared by identity: equal values are the same object."""

    id: int
    op: str
    args: tuple
    meta: Meta | None  # None: not a tensor (an operation with several results)
    region: Region
    mutated_storage: bool = False  # somebody writes this memory: never shared, never computed by a match
    users: list[Value] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)  # nodes of the traced graph whose value this is, in graph order
    origin: fx.Node | None = None  # the node during whose expansion it first appeared
    analyses: dict[str, Any] = field(default_factory=dict)  # what patterns found out about it, each asked once
    replaces: list[Value] = field(default_factory=list)  # a rule put this in place of the first of these, made of the others
    graph: ValueGraph | None = None  # that it is a value of
    captured_from: Value | None = None  # of an input of a body: the value of the graph around it that is always passed there

    @property
    def inputs(self) -> Iterator[Value]:
        return values_in(self.args)

    def __repr__(self) -> str:
        shape = "" if self.meta is None else f": {str(self.meta.dtype)[6:]}{list(self.meta.shape)}"
        return f"%{self.id}{shape} = {self.op}({', '.join(_show(a) for a in self.args)})"


def values_in(args: Any) -> Iterator[Value]:
    """The Values in nested tuples of arguments."""
    for a in args:
        if isinstance(a, Value):
            yield a
        elif isinstance(a, tuple | list):
            yield from values_in(a)


def uncast(v: Value) -> Value:
    """What `v` is a cast of, or itself."""
    while v.op == "cast":
        v = v.args[0]
    return v


def shown(v: Value) -> str:
    """For people: what it is called in the model, and its dtype and sizes."""
    node = v.nodes[0] if v.nodes else v.origin
    kind = "" if v.meta is None else f" {str(v.meta.dtype)[6:]} {list(v.meta.shape)}"
    return (f"`{named(node)}`" if node is not None else v.op) + kind


def named(node: fx.Node) -> str:
    """The name of a node; of an input of the graph, that of the module's tensor or of the argument."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if node.op != "placeholder" or source is None:
        return node.name
    try:
        text = source.name if isinstance(source.name, str) else source.name()
    except Exception:  # a source without a name
        return node.name
    return re.sub(r"\.?_?(?:L|modules|parameters|buffers)\[['\"]([^'\"]*)['\"]\]", r".\1", text).strip(".")


def _show(a: Any) -> str:
    if isinstance(a, Value):
        return f"%{a.id}"
    return "(" + ", ".join(_show(x) for x in a) + ")" if isinstance(a, tuple | list) else str(a)


def _told_frozen(origin: fx.Node | None) -> bool:
    """Do the node's tensors need no gradient, as the tracer holds them when all writes are done?"""
    if origin is None or isinstance(origin.target, HigherOrderOperator):  # of results of theirs, what is told is not relied on
        return False
    example = origin.meta.get("example_value")
    told = [t for t in (example if isinstance(example, tuple | list) else [example]) if isinstance(t, torch.Tensor)]
    return bool(told) and not any(t.requires_grad for t in told)


def literal_key(a: Any) -> Any:
    """A hashable stand-in for an argument: SymInts by their expression, Values by which they are."""
    if isinstance(a, Value):
        return ("%", id(a))
    if isinstance(a, tuple | list):
        return tuple(literal_key(x) for x in a)
    if isinstance(a, Symbol):
        return ("sym", str(a.node.expr))
    if isinstance(a, slice):
        return ("slice", literal_key(a.start), literal_key(a.stop), literal_key(a.step))
    return (type(a).__name__, a) if isinstance(a, bool | int | float) else a


def same_literal(a: Any, b: Any) -> bool:
    """Equality of sizes and constants that adds no guard: symbols are equal only where that is known."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same_literal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Symbol) or isinstance(b, Symbol):
        numbers = (int, float, *Symbol)
        return isinstance(a, numbers) and isinstance(b, numbers) and statically_known_true(a == b)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return type(a) is type(b) and a == b or isinstance(a, int | float) and isinstance(b, int | float) and a == b


class ValueGraph:
    """Values by structure. `add` gives the existing value where there is one."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self._by_key: dict[Any, Value] = {}

    def add(
        self,
        op: str,
        args: tuple,
        meta: Meta | None,
        region: Region = Region(),
        mutated_storage: bool = False,
        origin: fx.Node | None = None,
        random: bool = False,
    ) -> Value:
        key = (
            None
            if mutated_storage or random or any(v.mutated_storage for v in values_in(args))
            else (op, literal_key(args), meta and meta.dtype, region)
        )
        if key is not None and (known := self._by_key.get(key)) is not None:
            return known
        if mutated_storage and meta is not None and meta.dtype.is_floating_point and not _told_frozen(origin):
            meta = meta._replace(requires_grad=True)  # what is written into it may bring a gradient
        value = Value(len(self.values), op, args, meta, region, mutated_storage, origin=origin, graph=self)
        self.values.append(value)
        for v in dict.fromkeys(value.inputs):
            v.users.append(value)
        if key is not None:
            self._by_key[key] = value
        return value

    def owns(self, value: Value) -> bool:
        """Is it a value of this shadow, and not of the graph around?"""
        return value.graph is self

    def __str__(self) -> str:
        return "\n".join(map(repr, self.values))
