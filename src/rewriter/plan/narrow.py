"""What is widened only to be narrowed again stays narrow.

Under autocast with weights in fp32 (what PEFT's preparation for k-bit training leaves), the residual stream and the norms are
fp32, a quantised layer gives its bf16 results out in fp32, RoPE and the activation of a gated MLP are computed of them, and the
next layer, or attention, casts to bf16. In memory these are the largest tensors of a layer, twice as wide as what they hold.

An operator that rounds its result once can round it to the dtype that its reader casts to: the same numbers. A sum of products of
bf16 operands, each of which was rounded to bf16 before they were added up in fp32, may be rounded itself in their place, for a
reader that computes in fp32 whatever it reads: rounded as often as before.

There is one reader. The gradients of several would be added up in bf16, where eager adds them in fp32; and what each casts is a
tensor of its own, which it may write to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from sloth.compat.dispatch import OpOverload
from sloth.rewriter.graph.aliasing import tensors
from sloth.rewriter.graph.ambient import dtype_of
from sloth.rewriter.graph.value import Region

NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Kind:
    """result: which of several results can be narrow. streams: arguments that may be narrow with it, being read as fp32. sums:
    the result is a sum of terms in the dtype of the operands. told: the dtype of the result is an argument.
    """

    result: int | None
    streams: tuple[str, ...]
    sums: bool
    told: bool


_KINDS: dict[OpOverload, _Kind] = {}
_CASTS: dict[Callable, tuple[str, ...]] = {}
_UNLESS: dict[Callable, Callable[[fx.Node], bool]] = {}
_ADDS: dict[OpOverload, tuple[str, str]] = {}


def rounds_once(op: OpOverload, result: int | None = None, streams: tuple[str, ...] = (), sums: bool = False) -> None:
    """The operator computes in fp32 at least and rounds each result (or this one of several) once, to its argument `dtype`."""
    _KINDS[op] = _Kind(result, streams, sums, True)


def computes_wide(op: OpOverload, streams: tuple[str, ...]) -> None:
    """The operator reads these tensors, all of one dtype, as fp32 and rounds its results once to that dtype."""
    _KINDS[op] = _Kind(None, streams, False, False)


def casts_in_autocast(op: Callable, operands: tuple[str, ...], unless: Callable[[fx.Node], bool] = lambda call: False) -> None:
    """The operator, or torch's function with these as its first arguments, reads them in the dtype of ambient autocast. Calls for
    which `unless` is true add gradients of them up in the wider dtype.
    """
    _CASTS[op], _UNLESS[op] = operands, unless


def adds(op: OpOverload, terms: tuple[str, str]) -> None:
    """The operator adds these two tensors up, in the wider dtype of the two."""
    _ADDS[op] = terms


def keep_narrow(graph: fx.Graph, regions: Mapping[fx.Node, Region]) -> None:
    """Let the operators of a rewritten graph give narrow results where they may."""
    for dtype in NARROW:
        _Flow(graph, regions, dtype).apply()


class _Flow:
    """The calls of one graph whose results can be of one narrow dtype: the largest set of them that agrees with its readers."""

    def __init__(self, graph: fx.Graph, regions: Mapping[fx.Node, Region], dtype: torch.dtype):
        self.regions, self.dtype = regions, dtype
        self.kinds = {n: _KINDS[n.target] for n in graph.nodes if n.target in _KINDS}
        while True:  # what one may not, those that read it or that it reads may not either
            self.results = {result for n, kind in self.kinds.items() for result in _results(n, kind)}
            refused = [n for n in self.kinds if not self.agrees(n)]
            if not refused:
                break
            for n in refused:
                del self.kinds[n]

    def apply(self) -> None:
        for n, kind in self.kinds.items():
            if kind.told:
                _set_dtype(n, self.dtype)
            for result in _results(n, kind):
                self.narrow(result)

    def narrow(self, n: fx.Node) -> None:
        n.meta["example_value"] = n.meta["example_value"].to(self.dtype)
        for user in n.users:
            if _is_view(user):
                self.narrow(user)

    def agrees(self, n: fx.Node) -> bool:
        kind, results = self.kinds[n], _results(n, self.kinds[n])
        if not results or not all(_is_wide(r) and self.is_taken(r, n) for r in results):
            return False
        if kind.sums and not _operands(n.all_input_nodes) <= {self.dtype}:
            return False
        return all(self.is_narrow(_argument(n, name)) for name in kind.streams)

    def is_taken(self, x: fx.Node, producer: fx.Node, dense: bool = True) -> bool:
        """Has `x`, what the producer gives or a view of it, one reader, which may read it as narrow?"""
        readers = [u for u in x.users if u.target not in ASKS]
        return len(readers) == 1 and self.takes(readers[0], x, producer, dense)

    def takes(self, user: fx.Node, x: fx.Node, producer: fx.Node, dense: bool) -> bool:
        if _is_view(user):
            return self.is_taken(user, producer, dense and user.target in DENSE)
        if (cast := _cast_to(user)) is not None:
            # Of a view that is not dense it lays out anew, and without gradients it gives none: one that is no cast would not.
            return dense and cast == self.dtype and self.has_gradients(user) == self.has_gradients(producer)
        if user.target in _CASTS:
            autocast = self.regions[user].autocast if user in self.regions else ()
            if _UNLESS[user.target](user):
                return False
            return _reads_as(user, x, _CASTS[user.target]) and dtype_of(autocast, _device(x)) == self.dtype
        if not self.kinds[producer].sums:
            return False
        if user in self.kinds and _reads_as(user, x, self.kinds[user].streams):
            return True
        if user.target in _ADDS:
            terms = [_argument(user, name) for name in _ADDS[user.target]]
            return _reads_as(user, x, _ADDS[user.target]) and self.stays_wide(*(t for t in terms if t is not x))
        return user.target in ADDITIONS and not user.kwargs and self.stays_wide(*(a for a in user.args if a is not x))

    def has_gradients(self, n: fx.Node) -> bool:
        """May it, as far as the grad mode around it goes?"""
        return n not in self.regions or self.regions[n].grad

    def stays_wide(self, *others: object) -> bool:
        """Is the one other term of a sum in fp32, and will it be? If it has no dimensions, the sum is not of its dtype."""
        wide = len(others) == 1 and isinstance(others[0], fx.Node) and _is_wide(others[0])
        return wide and others[0].meta["example_value"].dim() > 0 and not self.is_narrow(others[0])

    def is_narrow(self, x: fx.Node) -> bool:
        """Is what a call reads narrow, or will it be?"""
        if not _is_wide(x):
            return isinstance(value := x.meta.get("example_value"), torch.Tensor) and value.dtype == self.dtype
        while x not in self.results and _is_view(x):
            x = x.args[0]
        return x in self.results


ASKS = ("size", "dim", "numel")  # nothing of the numbers
ADDITIONS = (operator.add, torch.add, torch.ops.aten.add.Tensor)
DENSE = {  # where what they are of is
    "view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "flatten", "unflatten", torch.transpose,
    torch.permute, torch.reshape, torch.ops.aten.reshape.default, torch.ops.aten.permute.default,
}  # fmt: skip
VIEWS = DENSE | {"expand", operator.getitem, torch.ops.aten.expand.default, torch.ops.aten.slice.Tensor}


def _is_view(n: fx.Node) -> bool:
    """Of one tensor, its first argument, in its dtype."""
    if n.target not in VIEWS or not n.args or not isinstance(n.args[0], fx.Node):
        return False
    if any(isinstance(a, torch.dtype) for a in (*n.args, *n.kwargs.values())):
        return False
    others = (a for a in n.all_input_nodes if a is not n.args[0])
    return not any(isinstance(a.meta.get("example_value"), torch.Tensor) for a in others)


def _results(n: fx.Node, kind: _Kind) -> list[fx.Node]:
    """The nodes that hold those results of a call that can be narrow."""
    if kind.result is None and "example_value" in n.meta:
        return [n]
    parts = [u for u in n.users if u.target is operator.getitem]
    return [u for u in parts if kind.result is None or u.args[1] == kind.result]


def _argument(n: fx.Node, name: str) -> fx.Node:
    at = [a.name for a in n.target._schema.arguments].index(name)
    return n.args[at] if at < len(n.args) else n.kwargs[name]


def _reads_as(n: fx.Node, x: fx.Node, names: tuple[str, ...]) -> bool:
    """Does the call read `x` as one of these arguments, and as nothing else? Of a function, they are its first."""
    operator_ = isinstance(n.target, OpOverload)
    known = [a.name for a in n.target._schema.arguments] if operator_ else [*names, *map(str, range(len(n.args)))]
    given = dict(n.kwargs) | dict(zip(known, n.args, strict=False))
    read = [name for name, value in given.items() if value is x]
    return len(read) == 1 and read[0] in names


def _cast_to(n: fx.Node) -> torch.dtype | None:
    if n.target not in ("to", torch.ops.aten.to.dtype) or len(n.args) + len(n.kwargs) != 2:
        return None
    dtype = (*n.args[1:], *n.kwargs.values())[0]
    return dtype if isinstance(dtype, torch.dtype) else None


def _is_wide(n: fx.Node) -> bool:
    value = n.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _device(n: fx.Node) -> str:
    return n.meta["example_value"].device.type


def _operands(nodes: Iterable[fx.Node]) -> set[torch.dtype]:
    """Of what is no node that a rewrite made, the dtypes; those have no example, but say in their arguments what they give."""
    found: set[torch.dtype] = set()
    for n in nodes:
        examples = list(tensors(n.meta.get("example_value")))
        given = {a for a in (*n.args, *n.kwargs.values()) if isinstance(a, torch.dtype)} if not examples else set()
        found |= {t.dtype for t in examples} | given or {torch.float32}
    return found


def _set_dtype(call: fx.Node, dtype: torch.dtype) -> None:
    at = [a.name for a in call.target._schema.arguments].index("dtype")
    defaults = [a.default_value for a in call.target._schema.arguments[len(call.args) : at + 1]]
    args = [*call.args, *defaults]
    args[at] = dtype
    call.args = tuple(args)
