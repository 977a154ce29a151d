"""Causal-LM loss on given logits: fp32 upcast, flattening, cross-entropy; with a softcap or a scale on the logits before it.

The shift of the labels and the division by `num_items_in_batch` stay outside: integers and one scalar.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F

from sloth.kernels.loss.cross_entropy import cross_entropy
from sloth.kernels.loss.cross_entropy_terms import cross_entropy_terms
from sloth.patterns import mathematics
from sloth.rewriter.graph.normal_form import VIEWS, Call, Normal, rule
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.domain import INDICES, domain, finite, inverse, not_zero
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern


def is_loss(v: Value) -> bool:
    return v.op == "cross_entropy_loss"


def _calls(module: torch.nn.Module, arguments: dict) -> int:
    """A model with a head that is given labels. Asked of the class: wrappers such as PEFT's pass attributes through."""
    headed = hasattr(type(module), "loss_function") and module.get_output_embeddings() is not None
    return int(headed and arguments.get("labels") is not None)


@rule("cross_entropy_loss")
def classes_last(n: Normal, c: Call, logits: Value, target: Value, weight, reduction, *how):
    """loss(z.transpose(1, −1), t) = loss(z, t), both without batch dimensions: classes may stand in dimension 1."""
    below = logits.args[0] if n.near(logits, "cast") else logits
    rank = len(logits.meta.shape)
    if rank < 3 or target.meta.dtype.is_floating_point or not n.near(below, "permute"):
        return None
    if below.args[1] != (0, rank - 1, *range(1, rank - 1)):
        return None
    z = n.cast(below.args[0], logits.meta.dtype)
    rows = prod(z.meta.shape[:-1])
    operands = n.view(z, (rows, z.meta.shape[-1])), n.view(target, (rows,)), weight, reduction, *how
    shape = (rows,) if reduction == 0 else ()
    found = n.call(c.op, operands, (c.meta._replace(shape=shape),))
    views = [x for x in (logits, below, below.args[0]) if x.op in VIEWS]  # the loss does without them
    found.replaces[:] = dict.fromkeys((*found.replaces, *views))
    return n.view(found, c.meta.shape)


CROSS_ENTROPY = Construct("cross_entropy", "cross-entropy", anchor=is_loss, module=_calls, mathematics=mathematics.loss)


def same(logits):
    return logits


def loss(prepare, reduction, flatten):
    """The loss in four spellings. `prepare` acts on the logits first; `flatten`: logits come as [B, S, V], not [N, V].

    loss_dtype: fp32, or that of the logits where nobody casts them.
    """

    def nll(z, target, ignore_index, loss_dtype):
        z = z.to(loss_dtype)
        z = z.view(-1, z.shape[-1]) if flatten else z
        return F.cross_entropy(z, target, ignore_index=ignore_index, reduction=reduction)

    def plain(logits, target, *, ignore_index: int, loss_dtype: torch.dtype):
        return nll(prepare(logits), target, ignore_index, loss_dtype)

    def softcapped(logits, target, *, ignore_index: int, softcap: float, loss_dtype: torch.dtype):
        return nll(torch.tanh(prepare(logits) / softcap) * softcap, target, ignore_index, loss_dtype)

    def scaled(logits, target, *, ignore_index: int, scale: float, loss_dtype: torch.dtype):
        return nll(prepare(logits) * scale, target, ignore_index, loss_dtype)

    def divided(logits, target, *, ignore_index: int, divisor: float, loss_dtype: torch.dtype):
        return nll(prepare(logits) / divisor, target, ignore_index, loss_dtype)

    return {"plain": plain, "softcap": softcapped, "scale": scaled, "divisor": divided}


NUMBERS = {"softcap": not_zero, "scale": finite}
domain(cross_entropy, NUMBERS, target=INDICES)
domain(cross_entropy_terms, NUMBERS, target=INDICES)
LOGITS = {True: {"logits": "B S V", "target": "B*S int64"}, False: {"logits": "N V", "target": "N int64"}}

entry = pattern(CROSS_ENTROPY, op=cross_entropy, dims=LOGITS[True], name="cross_entropy", variant="mean", reduction="mean")(
    loss(same, "mean", True)["plain"]
)

for _reduction in ("mean", "sum"):
    for _flatten in (True, False):
        for _prepare in (same, torch.Tensor.float):
            for _name, _reference in loss(_prepare, _reduction, _flatten).items():
                if _name == "plain" and (_prepare is not same or (_reduction, _flatten) == ("mean", True)):
                    continue  # the upcast is there already; the entry's first variant
                _parts = (
                    _reduction,
                    "" if _name == "plain" else _name,
                    "fp32" if _prepare is not same else "",
                    "" if _flatten else "flat",
                )
                _options = {"scale": lambda match: inverse(match.divisor)} if _name == "divisor" else {}
                entry.variant("_".join(filter(None, _parts)), LOGITS[_flatten], reduction=_reduction, **_options)(_reference)


def smooth(reduction: str) -> Callable:
    def of_logits(logits, target, *, ignore_index: int, label_smoothing: float, loss_dtype: torch.dtype):
        how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        return F.cross_entropy(logits.to(loss_dtype), target, **how)

    return of_logits


def weighted(reduction: str) -> Callable:
    def of_logits(logits, target, class_weight, *, ignore_index: int, label_smoothing: float, loss_dtype: torch.dtype):
        how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        return F.cross_entropy(logits.to(loss_dtype), target, class_weight.to(loss_dtype), **how)

    return of_logits


def with_z_loss(logits, target, *, ignore_index: int, z_loss: float):
    """Bamba: of all tokens, in the logits' dtype."""
    loss = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), target, ignore_index=ignore_index)
    return loss + z_loss * logits.logsumexp(dim=-1).to(dtype=loss.dtype).pow(2).mean()


def of_tokens(logits, target, *, ignore_index: int, loss_dtype: torch.dtype):
    """In the shape of the labels, as where classes stand in dimension 1."""
    nll = F.cross_entropy(logits.to(loss_dtype), target.view(-1), ignore_index=ignore_index, reduction="none")
    return nll.view(target.shape)


HOW = {"dims": {"logits": "B*S V", "target": "B*S int64", "class_weight": "V"}, "no_grad": ("class_weight",)}
terms = pattern(
    CROSS_ENTROPY, op=cross_entropy_terms, **HOW, name="cross_entropy_terms", variant="mean_smooth", reduction="mean"
)(smooth("mean"))  # fmt: skip
terms.variant("mean_z_loss", {"logits": "B S V"}, reduction="mean")(with_z_loss)
terms.variant("tokens", {"target": "B S int64"}, reduction="none")(of_tokens)
for _name, _reference in loss(same, "none", False).items():
    if _name != "divisor":
        terms.variant("_".join(filter(None, ("none", "" if _name == "plain" else _name))), reduction="none")(_reference)
for _reduction in ("mean", "sum", "none"):
    for _terms in (smooth, weighted):
        if (_reduction, _terms) != ("mean", smooth):
            terms.variant(f"{_reduction}_{_terms.__name__}", reduction=_reduction)(_terms(_reduction))


def in_its_own_precision(match, logits):
    """The operators compute in fp32, or in the logits' dtype where that is wider."""
    match.require(match.loss_dtype in (torch.float32, logits.meta.dtype), f"the loss is computed in {match.loss_dtype}")


def adds_something(match):
    there = match.numbers.get("label_smoothing") != 0 or "class_weight" in match.tensors
    match.require(there, "nothing is smoothed or weighted")


@terms.check
@entry.check
def loss_in_its_own_precision(match):
    if "loss_dtype" in match.numbers:
        in_its_own_precision(match, match.logits)


terms.check(adds_something)
