"""Attention with a mask that is computed is eager's, whatever is proven of the mask, in bodies of checkpoints too."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, assert_no_worse
from harness import compiled_graphs
from inner import OPTIONS as QUICK
from test_mask_meaning import (
    PADDING,
    RESTART,
    S,
    causal,
    causal_gathered,
    chunked,
    falling,
    narrow_window,
    packed_window,
    padded,
    strict,
    written,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
)

from sloth.rewriter.backend import listening, sloth
from sloth.rewriter.report import MATCHED

AOT = {"sloth.inner_backend": "aot_eager"}


class Attention(nn.Module):
    def __init__(self, mask, groups, native=False, dropout=0.0):
        super().__init__()
        self.mask, self.groups, self.native, self.dropout = mask, groups, native, dropout
        self.w = nn.Linear(32, 32 + 2 * 8 * groups)

    def forward(self, x, *data):
        q, k, v = self.w(x).split([32, 8 * self.groups, 8 * self.groups], -1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        if self.groups < 4 and not self.native:
            k, v = (t.repeat_interleave(4 // self.groups, 1) for t in (k, v))
        mask = self.mask(x, *data)
        return F.scaled_dot_product_attention(q, k, v, mask, self.dropout, scale=0.3, enable_gqa=self.native)


def sites_of(reports):
    return [s for r in reports for s in r.sites if s.construct == "attention"]


MASKS = {
    causal_gathered: (None, MATCHED), narrow_window: (None, MATCHED), chunked: (None, MATCHED), strict: (None, MATCHED),
    padded: (PADDING.long(), MATCHED), packed_window: (RESTART, MATCHED), falling: (RESTART, MATCHED),
    written: (RESTART, MATCHED),
}  # fmt: skip


@pytest.mark.parametrize(("groups", "native"), [(4, False), (2, False), (1, False), (2, True)])
@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
@pytest.mark.covered(1)
def test_attention_is_eager_s(mask, groups, native):
    data, status = MASKS[mask]
    args = [] if data is None else [data]
    torch.manual_seed(0)
    model, x = Attention(mask, groups, native).to(DEVICE), torch.randn(2, S, 32, device=DEVICE)
    torch._dynamo.reset()
    with listening() as reports:
        out = torch.compile(model, backend="sloth", options=QUICK)(x, *args)
    (ours,) = torch.autograd.grad(out.square().sum(), [model.w.weight])
    eager = model(x, *args)
    (theirs,) = torch.autograd.grad(eager.square().sum(), [model.w.weight])
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert [s.status for s in sites_of(reports)] == [status], sites_of(reports)


class Across(nn.Module):
    """Queries, keys and values of these many positions and widths; no number for the scale."""

    def __init__(self, mask, keys=S, width=8, groups=4):
        super().__init__()
        self.mask, self.keys = mask, keys
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8 * groups), nn.Linear(32, width * groups)

    def forward(self, x, *data):
        y = x[:, : self.keys] if self.keys <= S else torch.cat((x, x), 1)[:, : self.keys]
        q, k, v = (w(t).unflatten(-1, (n, -1)).transpose(1, 2) for w, t, n in
                   ((self.q, x, 4), (self.k, y, self.k.out_features // 8), (self.v, y, self.k.out_features // 8)))  # fmt: skip
        return F.scaled_dot_product_attention(q, k, v, self.mask(x, y, *data))


def all_keys(x, y):
    return torch.ones(x.shape[0], 1, x.shape[1], y.shape[1], dtype=torch.bool, device=x.device)


def earlier_keys(x, y):
    i, j = (torch.arange(t.shape[1], device=x.device) for t in (x, y))
    return j[None, None, None] <= i[None, None, :, None]


def near_keys(x, y):
    i, j = (torch.arange(t.shape[1], device=x.device) for t in (x, y))
    return (j[None, None, None] - i[None, None, :, None]).abs() < 5


def usable_keys(x, y, padding):
    return padding.bool()[:, None, None, : y.shape[1]].expand(-1, -1, x.shape[1], -1)


ACROSS = [  # mask, number of keys (of a mask a multiple of 8: torch 2.11 errs in bf16 on a GPU), width of values, groups of heads
    (all_keys, S, 8, 4, MATCHED), (earlier_keys, S, 8, 4, MATCHED), (near_keys, S, 8, 1, MATCHED),
    (all_keys, S - 5, 8, 4, MATCHED), (earlier_keys, S - 5, 8, 4, MATCHED), (earlier_keys, S + 9, 8, 1, MATCHED),
    (near_keys, S - 8, 8, 4, MATCHED), (usable_keys, S - 8, 8, 4, MATCHED), (earlier_keys, S, 16, 1, "check"),
    (earlier_keys, S, 4, 4, MATCHED), (near_keys, S, 16, 4, MATCHED), (usable_keys, S, 4, 4, MATCHED),
]  # fmt: skip
HOW = [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)]


@pytest.mark.parametrize(
    ("mask", "keys", "width", "groups", "status", "dynamic", "dtype"),
    # torch works in fp32 where heads are broadcast: what is no worse is another matter then
    [(*case, *how) for case in ACROSS for how in HOW if case[3] == 4 or how[1] == torch.float32],
)
@pytest.mark.covered(1)
def test_widths_and_numbers_of_keys(mask, keys, width, groups, status, dynamic, dtype):
    torch.manual_seed(0)
    model, x = Across(mask, keys, width, groups).to(DEVICE, dtype), torch.randn(2, S, 32, device=DEVICE, dtype=dtype)
    args = [PADDING.long()] if mask is usable_keys else []
    torch._dynamo.reset()
    with listening() as reports:
        run = torch.compile(model, backend="sloth", options=QUICK, dynamic=dynamic)
        ours, theirs = outcomes(model, x, args, run), outcomes(model, x, args, model)
    assert_no_worse(ours, theirs, outcomes(model.double(), x.double(), args, model))
    assert [s.status for s in sites_of(reports)] == [status], sites_of(reports)


def outcomes(model, x, args, run):
    out = run(x, *args)
    return torch.cat([t.flatten() for t in (out, *torch.autograd.grad(out.square().sum(), list(model.parameters())))])


@pytest.mark.parametrize("mask", [causal, padded], ids=lambda f: f.__name__)
def test_dropout(mask):
    """By torch's kernels where they can be told what the mask means; otherwise it is left alone."""
    data, _ = MASKS.get(mask, (None, None))
    model, x = Attention(mask, 2, dropout=0.5).to(DEVICE), torch.randn(2, S, 32, device=DEVICE)
    torch._dynamo.reset()
    with listening() as reports:
        torch.compile(model, backend="sloth", options={"sloth.inner_backend": "eager"})(x, *([] if data is None else [data]))
    assert [s.status for s in sites_of(reports)] == [MATCHED if mask is causal else "check"]


# ---------------------------------------------------------------- models

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64,
    "use_cache": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
LATENT = DeepseekV3Config(  # keys are written part by part, and wider than values
    **SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=4,
    first_k_dense_replace=2,
)  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "deepseek_v3": LATENT,
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
}  # fmt: skip
BATCHES = {
    "plain": {},
    "all ones": {"attention_mask": torch.ones(2, S, dtype=torch.long, device=DEVICE)},
    "right": {"attention_mask": PADDING.long()},
    "left": {"attention_mask": PADDING.flip(-1).long()},
    "packed": {"position_ids": RESTART},
}


def model_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]).to(DEVICE, dtype).train()


def step(model, run, more):
    ids = torch.randint(3, 64, (2, S), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = ids if "attention_mask" not in more else ids.where(more["attention_mask"] == 1, -100)
    loss = run(input_ids=ids, labels=labels, **more).loss
    return loss, *torch.autograd.grad(loss, list(model.parameters()))


def checked(name, batch, checkpointed=False, dtype=torch.float32, dynamic=None):
    model = model_of(name, dtype)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    more = BATCHES[batch]
    torch._dynamo.reset()
    with listening() as reports:
        ours = step(model, torch.compile(model, backend="sloth", options=AOT if checkpointed else QUICK, dynamic=dynamic), more)
    theirs = step(model, model, more)
    assert [s.status for s in sites_of(reports[-1:])] == [MATCHED, MATCHED], sites_of(reports)
    return model, ours, theirs


@pytest.mark.parametrize("batch", [pytest.param("plain", marks=pytest.mark.sweep), "left", "packed"])
def test_dynamic_models(batch):
    """Sizes are symbols."""
    _, ours, theirs = checked("mistral", batch, dynamic=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


CHECKPOINTED = [*itertools.product(["llama", "mistral", "gemma3"], BATCHES), ("deepseek_v3", "left")]


@pytest.mark.parametrize(("name", "batch"), CHECKPOINTED)
@pytest.mark.covered(1)
def test_checkpointed_models(name, batch):
    """The mask is made outside of the body; what it is made of is passed in."""
    _, ours, theirs = checked(name, batch, checkpointed=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("batch", ["left", "packed"])
@pytest.mark.covered(1)
def test_low_precision(batch, checkpointed):
    model, ours, theirs = checked("mistral", batch, checkpointed, torch.bfloat16)
    truth = step(model.double(), model, BATCHES[batch])
    whole = (torch.cat([t.flatten() for t in side]) for side in (ours[1:], theirs[1:], truth[1:]))
    assert_no_worse(*whole)


def graphs_of(model, more):
    return compiled_graphs(model, lambda compiled: step(model, compiled, more))


@pytest.mark.skipif(DEVICE == "cpu", reason="there the mask is made of its meaning, for torch's kernels")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("batch", ["right", "packed"])
@pytest.mark.covered(1)
def test_the_mask_is_never_made(batch, checkpointed):
    model = model_of("mistral", torch.bfloat16)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shapes = [tuple(n.meta["val"].shape) for g in graphs_of(model, BATCHES[batch]) for n in g.nodes if _is_tensor(n)]
    assert shapes and not [s for s in shapes if s[-2:] == (S, S)]


def _is_tensor(n):
    return isinstance(n.meta.get("val"), torch.Tensor)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_all_layers_share_what_is_made_of_the_mask(checkpointed):
    model = model_of("llama")
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    forward, *_ = graphs_of(model, BATCHES["right"])
    assert len([n for n in forward.nodes if n.target is torch.ops.sloth.intervals.default]) == 1


@pytest.mark.skipif(DEVICE != "cpu", reason="there it would cost a copy of the keys")
def test_keys_of_groups_that_autocast_casts():
    """Gradients of fp32 keys, over a group's heads, are added up in fp32, as eager does."""
    torch.manual_seed(0)
    q, k, v, d = (torch.randn(2, h, S, 16) for h in (8, 2, 2, 8))

    def attend(q, k, v):
        k, v = (t.repeat_interleave(4, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, narrow_window(q[:, 0]))

    torch._dynamo.reset()
    with listening() as reports:
        run = torch.compile(attend, backend="sloth", options=QUICK)
        found = []
        for function, of in ((run, torch.float32), (attend, torch.float32), (attend, torch.float64)):
            given = [t.to(of).requires_grad_() for t in (q, k, v)]
            with torch.autocast("cpu", torch.bfloat16, enabled=of == torch.float32):
                out = function(*(t * 1 for t in given))
            found.append([out, *torch.autograd.grad(out, given, d.to(out.dtype))])
    assert [s.status for s in sites_of(reports)] == [MATCHED]
    assert_no_worse(*found, slack=0)


# ---------------------------------------------------------------- bodies of checkpoints


def rewritten(fn, *args):
    """The graph that `fn` becomes, with the sites in it; its result is compared with eager's."""
    found = []

    def backend(gm, inputs):
        found.append(gm)
        return sloth(gm, inputs, options={"sloth.inner_backend": "eager"})

    torch._dynamo.reset()
    with listening() as reports:
        out = torch.compile(fn, backend=backend)(*args)
    torch.testing.assert_close(out, fn(*args), rtol=1e-4, atol=1e-5, equal_nan=True)
    return found[0], sites_of(reports)


def layer_of():
    return Attention(lambda x, mask: mask, 4).to(DEVICE), torch.randn(2, S, 32, device=DEVICE)


def test_what_is_passed_into_a_body():
    """One more input for each value, however often it is used (which keys are valid, and where there are holes in them), and the
    mask, which nothing in the body reads any more, is none.
    """
    layer, x = layer_of()

    def twice(x, mask):
        return layer(x, mask) + layer(2 * x, mask)

    gm, sites = rewritten(lambda x, p: checkpoint(twice, x, padded(x, p), use_reentrant=False), x, PADDING.long())
    assert [s.status for s in sites] == [MATCHED, MATCHED]
    body = next(m for m in gm.children() if isinstance(m, torch.fx.GraphModule))
    inputs = body.graph.find_nodes(op="placeholder")
    assert len([n for n in inputs if n.meta["example_value"].dtype == torch.bool]) == 2
    assert not [n for n in inputs if n.meta["example_value"].shape[-2:] == (S, S)]


def test_a_body_in_a_body():
    layer, x = layer_of()

    def inner(x, mask):
        return checkpoint(layer, x, mask, use_reentrant=False) + 1

    _, sites = rewritten(lambda x, p: checkpoint(inner, x, packed_window(x, p), use_reentrant=False), x, RESTART)
    assert [s.status for s in sites] == [MATCHED]


def test_a_body_that_is_called_with_different_masks():
    """What its input is cannot be said: nothing is proven."""
    layer, x = layer_of()

    def fn(x):
        first = checkpoint(layer, x, causal(x), use_reentrant=False)
        return first + checkpoint(layer, x, strict(x) | causal(x[:, :1]), use_reentrant=False)

    rewritten(fn, x)
