"""Losses of labels, however the log-likelihood and the head are spelled."""

import pytest
import torch
import torch.nn.functional as F
from inner import OPTIONS as QUICK
from torch import nn

from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED, Report

B, S, H, V = 2, 6, 8, 29
HEADS = {
    "linear": lambda h, w: F.linear(h, w),
    "matmul": lambda h, w: torch.matmul(h, w.t()),
    "einsum": lambda h, w: torch.einsum("bsh,vh->bsv", h, w),
    "mT": lambda h, w: h @ w.mT,
}
LOSSES = {
    "nll": lambda z, t: F.nll_loss(F.log_softmax(z.flatten(0, 1).float(), -1), t.flatten()),
    "nll of a view": lambda z, t: F.nll_loss(z.log_softmax(-1).view(-1, V), t.view(-1), reduction="sum", ignore_index=3),
    "nll of a transposition": lambda z, t: F.nll_loss(z.log_softmax(-1).transpose(1, 2), t),
    "logarithm": lambda z, t: F.nll_loss(z.float().softmax(-1).log().flatten(0, 1), t.flatten()),
    "gathered": lambda z, t: -F.log_softmax(z.float(), -1).gather(-1, t[..., None]).mean(),
    "gathered, squeezed": lambda z, t: (-z.log_softmax(-1).gather(2, t.unsqueeze(-1)).squeeze(-1)).mean(),
    "some tokens": lambda z, t: -z[:, :-1].log_softmax(-1).gather(-1, t[:, 1:, None])[..., 0].sum() / 7,
    "less the target": lambda z, t: (z.logsumexp(-1) - z.gather(-1, t[..., None]).squeeze(-1)).mean(),
    "less the sum": lambda z, t: -(z.gather(-1, t[..., None])[..., 0] - torch.logsumexp(z, dim=-1)).mean(),
    "of some tokens": lambda z, t: (
        ((z.logsumexp(-1, keepdim=True) - z.gather(-1, t[..., None])).squeeze(-1) * (t > 5)).sum() / (t > 5).sum()
    ),
    "summed by itself": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), reduction="none").sum() / 11,
}
NEARLY = {
    "mean of some": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), reduction="none", ignore_index=3).mean(),
    "other classes": lambda z, t: -z.log_softmax(1).gather(-1, t[..., None]).mean(),
    "several of a row": lambda z, t: -z.log_softmax(-1).gather(-1, t[:, None].expand(B, S, S)).mean(),
    "of another": lambda z, t: (z.logsumexp(-1) - (2 * z).gather(-1, t[..., None]).squeeze(-1)).mean(),
    "over tokens": lambda z, t: (z.logsumexp(1).sum() - z.gather(-1, t[..., None]).sum()) / 7,
}


class Model(nn.Module):
    def __init__(self, head, loss, logits=False):
        super().__init__()
        self.layer, self.weight = nn.Linear(H, H), nn.Parameter(torch.randn(V, H))
        self.head, self.loss, self.logits = head, loss, logits

    def forward(self, x, t):
        z = self.head(self.layer(x), self.weight)
        return (self.loss(z, t), z) if self.logits else self.loss(z, t)


def trained(model, run, *args):
    model.zero_grad()
    out = run(*args)
    (out[0] if model.logits else out).backward()
    return [out, *(p.grad for p in model.parameters())]


def checked(model):
    """As eager; the sites."""
    x, t = torch.randn(B, S, H), torch.randint(0, V, (B, S))
    torch._dynamo.reset()
    with listening() as graphs:
        ours = trained(model, torch.compile(model, backend="sloth", options=QUICK), x, t)
        if model.logits:
            ours[0] = (ours[0][0], ours[0][1] + 0)
    torch.testing.assert_close(ours, trained(model, model, x, t), rtol=1e-4, atol=1e-5)
    return [(s.construct, s.status, s.variant.split("[")[0]) for s in Report(graphs).sites]


@pytest.mark.parametrize("loss", LOSSES)
def test_spellings(loss):
    torch.manual_seed(0)
    head = list(HEADS)[list(LOSSES).index(loss) % len(HEADS)]
    ((construct, status, entry),) = checked(Model(HEADS[head], LOSSES[loss]))
    assert (construct, status) == ("cross_entropy", MATCHED) and entry.startswith("linear_cross_entropy")


@pytest.mark.parametrize("loss", NEARLY)
def test_other_mathematics(loss):
    torch.manual_seed(0)
    entries = [entry for _, status, entry in checked(Model(HEADS["linear"], NEARLY[loss])) if status == MATCHED]
    assert entries == (["linear_cross_entropy_rows"] if loss == "mean of some" else [])


@pytest.mark.parametrize("head", HEADS)
def test_logits_beside_a_gathered_loss_wait(head):
    torch.manual_seed(0)
    sites = checked(Model(HEADS[head], LOSSES["gathered"], logits=True))
    assert sites == [("cross_entropy", MATCHED, "linear_cross_entropy")]
