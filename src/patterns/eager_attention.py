"""Attention spelled out: products of queries and keys, an additive mask, softmax, products with values.

The mask is where(m, 0, least), and what m means is proven as for `attention.py`. Added to a score, fp32's or bf16's
least number stays as it is, so a query that sees nothing weighs all keys alike, and the operator is told to do so too.
"""

from collections.abc import Callable
from inspect import Parameter, Signature

import torch
import torch.nn.functional as F

from sloth.kernels.attention import attention
from sloth.patterns.attention import ATTENTION, repeated
from sloth.patterns.mask_meaning import Interval, meaning
from sloth.rewriter.ir import Value, same_literal
from sloth.rewriter.registry import pattern

DIMS = {"query": "B H S D", "key": "B H S D", "value": "B H S E", "mask": "B 1 S S"}
GROUPED = {"query": "B 2*G S D", "key": "B G S D", "value": "B G S E"}
ABSORBS = torch.finfo(torch.bfloat16).min  # a sum with it, or less, is it again, whatever the score
ZEROS = ("zeros", "zeros_like", "new_zeros")


def shown(mask: Value) -> tuple[Value, float] | None:
    """(m, least), if the mask is where(m, 0, least)."""
    while mask.op == "input" and mask.outer is not None:  # passed into the body of a checkpoint
        mask = mask.outer
    if mask.op != "where" or mask.pinned:
        return None
    m, zero, least = mask.args
    is_zero = zero.op in ZEROS and not zero.pinned if isinstance(zero, Value) else zero == 0
    return (m, least) if is_zero and isinstance(least, float) and least <= torch.finfo(mask.meta.dtype).min else None


def told(match) -> Interval | None:
    if "mask" not in match.tensors:
        return Interval()
    found = shown(match.mask)
    return found and meaning(found[0])


def may_see_nothing(interval: Interval) -> bool:
    """Can a query be left without a key? It has itself, unless that is not valid or beyond its bounds."""
    beyond = any(bound is not None and bound < 0 for bound in (interval.ahead, interval.behind))
    return bool(interval.valid) or beyond


def proven(field: str) -> Callable:
    return lambda match: getattr(told(match) or Interval(), field)


TOLD = {field: proven(field) for field in ("documents", "valid", "ahead", "behind")}
TOLD["uniform"] = lambda match: may_see_nothing(told(match) or Interval())


def in_dtype(scores: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.softmax(scores, -1).to(like.dtype)


def in_fp32(scores: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.softmax(scores, -1, dtype=torch.float32).to(like.dtype)


def spelled(weigh: Callable, tensors: str, numbers: str, grouped: bool) -> Callable:
    """The reference with these parameters. A mask, dropout: where it has a parameter of that name."""
    names = ["query", "key", "value", *tensors.split()]

    def reference(*given, **number):
        of = dict(zip(names, given, strict=True))
        query, key, value = given[:3]
        if grouped:
            key, value = (repeated(t, query.shape[1]) for t in (key, value))
        scores = torch.matmul(query, key.transpose(2, 3)) * number["scale"]
        if "mask" in of:
            scores = scores + of["mask"]
        weights = weigh(scores, value)
        if "dropout_p" in number:
            weights = F.dropout(weights, number["dropout_p"])
        return torch.matmul(weights, value)

    parameters = [Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    parameters += [Parameter(n, Parameter.KEYWORD_ONLY, annotation=float) for n in numbers.split()]
    reference.__signature__ = Signature(parameters)
    return reference


entry = pattern(ATTENTION, op=attention, dims=DIMS, name="eager_attention", variant="fp32", **TOLD)(
    spelled(in_fp32, "mask", "scale", grouped=False)
)

for _weigh in (in_fp32, in_dtype):  # Llama; BERT, BART, GPT-2
    for _mask in ("mask", ""):
        for _dropout in ("", "dropout_p"):
            for _grouped in (False, True):
                _name = "_".join(filter(None, (_weigh.__name__[3:], _mask and "", not _mask and "full", _dropout[:7])))
                if _grouped:
                    _name += "_grouped"
                if _name != "fp32":  # the entry's first variant
                    _reference = spelled(_weigh, _mask, f"scale {_dropout}", _grouped)
                    entry.variant(_name, GROUPED if _grouped else None, **TOLD)(_reference)


@entry.check
def _(match):
    interval = told(match)
    match.require(interval is not None, "its mask is not proven to be an interval of keys for each query")
    plain = interval in (Interval(), Interval(ahead=0))
    match.require(match.numbers.get("dropout_p", 0) == 0 or plain, "it has dropout, and its mask is not causal")
    if may_see_nothing(interval):
        least = shown(match.mask)[1]
        match.require(-float("inf") < least <= ABSORBS, f"a query may see nothing, and {least} does not absorb its scores")
    rows, columns = match.query.meta.shape[-2], match.key.meta.shape[-2]
    match.require(same_literal(rows, columns), f"{rows} queries, {columns} keys")
    dtypes = {match.tensors[name].meta.dtype for name in ("query", "key", "value")}
    match.require(len(dtypes) == 1, "queries, keys and values differ in dtype")
