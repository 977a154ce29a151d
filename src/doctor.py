"""`python -m sloth doctor`: what is installed, on which device, what of other packages is touched, and whether it works."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import import_module

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sloth import __version__
from sloth.compat import TESTED, installed, is_tested, window
from sloth.integrations.integration import ON, WAITING, Integration, integrations

MODULES = ("transformers.trainer", "transformers.generation.utils", "peft.utils.integrations", "trl.trainer.utils", "accelerate")


def doctor(console: Console) -> bool:
    """Print the tables; the last line is "ready", or what is missing. Returns whether it is ready."""
    wrong = list(_imported())
    console.print(f"sloth {__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(_packages())
    console.print(_device())
    console.print(_touched(integrations()))
    wrong += [f"{i.module} {i.touches}: {i.state}" for i in integrations() if i.state not in (ON, WAITING)]
    wrong += list(_compiled()) if not wrong else []
    for what in wrong:
        console.print(f"missing: {what}", style="red", markup=False)
    if not wrong:
        console.print("ready", style="green")
    return not wrong


def _imported() -> Iterator[str]:
    """Imports what is installed, so that its integrations show; yields what does not work."""
    for module in ("sloth.rewriter.backend", "sloth.integrations.trl_names", *MODULES):
        package = module.split(".")[0]
        if package != "sloth" and installed(package) is None:
            continue
        try:
            import_module(module)
        except Exception as e:
            yield f"import {module}: {type(e).__name__}: {e}"


def _packages() -> Table:
    table = Table("package", "installed", "tested")
    for package in TESTED:
        found = installed(package)
        mark = "not installed" if found is None else found if is_tested(package, found) else f"{found} (not tested)"
        table.add_row(package, mark, window(package))
    return table


def _device() -> str:
    if not torch.cuda.is_available():
        return "no GPU: operators take their ATen formulas on the CPU"
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}: Triton's kernels"


def _touched(found: list[Integration]) -> Table:
    table = Table("touched", "why", "state", title="other packages")
    for i in found:
        table.add_row(*map(Text, (f"{i.module} {i.touches}", i.why, i.state)))
    return table


def _compiled() -> Iterator[str]:
    """One training step of a norm, compiled whole, against eager."""

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w = (torch.randn(size, device=device, requires_grad=True) for size in ((4, 64), (64,)))
    try:
        from sloth.options import VARIABLE
        from sloth.rewriter.backend import listening

        wanted = torch.autograd.grad(norm(x, w).sin().sum(), (x, w))
        torch.compiler.reset()
        with listening() as reports:
            got = torch.autograd.grad(torch.compile(norm, backend="sloth")(x, w).sin().sum(), (x, w))
        torch.testing.assert_close(got, wanted)
        if [s.status for r in reports for s in r.sites] != ["matched"]:
            said = f" ({VARIABLE}={os.environ[VARIABLE]})" if VARIABLE in os.environ else ""
            yield f"an RMSNorm was compiled, but not rewritten{said}"
    except Exception as e:
        yield f"compiling an RMSNorm: {type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
