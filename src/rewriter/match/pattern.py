"""Patterns: plain PyTorch reference code, traced by the same recorder and normal form as the models it is looked for in.

    rms = Construct("rms_norm", "RMSNorm", anchor=is_rms_anchor)

    @pattern(rms, op=kernels.rms_norm, dims={"x": "B S D", "weight": "D"})
    def rms_norm(x, weight, *, eps: float):
        ...reference code...

    @rms_norm.variant("gemma", offset=1.0)
    def gemma(x, weight, *, eps: float): ...

Positional parameters are tensors, keyword-only parameters numbers and dtypes found in the graph (annotated `float`, `int` or
`torch.dtype`). A match calls `op` with the bound tensors and numbers by the names of its schema; what a variant passes
(`offset=1.0`) goes to the operator too. It may be a function of the match, and give other values of the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from string import ascii_letters
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import sympy
import torch

from sloth.compat.dispatch import FakeTensorMode, OpOverload
from sloth.rewriter.graph.normal_form import Normal
from sloth.rewriter.graph.record import trace
from sloth.rewriter.graph.value import Meta, Value, ValueGraph

# By the name of an entry: arguments of its operator that the user of a backend call has set.
ARGUMENTS: ContextVar[dict[str, dict[str, Any]]] = ContextVar("ARGUMENTS", default={})  # noqa: B039
# By reference, which entries may share: what it is on example inputs.
_LOOSE: WeakKeyDictionary[Callable[..., Any], dict[tuple[Meta, ...], Graph]] = WeakKeyDictionary()


class PatternError(ValueError):
    """An entry that cannot be used; the message names the entry and what to change."""


@dataclass(frozen=True)
class Construct:
    """A piece of mathematics that models are made of, whatever the entries that match it.

    anchor: is this value characteristic of the construct (one, or a fixed number, for each site)?
    module: how many sites does one call of this module hold, by its class and attributes? Used for models of transformers.
    function: the same by the name of a function that a module calls (what it starts with, underscores aside), one site a module.
    per_site: how many anchors a site can hold (a rotation of q and one of k: 2).
    mathematics: the values that make the construct up where this is its result, whatever its spelling, or none. What it finds and
        no anchor sees is counted as missed.
    """

    name: str
    title: str
    anchor: Callable[[Value], bool] = lambda value: False
    module: Callable[[torch.nn.Module, dict], int] = lambda module, arguments: 0
    function: str = ""
    per_site: int = 1
    mathematics: Callable[[Value], Set[Value]] = lambda value: frozenset()


@dataclass(frozen=True)
class Graph:
    """A traced reference: its inputs and results in normal form, which literals stand for which numbers, and which are computed
    of such (`-limit`). autocasts: with another ambient autocast it may be another one.
    """

    inputs: dict[str, Value]
    roots: tuple[Value, ...]
    sentinels: dict[Any, str]
    computed: frozenset[Any] = frozenset()
    autocasts: bool = False

    @property
    def main(self) -> Value:
        """The result that the others are found from: the one computed last."""
        return max(self.roots, key=lambda r: r.id)

    @property
    def values(self) -> list[Value]:
        """All that it computes, and its inputs."""
        seen: dict[Value, None] = {}
        todo = [*self.roots]
        while todo:
            if (v := todo.pop(0)) not in seen:
                seen[v] = None
                todo += v.inputs
        return list(seen)

    @property
    def literals(self) -> set[Any]:
        """The numbers in it."""
        return {a for v in self.values for a in _flat(v.args) if isinstance(a, int | float) and not isinstance(a, bool)}


@dataclass(eq=False)
class Variant:
    """One way to write a construct."""

    pattern: Pattern
    name: str
    reference: Callable[..., Any]
    options: dict[str, Any]
    dims: dict[str, str]

    def __post_init__(self) -> None:
        self.tensors, self.numbers = _parameters(self.reference)
        if missing := [t for t in self.tensors if t not in self.dims]:
            raise PatternError(f"pattern {self}: no dims given for {', '.join(missing)}")
        op, names = self.pattern.op, {a.name for a in self.pattern.op._schema.arguments}
        made = any(map(callable, self.options.values()))  # of bindings, which then need not be arguments themselves
        bound = () if made else (*self.tensors, *(n for n, kind in self.numbers.items() if kind is not torch.dtype))
        if unknown := [n for n in (*bound, *self.options) if n not in names]:
            hint = ""
            if number := next((n for n in unknown if n in self.numbers), ""):
                hint = (
                    f". If {number} follows from another number, write so in the reference (-limit). If a check relates the two,"
                    " give what the operator takes as a function of the match: limit=lambda match: match.limit"
                )
            has = f"it has {', '.join(sorted(names))}"
            raise PatternError(f"pattern {self}: {op} has no argument {', '.join(unknown)}; {has}{hint}")
        self._loose: Graph | None = None

    def __str__(self) -> str:
        return f"{self.pattern.name}[{self.name}]"

    def sample_metas(self, dtype: torch.dtype = torch.bfloat16) -> list[Meta]:
        """Descriptions of example inputs: a size for each letter of `dims`."""
        sizes = {}
        letters = sorted({letter for spec in self.dims.values() for letter in _letters(spec)})
        for i, letter in enumerate(letters):
            sizes[letter] = self.pattern.sizes.get(letter, 2 * (i + 3))
        return [self.meta(t, sizes, dtype) for t in self.tensors]

    def meta(self, tensor: str, sizes: dict[str, int], dtype: torch.dtype) -> Meta:
        spec = self.dims[tensor]
        known = {sympy.Symbol(letter): sympy.Integer(size) for letter, size in sizes.items()}
        shape = tuple(int(s.xreplace(known)) for s in _sizes(spec))
        return Meta(shape, torch.int64 if spec.endswith("int64") else dtype, torch.device("cpu"))

    def loose(self) -> Graph:
        """Traced once in bf16, so that every cast shows; sizes and dtypes in it are examples. Small tensors are run through it:
        fake ones would take several times as long, and there are hundreds of variants.
        """
        if self._loose is None:
            known, examples = _LOOSE.setdefault(self.reference, {}), tuple(self.sample_metas())
            if examples not in known:
                known[examples] = self._traced_loose()
            self._loose = known[examples]
        return self._loose

    def _traced_loose(self) -> Graph:
        sentinels = _sentinels(self.numbers)
        with torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=()), _one_thread():  # whatever is ambient
            graph = self._example(sentinels)
            if any(map(_is_odd, graph.literals - sentinels.keys())):  # what another example has otherwise is computed
                fixed = self._example(_sentinels(self.numbers, 1)).literals | sentinels.keys()
                graph = replace(graph, computed=frozenset(filter(_is_odd, graph.literals - fixed)))
        return graph

    @cached_property
    def is_seen(self) -> bool:
        """Does an anchor of the construct mark a value of the reference?"""
        try:
            return any(map(self.pattern.construct.anchor, (v for v in self.loose().values if v.op != "input")))
        except Exception:  # a bug of the anchor is told where it is asked about models
            return True

    def _example(self, sentinels: dict[Any, str]) -> Graph:
        return self.graph(self.sample_metas(), {n: v for v, n in sentinels.items()}, None, sentinels)

    def graph(
        self, metas: list[Meta], numbers: dict[str, Any], mode: FakeTensorMode | None, sentinels: dict | None = None
    ) -> Graph:
        """The reference traced on tensors like these, fake ones of a mode, or zeros."""
        traced = trace(lambda *tensors: self.reference(*tensors, **numbers), metas, mode)
        shadow = ValueGraph()
        inputs = [shadow.add("input", (t,), m) for t, m in zip(self.tensors, metas, strict=True)]
        output = Normal(shadow).replay(traced, inputs)
        roots = output if isinstance(output, tuple) else (output,)
        return Graph(dict(zip(self.tensors, inputs, strict=True)), roots, sentinels or {}, autocasts=traced.autocasts)


@dataclass(eq=False)
class Pattern:
    """An entry of the registry: variants of one construct that one operator replaces."""

    name: str
    construct: Construct
    op: OpOverload
    dims: dict[str, str]
    sizes: dict[str, int] = field(default_factory=dict)
    no_grad: tuple[str, ...] = ()
    recompute: bool = False
    cheap: tuple[str, ...] = ()
    deferred: Callable[..., torch.Tensor] | None = None
    also: tuple[Construct, ...] = ()
    numbers: dict[str, tuple[float, ...]] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    reads: Reads | None = None  # finds places itself, in place of variants
    checks: list[Callable[..., None]] = field(default_factory=list)

    def variant(self, name: str, dims: dict[str, str] | None = None, **options: Any) -> Callable[[Callable], Callable]:
        """Add another spelling. `options` go to the operator; `dims` replaces or adds descriptions of tensors."""

        def enter(reference: Callable) -> Callable:
            self.variants.append(Variant(self, name, reference, options, {**self.dims, **(dims or {})}))
            return reference

        return enter

    def check(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Add a condition: `fn(match)` calls `match.require(condition, reason)`."""
        self.checks.append(fn)
        return fn


class Reading(NamedTuple):
    """A place that an entry found by reading what the graph computes: what would be a variant's name, the operator's arguments
    (tensors, options), its results and all values that it computes.
    """

    name: str
    tensors: dict[str, Value]
    options: dict[str, Any]
    roots: tuple[Value, ...]
    values: frozenset[Value]


Reads = Callable[[ValueGraph, Set[Value]], Iterator[Reading]]


@dataclass(frozen=True)
class LazyOutputRule:
    """An entry without an operator: linear layers that it wants, whose results the graph only gives out, are left to `make`."""

    name: str
    construct: Construct
    wanted: Callable[[Value], bool]
    make: Callable[..., torch.Tensor]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost tiny products more than everything else, where others use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() == 1:  # it is the whole process's: somebody else may have set it
            torch.set_num_threads(threads)


KINDS = {int: (int, "int"), torch.dtype: (torch.dtype, "torch.dtype")}  # of keyword-only parameters, by annotation; others: float


def _sentinels(parameters: dict[str, type], example: int = 0) -> dict[Any, str]:
    """A constant for each parameter that no reference writes itself. What is cast to the last dtype is not computed with."""
    dtypes = iter((torch.float64, torch.float16, torch.float8_e5m2))
    start = 0.0173 + 0.0204 * example
    make = {float: lambda i: start + 0.0011 * i, int: lambda i: 90017 - 6996 * example + i, torch.dtype: lambda i: next(dtypes)}
    return {make[kind](i): name for i, (name, kind) in enumerate(parameters.items())}


def _is_odd(number: float) -> bool:
    """Is it none that references hold by themselves: sizes, halves, no bound?"""
    if isinstance(number, int):
        return 1000 < abs(number) < 1 << 62
    return number * 1024 % 1 != 0 and abs(number) != float("inf")


def _flat(args: Any) -> Iterator[Any]:
    for a in args:
        if isinstance(a, tuple | list):
            yield from _flat(a)
        else:
            yield a


def _parameters(fn: Callable) -> tuple[list[str], dict[str, type]]:
    tensors, numbers = [], {}
    for p in inspect.signature(fn).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            numbers[p.name] = next((t for t, names in KINDS.items() if p.annotation in names), float)
        else:
            tensors.append(p.name)
    return tensors, numbers


@cache
def _sizes(spec: str) -> list[Any]:
    """ "B S 2*I" as sympy's expressions (a trailing dtype is not a size)."""
    letters = {c: sympy.Symbol(c) for c in ascii_letters}
    sizes = [s for s in spec.split() if s != "int64"]
    return [sympy.sympify(s, locals=letters) for s in sizes]  # pyright: ignore[reportCallIssue]  (it takes text)


@cache
def _letters(spec: str) -> frozenset[str]:
    return frozenset(str(letter) for size in _sizes(spec) for letter in size.free_symbols)
