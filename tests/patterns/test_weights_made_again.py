"""A checkpointed layer's dequantised weights are not kept from where it is computed again to where its gradient is."""

import pytest
import torch
from common import DEVICE
from peft_layers import BF16, Attention, K, adapted, same, step

from sloth.kernels import dequantize_4bit as module
from sloth.rewriter.again import MadeAgain


def weights_made(checkpointed, monkeypatch, **options):
    """How often a weight was dequantised in the second step; its gradients and eager's."""
    torch._dynamo.reset()
    model = adapted(Attention("nf4", BF16, checkpointed=checkpointed), {})
    x = torch.randn(2, 8, K, device=DEVICE, dtype=BF16, requires_grad=True)
    run = torch.compile(model, backend="sloth", options=options)
    step(model, run, x)
    name, made = "_triton" if DEVICE == "cuda" else "_bitsandbytes", []
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: made.append(args) or original(*args))
    ours = step(model, run, x)
    monkeypatch.undo()
    same(ours, step(model, model, x), 2e-2)
    return len(made)


def test_once_for_each_use(monkeypatch):
    """q, k and v three times, o twice: its own result is not computed again."""
    assert weights_made(True, monkeypatch) == 3 * 3 + 2
    assert weights_made(False, monkeypatch) == 4 * 2


@pytest.mark.parametrize("where", ["setting", "option"])
def test_a_pass_of_the_users_stays(where, monkeypatch):
    class Own(MadeAgain):
        def __call__(self, graph):
            seen.append(graph)

        def uuid(self):
            return None  # nothing comes from a cache

    seen, own = [], Own("")
    if where == "setting":
        with torch._inductor.config.patch(post_grad_custom_post_pass=own):
            assert weights_made(True, monkeypatch) == 3 * 2 + 2
    else:
        assert weights_made(True, monkeypatch, post_grad_custom_post_pass=own) == 3 * 2 + 2
    assert seen
