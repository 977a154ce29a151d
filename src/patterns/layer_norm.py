"""LayerNorm: PyTorch's operator with and without affine parameters, and Cohere's, which is written out."""

import torch
import torch.nn.functional as F

from sloth.kernels.layer_norm import layer_norm
from sloth.patterns import mathematics
from sloth.patterns.rms_norm import is_centred
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.domain import domain, finite
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern


def is_layer_norm(v: Value) -> bool:
    """PyTorch's operator, or rsqrt(mean((x − mean(x))²) + eps)."""
    if v.op != "rsqrt" or v.args[0].op != "add":
        return v.op == "layer_norm"
    mean = v.args[0].args[0]
    return mean.op == "mean" and mean.args[0].op == "mul" and is_centred(mean.args[0].args[0])


def _calls(module: torch.nn.Module, arguments: dict) -> int:
    name = type(module).__name__
    return int(name.endswith("LayerNorm") and name != "CpmAntLayerNorm")  # which is an RMSNorm


domain(layer_norm, numbers={"eps": finite})
LAYER_NORM = Construct("layer_norm", "LayerNorm", anchor=is_layer_norm, module=_calls, mathematics=mathematics.layer_norm)


@pattern(LAYER_NORM, op=layer_norm, dims={"x": "B S D", "weight": "D", "bias": "D"}, name="layer_norm", variant="affine")
def norm(x, weight, bias, *, eps: float):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@norm.variant("no_bias")
def no_bias(x, weight, *, eps: float):
    return F.layer_norm(x, (x.shape[-1],), weight, None, eps)


@norm.variant("plain")
def no_weight(x, *, eps: float):
    return F.layer_norm(x, (x.shape[-1],), None, None, eps)


@norm.variant("olmo")
def olmo(x, *, eps: float):
    """In fp32, cast back."""
    return F.layer_norm(x.float(), (x.shape[-1],), None, None, eps).to(x.dtype)


def centred(x, eps):
    h = x - x.mean(-1, keepdim=True)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


@norm.variant("cohere")
def cohere(x, weight, *, eps: float):
    """Written out in fp32, no bias."""
    return (weight.float() * centred(x.float(), eps)).to(x.dtype)


def written(x, weight, bias, *, eps: float):
    """Written out in the model's dtype."""
    return weight * centred(x, eps) + bias


def written_no_bias(x, weight, *, eps: float):
    return weight * centred(x, eps)


def written_plain(x, *, eps: float):
    return centred(x, eps)


def cast_back(x, weight, bias, *, eps: float):
    """In fp32; back in the model's dtype, weight and bias."""
    return weight * centred(x.float(), eps).to(x.dtype) + bias


def cast_back_no_bias(x, weight, *, eps: float):
    return weight * centred(x.float(), eps).to(x.dtype)


def cast_back_plain(x, *, eps: float):
    return centred(x.float(), eps).to(x.dtype)


def cast_last(x, weight, bias, *, eps: float):
    """In fp32, weight and bias too."""
    return (weight * centred(x.float(), eps) + bias).to(x.dtype)


def cast_last_no_bias(x, weight, *, eps: float):
    return (weight * centred(x.float(), eps)).to(x.dtype)


def cast_all(x, weight, bias, *, eps: float):
    return (weight.float() * centred(x.float(), eps) + bias.float()).to(x.dtype)


for _form in (
    written, written_no_bias, written_plain, cast_back, cast_back_no_bias, cast_back_plain, cast_last, cast_last_no_bias, cast_all
):  # fmt: skip
    norm.variant(_form.__name__)(_form)
