"""`sloth.checkpoint_offload`: inputs of layers wait in host memory, and come back with the same bytes before they are needed."""

import pytest
import torch
from common import DEVICE
from test_parts import AOT, Layer, stack
from torch import nn
from torch.utils.checkpoint import checkpoint

from sloth.rewriter import notices
from sloth.rewriter.compile import checkpoint_offload
from sloth.rewriter.compile.checkpoint_offload import HostCopy

OFFLOAD = AOT | {"sloth.checkpoint_offload": True}
X = torch.randn(3, 8, device=DEVICE)


@pytest.fixture(autouse=True)
def copies(monkeypatch):
    """Those that are made, also of tensors on a CPU."""
    made: list[HostCopy] = []
    monkeypatch.setattr(checkpoint_offload, "is_on_gpu", lambda x: isinstance(x, torch.Tensor))
    monkeypatch.setattr(HostCopy, "__init__", lambda self, *a, init=HostCopy.__init__: (made.append(self), init(self, *a))[1])
    torch._dynamo.reset()
    return made


class Checkpointed(Layer):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def gradients(model, out):
    return torch.autograd.grad(out.square().mean(), list(model.parameters()))


@pytest.mark.parametrize("layer", [Checkpointed, Layer])
def test_gradients_are_those_of_eager(layer, copies):
    model = stack(6, layer)
    out = torch.compile(model, backend="sloth", options=OFFLOAD)(X)
    assert len(copies) == 4  # not the model's input, nor what the last layer and the sine read
    assert all(c.is_away and c.memory.untyped_storage().nbytes() == 0 for c in copies)
    torch.testing.assert_close(gradients(model, out), gradients(model, model(X)))
    assert all(c.host == [] and c.memory is None for c in copies)


def test_in_blocks_of_one_size(copies, monkeypatch):
    """So that what was made for one length serves another; what is made ahead serves a text twice as long."""
    made = []
    monkeypatch.setattr(checkpoint_offload, "BLOCK", 40)
    take = checkpoint_offload._host_memory
    monkeypatch.setattr(checkpoint_offload, "_host_memory", lambda n, pinned: (made.append(n), take(n, False))[1])
    model = stack(6, Checkpointed)
    out = torch.compile(model, backend="sloth", options=OFFLOAD)(X)
    assert [[len(b) for b in c.host] for c in copies] == [[40] * 3] * 4, "96 bytes"
    assert sorted(made) == [96] * 4 + [2 * 4 * 3 * 40]
    torch.testing.assert_close(gradients(model, out), gradients(model, model(X)))


def test_passes_that_interleave_and_accumulate(copies):
    model = stack(6, Checkpointed)
    run = torch.compile(model, backend="sloth", options=OFFLOAD)
    first, second = run(X), run(X + 1)
    with torch.no_grad():
        run(X)  # evaluation between them: nothing waits
    assert len(copies) == 8
    ours = [gradients(model, out) for out in (first, second)]
    torch.testing.assert_close(ours, [gradients(model, model(x)) for x in (X, X + 1)])


def test_a_graph_that_is_kept_is_gone_through_twice(copies):
    model = stack(6, Checkpointed)
    loss = torch.compile(model, backend="sloth", options=OFFLOAD)(X).square().mean()
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), once)


def test_one_that_is_never_gone_through(copies):
    model = stack(6, Checkpointed)
    run = torch.compile(model, backend="sloth", options=OFFLOAD)
    run(X)
    torch.testing.assert_close(gradients(model, run(X)), gradients(model, model(X)))


def test_inside_of_another_checkpoint_nothing_leaves(copies):
    """That one runs the graph again, and hands what the second run saves to the first one's backward pass."""
    model = stack(6, Layer)
    run = torch.compile(model, backend="sloth", options=OFFLOAD)
    ours = gradients(model, checkpoint(run, X, use_reentrant=False))
    torch.testing.assert_close(ours, gradients(model, model(X)))
    assert not copies


class TwoResults(Checkpointed):
    def forward(self, pair):
        x, sums = super().forward(pair[0]), pair[1]
        return x, sums + x.square().mean(-1)


def test_what_is_made_beside_another_result_stays(copies):
    """The gradient of the other alone goes through the layer, which may have saved the first."""

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(TwoResults() for _ in range(6))

        def forward(self, x):
            pair = x, x.sum(-1)
            for layer in self.layers:
                pair = layer(pair)
            return pair[1]

    torch.manual_seed(0)
    model = Sums().to(DEVICE)
    out = torch.compile(model, backend="sloth", options=OFFLOAD)(X)
    assert not copies
    torch.testing.assert_close(gradients(model, out), gradients(model, model(X)))


def test_what_others_see_stays(copies):
    """Of a layer that everybody reads, or that is given out, also as a view."""

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Checkpointed() for _ in range(6))

        def forward(self, x):
            hidden = []
            for layer in self.layers:
                x = layer(x)
                hidden.append(x.view(-1))
            return x, hidden

    torch.manual_seed(0)
    model = Seen().to(DEVICE)
    _, hidden = torch.compile(model, backend="sloth", options=OFFLOAD)(X)
    assert not copies
    torch.testing.assert_close(hidden, model(X)[1])


def test_a_graph_without_layers_says_so(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    torch.compile(stack(2), backend="sloth", options=OFFLOAD)(X)
    assert "nothing waits in host memory" in caplog.text


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_memory_on_the_gpu(monkeypatch):
    """The peak of a forward and backward pass, beyond the model."""

    def peak(options):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(Checkpointed() for _ in range(16))).to(DEVICE)
        x = torch.randn(1 << 20, 8, device=DEVICE)
        run = torch.compile(model, backend="sloth", options={k: v for k, v in options.items() if k != "sloth.inner_backend"})
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = gradients(model, run(x))
            peak = torch.cuda.max_memory_allocated() - before
        return peak, found

    (less, ours), (more, plain) = peak(OFFLOAD), peak(AOT)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert less < 0.7 * more
