"""sloth.rewriter.plan.narrow: what fp32 norms make of a bf16 model stays bf16, and is no less exact than eager."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from toys import rewritten_graph, rotate_half

H, HEADS, GROUPS, D, INNER, RANK = 64, 4, 2, 16, 96, 8
LOW, OPS = torch.bfloat16, torch.ops.sloth
EAGER = {"sloth.inner_backend": "eager"}


class Projection(nn.Module):
    """A layer in a low precision, as bitsandbytes computes it, with an adapter in fp32, as PEFT does."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs).mul(inputs**-0.5).to(LOW), requires_grad=False)
        self.a = nn.Parameter(torch.randn(RANK, inputs) * inputs**-0.5)
        self.b = nn.Parameter(torch.randn(outputs, RANK) * 0.3)

    def forward(self, x):
        low = self.weight.dtype
        base = F.linear(x.to(low), self.weight).to(x.dtype)
        return base + F.linear(F.linear(x.to(self.a.dtype), self.a), self.b) * 0.5


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width), requires_grad=False)

    def forward(self, x):
        h = x.to(self.weight.dtype)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.second = Norm(H), Norm(H)
        self.q, self.k, self.v = Projection(H, HEADS * D), Projection(H, GROUPS * D), Projection(H, GROUPS * D)
        self.o, self.gate, self.up, self.down = (Projection(*s) for s in ((HEADS * D, H), (H, INNER), (H, INNER), (INNER, H)))

    def attend(self, x, cos, sin):
        B, S, _ = x.shape
        q, k, v = (p(x).view(B, S, -1, D).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        k, v = (t[:, :, None].expand(B, GROUPS, HEADS // GROUPS, S, D).reshape(B, HEADS, S, D) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).reshape(B, S, -1))

    def forward(self, x, cos, sin):
        h = x + self.attend(self.norm(x), cos, sin)
        y = self.second(h)
        return h + self.down(F.silu(self.gate(y)) * self.up(y))


def inputs(S: int = 24, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    angles = torch.arange(S, dtype=torch.float64)[:, None] * 0.3 ** torch.arange(D // 2) % 6.28
    cos, sin = (torch.cat((t, t), -1)[None, None].to(dtype) for t in (angles.cos(), angles.sin()))
    return torch.randn(2, S, H, dtype=torch.float64).to(dtype).requires_grad_(), cos, sin


def rewritten(module: nn.Module, *args) -> fx.GraphModule:
    with torch.autocast("cpu", LOW):
        return rewritten_graph(module, *args)


def results(gm: fx.GraphModule, op) -> list[torch.dtype]:
    found = [n for n in gm.graph.nodes if n.target is op.default]
    parts = [u for n in found for u in n.users if u.target is operator.getitem]
    return [n.meta["example_value"].dtype for n in parts or found]


def test_a_layer_after_preparation_for_kbit_training():
    gm = rewritten(Layer(), *inputs())
    assert results(gm, OPS.lora_linear) == [LOW] * 7
    assert results(gm, OPS.rms_norm) == [LOW] and results(gm, OPS.rope) == [LOW] * 2 and results(gm, OPS.gated_act) == [LOW]
    assert results(gm, OPS.add_rms_norm) == [torch.float32, LOW], "the residual stream stays what it is"
    assert gm.graph.output_node().args[0][0].meta["example_value"].dtype == torch.float32


def without_gradient(y: torch.Tensor) -> torch.Tensor:
    """A cast that is none gives its operand, and that has one."""
    with torch.no_grad():
        return y.to(LOW)


class Read(nn.Module):
    """A projection whose result somebody reads as fp32."""

    def __init__(self, how):
        super().__init__()
        self.p, self.how = Projection(H, H), how

    def forward(self, x):
        return self.how(self.p(x), x)


@pytest.mark.parametrize(
    "how",
    [
        lambda y, x: y,
        lambda y, x: y.sin(),
        lambda y, x: (y + x, y),
        lambda y, x: y + 1.0,
        lambda y, x: y + torch.ones(()),
        lambda y, x: y + x.to(torch.bfloat16),
        lambda y, x: y.to(torch.float16) + y.to(torch.bfloat16),
        lambda y, x: torch.add(y, x, alpha=2),
        lambda y, x: y.view(-1).to(torch.bfloat16) + y.view(-1),
        lambda y, x: without_gradient(y),
    ],
    ids=range(10),
)
def test_what_is_read_as_it_is_stays_wide(how):
    assert results(rewritten(Read(how), inputs()[0]), OPS.lora_linear) == [torch.float32]


def test_of_two_terms_of_a_sum_not_both_are_narrow():
    """Their sum would be too, and eager's is in fp32."""

    class Two(Read):
        def __init__(self):
            super().__init__(None)
            self.q = Projection(H, H)

        def forward(self, x):
            return self.p(x) + self.q(x)

    assert torch.float32 in results(rewritten(Two(), inputs()[0]), OPS.lora_linear)


class Normed(Read):
    def __init__(self, how):
        super().__init__(how)
        self.p = Norm(H)


@pytest.mark.parametrize(
    "how",
    [
        lambda y, x: y.to(LOW) * y.to(LOW),  # their gradients are added up in fp32, and each is a tensor of its own
        lambda y, x: y.to(LOW).mul_(3) + y.to(LOW),
        lambda y, x: (y.to(LOW), y.to(LOW)),
        lambda y, x: y[:, 1:].to(LOW).view(-1),  # a cast lays a slice out anew
        lambda y, x: y[:, None].expand(2, 3, 24, H).to(LOW).view(6, 24, H),
        lambda y, x: y.view(torch.int32).to(LOW),
        lambda y, x: torch.transpose(input=y, dim0=0, dim1=1).to(LOW),
    ],
    ids=range(7),
)
def test_what_is_cast_more_than_once_or_laid_out_anew_stays_wide(how):
    x, module = inputs()[0], Normed(how)
    assert results(rewritten(module, x), OPS.rms_norm) == [torch.float32]
    torch._dynamo.reset()
    with torch.autocast("cpu", LOW):
        found, expected = (run(x) for run in (torch.compile(module, backend="sloth", options=EAGER), module))
    for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        assert a.stride() == b.stride() and a.untyped_storage().nbytes() == b.untyped_storage().nbytes()


@pytest.mark.parametrize(
    "how", [lambda y, x: y + x, lambda y, x: x + y.reshape(x.shape), lambda y, x: y.transpose(0, 1).to(LOW)], ids=range(3)
)
def test_what_is_added_or_cast_is_narrow(how):
    assert results(rewritten(Read(how), inputs()[0]), OPS.lora_linear) == [LOW]


def test_a_sum_of_two_is_not_rounded():
    """Both terms of a sum in fp32: narrow ones would make it bf16."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Projection(H, H), Projection(H, H)

        def forward(self, x):
            return self.first(x) + self.second(x.sin())

    gm = rewritten(Both(), inputs()[0])
    assert gm.graph.output_node().args[0][0].meta["example_value"].dtype == torch.float32


def test_a_product_in_fp32_is_not_rounded():
    """Without autocast's casts: terms that eager does not round are not."""
    module = Read(lambda y, x: y + x).float()
    assert results(rewritten_graph(module, inputs()[0]), OPS.lora_linear) in ([torch.float32], [])


def errors(model: Layer, compiled, seed: int) -> dict[str, tuple[float, float, float]]:
    """Squared distances from fp64, of ours and of eager's, for the output and each gradient."""
    torch.manual_seed(seed)
    exact_args = inputs(dtype=torch.float64)
    dout = torch.randn(2, exact_args[0].shape[1], H, dtype=torch.float64)
    exact = Layer().double()
    exact.load_state_dict(model.state_dict())

    def run(module, args, autocast):
        x = args[0].detach().clone().requires_grad_()
        with torch.autocast("cpu", LOW, enabled=autocast):
            out = module(x, *args[1:])
        names, leaves = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        if not autocast:
            leaves = [dict(exact.named_parameters())[n] for n in names]
        return dict(zip(("out", "x", *names), (out, *torch.autograd.grad(out, (x, *leaves), dout.to(out.dtype))), strict=True))

    low = [a.detach().float() for a in exact_args]
    rounded = tuple(a.double() for a in low)
    found = [run(compiled, low, True), run(model, low, True), run(exact, rounded, False)]
    return {n: tuple((f[n].double() - found[2][n]).square().sum().item() for f in found[:2]) for n in found[2]}


def test_it_is_as_exact_as_eager():
    torch.manual_seed(0)
    model = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})
    total: dict[str, list[float]] = {}
    for seed in range(12):
        for name, pair in errors(model, compiled, seed).items():
            sums = total.setdefault(name, [0.0, 0.0])
            sums[0] += pair[0]
            sums[1] += pair[1]
    worse = {name: (ours / eager) ** 0.5 for name, (ours, eager) in total.items() if ours > 1.05**2 * eager}
    assert len(total) == 16 and not worse, worse
