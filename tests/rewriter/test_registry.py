"""The registry: a user's own pattern from end to end, what it refuses, and the entries of installed packages."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Call, checked, llama_norm, matched

import sloth
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match import registry
from sloth.rewriter.match.registry import constructs, patterns

_names = itertools.count()

# ---------------------------------------------------------------- an operator of the user's


@torch.library.custom_op("sloth_users::squared_relu", mutates_args=())
def squared_relu(x: Tensor, gate: Tensor, scale: float, power: int = 2) -> Tensor:
    """relu(x)^power · gate · scale."""
    calls.append(power)
    return x.relu().pow(power) * gate * scale


@squared_relu.register_fake
def _(x, gate, scale, power=2):
    return torch.empty_like(x)


def _setup(ctx, inputs, output):
    x, gate, ctx.scale, ctx.power = inputs
    ctx.save_for_backward(x, gate)


def _backward(ctx, d):
    x, gate = ctx.saved_tensors
    r = x.relu()
    dx = d * gate * ctx.scale * ctx.power * r.pow(ctx.power - 1)
    return dx, d * r.pow(ctx.power) * ctx.scale, None, None


squared_relu.register_autograd(_backward, setup_context=_setup)
calls: list[int] = []


def is_relu(v: Value) -> bool:
    return v.op == "relu"


CONSTRUCT = sloth.Construct("squared_relu", "squared ReLU", anchor=is_relu)
DIMS = {"x": "B S E", "gate": "B S E"}  # E, Q, O, I … are sizes too, whatever they mean to sympy


def reference(x, gate, *, scale: float):
    return x.relu().square() * gate * scale


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test registers is gone after it."""
    known = {p.name for p in patterns()}
    calls.clear()
    yield
    for p in patterns():
        if p.name not in known:
            sloth.unregister(p.name)


def enter(reference: Any = reference, **changes: Any) -> Any:
    return sloth.pattern(CONSTRUCT, **({"op": squared_relu, "dims": DIMS, "name": f"user{next(_names)}"} | changes))(reference)


class Block(nn.Module):
    """Own code, written otherwise than the reference."""

    def __init__(self, power: int = 2):
        super().__init__()
        self.up, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)
        self.power = power

    def forward(self, x):
        h = torch.relu(self.up(x))
        h = h * h if self.power == 2 else h.pow(self.power)
        return 0.5 * (self.gate(x) * h)


def x_like() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


# ---------------------------------------------------------------- end to end


def test_a_users_operator_replaces_the_users_code() -> None:
    """`(gate · h) · 0.5` is matched by `h · gate · scale`: the operator runs, and every gradient is eager's."""
    entry = enter(lambda x, gate, *, scale: (x.relu().square() * gate) * scale)
    report = checked(Block(), x_like())
    assert [(s.construct, s.variant, s.status) for s in report.sites] == [("squared_relu", f"{entry.name}[default]", "matched")]
    assert report.sites[0].file == __file__
    report.titles = {c.name: c.title for c in constructs()}
    assert "squared ReLU" in str(report) and "1/1" in str(report)
    assert calls, "the operator was called"


def test_without_the_pattern_nothing_is_rewritten() -> None:
    assert not checked(Block(), x_like()).sites and not calls


def test_a_forgotten_pattern_is_used_no_more() -> None:
    sloth.unregister(enter().name)
    assert not checked(Block(), x_like()).sites and CONSTRUCT not in constructs()


def test_variants_tell_the_operator_what_they_are() -> None:
    entry = enter(variant="squared", power=2)

    @entry.variant("cubed", power=3)
    def _(x, gate, *, scale: float):
        return x.relu() ** 3 * gate * scale

    for power, name in ((2, "squared"), (3, "cubed")):
        calls.clear()
        report = checked(Block(power), x_like())
        assert [s.variant for s in report.sites] == [f"{entry.name}[{name}]"] and set(calls) == {power}
    assert str(entry.variants[1]) == f"{entry.name}[cubed]"


def test_options_may_be_computed_from_the_match() -> None:
    entry = enter(lambda x, gate, *, divisor: x.relu().square() * gate / divisor, scale=lambda match: 1 / match.divisor)
    model = Call(lambda m, x: x.relu() ** 2 * (x * m.w) / 4.0)
    assert matched(checked(model, x_like())) == {entry.name: 1}


def test_checks_refuse_with_their_reason() -> None:
    entry = enter()

    @entry.check
    def _(match):
        match.require(match.scale == 1.0, f"scale is {match.scale}")

    (site,) = checked(Block(), x_like()).sites
    assert (site.status, site.reason) == ("check", "scale is 0.5")
    assert not calls


def test_a_user_may_replace_one_of_ours() -> None:
    """A pattern of the user's that covers more than sloth's own is preferred."""

    @torch.library.custom_op(f"sloth_users::norm_relu{next(_names)}", mutates_args=())
    def norm_relu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return llama_norm(x, weight, eps).relu()

    norm_relu.register_fake(lambda x, weight, eps: torch.empty_like(x))
    entry = sloth.pattern(CONSTRUCT, op=norm_relu, dims={"x": "B S D", "weight": "D"}, name="norm_relu")(
        lambda x, weight, *, eps: llama_norm(x, weight, eps).relu()
    )
    model = Call(lambda m, x: llama_norm(x, m.w).relu()).requires_grad_(False)
    report = checked(model, x_like().detach())
    assert [s.variant for s in report.sites if s.status == "matched"] == [f"{entry.name}[default]"]


def test_the_decorator_gives_back_the_entry() -> None:
    entry = enter()
    assert entry in patterns() and entry.construct is CONSTRUCT and CONSTRUCT in constructs()
    assert entry.op is torch.ops.sloth_users.squared_relu.default


@pytest.mark.parametrize("op", [squared_relu, torch.ops.sloth_users.squared_relu, torch.ops.sloth_users.squared_relu.default])
def test_operators_in_every_shape(op: Any) -> None:
    assert enter(op=op).op is torch.ops.sloth_users.squared_relu.default


# ---------------------------------------------------------------- what it refuses


def test_a_name_is_given_once() -> None:
    enter(name="mine")
    with pytest.raises(sloth.PatternError, match="'mine' is registered already; give another name="):
        enter(name="mine")
    with pytest.raises(sloth.PatternError, match="'rms_norm'"):
        enter(name="rms_norm")
    assert [p.name for p in patterns()].count("rms_norm") == 1


def test_arguments_that_the_operator_lacks() -> None:
    with pytest.raises(sloth.PatternError, match=r"has no argument slope; it has gate, power, scale, x"):
        enter(lambda x, gate, *, slope: x.relu() * gate * slope)
    with pytest.raises(sloth.PatternError, match="has no argument bias"):
        enter(lambda x, bias: x.relu() * bias, dims={"x": "B S", "bias": "B S"})
    with pytest.raises(sloth.PatternError, match="has no argument powr"):
        enter(powr=3)
    assert not [p for p in patterns() if p.construct is CONSTRUCT], "nothing half registered"


def test_options_of_variants_are_checked_as_well() -> None:
    """A misspelt option would be dropped, and the operator would compute something else."""
    entry = enter()
    with pytest.raises(sloth.PatternError, match=rf"{entry.name}\[cubed\].*has no argument powr"):
        entry.variant("cubed", powr=3)(lambda x, gate, *, scale: x.relu() ** 3 * gate * scale)
    assert len(entry.variants) == 1


def test_tensors_without_dims() -> None:
    with pytest.raises(sloth.PatternError, match="no dims given for gate"):
        enter(dims={"x": "B S D"})


@pytest.mark.parametrize("op", [lambda x: x, torch.relu, "sloth_users::squared_relu"])
def test_what_is_no_operator(op: Any) -> None:
    with pytest.raises(sloth.PatternError, match=r"must be an operator of torch\.library"):
        enter(op=op)


def test_unregistering_what_is_not_there() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        sloth.unregister("nowhere")


@pytest.mark.parametrize("letters", ["E Q", "O I", "N S", "B*C 2*E", "a b"])
def test_any_letter_is_a_size(letters: str) -> None:
    entry = enter(dims={"x": letters, "gate": letters})
    metas = entry.variants[0].sample_metas()
    assert metas[0].shape == metas[1].shape and all(isinstance(s, int) and s > 1 for s in metas[0].shape)
    first, second = metas[0].shape
    assert first != second, "different letters are different sizes"


def test_sizes_can_be_fixed() -> None:
    entry = enter(dims={"x": "B S 2*E", "gate": "B S 2*E"}, sizes={"E": 5})
    assert entry.variants[0].sample_metas()[0].shape[-1] == 10


def test_patterns_of_our_own_that_cannot_be_had_are_an_error_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use fails loudly, and so does the second: a registry without patterns would be silent."""

    class Broken:
        value = registry.OWN

        def load(self) -> None:
            raise ImportError("half installed")

    monkeypatch.setattr(registry, "_loaded", False)
    for points, told in (([Broken()], "half installed"), ([], "install sloth again")):
        monkeypatch.setattr(registry, "entry_points", lambda group, points=points: points)
        for _ in range(2):
            with pytest.raises((ImportError, RuntimeError), match=told):
                patterns()


# ---------------------------------------------------------------- packages


def distribution(folder: Path, name: str, code: str) -> None:
    """An installed package with an entry point in the group sloth_patterns."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sloth_patterns]\n{name} = {name}\n")


PACKAGE = """
import torch, sloth
@torch.library.custom_op("their_package::twice_sine", mutates_args=())
def twice_sine(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.sin()
twice_sine.register_fake(lambda x: torch.empty_like(x))
construct = sloth.Construct("sine", "sine", anchor=lambda v: v.op == "sin")
@sloth.pattern(construct, op=twice_sine, dims={"x": "N"})
def twice(x):
    return 2 * x.sin()
"""

USE = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from sloth.rewriter.backend import listening
f = lambda x: x.sin() * 2 + 1
with listening() as graphs:
    y = torch.compile(f, backend="sloth", options={"sloth.inner_backend": "aot_eager"})(torch.arange(3.0))
torch.testing.assert_close(y, f(torch.arange(3.0)))
print([(s.variant, s.status) for g in graphs for s in g.sites])
from sloth.rewriter.match.registry import patterns
print("rms_norm" in [p.name for p in patterns()])
"""


def test_packages_bring_patterns_and_broken_ones_only_warn(tmp_path: Path) -> None:
    """Found by their entry points, with no import by the user; one that cannot be imported does not stop the rest."""
    distribution(tmp_path, "a_broken_package", "raise RuntimeError('needs a newer world')")
    distribution(tmp_path, "their_package", PACKAGE)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    warning, *_, sites, ours = done.stdout.strip().split("\n")
    assert warning == "WARNING sloth: patterns of a_broken_package were not loaded: RuntimeError: needs a newer world"
    assert sites == "[('twice[default]', 'matched')]" and ours == "True"
