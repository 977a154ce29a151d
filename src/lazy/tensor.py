"""Logits that are computed when somebody reads them: a tensor to all code that asks; hidden states and a head until then.

    logits [..., V] = steps(head(hidden))      head: a linear layer, or several (head.py), and a softcap, a scale, casts
                                               steps: what readers have asked for

A graph gives out hidden states where its model gave out logits. Here they become a tensor of the logits' shape, dtype and device
that takes part in autograd. What acts on each position alone stays lazy (casts, softmax, picking positions); what makes a few
numbers of each row is computed some rows at a time, forward and backward; all else is given the logits themselves, which are
computed once and kept.

To autograd it is an ordinary tensor: what is computed of it hangs on it, what it is made of hangs behind it, and its gradient
passes through it, so that hooks see it. Only that gradient is lazy too (gradient.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from sloth.compat.dispatch import DisableTorchFunctionSubclass, make_wrapper_subclass, pytree, saved_tensors_hooks
from sloth.lazy.autograd import Derived, Logits, Merged
from sloth.lazy.gradient import real
from sloth.lazy.head import Head, Layer, RematerializedWeight
from sloth.lazy.rows import LogitsSource, Step, products_of_layers, stepped
from sloth.lazy.snapshot import Claim, StaleLogits
from sloth.lazy.tracing import as_called_by_the_user

# By function: what it gives for lazy logits as its first argument; NotImplemented to have them read. `functions.py` fills it.
HANDLED_FUNCTIONS: dict[Callable, Callable] = {}

_GETTERS = (
    "shape", "dtype", "device", "requires_grad", "ndim", "layout", "itemsize", "nbytes", "grad_fn", "grad", "retains_grad",
    "output_nr", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_mkldnn", "is_sparse", "is_quantized",
    "is_nested", "_backward_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip
_ASKS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point",
    "is_complex", "is_signed", "get_device", "__len__", "__hash__", "retain_grad", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_",
)  # fmt: skip
_SETTERS = "requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks"
METADATA = {getattr(Tensor, name).__get__ for name in _GETTERS} | {getattr(Tensor, name) for name in _ASKS}
METADATA |= {getattr(Tensor, name).__set__ for name in _SETTERS} | {Tensor.grad.__delete__}
METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel}
LAYOUT = {Tensor.stride, Tensor.is_contiguous, Tensor.storage_offset}
HANGS = {getattr(Tensor, name) for name in _ASKS[-4:]} | {getattr(Tensor, name).__set__ for name in _SETTERS}
AUTOGRAD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
BARE = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage, Tensor.data_ptr}  # memory without a tensor
KIND = {Tensor.to, Tensor.type_as}  # ask others than their first argument for dtype and device alone
IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
IN_PLACE |= {"__setitem__", "__ilshift__", "__irshift__"}


log, _told = logging.getLogger("sloth"), set[str]()


class LazyLogits(Tensor):
    """[..., V] = steps(head(hidden)). Made by `lazy`."""

    rows: LogitsSource
    steps: tuple[Step, ...]
    plain: bool  # the steps are casts
    known: Tensor | None  # the logits, once they were read
    origin: tuple | None  # of lazy logits: (function, its arguments, which of its results)
    version: int | None  # of memory that it was read from as a view that nobody may write to in a graph
    written: bool  # somebody has written to it in place: `known` is the tensor now, to autograd too
    views_used: bool  # of what is no view: something hangs on a view of it in autograd, or may
    claim: Claim | None

    def __repr__(self) -> str:
        return repr(materialize(self))

    @classmethod
    @torch.compiler.disable  # compiled code that is given such a tensor breaks its graph where it uses it
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tracing = torch.jit.is_tracing()  # a trace knows this tensor, and no other
        if func in METADATA or func in AUTOGRAD or tracing:
            if func in HANGS:
                _use(args[:1])
            args, kwargs = pytree.tree_map_only(LazyLogits, _itself, (args, kwargs))
            with DisableTorchFunctionSubclass():
                return as_called_by_the_user(func, args, kwargs, __file__) if tracing else func(*args, **kwargs)
        first, bug = args[0] if args else None, None
        if func in LAYOUT and isinstance(first, LazyLogits):
            return func(first.layout_of, *args[1:], **kwargs)
        if func in HANDLED_FUNCTIONS and isinstance(first, LazyLogits) and is_lazy(first):
            found, bug = _handled(func, args, kwargs)
            if found is not NotImplemented:
                return _noted(found, func, args, kwargs)
        if func in KIND and not isinstance(first, LazyLogits):
            like = lambda t: t.new_empty(0)  # noqa: E731
            return func(*pytree.tree_map_only(LazyLogits, like, args), **pytree.tree_map_only(LazyLogits, like, kwargs))
        for written in _written(func, args, kwargs):
            _share(written)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, LazyLogits)]
        real_args, real_kwargs = pytree.tree_map_only(LazyLogits, materialize, (args, kwargs))
        found = func(*real_args, **real_kwargs)
        if bug is not None:
            _tell(func, bug)
        shown = [t for t in given if t.is_view and not t.written and not _is_joined(t) and _shows(func, found, t.known)]
        if not shown:
            _use(given)
            return found
        for t in shown:  # whoever writes to what was found writes to what the view is of
            _join(t)
        args, kwargs = pytree.tree_map_only(LazyLogits, materialize, (args, kwargs))
        _use(given)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Below autograd, which has seen this tensor as it is: only the values are wanted."""
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default) or func is aten.view.default and [*args[1]] == [*args[0].shape]:
            with torch.no_grad():
                return _alias(args[0])
        _use(args)
        values = lambda t: _values(t) if torch.jit.is_tracing() else materialize(t).detach()  # noqa: E731
        return func(*pytree.tree_map_only(LazyLogits, values, args), **pytree.tree_map_only(LazyLogits, values, kwargs or {}))

    def read(self) -> Tensor:
        return materialize(self)

    @cached_property
    def layout_of(self) -> Tensor:
        """What real logits would lie in memory as: a tensor without values, a view of its parent's where it would be one."""
        if self.origin is not None:
            with suppress(RuntimeError, IndexError, NotImplementedError):  # picked by values: a copy
                return _of_origin(self, self.origin[1][0].layout_of)
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @cached_property
    def is_view(self) -> bool:
        """Would it show what is written to what it was made of?"""
        return self.origin is not None and _same_memory(self.layout_of, self.origin[1][0].layout_of)


def _same_memory(x: Any, y: Tensor) -> bool:
    return isinstance(x, Tensor) and x.untyped_storage()._cdata == y.untyped_storage()._cdata


def lazy(
    hidden: Tensor,
    weight: Tensor | RematerializedWeight,
    bias: Tensor | None = None,
    step: Callable[..., Tensor] | None = None,
    autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False),
    plain: bool = True,
    more: Sequence[Layer] = (),
) -> Tensor:
    """step(linear(hidden, weight, bias)), not computed yet; plain: the step is none, or a cast. more: further layers, which read
    further columns of `hidden`; the step then takes what each gives.
    """
    head = Head([(weight, bias), *more], step, autocast)
    rows, like = LogitsSource(head, hidden), head.example(hidden)
    given = [hidden, *(t if isinstance(t, Tensor) else None for t in head.given)]
    rows.need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in given]
    x = Logits.apply(rows, lambda: _wrapper(like, rows.hidden), *given) if any(rows.need) else _wrapper(like, rows.hidden)
    return _filled(x, rows, (), plain)


def made(rows: LogitsSource, steps: tuple[Step, ...], plain: bool, like: Tensor, of: LazyLogits, grad: bool) -> Tensor:
    """Made of other lazy logits by picking rows, or by a step; like: its dtype."""
    x = Derived.apply(rows, steps, lambda: _wrapper(like, rows.hidden), of) if grad else _wrapper(like, rows.hidden)
    return _filled(x, rows, steps, plain)


def merged(
    rows: LogitsSource, operands: Sequence[Any], fn: Callable, steps: tuple[Step, ...], like: Tensor, grad: bool
) -> Tensor:
    """fn(*operands), numbers or things of the same logits, which `steps` compute of these."""
    x = Merged.apply(rows, steps, lambda: _wrapper(like, rows.hidden), fn, *operands) if grad else _wrapper(like, rows.hidden)
    return _filled(x, rows, steps, False)


def _filled(x: Any, rows: LogitsSource, steps: tuple[Step, ...], plain: bool) -> LazyLogits:
    x.rows, x.steps, x.plain, x.known = rows, steps, plain, None
    x.origin, x.version, x.written, x.views_used, x.claim = None, None, False, False, rows.claim()
    return x


def _wrapper(like: Tensor, hidden: Tensor) -> LazyLogits:
    size = (*hidden.shape[:-1], like.shape[-1])
    return make_wrapper_subclass(LazyLogits, size, dtype=like.dtype, device=hidden.device)


def _alias(x: LazyLogits) -> Tensor:
    """It once more, without its past."""
    y = _filled(make_wrapper_subclass(LazyLogits, x.shape, dtype=x.dtype, device=x.device), x.rows, x.steps, x.plain)
    y.origin = Tensor.detach, (x,), {}, None
    return y


def _itself(x: LazyLogits) -> Tensor:
    """What autograd knows it as: written to, the logits; but without gradients it is what it was."""
    if x.known is None and not _overwritten(x):
        return x
    past = materialize(x).grad_fn
    if past is None:
        return x.known if x.written else x
    return x if type(past).__name__ == "_ReadBackward" else x.known


def materialize(logits: Any) -> Any:
    """The logits themselves."""
    if not isinstance(logits, LazyLogits):
        return real(logits)
    if logits.written:
        return logits.known
    if _overwritten(logits):
        logits.known, logits.written = _of_origin(logits), True
    else:
        grad = _is_part_of_graph(logits)
        if logits.known is not None and (_is_outdated(logits) or _has_memory_of_parent(logits) and not _is_joined(logits)):
            logits.known = None  # read before what it is a view of, or before a write without gradients
        if logits.known is None or grad and not logits.known.requires_grad:
            if grad and _has_memory_of_parent(logits) and not _base(logits).views_used and _hangs_on_parent(logits):
                _share(logits)
            elif grad:
                view = partial(_of_origin, logits, materialize(logits.origin[1][0])) if _has_memory_of_parent(logits) else None
                with torch.enable_grad():
                    logits.known = _Read.apply(logits, view)
                logits.version = view and logits.known._version
            else:
                logits.known = _values(logits)
    logits.claim = None
    return logits.known


def _is_part_of_graph(x: LazyLogits) -> bool:
    with DisableTorchFunctionSubclass():
        return x.requires_grad


@torch.no_grad()
def _values(x: LazyLogits) -> Tensor:
    if x.known is not None:
        return x.known.detach()
    if _has_memory_of_parent(x):
        return _of_origin(x).detach()
    x.rows.check()
    return stepped(x.steps, x.rows.head.logits(products_of_layers(x.rows.head.operands(x.rows.hidden))))


def is_lazy(x: LazyLogits) -> bool:
    return x.known is None and not _has_memory_of_parent(x) and not _is_checkpointed()


def _is_checkpointed() -> bool:
    """A checkpoint finds what was saved by its order: run again, it must meet all logits as the first time, that is, read."""
    hooks = saved_tensors_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _handled(func: Callable, args: tuple, kwargs: dict) -> tuple[Any, Exception | None]:
    """What the table gives, and what it raised: the logits themselves know whether something is wrong with the call."""
    try:
        return HANDLED_FUNCTIONS[func](func, *args, **kwargs), None
    except (StaleLogits, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as e:
        return NotImplemented, e


def _tell(func: Callable, bug: Exception) -> None:
    """Once for each function, where it works for the logits themselves."""
    if func.__name__ not in _told:
        _told.add(func.__name__)
        why = f"{type(bug).__name__}: {bug}".split("\n")[0]
        log.warning("sloth: %s reads logits whole, since by rows it raises %s. Please report this", func.__name__, why)


# ---------------------------------------------------------------- writing in place, which views show


def _noted(found: Any, func: Callable, args: tuple, kwargs: dict) -> Any:
    """Note for what stays lazy where it comes from."""
    results = found if isinstance(found, tuple) else (found,)
    for i, t in enumerate(results):
        if isinstance(t, LazyLogits) and t is not args[0]:
            t.origin = func, args, kwargs, i if isinstance(found, tuple) else None
    if not all(isinstance(t, LazyLogits) and (t is args[0] or t.is_view) for t in results):
        _use(args)
    return found


def _use(given: Any) -> None:
    """Something hangs on these, from now on, in autograd. On a view of them alone it does not: that may be made anew."""
    for t in given:
        if isinstance(t, LazyLogits) and t.origin is not None and not t.written and t.is_view:
            _base(t).views_used = True


def _base(x: LazyLogits) -> LazyLogits:
    """What all views of the same memory are views of."""
    return _base(x.origin[1][0]) if x.is_view else x


def _hangs_on_parent(x: LazyLogits) -> bool:
    """Is it, and all that it is a view of, part of one graph? A leaf begins another."""
    parent = x.origin[1][0] if x.is_view else None
    return parent is None or x.origin[0] is not Tensor.detach and _is_part_of_graph(parent) and _hangs_on_parent(parent)


def _written(func: Callable, args: tuple, kwargs: dict) -> list[LazyLogits]:
    """What this call writes to."""
    name, written = func.__name__, [kwargs.get("out")]
    if name.endswith("_") and not name.endswith("__") or name in IN_PLACE or kwargs.get("inplace"):
        written.append(args[0] if args else kwargs.get("input"))
    return [t for t in pytree.tree_leaves(written) if isinstance(t, LazyLogits)]


def _share(x: LazyLogits) -> None:
    """It is about to be written: if it is a view, of the memory that others see."""
    if x.is_view and not x.written:
        _share(x.origin[1][0])
        x.known, x.written, x.claim = _of_origin(x), True, None
    materialize(x)
    x.written = True


def _shows(func: Callable, found: Any, known: Tensor) -> bool:
    """Does a result lie in this memory?"""
    leaves = pytree.tree_leaves(found)
    return func in BARE or any(_same_memory(t, known) for t in leaves if isinstance(t, Tensor) and t.layout == torch.strided)


def _has_memory_of_parent(x: LazyLogits) -> bool:
    """Is it a view of what has been read, and may have been written to?"""
    parent = x.origin and x.origin[1][0]
    return parent is not None and (parent.known is not None or _has_memory_of_parent(parent)) and x.is_view


def _is_joined(x: LazyLogits) -> bool:
    """Does it lie, read, where it would as a view?"""
    parent = x.origin[1][0]
    shares = x.known is not None and parent.known is not None and _same_memory(x.known, parent.known)
    return shares and (not parent.is_view or _is_joined(parent))


def _join(x: LazyLogits) -> None:
    """Let it lie where it would as a view: in the memory of what it was made of."""
    parent = x.origin[1][0]
    if parent.is_view and not parent.written:
        _join(parent)
    materialize(parent)
    x.known = None
    materialize(x)


def _overwritten(x: LazyLogits) -> bool:
    """Is it a view of what somebody has written since?"""
    parent = x.origin and x.origin[1][0]
    return parent is not None and (parent.written or _has_other_past(parent) or _overwritten(parent)) and x.is_view


def _is_outdated(x: LazyLogits) -> bool:
    return x.version is not None and x.version != x.known._version


def _has_other_past(x: LazyLogits) -> bool:
    """Has somebody written to a view of it that is no lazy tensor, in a graph?"""
    past = None if x.known is None or x.version is not None and not x.written else x.known.grad_fn
    return past is not None and type(past).__name__ != "_ReadBackward"


def _of_origin(x: LazyLogits, parent: Tensor | None = None) -> Tensor:
    """What the function that made it gives for the logits themselves."""
    func, (origin, *args), kwargs, i = x.origin
    of_others = materialize if parent is None or not parent.is_meta else lambda t: t.layout_of  # not read for it
    args, kwargs = pytree.tree_map_only(LazyLogits, of_others, (args, kwargs))
    with torch.set_grad_enabled(_is_part_of_graph(x)):
        found = func(materialize(origin) if parent is None else parent, *args, **kwargs)
    return found if i is None else found[i]


# ---------------------------------------------------------------- autograd


class _Read(torch.autograd.Function):
    """The logits themselves; as a view of what they are a view of, where that is read: autograd refuses to write to either."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, view: Callable[[], Tensor] | None) -> Tensor:
        ctx.set_materialize_grads(False)
        return _values(x) if view is None else view()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return grad, None
