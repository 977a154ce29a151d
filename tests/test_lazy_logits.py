"""Lazy logits are logits: what code can ask, what it computes of them, and their gradients."""

import copy
import functools
import io
import pickle
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth.lazy import functions, snapshot, tensor
from sloth.lazy import rows as module
from sloth.lazy.functions import LazyLogits, lazy, materialize

B, S, H, V = 2, 5, 8, 12


def pair(grad: bool = True, bias: bool = False):
    """Lazy logits and the real ones, and the tensors that both are made of."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*size, generator=generator) for size in ((B, S, H), (V, H), *([(V,)] if bias else []))]
    leaves = [t.requires_grad_(grad) for t in leaves]
    hidden = leaves[0] * 2
    return lazy(hidden, *leaves[1:]), F.linear(hidden, *leaves[1:]), leaves


def is_lazy(x) -> bool:
    return isinstance(x, LazyLogits) and x.known is None


def same_gradients(ours, theirs, leaves):
    if theirs.requires_grad:
        generator = torch.Generator().manual_seed(1)
        d = torch.randn(theirs.shape, generator=generator)
        got = torch.autograd.grad(ours, leaves, d, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(theirs, leaves, d, retain_graph=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_what_code_can_ask(grad):
    x, real, _ = pair(grad)
    for ask in (
        lambda t: (t.shape, t.dtype, t.device, t.requires_grad, t.ndim, t.layout, t.is_leaf, t.is_cuda),
        lambda t: (t.size(), t.size(-1), t.dim(), t.numel(), t.element_size(), t.stride(), t.is_contiguous(), len(t)),
        lambda t: (torch.is_floating_point(t), t.is_floating_point(), isinstance(t, torch.Tensor), torch.is_tensor(t)),
        lambda t: t.grad_fn is None,
        lambda t: (t.new_zeros(2).dtype, t.new_tensor(1).dtype),
        lambda t: (torch.ones(2).double().to(tensor=t).dtype, torch.ones(2).int().type_as(t).dtype),
    ):
        assert ask(x) == ask(real)
    assert is_lazy(x)


POSITION = torch.tensor([1, 3])
MASK = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
log_softmax = functools.partial(F.log_softmax, dim=-1)
LAZY = {
    "detach": lambda t: t.detach(),
    "float": lambda t: t.float(),
    "to": lambda t: t.to(torch.float64),
    "to device": lambda t: t.to("cpu"),
    "to another": lambda t: t.to(torch.ones(2, dtype=torch.float64)),
    "type as another": lambda t: t.type_as(torch.ones(2, dtype=torch.float64)),
    "contiguous": lambda t: t.contiguous(),
    "scaled": lambda t: t / 0.7 * 2,
    "log_softmax": lambda t: F.log_softmax(t, dim=-1, dtype=torch.float32),
    "softmax": lambda t: t.softmax(-1),
    "shifted": lambda t: t[..., :-1, :],
    "shifted, contiguous": lambda t: t[:, :-1].contiguous(),
    "last": lambda t: t[:, -1, :],
    "first": lambda t: t[0],
    "list": lambda t: t[:, POSITION],
    "mask": lambda t: t[MASK],
    "none": lambda t: t[None],
    "view": lambda t: t.view(-1, V),
    "reshape": lambda t: t.reshape(B * S, -1),
    "flatten": lambda t: t.flatten(0, 1),
    "squeeze": lambda t: t[:1].squeeze(0),
    "exponential": lambda t: torch.exp(t - 1),
    "product": lambda t: t.log_softmax(-1) * t.softmax(-1),
    "1 - p": lambda t: 1 - t.softmax(-1),
    "one chunk of the vocabulary": lambda t: t.split(2 * V, -1)[0],
    "chain": lambda t: t.float()[..., :-1, :].reshape(-1, V) / 2,
}
CHUNKED = {
    "logsumexp": lambda t: t.logsumexp(-1),
    "logsumexp, keepdim": lambda t: torch.logsumexp(t, dim=-1, keepdim=True),
    "sum": lambda t: t.sum(),
    "mean": lambda t: t.mean(),
    "mean of each": lambda t: t.mean(-1, keepdim=True),
    "max": lambda t: t.max(-1).values,
    "where": lambda t: t.max(dim=-1, keepdim=True).indices,
    "topk": lambda t: t.topk(3).values,
    "entropy": lambda t: -(t.log_softmax(-1).exp() * t.log_softmax(-1)).sum(-1),
    "entropy by parts": lambda t: torch.cat([-(p.exp() * p).sum(-1) for p in map(log_softmax, t.view(-1, V).split(4))]),
    "along, by name": lambda t: torch.take_along_dim(t, indices=torch.arange(B * S).view(B, S, 1) % V, dim=-1),
    "along": lambda t: torch.take_along_dim(t.log_softmax(dim=-1), torch.arange(B * S).view(B, S, 1) % V, dim=2),
    "argmax": lambda t: t.argmax(-1),
    "one position": lambda t: t[0, -1].argmax(-1) + t[1, 2].logsumexp(0),
    "argmax of some": lambda t: t[..., :-1, :].argmax(dim=-1),
    "gather": lambda t: t.gather(-1, torch.arange(B * S).view(B, S, 1) % V),
    "selective log softmax": lambda t: torch.gather(t.log_softmax(-1), -1, torch.arange(B * S).view(B, S, 1) % V).squeeze(-1),
    "by sequence": lambda t: torch.stack([torch.logsumexp(one, dim=-1) for one in t]),
    "cross entropy": lambda t: F.cross_entropy(t.view(-1, V), torch.arange(B * S) % V),
    "cross entropy, fp32, shifted": lambda t: F.cross_entropy(
        t.float()[..., :-1, :].reshape(-1, V), torch.arange(B * (S - 1)) % V, ignore_index=3, reduction="sum"
    ),
    "cross entropy, smooth": lambda t: F.cross_entropy(
        t.view(-1, V), torch.arange(B * S) % V, label_smoothing=0.1, ignore_index=3
    ),
    "cross entropy, class weights": lambda t: F.cross_entropy(
        t.view(-1, V), torch.arange(B * S) % V, torch.arange(1.0, V + 1), ignore_index=2, label_smoothing=0.1
    ),
    "cross entropy, class weights of other logits": lambda t: F.cross_entropy(
        t.view(-1, V) / 2, torch.arange(B * S) % V, torch.arange(1.0, V + 1), ignore_index=2
    ),
    "cross entropy of each": lambda t: F.cross_entropy(t.view(-1, V), torch.arange(B * S) % V, reduction="none"),
    "cross entropy, none": lambda t: F.cross_entropy(t.view(-1, V) / 2, torch.arange(B * S) % V, reduction="none"),
}
REAL = {
    "times a tensor": lambda t: t * torch.ones(V),
    "part of the vocabulary": lambda t: t[..., :4],
    "along, by names": lambda t: torch.take_along_dim(t, indices=torch.zeros(B, S, 1, dtype=torch.long), dim=-1) * 1,
    "words of a mask": lambda t: t[(torch.arange(B * S * V) % 5 == 0).view(B, S, V).numpy()],
    "words of an old mask": lambda t: t[(torch.arange(B * S * V) % 5 == 0).view(B, S, V).byte()],
    "split over the vocabulary": lambda t: t.split([V], dim=-1)[0],
    "one number of each": lambda t: t[..., 0],
    "one number of one": lambda t: t[0, 1, 3],
    "part of the vocabulary, all dimensions": lambda t: t[:, :, :4],
    "words of a list": lambda t: t[:, 1, POSITION],
    "transposed": lambda t: t.transpose(1, 2),
    "flat": lambda t: t.reshape(-1),
    "softmax over positions": lambda t: t.softmax(1),
    "cat": lambda t: torch.cat([t, t]),
    "by its name": lambda t: torch.logsumexp(input=t, dim=-1),
    "sorted": lambda t: t.sort(-1).values,
    "largest of all": lambda t: t.max(),
    "sum over positions": lambda t: t.sum(1),
    "other logits": lambda t: t[:, 1:] * t[:, :-1],
    "einsum": lambda t: torch.einsum("bsv,bsv->bs", t, t),
}


def test_the_largest_are_equal_to_the_last_bit():
    """Sampling keeps what is no less than the k-th largest. A product of other rows may round otherwise."""
    calls = []

    def step(z):
        calls.append(z.numel())
        return z + len(calls) * 1e-3  # another result each time

    logits = lazy(torch.randn(B, S, H), torch.randn(V, H), None, step)
    calls.clear()
    for largest in (logits.topk(3).values[..., -1:], logits.max(-1, keepdim=True).values, logits.amax(-1, keepdim=True)):
        assert (logits >= largest).any(-1).all()
    assert calls == [B * S * V]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*LAZY, *CHUNKED, *REAL])
def test_values_and_gradients(name, bias):
    fn = (LAZY | CHUNKED | REAL)[name]
    x, real, leaves = pair(bias=bias)
    with mock.patch.object(module, "CHUNK", 3 * V * 4):
        ours, theirs = fn(x), fn(real)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
        assert is_lazy(ours) == (name in LAZY)
        assert is_lazy(x) or name in REAL
        torch.testing.assert_close(materialize(ours), theirs, rtol=1e-4, atol=1e-5)
        same_gradients(materialize(ours), theirs, leaves)
        with torch.no_grad():
            torch.testing.assert_close(materialize(fn(x)), theirs.detach(), rtol=1e-4, atol=1e-5)


class Doubled(torch.autograd.Function):
    """Somebody's own loss function: it sees the tensor as it is."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, d):
        return d * 2


def test_a_bug_by_rows_is_told_and_a_wrong_call_is_the_callers_error(monkeypatch, caplog):
    """Both are done with the logits themselves: for the first they give the result, for the second the error."""
    monkeypatch.setattr(tensor, "_told", set())
    _, real, _ = pair(True)
    for wrong in (lambda t: t.softmax(7), lambda t: t.argmax(-1, 2, 3), lambda t: t.split([1, 1], 1), lambda t: t.view(1, 2)):
        with pytest.raises(Exception) as theirs:
            wrong(real)
        with pytest.raises(type(theirs.value)) as ours:
            wrong(pair(True)[0])
        assert str(ours.value) == str(theirs.value)
    torch.testing.assert_close(pair(True)[0].split([V - 1, 1], -1)[1], real.split([V - 1, 1], -1)[1])
    assert not caplog.records
    monkeypatch.setitem(functions.HANDLED_FUNCTIONS, torch.Tensor.softmax, lambda *_: 1 / 0)
    for _ in range(2):
        torch.testing.assert_close(pair(True)[0].softmax(-1), real.softmax(-1))
    (record,) = caplog.records
    assert "softmax reads logits whole" in record.getMessage() and "ZeroDivisionError" in record.getMessage()


def test_gradients_flow_through_functions_of_others():
    x, real, leaves = pair(bias=True)
    same_gradients(Doubled.apply(x), Doubled.apply(real), leaves)


def test_read_twice_computed_once():
    x, real, _ = pair()
    assert x.square().sum() == real.square().sum() and materialize(x) is materialize(x)
    assert x[0, 0, 0] == real[0, 0, 0] and x.tolist() == real.tolist()


def write_to_part(t):
    t[:, -1].mul_(2)
    return t


def write_to_view_of_view(t):
    t.detach()[0][1:3] = 1.0
    return t


def write_and_look_at_view(t):
    part, copied = t[:, :-1], t.double()
    t[:, 0] = 0.5
    return part.logsumexp(-1) + copied[:, 1:].logsumexp(-1)


def write_to_what_was_read(t):
    part, other = t[:, 1:], t.view(-1, V)
    part = part if part.square().sum() > 0 else None
    part += 1
    return other.softmax(-1)


def write_to_rows(t):
    for row in t:
        row.div_(2)
    return t[MASK].clone().add_(1) - t[MASK]


WRITERS = [write_to_part, write_to_view_of_view, write_and_look_at_view, write_to_what_was_read]


@pytest.mark.parametrize(
    ("fn", "grad"),
    [*((fn, grad) for fn in WRITERS for grad in (True, False)), (write_to_rows, False)],  # torch refuses the last with gradients
)
def test_views_show_what_is_written_in_place(fn, grad):
    x, real, leaves = pair(grad)
    ours, theirs = fn(x), fn(real * 1)
    torch.testing.assert_close(materialize(ours), theirs)
    same_gradients(materialize(ours), theirs, leaves)


class Nothing(torch.autograd.Function):
    """It gives no gradient, or an error."""

    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        assert not ctx.fails
        return None, None


def test_results_wait_for_each_other_in_each_backward_pass():
    """Together, one by one, again, for some of the leaves, and after a pass that went wrong."""
    x, real, leaves = pair(bias=True)
    found, index = [], torch.arange(B * S).view(B, S, 1) % V
    for t in (x.float() / 2, real / 2):
        found.append((t.logsumexp(-1), t.log_softmax(-1).gather(-1, index), t.max(-1).values))
    how = {"retain_graph": True, "allow_unused": True}
    for of in (leaves, leaves[:1], leaves[1:]):
        for results in ([0, 1, 2], [1], [2, 0], [0, 1, 2]):
            losses = [sum((i + 1) * t[i].sum() for i in results) for t in found]
            torch.testing.assert_close(*(torch.autograd.grad(loss, of, **how) for loss in losses), rtol=1e-4, atol=1e-5)
        (first, second, third), _ = found
        assert not any(torch.autograd.grad(Nothing.apply(first, False).sum(), of, **how))
        with pytest.raises(AssertionError):
            torch.autograd.grad(Nothing.apply(second, True).sum() + first.sum() + third.sum(), of, **how)


def test_what_only_waits_is_not_kept_alive():
    x, _, _ = pair()
    loss, hidden = x.logsumexp(-1).sum() + x.sum(), weakref.ref(x.rows)
    loss.backward()
    del x, loss
    assert hidden() is None


def test_what_was_read_and_what_was_not_add_up():
    x, real, leaves = pair()
    ours, theirs = (t.logsumexp(-1).sum() + t.square().sum() + t.argmax(-1).sum() for t in (x, real))
    torch.testing.assert_close(torch.autograd.grad(ours, leaves[1]), torch.autograd.grad(theirs, leaves[1]))


@pytest.mark.parametrize("which", ["hidden", "weight"])
@torch.no_grad()
def test_what_was_written_since_is_noticed(which, monkeypatch):
    """By whomever, no optimizer among them."""
    monkeypatch.setattr(snapshot, "COPIED", 0)
    hidden, weight = torch.randn(S, H), torch.randn(V, H)
    x = lazy(hidden, weight)
    {"hidden": hidden, "weight": weight}[which].mul_(2)
    with pytest.raises(RuntimeError, match="have changed since"):
        x.sum()


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_autocast_is_that_of_the_call(device):
    """On a GPU it makes softmax fp32."""
    hidden, weight = torch.randn(3, H, device=device), torch.randn(V, H, device=device)
    x, real = lazy(hidden, weight), F.linear(hidden, weight)
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = x.bfloat16().softmax(-1), real.bfloat16().softmax(-1)
    assert ours.dtype == theirs.dtype == materialize(ours).dtype
    torch.testing.assert_close(materialize(ours), theirs, rtol=2e-2, atol=2e-2)


def test_a_step_runs_under_the_autocast_of_its_call():
    x = lazy(torch.randn(3, H), torch.randn(V, H))
    with torch.autocast("cpu", torch.bfloat16):
        step = functions._as_here(x, lambda: torch.is_autocast_enabled("cpu"))
    assert step() and not torch.is_autocast_enabled("cpu")


def test_other_optimizers_do_not_matter():
    x, real, _ = pair()
    other = nn.Parameter(torch.ones(2))
    other.sum().backward()
    torch.optim.SGD([other], lr=0.1).step()
    torch.testing.assert_close(materialize(x), real)


def test_copies_and_files():
    x, real, _ = pair(grad=False)
    assert torch.equal(pickle.loads(pickle.dumps(x)), real)
    assert torch.equal(copy.deepcopy(x), real)
    file = io.BytesIO()
    torch.save({"logits": x}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["logits"], real)
    assert (x.numpy() == real.numpy()).all() and str(x) == str(real) and x.cpu().shape == real.shape


def test_as_input_of_compiled_code():
    x, real, _ = pair(grad=False)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(lambda t: t.softmax(-1) + 1, backend="eager")(x), real.softmax(-1) + 1)


def test_as_input_of_a_module():
    x, real, leaves = pair()
    torch.manual_seed(0)
    layer = nn.Linear(V, 3)
    same_gradients(layer(x), layer(real), leaves)


def test_a_slice_that_is_all_of_a_layer():
    """[:1] of one row is the layer's result, not its call: the graph is rewritten all the same."""
    from sloth.rewriter.backend import listening

    x, (w, v) = torch.randn(1, 5, 8), torch.randn(2, 4, 8)

    def model(x):
        return F.linear(F.rms_norm(x @ w.mT @ w, (8,)), v)[:1]

    torch._dynamo.reset()
    with listening() as reports:
        found = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "eager"})(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert [report.untouched for report in reports] == [""]
