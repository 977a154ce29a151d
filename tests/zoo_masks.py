"""Every kind of mask in every architecture of the zoo: loss and gradients beside eager's, and what was proven of the masks.

    python -m tests.zoo_masks --out masks.json --dtype bfloat16 [--arch llama mistral+sliding]     # without: all of them

Kinds that only differ in the mask's numbers run one compiled model, as batches do in training. The rewritten graphs are run as
they are: what AOTAutograd makes of them is the zoo's own sweep.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED, Site
from sloth.zoo.measure import MISMATCH, Row, gradient_difference, step
from sloth.zoo.models import Batch, architectures, tiny_batch, tiny_model
from sloth.zoo.sizes import VARIANTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("none", "ones", "right", "left", "packed")


def batch_of(kind: str, model: torch.nn.Module, arch: str = "") -> Batch | None:
    """The call of `tiny_batch` with this mask; the second sequence is padded. None where the model does not take it."""
    batch = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in tiny_batch(model, arch).items()}
    rows, length = len(batch["labels"]), batch["input_ids"].shape[-1]
    at, accepted = torch.arange(length, device=DEVICE).expand(rows, -1), inspect.signature(model.forward).parameters
    if kind == "none":
        return batch
    if kind == "packed":
        restarted = torch.where(at < length // 3, at, at - length // 3)
        return batch | {"position_ids": restarted} if "position_ids" in accepted else None
    ends = torch.tensor([[length], *[[length * 2 // 3]] * (rows - 1)], device=DEVICE)
    mask = torch.ones_like(at) if kind == "ones" else (at < ends).long()
    mask = mask.flip(-1) if kind == "left" else mask
    labels = batch["labels"]
    labels = labels.masked_fill(mask.view(rows, length, *[1] * (labels.dim() - 2)) == 0, -100)
    return batch | {"attention_mask": mask, "labels": labels} if "attention_mask" in accepted else None


def masks(arch: str, dtype: torch.dtype = torch.float32) -> dict[str, Row]:
    """For each kind the row that `agrees` judges, and the sites: of its own, where it was compiled anew."""
    model = tiny_model(arch, dtype).to(DEVICE)
    exact = copy.deepcopy(model).double()
    getattr(exact, "set_experts_implementation", lambda how: None)("eager")  # grouped products have no fp64
    torch._dynamo.reset()
    run = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "eager"})
    rows: dict[str, Row] = {}
    sites: list[Site] = []
    for kind in KINDS:
        if (batch := batch_of(kind, model, arch)) is None:
            continue
        row: Row = {"dtype": str(dtype).removeprefix("torch.")}
        try:
            eager = step(model, model, batch)
        except Exception as e:
            rows[kind] = row | {"eager": f"{type(e).__name__}: {e}"[:200]}
            continue
        with listening() as graphs:
            ours = step(run, model, batch)
        row |= {"loss_difference": abs(ours[0] - eager[0]).item() / abs(eager[0]).item()}
        row["gradient_difference"], row["worst"] = gradient_difference(ours[1], eager[1])
        if not agrees(row) or dtype != torch.float32:
            row["errors"] = [_error(grads, step(exact, exact, batch)[1]) for grads in (ours[1], eager[1])]
        sites = [s for g in graphs for s in g.sites if s.construct == "attention"] or sites
        row["matched"], row["expected"] = sum(s.status == MATCHED for s in sites), len(sites)
        row["why_not"] = Counter(s.reason for s in sites if s.status != MATCHED)
        rows[kind] = row
    return rows


def agrees(row: Row) -> bool:
    """Did the compiled model give eager's loss and gradients?"""
    limit = MISMATCH if row["dtype"] == "float32" else 3e-2
    return row["loss_difference"] < limit and row["gradient_difference"] < limit


def right(row: Row) -> bool:
    """Is it eager's, or no further from fp64 than eager is?"""
    ours, eager = row.get("errors", (0.0, 0.0))
    return agrees(row) or ours <= 1.05 * eager


def _error(grads: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """‖g − g*‖ / ‖g*‖ of all gradients together."""
    error = sum((g.double() - exact[n]).square().sum().item() for n, g in grads.items())
    return (error / sum(g.square().sum().item() for g in exact.values())) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", nargs="*", default=[*architectures(), *VARIANTS])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    for arch in given.arch:
        if arch in rows:
            continue
        try:
            rows[arch] = masks(arch, getattr(torch, given.dtype))
        except Exception as e:
            rows[arch] = {"error": f"{type(e).__name__}: {e}"[:300]}
        given.out.write_text(json.dumps(rows, indent=1))
        print(summary(arch, rows[arch]), flush=True)


def summary(arch: str, rows: dict[str, Any]) -> str:
    """One line for people."""
    if "error" in rows:
        return f"{arch:26} {rows['error'][:100]}"
    told = (
        f"{kind} " + ("not taken" if "eager" in r else f"{'ok' if right(r) else 'WRONG'} {r['matched']}/{r['expected']}")
        for kind, r in rows.items()
    )
    return f"{arch:26} {', '.join(told)} {'; '.join(sorted({w for r in rows.values() for w in r.get('why_not', ())}))[:120]}"


if __name__ == "__main__":
    main()
