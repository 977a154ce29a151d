"""The cost stage: what does not pay is left, and says so; the user decides otherwise, for an entry or an operator."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from toys import Call, checked, llama_norm, matched

import sloth
from sloth.options import parse
from sloth.rewriter.match import cost as costs
from sloth.rewriter.match.registry import deferrals, patterns
from sloth.rewriter.report import Report

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    known = dict(costs.COSTS)
    yield
    costs.COSTS.clear()
    costs.COSTS.update(known)


def small(match) -> str | None:
    size = match.x.meta.shape[-1]
    return f"{size} channels" if size < 16 else None


def run(**options: object) -> Report:
    return checked(
        Call(lambda m, x: llama_norm(x, m.w)), X.clone().requires_grad_(), options={f"sloth.{k}": v for k, v in options.items()}
    )


def statuses(report: Report) -> list[tuple[str, str]]:
    return [(s.status, s.reason) for s in report.sites]


def operator_of(name: str) -> torch._ops.OpOverload:
    return next(p.op for p in patterns() if p.name == name)


@pytest.mark.parametrize("of", ["name", "entry", "operator", "packet"])
def test_what_does_not_pay_is_left_and_says_so(of: str) -> None:
    entry = next(p for p in patterns() if p.name == "rms_norm")
    sloth.cost({"name": "rms_norm", "entry": entry, "operator": entry.op, "packet": entry.op.overloadpacket}[of])(small)
    assert statuses(run()) == [("unprofitable", "8 channels")]


@pytest.mark.parametrize("always", ["rms_norm", ["rope", "rms_norm"]])
def test_the_user_has_it_made_all_the_same(always: object) -> None:
    sloth.cost("rms_norm")(small)
    assert statuses(run(always=always)) == [("matched", "")]


def test_what_a_user_registers_takes_the_place_of_what_was_there() -> None:
    sloth.cost("rms_norm")(small)
    sloth.cost("rms_norm")(lambda match: None)
    assert statuses(run()) == [("matched", "")]


def test_it_is_forgotten_with_its_entry() -> None:
    mine = sloth.Construct("mine", "mine")
    sloth.pattern(mine, op=operator_of("rms_norm"), dims={"x": "B S D"}, name="mine", weight=None)(lambda x, *, eps: x + eps)
    sloth.cost("mine")(small)
    sloth.unregister("mine")
    assert "mine" not in costs.COSTS


def test_an_entrys_counts_more_than_its_operators() -> None:
    sloth.cost("rms_norm")(lambda match: None)
    sloth.cost(operator_of("rms_norm"))(small)
    assert statuses(run()) == [("matched", "")]


def test_what_does_not_pay_leaves_its_place_to_another() -> None:
    """The sum in front of a norm stays; the norm is made."""

    def fn(m, x):
        h = x + x.exp()
        return h, llama_norm(h, m.w)

    sloth.cost("add_rms_norm")(lambda match: "never")
    report = checked(Call(fn), X.clone().requires_grad_())
    assert matched(report) == {"rms_norm": 1} and len(report.sites) == 1


def test_it_is_asked_of_what_is_legal_alone() -> None:
    asked = []
    sloth.cost("rms_norm")(asked.append)

    def fn(m, x):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return m.w * (x * r), r

    report = checked(Call(fn), X.clone().requires_grad_())
    assert [s.status for s in report.sites] == ["escape"] and not asked


def test_a_bug_costs_the_entry_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def broken(match):
        raise ZeroDivisionError("a bug")

    sloth.cost("rms_norm")(broken)
    with caplog.at_level(logging.WARNING, "sloth"):
        assert statuses(run()) == [("error", "the cost of rms_norm raises ZeroDivisionError: a bug")]
    assert "a bug" in caplog.text


def test_it_may_say_so_as_a_check_does() -> None:
    sloth.cost("rms_norm")(lambda match: match.require(match.eps > 1, "a small eps"))
    assert statuses(run()) == [("unprofitable", "a small eps")]


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="there is no entry 'rmsnorm'; there are "):
        sloth.cost("rmsnorm")
    with pytest.raises(sloth.PatternError, match="must be an operator"):
        sloth.cost(torch.relu)
    with pytest.raises(ValueError, match="Did you mean rms_norm"):
        parse({"sloth.always": "rmsnorm"})


def test_costs_that_sloth_registers_are_of_its_entries() -> None:
    known = {e.name for e in (*patterns(), *deferrals())} | {p.op for p in patterns()}
    assert costs.COSTS and costs.COSTS.keys() <= known
