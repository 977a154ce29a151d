"""The gradient of lazy logits: as large as they are, and as little there.

    part:  result = fn(steps(logits of some rows), *beside)  and  ∂L/∂result

A function that takes a few numbers of each row hands on such a part instead of a gradient [..., V]. Autograd takes it for one: it
adds it to others, shows it to hooks, keeps it for `retain_grad`, and carries it, through whatever was made of the logits on the
way, to where they come from. There all parts of the backward pass have come together, and for some rows at a time

    z = h Wᵀ + b again,  dz by autograd through head, steps and results,  dh = dz W,  dW = Σ dzᵀ h,  db = Σ dz

are computed, the sums over rows in fp32: dz is added up where that of real logits is, and rounded as that, and each of dh, dW and
db is rounded once. Who looks at such a gradient gets its values: dz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from sloth.compat.dispatch import DisableTorchFunctionSubclass, make_wrapper_subclass, pytree
from sloth.kernels.common.launch import compute_dtype
from sloth.kernels.linear.gemm import add_product, as_matrix, product
from sloth.lazy.rows import LogitsSource, Step, at_a_time, products_of_layers
from sloth.lazy.snapshot import Claim


class Via(NamedTuple):
    """A step that computes with several things of the same logits: fn(*operands), as one of them sees it. The others, numbers or
    steps from the logits, are constants to it.
    """

    fn: Callable
    operands: tuple[Any, ...]
    seen_by: int

    def __hash__(self) -> int:
        return hash((id(self.fn), self.seen_by))


class Contribution(NamedTuple):
    """A result of some rows, fn(steps(logits), *beside), and the gradients that came to it."""

    rows: LogitsSource
    steps: tuple[Step | Via, ...]
    fn: Callable
    beside: tuple[Tensor, ...]
    grads: tuple[Tensor | None, ...] = ()
    made: Sequence[Tensor | None] | None = None  # what an operator has made of them already: dh, dW, db


# ---------------------------------------------------------------- the tensor


class LazyGradient(Tensor):
    """∂L/∂steps(logits of these rows), [..., V]. Made by `gradient`."""

    rows: LogitsSource
    steps: tuple[Step, ...]
    parts: list[Contribution]
    known: Tensor | None  # its values, once somebody has looked
    claim: Claim | None

    def __repr__(self) -> str:
        return repr(real(self))

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in AS_IT_IS:
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*pytree.tree_map_only(LazyGradient, real, args), **pytree.tree_map_only(LazyGradient, real, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """What autograd does with it."""
        first, aten = args[0], torch.ops.aten
        if isinstance(first, LazyGradient) and first.known is None:
            if func in (aten.detach.default, aten.clone.default, aten.alias.default):
                return gradient(first.rows, first.steps, first, first.parts)
            if func in (aten.add.Tensor, aten.add_.Tensor) and not kwargs:
                parts = parts_of(args[1], first.rows, first.steps) if args[1].shape == first.shape else None
                if parts is not None and func is aten.add_.Tensor:
                    first.parts = [*first.parts, *parts]
                    return first
                if parts is not None:
                    return gradient(first.rows, first.steps, first, [*first.parts, *parts])
        if func is aten.add.Tensor and isinstance(args[1], LazyGradient) and not kwargs and first.shape == args[1].shape:
            return cls.__torch_dispatch__(func, types, (args[1], first))
        with enable_reentrant_dispatch():  # autograd computes the values
            args, kwargs = pytree.tree_map_only(LazyGradient, real, (args, kwargs or {}))
        return func(*args, **kwargs)


AS_IT_IS = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "grad", "is_sparse")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.__len__, Tensor.__hash__}


class Kind(NamedTuple):
    """What a gradient has of its tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def kind(x: Tensor) -> Kind:
    return Kind(x.shape, x.dtype, x.device)


def gradient(rows: LogitsSource, steps: tuple[Step, ...], like: Kind | Tensor, parts: list[Contribution]) -> LazyGradient:
    g = make_wrapper_subclass(LazyGradient, like.shape, dtype=like.dtype, device=like.device)
    g.rows, g.steps, g.parts, g.known, g.claim = rows, steps, parts, None, rows.claim()
    return g


def parts_of(grad: Tensor, rows: LogitsSource, steps: tuple[Step, ...]) -> list[Contribution]:
    """What a gradient of such logits is made of: one part, where it has values."""
    if isinstance(grad, LazyGradient) and grad.known is None and grad.rows is rows and grad.steps == steps:
        return grad.parts
    return [Contribution(rows, steps, _same, (), (as_matrix(real(grad).detach()),))]


def _same(z: Tensor) -> Tensor:
    return z


# ---------------------------------------------------------------- its values


def real(grad: Any) -> Any:
    """dz, where it is a lazy gradient."""
    if not isinstance(grad, LazyGradient):
        return grad
    if grad.known is None:
        with torch.no_grad():
            found = [_values(grad, rows, parts) for rows, parts in _by_rows(grad.parts)]
            grad.known, grad.claim = sum(found[1:], found[0]).view(grad.shape), None
    return grad.known


def _values(grad: LazyGradient, rows: LogitsSource, parts: list[Contribution]) -> Tensor:
    rows.check()
    operands = rows.head.operands(as_matrix(rows.hidden))
    out = torch.empty(len(operands[0][0]), grad.shape[-1], dtype=grad.dtype, device=grad.device)
    for chunk in at_a_time(operands, terms=len(parts)):
        logits = rows.head.logits(products_of_layers(operands, chunk))
        z = value({(): logits}, grad.steps).detach().requires_grad_()
        (out[chunk],) = _through({(): logits, grad.steps: z}, [z], parts, chunk)
    return rows.back(out, grad.rows)


def value(known: dict[tuple, Tensor], steps: tuple[Step | Via, ...]) -> Tensor:
    """steps(logits); each is computed once."""
    if steps not in known:
        z, last = value(known, steps[:-1]), steps[-1]
        if isinstance(last, Via):
            constant = lambda o: value(known, o).detach() if isinstance(o, tuple) else o  # noqa: E731
            known[steps] = last.fn(*(z if i == last.seen_by else constant(o) for i, o in enumerate(last.operands)))
        else:
            known[steps] = last(z)
    return known[steps]


def _through(known: dict, of: list[Tensor], parts: Sequence[Contribution], chunk: slice) -> tuple[Tensor, ...]:
    """The gradients that all parts have, where some steps are known, of those tensors."""
    wanted, given = [], []
    with torch.enable_grad():
        for part in parts:
            one = part.fn(value(known, part.steps), *(b[chunk] for b in part.beside))
            pairs = zip(one if isinstance(one, tuple) else (one,), part.grads, strict=True)
            used = [(o, g[chunk]) for o, g in pairs if g is not None]
            wanted += [o for o, _ in used]
            given += [g for _, g in used]
    found = torch.autograd.grad(wanted, of, given, allow_unused=True)
    return tuple(torch.zeros_like(t) if d is None else d for t, d in zip(of, found, strict=True))


def _by_rows(parts: Sequence[Contribution]) -> list[tuple[LogitsSource, list[Contribution]]]:
    found: dict[LogitsSource, list[Contribution]] = {}
    for part in parts:
        found.setdefault(part.rows, []).append(part)
    return list(found.items())


# ---------------------------------------------------------------- of hidden states and weights


def gradients(source: LogitsSource, parts: list[Contribution], need: Sequence[bool]) -> list[Tensor | None]:
    """dh, and dW and db of each layer, in fp32 (or fp64); None for what is not needed."""
    if len(parts) == 1 and parts[0].made is not None:
        dh, *more = parts[0].made
        if all(d is not None for d, n in zip(parts[0].made, need, strict=True) if n):
            return [parts[0].rows.back(dh, source) if need[0] else None, *more]
    wide, needs = compute_dtype(source.hidden), list(zip(need[1::2], need[2::2], strict=True))
    layers = [_Layer(weight, bias, *n) for (weight, bias), n in zip(source.head.layers, needs, strict=True)]
    dh = None
    for rows, of_rows in _by_rows(parts):
        rows.check()
        operands = rows.head.operands(as_matrix(rows.hidden))
        trained = sum(weight.nbytes for (_, weight, _), (need_w, _) in zip(operands, needs, strict=True) if need_w)
        dxs = [x.new_empty(x.shape, dtype=wide) if need[0] else None for x, _, _ in operands]
        for chunk in at_a_time(operands, trained, len(of_rows)):
            zs = [z.requires_grad_() for z in products_of_layers(operands, chunk)]
            with torch.enable_grad():
                logits = rows.head.logits(zs)
            dzs = _through({(): logits}, zs, of_rows, chunk)
            for layer, dx, dz, (x, weight, _) in zip(layers, dxs, dzs, operands, strict=True):
                layer.add(dz, x[chunk], wide)
                if dx is not None:
                    product(dz, weight, dx[chunk])
        if need[0]:
            d = rows.back(dxs[0] if len(dxs) == 1 else torch.cat(dxs, 1), source)
            dh = d if dh is None else dh.add_(d)
    return [dh, *(d for layer in layers for d in (layer.dw, layer.db))]


class _Layer:
    """The gradients of a layer's weights, chunk by chunk; None for what is not needed."""

    def __init__(self, weight: Any, bias: Tensor | None, need_w: bool, need_b: bool):
        self.shape, self.need_w, self.need_b, self.dw, self.db = weight.shape, need_w, need_b, None, None

    def add(self, dz: Tensor, x: Tensor, wide: torch.dtype) -> None:
        if self.need_w and self.dw is None:
            self.dw = x.new_empty(self.shape, dtype=wide)
            product(dz.t(), x, self.dw)
        elif self.need_w:
            add_product(dz.t(), x, self.dw)
        if self.need_b:
            db = dz.sum(0, dtype=wide)
            self.db = db if self.db is None else self.db.add_(db)
