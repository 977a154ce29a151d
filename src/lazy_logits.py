"""Logits that are computed when somebody reads them: a tensor to all code that asks; hidden states and a head until then.

A graph that computes the loss by itself gives out hidden states where it gave out logits. Here they become a tensor of the
logits' shape, dtype and device that takes part in autograd. What acts on each position alone stays lazy (casts, softmax, picking
positions); what makes a few numbers of each row is computed some rows at a time, forward and backward; all else is given the
logits themselves, which are computed once and kept. Weights that an optimizer has changed since would make other logits: reading
is refused then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from sloth.kernels.gemm import as_matrix
from sloth.kernels.linear_cross_entropy import linear_cross_entropy

CHUNK = 64 * 2**20  # bytes of logits at a time

Head = Callable[..., Tensor]  # (hidden [..., H], *weights) -> logits [..., V], each row by itself


class LazyLogits(Tensor):
    """[..., V] = head(hidden, *weights). Made by `lazy`; `plain`: the head is linear(hidden, weight, bias) but for a cast."""

    hidden: Tensor
    weights: tuple[Tensor, ...]
    head: Head
    plain: bool
    versions: tuple[int, ...]  # of the weights when the logits were to be computed
    stale: bool  # an optimizer has changed the weights since
    connected: bool  # its gradient goes into hidden states and weights
    known: Tensor | None  # the logits, once they were read

    def __repr__(self) -> str:
        return repr(read(self))

    @classmethod
    @torch._dynamo.disable  # compiled code that is given such a tensor breaks its graph where it uses it
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in STAYS_LAZY and isinstance(args[0], LazyLogits) and _is_lazy(args[0]):
            found = STAYS_LAZY[func](func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*tree_map_only(LazyLogits, read, args), **tree_map_only(LazyLogits, read, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Below autograd, which has seen this tensor as it is: only the values are wanted."""
        values = lambda t: read(t).detach()  # noqa: E731
        return func(*tree_map_only(LazyLogits, values, args), **tree_map_only(LazyLogits, values, kwargs or {}))


class _Connected(torch.autograd.Function):
    """A lazy tensor as autograd sees it where code takes it as it is (an autograd function of somebody's, C++)."""

    @staticmethod
    def forward(ctx: Any, head: Head, plain: bool, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.head = head
        ctx.save_for_backward(hidden, *weights)
        return _wrapper(head, plain, hidden, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        leaves = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)]
        with torch.enable_grad():
            out = ctx.head(*leaves)
        found = iter(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], read(grad)))
        return None, None, *(next(found) if t.requires_grad else None for t in leaves)


def _wrapper(head: Head, plain: bool, hidden: Tensor, weights: tuple[Tensor, ...]) -> LazyLogits:
    with torch.no_grad():
        like = head(as_matrix(hidden.detach())[:0], *weights)  # no rows: what dtype, how wide?
    size = (*hidden.shape[:-1], like.shape[-1])
    made = Tensor._make_wrapper_subclass(LazyLogits, size, dtype=like.dtype, device=hidden.device)
    made.head, made.plain, made.hidden, made.weights = head, plain, hidden, weights
    made.versions, made.stale, made.connected, made.known = tuple(w._version for w in weights), False, False, None
    if any(w.requires_grad for w in weights):
        _of_trained_heads[id(made)] = made
    return made


_of_trained_heads: WeakValueDictionary[int, LazyLogits] = WeakValueDictionary()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused optimizers do not count up the versions of what they write."""
    if _of_trained_heads:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for x in list(_of_trained_heads.values()):
            x.stale = x.stale or any(id(w) in stepped for w in x.weights)


register_optimizer_step_post_hook(_after_step)


def _checked(x: LazyLogits) -> Head:
    """The head, as long as its weights are what they were."""
    if x.stale or tuple(w._version for w in x.weights) != x.versions:
        raise RuntimeError(
            "sloth: the weights of the head have changed since these logits were given out, and nothing had read them before. "
            "Read what you want of `outputs.logits` before the optimizer's step, or keep real logits with "
            'torch.compile(…, backend="sloth", options={"sloth.disable": "linear_cross_entropy"}).'
        )
    return x.head


class _Values(torch.autograd.Function):
    """The logits of a lazy tensor that somebody's autograd function has returned: what belongs before it is its own affair."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        return _checked(logits)(logits.hidden, *logits.weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def lazy(hidden: Tensor, weights: tuple[Tensor, ...], head: Head, plain: bool = False) -> Tensor:
    """head(hidden, *weights), not computed yet. `head` must treat the rows of `hidden` [..., H] each by itself."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *weights)):
        made = _Connected.apply(head, plain, hidden, *weights)
        made.hidden, made.weights = hidden, weights  # as they are outside of the function, with their history
        made.connected = True
        return made
    return _wrapper(head, plain, hidden.detach(), weights)


def read(logits: Any) -> Any:
    """The logits themselves."""
    if not isinstance(logits, LazyLogits):
        return logits
    grad = logits.requires_grad
    if logits.known is None:
        with torch.set_grad_enabled(grad):
            direct = logits.connected or not grad
            logits.known = _checked(logits)(logits.hidden, *logits.weights) if direct else _Values.apply(logits)
    return logits.known


def _is_lazy(x: LazyLogits) -> bool:
    return x.known is None and (x.connected or not x.requires_grad)


# ---------------------------------------------------------------- what stays lazy


def _with(
    x: LazyLogits, hidden: Tensor | None = None, then: Callable[[Tensor], Tensor] | None = None, plain: bool = True
) -> Tensor:
    """`x` of other rows, or with something done to each."""
    head, kind = _checked(x), x.device.type
    ambient = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def more(h: Tensor, *weights: Tensor) -> Tensor:
        z = head(h, *weights)
        with torch.autocast(*ambient):
            return then(z)

    more = head if then is None else more
    with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        return lazy(x.hidden if hidden is None else hidden, x.weights, more, x.plain and plain)


def _detach(func: Callable, x: LazyLogits) -> Tensor:
    with torch.no_grad():
        return _with(x)


def _cast(func: Callable, x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    other = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor | torch.memory_format)]
    devices = {torch.device(a) for a in (*args, *kwargs.values()) if isinstance(a, str | torch.device)}
    if other or devices - {x.device, torch.device(x.device.type)}:
        return NotImplemented
    return _with(x, then=lambda z: func(z, *args, **kwargs))


def _same(func: Callable, x: LazyLogits, **_: Any) -> Tensor:
    return _with(x)


def _scaled(func: Callable, x: LazyLogits, *numbers: Any, **kwargs: Any) -> Any:
    if kwargs or not all(isinstance(n, int | float) for n in numbers):
        return NotImplemented
    return _with(x, then=lambda z: func(z, *numbers), plain=False)


def _along_rows(func: Callable, x: LazyLogits, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if not _is_last(x, dim):
        return NotImplemented
    return _with(x, then=lambda z: func(z, -1, *args, **kwargs), plain=False)


def _is_last(x: LazyLogits, dim: Any) -> bool:
    return isinstance(dim, int) and dim in (-1, x.dim() - 1)


def _index(func: Callable, x: LazyLogits, index: Any) -> Any:
    """Positions, where the last dimension is left whole."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(_dims(p) for p in parts)
    whole = isinstance(parts[-1], slice) and parts[-1] == slice(None) if parts else True
    if any(p is Ellipsis for p in parts):
        fine = parts[-1] is Ellipsis and taken < x.dim() or whole
    else:
        fine = taken < x.dim() or taken == x.dim() and whole
    return _with(x, x.hidden[index]) if fine else NotImplemented


def _dims(part: Any) -> int:
    """How many dimensions an index takes up."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _view(func: Callable, x: LazyLogits, *size: Any, **kwargs: Any) -> Any:
    size = tuple(size[0]) if size and isinstance(size[0], tuple | list) else size
    if kwargs or not size or not all(isinstance(n, int) for n in size):
        return NotImplemented
    found = torch.empty(x.shape, device="meta").reshape(size).shape
    return _with(x, x.hidden.reshape(*found[:-1], x.hidden.shape[-1])) if found and found[-1] == x.shape[-1] else NotImplemented


def _of_positions(func: Callable, x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """flatten, unbind, split, … of dimensions before the last."""
    found = func(torch.empty(x.shape, device="meta"), *args, **kwargs)
    parts = found if isinstance(found, tuple | list) else (found,)
    if any(not p.dim() or p.shape[-1] != x.shape[-1] for p in parts) or x.shape[-1] == 1:
        return NotImplemented
    hidden = func(x.hidden, *args, **kwargs)
    if isinstance(hidden, Tensor):
        return _with(x, hidden)
    return tuple(_with(x, h) for h in hidden)


# ---------------------------------------------------------------- what is computed by rows


def _by_rows(x: LazyLogits, fn: Callable[..., Tensor], *beside: Tensor) -> Tensor:
    """fn(logits of some rows [n, V], *beside of these rows), for all rows; its backward computes the logits again."""
    rows = as_matrix(x.hidden)
    n = max(1, CHUNK // (x.shape[-1] * x.element_size()))
    each = zip(rows.split(n), *(b.split(n) for b in beside), strict=True)
    head = _checked(x)
    one = lambda h, *more: fn(head(h, *x.weights), *more)  # noqa: E731
    grad = torch.is_grad_enabled() and x.requires_grad
    with torch.set_grad_enabled(grad):
        if grad:
            return torch.cat([checkpoint(one, *parts, use_reentrant=False, preserve_rng_state=False) for parts in each])
        return torch.cat([one(*parts) for parts in each])


def _reduced(func: Callable, x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(x, dim):
        return NotImplemented
    return _by_rows(x, lambda z: func(z, -1, keepdim)).view(*x.shape[:-1], *[1] * keepdim)


def _gather(func: Callable, x: LazyLogits, dim: int, index: Tensor) -> Any:
    if not _is_last(x, dim) or index.shape[:-1] != x.shape[:-1]:
        return NotImplemented
    return _by_rows(x, lambda z, i: func(z, -1, i), index.reshape(-1, index.shape[-1])).view(index.shape)


def _cross_entropy(
    func: Callable,
    x: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    strange = weight is not None or size_average is not None or reduce is not None or x.dim() != 2
    if strange or target.dim() != 1 or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    same = len({t.dtype for t in (x.hidden, *x.weights)}) == 1
    if x.plain and same and reduction != "none" and not label_smoothing:
        w, bias = (*x.weights, None)[:2]
        loss, _ = linear_cross_entropy(x.hidden, w, target, bias, None, ignore_index, reduction)
        return loss.to(x.dtype)
    nll = _by_rows(
        x, lambda z, t: func(z, t, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing), target
    )
    return nll if reduction == "none" else nll.sum() if reduction == "sum" else nll.sum() / (target != ignore_index).sum()


# ---------------------------------------------------------------- tables

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


def _functions(*names: str) -> list[Callable]:
    """Each as a method, and as a function of torch and of torch.nn.functional where there is one."""
    return [getattr(home, name) for name in names for home in (Tensor, torch, F) if hasattr(home, name)]


STAYS_LAZY: dict[Callable, Callable] = {
    **dict.fromkeys(_functions("detach"), _detach),
    **dict.fromkeys(_functions("float", "double", "half", "bfloat16", "to"), _cast),
    **dict.fromkeys([Tensor.contiguous, Tensor.clone, torch.clone], _same),
    **dict.fromkeys(_functions("mul", "div", "true_divide", "__mul__", "__rmul__", "__truediv__"), _scaled),
    **dict.fromkeys(_functions("softmax", "log_softmax"), _along_rows),
    Tensor.__getitem__: _index,
    **dict.fromkeys(_functions("view", "reshape"), _view),
    **dict.fromkeys(_functions("flatten", "unbind", "split", "chunk", "squeeze", "unsqueeze"), _of_positions),
    Tensor.__iter__: lambda func, x: iter(_of_positions(Tensor.unbind, x)),
    **dict.fromkeys(_functions("argmax", "logsumexp", "amax"), _reduced),
    **dict.fromkeys(_functions("gather"), _gather),
    F.cross_entropy: _cross_entropy,
}
