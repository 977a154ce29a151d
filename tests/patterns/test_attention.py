"""Masks that are computed: what is proven of them, and that attention is eager's whatever is proven."""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config

from sloth.patterns.mask_meaning import meaning
from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED
from sloth.rewriter.shadow import views

S = 24


def told(fn, *args, dynamic=False):
    """What the mask that `fn(x, *args)` gives means, in the graph that Dynamo makes of it."""
    found = []

    def look(gm, _):
        (view,) = views(gm)
        found.append(meaning(view.env[gm.graph.output_node().args[0][0]]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=look, dynamic=dynamic)(torch.zeros(2, S, device=DEVICE), *args)
    return found[0]


def positions(x):
    n = torch.arange(x.shape[1], device=x.device)
    return n[None, None, :, None], n[None, None, None, :]


def causal(x):
    i, j = positions(x)
    return j <= i


def causal_turned(x):
    i, j = positions(x)
    return ~(j > i)


def causal_shifted(x):
    i, j = positions(x)
    return (j + 3 < i + 4) & x.new_ones(x.shape[0], 1, 1, 1, dtype=torch.bool)


def causal_gathered(x):
    """As transformers does: positions by index, sequences told apart by positions that restart."""
    b, p = (
        torch.arange(x.shape[0], device=x.device)[:, None, None, None],
        torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1),
    )
    packed = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    i, j = positions(x)
    return (packed[b, i] == packed[b, j]) & (p[b, j] <= p[b, i])


def wide_window(x):
    i, j = positions(x)
    return (j <= i) & (j > i - S)


def everything(x):
    i, j = positions(x)
    return (j <= i) | torch.ones_like(i, dtype=torch.bool)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", [causal, causal_turned, causal_shifted, causal_gathered], ids=lambda f: f.__name__)
def test_causal(fn, dynamic):
    assert told(fn, dynamic=dynamic) == "causal"


def test_a_window_wider_than_the_sequence_is_none():
    assert told(wide_window) == "causal" and told(everything) == "full"


def narrow_window(x):
    i, j = positions(x)
    return (j <= i) & (j > i - S + 1)


def strict(x):
    i, j = positions(x)
    return j < i


def exchanged(x):
    i, j = positions(x)
    return i <= j


def shifted(x):
    i, j = positions(x)
    return j <= i + 1


def restarting(x):
    half = torch.arange(S // 2, device=x.device)
    p = torch.cat((half, half))[None].expand(x.shape[0], -1)
    b = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    i, j = positions(x)
    return p[b, j] <= p[b, i]


def backwards(x):
    p = torch.arange(x.shape[1], device=x.device).flip(0)[None].expand(x.shape[0], -1)
    b = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    i, j = positions(x)
    return p[b, j] <= p[b, i]


def from_the_end(x):
    n = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
    b = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    i, j = positions(x)
    return (n[b, j - 1] <= n[b, i]) & (j <= i)


def of_data(x):
    i, j = positions(x)
    return (j <= i) & (x[:, None, None, :] == 0)


def written(x):
    i, j = positions(x)
    m = (j <= i).clone()
    m[..., 0] = True
    m[..., 1] = False
    return m


NOT = [narrow_window, strict, exchanged, shifted, restarting, backwards, from_the_end, of_data, written]


@pytest.mark.parametrize("fn", NOT, ids=lambda f: f.__name__)
def test_what_is_nearly_causal_is_not(fn):
    assert told(fn) is None


class Attention(nn.Module):
    def __init__(self, mask, groups, dropout=0.0):
        super().__init__()
        self.mask, self.groups, self.dropout = mask, groups, dropout
        self.w = nn.Linear(32, 32 + 2 * 8 * groups)

    def forward(self, x):
        q, k, v = self.w(x).split([32, 8 * self.groups, 8 * self.groups], -1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        if self.groups < 4:
            k, v = (t.repeat_interleave(4 // self.groups, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, self.mask(x), self.dropout, scale=0.3)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", [causal_gathered, narrow_window, restarting, written], ids=lambda f: f.__name__)
def test_attention_is_eager_s(mask, groups):
    torch.manual_seed(0)
    model, x = Attention(mask, groups).to(DEVICE), torch.randn(2, S, 32, device=DEVICE)
    torch._dynamo.reset()
    with listening() as reports:
        out = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})(x)
    (ours,) = torch.autograd.grad(out.square().sum(), [model.w.weight])
    eager = model(x)
    (theirs,) = torch.autograd.grad(eager.square().sum(), [model.w.weight])
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    sites = [s for r in reports for s in r.sites if s.construct == "attention"]
    assert [s.status == MATCHED for s in sites] == [mask is causal_gathered]
    assert sites[0].status in (MATCHED, "mutation" if mask is written else "check"), sites[0].reason


SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64,
    "use_cache": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=2 * S),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    """Causal without a mask; with padding, or positions that restart, left alone. Values and gradients are always eager's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).to(DEVICE)
    ids = torch.randint(3, 64, (2, S), device=DEVICE)
    padding = torch.ones(2, S, dtype=torch.long, device=DEVICE)
    padding[1, :7] = 0
    restart = torch.cat((torch.arange(10), torch.arange(S - 10)))[None].expand(2, -1).contiguous().to(DEVICE)
    for more, proven in (({}, True), ({"attention_mask": padding}, False), ({"position_ids": restart}, False)):
        torch._dynamo.reset()
        with listening() as reports:
            loss = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})(
                input_ids=ids, labels=ids, **more
            ).loss
        ours = torch.autograd.grad(loss, list(model.parameters()))
        eager = model(input_ids=ids, labels=ids, **more).loss
        theirs = torch.autograd.grad(eager, list(model.parameters()))
        torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        sites = [s for r in reports for s in r.sites if s.construct == "attention"]
        assert len(sites) == 2 and all((s.status == MATCHED) == proven for s in sites), more


def test_a_mask_that_is_made_outside_of_checkpoints():
    """Its meaning is followed through the inputs of the checkpointed layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["llama"]).to(DEVICE).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 64, (2, S), device=DEVICE)
    torch._dynamo.reset()
    with listening() as reports:
        torch.compile(model, backend="sloth", options={"sloth.inner_backend": "eager"})(input_ids=ids, labels=ids)
    statuses = [s.status for r in reports for s in r.sites if s.construct == "attention"]
    assert statuses == [MATCHED, MATCHED]


def test_a_body_that_is_called_with_different_masks():
    """What its input is cannot be said: nothing is proven, and both results are eager's."""
    from torch.utils.checkpoint import checkpoint

    model, x = Attention(None, 4).to(DEVICE), torch.randn(2, S, 32, device=DEVICE)

    def layer(x, mask):
        model.mask = lambda _: mask
        return model(x)

    def fn(x):
        return checkpoint(layer, x, causal(x), use_reentrant=False) + checkpoint(
            layer, x, strict(x) | causal(x[:, :1]), use_reentrant=False
        )

    torch._dynamo.reset()
    out = torch.compile(fn, backend="sloth", options={"sloth.inner_backend": "eager"})(x)
    torch.testing.assert_close(out, fn(x), rtol=1e-4, atol=1e-5, equal_nan=True)
