"""sloth.kernels.common.dispatch: which implementation of an operator runs."""

import inspect

import pytest
import torch
from common import DEVICE
from recorder import interpret

from sloth.kernels.common import faults
from sloth.kernels.common.device import Device, pretending
from sloth.kernels.common.dispatch import IMPLEMENTATIONS, implementations
from sloth.rewriter.match.registry import patterns

patterns()  # imports all kernels


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setattr("sloth.kernels.common.dispatch.IMPLEMENTATIONS", {})
    return implementations("sloth::mine", triton="triton", aten="aten")


def test_kernels_run_where_all_operands_allow_it(chosen, monkeypatch):
    x, wide = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE, dtype=torch.float64)
    with interpret():
        assert chosen(x) == chosen(x, None, x) == "triton"
        assert chosen(x, wide) == chosen(wide, x) == chosen(x, torch.ones(2, device="meta")) == "aten", "fp64, another device"
        monkeypatch.setattr(faults, "without_kernels", lambda: True)
    with pretending(Device(), DEVICE):
        assert chosen(x) == "aten"


def test_after_a_fault_of_a_kernel_it_is_the_formula(chosen, monkeypatch):
    monkeypatch.setattr(faults, "_lost", {"sloth::mine"})
    run = faults.falls_back("sloth::mine", "mine")(lambda x: chosen(x))
    with interpret():
        assert (run(torch.ones(2, device=DEVICE)), chosen(torch.ones(2, device=DEVICE))) == ("aten", "triton")
    faults.ENTRIES.pop("sloth::mine")


@pytest.mark.parametrize("operator", sorted(IMPLEMENTATIONS))
def test_both_take_the_same(operator):
    """One is called in place of the other. `*how` is the rest of the other's."""
    each = [list(map(str, inspect.signature(f).parameters.values())) for f in IMPLEMENTATIONS[operator].values()]
    told = min((len(names) - 1 for names in each if names[-1] == "*how"), default=None)
    assert len({tuple(n.split(":")[0].split("=")[0] for n in names[:told]) for names in each}) == 1


def test_operators_are_known():
    assert set(IMPLEMENTATIONS) - set(faults.ENTRIES) == {"sloth::attention"}, "made of other operators"
