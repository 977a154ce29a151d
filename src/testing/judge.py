"""The judge: an operator beside the code it replaces, and both beside that code in fp64.

`compare` runs three times: the operator, the eager code in the same dtype, and the eager code in fp64. For the last to be
exact, eager code casts with `wide` where the original says `.float()`.
"""

from __future__ import annotations

from typing import Any

import torch

from sloth.rewriter.verify.limit import LIMIT, least, unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a GPU machine the same tests run the real kernels
MANY = 2048  # elements, among which luck averages out
LAYOUTS = ("contiguous", "permuted", "padded", "offset", "strided", "expanded")
"""How a tensor lies in memory: dense; its leading dimensions permuted (as after `transpose(1, 2)`); rows cut from wider ones
(as after `chunk`); dense but not aligned; last dimension with stride 2; leading dimension broadcast (stride 0)."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """`.float()` of eager code, but fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def assert_no_worse(ours, eager, exact, *, slack: float = 4.0, scale: float = 0.0, few: int = 0, name: str = "output") -> None:
    """‖ours − exact‖ ≤ 1.05 · max(‖eager − exact‖, ‖round(exact) − exact‖) + slack · ε₃₂ · max(‖exact‖, scale).

    The second term of the maximum is the least error any result of this dtype can have (eager may be lucky). `slack`, in fp32
    ulps of the norm, is for sums taken in another order; pass 0 for large tensors, where luck averages out, and `scale` where
    the terms that were summed are much larger than the result. Of a tensor with fewer than `few` elements eager may be right by
    luck: ours may then be one ulp of the dtype off. Takes tensors or equally long sequences (None: absent in all).
    """
    if not isinstance(ours, torch.Tensor) and ours is not None:
        assert len(ours) == len(eager) == len(exact)
        for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
            assert_no_worse(*triple, slack=slack, scale=scale, few=few, name=f"{name}[{i}]")
        return
    if exact is None:
        assert ours is None, f"{name}: a gradient that was not asked for"
        return
    assert ours is not None, f"{name} is missing"
    assert ours.shape == eager.shape == exact.shape, (name, ours.shape, eager.shape)
    assert ours.dtype == eager.dtype, (name, ours.dtype, eager.dtype)
    exact = exact.detach().double()
    error = [(t.detach().double() - exact).norm().item() for t in (ours, eager, exact.to(ours.dtype))]
    limit = LIMIT * least(*error[1:]) + slack * unit(ours.dtype) * max(exact.norm().item(), scale)
    if exact.numel() < few:
        limit += torch.finfo(ours.dtype).eps * max(exact.norm().item(), scale)
    assert error[0] <= limit, f"{name}: error {error[0]:.3e}, eager {error[1]:.3e}, rounding {error[2]:.3e}"


def evaluate(function, tensors, grads, douts):
    """Outputs and gradients of `function` at fresh leaves with the values and strides of `tensors` (None allowed).

    `grads[i]`: does input i require a gradient. `douts[j]` is ∂L/∂output j, None for an output nobody used."""
    leaves = [t if t is None else t.detach().requires_grad_(g) for t, g in zip(tensors, grads, strict=True)]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    used = [(o, d) for o, d in zip(outputs, douts, strict=True) if d is not None and o.requires_grad]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(())
    if used and wanted:
        roots, cotangents = zip(*used, strict=True)
        found = iter(torch.autograd.grad(roots, wanted, cotangents, allow_unused=True))
    return outputs, [next(found, None) if t is not None and t.requires_grad else None for t in leaves]


def each_way(op, eager, tensors, grads, douts):
    """What `evaluate` gives for the operator, for eager, and for eager in fp64."""

    def exact(t):
        return t.detach().double() if t is not None and t.is_floating_point() else t

    truth = evaluate(eager, [exact(t) for t in tensors], grads, [exact(d) for d in douts])
    return evaluate(op, tensors, grads, douts), evaluate(eager, tensors, grads, douts), truth


def compare_many(op, eager, draws, grads, *, slack=4.0, scale=0.0):
    """`compare` over many draws (tensors, douts) of the same shapes, as if each result of all were one tensor: of a few elements
    eager may be right by luck, of many it is not.
    """
    ways = zip(*(each_way(op, eager, tensors, grads, douts) for tensors, douts in draws), strict=True)
    outputs, gradients = zip(*([_stacked(kind) for kind in zip(*way, strict=True)] for way in ways), strict=True)
    bounds = {"slack": slack, "scale": scale * len(draws) ** 0.5}
    assert_no_worse(*outputs, **bounds, name="output")
    assert_no_worse(*gradients, **bounds, name="gradient")


def _stacked(draws):
    return [None if each[0] is None else torch.stack([t.detach() for t in each]) for each in zip(*draws, strict=True)]


def _made_again(tensors, douts):
    """What draws (tensors, douts) again that `make` made; None where they would be large, or something else made one of them."""
    if not all(hasattr(t, "again") and t.numel() < MANY for t in (*tensors, *douts) if t is not None):
        return None
    return lambda salt: tuple([t if t is None else t.again(salt) for t in kind] for kind in (tensors, douts))


def _salts(tensors) -> list[int]:
    """What tells apart as many draws as give each of these tensors `MANY` elements."""
    return [64_000 * i for i in range(MANY // max(1, min(t.numel() for t in tensors if t is not None)))]


def compare(
    op, eager, tensors, grads=None, douts=None, *, slack=4.0, scale=0.0, few=0, strides: bool = True, again=None, draws=None
):
    """The operator against the eager code it replaces: values, dtypes, strides of outputs, and gradients.

    grads    which inputs require gradients; default: all floating-point ones
    douts    gradients of the outputs; default: random, contiguous
    again    `again(salt)` draws other (tensors, douts) of the same shapes and layouts, as many as results need or `draws`.
             Default: what `make` made is made again
    Returns the operator's (outputs, gradients)."""
    tensors = list(tensors)
    if grads is None:
        grads = [t is not None and t.is_floating_point() for t in tensors]
    with torch.no_grad():
        reference = eager(*tensors)
    reference = (reference,) if isinstance(reference, torch.Tensor) else tuple(reference)
    if douts is None:
        douts = [make(r.shape, r.dtype, seed=(1 << 31) + i, device=r.device) for i, r in enumerate(reference)]
    ours, theirs, truth = each_way(op, eager, tensors, grads, douts)
    try:
        assert_no_worse(ours[0], theirs[0], truth[0], slack=slack, scale=scale, few=few, name="output")
        assert_no_worse(ours[1], theirs[1], truth[1], slack=slack, scale=scale, few=few, name="gradient")
    except AssertionError:  # eager's luck?
        salts = _salts([*tensors, *douts] if again is None else douts) if draws is None else range(0, 64_000 * draws, 64_000)
        again = again or _made_again(tensors, douts)
        if again is None:
            raise
        compare_many(op, eager, list(map(again, salts)), grads, slack=slack, scale=scale)
    if strides:
        for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)):
            meaningful = [d for d in range(a.dim()) if a.shape[d] > 1 and a.numel()]
            assert [a.stride(d) for d in meaningful] == [b.stride(d) for d in meaningful], (i, a.stride(), b.stride())
    return ours


def make(shape, dtype, layout="contiguous", seed=0, *, scale=1.0, mean=0.0, device: Any = DEVICE) -> torch.Tensor:
    """A random normal tensor of this shape in this layout. `again(salt)` of it is another one."""
    made = _make(tuple(shape), dtype, layout, torch.Generator().manual_seed(seed), scale, mean, device)
    made.again = lambda salt: make(shape, dtype, layout, seed + salt, scale=scale, mean=mean, device=device)
    return made


def _make(shape, dtype, layout, generator, scale, mean, device):
    *lead, last = shape

    def random(*size):
        return (torch.randn(size, generator=generator) * scale + mean).to(device, dtype)

    if layout == "permuted" and len(lead) > 1:
        return random(*reversed(lead), last).permute(*reversed(range(len(lead))), len(lead))
    if layout == "padded":
        return random(*lead, 2 * last + 1)[..., last : 2 * last]
    if layout == "offset":
        n = torch.Size(shape).numel()
        return random(n + 1)[1:].view(shape)
    if layout == "strided":
        return random(*lead, 2 * last)[..., ::2]
    if layout == "expanded" and lead:
        return random(*lead[1:], last).expand(shape)
    return random(*shape)
