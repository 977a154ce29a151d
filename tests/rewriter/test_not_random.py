"""Attention without dropout is computed again without a look at random states."""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE
from torch.utils.checkpoint import checkpoint

from sloth.rewriter.compile.drop_rng_tag import PLAIN
from sloth.rewriter.compile.passes import Pass


class Seen(Pass):
    """What Inductor compiles."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph):
        self.graphs.append([str(n.target) for n in graph.nodes if n.op == "call_function"])

    def uuid(self):
        return None  # nothing comes from a cache


def attend(x, dropout):
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in x.chunk(3, -1))
    return F.scaled_dot_product_attention(torch.tanh(q), k, torch.tanh(v), dropout_p=dropout, is_causal=True).sin()


def step(run, x, dropout):
    return torch.autograd.grad(run(x, dropout).square().sum(), x)[0]


def compiled(dropout, backend="sloth"):
    """The gradient, and names of what forward and backward pass call."""
    torch._dynamo.reset()
    x, seen = torch.randn(2, 24, 96, device=DEVICE, requires_grad=True), Seen()
    options = {"post_grad_custom_post_pass": seen}
    run = torch.compile(lambda x, p: checkpoint(attend, x, p, use_reentrant=False) * 2, backend=backend, options=options)
    ours = step(run, x, dropout)
    if dropout == 0:
        torch.testing.assert_close(ours, step(lambda x, p: attend(x, p) * 2, x, dropout))
    return seen.graphs


def calls(graph, *words):
    return any(word in name for name in graph for word in words)


def test_no_state_is_saved():
    ours, theirs = compiled(0.0), compiled(0.0, backend="inductor")
    assert len(ours) == len(theirs) == 2
    assert all(calls(graph, *map(str, PLAIN.values())) and not calls(graph, "rng_state") for graph in ours)
    assert all(calls(graph, "rng_state") for graph in theirs)


@pytest.mark.nightly
def test_dropout_stays_random():
    assert not any(calls(graph, *map(str, PLAIN.values())) for graph in compiled(0.5))


def test_other_names_for_the_same(q=(2, 2, 24, 16)):
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    given = [torch.randn(q) for _ in range(3)]
    torch.testing.assert_close(PLAIN[op](*given, is_causal=True), op(*given, is_causal=True), rtol=0, atol=0)
    assert torch.Tag.nondeterministic_seeded not in PLAIN[op].tags
