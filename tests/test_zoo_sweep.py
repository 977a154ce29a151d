"""Every causal LM of transformers, tiny: `make sweep`. Nothing that trains under aot_eager may fail or differ under sloth."""

import pytest
import torch
from zoo import agrees, architectures, sweep

pytestmark = pytest.mark.sweep


def test_every_architecture(tmp_path):
    rows = sweep(architectures(), tmp_path / "zoo.json", torch.float32)
    bad = {
        arch: row.get("error") or row.get("sloth_error") or row.get("gradient_difference")
        for arch, row in rows.items()
        if row.get("trains")
        and not agrees(row)
        and row.get("aot_eager", {"gradient_difference": 0.0}).get("gradient_difference", 1.0) < 1e-4
    }
    assert len(rows) > 150
    assert not bad
