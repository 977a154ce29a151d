"""Where Triton is not installed, or is broken, everything imports, and a training step takes the ATen formulas."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WITHOUT = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ERROR

sys.meta_path.insert(0, NoTriton())
import importlib, pkgutil, torch
import sloth.kernels
from sloth.kernels.common.device import device_of
from sloth.rewriter.backend import listening
from transformers import LlamaConfig, LlamaForCausalLM

for module in pkgutil.walk_packages(sloth.kernels.__path__, "sloth.kernels."):
    importlib.import_module(module.name)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
sizes["vocab_size"] = 64
model = LlamaForCausalLM(LlamaConfig(**sizes))
ids = torch.randint(0, 64, (2, 8))
batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
found = []
with listening() as reports:
    for call in (model, torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})):
        model.zero_grad()
        loss = call(**batch).loss
        loss.backward()
        found.append([loss, *(p.grad.clone() for p in model.parameters())])
torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
assert not device_of(torch.device("cuda")).triton
assert {s.status for s in reports[0].sites} == {"matched"} and len(reports[0].sites) == 7 and "triton" not in sys.modules
print("same")
"""


@pytest.mark.parametrize(
    "error, warning",
    [
        ("ModuleNotFoundError(\"No module named 'triton'\", name='triton')", ""),
        pytest.param(
            "ImportError('libtriton.so: undefined symbol')",
            "cannot be imported (ImportError: libtriton.so",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["missing", "broken"],
)
def test_everything_imports_and_a_step_is_eagers(error: str, warning: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.replace("ERROR", error)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]
    assert warning in done.stderr and ("Triton" in done.stderr) == bool(warning)
