"""`sloth.verify`: what is wrong with a rewrite is found where it stands, and what is right is not blamed."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Stack, llama_norm
from typer.testing import CliRunner

import sloth
from sloth import tiny_model
from sloth.__main__ import app
from sloth.rewriter import notices
from sloth.rewriter.match.registry import unregister
from sloth.rewriter.plan import legality
from sloth.rewriter.verify.report import GOOD, NOT_CHECKED, WRONG, Checked, Verification
from sloth.rewriter.verify.run import Exactly, NotExact, evaluate, exact
from sloth.rewriter.verify.tally import Tally, _student

BF16 = torch.bfloat16
EAGER = {"sloth.inner_backend": "eager"}
SQUARED = sloth.Construct("squared", "squared gate", anchor=lambda v: v.op == "sigmoid")


def operator(name: str, gain: float, skips: bool = False) -> Any:
    """u·σ(g), with a gradient of u that is `gain` times too large, or none."""

    @torch.library.custom_op(f"test_verify::{name}", mutates_args=())
    def op(g: Tensor, u: Tensor) -> Tensor:
        return (u.float() * torch.sigmoid(g.float())).to(g.dtype)

    @op.register_fake
    def _(g: Tensor, u: Tensor) -> Tensor:
        return torch.empty_like(g)

    def backward(ctx: Any, d: Tensor) -> tuple:
        g, u = (t.float() for t in ctx.saved_tensors)
        s = torch.sigmoid(g)
        return (d.float() * u * s * (1 - s)).to(d.dtype), None if skips else (gain * d.float() * s).to(d.dtype)

    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return op


RIGHT, WRONG_OP, SKIPPING = operator("right", 1.0), operator("wrong", 17.0), operator("skipping", 1.0, True)


@pytest.fixture
def entered() -> Iterator[Callable[[Any], None]]:
    """Enters a pattern of the user's for such an operator."""

    def enter(op: Any) -> None:
        @sloth.pattern(SQUARED, op=op, dims={"g": "B S D", "u": "B S D"}, name="squared")
        def reference(g: Tensor, u: Tensor) -> Tensor:
            return (u.float() * torch.sigmoid(g.float())).to(g.dtype)

    yield enter
    unregister("squared")


class Gated(nn.Module):
    """A norm, a gate, a checkpoint, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.gate, self.up = nn.Parameter(torch.ones(8)), nn.Linear(8, 8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        h = checkpoint(llama_norm, x, self.w, use_reentrant=False)
        g, u = self.dropout(self.gate(h)), self.up(h)
        return (u.float() * torch.sigmoid(g.float())).to(g.dtype).float().pow(2).mean()


def verified(model: nn.Module, x: Tensor, only: str = "squared,rms_norm", **options: Any) -> Verification:
    torch._dynamo.reset()
    return sloth.verify(model, {"x": x}, EAGER | {"sloth.only": only} | options)


def batch(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(autouse=True)
def weights_are_the_same() -> None:
    torch.manual_seed(0)


def test_what_is_right_is_good_and_nothing_stays_changed(entered: Callable[[Any], None]) -> None:
    entered(RIGHT)
    model = Gated().to(BF16)
    model(batch(2, 5, 8)).backward()
    before, drawn = copy.deepcopy(model), torch.get_rng_state()
    grads = [p.grad.clone() for p in model.parameters()]
    found = verified(model, batch(2, 5, 8))
    assert found.ok and {c.rewrite: c.status for c in found.checked} == {
        "squared[default]": GOOD, "rms_norm[llama]": GOOD, "the whole step": GOOD
    }, str(found)  # fmt: skip
    assert {r.inputs for c in found.rewrites for r in c.results} == {"real", "random"}
    assert {r.what for r in found.step.results} >= {"loss", "gradient of w", "gradient of up.weight"}
    told = json.loads(found.to_json())
    assert told["ok"] and [c["sites"] for c in told["rewrites"]] == [1, 1] and "3 good" in str(found)
    assert all(map(torch.equal, before.state_dict().values(), model.state_dict().values()))
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters())))
    assert model.dropout.p == 0.5 and model.training and torch.equal(drawn, torch.get_rng_state())


def test_a_gradient_that_is_too_large_is_found(entered: Callable[[Any], None]) -> None:
    entered(WRONG_OP)
    found = verified(Gated(), batch(2, 5, 8, dtype=torch.float32))
    by_name = {c.rewrite: c for c in found.checked}
    assert not found.ok and by_name["rms_norm[llama]"].status == GOOD
    assert by_name["squared[default]"].status == WRONG and "the gradient of u" in by_name["squared[default]"].reason
    assert by_name["the whole step"].status == WRONG
    assert {r.what for r in found.step.results if r.ratio.worse} == {
        "gradient of up.weight",
        "gradient of up.bias",
        "gradient of w",
    }


def test_the_option_leaves_out_what_fails(entered: Callable[[Any], None], caplog: pytest.LogCaptureFixture) -> None:
    """Of a graph that is compiled, and what is right stays."""
    entered(WRONG_OP)
    notices._said.clear()
    model, x = Gated().eval(), batch(2, 5, 8, dtype=torch.float32)
    model(x).backward()
    eager = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    options = EAGER | {"sloth.only": "squared,rms_norm", "sloth.verify": True}
    with sloth.rewriter.backend.listening() as reports, caplog.at_level(logging.WARNING, "sloth"):
        torch.compile(model, backend="sloth", options=options)(x).backward()
    for a, b in zip(eager, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(a, b)
    assert {s.construct: s.status for r in reports for s in r.sites} == {"rms_norm": "matched", "squared": "verify"}
    assert [r.rewrites for r in reports] == [1] and model.seen == 2
    assert "squared[default] is not made: the error of the gradient of u" in caplog.text


def test_a_gradient_that_is_lost_is_found(entered: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where legality did not ask."""
    entered(SKIPPING)
    monkeypatch.setattr(legality, "RULES", tuple(rule for rule in legality.RULES if rule is not legality.backward))
    found = verified(Gated(), batch(2, 5, 8, dtype=torch.float32))
    assert [c.reason for c in found.rewrites if c.status == WRONG] == ["the gradient of u is lost"]
    assert "is lost" in found.step.reason


def test_what_is_matched_and_is_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original is what the graph says, not what the matcher took it for: x − mean as mean − x."""
    from sloth.rewriter.match import matcher

    monkeypatch.setattr(matcher, "COMMUTATIVE", {*matcher.COMMUTATIVE, "sub"})

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            d = x.mean(-1, keepdim=True) - x
            return (d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * self.w + self.v).pow(2).mean()

    found = verified(Turned(), batch(2, 5, 8, dtype=torch.float32), only="layer_norm")
    assert {c.status for c in found.checked} == {WRONG}, str(found)  # and so is what comes in its place
    assert found.rewrites[0].rewrite.startswith("layer_norm")
    assert {r.what for r in found.rewrites[0].results if r.ratio.worse} == {"result", "gradient of weight"}


def test_operands_that_are_computed_twice() -> None:
    """The second layer reads its own `cos.unsqueeze`, and the operator the first layer's; tables are cast once more."""
    found = verified(Wrapped(Stack(2)), batch(2, 4, 8, dtype=torch.float32), only="rope,add_rms_norm,rms_norm,gated_mlp")
    assert found.ok and not found.not_checked, str(found)
    sites = {c.rewrite.split("[")[0]: 0 for c in found.rewrites}
    for c in found.rewrites:
        sites[c.rewrite.split("[")[0]] += c.sites
    assert sites["rope"] == 2 and sites["gated_mlp"] == 2


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_sum_under_autocast_reads_what_the_operator_is_given_cast() -> None:
    """The adapter reads x in fp32, which autocast rounds; the layer reads x.to(bf16); the operator is given one of the two."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(16, 2))
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            base = F.linear(x.to(BF16), self.weight).float()
            return (base + (F.linear(F.linear(x, self.a), self.b) * 2.0).float()).pow(2).mean()

    with torch.autocast("cpu", BF16):
        found = verified(Adapted(), batch(2, 5, 8, dtype=torch.float32), only="lora")
    assert [c.rewrite for c in found.rewrites] == ["lora[linear]"]
    assert not found.rewrites[0].reason or "times eager's" in found.rewrites[0].reason, str(found)


def test_what_cannot_be_judged_is_not_checked(entered: Callable[[Any], None]) -> None:
    """Code of others has no fp64, unless it is said."""

    @torch.library.custom_op("test_verify::half", mutates_args=())
    def half(x: Tensor) -> Tensor:
        return x / 2

    half.register_fake(torch.empty_like)
    half.register_autograd(lambda ctx, d: d / 2)
    entered(RIGHT)

    class Halved(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(half(x * self.w))

    found = verified(Halved(), batch(2, 5, 8, dtype=torch.float32))
    assert found.step.status == NOT_CHECKED and "test_verify::half does not compute in fp64" in found.step.reason
    assert found.ok and found.not_checked == [found.step] and "1 not checked" in str(found)


def test_bad_input_is_said() -> None:
    with pytest.raises(TypeError, match=r"verify needs an nn\.Module, not function"):
        sloth.verify(lambda x: x, {})
    with pytest.raises(TypeError, match="as a mapping, not Tensor"):
        sloth.verify(nn.Linear(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"Did you mean sloth\.only"):
        sloth.verify(nn.Linear(2, 2), {"input": torch.ones(2, 2)}, {"sloth.onyl": "rope"})


class Words(nn.Module):
    """What the command needs of a model of transformers."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.words, self.gate, self.up = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.words(input_ids)
        return (F.silu(self.gate(x)) * self.up(x)).sum(-1).sub(labels).pow(2).mean()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table, a file, and exit code 1 where something is wrong."""
    monkeypatch.setenv("SLOTH_OPTIONS", "sloth.inner_backend=eager;sloth.only=gated_mlp")
    monkeypatch.setattr(tiny_model, "build", lambda name: Words())
    torch._dynamo.reset()
    file = tmp_path / "found.json"
    done = CliRunner().invoke(app, ["verify", "llama", "--dtype", "bf16", "--json", str(file)])
    assert done.exit_code == 0 and "gated_mlp[silu]" in done.stdout, done.output
    told = json.loads(file.read_text())
    assert told["ok"] and [c["sites"] for c in told["rewrites"]] == [1]
    lost = Verification(step=Checked("the whole step", "", "", 0, 0, WRONG, "the gradient of w is lost"))
    monkeypatch.setattr(sloth, "verify", lambda *_: lost)
    done = CliRunner().invoke(app, ["verify", "llama"])
    assert done.exit_code == 1 and "the gradient of w is lost" in done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "bloom", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models(arch: str, checkpointing: bool) -> None:
    """In bf16, whatever their attention: nothing is wrong, and everything is checked."""
    from sloth.zoo import models as zoo

    torch._dynamo.reset()
    model = zoo.tiny_model(arch, BF16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = sloth.verify(model, zoo.tiny_batch(model, arch), EAGER)
    assert not [c.reason for c in found.rewrites if c.status != GOOD], str(found)
    assert len(found.rewrites) > 2 and found.step.status == GOOD, str(found)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4"])
def test_layers_of_bitsandbytes_are_checked(kind: str) -> None:
    """Whether their weights come of one call with the product or by themselves; within what a sum in bf16 may be off."""
    from tests.patterns import peft_layers

    model = peft_layers.adapted(peft_layers.Attention(kind, BF16, checkpointed=True), {})
    torch._dynamo.reset()
    found = sloth.verify(model, {"x": batch(2, 5, peft_layers.K)}, EAGER)
    assert found.rewrites and not found.not_checked, str(found)
    assert all(r.ratio.ratio < 1.3 for c in found.rewrites for r in c.results if r.inputs == "random"), str(found)


# ---------------------------------------------------------------- fp64, and errors compared


def test_code_runs_in_fp64() -> None:
    x = torch.full((4, 4), 1 / 3, dtype=torch.float64, requires_grad=True)
    with Exactly(), torch.autocast("cpu", BF16):
        y = (x.float().to(BF16).half() @ torch.eye(4, dtype=BF16) + torch.ones(4, 4)).softmax(-1, dtype=torch.float32)
        (g,) = torch.autograd.grad(y.pow(2).sum(), x)
    wanted = (x + 1).softmax(-1)
    assert y.dtype == g.dtype == torch.float64 and torch.equal(y, wanted)
    assert torch.equal(g, torch.autograd.grad(wanted.pow(2).sum(), x)[0]) and torch.zeros(()).dtype == torch.float32
    with Exactly(), pytest.raises(NotExact, match="bits"):
        x.detach().view(torch.int64)


def test_a_query_that_sees_nothing_has_a_gradient_in_fp64() -> None:
    """torch's fused kernels keep log Σ exp(scores) alone: beside the least number there is, the number of keys is lost in it."""
    q, k, v, d = (torch.randn(1, 1, 4, 8) for _ in range(4))
    mask = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)
    mask[:2] = torch.finfo(torch.float32).min

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [(q @ k.mT / 8**0.5 + mask).softmax(-1) @ v]

    def run(function: Callable[..., Any]) -> tuple[list[Any], list[Any], list[bool]]:
        return evaluate(function, [t.double() for t in (q, k, v)], [True] * 3, [True] * 3, [d.double()])

    with Exactly():
        found = run(lambda *of: [F.scaled_dot_product_attention(*of, attn_mask=mask)])
    for kind, by_formula in zip(found[:2], run(by_hand)[:2], strict=True):
        torch.testing.assert_close(kind, by_formula)


def test_what_is_computed_is_no_leaf() -> None:
    """Of a leaf, autocast makes one copy for all its readers, and their gradients are added up in bf16."""
    x, d = torch.randn(8, 16), torch.randn(8, 16).to(BF16)
    w, u = (torch.randn(16, 16) for _ in range(2))
    with torch.autocast("cpu", BF16):
        made, leaf = (
            evaluate(lambda x: [F.linear(x, w), F.linear(x, u)], [x], [True], [is_leaf], [d, d])[1][0] for is_leaf in (0, 1)
        )
    assert torch.equal(made, (d @ w.to(BF16)).float() + (d @ u.to(BF16)).float())
    assert not torch.equal(made, leaf)


def test_products_of_experts_run_in_fp64() -> None:
    """torch's grouped product takes no fp64: forward, and both gradients."""
    a, w, ends = torch.randn(6, 16), torch.randn(3, 16, 16), torch.tensor([1, 1, 6], dtype=torch.int32)

    def product(a: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        a, w = a.detach().requires_grad_(), w.detach().requires_grad_()
        y = F.grouped_mm(a, w, offs=ends)
        return y, *torch.autograd.grad(y.pow(2).sum(), (a, w))

    with Exactly():
        wide = product(a.double(), w.double())
    for x, y in zip(wide, product(a, w), strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x.float(), y)


def test_an_operator_of_others_may_say_what_it_is() -> None:
    @torch.library.custom_op("test_verify::third", mutates_args=())
    def third(x: Tensor) -> Tensor:
        return x / 3

    exact("test_verify::third")(lambda x, traced: x / 3 + (traced == BF16))
    x = torch.ones(2, dtype=torch.float64)
    with Exactly():
        assert torch.equal(third(x.to(BF16)), x / 3 + 1)
        with pytest.raises(NotExact):
            third(x)


def drawn(seed: int, scale: float = 1.0, rows: int = 64) -> Tensor:
    return scale * torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tally(draws: int, scale: float, rows: int = 64, single: bool = False) -> Tally:
    """Errors of 1e-3, ours `scale` times as large, of results of norm 1."""
    made, zero = Tally(single), torch.zeros(rows, 32, dtype=torch.float64)
    for i in range(draws):
        made.add(1e-3 * drawn(2 * i, scale, rows).float(), 1e-3 * drawn(2 * i + 1, 1.0, rows).float(), zero)
    return made


def test_errors_are_compared_beyond_doubt() -> None:
    assert not any(tally(n, 1.0).judged().worse for n in (1, 2, 4, 8, 24))  # equally good ones
    assert tally(1, 1.2).judged().open and tally(24, 1.2).judged().worse
    assert not tally(1, 1.9, single=True).judged().open and tally(1, 2.5, single=True).judged().worse
    assert tally(4, 17.0).judged().worse and tally(1, 1000.0).judged().worse
    once = tally(6, 1.0)
    once.ours[3] *= 400.0
    assert once.judged().ratio > 8 and not once.judged().worse  # another expert was taken, once
    few = [tally(1, 1.0, rows=1, single=True).judged() for _ in range(3)]
    assert not any(r.worse for r in few)
    assert [round(_student(df), 2) for df in (5, 10, 100)] == pytest.approx([6.87, 4.59, 3.39], abs=0.05)


def test_what_is_no_number_is_worse_unless_it_is_so_in_fp64() -> None:
    exact_, bad = torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4)
    bad[0, 0] = math.nan
    made = Tally(single=True)
    made.add(bad, torch.ones(4, 4) * (1 + 1e-6), exact_)
    assert made.judged().worse
    exact_[0, 0] = math.nan
    made = Tally(single=True)
    made.add(bad, bad, exact_)
    assert made.judged().ratio == 1.0 and not made.judged().worse
