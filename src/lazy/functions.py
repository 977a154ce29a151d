"""What lazy logits do when code uses them: a table of functions that need not have all of the logits at once.

What acts on each row alone gives lazy logits again. What makes a few numbers of each row is computed by rows. Each function here
takes the one that was called, the lazy logits and the call's other arguments, and returns NotImplemented for a call that it does
not know: then the logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth.kernels.common.launch import compute_dtype, without_autocast
from sloth.kernels.linear.gemm import as_matrix
from sloth.kernels.loss.linear_cross_entropy import linear_cross_entropy_forward
from sloth.lazy.by_rows import at_once, chunked_apply
from sloth.lazy.gradient import Contribution, gradient, kind
from sloth.lazy.rows import Step, stepped
from sloth.lazy.tensor import (
    HANDLED_FUNCTIONS,
    LazyLogits,
    is_lazy,
    lazy,
    made,
    materialize,
    merged,
)

__all__ = ["LazyLogits", "lazy", "materialize"]

# ---------------------------------------------------------------- what stays lazy


def _picked(x: LazyLogits, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Other rows of `x`."""
    return made(x.rows.picked(pick), x.steps, x.plain, _example(x), x, _wants_grad(x))


def _with(x: LazyLogits, *more: Step, plain: bool = True) -> Tensor:
    """`x` with something done to each row."""
    more = tuple(_as_here(x, step) for step in more)
    return made(x.rows, x.steps + more, x.plain and plain, stepped(more, _example(x)), x, _wants_grad(x))


def _example(x: LazyLogits) -> Tensor:
    return torch.empty(0, x.shape[-1], dtype=x.dtype, device=x.device)


def _wants_grad(x: LazyLogits) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _as_here(x: LazyLogits, fn: Callable) -> Callable:
    """`fn` under the autocast of now, whenever it is called."""
    kind = x.device.type
    ambient = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def run(*args: Any) -> Any:
        with torch.autocast(*ambient):
            return fn(*args)

    return run


def _detach(func: Callable, x: LazyLogits) -> Tensor:
    with torch.no_grad():
        return _with(x)


def _cast(func: Callable, x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor):
        return _cast(Tensor.to, x, args[0].device, args[0].dtype, *args[1:], **kwargs)
    other = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor | torch.memory_format)]
    devices = {torch.device(a) for a in (*args, *kwargs.values()) if isinstance(a, str | torch.device)}
    if other or devices - {x.device, torch.device(x.device.type)}:
        return NotImplemented
    like = _example(x)
    return x if func(like, *args, **kwargs) is like else _with(x, lambda z: func(z, *args, **kwargs))


def _new(func: Callable, x: LazyLogits, *args: Any, **kwargs: Any) -> Tensor:
    """Another tensor, of its dtype and device."""
    return func(_example(x), *args, **kwargs)


def _copied(func: Callable, x: LazyLogits, **_: Any) -> Tensor:
    return _with(x)


def _pointwise(func: Callable, x: LazyLogits, *others: Any, **kwargs: Any) -> Any:
    """With numbers, or with something else of the same logits: then what they share is computed once."""
    if kwargs or not all(isinstance(o, int | float) or _of_same_logits(x, o) for o in others):
        return NotImplemented
    operands, fn = (x, *others), _as_here(x, func)
    parts = [o.steps for o in operands if isinstance(o, LazyLogits)]
    shared = next((i for i, steps in enumerate(zip(*parts, strict=False)) if len(set(steps)) > 1), min(map(len, parts)))
    rest = [o.steps[shared:] if isinstance(o, LazyLogits) else o for o in operands]
    like = func(*(_example(o) if isinstance(o, LazyLogits) else o for o in operands))
    steps = *x.steps[:shared], lambda z: fn(*(stepped(o, z) if isinstance(o, tuple) else o for o in rest))
    if len(parts) == 1:
        return made(x.rows, steps, False, like, x, _wants_grad(x))
    return merged(x.rows, operands, fn, steps, like, _wants_grad(x))


def _of_same_logits(x: LazyLogits, y: Any) -> bool:
    return isinstance(y, LazyLogits) and is_lazy(y) and y.rows is x.rows and y.requires_grad == x.requires_grad


def _along_rows(func: Callable, x: LazyLogits, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if not _is_last(x, dim):
        return NotImplemented
    return _with(x, lambda z: func(z, -1, *args, **kwargs), plain=False)


def _is_last(x: LazyLogits, dim: Any) -> bool:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
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
    return _picked(x, lambda h: h[index]) if fine else NotImplemented


def _dims(part: Any) -> int:
    """How many dimensions an index takes up."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if isinstance(part, slice | int):
        return 1
    part = torch.as_tensor(part)
    return part.dim() if part.dtype in (torch.bool, torch.uint8) else 1


def _view(func: Callable, x: LazyLogits, *size: Any, **kwargs: Any) -> Any:
    size = tuple(size[0]) if size and isinstance(size[0], tuple | list) else size
    if kwargs or not size or not all(isinstance(n, int) for n in size):
        return NotImplemented
    found = torch.empty(x.shape, device="meta").reshape(size).shape
    if not found or found[-1] != x.shape[-1]:
        return NotImplemented
    return _picked(x, lambda h: h.reshape(*found[:-1], h.shape[-1]))


def _of_positions(func: Callable, x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """flatten, unbind, split, … of dimensions before the last."""
    if any(isinstance(o, Tensor) for o in (*args, *kwargs.values())):
        return NotImplemented
    sizes, found = (x.shape[-1], x.shape[-1] + 1, x.rows.hidden.shape[-1]), []  # of the last dimension, which is left whole
    for n in sizes:
        try:
            one = func(torch.empty(*x.shape[:-1], n, device="meta"), *args, **kwargs)
        except (RuntimeError, IndexError):  # sizes that fit one vocabulary alone, or nothing
            return NotImplemented
        found.append([tuple(p.shape) for p in (one if isinstance(one, tuple | list) else (one,))])
    if any(len({p[:-1] for p in parts}) > 1 or tuple(p[-1] for p in parts if p) != sizes for parts in zip(*found, strict=True)):
        return NotImplemented
    if not isinstance(one, tuple | list):
        return _picked(x, lambda h: func(h, *args, **kwargs))
    return tuple(_picked(x, lambda h, i=i: func(h, *args, **kwargs)[i]) for i in range(len(one)))


# ---------------------------------------------------------------- what is computed by rows


def _chunked_apply(x: LazyLogits, fn: Callable, *beside: Tensor) -> Any:
    return chunked_apply(x, _as_here(x, fn), *beside)


def _reduced(func: Callable, x: LazyLogits, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    return _chunked_apply(x, lambda z: func(z, -1, keepdim, **kwargs)) if _is_last(x, dim) else NotImplemented


def _summed(func: Callable, x: LazyLogits, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """The sum or mean of each row, or of all."""
    if dim is not None or kwargs:
        return _reduced(func, x, dim, keepdim, **kwargs)
    total = _chunked_apply(x, lambda z: z.sum(-1, dtype=compute_dtype(z))).sum()
    return (total / x.numel() if func.__name__ == "mean" else total).to(func(_example(x)).dtype)


# The largest logits are what code compares logits with (`logits < logits.topk(k).values[..., -1:]`, to sample). Products of other
# shapes may differ in their last bit, so both are taken from one computation where all is computed at once.


def _amax(func: Callable, x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    return NotImplemented if at_once(x) else _reduced(func, x, dim, keepdim)


def _max(func: Callable, x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(x, dim) or at_once(x):
        return NotImplemented
    return torch.return_types.max(_chunked_apply(x, lambda z: func(z, -1, keepdim)))


def _topk(func: Callable, x: LazyLogits, k: int, dim: Any = -1, *args: Any, **kwargs: Any) -> Any:
    if not _is_last(x, dim) or at_once(x):
        return NotImplemented
    return torch.return_types.topk(_chunked_apply(x, lambda z: func(z, k, -1, *args, **kwargs)))


def _gather(func: Callable, x: LazyLogits, dim: int, index: Tensor, **_: Any) -> Any:
    if not _is_last(x, dim) or index.shape[:-1] != x.shape[:-1]:
        return NotImplemented
    return _chunked_apply(x, lambda z, i: z.gather(-1, i), as_matrix(index))


def _take_along_dim(func: Callable, x: LazyLogits, indices: Tensor, dim: int | None = None) -> Any:
    return _gather(func, x, dim, indices) if isinstance(dim, int) else NotImplemented


class _CrossEntropy(torch.autograd.Function):
    """The operator for head and loss. Its gradients are those of the rows where no other result of them has some."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, fn: Callable, target: Tensor, divisor: Tensor | int, how: tuple, grad: bool) -> Tensor:
        rows, ctx.need = x.rows, [n and grad for n in x.rows.need or [False] * 3]
        with without_autocast(rows.hidden):
            (layer,), need = rows.head.operands(rows.hidden), [*ctx.need, False, False]
            loss, _, unit, *kept = linear_cross_entropy_forward(*layer, None, None, target, None, *how, 1.0, need, 0)
        ctx.save_for_backward(unit, *kept[:3])
        ctx.part, ctx.divisor, ctx.like = Contribution(rows, x.steps, fn, (target,)), divisor, kind(x)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        unit, *kept = ctx.saved_tensors
        grad = grad.detach()
        made = [d * (grad / unit) if need else None for d, need in zip(kept, ctx.need, strict=True)]
        each = (grad / ctx.divisor).expand(ctx.part.beside[0].shape)
        part = ctx.part._replace(grads=(each,), made=made)
        return gradient(part.rows, part.steps, ctx.like, [part]), None, None, None, None, None


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
    strange = size_average is not None or reduce is not None or x.dim() != 2 or weight is not None and weight.requires_grad
    if strange or target.dim() != 1 or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    x.rows.check()

    def of_rows(z: Tensor, t: Tensor) -> Tensor:
        classes = weight if weight is None else weight.to(z.dtype)
        return func(z, t, classes, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)

    divisor = 1
    if reduction == "mean":
        counts = target != ignore_index
        divisor = counts.sum() if weight is None else torch.where(counts, weight[torch.where(counts, target, 0)], 0).sum()
    _, _, casts = x.rows.head.autocast
    if x.plain and not casts and reduction != "none":
        how = ignore_index, reduction, None, 1.0, weight, label_smoothing, 0.0
        wide = lambda z, t: of_rows(z.to(compute_dtype(z)), t)  # noqa: E731
        return _CrossEntropy.apply(x, wide, target, divisor, how, _wants_grad(x)).to(x.dtype)
    nll = _chunked_apply(x, of_rows, target)
    return nll if reduction == "none" else nll.sum() / divisor


# ---------------------------------------------------------------- tables


def _functions(*names: str) -> list[Callable]:
    """Each as a method, and as a function of torch and of torch.nn.functional where there is one."""
    return [getattr(home, name) for name in names for home in (Tensor, torch, F) if hasattr(home, name)]


HANDLED_FUNCTIONS |= {
    **dict.fromkeys(_functions("detach"), _detach),
    **dict.fromkeys(_functions("float", "double", "half", "bfloat16", "to", "type_as"), _cast),
    **dict.fromkeys(_functions("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"), _new),
    **dict.fromkeys([Tensor.clone, torch.clone], _copied),
    Tensor.contiguous: lambda func, x, **_: x if x.layout_of.is_contiguous() else _with(x),
    **dict.fromkeys(_functions("add", "sub", "mul", "div", "true_divide", "neg", "exp", "tanh"), _pointwise),
    **dict.fromkeys(_functions("__add__", "__radd__", "__sub__", "__rsub__", "__neg__"), _pointwise),
    **dict.fromkeys(_functions("__mul__", "__rmul__", "__truediv__"), _pointwise),
    **dict.fromkeys(_functions("softmax", "log_softmax"), _along_rows),
    Tensor.__getitem__: _index,
    **dict.fromkeys(_functions("view", "reshape"), _view),
    **dict.fromkeys(_functions("flatten", "unbind", "split", "chunk", "squeeze", "unsqueeze"), _of_positions),
    Tensor.__iter__: lambda func, x: iter(x.unbind()),
    **dict.fromkeys(_functions("argmax", "logsumexp"), _reduced),
    **dict.fromkeys(_functions("amax"), _amax),
    **dict.fromkeys(_functions("sum", "mean"), _summed),
    **dict.fromkeys(_functions("max"), _max),
    **dict.fromkeys(_functions("topk"), _topk),
    **dict.fromkeys(_functions("gather"), _gather),
    **dict.fromkeys(_functions("take_along_dim"), _take_along_dim),
    F.cross_entropy: _cross_entropy,
}
