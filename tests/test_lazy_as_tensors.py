"""Lazy logits are logits: read later, whatever has changed meanwhile; and to autograd a tensor as any other."""

import pytest
import torch
import torch.nn.functional as F
from test_lazy_logits import S, V, pair
from torch.utils.checkpoint import checkpoint

from sloth.kernels.common.fingerprint import fingerprint
from sloth.lazy import snapshot
from sloth.lazy.functions import lazy, materialize


def late(x):
    """Ways of reading."""
    return [
        lambda: x.sum(), lambda: x[0].cumsum(-1), lambda: x.float().logsumexp(-1), lambda: F.cross_entropy(x[0], torch.arange(S)),
        lambda: x.detach().clone().argmax(-1), lambda: x.square().sum(),
    ]  # fmt: skip


def silently(leaves):
    leaves[1].data.add_(1)


def one_word(leaves):
    leaves[1].detach().numpy()[3, 4] += 1e-3


def exchanged(leaves):
    leaves[1].data.copy_(leaves[1].flip(0))


def negated(leaves):
    leaves[1].data.neg_()


CHANGES = [silently, one_word, exchanged, negated]


@pytest.fixture
def large(monkeypatch):
    """Nothing is small enough to be copied."""
    monkeypatch.setattr(snapshot, "COPIED", 0)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("held", [True, False], ids=["read after the step", "memory is short"])
def test_an_optimizer_of_torch_leaves_unread_logits_as_they_were(how, held, large, monkeypatch):
    monkeypatch.setattr(snapshot, "_is_room", lambda t: held)
    x, real, leaves = pair()
    early, values, step = x.float() * 1, real.detach().clone(), torch.optim.AdamW([leaves[1]], lr=0.1, **how)
    materialize(early)
    real.sum().backward(retain_graph=True)
    step.step()
    torch.testing.assert_close(materialize(early).detach(), values)
    for read in late(x):
        if held:
            read()
        else:
            with pytest.raises(RuntimeError, match="before the optimizer's step"):
                read()
    if held:
        torch.testing.assert_close(materialize(x).detach(), values)


def test_a_step_copies_only_what_somebody_may_read(large):
    x, _, leaves = pair()
    head = x.rows.head.snapshot
    loss = x.logsumexp(-1).sum()
    loss.backward()
    del x
    torch.optim.SGD(leaves, lr=0.1).step()
    assert head.values[0].data_ptr() == leaves[1].data_ptr()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad", [True, False])
def test_a_change_that_nobody_counts_is_noticed(change, grad, large):
    x, _, leaves = pair(grad)
    change(leaves)
    for read in late(x):
        with pytest.raises(RuntimeError, match="have changed"):
            read()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_small_weights_are_copied(change):
    x, real, leaves = pair()
    change(leaves)
    torch.testing.assert_close(materialize(x), real)


def test_what_has_changed_and_is_back_is_as_it_was(large):
    """A step of no size, weights that are swapped in and out, memory that was another's."""
    x, real, leaves = pair()
    kept = leaves[1].detach().clone()
    leaves[1].data.zero_()
    leaves[1].data.copy_(kept)
    torch.testing.assert_close(x.logsumexp(-1), real.logsumexp(-1))
    leaves[1].data = kept + 1
    torch.testing.assert_close(x.sum(-1), real.sum(-1), rtol=1e-4, atol=1e-5)


def test_weights_changed_in_a_hook_of_the_backward_pass(large):
    """An optimizer that steps as soon as the gradient is there."""
    x, real, leaves = pair()
    step = torch.optim.SGD(leaves[1:], lr=0.1)
    leaves[1].register_post_accumulate_grad_hook(lambda _: step.step())
    values = real.detach().clone()
    x.logsumexp(-1).sum().backward()
    torch.testing.assert_close(materialize(x).detach(), values)


def hook_before(t, loss):
    t.register_hook(lambda g: g / 2)
    loss(t).backward()


def hook_after(t, loss):
    value = loss(t)
    t.register_hook(lambda g: g * 3)
    value.backward()


def hook_that_looks(t, loss):
    seen = []
    t.register_hook(lambda g: seen.append(g + 0))
    loss(t).backward()
    return seen[0]


def hook_on_the_way(t, loss):
    part = t.double()[:, 1:]
    value = loss(part)
    part.register_hook(lambda g: g.clamp(max=0))
    value.backward()


def hook_on_a_factor(t, loss):
    p = t.softmax(-1)
    value = (p * t.log_softmax(-1)).sum() + loss(t)
    p.register_hook(lambda g: g / 2)
    value.backward()


def retained(t, loss):
    t.retain_grad()
    loss(t).backward()
    return t.grad


def as_inputs(t, loss):
    loss(t).backward(inputs=[t])
    return t.grad


def leaf(t, loss):
    d = t.detach().requires_grad_()
    for _ in range(2):
        loss(d).backward()
    return d.grad


def in_two_parts(t, loss):
    d = t.detach().requires_grad_()
    loss(d).backward()
    t.backward(d.grad)


def reentrant(t, loss):
    checkpoint(loss, t, use_reentrant=True).backward()


def not_reentrant(t, loss):
    checkpoint(loss, t, use_reentrant=False).backward()


def penalty(t, loss):
    torch.autograd.grad(t.square().sum(), t, create_graph=True)[0].square().sum().backward()


def asked_for(t, loss):
    return torch.autograd.grad(loss(t), t)[0]


def read_on_the_way(t, loss):
    """What the first run computes by rows, the second one meets read."""
    checkpoint(lambda t: loss(t) + t.cumsum(-1).square().sum(), t, use_reentrant=False).backward()


GRADIENTS = [
    hook_before, hook_after, hook_that_looks, hook_on_the_way, hook_on_a_factor, retained, as_inputs, asked_for, leaf,
    in_two_parts, reentrant, not_reentrant, read_on_the_way, penalty,
]  # fmt: skip


@pytest.mark.parametrize("fn", GRADIENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("loss", ["rows", "read"])
def test_autograd_is_that_of_a_tensor(fn, loss):
    rows_of = lambda t: t.logsumexp(-1).square().sum() + F.cross_entropy(t.reshape(-1, V), torch.arange(t.numel() // V) % V)  # noqa: E731
    found = []
    for logits in (lazy, F.linear):
        _, _, leaves = pair()
        t = logits(leaves[0] * 2, leaves[1])
        given = fn(t, rows_of if loss == "rows" else lambda t: (t * t).sum() + t.exp().mean())
        found.append([*(p.grad for p in leaves), given if given is None else given + 0])
    torch.testing.assert_close(*([t for t in ts if t is not None] for ts in found), rtol=1e-4, atol=1e-5)
    assert [t is None for t in found[0]] == [t is None for t in found[1]]


def written_view(t):
    t[0][..., :4].mul_(1.5)
    return 0


def written_view_of_a_view(t):
    """Of a gradient that was kept, too: what seed 709 of test_lazy_programs.py found."""
    a, b = t[0], t[0][:1]
    c = b[..., :4]
    b.retain_grad()
    b.sum().backward(retain_graph=True)
    c.mul_(1.5)
    return a.exp().sum() + b.grad.sum()


def written_view_of_a_clone(t):
    a = t[0].clone()
    a[:1][..., :4].mul_(1.5)
    return a.logsumexp(-1).sum()


def sibling_of_a_written_view(t):
    a, b = t[0], t[:1]
    a[..., :4].mul_(1.5)
    return b.logsumexp(-1).sum()


def view_from_before_a_write(t):
    a = t[0]
    t[0, :, :4].mul_(1.5)
    return a.exp().sum()


def view_used_before_and_after_a_write(t):
    a = t[0]
    loss = a.sum(-1).sum()
    t.mul_(1.5)
    return loss + a.exp().sum()


def shown_and_then_written(t):
    c = t[0][..., :4]
    t.mul_(1.5)
    return c.square().sum()


def written_without_gradients(t):
    a = t[0]
    c = a[..., :4]
    with torch.no_grad():
        c.mul_(1.5)
    return c.square().sum() + a.exp().sum()


def read_before_its_view_is_written(t):
    a = t[0]
    t.cumsum(-1)
    c = a[..., :4]
    c.mul_(1.5)
    return c.sum()


def hooked_view_that_is_shown(t):
    a = t[0]
    loss = a.sum(-1).sum()
    c = a[..., :4]
    a.register_hook(lambda g: g.clamp(max=1.5))
    return loss + c.square().sum()


def leaf_that_is_shown(t):
    d = t.detach().requires_grad_()
    d[..., :4].square().sum().backward()
    return (d.grad * t).sum()


WRITTEN = [
    written_view, written_view_of_a_view, written_view_of_a_clone, sibling_of_a_written_view, view_from_before_a_write,
    view_used_before_and_after_a_write, shown_and_then_written, written_without_gradients, read_before_its_view_is_written,
    hooked_view_that_is_shown, leaf_that_is_shown,
]  # fmt: skip


@pytest.mark.parametrize("fn", WRITTEN, ids=lambda f: f.__name__)
def test_views_that_torch_made_of_them_are_written(fn):
    """Nobody tells the lazy tensor: it finds out."""
    found = []
    for logits in (lazy, F.linear):
        _, _, leaves = pair()
        t = logits(leaves[0] * 2, leaves[1])
        loss = fn(t)
        found.append(torch.autograd.grad(loss + t.softmax(-1).square().sum() + t.square().mean(), leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_view_that_is_used_and_then_written_is_refused():
    """What hangs on it already would miss the write. Never another number than a tensor's."""
    x, _, _ = pair()
    a = x[0]
    _loss = a.logsumexp(-1).sum()
    with pytest.raises(RuntimeError, match="custom Function"):
        a[..., :4].mul_(1.5)


def test_once_not_twice():
    """What is computed by rows: refused, not silently zero."""
    x, _, leaves = pair()
    (d,) = torch.autograd.grad(x.logsumexp(-1).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        d.square().sum().backward()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: (z.softmax(-1) * z.log_softmax(-1) / 2).logsumexp(-1).sum(),
        lambda z: ((z.log_softmax(-1) - z.softmax(-1)).float() * 3).square().sum(),
    ],
)
def test_steps_behind_what_is_made_of_several(loss):
    def gradients(make):
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(*size, generator=generator, requires_grad=True) for size in ((2, S, 6), (V, 6)))
        return torch.autograd.grad(loss(make(hidden * 1, weight)), (hidden, weight))

    torch.testing.assert_close(gradients(lazy), gradients(F.linear), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [0, 2**20], ids=["fingerprints", "copies"])
def test_gradients_of_gradients_where_weights_have_changed(copied, monkeypatch):
    """They go through the weights themselves, a copy of which would do for values."""
    monkeypatch.setattr(snapshot, "COPIED", copied)
    hidden, weight = torch.randn(2, S, 6, requires_grad=True), torch.randn(V, 6, requires_grad=True)
    x = lazy(hidden * 1, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(snapshot.StaleLogits, match="have changed since"):
        torch.autograd.grad(x, hidden, torch.ones(2, S, V, requires_grad=True), create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_fingerprints(dtype):
    """One bit, an exchange of two rows, in any strides and at any address; NaN is equal to itself."""
    x = torch.randint(0, 100, (7, 301), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = float("nan") if dtype.is_floating_point else 0
    for view in (lambda t: t, lambda t: t.t(), lambda t: t[:, 1:], lambda t: t.flatten()[1:], lambda t: t[:0]):
        before = fingerprint(view(x))
        assert torch.equal(before, fingerprint(view(x.clone())))
        for change in (lambda t: t[5, 3:4].add_(1), lambda t: t[1:3].copy_(t[1:3].flip(0)), lambda t: t[1:].mul_(-1)):
            y = x.clone()
            change(y)
            assert torch.equal(before, fingerprint(view(y))) == (not view(x).numel())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("function", [lambda z: z.softmax(-1) * 2, lambda z: F.log_softmax(z[:, :-1], -1).argmax(-1)])
def test_a_trace_and_its_check(function):
    """torch traces once more, with real tensors, and compares the graphs, lines of code too."""
    x, real, _ = pair()
    traced = torch.jit.trace(function, x.detach())
    torch.testing.assert_close(traced(x.detach()), function(real.detach()))
