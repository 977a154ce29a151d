"""What a report says of near misses of every construct, and of what is none."""

import pytest
import torch
import torch.nn.functional as F
from tests import near_misses
from tests.near_misses import CASES, Block, S

import sloth


def test_the_page_says_what_reports_say():
    """Each is counted, with the model's own names and sizes, and told what to do. `python -m tests.near_misses` writes it."""
    assert len(CASES) >= 20 and {c.construct for c in CASES} == {
        "rms_norm", "layer_norm", "attention", "rope", "gated_mlp", "cross_entropy", "lora"
    }  # fmt: skip
    table = near_misses.PAGE.read_text().split("<!-- table: misses -->\n")[1].split("\n<!-- end -->")[0]
    assert table.split("\n") == list(near_misses.rows())


def test_a_miss_is_at_the_line_of_the_model():
    """Not at torch's, where a module of torch computes it."""
    norm = torch.nn.RMSNorm(near_misses.S)  # over positions, once they are last

    def over_positions(m, x, labels):
        return norm(x.transpose(1, 2)).pow(2).mean(1, keepdim=True).sqrt()

    sites = sloth.explain(Block(over_positions), batch()).sites
    assert sites and all(s.file == __file__ and s.line == over_positions.__code__.co_firstlineno + 1 for s in sites)


def batch():
    return {"x": torch.randn(near_misses.B, near_misses.S, 64), "labels": torch.zeros(near_misses.B, near_misses.S).long()}


def router(m, x, labels):
    """The softmax of a layer that narrows, by which something is multiplied, and one number of it."""
    w = torch.softmax(m.lora_A(x), -1)
    return (w[..., :1] * x).sum() + w.mean(1).square().sum()


def mlp(m, x, labels):
    return m.down_proj(F.gelu(m.gate_proj(x)))


def gated_attention(m, x, labels):
    """The gate of a layer's input, over what no layer computes."""
    return m.q_proj(torch.sigmoid(m.k_proj(x)) * x.cumsum(1))


def two_layers(m, x, labels):
    return m.q_proj(x) + m.lora_B(m.lora_A(x.cumsum(1)))


def tanh_of_channels(m, x, labels):
    return x * m.weight + torch.cat((x[..., :32], x[..., 32:]), -1) * m.bias.mean()


@pytest.mark.parametrize("forward", [router, mlp, gated_attention, tanh_of_channels])
def test_what_only_looks_like_one_is_not_counted(forward):
    torch._dynamo.reset()
    assert not sloth.explain(Block(forward), batch()).sites


def test_adapters_of_another_input_are_no_miss_of_mathematics():
    """The anchor counts them, once."""
    torch._dynamo.reset()
    assert len(sloth.explain(Block(two_layers), batch()).sites) == 1


def branch(m, x, labels):
    g = m.gate_proj(x)
    return m.down_proj(torch.where(g < 0, 0.0, g) * m.up_proj(x) * m.third(x))


def masked(m, x, labels):
    return m.down_proj(torch.where(x[..., :1] > 0, m.gate_proj(x), 0.0) * m.up_proj(x) * m.third(x))


def test_a_branch_is_a_gate_where_the_layer_decides():
    from sloth.patterns.gated_formula import CONDITIONS, TERMS
    from sloth.patterns.mathematics import EACH

    assert TERMS.keys() - CONDITIONS <= EACH, "what a formula may hold, a gate may"
    for forward, expected in [(branch, 1), (masked, 0)]:
        torch._dynamo.reset()
        assert sloth.explain(Block(forward), batch()).constructs["gated_mlp"]["expected"] == expected


def vector(m, x, labels):
    """A layer of one output, whose weight is a vector: given out, and where an adapter is thin."""
    thin = F.linear(x, m.weight)
    return thin, F.linear(thin, m.third.weight[:, :S]) + 1, m.q_proj(x) + F.linear(thin[..., None], m.bias[:, None])


def test_a_layer_whose_weight_is_a_vector(caplog):
    torch._dynamo.reset()
    report = sloth.explain(Block(vector), batch())
    assert not report.sites and not report.graphs[0].untouched and "raises" not in caplog.text


def test_a_bug_in_mathematics_costs_its_count(monkeypatch, caplog):
    from sloth.patterns.rms_norm import RMS_NORM

    object.__setattr__(RMS_NORM, "mathematics", lambda v: 1 / 0)
    try:
        torch._dynamo.reset()
        assert sloth.explain(Block(CASES[0].forward), batch()).constructs["rms_norm"] == {"matched": 0, "expected": 0}
    finally:
        from sloth.patterns import mathematics

        object.__setattr__(RMS_NORM, "mathematics", mathematics.rms_norm)
    assert "its mathematics raises ZeroDivisionError" in caplog.text
