"""Near misses: code that is nearly what a pattern computes, what a report says of it, and what to do.

python -m tests.near_misses    # writes the table of docs/misses.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sloth
from sloth.rewriter.report import MATCHED, Site

PAGE = Path(__file__).parents[1] / "docs" / "misses.md"
B, H, S, D, WORDS = 2, 4, 12, 16, 256


class NearMiss(NamedTuple):
    name: str
    construct: str
    code: str
    forward: Callable[..., Tensor]
    advice: str


CASES: list[NearMiss] = []


def near_miss(construct: str, advice: str) -> Callable[[Callable], Callable]:
    def enter(fn: Callable) -> Callable:
        lines = inspect.getsource(fn).split("\n")
        code = "; ".join(line.strip().removeprefix("return ") for line in lines[2:] if line.strip())
        CASES.append(NearMiss(fn.__name__, construct, code, fn, advice))
        return fn

    return enter


class Block(nn.Module):
    """Whatever layers the cases need."""

    def __init__(self, forward: Callable[..., Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.rand(H * D) + 0.5), nn.Parameter(torch.rand(H * D))
        for name, (wide, narrow) in LAYERS.items():
            setattr(self, name, nn.Linear(narrow, wide, bias=False))
        self.temperature, self.position_bias = nn.Parameter(torch.ones(1, H, 1, 1)), nn.Parameter(torch.rand(1, H, S, S))
        self.compute = forward

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.compute(self, x, labels)

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x).view(B, S, H, D).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))

    def masked(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -1e9)

    def tables(self) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(S).float(), 10000 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)
        return angles.cos()[None, None], angles.sin()[None, None]


LAYERS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), (H * D, H * D)),
    **dict.fromkeys(("gate_proj", "up_proj", "third"), (96, H * D)),
    "down_proj": (H * D, 96), "lm_head": (WORDS, H * D), "lora_A": (4, H * D), "lora_B": (H * D, 4),
}  # fmt: skip
OPERATOR, RULE = "another operator", "a rule of the normal form"
SAME = "it is the same mathematics: " + RULE


@near_miss("rms_norm", f"{OPERATOR}: where eps stands changes the derivative")
def eps_behind_the_root(m, x, labels):
    return m.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6))


@near_miss("rms_norm", f"{OPERATOR}: the kernel reads rows of the last dimension; move the dimension in the model")
def over_positions(m, x, labels):
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))


@near_miss("rms_norm", f"{OPERATOR}, or add eps in the model in place of the clamp")
def clamped_variance(m, x, labels):
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=1e-6)))


@near_miss("rms_norm", "give the value out as a result of the operator, or compute it a second time in the model")
def root_used_again(m, x, labels):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.weight * (x * r) + r


@near_miss("layer_norm", f"{OPERATOR}: the variance of a sample divides by one less; `unbiased=False` is matched")
def unbiased_variance(m, x, labels):
    h = x - x.mean(-1, keepdim=True)
    return m.weight * (h * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6)) + m.bias


@near_miss("layer_norm", f"{OPERATOR}: where eps stands changes the derivative")
def eps_behind_the_deviation(m, x, labels):
    return m.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-6) + m.bias


@near_miss("attention", f"{OPERATOR}: keys share a query's weight, not queries a key's")
def softmax_over_queries(m, x, labels):
    q, k, v = m.qkv(x)
    return torch.softmax(q @ k.transpose(2, 3) / 4, dim=-2) @ v


@near_miss("attention", "move the gate behind the product with the values, where it is the same")
def gated_weights(m, x, labels):
    q, k, v = m.qkv(x)
    w = torch.softmax(m.masked(q @ k.transpose(2, 3) / 4), -1)
    return (w * torch.sigmoid(q.sum(-1, keepdim=True))) @ v


@near_miss("attention", "biases other than ALiBi's are left to torch's attention")
def learned_bias(m, x, labels):
    q, k, v = m.qkv(x)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.position_bias)


@near_miss("attention", "multiply q by the tensor in place of the scores")
def learned_temperature(m, x, labels):
    q, k, v = m.qkv(x)
    return torch.softmax(m.masked(q @ k.transpose(2, 3) * m.temperature), -1) @ v


@near_miss("attention", SAME)
def softmax_by_exponentials(m, x, labels):
    q, k, v = m.qkv(x)
    s = m.masked(q @ k.transpose(2, 3) / 4)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@near_miss("rope", "tables that learn need an operator that gives them a gradient; scale q in place of them")
def table_of_heads(m, x, labels):
    q, _, _ = m.qkv(x)
    cos, sin = m.tables()
    a, b = q.chunk(2, -1)
    return q * (cos * m.temperature) + torch.cat((-b, a), -1) * sin


@near_miss("rope", "no rotation: channels are no pairs")
def rolled(m, x, labels):
    q, _, _ = m.qkv(x)
    cos, sin = m.tables()
    return q * cos + torch.roll(q, 1, -1) * sin


@near_miss("rope", "no rotation of one tensor; look for a mistake in the model")
def of_two_tensors(m, x, labels):
    q, k, _ = m.qkv(x)
    cos, sin = m.tables()
    a, b = k.chunk(2, -1)
    return q * cos + torch.cat((-b, a), -1) * sin


@near_miss("gated_mlp", OPERATOR)
def three_factors(m, x, labels):
    return m.down_proj(torch.tanh(m.gate_proj(x)) * m.up_proj(x) * m.third(x))


@near_miss("cross_entropy", "leave it: the loss of each token is needed twice")
def focal_loss(m, x, labels):
    p = F.log_softmax(m.lm_head(x).float(), -1).gather(-1, labels[..., None])
    return -((1 - p.exp()) ** 2 * p).mean()


@near_miss("cross_entropy", "`F.cross_entropy(…, label_smoothing=…)` is matched")
def soft_labels(m, x, labels):
    p = F.log_softmax(m.lm_head(x).float(), -1)
    return -(F.one_hot(labels, WORDS) * 0.9 + 0.1 / WORDS).mul(p).sum(-1).mean()


@near_miss("cross_entropy", "write `log_softmax`: exponentials overflow")
def loss_by_exponentials(m, x, labels):
    e = m.lm_head(x).float().exp()
    return -torch.log((e / e.sum(-1, keepdim=True)).gather(-1, labels[..., None])).mean()


@near_miss("lora", "no adapter that can be merged: leave it")
def activated_adapter(m, x, labels):
    return m.q_proj(x) + m.lora_B(torch.relu(m.lora_A(x))) * 2.0


@near_miss("lora", "multiply x in front of `lora_A`, or B itself, by the tensor")
def learned_scale(m, x, labels):
    return m.q_proj(x) + m.lora_B(m.lora_A(x)) * m.temperature.mean()


def site_of(case: NearMiss) -> Site:
    """The one site of its construct that a report lists, not matched."""
    g = torch.Generator().manual_seed(1)
    batch: dict[str, Any] = {"x": torch.randn(B, S, H * D, generator=g), "labels": torch.randint(0, WORDS, (B, S), generator=g)}
    torch._dynamo.reset()
    (site,) = (s for s in sloth.explain(Block(case.forward), batch).sites if s.construct == case.construct)
    assert site.status != MATCHED
    return site


def message(site: Site) -> str:
    """Without the lines of this file, which change."""
    return re.sub(r" \(near_misses\.py:\d+\)", "", site.reason.removesuffix(f" (no anchor of {site.construct} sees this place)"))


def rows() -> Iterator[str]:
    yield "| construct | in the model | nearest variant | what the report says | what to do |"
    yield "|---|---|---|---|---|"
    for case in CASES:
        site = site_of(case)
        yield f"| {case.construct} | `{case.code}` | {site.variant} | `{site.status}`: {message(site)} | {case.advice} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text().partition("<!-- table: misses -->\n")
    PAGE.write_text(
        f"{before}<!-- table: misses -->\n" + "\n".join(rows()) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    )
