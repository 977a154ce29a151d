"""Causal-LM loss on given logits: fp32 upcast, flattening, cross-entropy; with a softcap or a scale on the logits before it.

The shift of the labels and the division by `num_items_in_batch` stay outside: integers and one scalar.
"""

import torch
import torch.nn.functional as F

from sloth.kernels.cross_entropy import cross_entropy
from sloth.rewriter.ir import Value
from sloth.rewriter.pattern import Construct
from sloth.rewriter.registry import pattern


def is_loss(v: Value) -> bool:
    return v.op == "cross_entropy_loss"


def _calls(module: torch.nn.Module, arguments: dict) -> int:
    return int(hasattr(module, "loss_function") and arguments.get("labels") is not None)


CROSS_ENTROPY = Construct("cross_entropy", "cross-entropy", anchor=is_loss, module=_calls)


def same(logits):
    return logits


def loss(prepare, reduction):
    """`prepare` acts on the logits before the loss."""

    def plain(logits, target, *, ignore_index: int):
        z = prepare(logits).float()
        return F.cross_entropy(z.view(-1, z.shape[-1]), target, ignore_index=ignore_index, reduction=reduction)

    def softcapped(logits, target, *, ignore_index: int, softcap: float):
        z = (torch.tanh(prepare(logits) / softcap) * softcap).float()
        return F.cross_entropy(z.view(-1, z.shape[-1]), target, ignore_index=ignore_index, reduction=reduction)

    def scaled(logits, target, *, ignore_index: int, scale: float):
        z = (prepare(logits) * scale).float()
        return F.cross_entropy(z.view(-1, z.shape[-1]), target, ignore_index=ignore_index, reduction=reduction)

    def divided(logits, target, *, ignore_index: int, divisor: float):
        z = (prepare(logits) / divisor).float()
        return F.cross_entropy(z.view(-1, z.shape[-1]), target, ignore_index=ignore_index, reduction=reduction)

    return {"plain": plain, "softcap": softcapped, "scale": scaled, "divisor": divided}


entry = pattern(
    CROSS_ENTROPY,
    op=cross_entropy,
    dims={"logits": "B S V", "target": "B*S int64"},
    name="cross_entropy",
    variant="mean",
    reduction="mean",
)(loss(same, "mean")["plain"])

for _reduction in ("mean", "sum"):
    for _where, _prepare in (("", same), ("_fp32", torch.Tensor.float)):
        for _name, _reference in loss(_prepare, _reduction).items():
            if _name == "plain" and (_reduction == "mean" or _where):
                continue
            _options = {"scale": lambda match: 1.0 / match.divisor} if _name == "divisor" else {}
            entry.variant(f"{_reduction}_{_name}{_where}", reduction=_reduction, **_options)(_reference)
