"""RMSNorm as models write it: y = x · rsqrt(mean(x²) + eps) · w, with and without the residual addition before it.

Dtype placement is part of each form: where the variance is taken, and whether the weight multiplies before or after the cast
back.
"""

from inspect import signature

import torch
import torch.nn.functional as F

from sloth.kernels.rms_norm import add_rms_norm, rms_norm
from sloth.patterns import mathematics
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.domain import domain, finite
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.narrow import adds, rounds_once


def is_norm(v: Value) -> bool:
    """rsqrt(mean(x · x) + eps), or of the sum over the last dimension, or PyTorch's own operator."""
    if v.op == "rms_norm":
        return True
    mean = v.args[0].args[0] if v.op == "rsqrt" and v.args[0].op == "add" else None
    averaged = isinstance(mean, Value) and (mean.op == "mean" or mean.op == "sum" and mathematics.of_last(mean))
    square = mean.args[0] if averaged else None
    return square is not None and square.op == "mul" and square.args[0] is square.args[1] and not is_centred(square.args[0])


def is_centred(x: Value) -> bool:
    """x − mean(x): then it is a LayerNorm."""
    return x.op == "sub" and isinstance(x.args[1], Value) and x.args[1].op == "mean"


def _calls(module: torch.nn.Module, arguments: dict) -> int:
    name = type(module).__name__
    return int(name.endswith(("RMSNorm", "L2Norm")) and not name.endswith("GatedRMSNorm"))


RMS_NORM = Construct("rms_norm", "RMSNorm", anchor=is_norm, module=_calls, mathematics=mathematics.rms_norm)


def llama(x, weight, *, eps: float):
    """Variance in fp32; back to the model's dtype, then the weight."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def olmo2(x, weight, *, eps: float):
    """The weight multiplies in fp32, one cast back (also gpt_oss)."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * h).to(x.dtype)


def helium(x, weight, *, eps: float):
    """As olmo2, with the weight cast to fp32 first (also gemma3n, gemma4, moshi)."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * h).to(x.dtype)


def gemma(x, weight, *, eps: float):
    """All in fp32, and the weight is stored as its distance from one."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + weight.float())).type_as(x)


def no_weight(x, *, eps: float):
    """Without a weight (llama4's L2 norm, nanochat)."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def in_dtype(x, weight, *, eps: float):
    """Without a cast."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def in_dtype_no_weight(x, *, eps: float):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def root(x, eps):
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


def root_cast(x, weight, *, eps: float):
    """Only the root is computed in fp32 (cpmant)."""
    return weight * (x * root(x, eps).to(x.dtype))


def root_cast_no_weight(x, *, eps: float):
    """… (deepseek_v4, inkling2)."""
    return x * root(x, eps).to(x.dtype)


def promoted(x, weight, *, eps: float):
    """x itself becomes fp32 by promotion (Baichuan, MiniCPM)."""
    return weight * (x * root(x, eps)).to(x.dtype)


def promoted_olmo2(x, weight, *, eps: float):
    return (weight * (x * root(x, eps))).to(x.dtype)


def promoted_no_weight(x, *, eps: float):
    return (x * root(x, eps)).to(x.dtype)


def unit(x, *, eps: float):
    """Of length 1: the sum in place of the mean (dory)."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)


def unit_in_dtype(x, *, eps: float):
    """… (queries and keys of the gated delta rule)."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps)


def unit_weighted(x, weight, *, eps: float):
    return weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps))


def torch_rms_norm(x, weight, *, eps: float):
    """torch.nn.RMSNorm."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def torch_no_weight(x, *, eps: float):
    """torch.nn.RMSNorm(elementwise_affine=False) (diffllama)."""
    return F.rms_norm(x, (x.shape[-1],), None, eps)


# name → (reference, what the operator is told)
FORMS = {
    "olmo2": (olmo2, {}),
    "helium": (helium, {}),
    "gemma": (gemma, {"offset": 1.0}),
    "no_weight": (no_weight, {}),
    "in_dtype": (in_dtype, {}),
    "in_dtype_no_weight": (in_dtype_no_weight, {}),
    "root_cast": (root_cast, {}),
    "root_cast_no_weight": (root_cast_no_weight, {}),
    "promoted": (promoted, {}),
    "promoted_olmo2": (promoted_olmo2, {}),
    "promoted_no_weight": (promoted_no_weight, {}),
    "unit": (unit, {"summed": True}),
    "unit_in_dtype": (unit_in_dtype, {"summed": True}),
    "unit_weighted": (unit_weighted, {"summed": True}),
    "torch": (torch_rms_norm, {}),
    "torch_no_weight": (torch_no_weight, {}),
}
DIMS = {"x": "B S D", "residual": "B S D", "weight": "D"}


def after_addition(form):
    """The form on h = x + residual; h, the residual stream, is a result too."""

    def both(x, residual, weight, *, eps: float):
        h = x + residual
        return h, form(h, weight, eps=eps)

    def both_no_weight(x, residual, *, eps: float):
        h = x + residual
        return h, form(h, eps=eps)

    return both if "weight" in signature(form).parameters else both_no_weight


norm = pattern(RMS_NORM, op=rms_norm, dims=DIMS, name="rms_norm", variant="llama", promote=True)(llama)
add_norm = pattern(RMS_NORM, op=add_rms_norm, dims=DIMS, name="add_rms_norm", variant="llama", promote=True)(
    after_addition(llama)
)
for _name, (_form, _options) in FORMS.items():
    norm.variant(_name, **_options)(_form)
    add_norm.variant(_name, **_options)(after_addition(_form))


domain(rms_norm, numbers={"eps": finite})
domain(add_rms_norm, numbers={"eps": finite})
rounds_once(rms_norm)
rounds_once(add_rms_norm, result=1)
adds(add_rms_norm, ("x", "residual"))
