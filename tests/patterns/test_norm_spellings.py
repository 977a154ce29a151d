"""Norms, however the mean, the root and the places of casts are spelled."""

import itertools

import pytest
import torch
from inner import OPTIONS as QUICK
from torch import nn

import sloth
from sloth.rewriter.report import MATCHED

D, EPS = 16, 1e-6
MEANS = {
    "mean": lambda h: h.pow(2).mean(-1, keepdim=True),
    "square": lambda h: torch.mean(torch.square(h), dim=(-1,), keepdim=True),
    "sum": lambda h: (h * h).sum(-1, keepdim=True) / D,
    "times": lambda h: h.square().sum(dim=-1, keepdim=True) * (1 / D),
}
ROOTS = {
    "rsqrt": lambda h, m: h * torch.rsqrt(m),
    "divided": lambda h, m: h / m.sqrt(),
    "power": lambda h, m: h * m**-0.5,
    "inverse": lambda h, m: h * (1.0 / torch.sqrt(m)),
}
CASTS = {  # of x before, of the result before the weight; in bf16
    "all": (lambda x: (x.float(), x.float()), lambda y, x: y.to(x.dtype)),
    "promoted": (lambda x: (x, x.float()), lambda y, x: y.type_as(x)),
    "none": (lambda x: (x, x), lambda y, x: y),
}
WEIGHTS = {
    "left": lambda y, w: w * y,
    "right": lambda y, w: y * w,
    "of one": lambda y, w: y * (1 + w),
    "hyperbolic": lambda y, w: torch.tanh(w) * y,
}
LAYER_NORMS = {
    "by hand": lambda x: (x - x.mean(-1, keepdim=True), (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)),
    "var": lambda x: (x - x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)),
    "var_mean": lambda x: (lambda v, m: (x - m, v))(*torch.var_mean(x, -1, correction=0, keepdim=True)),
    "squares": lambda x: (x - x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2),
}


class Norm(nn.Module):
    def __init__(self, spelled):
        super().__init__()
        self.layer, self.spelled = nn.Linear(D, D), spelled
        self.weight, self.bias = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(D))

    def forward(self, x):
        return self.spelled(self, self.layer(x))


def rms(mean, root, casts, weigh):
    before, after = CASTS[casts]

    def spelled(m, x):
        h, wide = before(x)
        return WEIGHTS[weigh](after(ROOTS[root](h, MEANS[mean](wide) + EPS), x), m.weight)

    return spelled


def layer_norm(centre, root):
    def spelled(m, x):
        h, variance = LAYER_NORMS[centre](x)
        return m.weight * ROOTS[root](h, variance + EPS) + m.bias

    return spelled


def unit(root, weigh):
    """Of length 1, as Dory keeps its hidden states, and the gated delta rule its queries and keys."""

    def spelled(m, x):
        h = x.float()
        return WEIGHTS[weigh](ROOTS[root](h, h.pow(2).sum(-1, keepdim=True) + EPS).type_as(x), m.weight)

    return spelled


SPELLED = {name: rms(*name) for i, name in enumerate(itertools.product(MEANS, ROOTS, CASTS, WEIGHTS)) if i % 23 == 0}
SPELLED |= {name: layer_norm(*name) for i, name in enumerate(itertools.product(LAYER_NORMS, ROOTS)) if i % 5 == 0}
SPELLED |= {("unit", *name): unit(*name) for name in (("rsqrt", "left"), ("divided", "of one"))}


def trained(model, run, x):
    model.zero_grad()
    y = run(x)
    (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y, *(p.grad for p in model.parameters() if p.grad is not None)]


def found(model, x):
    return [(s.construct, s.status, s.reason) for s in sloth.explain(model, {"x": x}).sites]


@pytest.mark.parametrize("name", SPELLED, ids=", ".join)
def test_spellings(name):
    torch.manual_seed(0)
    model, x = Norm(SPELLED[name]), torch.randn(2, 6, D)
    for dtype in (torch.float32, torch.bfloat16):
        (site,) = found(model.to(dtype), x.to(dtype))
        assert site == ("rms_norm" if len(name) > 2 else "layer_norm", MATCHED, ""), dtype
    model.float()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sloth", options=QUICK)
    for ours, eager in zip(trained(model, compiled, x), trained(model, model, x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_a_region_that_changes_nothing(inside):
    """OLMo 2's, trained under autocast: it is switched off around the norm, and the weight stands outside."""

    def spelled(m, x):
        with torch.autocast("cpu", enabled=inside):
            h = x.float()
            h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return m.weight * h

    with torch.autocast("cpu", torch.bfloat16):
        assert found(Norm(spelled), torch.randn(2, 6, D)) == [("rms_norm", MATCHED, "")]


def test_other_mathematics():
    """A variance over one number less, an eps outside of the root."""

    def unbiased(m, x):
        return m.weight * ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt()) + m.bias

    def outside(m, x):
        return m.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS))

    for spelled in (unbiased, outside):
        assert MATCHED not in [status for _, status, _ in found(Norm(spelled), torch.randn(2, 6, D))]
