"""Norms of q's and k's heads in one operator with their RoPE: what is counted, when it is not taken, whole models."""

import pytest
import torch
from inner import OPTIONS as QUICK
from torch import nn

from sloth.patterns.rms_norm import llama
from sloth.patterns.rope import halves, plain
from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED
from sloth.zoo import models as zoo

turn = plain(halves)


class Heads(nn.Module):
    """Qwen3's q and k up to attention."""

    def __init__(self, k_eps=1e-6, keeps_normed=False):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 32), nn.Linear(16, 16)
        self.q_weight, self.k_weight = (nn.Parameter(1 + torch.randn(8) / 4) for _ in range(2))
        self.k_eps, self.keeps_normed = k_eps, keeps_normed

    def forward(self, x, cos, sin):
        q, k = (proj(x).view(*x.shape[:2], -1, 8) for proj in (self.q_proj, self.k_proj))
        q = llama(q, self.q_weight, eps=1e-6).transpose(1, 2)
        k = llama(k, self.k_weight, eps=self.k_eps).transpose(1, 2)
        turned = tuple(turn(h, cos.unsqueeze(1), sin.unsqueeze(1)) for h in (q, k))
        return (*turned, k) if self.keeps_normed else turned


def variants(module, **options):
    """Construct, entry and status of each site, after a comparison of values and gradients with eager."""
    torch.manual_seed(0)
    x, cos, sin = torch.randn(2, 5, 16), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="sloth", options=QUICK | options)
    with listening() as reports:
        ours, theirs = compiled(x, cos, sin), module(x, cos, sin)
    wanted = list(module.parameters())
    grads = [torch.autograd.grad(sum(y.sin().sum() for y in out), wanted) for out in (ours, theirs)]
    torch.testing.assert_close((ours, *grads[0]), (theirs, *grads[1]), rtol=1e-4, atol=1e-5)
    return sorted((s.construct, s.variant.split("[")[0], s.status) for r in reports for s in r.sites)


APART = [("rms_norm", "rms_norm", MATCHED)] * 2 + [("rope", "rope", MATCHED)]


def test_both_constructs_are_counted():
    """Two norms and a rotation, as where three operators take their places."""
    assert variants(Heads()) == [("rms_norm", "norm_rope", MATCHED)] * 2 + [("rope", "norm_rope", MATCHED)]


def test_a_rotation_by_wide_tables_is_counted_once():
    """LFM3 in bf16: what is turned by tables in fp32 is cast back, by an operation that is a rotation's too."""

    class Narrow(Heads):
        def forward(self, x, cos, sin):
            return tuple(y.to(torch.bfloat16) for y in super().forward(x, cos, sin))

    torch._dynamo.reset()
    compiled = torch.compile(Narrow().bfloat16(), backend="sloth", options=QUICK)
    with listening() as reports:
        compiled(torch.randn(2, 5, 16).bfloat16(), *torch.randn(2, 1, 5, 8))
    sites = [(s.construct, s.status) for r in reports for s in r.sites]
    assert sorted(sites) == [("rms_norm", MATCHED)] * 2 + [("rope", MATCHED)]


def test_sites_point_to_their_own_lines():
    with listening() as reports:
        torch._dynamo.reset()
        torch.compile(Heads(), backend="sloth", options={"sloth.inner_backend": "eager"})(
            torch.randn(2, 5, 16), *torch.randn(2, 1, 5, 8)
        )
    places = {s.construct: s.file.split("/")[-1] for r in reports for s in r.sites}
    assert places == {"rms_norm": "rms_norm.py", "rope": "rope.py"}


def test_norms_that_differ_are_matched_apart():
    assert variants(Heads(k_eps=1e-5)) == APART


def test_a_norm_that_is_used_elsewhere_is_matched_apart():
    assert variants(Heads(keeps_normed=True)) == APART


@pytest.mark.parametrize("name", ["rms_norm", "norm_rope", "rope"])
def test_disabled_by_each_of_its_names(name):
    """By the name of a construct that it holds too: who disables norms does not find them in another operator."""
    found = [(entry, status) for _, entry, status in variants(Heads(), **{"sloth.disable": name})]
    assert not any(entry == "norm_rope" for entry, _ in found)
    assert sum(status == MATCHED for _, status in found) == {"rms_norm": 1, "norm_rope": 3, "rope": 2}[name]


MODELS = [
    ("qwen3", "checkpointed"),
    ("qwen3", "autocast"),
    pytest.param("gemma3_text", "plain", marks=pytest.mark.nightly),
    pytest.param("gemma4_text", "plain", marks=pytest.mark.nightly),
    pytest.param(
        "glm4_moe+qknorm",
        "plain",
        marks=[pytest.mark.nightly, pytest.mark.skipif(torch.__version__ < "2.13", reason="its experts break the graph")],
    ),
]


@pytest.mark.parametrize("arch, how", MODELS)
def test_models(arch, how):
    """Every layer's q and k norms go with its RoPE, also in checkpoints and under autocast, where norms and tables are fp32."""
    model = zoo.tiny_model(arch)
    batch = zoo.tiny_batch(model, arch)
    if how == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.config.num_hidden_layers
    compiled = torch.compile(model, backend="sloth", options=QUICK)
    torch._dynamo.reset()
    with listening() as reports, torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = compiled(**batch).loss
        loss.backward()
    found = [s.construct for r in reports for s in r.sites if s.variant.startswith("norm_rope")]
    assert (found.count("rope"), found.count("rms_norm")) == (layers, 2 * layers)
    ours = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(**batch).loss.backward()
    tolerance = 0.1 if how == "autocast" else 1e-4
    for name, p in model.named_parameters():
        assert (ours[name] is None) == (p.grad is None), name
        if p.grad is not None:
            assert (ours[name] - p.grad).norm() <= tolerance * p.grad.norm().clamp_min(1e-3), name
