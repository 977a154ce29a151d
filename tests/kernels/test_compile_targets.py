"""Every Triton kernel compiles to machine code for every GPU we mean to run on; no GPU is needed."""

import ast
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import compile_targets
import pytest

import sloth.kernels

pytestmark = pytest.mark.timeout(1800)  # all of them are three minutes of two cores, which other tests want too


def compiled(tier: str) -> list[dict]:
    """The reports of all compilations, made in an interpreter where Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, compile_targets.__file__, tier], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


MARKS = {"nightly": [pytest.mark.nightly], "sweep": [pytest.mark.sweep]}


@pytest.mark.parametrize("tier", [pytest.param(tier, marks=MARKS.get(tier, [])) for tier in compile_targets.TIERS])
def test_compiles(tier):
    reports = compiled(tier)
    failed = [r for r in reports if r["error"]]
    told = (f"{r['module']}[{r['index']}] {r['kernel']} {r['target']} {r['dtype']}: {r['error']}" for r in failed)
    assert reports and not failed, "\n".join(told)
    if tier == "default":
        assert {r["target"] for r in reports} == compile_targets.TARGETS.keys()


@pytest.mark.parametrize(
    "module", [m.name for m in pkgutil.walk_packages(sloth.kernels.__path__, "sloth.kernels.") if not m.name.endswith(".launch")]
)
def test_every_kernel_is_listed(module):
    """Each function that a module launches stands in its COMPILE."""
    module = importlib.import_module(module)
    calls = [call for call in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(call, ast.Call)]
    by_name = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("launch", "launch_cached")]
    launched = {c.args[0].id for c in by_name if isinstance(c.args[0], ast.Name)}
    launched |= {
        c.func.value.id for c in calls if isinstance(c.func, ast.Subscript) and c.func.value.__class__ is ast.Name
    }  # kernel[grid]()
    assert launched <= {entry[0].__name__ for entry in getattr(module, "COMPILE", [])}
