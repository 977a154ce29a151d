"""Attention with ALiBi: biases that are proven to be a slope of each head times positions of keys, and those that are nearly."""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, assert_no_worse
from inner import OPTIONS as QUICK
from test_attention import AOT, BATCHES, sites_of, step
from test_eager_attention import additive, model_and_input, same
from test_mask_meaning import S, causal, narrow_window
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MptConfig

from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED

HEADS = 4


def at(start=0, step=1):
    return torch.arange(start, start + step * S, step, device=DEVICE)


def powers():
    return 0.5 ** torch.arange(1, HEADS + 1, device=DEVICE)


def filled(bias):
    """MPT's softmax, of scores with this bias."""

    def weigh(scores, mask):
        scores = (scores + bias()).masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.softmax(scores.float(), -1).to(scores.dtype)

    return weigh


BIASES = {
    "of keys": lambda: powers()[:, None, None] * at(),
    "of a longer sequence": lambda: (torch.arange(-99, 1, device=DEVICE).view(1, 1, 1, -1) * powers().view(1, -1, 1, 1))[
        ..., -S:
    ],
    "repeated": lambda: (at() * powers()[:, None, None]).repeat(2, 1, 1).view(2, HEADS, 1, S),
    "in fp64": lambda: (powers()[:, None, None] * at()).double().float(),
    "every other": lambda: powers()[:, None, None] * at(step=2),
    "every other of more": lambda: (powers()[:, None, None] * torch.arange(2 * S, device=DEVICE))[..., ::2],
    "squared": lambda: powers()[:, None, None] * at() ** 2,
    "doubled": lambda: (powers()[:2, None, None] * at()).repeat(2, 1, 1),
    "for all queries": lambda: (powers()[:, None, None] * at()).expand(2, HEADS, S, S),
    "counted of ones": lambda: powers()[:, None, None] * (torch.ones(2, 1, 1, S, device=DEVICE).cumsum(-1) - 1),
    "divided": lambda: powers()[:, None, None] * at() / 3,
}
NEARLY = {
    "of queries": lambda: powers()[:, None, None] * at()[:, None],
    "of distances in both directions": lambda: powers()[:, None, None] * (at() - at()[:, None]).abs(),
    "of no numbers": lambda: powers()[:, None, None] * at().bool(),
    "shifted": lambda: powers()[:, None, None] + at(),
    "slopes of keys": lambda: torch.ones(HEADS, 1, S, device=DEVICE) * at(),
    "for all heads": lambda: (powers()[0] * at()).view(1, 1, S),
    "of padding": lambda: powers()[:, None, None] * ((at() > 4).float() * -1e9),
    "immoderate": lambda: powers()[:, None, None] * at() * -1e30,
}


@pytest.mark.parametrize("mask", [causal, narrow_window], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.covered(1)
def test_slopes(bias, mask):
    model, x = model_and_input(mask, filled(BIASES[bias]), groups=4)
    statuses, sites = same(model, x)
    assert statuses == [MATCHED] and "alibi" in sites[0].variant


@pytest.mark.parametrize("bias", NEARLY)
def test_what_is_nearly_a_slope(bias):
    model, x = model_and_input(causal, filled(NEARLY[bias]), groups=4)
    assert same(model, x)[0] == ["check"]


def test_slopes_that_are_learned():
    model, x = model_and_input(
        causal, lambda scores, mask, sinks: filled(lambda: sinks[:, None, None] * at())(scores, mask), groups=4
    )
    assert same(model, x)[0] == ["gradient"]


def test_flat_in_the_other_order():
    """Heads of all sequences, then the next head: not what the scores are, but what the model adds to them."""

    class Flat(nn.Module):
        def __init__(self, repeat):
            super().__init__()
            self.w, self.repeat = nn.Linear(32, 3 * 32), repeat

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, 8)).transpose(1, 2).reshape(-1, S, 8) for t in self.w(x).chunk(3, -1))
            scores = self.repeat(powers()[:, None, None] * at()).baddbmm(q, k.mT, alpha=0.3).view(-1, HEADS, S, S)
            weights = F.softmax(scores + additive(causal(x), x.dtype), -1, dtype=torch.float32).view(-1, S, S)
            return torch.bmm(weights, v).view(-1, HEADS, S, 8)

    x = torch.randn(2, S, 32, device=DEVICE)
    assert same(Flat(lambda b: b.repeat(2, 1, 1)).to(DEVICE), x)[0] == [MATCHED]
    assert same(Flat(lambda b: b.repeat_interleave(2, 0)).to(DEVICE), x)[0] == [MATCHED]


# ---------------------------------------------------------------- models

SMALL = {"vocab_size": 64, "use_cache": False, "bos_token_id": 2, "eos_token_id": 1}
MODELS = {
    "mpt": MptConfig(**SMALL, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2),
    "bloom": BloomConfig(**SMALL, hidden_size=32, n_head=4, n_layer=2, hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0),
    "falcon": FalconConfig(**SMALL, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, alibi=True, pad_token_id=0),
}


def checked(name, dtype=torch.float32, checkpointed=False, batch=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).to(DEVICE, dtype).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    with listening() as reports:
        ours = step(model, torch.compile(model, backend="sloth", options=AOT if checkpointed else QUICK), batch or {})
    return model, ours, step(model, model, batch or {}), [s.status for s in sites_of(reports)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.covered(1)
def test_models(name, checkpointed):
    _, ours, theirs, statuses = checked(name, checkpointed=checkpointed)
    assert statuses == [MATCHED] * 2
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_low_precision(name):
    model, ours, theirs, statuses = checked(name, torch.bfloat16)
    assert statuses == [MATCHED] * 2
    truth = step(model.float(), model, {})
    assert_no_worse(*(torch.cat([t.flatten() for t in side]) for side in (ours[1:], theirs[1:], truth[1:])))


PADDINGS = {
    "left": BATCHES["left"]["attention_mask"],
    "right": BATCHES["right"]["attention_mask"],
    "holes": (torch.rand(2, S, generator=torch.Generator().manual_seed(0)) < 0.7).long().to(DEVICE),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["bloom", "falcon"])
@pytest.mark.covered(1)
def test_positions_that_padding_counts(name, padding, checkpointed):
    _, ours, theirs, statuses = checked(name, checkpointed=checkpointed, batch={"attention_mask": PADDINGS[padding]})
    assert statuses == [MATCHED] * 2
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_padding_that_is_written_over():
    """MPT's: the scores of a query that sees nothing have no gradient then."""
    _, ours, theirs, statuses = checked("mpt", batch=BATCHES["left"])
    assert statuses == [MATCHED] * 2
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
