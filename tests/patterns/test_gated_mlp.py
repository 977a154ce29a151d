"""What is a gated MLP, and what only looks like one."""

import math

import pytest
import torch
import torch.nn.functional as F
from common import compare, make
from inner import OPTIONS as QUICK

from sloth.rewriter.backend import listening


def sites(function, *tensors):
    torch._dynamo.reset()
    with listening() as reports:
        torch.compile(function, backend="sloth", options={"sloth.inner_backend": "eager"})(*tensors)
    return [(s.construct, s.status) for r in reports for s in r.sites]


def test_an_activation_that_is_scaled_is_no_site():
    """Mamba: a convolution's activation times one number for each channel."""
    x, scale = torch.randn(2, 6, 5), torch.randn(6)
    assert sites(lambda x, scale: F.silu(x) * scale[None, :, None], x, scale) == []
    assert sites(lambda x, y: F.silu(x) * y, x, torch.randn(2, 6, 5)) == [("gated_mlp", "matched")]


@pytest.mark.parametrize("size", [(2, 3, 8), (7, 33)])
@pytest.mark.parametrize(
    "gated, gate, up",
    [
        (lambda g, u: u * F.silu(g), torch.bfloat16, torch.float32),  # Mamba's scan is in fp32
        (lambda g, u: (u * F.silu(g.float())).to(u.dtype), torch.bfloat16, torch.bfloat16),  # Qwen3-Next's norm
        (lambda g, u: (u * F.silu(g.float())).to(u.dtype), torch.float16, torch.float16),
    ],
    ids=["wide up", "cast back", "cast back, fp16"],
)
def test_two_dtypes(gated, gate, up, size):
    g, u = make(size, gate, seed=1), make(size, up, seed=2)
    assert sites(gated, g.requires_grad_(), u.requires_grad_()) == [("gated_mlp", "matched")]
    torch._dynamo.reset()
    compare(torch.compile(gated, backend="sloth", options={"sloth.inner_backend": "eager"}), gated, [g.detach(), u.detach()])


ACTIVATIONS = {
    "silu": lambda g: g * torch.sigmoid(g),
    "silu divided": lambda g: g / (1 + torch.exp(-g)),
    "quick": lambda g: g * torch.sigmoid(1.702 * g),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "erf": lambda g: 0.5 * g * (1.0 + torch.erf(g / math.sqrt(2.0))),
    "erf, half last": lambda g: g * (torch.erf(g * 0.7071067811865476) + 1) * 0.5,
    "erf, half inside": lambda g: g * (0.5 * (1 + torch.erf(g / 2**0.5))),
    "tanh": lambda g: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * torch.pow(g, 3)))),
    "tanh, factored": lambda g: 0.5 * g * (1 + torch.tanh(g * 0.7978845608028654 * (1 + 0.044715 * g * g))),
}
GATES = {
    "left": lambda act, g, u: act(g) * u,
    "right": lambda act, g, u: u * act(g),
    "clamped": lambda act, g, u: act(g.clamp(max=7.0)) * (u.clamp(-7.0, 7.0) + 1),
    "packed": lambda act, g, u: (lambda x: act(x[..., :8]) * x[..., 8:])(torch.cat((g, u), -1)),
}


class Mlp(torch.nn.Module):
    def __init__(self, spelled):
        super().__init__()
        self.gate, self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
        self.spelled = spelled

    def forward(self, x):
        return self.down(self.spelled(self.gate(x), self.up(x)))


def gradients(model, run, x):
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_spellings(act):
    torch.manual_seed(0)
    gate, x = list(GATES.values())[list(ACTIVATIONS).index(act) % len(GATES)], torch.randn(3, 5, 6)
    model = Mlp(lambda g, u: gate(ACTIVATIONS[act], g, u))
    torch._dynamo.reset()
    with listening() as reports:
        ours = gradients(model, torch.compile(model, backend="sloth", options=QUICK), x)
    assert [(s.construct, s.status) for r in reports for s in r.sites] == [("gated_mlp", "matched")]
    torch.testing.assert_close(ours, gradients(model, model, x), rtol=1e-4, atol=1e-5)


def test_glu():
    x, w, v = torch.randn(2, 6, 8), torch.randn(16, 8), torch.randn(8, 8)
    assert sites(lambda x, w, v: F.linear(F.glu(F.linear(x, w), -1), v), x, w, v) == [("gated_mlp", "matched")]


def test_gates_elsewhere_are_no_sites():
    """Of attention, of norms, of a swish with another slope."""
    x, y = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    assert sites(lambda x, y: torch.sigmoid(x) * y, x, y) == []
    assert sites(lambda x, y: torch.relu(x) * y, x, y) == []
    assert sites(lambda x, y: x * torch.sigmoid(1.3 * x), x, y) == []


@pytest.mark.parametrize(
    "act",
    [
        lambda g: 0.5 * g * (1.0 + torch.erf(g)),
        lambda g: g * (1.0 + torch.erf(g / math.sqrt(2.0))),
        lambda g: 0.5 * g * (1.0 - torch.erf(g / math.sqrt(2.0))),
        lambda g: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.05 * g**3))),
        lambda g: 0.5 * (g + 1) * (1.0 + torch.erf(g / math.sqrt(2.0))),
    ],
)
def test_what_is_no_gelu(act):
    assert ("gated_mlp", "matched") not in sites(lambda g, u: act(g) * u, torch.randn(2, 6, 5), torch.randn(2, 6, 5))
