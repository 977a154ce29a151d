"""Logits that are computed when somebody reads them: a tensor to all code that asks; hidden states and a head until then.

    logits [..., V] = steps(head(hidden))      head: a linear layer, or several (head.py), and a softcap, a scale, casts
                                               steps: what readers have asked for

A graph gives out hidden states where its model gave out logits. Here they become a tensor of the logits' shape, dtype and device
that takes part in autograd. What acts on each position alone stays lazy (casts, softmax, picking positions); what makes a few
numbers of each row is computed some rows at a time, forward and backward; all else is given the logits themselves, which are
computed once and kept.

Backward, for some rows with d = ∂L/∂result:  z = h Wᵀ + b again,  dz by autograd through head, steps and results,  and
    dh = dz W         dW = Σ dzᵀ h         db = Σ dz            the sums over rows in fp32, for each layer of the head
All results of the same rows wait for each other in a backward pass: there is one dz of all of them, added up where those of real
logits are, and rounded as those, and one product each for dh and dW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.compat.dispatch import DisableTorchFunctionSubclass, current_graph_task_id, make_wrapper_subclass, pytree
from sloth.kernels.common.launch import compute_dtype, without_autocast
from sloth.kernels.linear.gemm import add_product, as_matrix, product
from sloth.lazy.head import Head, Layer, RematerializedWeight, Step, gate_of, versions

CHUNK = 64 * 2**20  # bytes of logits at a time

# By function: what it gives for lazy logits as its first argument; NotImplemented to have them read. `functions.py` fills it.
HANDLED_FUNCTIONS: dict[Callable, Callable] = {}

_GETTERS = (
    "shape", "dtype", "device", "requires_grad", "ndim", "layout", "itemsize", "nbytes", "grad_fn", "grad", "retains_grad",
    "output_nr", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_mkldnn", "is_sparse", "is_quantized",
    "is_nested",
)  # fmt: skip
_ASKS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "get_device", "storage_offset", "__len__", "__hash__",
)  # fmt: skip
METADATA = {getattr(Tensor, name).__get__ for name in _GETTERS} | {getattr(Tensor, name) for name in _ASKS}
METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel}
KIND = {Tensor.to, Tensor.type_as}  # ask others than their first argument for dtype and device alone


class Contribution(NamedTuple):
    """A result of some rows, fn(steps(logits), *beside), and the gradients that came to it."""

    steps: tuple[Step, ...]
    fn: Callable
    beside: tuple[Tensor, ...]
    grads: tuple[Tensor | None, ...] = ()
    made: Sequence[Tensor | None] | None = None  # what an operator has made of them already: dh, dW, db


class LogitsSource:
    """Some rows of a head's logits: what all that is computed of them shares."""

    def __init__(self, head: Head, hidden: Tensor, gate: Tensor | None):
        self.head, self.hidden, self.gate = head, hidden, gate  # gate: where the gradient of hidden states goes
        self.version = versions(hidden)
        self.terms: dict[int, list[Contribution]] = {}  # by backward pass: what has come so far
        self.products = None  # what the layers give, as autograd sees it
        if torch.is_grad_enabled() and any(g is not None for g in self.gates):
            self.products = _Products.apply(head, self.terms, hidden.detach(), *self.gates)

    @property
    def gates(self) -> list[Tensor | None]:
        return [self.gate, *self.head.gates]

    def check(self) -> None:
        self.head.check(self.hidden, self.version)


class LazyLogits(Tensor):
    """[..., V] = steps(head(hidden)). Made by `lazy`."""

    rows: LogitsSource
    steps: tuple[Step, ...]
    plain: bool  # the steps are casts
    connected: bool  # its gradient goes into hidden states and weights
    known: Tensor | None  # the logits, once they were read
    origin: tuple | None  # of lazy logits: (function, its arguments, which of its results)
    written: bool  # somebody has written to it in place

    def __repr__(self) -> str:
        return repr(materialize(self))

    @classmethod
    @torch.compiler.disable  # compiled code that is given such a tensor breaks its graph where it uses it
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if func in HANDLED_FUNCTIONS and isinstance(first, LazyLogits) and is_lazy(first):
            found = HANDLED_FUNCTIONS[func](func, *args, **kwargs)
            if found is not NotImplemented:
                return _noted(found, func, args, kwargs)
        if func in KIND and not isinstance(first, LazyLogits):
            like = lambda t: t.new_empty(0)  # noqa: E731
            return func(*pytree.tree_map_only(LazyLogits, like, args), **pytree.tree_map_only(LazyLogits, like, kwargs))
        if _writes(func) and isinstance(first, LazyLogits):
            _share(first)
        return func(*pytree.tree_map_only(LazyLogits, materialize, args), **pytree.tree_map_only(LazyLogits, materialize, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Below autograd, which has seen this tensor as it is: only the values are wanted."""
        values = lambda t: materialize(t).detach()  # noqa: E731
        return func(*pytree.tree_map_only(LazyLogits, values, args), **pytree.tree_map_only(LazyLogits, values, kwargs or {}))


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
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *head.tensors))
    return made(LogitsSource(head, hidden, gate_of(hidden)), (), plain, head.example(hidden), grad)


def made(rows: LogitsSource, steps: tuple[Step, ...], plain: bool, like: Tensor, grad: bool) -> Tensor:
    x = _Connected.apply(rows, steps, like, rows.products) if grad else _wrapper(like, rows.hidden)
    x.rows, x.steps, x.plain, x.connected, x.known = rows, steps, plain, grad, None
    x.origin, x.written = None, False
    return x


def _wrapper(like: Tensor, hidden: Tensor) -> LazyLogits:
    size = (*hidden.shape[:-1], like.shape[-1])
    return make_wrapper_subclass(LazyLogits, size, dtype=like.dtype, device=hidden.device)


def materialize(logits: Any) -> Any:
    """The logits themselves."""
    if not isinstance(logits, LazyLogits):
        return logits
    if logits.known is None and _overwritten(logits):
        logits.known = _of_origin(logits)
    if logits.known is None:
        with torch.set_grad_enabled(logits.requires_grad):
            direct = logits.connected or not logits.requires_grad
            logits.known = _values(logits) if direct else _Values.apply(logits)
    return logits.known


def _values(x: LazyLogits) -> Tensor:
    x.rows.check()
    return x.rows.head.logits(_products(x.rows.head.operands(x.rows.hidden)), x.steps)


def _products(operands: Sequence[tuple], rows: slice = slice(None)) -> list[Tensor]:
    """What each layer gives for these rows."""
    with without_autocast(operands[0][0]):
        return [F.linear(x[rows], weight, bias) for x, weight, bias in operands]


def is_lazy(x: LazyLogits) -> bool:
    return x.known is None and (x.connected or not x.requires_grad) and not _overwritten(x)


# ---------------------------------------------------------------- writing in place, which views show


def _noted(found: Any, func: Callable, args: tuple, kwargs: dict) -> Any:
    """Note for what stays lazy where it comes from."""
    for i, t in enumerate(found if isinstance(found, tuple) else (found,)):
        if isinstance(t, LazyLogits):
            t.origin = func, args, kwargs, i if isinstance(found, tuple) else None
    return found


def _writes(func: Callable) -> bool:
    name = func.__name__
    return (
        name.endswith("_")
        and not name.endswith("__")
        or name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
    )


def _share(x: LazyLogits) -> None:
    """It is about to be written: if it is a view, of the memory that others see."""
    x.written = True
    if _is_view(x):
        _share(x.origin[1][0])
        x.known = _of_origin(x)


def _overwritten(x: LazyLogits) -> bool:
    """Is it a view of what somebody has written since?"""
    parent = x.origin and x.origin[1][0]
    return parent is not None and (parent.written or _overwritten(parent)) and _is_view(x)


def _is_view(x: LazyLogits) -> bool:
    if x.origin is None:
        return False
    parent = torch.empty(x.origin[1][0].shape, dtype=x.origin[1][0].dtype, device="meta")
    return _of_origin(x, parent).untyped_storage()._cdata == parent.untyped_storage()._cdata


def _of_origin(x: LazyLogits, parent: Tensor | None = None) -> Tensor:
    """What the function that made it gives for the logits themselves."""
    func, (origin, *args), kwargs, i = x.origin
    found = func(
        materialize(origin) if parent is None else parent, *pytree.tree_map_only(LazyLogits, materialize, args), **kwargs
    )
    return found if i is None else found[i]


# ---------------------------------------------------------------- gradients


class _Products(torch.autograd.Function):
    """A stand-in without values for what the layers give. It hands on what has come of all that was computed of it."""

    @staticmethod
    def forward(ctx: Any, head: Head, terms: dict[int, list[Contribution]], hidden: Tensor, *gates: Any) -> Tensor:
        ctx.head, ctx.terms, ctx.version = head, terms, versions(hidden)
        ctx.save_for_backward(hidden)
        return hidden.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        (hidden,) = ctx.saved_tensors
        ctx.head.check(hidden, ctx.version)
        terms, need = ctx.terms.pop(current_graph_task_id(), ()), ctx.needs_input_grad[3:]
        if len(terms) == 1 and terms[0].made is not None:
            found = terms[0].made
        else:
            found = _gradients(ctx.head, hidden, terms, need) if terms else [None] * len(need)
        return None, None, None, *found


def accumulate(terms: dict[int, list[Contribution]], term: Contribution) -> Tensor | None:
    """The term is for `_Products`, which autograd runs when all have come. It is given a gradient without a value."""
    given = [g for g in term.grads if g is not None]
    if not given:
        return None
    terms.setdefault(current_graph_task_id(), []).append(term)
    return given[0].new_zeros(())


class _ChunkedApply(torch.autograd.Function):
    """fn(logits of some rows [n, V], *beside of these rows) for all rows, one result or several."""

    @staticmethod
    def forward(
        ctx: Any, rows: LogitsSource, steps: tuple[Step, ...], fn: Callable, beside: tuple[Tensor, ...], products: Tensor | None
    ) -> tuple:
        operands, found = rows.head.operands(as_matrix(rows.hidden)), []
        for part in _chunks(operands):
            one = fn(rows.head.logits(_products(operands, part), steps), *(b[part] for b in beside))
            found.append(one if isinstance(one, tuple) else (one,))
        found = tuple(map(torch.cat, zip(*found, strict=True)))
        ctx.terms, ctx.how = rows.terms, (steps, fn, beside)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in found if not t.is_floating_point()))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return None, None, None, None, accumulate(ctx.terms, Contribution(*ctx.how, grads))


class _Connected(torch.autograd.Function):
    """A lazy tensor as autograd sees it where code takes it as it is (an autograd function of somebody's, C++)."""

    @staticmethod
    def forward(ctx: Any, rows: LogitsSource, steps: tuple[Step, ...], like: Tensor, products: Tensor) -> Tensor:
        ctx.terms, ctx.steps = rows.terms, steps
        return _wrapper(like, rows.hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad = as_matrix(materialize(grad))
        return None, None, None, accumulate(ctx.terms, Contribution(ctx.steps, lambda z: z, (), (grad,)))


class _Values(torch.autograd.Function):
    """The logits of a lazy tensor that somebody's autograd function has returned: what belongs before it is its own affair."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        return _values(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _chunks(operands: Sequence[tuple], trained: int = 0, terms: int = 1) -> list[slice]:
    """Rows at a time, fewer for many terms. Each chunk adds to all of dW: as many as the weights that are trained, of so many
    bytes, have.
    """
    row = sum(len(weight) * weight.element_size() for _, weight, _ in operands)
    n = max(1, max(CHUNK, trained) // row // terms)
    return [slice(i, i + n) for i in range(0, max(len(operands[0][0]), 1), n)]


def _gradients(head: Head, hidden: Tensor, terms: Sequence[Contribution], need: tuple[bool, ...]) -> list[Tensor | None]:
    """dh, and dW and db of each layer, in fp32 (or fp64), computed some rows at a time; None for what is not needed."""
    operands, wide = head.operands(as_matrix(hidden)), compute_dtype(hidden)
    need_h, needs = need[0], list(zip(need[1::2], need[2::2], strict=True))
    parts = [_Part(*o, *n, need_h, wide) for o, n in zip(operands, needs, strict=True)]
    trained = sum(weight.nbytes for (_, weight, _), (need_w, _) in zip(operands, needs, strict=True) if need_w)
    for rows in _chunks(operands, trained, len(terms)):
        zs = [z.requires_grad_() for z in _products(operands, rows)]
        for part, dz in zip(parts, _dz(head, zs, terms, rows), strict=True):
            part.add(dz, rows)
    dh = parts[0].dx if len(parts) == 1 or not need_h else torch.cat([p.dx for p in parts], 1)
    return [dh.view(hidden.shape) if need_h else None, *(d for p in parts for d in (p.dw, p.db))]


def _dz(head: Head, zs: list[Tensor], terms: Sequence[Contribution], rows: slice) -> tuple[Tensor, ...]:
    """Of all terms; the steps that they share are computed once, and their gradients added up there, as those of a tensor are."""
    wanted, given = [], []
    with torch.enable_grad():
        known = {(): head.logits(zs)}
        for steps, fn, beside, grads, _ in terms:
            for i, step in enumerate(steps):
                if steps[: i + 1] not in known:
                    known[steps[: i + 1]] = step(known[steps[:i]])
            one = fn(known[steps], *(b[rows] for b in beside))
            pairs = zip(one if isinstance(one, tuple) else (one,), grads, strict=True)
            used = [(o, g[rows]) for o, g in pairs if g is not None]
            wanted += [o for o, _ in used]
            given += [g for _, g in used]
    return torch.autograd.grad(wanted, zs, given)


class _Part:
    """The gradients of one layer, chunk by chunk; None for what is not needed."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, need_w: bool, need_b: bool, need_x: bool, wide: torch.dtype
    ):
        self.x, self.weight = x, weight
        self.dx = x.new_empty(x.shape, dtype=wide) if need_x else None
        self.dw = x.new_empty(weight.shape, dtype=wide) if need_w else None
        self.db = x.new_zeros(len(weight), dtype=wide) if need_b else None

    def add(self, dz: Tensor, rows: slice) -> None:
        if self.dx is not None:
            product(dz, self.weight, self.dx[rows])
        if self.dw is not None:
            (add_product if rows.start else product)(dz.t(), self.x[rows], self.dw)
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.db.dtype)


def at_once(x: LazyLogits) -> bool:
    """Are they so few that all of them are computed at once?"""
    return x.nbytes <= CHUNK


def products_of(x: LazyLogits) -> Tensor | None:
    """What gradients of its results go to."""
    return x.rows.products if torch.is_grad_enabled() and x.requires_grad else None


def chunked_apply(x: LazyLogits, fn: Callable, *beside: Tensor) -> Any:
    """fn(logits of some rows [n, V], *beside of these rows) -> [n, …], or several such, for all rows."""
    x.rows.check()
    found = _ChunkedApply.apply(x.rows, x.steps, fn, beside, products_of(x))
    found = [t.view((*x.shape[:-1], *t.shape[1:])) for t in found]
    return found[0] if len(found) == 1 else tuple(found)
