"""Same seed, same bits: of two runs of a process, of two processes with caches of their own, with static and dynamic lengths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import Stack, compiled

from sloth.kernels.loss.linear_cross_entropy import linear_cross_entropy
from sloth.rewriter.compile import inductor

SCRIPT = Path(__file__).parent.parent / "determinism.py"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def gradients(dynamic: bool) -> list[torch.Tensor]:
    """Of two steps, of two lengths where they may differ."""
    torch.manual_seed(0)
    model = Stack(1, 16)
    run = compiled(model, {"sloth.inner_backend": "aot_eager_decomp_partition"}, dynamic=dynamic)
    found = []
    for length in (5, 7) if dynamic else (5, 5):
        run(torch.randn(3, length, 16)).backward()
        found += [p.grad.clone() for p in model.parameters()]
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_two_runs_of_a_process(dynamic: bool) -> None:
    once, again = gradients(dynamic), gradients(dynamic)
    assert all(map(torch.equal, once, again)) and any(g.any() for g in once)


@pytest.mark.parametrize(
    ("mode", "options", "same"),
    [
        (None, {}, True),
        ("reduce-overhead", {}, True),
        ("max-autotune", {}, False),
        (None, {"max_autotune": True}, False),
        (None, {"deterministic": False}, False),
    ],
)
def test_inductor_chooses_by_no_clock_unless_it_is_asked_to(mode: str | None, options: dict, same: bool) -> None:
    """What it times on a GPU are block sizes of reductions, and paddings of products: other sums in other processes."""
    assert inductor.compiler("inductor", mode, options).args[0].get(inductor.SAME_BITS, False) is same


def bits(cache: Path, *arguments: str) -> list[str]:
    """What a process of its own prints, which has compiled nothing before."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("bits")]


@pytest.mark.nightly
def test_two_processes(tmp_path: Path) -> None:
    lines = bits(tmp_path / "a", "--runs", "2") + bits(tmp_path / "b", "--runs", "1")
    assert len(lines) == 3 and len(set(lines)) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("how", [pytest.param((), marks=gpu), pytest.param(("--strict",), marks=gpu)])
def test_two_processes_on_a_gpu(how: tuple[str, ...], tmp_path: Path) -> None:
    lines = bits(tmp_path / "a", *how) + bits(tmp_path / "b", *how)
    assert len(lines) == 4 and len(set(lines)) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_loss_without_kernels_asks_for_nothing_that_is_refused(device: str) -> None:
    """fp64 runs by ATen on a GPU too."""
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, device=device, requires_grad=True) for n in (6, 11))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        linear_cross_entropy(hidden, weight, torch.arange(6, device=device), reduction="mean")[0].backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert hidden.grad.any() and weight.grad.any()
