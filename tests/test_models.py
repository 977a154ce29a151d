"""Whole models: the loss and every gradient under sloth, and every site accounted for."""

import copy
from collections import Counter

import pytest
import torch
from accelerate.utils import compile_regions
from torch._dynamo.utils import counters

import sloth
from sloth.rewriter.backend import listening
from sloth.rewriter.report import Report
from sloth.zoo.measure import gradient_difference, step
from sloth.zoo.models import tiny_batch, tiny_model

# sites of two layers, by hand: what `explain` must find, and rewrite all of
SITES = {
    "llama": {"rms_norm": 5, "rope": 2, "gated_mlp": 2, "attention": 2, "cross_entropy": 1},
    "qwen3": {"rms_norm": 9, "rope": 2, "gated_mlp": 2, "attention": 2, "cross_entropy": 1},
    "gemma2": {"rms_norm": 9, "rope": 2, "gated_mlp": 2, "attention": 2, "cross_entropy": 1},
    "gpt_neox": {"layer_norm": 5, "rope": 2, "attention": 2, "cross_entropy": 1},
    "phi3": {"rms_norm": 5, "rope": 2, "gated_mlp": 2, "attention": 2, "cross_entropy": 1},
    "mixtral": {"rms_norm": 5, "rope": 2, "gated_mlp": 2, "attention": 2, "cross_entropy": 1},
}
AOT = {"sloth.inner_backend": "aot_eager"}
each_model = pytest.mark.parametrize("arch", SITES)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def under_sloth(model, batch, **how):
    return step(torch.compile(model, backend="sloth", options=AOT, **how), model, batch)


def assert_bit_close(ours, theirs, tolerance=2e-6):
    (loss, grads), (true_loss, true_grads) = ours, theirs
    assert abs(loss - true_loss) <= 1e-6 * abs(true_loss)
    assert grads.keys() == true_grads.keys()
    difference, name = gradient_difference(grads, true_grads)
    assert difference <= tolerance, name


def matched(report):
    return {name: c["matched"] for name, c in report.constructs.items() if c["expected"]}


def test_layers_compiled_by_themselves():
    """One graph serves all of them: a first step as short as a layer's."""
    model = tiny_model("llama")
    batch, layers = tiny_batch(model, "llama"), model.model.layers
    model.gradient_checkpointing_enable({"use_reentrant": False})
    theirs = step(model, model, batch)
    with listening() as graphs:
        ours = step(compile_regions(model, backend="sloth", options=AOT), model, batch)
    assert_bit_close(ours, theirs)
    found = [dict(Counter(s.construct for s in g.sites)) for g in graphs if g.sites]
    assert len(layers) > 1 and found == [{"rms_norm": 2, "rope": 1, "gated_mlp": 1}, {"rms_norm": 1}]


@each_model
def test_every_site_is_matched_and_fp32_is_bit_close_to_eager(arch):
    model = tiny_model(arch)
    batch = tiny_batch(model, arch)
    counters.clear()
    with listening() as graphs:
        ours = under_sloth(model, batch)
    assert_bit_close(ours, step(model, model, batch))
    report = Report(graphs)
    assert report.constructs == {
        name: {"matched": SITES[arch].get(name, 0), "expected": SITES[arch].get(name, 0)} for name in report.constructs
    }
    assert len(graphs) == 1 and not counters["graph_break"]
    assert all(s.file.endswith(".py") and s.line > 0 for s in report.sites)


def test_explain_finds_what_is_rewritten():
    model = tiny_model("llama")
    report = sloth.explain(model, tiny_batch(model, "llama"))
    assert matched(report) == SITES["llama"] and len(report.graphs) == 1 and not report.breaks


def exact_gradients(model, batch):
    """In fp64, the experts one by one: grouped matmuls know no fp64."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    return step(exact, exact, batch)[1]


def distance(ours, truth):
    """‖a − b‖ / ‖b‖ over all gradients as one vector."""
    return (sum(((ours[n].double() - g) ** 2).sum() for n, g in truth.items()) / sum((g**2).sum() for g in truth.values())).sqrt()


LOW = [(arch, torch.bfloat16) for arch in ("llama", "gemma2", "gpt_neox")] + [("llama", torch.float16)]
LATER = [pytest.param(arch, torch.bfloat16, marks=pytest.mark.nightly) for arch in ("qwen3", "phi3", "mixtral")]


@pytest.mark.parametrize(("arch", "dtype"), [*LOW, *LATER])
def test_low_precision_is_no_further_from_fp64_than_eager(arch, dtype):
    """All gradients as one vector: a single small gradient of a tiny model is a matter of rounding luck."""
    model = tiny_model(arch, dtype)
    batch = tiny_batch(model, arch)
    truth = exact_gradients(model, batch)
    loss, ours = under_sloth(model, batch)
    theirs_loss, theirs = step(model, model, batch)
    assert ours.keys() == theirs.keys() == truth.keys()
    assert distance(ours, truth) <= 1.05 * distance(theirs, truth)
    assert abs(loss - theirs_loss) < 2e-2


@pytest.mark.parametrize("arch", ["llama", pytest.param("gemma2", marks=pytest.mark.nightly)])
def test_with_gradient_checkpointing(arch):
    model = tiny_model(arch)
    batch = tiny_batch(model, arch)
    plain = step(model, model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_bit_close(under_sloth(model, batch), plain, 4e-6)
    torch._dynamo.reset()
    assert matched(sloth.explain(model, batch)) == SITES[arch]


@pytest.mark.nightly
def test_with_dynamic_shapes():
    """Lengths of which only the first two are compiled for; equal layers are compiled once here too."""
    model = tiny_model("llama", num_hidden_layers=5)
    with listening() as reports:
        compiled = torch.compile(model, backend="sloth", options=AOT, dynamic=True)
        for seq in (33, 20, 47):
            batch = tiny_batch(model, "llama", seq=seq)
            assert_bit_close(step(compiled, model, batch), step(model, model, batch), 4e-6)
    assert reports[-1].parts == 6  # those before it: AOTAutograd found a number that is none of its graph, and Dynamo began anew


@pytest.mark.parametrize("trained", ["norm", "lm_head", "q_proj"])
def test_with_frozen_parameters(trained):
    model = tiny_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    batch = tiny_batch(model, "llama")
    assert_bit_close(under_sloth(model, batch), step(model, model, batch), 4e-6)


def test_with_tied_embeddings():
    model = tiny_model("llama", tie_word_embeddings=True)
    batch = tiny_batch(model, "llama")
    assert_bit_close(under_sloth(model, batch), step(model, model, batch), 4e-6)


@pytest.mark.parametrize("arch", ["llama", pytest.param("gpt_neox", marks=pytest.mark.nightly)])
def test_under_autocast(arch):
    """bf16 matmuls over fp32 weights: no further from fp64 than eager under autocast."""
    model = tiny_model(arch)
    batch = tiny_batch(model, arch)
    truth = exact_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, ours = under_sloth(model, batch)
        _, theirs = step(model, model, batch)
        assert matched(sloth.explain(model, batch)) == SITES[arch]
    assert distance(ours, truth) <= 1.05 * distance(theirs, truth)


def test_with_a_padded_batch_and_a_token_count():
    model = tiny_model("llama")
    batch = tiny_batch(model, "llama")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 20:] = 0
    batch |= {
        "attention_mask": mask,
        "labels": batch["labels"].masked_fill(mask == 0, -100),
        "num_items_in_batch": torch.tensor(40),
    }
    assert_bit_close(under_sloth(model, batch), step(model, model, batch), 4e-6)
    assert matched(sloth.explain(model, batch)) == SITES["llama"]


def test_evaluation_and_generation():
    model = tiny_model("llama").eval()
    batch = tiny_batch(model, "llama")
    with torch.no_grad():
        compiled = torch.compile(model, backend="sloth", options=AOT)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    prompt = batch["input_ids"][:1, :5]
    expected = model.generate(prompt, max_new_tokens=3, do_sample=False)
    model.forward = torch.compile(model.forward, backend="sloth", options=AOT)
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).equal(expected)


@pytest.mark.nightly
def test_with_inductor():
    model = tiny_model("llama")
    batch = tiny_batch(model, "llama")
    assert_bit_close(step(torch.compile(model, backend="sloth"), model, batch), step(model, model, batch), 4e-6)


# explain


def test_explain_leaves_everything_as_it_was():
    model = tiny_model("llama").eval()
    batch = tiny_batch(model, "llama")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sloth.explain(torch.compile(model, backend="eager"), batch)
    assert all(v.equal(before[n]) for n, v in model.state_dict().items())
    assert model.lm_head.weight.grad.eq(1).all() and model.model.norm.weight.grad is None
    assert not model.training and torch.get_rng_state().equal(random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_explain_a_model_that_is_not_from_transformers():
    class Norm(torch.nn.Module):
        def __init__(self, power):
            super().__init__()
            self.weight, self.power = torch.nn.Parameter(torch.rand(16)), power

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).pow(self.power) + 1e-6))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.odd = Norm(1), Norm(2)

        def forward(self, x):
            return self.odd(self.good(x)).sum()

    report = sloth.explain(Model(), {"x": torch.randn(2, 3, 16)})
    assert report.to_dict()["constructs"]["rms_norm"] == {"matched": 1, "expected": 2}


def test_explain_counts_what_a_graph_break_hides():
    class Broken(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        @torch._dynamo.disable
        def outside(self, x):
            return self.model.model.norm(x)

        def forward(self, input_ids, labels):
            hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
            logits = self.model.lm_head(self.outside(hidden))
            return self.model.loss_function(logits, labels, self.config.vocab_size)

    model = tiny_model("llama")
    report = sloth.explain(Broken(model), {k: v for k, v in tiny_batch(model, "llama").items() if k != "use_cache"})
    assert report.constructs["rms_norm"] == {"matched": 5, "expected": 6}
    assert len(report.graphs) == 2 and report.breaks


def test_explain_refuses_what_it_cannot_take():
    with pytest.raises(TypeError, match=r"nn\.Module"):
        sloth.explain(len, {})
    with pytest.raises(TypeError, match="mapping"):
        sloth.explain(torch.nn.Linear(2, 2), torch.ones(2))
