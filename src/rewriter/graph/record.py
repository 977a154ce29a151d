"""Record what a callable does as pre-dispatch ATen calls, on fake tensors, without make_fx.

One small recorder serves both the nodes of a traced graph and the reference code of patterns, so that the two meet in one form.
It sits at the PreDispatch key: above autograd, autocast and the decomposition of composite operators, so `linear`, `silu`,
`softmax` stay whole. SymInts arrive as themselves and need no proxies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from sloth.compat.dispatch import (
    DispatchKey,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    SchemaCheckMode,
    enable_python_dispatcher,
    has_kernel,
    pytree,
)
from sloth.rewriter.graph.scratch import into
from sloth.rewriter.graph.value import Meta, same_literal

AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}  # what autocast casts, and casts to


class Ref(NamedTuple):
    """Result `index` of step `step`; step −1: the `index`-th tensor input."""

    step: int
    index: int


class Step(NamedTuple):
    """One ATen call: arguments hold Refs for tensors; `metas` describes its tensor results in order."""

    op: OpOverload
    args: tuple
    kwargs: dict
    metas: tuple[Meta | None, ...]


class Trace(NamedTuple):
    steps: list[Step]
    output: Any  # a pytree of Refs and literals
    autocasts: bool = False  # did ambient autocast change anything?


class _Recorder(SchemaCheckMode):
    """The PreDispatch key admits three kinds of mode; SchemaCheckMode is the one that only looks on."""

    def __init__(self, inputs: Sequence[torch.Tensor]):
        super().__init__()
        self._dispatch_key = DispatchKey.PreDispatch
        self.steps: list[Step] = []
        self.alive: list[Any] = [*inputs]  # ids must not be used twice
        self.refs = {id(t): Ref(-1, i) for i, t in enumerate(inputs)}
        self.autocasts = False

    def ref(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            if id(x) not in self.refs:
                known = self.refs[id(self.twin(x))]
                self.alive.append(x)
                if self.is_made_of_tensors(known):  # x.data, which makes no call: the same numbers, and no gradient
                    self.steps.append(Step(torch.ops.aten.detach.default, (known,), {}, (Meta.of(x),)))
                    known = Ref(len(self.steps) - 1, 0)
                self.refs[id(x)] = known
            return self.refs[id(x)]
        return x

    def refs_in(self, a: Any) -> Any:
        """Arguments of a call, tensors as Refs. There are thousands: `pytree` would be a third of tracing a reference."""
        return self.ref(a) if isinstance(a, torch.Tensor) else rebuilt(a, self.refs_in)

    def is_made_of_tensors(self, known: Ref) -> bool:
        """Is it an input, or computed of one?"""
        step = self.steps[known.step] if known.step >= 0 else None
        return step is None or not is_factory(op_name(step.op)) and bool(_refs((step.args, step.kwargs)))

    def twin(self, x: torch.Tensor) -> torch.Tensor:
        """The known tensor that `x` is a shallow copy of: factories (zeros, arange …) hand out copies of what they made."""
        storage = x.untyped_storage()._cdata
        for t in reversed(self.alive):
            if t.untyped_storage()._cdata == storage and t.dtype == x.dtype and same_literal(_layout(t), _layout(x)):
                return t
        raise ValueError("reads a tensor that is not among its inputs")

    def autocast(self, func, args, kwargs, out):
        """Make the casts of ambient autocast steps of their own: they leave no trace but the dtype of the result."""
        if not isinstance(out, torch.Tensor) or not torch.is_autocast_enabled(out.device.type):
            return args, kwargs
        if func._schema.is_mutable or not _may_be_cast(func, out.device.type):
            return args, kwargs
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if all(t.dtype == out.dtype for t in given):  # there is nothing to cast
            return args, kwargs
        if not _mixed(func, args, out.device):  # mixed dtypes only autocast lets pass
            with torch.autocast(out.device.type, enabled=False):
                try:
                    if _result(func, args, kwargs).dtype == out.dtype:
                        return args, kwargs
                except RuntimeError:
                    pass

        self.autocasts = True

        def cast(x):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == out.dtype:
                return x
            y = torch.empty_like(x, dtype=out.dtype)
            self.alive.append(y)
            self.steps.append(Step(torch.ops.aten.to.dtype, (self.ref(x), out.dtype), {}, (Meta.of(y),)))
            self.refs[id(y)] = Ref(len(self.steps) - 1, 0)
            return y

        return pytree.tree_map(cast, (args, kwargs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = _result(func, args, kwargs)
        args, kwargs = self.autocast(func, args, kwargs, out)
        flat = [out] if isinstance(out, torch.Tensor) else list(out) if isinstance(out, tuple | list) else []
        if not any(isinstance(t, torch.Tensor) for t in flat) and not func._schema.is_mutable:
            return out  # a size, a scalar: a literal where it is used
        refs_in, kw_in = self.refs_in((tuple(args), kwargs))
        step = len(self.steps)
        self.steps.append(Step(func, refs_in, kw_in, tuple(Meta.of(t) if isinstance(t, torch.Tensor) else None for t in flat)))
        for i, t in enumerate(flat):
            if isinstance(t, torch.Tensor):
                self.alive.append(t)
                self.refs[id(t)] = Ref(step, i)
        return out


@cache
def _may_be_cast(func: OpOverload, device: str) -> bool:
    """Has autocast a rule for the operation, or for what it is made of?"""
    return any(has_kernel(func.name(), key) for key in (f"Autocast{device.upper()}", "CompositeImplicitAutograd"))


def _result(func: OpOverload, args: Any, kwargs: dict) -> Any:
    found = linear_of_fakes(*args) if func is torch.ops.aten.linear.default and not kwargs else None
    return func(*args, **kwargs) if found is None else found


def linear_of_fakes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """What `linear` gives for fake tensors as models have them; None for others, of which torch shall say what they give. torch
    decomposes it in Python and asks of each step how symbols lie in memory, which is half of the time that references take.
    """
    operands = [t for t in (x, weight, bias) if t is not None]
    if any(type(t) is not FakeTensor or t.device != x.device for t in operands) or x.dim() < 2 or weight.dim() != 2:
        return None
    if (
        not same_literal(x.shape[-1], weight.shape[1])
        or bias is not None
        and not same_literal(tuple(bias.shape), (weight.shape[0],))
    ):
        return None
    dtypes, kind = {t.dtype for t in operands}, x.device.type
    if torch.is_autocast_enabled(kind):
        dtypes = {torch.get_autocast_dtype(kind)} if dtypes <= AUTOCAST else dtypes
    if len(dtypes) > 1 or not dtypes <= AUTOCAST:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtypes.pop())


def _mixed(func: OpOverload, args: Any, device: torch.device) -> bool:
    """Are there operands of different dtypes that autocast makes the same? Fake tensors take them as they are."""
    dtypes = {t.dtype for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor) and t.is_floating_point()}
    key = f"Autocast{device.type.upper()}"
    return len(dtypes) > 1 and has_kernel(func.name(), key)


def _refs(args: Any) -> list[Ref]:
    found: list[Ref] = []
    resolve(args, found.append)
    return found


def _layout(t: torch.Tensor) -> tuple:
    return (*t.shape, *t.stride(), t.storage_offset())


def fakes(metas: Sequence[Meta], mode: FakeTensorMode | None) -> list[torch.Tensor]:
    """Fresh fake tensors of these descriptions, or zeros (contiguous: layout is no part of the mathematics)."""
    if mode is None:
        return [torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in metas]
    with mode:
        return [torch.empty([into(s, mode) for s in m.shape], dtype=m.dtype, device=m.device) for m in metas]


def trace(fn: Callable[..., Any], metas: Sequence[Meta], mode: FakeTensorMode | None) -> Trace:
    """Run `fn(*tensors)` on `fakes` described by `metas` and record its ATen calls."""
    inputs = fakes(metas, mode)
    recorder = _Recorder(inputs)
    with torch.no_grad(), mode or nullcontext(), enable_python_dispatcher(), recorder:
        out = fn(*inputs)
    return Trace(recorder.steps, pytree.tree_map(recorder.ref, out), recorder.autocasts)


def is_factory(name: str) -> bool:
    """Does this ATen call make a tensor like another (zeros_like, new_full), of whose numbers it is no function?"""
    return name.endswith("_like") or name.startswith("new_")


def op_name(op: OpOverload) -> str:
    """`aten.mul.Tensor` → "mul"; operators of others keep their namespace."""
    packet = op._schema.name
    return packet.removeprefix("aten::")


def positional(step: Step, lookup: Callable[[Ref], Any]) -> tuple:
    """Arguments in schema order, defaults filled in, lists as tuples."""
    out = []
    for i, p in enumerate(step.op._schema.arguments):
        a = step.args[i] if i < len(step.args) else step.kwargs.get(p.name, p.default_value)
        out.append(resolve(a, lookup))
    return tuple(tuple(a) if isinstance(a, list) else a for a in out)


def resolve(a: Any, lookup: Callable[[Ref], Any]) -> Any:
    return lookup(a) if isinstance(a, Ref) else rebuilt(a, lambda x: resolve(x, lookup))


def rebuilt(a: Any, fn: Callable[[Any], Any]) -> Any:
    """`a` with `fn` applied to its parts, if it is a container."""
    if isinstance(a, dict):
        return {k: fn(v) for k, v in a.items()}
    if isinstance(a, slice):
        return slice(fn(a.start), fn(a.stop), fn(a.step))
    if isinstance(a, tuple | list):
        return (list if isinstance(a, list) else tuple)(fn(x) for x in a)
    return a
