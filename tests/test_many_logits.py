"""More than 2³¹ logits, on a GPU: the last rows have the loss and the gradients that they have by themselves."""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE

from sloth.kernels.loss.cross_entropy import cross_entropy
from sloth.lazy.functions import LazyLogits

V, H = 128_256, 64
N = 2**31 // V + 500
LAST = 64
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30, reason="takes up to 30 GiB of a GPU"
)


def random(*size: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(size))
    return torch.randn(size, generator=generator, device=DEVICE, dtype=torch.bfloat16).requires_grad_()


def targets() -> torch.Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)


def test_the_loss_of_logits():
    logits, target = random(N, V), targets()
    loss, lse, _ = cross_entropy(logits, target, -100, "sum")
    (got,) = torch.autograd.grad(loss, logits)
    last = logits[-LAST:].detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(last.float(), target[-LAST:], reduction="sum"), last)
    torch.testing.assert_close(lse[-LAST:], last.float().logsumexp(-1))
    torch.testing.assert_close(got[-LAST:], expected)
    some = slice(None, None, N // 100)
    torch.testing.assert_close(lse[some], logits[some].float().logsumexp(-1))


def test_logits_beside_a_loss(monkeypatch):
    """Lazy ones: by rows, and all of them read. Sums over the vocabulary are added up in fp32, on both sides."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    hidden, target = random(1, N, H), targets()
    weight = (random(V, H).detach() * H**-0.5).requires_grad_()  # logits of about 1, whose rounding changes little

    def fn(hidden, target):
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.float().view(-1, V), target, reduction="sum"), logits

    torch._dynamo.reset()
    loss, logits = torch.compile(fn, backend="sloth", options={"sloth.inner_backend": "aot_eager"})(hidden, target)
    assert isinstance(logits, LazyLogits) and logits.known is None and logits.numel() > 2**31
    last = hidden[:, -LAST:].detach().requires_grad_()
    expected, real = fn(last, target[-LAST:])
    by_rows = logits.logsumexp(-1)[0, -LAST:]
    torch.testing.assert_close(by_rows, real.logsumexp(-1)[0], rtol=2e-2, atol=2e-2)
    read = logits.mT[0, :, -1], real.mT[0, :, -1]  # whole
    assert logits.known is not None
    for ours, theirs in ((loss, expected), (by_rows.sum(), real.logsumexp(-1).sum()), (x.sum() for x in read)):
        got, right = (torch.autograd.grad(x, t, retain_graph=True)[0] for x, t in ((ours, hidden), (theirs, last)))
        torch.testing.assert_close(got[:, -LAST:], right, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(*read, rtol=2e-2, atol=2e-2)
