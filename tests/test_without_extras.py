"""Without the packages of the extras everything imports that does not need them, a model of plain torch is rewritten, and a
command says what to install.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDING = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""
STEP = """
import importlib, pkgutil, torch
import sloth

for module in pkgutil.walk_packages(sloth.__path__, "sloth."):
    if not module.name.startswith(("sloth.__main__", "sloth.zoo.")):
        importlib.import_module(module.name)

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = torch.nn.RMSNorm(16, eps=1e-6), torch.nn.Linear(16, 32, bias=False)

    def forward(self, x, labels):
        return torch.nn.functional.cross_entropy(self.head(self.norm(x)).float(), labels)

model, batch = Block(), {"x": torch.randn(4, 16), "labels": torch.randint(0, 32, (4,))}
report = sloth.explain(model, batch)
found = []
for call in (model, torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})):
    model.zero_grad()
    loss = call(**batch)
    loss.backward()
    found.append([loss, *(p.grad.clone() for p in model.parameters())])
torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
print(*sorted(s.construct for g in report.graphs for s in g.sites if s.status == "matched"), str(report) != "")
assert not {"transformers", "peft", "accelerate", "bitsandbytes", "typer"} & set(sys.modules)
"""


def run(packages: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDING.format(packages=packages) + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_backend_needs_none_of_them() -> None:
    done = run({"transformers", "accelerate", "peft", "bitsandbytes", "trl", "typer", "click"}, STEP)
    assert done.stdout.strip() == "cross_entropy rms_norm True", done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(
    "package, arguments, told",
    [("typer", ["doctor"], "python -m sloth needs typer: pip install 'sloth-compile[cli]'"),
     ("transformers", ["explain", "llama"], "sloth explain needs transformers: pip install 'sloth-compile[hf]'"),
     pytest.param("transformers", ["warm", str(ROOT)], "sloth warm needs transformers: pip install 'sloth-compile[hf]'",
                  marks=pytest.mark.nightly)],
)  # fmt: skip
def test_a_command_says_what_to_install(package: str, arguments: list[str], told: str) -> None:
    done = run({package}, "import runpy\nrunpy.run_module('sloth', run_name='__main__')", *arguments)
    assert done.returncode != 0 and done.stderr.strip() == told, done.stderr[-3000:]


def test_extras_are_what_the_readme_says() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, readme = project["dependencies"], " ".join((ROOT / "README.md").read_text().split())
    assert [d.split(">")[0].split(";")[0] for d in needed] == ["torch", "triton", "sympy", "rich"]
    assert "needs torch, Triton (on Linux), sympy and rich" in readme and "pip install -e '.[all]'" in readme
    assert {"hf", "cli", "all"} <= set(project["optional-dependencies"])
    assert all(project["optional-dependencies"][extra][0] == "sloth-compile[all]" for extra in ("test", "train"))
