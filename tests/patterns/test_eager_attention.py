"""Attention spelled out is eager's, queries that see nothing included, and what only looks like it is left alone."""

import copy
from inspect import getsource, signature

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, assert_no_worse
from inner import OPTIONS as QUICK
from test_attention import AOT, BATCHES, GROUPED, LATENT, SIZES, sites_of, step
from test_mask_meaning import PADDING, RESTART, S, causal, falling, narrow_window, packed_window, padded, strict
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)
from transformers.models.opt.modeling_opt import OPTDecoder

from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED


def additive(mask, dtype):
    return torch.where(mask, torch.zeros((), device=mask.device, dtype=dtype), torch.finfo(dtype).min)


def weighted(scores, mask):
    """Llama's."""
    return F.softmax(scores + additive(mask, scores.dtype), dim=-1, dtype=torch.float32).to(scores.dtype)


class Attention(nn.Module):
    """Queries, keys and values of one input; `weigh(scores, mask)` gives the weights."""

    def __init__(self, mask, weigh=weighted, groups=2, dropout=0.0):
        super().__init__()
        self.mask, self.weigh, self.groups, self.dropout = mask, weigh, groups, dropout
        self.w, self.sinks = nn.Linear(32, 32 + 2 * 8 * groups), nn.Parameter(torch.randn(4))

    def forward(self, x, *data):
        q, k, v = self.w(x).split([32, 8 * self.groups, 8 * self.groups], -1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        if self.groups < 4:
            k, v = (t.repeat_interleave(4 // self.groups, 1) for t in (k, v))
        more = [self.sinks] if "sinks" in signature(self.weigh).parameters else []
        scale = 1.0 if self.weigh in BEHIND else 0.3
        weights = self.weigh(torch.matmul(q, self.columns(k)) * scale, self.mask(x, *data), *more)
        return torch.matmul(F.dropout(weights, self.dropout, self.training), v).transpose(1, 2).contiguous()

    def columns(self, k):
        return k.transpose(2, 3)


def compiled(model, *args):
    torch._dynamo.reset()
    with listening() as reports:
        out = torch.compile(model, backend="sloth", options=QUICK)(*args)
    return out, [s.status for s in sites_of(reports)], sites_of(reports)


def same(model, *args, rtol=1e-4):
    """Result and gradient as eager's; the statuses of the sites."""
    out, statuses, sites = compiled(model, *args)
    eager = model(*args)
    wanted = list(model.parameters())
    ours, theirs = (torch.autograd.grad(o.square().sum(), wanted, allow_unused=True) for o in (out, eager))
    torch.testing.assert_close(out, eager, rtol=rtol, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-4, equal_nan=True)
    return statuses, sites


def model_and_input(*how, **more):
    torch.manual_seed(0)
    return Attention(*how, **more).to(DEVICE), torch.randn(2, S, 32, device=DEVICE)


LEFT = PADDING.flip(-1).long()
MASKS = {
    causal: None, narrow_window: None, strict: None, padded: LEFT, packed_window: RESTART, falling: RESTART,
}  # fmt: skip


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
@pytest.mark.covered(1)
def test_masks(mask, groups):
    """Some leave queries without a key: eager then takes the mean of all values, and so do we, gradients included."""
    model, x = model_and_input(mask, groups=groups)
    assert same(model, x, *([] if MASKS[mask] is None else [MASKS[mask]]))[0] == [MATCHED]


def in_parts(k):
    """As multi-head latent attention makes keys."""
    keys = torch.empty_like(k)
    columns = keys.transpose(2, 3)
    keys[..., :3].copy_(k[..., :3])
    keys[..., 3:].copy_(k[..., 3:])
    return keys, columns


def written_before(k):
    return in_parts(k)[1]


def copied(k):
    return in_parts(k)[1].contiguous()


def copied_and_written(k):
    keys, columns = in_parts(k)
    columns = columns.contiguous()
    keys.mul_(3.0)
    return columns


def written_and_copied(k):
    keys, columns = in_parts(k)
    keys.mul_(3.0)
    return columns.contiguous()


@pytest.mark.parametrize("columns", [written_before, copied, copied_and_written, written_and_copied], ids=lambda f: f.__name__)
def test_keys_that_are_written_in_place(columns):
    """A view of them is what the product reads of them; a copy may be of what they were before."""
    model, x = model_and_input(causal, groups=4)
    model.columns = columns
    assert same(model, x)[0] == ["mutation" if columns is copied_and_written else MATCHED]


def in_dtype(scores, mask):
    return (scores + additive(mask, scores.dtype)).softmax(-1)


def less_its_maximum(scores, mask):
    """MiMo."""
    scores = scores + additive(mask, scores.dtype)
    return F.softmax(scores - scores.max(-1, keepdim=True).values, -1)


def written_over(scores, mask):
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def least_written(scores, mask):
    return torch.where(mask, scores, torch.finfo(scores.dtype).min).softmax(-1)


def written_and_divided(scores, mask):
    return (scores.masked_fill(mask == 0, -1e9) / 3).softmax(-1)


def added_and_divided(scores, mask):
    return ((scores + additive(mask, scores.dtype)) / 3).softmax(-1)


def unmasked(scores, mask):
    return scores.softmax(-1)


def infinite(scores, mask):
    return torch.softmax(scores + torch.where(mask, 0.0, -torch.inf), -1)


def capped(scores, mask):
    return weighted(torch.tanh(scores / 2.0) * 2.0, mask)


def column(scores, sinks):
    return sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)


def with_sinks(scores, mask, sinks):
    """GPT-OSS."""
    scores = torch.cat([scores + additive(mask, scores.dtype), column(scores, sinks)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]


def sinks_alone(scores, mask, sinks):
    return F.softmax(torch.cat([scores + additive(mask, scores.dtype), column(scores, sinks)], -1), -1)[..., :-1]


def small(scores, mask):
    return torch.softmax(scores + torch.where(mask, 0.0, -1e4), -1)


BEHIND = (written_and_divided, added_and_divided)
SPELLINGS = [
    in_dtype, less_its_maximum, written_over, least_written, written_and_divided, added_and_divided, unmasked, infinite, small,
    capped, with_sinks, sinks_alone,
]  # fmt: skip


@pytest.mark.parametrize("weigh", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(weigh):
    model, x = model_and_input(causal, weigh)
    assert same(model, x)[0] == [MATCHED]


@pytest.mark.parametrize("weigh", [in_dtype, capped, with_sinks], ids=lambda f: f.__name__)
def test_spellings_where_a_query_may_see_nothing(weigh):
    model, x = model_and_input(padded, weigh)
    assert same(model, x, LEFT)[0] == [MATCHED]


def doubled(scores, mask):
    return weighted(2 * scores + 1, mask)


def masked_twice(scores, mask):
    return weighted(scores + additive(mask, scores.dtype), mask)


def bias(scores, mask):
    return torch.softmax(scores + torch.where(mask, 1.0, torch.finfo(scores.dtype).min), -1)


def of_queries(scores, mask):
    return torch.softmax(scores + additive(mask, scores.dtype), -2)


def squared(scores, mask):
    return weighted(scores, mask) ** 2


def capped_with_two_numbers(scores, mask):
    return weighted(torch.tanh(scores / 2.0) * 3.0, mask)


def capped_behind_the_mask(scores, mask):
    return torch.softmax(torch.tanh((scores + additive(mask, scores.dtype)) / 2.0) * 2.0, -1)


def sinks_in_front(scores, mask, sinks):
    return torch.softmax(torch.cat([column(scores, sinks), scores + additive(mask, scores.dtype)], -1), -1)[..., 1:]


def sinks_kept(scores, mask, sinks):
    return torch.softmax(torch.cat([scores + additive(mask, scores.dtype), column(scores, sinks)], -1), -1)[..., 1:]


def sinks_of_queries(scores, mask, sinks):
    column = sinks.new_ones(S).view(1, 1, -1, 1).expand(2, 4, -1, -1)
    return torch.softmax(torch.cat([scores + additive(mask, scores.dtype), column], -1), -1)[..., :-1]


def less_another_maximum(scores, mask, sinks):
    scores = torch.cat([scores + additive(mask, scores.dtype), column(scores, sinks)], dim=-1)
    return F.softmax(scores - scores.max(dim=-2, keepdim=True).values, dim=-1)[..., :-1]


NEARLY = [
    doubled,
    masked_twice,
    bias,
    of_queries,
    squared,
    capped_with_two_numbers,
    capped_behind_the_mask,
    sinks_in_front,
]
NEARLY += [sinks_kept, sinks_of_queries, less_another_maximum]


@pytest.mark.parametrize("weigh", NEARLY, ids=lambda f: f.__name__)
def test_what_only_looks_like_it(weigh):
    model, x = model_and_input(causal, weigh)
    statuses, _ = same(model, x)
    assert MATCHED not in statuses


@pytest.mark.parametrize("weigh", [infinite, written_over, least_written, added_and_divided], ids=lambda f: f.__name__)
def test_scores_that_are_lost_where_a_query_may_see_nothing(weigh):
    """Written over, they have no gradient; of infinities alone a softmax is nan, and so are gradients."""
    model, x = model_and_input(padded, weigh)
    assert same(model, x, LEFT)[0] == [MATCHED]


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels compute weights of their sum")
@pytest.mark.parametrize("mask, weigh", [(causal, weighted), (narrow_window, weighted), (padded, infinite)])
def test_weights_that_are_nearly_one(mask, weigh):
    """In fp32 a softmax gives 1 where exp(score − L) is off by an ulp of L."""
    model, x = model_and_input(mask, weigh)
    x, more = 4.0 * x, [LEFT] if mask is padded else []
    found = []
    for run, to in ((compiled, torch.float32), (None, torch.float32), (None, torch.float64)):
        of, at = copy.deepcopy(model).to(to), x.to(to).requires_grad_()
        out, statuses, _ = run(of, at, *more) if run else (of(at, *more), [MATCHED], [])
        found.append([out[:1], torch.autograd.grad(out.square().sum(), at)[0][:1]])  # of the second, some see nothing
        assert statuses == [MATCHED]
    assert_no_worse(*found, slack=1.0)


def test_half_precision_does_not_absorb():
    model, x = model_and_input(padded)
    _, statuses, sites = compiled(model.half(), x.half(), LEFT)
    assert statuses == ["check"] and "does not absorb" in sites[0].reason
    assert compiled(model, x.half(), PADDING.long() * 0 + 1)[1] == ["check"]


def test_weights_that_are_used():
    class Both(Attention):
        def forward(self, x):
            q = self.w(x)[..., :32].unflatten(-1, (-1, 8)).transpose(1, 2)
            weights = weighted(q @ q.mT * 0.3, causal(x))
            return weights @ q, weights.sum()

    assert compiled(Both(causal).to(DEVICE), torch.randn(2, S, 32, device=DEVICE))[1] == ["escape"]


@pytest.mark.parametrize(("mask", "status"), [(causal, MATCHED), (narrow_window, "check")], ids=["causal", "window"])
def test_dropout(mask, status):
    model, x = model_and_input(mask, dropout=0.5)
    assert compiled(model, x)[1] == [status]


class Flat(nn.Module):
    """TrOCR, GPT-NeoX Japanese: heads and sequences in one dimension."""

    def __init__(self, last):
        super().__init__()
        self.w, self.last = nn.Linear(32, 3 * 32), last

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.w(x).chunk(3, -1))
        q, k = (t.reshape(-1, S, 8) for t in (q, k))
        if self.last:
            scores = torch.baddbmm(torch.zeros(8, S, S, device=x.device), q, k.mT, alpha=0.3).view(2, 4, S, S)
            return torch.matmul((scores + additive(causal(x), x.dtype)).softmax(-1), v)
        scores = (torch.bmm(q, k.mT).view(2, 4, S, S) + additive(causal(x), x.dtype)).view(-1, S, S)
        return torch.bmm(scores.softmax(-1), v.reshape(-1, S, 8)).view(2, 4, S, 8)


@pytest.mark.parametrize("last", [False, True])
def test_heads_and_sequences_in_one_dimension(last):
    torch.manual_seed(0)
    assert same(Flat(last).to(DEVICE), torch.randn(2, S, 32, device=DEVICE))[0] == [MATCHED]


# ---------------------------------------------------------------- models

MODELS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, use_cache=False, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=2, eos_token_id=1,
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "gptj": GPTJConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, use_cache=False, embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0, bos_token_id=2, eos_token_id=1,
    ),
    "gemma2": Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8,
        attn_logit_softcapping=0.5,
    ),
    "gpt_oss": GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "granite_swa": GraniteSWAConfig(**GROUPED, sliding_window=8),
    "deepseek_v3": LATENT,
}  # fmt: skip


def seeded(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").to(DEVICE, dtype).train()
    model.set_experts_implementation("batched_mm")  # grouped, an fp32 product on a GPU has no backward pass for any compiler
    return model


def checked(name, batch, checkpointed=False, dtype=torch.float32):
    model = seeded(name, dtype)
    for parameter in (p for name, p in model.named_parameters() if name.endswith("sinks")):
        nn.init.normal_(parameter)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    with listening() as reports:
        ours = step(model, torch.compile(model, backend="sloth", options=AOT if checkpointed else QUICK), BATCHES[batch])
    theirs = step(model, model, BATCHES[batch])
    assert [s.status for s in sites_of(reports)] == [MATCHED, MATCHED], sites_of(reports)
    return model, ours, theirs


SOME = [(name, batch, False) for name in ("mistral", "gemma2") for batch in BATCHES]
if "self.layerdrop > 0" not in getsource(OPTDecoder.forward):  # it draws a number, which breaks the graph in front of each layer
    del MODELS["opt"]
SOME += [(name, batch, name != "llama") for name in MODELS for batch in ("plain", "left") if (name, batch, False) not in SOME]


LIKE_OTHERS = ("llama", "gptj", "granite_swa")  # of which each spelling is in a test above


@pytest.mark.parametrize(
    ("name", "batch", "checkpointed"),
    [pytest.param(*case, marks=[pytest.mark.nightly] * (case[0] in LIKE_OTHERS)) for case in SOME],
)
@pytest.mark.covered(1)
def test_models(name, batch, checkpointed):
    _, ours, theirs = checked(name, batch, checkpointed)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch", ["plain", "left"])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "granite_swa"])
@pytest.mark.covered(1)
def test_low_precision(name, batch):
    model, ours, theirs = checked(name, batch, dtype=torch.bfloat16)
    truth = step(model.float(), model, BATCHES[batch])  # in fp64, fp64's least number becomes −∞ in the softmax
    whole = (torch.cat([t.flatten() for t in side]) for side in (ours[1:], theirs[1:], truth[1:]))
    assert_no_worse(*whole)


LATER = [pytest.param(name, marks=pytest.mark.nightly) for name in ("gemma2", "gpt_oss")]


@pytest.mark.parametrize("name", ["llama", *LATER, "granite_swa", "gptj"])
def test_autocast(name):
    """Casts stand at the products."""
    model = seeded(name)
    torch._dynamo.reset()
    with torch.autocast(DEVICE, torch.bfloat16), listening() as reports:
        ours = step(model, torch.compile(model, backend="sloth", options=QUICK), {})
    assert [s.status for s in sites_of(reports)] == [MATCHED, MATCHED], sites_of(reports)
    torch.testing.assert_close(ours[0], step(model, model, {})[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("weigh", [weighted, capped, with_sinks], ids=lambda f: f.__name__)
def test_autocast_is_no_worse(weigh):
    model, _ = model_and_input(causal, weigh)
    x = torch.randn(64, S, 32, device=DEVICE)  # in many sequences luck averages out
    results = []
    for run, enabled in ((lambda: compiled(model, x)[0], True), (lambda: model(x), True), (lambda: model(x), False)):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            out = run().float()
        grads = torch.autograd.grad(out.square().sum(), model.parameters(), allow_unused=True)
        results.append((out, *(g for g in grads if g is not None and g.dim() > 1)))
    assert_no_worse(*results)
