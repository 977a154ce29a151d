"""Gated MLPs of any formula, found by what they compute; and what is none."""

import pytest
import torch
import torch.nn.functional as F
from test_gated_mlp import Mlp

from sloth.patterns.gated_formula import TERMS
from sloth.rewriter.backend import listening


def ran(spelled, dtype=torch.float32, dynamic=False):
    """Sites; values and gradients of the compiled model and of eager."""
    torch.manual_seed(0)
    model, x = Mlp(spelled).to(dtype), 3 * torch.randn(3, 5, 6).to(dtype)

    def step(run):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters())]

    torch._dynamo.reset()
    with listening() as reports:
        ours = step(torch.compile(model, backend="sloth", dynamic=dynamic, options={"sloth.inner_backend": "aot_eager"}))
    return [(s.construct, s.variant, s.status) for r in reports for s in r.sites], ours, step(model)


def clamped(g, u):
    """gpt_oss."""
    g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
    return g * torch.sigmoid(1.702 * g) * (u + 1)


SPELLED = {
    "gpt_oss": clamped,
    "mish": lambda g, u: F.mish(g) * u,
    "softplus": lambda g, u: u * F.softplus(g, 2.0),
    "log sigmoid": lambda g, u: F.logsigmoid(g) * u,
    "tanh": lambda g, u: torch.tanh(g) * u,
    "squared relu": lambda g, u: F.relu(g) ** 2 * u,
    "elu": lambda g, u: F.elu(g, 0.7) * u,
    "selu": lambda g, u: F.selu(g) * u,
    "celu": lambda g, u: F.celu(g, 2.0) * u,
    "leaky relu": lambda g, u: F.leaky_relu(g, 0.1) * u,
    "softsign": lambda g, u: F.softsign(g) * u,
    "relu6": lambda g, u: F.relu6(g) * u,
    "hard swish": lambda g, u: F.hardswish(g) * u,
    "hard sigmoid": lambda g, u: F.hardsigmoid(g) * u,
    "swish, another slope": lambda g, u: g * torch.sigmoid(1.3 * g) * u,
    "a sine": lambda g, u: (g + torch.sin(g) ** 2) * u,
    "a bell": lambda g, u: torch.exp(-g * g) * u,
    "a root": lambda g, u: 15 * g / torch.sqrt(g * g + 225) * u,
    "a logarithm": lambda g, u: torch.log1p(g.abs()) * u / 3,
    "branches": lambda g, u: torch.where(g > 0.5, g, 0.1 * g) * torch.where(u <= 0.5, u, 0.5),
    "wider": lambda g, u: (F.mish(g.float()) * u.float()).to(g.dtype),
    "both sides": lambda g, u: torch.tanh(g) * torch.sigmoid(u),
    "scaled": lambda g, u: F.silu(g) * u * 0.5,
}


FIRST = {"gpt_oss", "softplus", "elu", "branches", "wider", "scaled"}
MARKS = [pytest.param(name, marks=[pytest.mark.nightly] * (name not in FIRST)) for name in SPELLED]


@pytest.mark.parametrize("name", MARKS)
def test_any_formula_is_read(name):
    found, ours, eager = ran(SPELLED[name], dynamic=name == "gpt_oss")
    assert found == [("gated_mlp", "gated_formula[read]", "matched")]
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    narrow, ours, eager = ran(SPELLED[name], torch.bfloat16)
    assert narrow == found
    assert all((a - b).norm() <= 0.05 * b.norm() for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize(
    "name", ["clamp", "hardswish", "hardsigmoid", "relu6", "elu", "selu", "leaky_relu", "relu", "silu", "gelu"]
)
def test_kinks_are_where_autograd_has_them(name):
    """Each activation as it is written out, at the numbers where its pieces meet."""
    from sloth.kernels.gated_formula import gated_formula

    given = {"gelu": ("none",), "clamp": ("-1.0", "3.0")}.get(name, ())
    act, text = getattr(F, name, lambda x: x.clamp(-1.0, 3.0)), TERMS[name]("g", *given)
    g = torch.tensor([-4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 7.0], dtype=torch.double, requires_grad=True)
    (wanted,) = torch.autograd.grad(act(g).sum(), g)
    h = gated_formula(g, torch.ones_like(g), f"mul({text},u)")
    torch.testing.assert_close(h, act(g))
    torch.testing.assert_close(torch.autograd.grad(h.sum(), g)[0], wanted)


@pytest.mark.parametrize(
    "spelled",
    [
        lambda g, u: g * u,
        lambda g, u: torch.tanh(g) + u,
        lambda g, u: torch.tanh(g * u),
        lambda g, u: torch.tanh(g) * g,
        lambda g, u: torch.tanh(g) * u.detach(),
        lambda g, u: torch.tanh(g) * u.mean(-1, keepdim=True),
        lambda g, u: torch.tanh(g) * torch.cumsum(u, -1),
        lambda g, u: torch.tanh(g.double()).to(g.dtype) * u,
    ],
)
def test_what_is_none(spelled):
    found, ours, eager = ran(spelled)
    assert "matched" not in {status for *_, status in found}
    torch.testing.assert_close(ours, eager)


def test_layers_with_adapters_in_fp32():
    """As PEFT has them over weights in bf16: the sum is rounded before the gate reads it."""

    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.a, self.b = torch.nn.Linear(6, 8).bfloat16(), torch.nn.Linear(6, 2), torch.nn.Linear(2, 8)

        def forward(self, x):
            return (self.base(x) + self.b(self.a(x.float())) * 0.5).to(x.dtype)

    model = Mlp(SPELLED["mish"]).bfloat16()
    model.gate, model.up = Adapted(), Adapted()
    torch._dynamo.reset()
    with listening() as reports:
        torch.compile(model, backend="sloth", options={"sloth.inner_backend": "eager"})(torch.randn(3, 5, 6).bfloat16())
    assert ("gated_formula[read]", "matched") in [(s.variant, s.status) for r in reports for s in r.sites]


def normed(y, weight):
    h = y.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_front_of_the_last_layer(dtype):
    """BitNet's."""
    found, ours, eager = ran(lambda g, u: normed(F.relu(g) ** 2 * u, torch.linspace(0.5, 1.5, g.shape[-1]).to(g)), dtype)
    assert {f[:2] for f in found} == {("gated_mlp", "gated_formula[read]"), ("rms_norm", "rms_norm[llama]")}
    assert all((a - b).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * b.norm() for a, b in zip(ours, eager, strict=True))


def test_experts():
    """Inkling 2's, whose layers are one product of groups of rows."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up, self.down = (torch.nn.Parameter(torch.randn(2, *sizes).bfloat16()) for sizes in ((8, 32), (16, 8)))

        def forward(self, x, ends):
            g, u = torch._grouped_mm(x, self.gate_up, offs=ends).chunk(2, -1)
            return torch._grouped_mm((30 * torch.tanh(g / 30) * torch.sigmoid(g) * u), self.down, offs=ends)

    torch._dynamo.reset()
    with listening() as reports:
        run = torch.compile(Experts(), backend="sloth", options={"sloth.inner_backend": "eager"})
        run(torch.randn(6, 8).bfloat16(), torch.tensor([2, 6], dtype=torch.int32))
    assert [(s.variant, s.status) for r in reports for s in r.sites] == [("gated_formula[read]", "matched")]


def test_an_entry_that_matches_the_whole_is_asked_first():
    assert ran(lambda g, u: F.silu(g) * u)[0] == [("gated_mlp", "gated_mlp[silu]", "matched")]
    assert ran(lambda g, u: F.relu(g) * u)[0] == [("gated_mlp", "gated_layers[relu]", "matched")]


def test_what_is_also_read_outside_is_made_for_both():
    class Two(Mlp):
        def forward(self, x):
            h = torch.tanh(self.gate(x))
            return self.down(h * self.up(x)) + h.cumsum(-1)[..., :6]

    torch._dynamo.reset()
    model, x = Two(None), torch.randn(3, 5, 6)
    y = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})(x)
    torch.testing.assert_close(y, model(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["gpt_oss", "mish", "branches"])
def test_kernels_under_inductor(name):
    """Inductor writes the kernels that were made for the formula into its own code."""
    torch.manual_seed(0)
    model, x = Mlp(SPELLED[name]).cuda(), torch.randn(3, 5, 6, device="cuda")
    torch._dynamo.reset()
    found = []
    for run in (torch.compile(model, backend="sloth"), model):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
