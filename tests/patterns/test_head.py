"""Logits of graphs without a loss: lazy where they are many and only given out, real everywhere else."""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from common import DEVICE
from inner import OPTIONS
from torch import nn
from transformers import AutoModelForCausalLM

from sloth.lazy import rows as lazy_rows
from sloth.lazy import snapshot
from sloth.lazy.functions import LazyLogits
from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED

V = 30_000
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": V,
    "use_cache": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "num_key_value_heads": 2}),  # a softcap
    "cohere": (transformers.CohereConfig, {}),  # a scale
    "granite": (transformers.GraniteConfig, {"logits_scaling": 8.0}),  # a divisor
    "phi": (transformers.PhiConfig, {}),  # a bias
}


@pytest.fixture(autouse=True)
def little_at_a_time(monkeypatch):
    """8 rows of fp32, so that few rows are many."""
    torch._dynamo.reset()
    monkeypatch.setattr(lazy_rows, "CHUNK", 8 * V * 4)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, more = MODELS[name]
    return AutoModelForCausalLM.from_config(config(**SIZES, **more)).to(DEVICE).train()


def with_adapters(model: nn.Module, configs: list[dict]) -> nn.Module:
    """PEFT's, on the head."""
    peft = pytest.importorskip("peft")
    configs = [peft.LoraConfig(**{"r": 2, "target_modules": ["lm_head"], "init_lora_weights": False} | c) for c in configs]
    model = peft.get_peft_model(model, configs[0], adapter_name="0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config)
    model.base_model.set_adapter([str(i) for i in range(len(configs))])
    return model.to(DEVICE).train()


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)


def run(fn, *args, options=OPTIONS, dynamic=None, **kwargs):
    """What compiled code gives, and the sites of the head."""
    with listening() as reports:
        out = torch.compile(fn, backend="sloth", options=options, dynamic=dynamic)(*args, **kwargs)
    assert not any(r.untouched for r in reports)
    return out, [s for r in reports for s in r.sites if s.construct == "head"]


def is_lazy(x) -> bool:
    return isinstance(x, LazyLogits) and x.known is None


def next_token_loss(logits, ids):
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()


CASES = [
    *((name, "static") for name in MODELS),
    *(("llama", how) for how in ("autocast", "checkpoint")),
    pytest.param("llama", "dynamic", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("name", "how"), [*CASES, ("gemma2", "autocast")])
@pytest.mark.covered(1)
def test_models(name, how):
    """Gradients of what is computed by rows, and of what has all of the logits read."""
    model, ids = model_of(name), tokens()
    if how == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if how == "autocast" else {"rtol": 1e-4, "atol": 1e-6}
    parameters = [p for p in model.parameters() if p.requires_grad]
    # What AOTAutograd makes of a deferred output is the same for all heads, and takes half of the time.
    options = {"sloth.inner_backend": "aot_eager"} if name == "llama" else OPTIONS
    compiled = torch.compile(model, backend="sloth", options=options, dynamic=how == "dynamic")
    for loss in (next_token_loss, lambda logits, ids: logits.float().square().mean()):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
            ours, eager = compiled(input_ids=ids), model(input_ids=ids)
        assert is_lazy(ours.logits)
        assert (ours.logits.shape, ours.logits.dtype) == (eager.logits.shape, eager.logits.dtype) and ours.logits.requires_grad
        losses = [loss(out.logits, ids) for out in (ours, eager)]
        assert is_lazy(ours.logits) or loss is not next_token_loss and ours.logits.dtype == torch.float32  # its own float()
        torch.testing.assert_close(*losses, **tolerance)
        torch.testing.assert_close(*(torch.autograd.grad(x, parameters) for x in losses), **tolerance)
        torch.testing.assert_close(ours.logits + torch.zeros_like(eager.logits), eager.logits, **tolerance)


ADAPTERS = {  # adapters, how the model is called, sites of the head and of adapters without a loss, is it lazy beside one
    "lora": ([{}], "fp32", [MATCHED], ["deferred"], True),
    "dynamic": ([{}], "dynamic", [MATCHED], ["deferred"], True),
    "autocast": ([{}], "autocast", [MATCHED], ["deferred"], True),
    "dropout": ([{"lora_dropout": 0.3}], "fp32", [MATCHED], ["deferred"], True),
    "two": ([{}, {"r": 3, "lora_alpha": 7}], "fp32", [MATCHED], ["deferred"] * 2, False),
    "dora": ([{"use_dora": True}], "fp32", ["escape"] * 2, ["adapter[dora]"], False),  # a trained factor for each word
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("labels", [False, True], ids=["logits", "loss"])
@pytest.mark.covered(1)
def test_adapters_on_the_head(name, labels):
    """Of a loss one may be a part: more, and DoRA's, are computed for it."""
    configs, how, heads, loras, beside = ADAPTERS[name]
    if name == "dropout" and DEVICE == "cuda":
        pytest.skip("compiled code draws other numbers there")
    model, ids = with_adapters(model_of("llama"), configs), tokens()
    more = {"labels": ids} if labels else {}
    compiled = torch.compile(model, backend="sloth", options=OPTIONS)
    if how == "dynamic":
        torch._dynamo.mark_dynamic(ids, 1)  # an error where the size is made a constant
    parameters = [p for p in model.parameters() if p.requires_grad]
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if how == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    ambient = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=how == "autocast")
    with listening() as reports, ambient():
        compiled(input_ids=ids, **more)
    assert not any(r.untouched for r in reports)
    sites = {c: [s for r in reports for s in r.sites if s.construct == c] for c in ("head", "lora")}
    assert [s.status for s in sites["lora"]] == [MATCHED] * len(loras)
    if not labels:
        assert ([s.status for s in sites["head"]], [s.variant for s in sites["lora"]]) == (heads, loras)
    for loss in (lambda out: out.loss if labels else next_token_loss(out.logits, ids), lambda out: out.logits.square().mean()):
        found = []
        for call in (compiled, model):
            torch.manual_seed(0)
            with ambient():
                out = call(input_ids=ids, **more)
            assert is_lazy(out.logits) == (call is compiled and (beside if labels else MATCHED in heads))
            value = loss(out)
            found.append([value, *torch.autograd.grad(value, parameters)])
        torch.testing.assert_close(*found, **tolerance)


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen", "adapter"])
def test_a_head_in_4_bits(adapter):
    """Dequantised whenever somebody reads; neither its own entry nor the adapter's computes the logits."""
    bnb = pytest.importorskip("bitsandbytes")
    model, ids = model_of("llama"), tokens()
    model.lm_head = bnb.nn.LinearNF4(32, V, bias=False, compute_dtype=torch.float32)
    model.lm_head.load_state_dict({"weight": torch.randn(V, 32, generator=torch.Generator().manual_seed(3)) / 4})
    model.to(DEVICE)
    model = with_adapters(model, [{}]) if adapter else model
    compiled = torch.compile(model, backend="sloth", options=OPTIONS)
    with listening() as reports:
        ours, eager = compiled(input_ids=ids), model(input_ids=ids)
    sites = [
        (s.construct, s.variant, s.status) for r in reports for s in r.sites if s.construct in ("head", "lora", "linear_4bit")
    ]
    expected = [("head", "head", MATCHED), ("lora", "deferred", MATCHED), ("linear_4bit", "deferred", MATCHED)]
    assert is_lazy(ours.logits) and sites == [site for site in expected if adapter or site[0] != "lora"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = [next_token_loss(out.logits, ids) for out in (ours, eager)]
    both = [[loss, *torch.autograd.grad(loss, parameters)] for loss in losses]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_numbers_that_dynamic_true_would_make_inputs():
    """Those of a module are constants all the same."""
    layer, x = Wide(16, V, lambda x, w: F.linear(x, w) * scale), torch.randn(64, 16, device=DEVICE)
    scale = 1.5
    ours, sites = run(layer, x, dynamic=True)
    assert [s.status for s in sites] == ["matched"] and is_lazy(ours)
    torch.testing.assert_close(ours, layer(x))


def test_with_labels_they_belong_to_the_loss():
    model, ids = model_of("llama"), tokens()
    ours, sites = run(model, input_ids=ids, labels=ids)
    assert is_lazy(ours.logits) and not sites


def test_several_calls_before_the_backward():
    model, chosen, rejected = model_of("llama"), tokens(12), tokens(10)
    compiled = torch.compile(model, backend="sloth", options=OPTIONS)
    found = []
    for call in (compiled, model):
        both = [next_token_loss(call(input_ids=ids).logits, ids) for ids in (chosen, rejected)]
        with torch.no_grad():
            reference = [next_token_loss(call(input_ids=ids).logits, ids) for ids in (chosen, rejected)]
        loss = -F.logsigmoid(both[1] - both[0] - 0.5 * (reference[1] - reference[0]))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class Looks(nn.Module):
    """A model, and what somebody does with its logits in the same graph."""

    def __init__(self, look):
        super().__init__()
        self.model, self.look = model_of("llama"), look

    def forward(self, ids):
        return self.look(self.model(input_ids=ids).logits)


@pytest.mark.parametrize(
    "look",
    [
        lambda z: z.argmax(-1),
        lambda z: (z, z.sum()),
        lambda z: z.transpose(1, 2),
        lambda z: (z, z.float() * 2),
        lambda z: z.detach(),
    ],
    ids=["argmax", "sum", "view", "twice", "detach"],
)
def test_a_graph_that_uses_the_logits_keeps_them(look):
    model, ids = Looks(look), tokens()
    ours, sites = run(model, ids)
    assert [s.status for s in sites] == ["escape"] and sites[0].reason
    leaves = [t if isinstance(t, tuple) else (t,) for t in (ours, model(ids))]
    for a, b in zip(*leaves, strict=True):
        assert not isinstance(a, LazyLogits) and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b)


def test_logits_that_were_not_to_have_a_gradient_have_none():
    def fn(ids):
        with torch.no_grad():
            return model(input_ids=ids).logits

    model, ids = model_of("llama"), tokens()
    ours, sites = run(fn, ids)
    assert [s.status for s in sites] == [MATCHED] and is_lazy(ours) and not ours.requires_grad
    assert torch.equal(ours.argmax(-1), fn(ids).argmax(-1))


def test_compiled_code_after_a_break_of_the_graph_gets_real_logits():
    def fn(ids):
        logits = model(input_ids=ids).logits
        torch._dynamo.graph_break()
        return logits.tanh().sum()

    model, ids = model_of("llama"), tokens()
    ours, sites = run(fn, ids)
    assert [s.status for s in sites] == ["escape"] and "break" in sites[0].reason
    torch.testing.assert_close(ours, fn(ids))


class Wide(nn.Module):
    def __init__(self, inputs, outputs, head=F.linear):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(outputs, inputs, device=DEVICE) / inputs), head

    def forward(self, x):
        return self.head(x, self.weight)


@pytest.mark.parametrize("head", [lambda x, w: x @ w.t(), lambda x, w: torch.einsum("nh,vh->nv", x, w)])
def test_products_that_are_heads(head):
    layer, x = Wide(16, V, head), torch.randn(64, 16, device=DEVICE)
    ours, _ = run(layer, x)
    assert isinstance(ours, LazyLogits)
    torch.testing.assert_close(ours + 0, layer(x))


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "head"),
    [
        (16, V - 1, 64, F.linear),
        (V // 4, V, 9, F.linear),
        (16, V, 8, F.linear),
        (16, V, 64, lambda x, w: F.linear(x, w * 2)),
        (16, V, 64, lambda x, w: F.linear(x, w).view(8, 8, -1)),
        (16, V, 64, lambda x, w: x @ w.view(16, V)),
    ],
    ids=["few words", "hardly wider", "few rows", "computed weight", "other shape", "no layer"],
)
def test_what_is_no_head(inputs, outputs, rows, head):
    layer, x = Wide(inputs, outputs, head), torch.randn(rows, inputs, device=DEVICE)
    ours, sites = run(layer, x)
    assert not isinstance(ours, LazyLogits) and all(s.status == "escape" for s in sites)
    torch.testing.assert_close(ours, layer(x))


@pytest.mark.parametrize("always", ["", "head"])
def test_few_logits_are_left_where_the_user_wants_it(always):
    layer, x = Wide(16, V), torch.randn(8, 16, device=DEVICE)
    ours, sites = run(layer, x, options={**OPTIONS, "sloth.always": always})
    assert [s.status for s in sites] == [MATCHED] * bool(always) and isinstance(ours, LazyLogits) == bool(always)
    torch.testing.assert_close(ours + torch.zeros(8, V, device=DEVICE), layer(x))


def test_it_can_be_switched_off():
    ours, sites = run(model_of("llama"), input_ids=tokens(), options={**OPTIONS, "sloth.disable": "head"})
    assert not isinstance(ours.logits, LazyLogits) and not sites


def test_hidden_states_that_have_changed_are_noticed(monkeypatch):
    monkeypatch.setattr(snapshot, "COPIED", 0)
    layer, x = Wide(16, V), torch.randn(64, 16, device=DEVICE)
    ours, _ = run(layer, x)
    x.zero_()
    with pytest.raises(RuntimeError, match="hidden states"):
        ours.sum()


def test_compiled_by_itself():
    """accelerate compiles layers and head apart: the loss, which no graph has, is computed by rows of the logits."""
    utils = pytest.importorskip("accelerate.utils")
    model, ids = model_of("llama"), tokens()
    eager, parameters = model(input_ids=ids, labels=ids), list(model.parameters())
    with listening() as reports:
        ours = utils.compile_regions(model, backend="sloth", options=OPTIONS)(input_ids=ids, labels=ids)
    assert [s.status for r in reports for s in r.sites if s.construct == "head"] == [MATCHED] and is_lazy(ours.logits)
    torch.testing.assert_close(ours.loss, eager.loss)
    torch.testing.assert_close(*(torch.autograd.grad(out.loss, parameters) for out in (ours, eager)), rtol=1e-4, atol=1e-6)
    assert is_lazy(ours.logits)


@pytest.mark.parametrize("mode", [torch.no_grad, pytest.param(torch.inference_mode, marks=pytest.mark.nightly)])
def test_generation(mode, monkeypatch):
    model, ids = model_of("llama").eval(), tokens(6)
    texts = []
    for compiled in (True, False):
        if compiled:
            monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="sloth", options=OPTIONS))
        with mode(), listening() as reports:
            greedy = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
            torch.manual_seed(3)
            texts.append((greedy, model.generate(ids, max_new_tokens=3, do_sample=True, top_k=5, use_cache=True)))
        if compiled:
            assert all(s.status == MATCHED for r in reports for s in r.sites if s.construct == "head") and reports
        monkeypatch.undo()
    torch.testing.assert_close(*texts)
