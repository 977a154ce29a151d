"""A checkpointed layer's dequantised weights are not kept from where it is computed again to where its gradient is; what leaves
it, and what adapters' A make of activations, is not computed again.
"""

from functools import partial

import pytest
import torch
from common import DEVICE
from peft_layers import BF16, Attention, K, adapted, same, step
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sloth.kernels.common.dispatch import IMPLEMENTATIONS
from sloth.kernels.linear.gemm import sum_of_products
from sloth.kernels.linear.gemm_columns import products_in_columns
from sloth.rewriter.compile import inductor
from sloth.rewriter.compile.passes import Pass


class Followed(Attention):
    """By what keeps its input for the backward pass, and by a number that nothing is trained by."""

    residual = True

    def part(self, x):
        q = torch.tanh(self.q(x))
        y = self.o(q * self.k(x) + self.v(x))
        return x + y if self.residual else y, q

    def forward(self, x):
        y, q = checkpoint(self.part, x, use_reentrant=False)
        return y * torch.tanh(y) + q.detach().sum().sign()


class Own(Pass):
    """A pass of the user's, which changes nothing."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append(graph)

    def uuid(self):
        return None  # nothing comes from a cache


def weights_made(checkpointed, monkeypatch, **options):
    """How often a weight was dequantised in the second step; its gradients and eager's."""
    torch._dynamo.reset()
    model = adapted(Attention("nf4", BF16, checkpointed=checkpointed), {})
    x = torch.randn(2, 8, K, device=DEVICE, dtype=BF16, requires_grad=True)
    run = torch.compile(model, backend="sloth", options=options)
    step(model, run, x)
    here, made = "triton" if DEVICE == "cuda" else "aten", []
    for name, weights in (("dequantize_4bit", lambda *args: [args]), ("dequantize_4bit_together", lambda matrices, *_: matrices)):
        of = IMPLEMENTATIONS[f"sloth::{name}"]
        count = lambda *args, weights=weights, original=of[here]: made.extend(weights(*args)) or original(*args)  # noqa: E731
        monkeypatch.setitem(of, here, count)
    ours = step(model, run, x)
    monkeypatch.undo()
    same(ours, step(model, model, x), 2e-2)
    return len(made)


def test_once_for_each_use(monkeypatch):
    """q, k and v three times, o twice: its own result is not computed again."""
    assert weights_made(True, monkeypatch) == 3 * 3 + 2
    assert weights_made(False, monkeypatch) == 4 * 2


@pytest.mark.parametrize("residual", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_what_leaves_a_part_is_kept(residual, monkeypatch):
    """As in eager; torch would compute o again. What only leaves it, q, is not kept."""
    monkeypatch.setattr(Followed, "residual", residual)
    layers = {sum_of_products: lambda n: 1, products_in_columns: lambda n: len(n.args[3])}  # the second on a GPU: q, k and v

    def products():
        torch._dynamo.reset()
        model, graphs = adapted(Followed("nf4", BF16), {}), Own()
        x = torch.randn(2, 8, K, device=DEVICE, dtype=BF16, requires_grad=True)
        run = torch.compile(model, backend="sloth", options={"post_grad_custom_post_pass": graphs})
        same(step(model, run, x), step(model, model, x), 2e-2)
        return [sum(layers.get(n.target, lambda n: 0)(n) for n in graph.nodes) for graph in graphs.seen]

    assert products() == [4, 3 + 2]  # forward; again, and the gradients of x and of what o reads
    monkeypatch.setattr(inductor, "save_checkpoint_boundaries", lambda graph: None)
    assert products() == [4, 4 + 2]


class Chosen(Attention):
    """Of which the user says what is computed again: all."""

    def forward(self, x):
        again = partial(create_selective_checkpoint_contexts, lambda *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE)
        y = checkpoint(self.attend, x, use_reentrant=False, context_fn=again)
        return self.head(y.to(self.head.weight.dtype))


@pytest.mark.parametrize("chosen", [False, True])
def test_products_of_adapters_are_kept(chosen, monkeypatch):
    """Of the layer that is computed again: x [A_q; A_k; A_v]ᵀ, 6 columns where x has 128, and what o's A makes of its 64."""
    made = lambda graph: sum(n.target is torch.ops.aten.mm.default for n in graph.nodes)  # noqa: E731

    def products():
        torch._dynamo.reset()
        model, graphs = adapted((Chosen if chosen else Attention)("nf4", BF16, checkpointed=True), {"r": 2}), Own()
        x = torch.randn(2, 8, K, device=DEVICE, dtype=BF16, requires_grad=True)
        run = torch.compile(model, backend="sloth", options={"post_grad_custom_post_pass": graphs})
        same(step(model, run, x), step(model, model, x), 2e-2)
        return [made(graph) for graph in graphs.seen]

    kept = products()
    monkeypatch.setattr(inductor, "save_thin_products", lambda graph: None)
    assert products() == [kept[0], kept[1] + 2 * (not chosen)]


@pytest.mark.parametrize("where", [pytest.param("setting", marks=pytest.mark.nightly), "option"])
def test_a_pass_of_the_users_stays(where, monkeypatch):
    """And so do ours."""
    own = Own()
    with torch._inductor.config.patch({"post_grad_custom_post_pass": own} if where == "setting" else {}):
        options = {} if where == "setting" else {"post_grad_custom_post_pass": own}
        assert weights_made(True, monkeypatch, **options) == 3 * 3 + 2
    assert own.seen
