"""A model's head and its loss: a linear layer, what is done to its logits, and cross-entropy, as `cross_entropy.py` spells it.

The logits themselves may be given out beside the loss: they are computed when somebody reads them.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sloth.kernels.common.ahead import compile_ahead
from sloth.kernels.loss.linear_cross_entropy import (
    compute_linear_cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_forward,
)
from sloth.kernels.loss.linear_cross_entropy_rows import linear_cross_entropy_rows
from sloth.lazy.functions import lazy
from sloth.patterns.lora import LORA
from sloth.patterns.loss.cross_entropy import (
    CROSS_ENTROPY,
    NUMBERS,
    adds_something,
    in_its_own_precision,
    loss,
    of_tokens,
    same,
    smooth,
    weighted,
    with_z_loss,
)
from sloth.rewriter.compile.direct_calls import called_directly
from sloth.rewriter.match.domain import FLOATS, INDICES, INTEGERS, domain, inverse
from sloth.rewriter.match.registry import pattern

called_directly(linear_cross_entropy_forward, compute_linear_cross_entropy, compile_ahead)

DIMS = {  # flat: sliced_logits.py
    "hidden": "B*S H", "weight": "V H", "target": "B*S int64", "bias": "V", "items": "int64", "class_weight": "V",
    "lora_a_out": "B*S 2", "lora_b": "V 2",
}  # fmt: skip
WHOLE = {"hidden": "B S H"}


def adapted(logits, lora_a_out, lora_b, *, up_scale: float, delta_dtype: torch.dtype):
    """With a low-rank adapter on the head, as `lora.py` spells it; lora_a_out: its first layer's result."""
    return (logits + (F.linear(lora_a_out, lora_b) * up_scale).to(delta_dtype)).to(logits.dtype)


def numbers_of(fn: Callable) -> dict[str, inspect.Parameter]:
    return {n: p for n, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}


def headed(of_logits: Callable, more: tuple[str, ...]) -> Callable:
    """`of_logits(logits, target, *, …)` of hidden states and weight, and of `more`: a bias, class weights, items to divide by, an
    adapter.
    """
    own = numbers_of(adapted) if "lora_b" in more else {}

    def reference(hidden, weight, target, *rest, **numbers):
        given = dict(zip(more, rest, strict=True))
        classes = [given["class_weight"]] if "class_weight" in given else []
        logits = F.linear(hidden, weight, given.get("bias"))
        if own:
            logits = adapted(logits, given["lora_a_out"], given["lora_b"], **{n: numbers.pop(n) for n in own})
        found = of_logits(logits, target, *classes, **numbers)
        return found / given["items"] if "items" in given else found

    tensors = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("hidden", "weight", "target", *more)]
    reference.__signature__ = inspect.Signature([*tensors, *numbers_of(of_logits).values(), *own.values()])
    return reference


def with_z_loss_items(hidden, weight, target, items, *, ignore_index: int, z_loss: float):
    logits = F.linear(hidden, weight)
    flat = logits.float().view(-1, logits.shape[-1])
    loss = F.cross_entropy(flat, target, ignore_index=ignore_index, reduction="sum") / items
    return loss + z_loss * logits.logsumexp(dim=-1).to(dtype=loss.dtype).pow(2).mean()


domain(linear_cross_entropy, NUMBERS, target=INDICES, items=FLOATS + INTEGERS)
domain(linear_cross_entropy_rows, NUMBERS, target=INDICES)
HOW = {"dims": DIMS, "no_grad": ("class_weight",), "deferred": lazy, "also": (LORA,)}
ADAPTER = ("lora_a_out", "lora_b")
entry = pattern(CROSS_ENTROPY, op=linear_cross_entropy, **HOW, name="linear_cross_entropy", variant="mean", reduction="mean")(
    headed(loss(same, "mean", False)["plain"], ())
)

for _reduction, _more in (("mean", ()), ("sum", ()), ("sum", ("items",))):
    for _prepare in (same, torch.Tensor.float):
        for _name, _reference in loss(_prepare, _reduction, False).items():
            for _bias in ((), ("bias",)):
                if _name == "plain" and (_prepare is not same or (_reduction, _bias, _more) == ("mean", (), ())):
                    continue  # the upcast is there already; the entry's first variant
                if _bias and _name != "plain" or _more and _prepare is not same:
                    continue  # no model does both
                _parts = (_reduction, "" if _name == "plain" else _name, "fp32" if _prepare is not same else "", *_bias, *_more)
                _options = {"scale": lambda match: inverse(match.divisor)} if _name == "divisor" else {}
                entry.variant("_".join(filter(None, _parts)), reduction=_reduction, **_options)(
                    headed(_reference, (*_bias, *_more))
                )

for _reduction, _more in (("mean", ()), ("sum", ()), ("sum", ("items",))):
    for _name, _reference in loss(same, _reduction, False).items():
        _options = {"scale": lambda match: inverse(match.divisor)} if _name == "divisor" else {}
        _parts = _reduction, "" if _name == "plain" else _name, "adapter", *_more
        if _name == "plain" or (_reduction, _more) != ("sum", ()):
            entry.variant("_".join(filter(None, _parts)), reduction=_reduction, **_options)(
                headed(_reference, (*ADAPTER, *_more))
            )
    entry.variant("_".join((_reduction, "bias", "adapter", *_more)), reduction=_reduction)(
        headed(loss(same, _reduction, False)["plain"], ("bias", *ADAPTER, *_more))
    )

terms = pattern(
    CROSS_ENTROPY, op=linear_cross_entropy, **HOW, name="linear_cross_entropy_terms", variant="mean_smooth", reduction="mean"
)(headed(smooth("mean"), ()))
terms.variant("mean_z_loss", WHOLE, reduction="mean")(headed(with_z_loss, ()))
terms.variant("sum_z_loss_items", WHOLE, reduction="sum")(with_z_loss_items)
terms.variant("mean_z_loss_adapter", WHOLE | {"lora_a_out": "B S 2"}, reduction="mean")(headed(with_z_loss, ADAPTER))

CLASSES = ("class_weight",)
for _reduction, _more in (("mean", ()), ("sum", ()), ("sum", ("items",))):
    for _terms, _classes, _own in (
        (smooth, (), ()), (smooth, (), ("bias",)), (smooth, (), ADAPTER), (weighted, CLASSES, ()), (weighted, CLASSES, ADAPTER),
    ):  # fmt: skip
        if (_reduction, _terms, _own) != ("mean", smooth, ()):  # the first one
            _part = {(): "", ("bias",): "bias", ADAPTER: "adapter"}[_own]
            _name = "_".join(filter(None, (_reduction, _terms.__name__, _part, *_more)))
            terms.variant(_name, reduction=_reduction)(headed(_terms(_reduction), (*_classes, *_own, *_more)))

rows = pattern(CROSS_ENTROPY, op=linear_cross_entropy_rows, **HOW, name="linear_cross_entropy_rows", variant="plain")(
    headed(loss(same, "none", False)["plain"], ())
)

rows.variant("bias")(headed(loss(same, "none", False)["plain"], ("bias",)))
rows.variant("smooth")(headed(smooth("none"), ()))
rows.variant("weighted")(headed(weighted("none"), ("class_weight",)))
rows.variant("tokens", {"target": "B S int64"})(headed(of_tokens, ()))
for _name in ("softcap", "scale"):
    rows.variant(_name)(headed(loss(same, "none", False)[_name], ()))
    rows.variant(f"{_name}_fp32")(headed(loss(torch.Tensor.float, "none", False)[_name], ()))


@rows.check
@terms.check
@entry.check
def of_one_dtype(match):
    match.require(match.hidden.meta.dtype == match.weight.meta.dtype, "hidden states and weight differ in dtype")


@rows.check
@terms.check
@entry.check
def loss_in_its_own_precision(match):
    if "loss_dtype" in match.numbers:
        in_its_own_precision(match, match.hidden)


terms.check(adds_something)
