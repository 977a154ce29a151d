"""Head and loss of whole models: one operator, logits that are computed when they are read, and everything as in eager code."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from common import DEVICE
from inner import INNER
from torch import nn
from transformers import AutoModelForCausalLM

from sloth.lazy.functions import LazyLogits
from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 70,
    "use_cache": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")
HYBRID = {
    "attn_layer_indices": [0], "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_n_groups": 1,
}  # fmt: skip
MODELS = {
    "llama": (transformers.LlamaConfig, {}, "mean"),
    "tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}, "mean"),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "num_key_value_heads": 2}, "mean_softcap"),
    "cohere": (transformers.CohereConfig, {}, "mean_scale"),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 8.0}, "mean_divisor"),
    "phi": (transformers.PhiConfig, {}, "mean_bias"),
    "minicpm3": (transformers.MiniCPM3Config, LATENT | {"dim_model_base": 16}, "mean"),  # scales hidden states
    "opt": (transformers.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, "mean"),  # contiguous logits
    "gpt2": (transformers.GPT2Config, {"n_layer": 1, "n_head": 4, **dict.fromkeys(DROPOUTS, 0.0)}, "mean"),  # no type of loss
    "bert": (transformers.BertConfig, {"is_decoder": True, **dict.fromkeys(DROPOUTS, 0.0)}, "mean_bias"),  # the head is a module
    "roberta": (transformers.RobertaConfig, {"is_decoder": True, **dict.fromkeys(DROPOUTS, 0.0)}, "mean_bias"),
    "bamba": (transformers.BambaConfig, HYBRID | {"z_loss_coefficient": 0.1}, "mean_z_loss"),
    "mixtral": (transformers.MixtralConfig, {"output_router_logits": True, "num_key_value_heads": 2}, "mean"),  # adds a loss
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, more, _ = MODELS[name]
    return AutoModelForCausalLM.from_config(config(**SIZES, **more)).to(DEVICE).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 70, (2, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {"input_ids": ids, "labels": ids.where(torch.arange(24, device=DEVICE) > 5, -100)}


def run(model, inner=INNER, **more):
    """The output of compiled code, and the sites of the loss."""
    torch._dynamo.reset()
    with listening() as reports:
        out = torch.compile(model, backend="sloth", options={"sloth.inner_backend": inner})(**batch(), **more)
    assert not any(r.untouched for r in reports)
    return out, [s for r in reports for s in r.sites if s.construct == "cross_entropy"]


def is_lazy(x) -> bool:
    return isinstance(x, LazyLogits) and x.known is None


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.covered(1)
def test_models(name, autocast):
    """Gradients of the loss alone, and of a loss that somebody adds who looks at the logits."""
    if DEVICE == "cuda" and autocast and name == "bamba":
        pytest.skip("on a GPU autocast puts a cast before logsumexp: its z-loss is not matched")
    model = model_of(name)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        ours, sites = run(model, "aot_eager" if name == "llama" else INNER)  # twice as quick, and of the same graph
        eager = model(**batch())
    assert [s.variant.split("[")[1] for s in sites] == [f"{MODELS[name][2]}]"] and is_lazy(ours.logits)
    assert sites[0].variant.startswith("linear_cross_entropy")
    assert (ours.logits.shape, ours.logits.dtype) == (eager.logits.shape, eager.logits.dtype) and ours.logits.requires_grad
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(ours.loss, eager.loss, **tolerance)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got, expected = (torch.autograd.grad(out.loss, parameters, retain_graph=True) for out in (ours, eager))
    torch.testing.assert_close(got, expected, **tolerance)
    assert is_lazy(ours.logits)
    both = [torch.autograd.grad(out.loss + out.logits.float().square().mean(), parameters) for out in (ours, eager)]
    torch.testing.assert_close(*both, **tolerance)
    torch.testing.assert_close(ours.logits + 0, eager.logits, **tolerance)


def test_a_loss_of_lazy_logits_is_computed_under_their_own_autocast():
    model = model_of("llama")
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, _ = run(model)
    labels = batch()["input_ids"].flatten()
    got = F.cross_entropy(ours.logits.flatten(0, 1).float(), labels)
    assert is_lazy(ours.logits)
    torch.testing.assert_close(got, F.cross_entropy((ours.logits + 0).flatten(0, 1).float(), labels), rtol=3e-7, atol=0)


@pytest.mark.parametrize("items, variant", [(37, "sum"), (torch.tensor(37), "sum_items")], ids=["int", "tensor"])
def test_the_number_of_items_of_a_batch(items, variant):
    model = model_of("llama")
    items = items.to(DEVICE) if isinstance(items, torch.Tensor) else items
    ours, sites = run(model, num_items_in_batch=items)
    eager = model(**batch(), num_items_in_batch=items)
    assert [s.variant for s in sites] == [f"linear_cross_entropy[{variant}]"]
    torch.testing.assert_close(ours.loss, eager.loss)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(ours.loss, parameters), torch.autograd.grad(eager.loss, parameters))


def test_labels_that_are_shifted_already():
    model, shifted = model_of("llama"), batch()["labels"].roll(-2, 1)
    ours, sites = run(model, shift_labels=shifted)
    eager = model(**batch(), shift_labels=shifted)
    assert [s.variant for s in sites] == ["linear_cross_entropy[mean]"] and is_lazy(ours.logits)
    torch.testing.assert_close(ours.loss, eager.loss)
    assert not torch.equal(eager.loss, model(**batch()).loss)


def test_several_heads_and_losses():
    """Tokens after the next one are predicted by heads of their own."""
    model, heads = model_of("llama").model, [nn.Linear(32, 70, bias=i > 0).to(DEVICE) for i in range(3)]

    def fn(input_ids, labels):
        hidden = model(input_ids=input_ids).last_hidden_state
        logits = [head(hidden) for head in heads]
        nll = [F.cross_entropy(z[:, : -1 - i].flatten(0, 1), labels[:, 1 + i :].flatten()) for i, z in enumerate(logits)]
        return sum(nll), logits

    (loss, logits), sites = run(fn)
    eager, real = fn(**batch())
    assert [s.variant for s in sites] == ["linear_cross_entropy[mean]"] + 2 * ["linear_cross_entropy[mean_bias]"]
    assert all(map(is_lazy, logits))
    parameters = [*model.parameters(), *(p for head in heads for p in head.parameters())]
    torch.testing.assert_close(loss, eager)
    both = [torch.autograd.grad(out, parameters, retain_graph=True) for out in (loss, eager)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close([z + 0 for z in logits], real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_a_head_that_is_trained_beside_adapters(tied):
    peft = pytest.importorskip("peft")
    how = {"modules_to_save": ["lm_head"], "ensure_weight_tying": tied}
    model = peft.get_peft_model(model_of("tied" if tied else "llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], **how))
    model.to(DEVICE)
    ours, sites = run(model)
    assert [s.variant for s in sites] == ["linear_cross_entropy[mean]"] and is_lazy(ours.logits)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name or "embed" in name for name in named)
    got, expected = (torch.autograd.grad(out.loss, [*named.values()]) for out in (ours, model(**batch())))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_evaluation_gives_lazy_logits_too():
    model = model_of("llama")
    with torch.no_grad():
        ours, _ = run(model)
        eager = model(**batch())
    assert is_lazy(ours.logits) and not ours.logits.requires_grad
    torch.testing.assert_close(ours.loss, eager.loss)
    assert torch.equal(ours.logits.argmax(-1), eager.logits.argmax(-1)) and is_lazy(ours.logits)


class Looks(nn.Module):
    """A model that does something of its own with the logits."""

    def __init__(self, look):
        super().__init__()
        self.model, self.look = model_of("llama"), look

    def forward(self, **batch):
        out = self.model(**batch)
        return out.loss, self.look(out.logits)


@pytest.mark.parametrize(
    "look", [lambda z: z[:, -1].argmax(-1), lambda z: z.transpose(1, 2), torch.sum], ids=["argmax", "view", "sum"]
)
def test_a_graph_that_uses_the_logits_keeps_them(look):
    model = Looks(look)
    ours, sites = run(model)
    assert [(s.variant.split("[")[0], s.status) for s in sites] == [("cross_entropy", MATCHED)]
    for a, b in zip(ours, model(**batch()), strict=True):
        torch.testing.assert_close(a, b)
    assert not any(isinstance(t, LazyLogits) for t in ours)


ADAPTERS = {  # model, what PEFT is told, dtype, items of the batch, the variant
    "fp32": ("llama", {}, torch.float32, None, "mean_adapter"),
    "dropout": ("llama", {"lora_dropout": 0.3, "use_rslora": True}, torch.float32, None, "mean_adapter"),
    "fp32 over bf16": ("gemma2", {"lora_dropout": 0.3}, torch.bfloat16, None, "mean_softcap_adapter"),
    "items": ("granite", {}, torch.bfloat16, torch.tensor(37, device=DEVICE), "sum_divisor_adapter_items"),
    "trained": (
        "llama",
        {"target_modules": ["lm_head", "q_proj"]},
        torch.float32,
        torch.tensor(37, device=DEVICE),
        "sum_adapter_items",
    ),
    "autocast": ("llama", {}, torch.float32, None, "mean_adapter"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_the_head(name):
    """In the loss, and in logits that somebody looks at later."""
    peft = pytest.importorskip("peft")
    of, how, dtype, items, variant = ADAPTERS[name]
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["lm_head"], "init_lora_weights": False} | how)
    model = peft.get_peft_model(model_of(of).to(dtype), config).to(DEVICE)
    model.get_output_embeddings().weight.requires_grad_(name == "trained")
    more, outs = {} if items is None else {"num_items_in_batch": items}, []
    for call in (run, lambda model, **more: (model(**batch(), **more), None)):
        torch.manual_seed(0)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=name == "autocast"):
            outs.append(call(model, **more))
    (ours, sites), (eager, _) = outs
    assert [s.variant for s in sites] == [f"linear_cross_entropy[{variant}]"] and is_lazy(ours.logits)
    assert (ours.logits.shape, ours.logits.dtype) == (eager.logits.shape, eager.logits.dtype)
    own = [p for p in model.parameters() if p.requires_grad]
    tolerance = 1e-4 if dtype == torch.float32 and name != "autocast" else 2e-2
    for loss in (
        lambda out: out.loss,
        lambda out: out.loss + out.logits.logsumexp(-1).sum() + out.logits.float().square().mean(),
    ):
        got, expected = (torch.autograd.grad(loss(out), own, retain_graph=True) for out in (ours, eager))
        assert all((g - e).norm() <= tolerance * e.norm() > 0 for g, e in zip(got, expected, strict=True))
    assert (ours.logits - eager.logits).norm() <= tolerance * eager.logits.norm()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("adapter", [False, True], ids=["frozen", "adapter"])
@pytest.mark.covered(1)
def test_a_head_in_4_bits(adapter, autocast):
    """Dequantised for the loss, and again for logits that somebody reads."""
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    model = model_of("llama")
    model.lm_head = bnb.nn.LinearNF4(32, 70, bias=False, compute_dtype=torch.float32)
    model.lm_head.load_state_dict({"weight": torch.randn(70, 32, generator=torch.Generator().manual_seed(3)) / 4})
    model.to(DEVICE)
    if adapter:
        config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        (ours, sites), eager = run(model), model(**batch())
    assert [s.variant for s in sites] == [f"linear_cross_entropy[mean{'_adapter' * adapter}]"] and is_lazy(ours.logits)
    own = [p for p in model.parameters() if p.requires_grad]
    for loss in (
        lambda out: out.loss,
        lambda out: out.logits.logsumexp(-1).sum(),
        lambda out: out.logits.float().square().mean(),
    ):
        found, expected = ([x, *torch.autograd.grad(x, own, retain_graph=True)] for x in map(loss, (ours, eager)))
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= (3e-2 if autocast else 1e-5) * b.norm()


def test_code_after_a_break_of_the_graph_gets_the_logits():
    model = model_of("llama")

    def fn(**batch):
        out = model(**batch)
        torch._dynamo.graph_break()
        return out.loss + out.logits.float().square().mean() + torch.tanh(out.logits).sum()

    ours, sites = run(fn)
    assert [s.variant for s in sites] == ["linear_cross_entropy[mean]"]
    eager = fn(**batch())
    torch.testing.assert_close(ours, eager)
    parameters = list(model.parameters())
    got, expected = torch.autograd.grad(ours, parameters), torch.autograd.grad(eager, parameters)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


ROWS = [{"input_ids": r, "labels": r} for r in torch.randint(3, 70, (5, 12), generator=torch.Generator().manual_seed(1))]


def trainer_of(backend, folder, **more):
    """Of a fresh model, compiled by `backend` or not."""
    torch._dynamo.reset()
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=DEVICE == "cpu", per_device_eval_batch_size=2, report_to="none",
        torch_compile=backend is not None, torch_compile_backend=backend,
    )  # fmt: skip
    trainer = transformers.Trainer(model_of("llama"), arguments, **more)
    torch.backends.cuda.matmul.allow_tf32 = False  # accelerate turns it on for compiled models alone
    return trainer


@pytest.mark.nightly
def test_prediction_with_the_trainer(tmp_path):
    """It gathers, pads and joins logits of batches, and hands them to the metrics as arrays."""
    found = {}
    for backend in (None, "sloth"):
        metrics = lambda p: {"accuracy": (p.predictions[:, :-1].argmax(-1) == p.label_ids[:, 1:]).mean()}  # noqa: E731
        found[backend] = trainer_of(backend, tmp_path, compute_metrics=metrics).predict(ROWS)
    ours, eager = found["sloth"], found[None]
    torch.testing.assert_close(torch.tensor(ours.predictions), torch.tensor(eager.predictions), rtol=1e-4, atol=1e-5)
    for name in ("test_loss", "test_accuracy"):
        assert ours.metrics[name] == pytest.approx(eager.metrics[name], rel=1e-4)


@pytest.mark.nightly
def test_evaluation_with_the_trainer_keeps_what_is_asked_for(tmp_path):
    """preprocess_logits_for_metrics sees lazy logits; what it makes of them is gathered. All that is asked of them is by rows."""
    found, seen = {}, []

    def keep(logits, labels):
        seen.append(logits)
        return logits.argmax(-1), logits.logsumexp(-1)

    def metrics(prediction):
        words, norms = prediction.predictions
        return {"accuracy": (words[:, :-1] == prediction.label_ids[:, 1:]).mean(), "norm": norms.mean()}

    for backend in (None, "sloth"):
        more = {"eval_dataset": ROWS, "compute_metrics": metrics, "preprocess_logits_for_metrics": keep}
        found[backend] = trainer_of(backend, tmp_path, **more).evaluate()
    assert list(map(is_lazy, seen)) == [False] * 3 + [True] * 3
    for name in ("eval_loss", "eval_accuracy", "eval_norm"):
        assert found["sloth"][name] == pytest.approx(found[None][name], rel=1e-4)
