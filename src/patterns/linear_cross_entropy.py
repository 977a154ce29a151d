"""A model's head and its loss: a linear layer, what is done to its logits, and cross-entropy, as `cross_entropy.py` spells it.

The logits themselves may be given out beside the loss: they are computed when somebody reads them.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sloth.kernels.linear_cross_entropy import linear_cross_entropy
from sloth.lazy_logits import lazy
from sloth.patterns.cross_entropy import CROSS_ENTROPY, loss, same
from sloth.rewriter.registry import pattern

DIMS = {"hidden": "B*S H", "weight": "V H", "bias": "V", "target": "B*S int64", "items": "int64"}  # flat: rows_of_logits.py


def headed(of_logits: Callable, more: tuple[str, ...]) -> Callable:
    """`of_logits(logits, target, *, …)` of hidden states and weight, and of `more`: a bias, the items a sum is divided by."""

    def reference(hidden, weight, target, *rest, **numbers):
        given = dict(zip(more, rest, strict=True))
        found = of_logits(F.linear(hidden, weight, given.get("bias")), target, **numbers)
        return found / given["items"] if "items" in given else found

    tensors = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("hidden", "weight", "target", *more)]
    numbers = [p for p in inspect.signature(of_logits).parameters.values() if p.kind is p.KEYWORD_ONLY]
    reference.__signature__ = inspect.Signature([*tensors, *numbers])
    return reference


entry = pattern(
    CROSS_ENTROPY,
    op=linear_cross_entropy,
    dims=DIMS,
    deferred=lazy,
    name="linear_cross_entropy",
    variant="mean",
    reduction="mean",
)(headed(loss(same, "mean", False)["plain"], ()))

for _reduction, _more in (("mean", ()), ("sum", ()), ("sum", ("items",))):
    for _prepare in (same, torch.Tensor.float):
        for _name, _reference in loss(_prepare, _reduction, False).items():
            for _bias in ((), ("bias",)):
                if _name == "plain" and (_prepare is not same or (_reduction, _bias, _more) == ("mean", (), ())):
                    continue  # the upcast is there already; the entry's first variant
                if _bias and _name != "plain" or _more and _prepare is not same:
                    continue  # no model does both
                _parts = (_reduction, "" if _name == "plain" else _name, "fp32" if _prepare is not same else "", *_bias, *_more)
                _options = {"scale": lambda match: 1.0 / match.divisor} if _name == "divisor" else {}
                entry.variant("_".join(filter(None, _parts)), reduction=_reduction, **_options)(
                    headed(_reference, (*_bias, *_more))
                )


@entry.check
def _(match):
    match.require(match.hidden.meta.dtype == match.weight.meta.dtype, "hidden states and weight differ in dtype")
    match.require(match.weight.op != "weight_4bit", "its weight is in 4 bits")
