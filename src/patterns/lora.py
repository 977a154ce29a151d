"""LoRA as PEFT writes it: a frozen linear layer, and a low-rank product of the same input added to it.

Each projection is one match. Projections that read the same x (q, k and v; gate and up) go into one call of the operator.
"""

import torch
import torch.nn.functional as F

from sloth.kernels.common.ahead import compile_ahead
from sloth.kernels.common.device import device_of
from sloth.kernels.linear.adapter import adapter
from sloth.kernels.linear.gemm import compute_sum_of_products, sum_of_products
from sloth.kernels.linear.gemm_columns import compute_products_in_columns, products_in_columns
from sloth.kernels.linear.gemm_rows import compute_product_in_rows, product_in_rows
from sloth.kernels.linear.lora import can_be_one, lora_linear
from sloth.kernels.linear.lora_grad_b import compute_lora_grad_b, lora_grad_b
from sloth.patterns import mathematics
from sloth.rewriter.compile.direct_calls import called_directly
from sloth.rewriter.compile.passes import accumulates_wide
from sloth.rewriter.graph.value import Value, same_literal, uncast
from sloth.rewriter.match.domain import domain
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.narrow import rounds_once
from sloth.rewriter.plan.side_by_side import made_side_by_side

called_directly(sum_of_products, compute_sum_of_products, compile_ahead)
called_directly(products_in_columns, compute_products_in_columns, compile_ahead)
called_directly(product_in_rows, compute_product_in_rows)
called_directly(lora_grad_b, compute_lora_grad_b, compile_ahead)
accumulates_wide(sum_of_products, where=lambda factors, *_: len(factors) > 2)  # which is fp32 until it is whole
accumulates_wide(product_in_rows)
accumulates_wide(lora_grad_b, first=1)


def is_up_projection(v: Value) -> bool:
    """The second of two linear layers in a row, over fewer channels than both ends have, that is added to something. DoRA's norm
    makes one of an identity.
    """
    if v.op != "linear" or (inner := uncast(v.args[0])).op != "linear" or inner.args[2] is not None:
        return False
    thin, wide = mathematics.weight_sizes(inner), mathematics.weight_sizes(v)
    if thin is None or wide is None or thin[0] >= min(thin[1], wide[0]):
        return False
    return uncast(inner.args[0]).op != "eye" and _is_added(v)


def _is_added(v: Value) -> bool:
    return any(u.op == "add" or (u.op == "cast" or u.op == "mul" and _scales(u, v)) and _is_added(u) for u in v.users)


def _scales(product: Value, v: Value) -> bool:
    """Is it multiplied by a number, or one for each channel, and not normalised?"""
    (other,) = [a for a in product.args if a is not v][:1] or [v]
    return not isinstance(other, Value) or all(same_literal(size, 1) for size in other.meta.shape[:-1]) and other is not v


def _calls(module: torch.nn.Module, arguments: dict) -> int:
    """One for each active adapter of a PEFT layer over a linear one."""
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return 0
    return sum(name in module.lora_A for name in module.active_adapters)


LORA = Construct("lora", "LoRA projection", anchor=is_up_projection, module=_calls, mathematics=mathematics.lora)

DIMS = {
    "x": "B S K", "weight": "N K", "bias": "N", "lora_input": "B S K", "a": "2 K", "b": "N 2",
    "base": "B S N", "inner": "B S N", "m": "1 N", "c": "N",
}  # fmt: skip


def delta(lora_input, a, b):
    return F.linear(F.linear(lora_input.to(a.dtype), a), b)


def fused(x, weight, lora_input, a, b, *, scale: float, base_dtype: torch.dtype, delta_dtype: torch.dtype, dtype: torch.dtype):
    base = F.linear(x, weight).to(base_dtype)
    return (base + (delta(lora_input, a, b) * scale).to(delta_dtype)).to(dtype)


def fused_bias(
    x, weight, bias, lora_input, a, b, *, scale: float, base_dtype: torch.dtype, delta_dtype: torch.dtype, dtype: torch.dtype
):
    base = F.linear(x, weight, bias).to(base_dtype)
    return (base + (delta(lora_input, a, b) * scale).to(delta_dtype)).to(dtype)


def own_input(match):
    """What the adapter reads, where that is not x itself."""
    return None if match.lora_input is match.x else match.lora_input


domain(lora_linear)
domain(adapter)
rounds_once(lora_linear, sums=True)
FROZEN = {"no_grad": ("weight",), "cheap": ("lora_input",)}
lora = pattern(LORA, op=lora_linear, dims=DIMS, **FROZEN, name="lora", variant="linear", lora_input=own_input)(fused)
lora.variant("linear_bias", lora_input=own_input)(fused_bias)


def on_one_buffer(given, matches):
    """On a GPU, where a layer's launches are what its backward pass waits for."""
    x, b = matches[0].x.meta, [m.tensors["b"].meta if "b" in m.tensors else None for m in matches]
    ranks_known = all(isinstance(up.shape[1], int) for up in b if up is not None)
    own = given["bias"], given["lora_input"]
    return device_of(x.device).triton and ranks_known and can_be_one(x, *own, b, given["scale"], given["dtype"] or x.dtype)


made_side_by_side(lora_linear, "side_by_side", on_one_buffer)


@pattern(LORA, op=adapter, dims=DIMS, cheap=("lora_input",), name="adapter", variant="lora", dtype=lambda match: match.dtype)
def onto(base, lora_input, a, b, *, scale: float, delta_dtype: torch.dtype, dtype: torch.dtype):
    """Over a layer that no other entry knows: LLM.int8 on a GPU, other quantisations, a second active adapter."""
    return (base + (delta(lora_input, a, b) * scale).to(delta_dtype)).to(dtype)


@onto.variant("dora", dtype=lambda match: match.dtype)
def dora(base, inner, m, lora_input, a, b, *, scale: float, dtype: torch.dtype):
    return (base + ((m - 1) * inner + m * delta(lora_input, a, b) * scale)).to(dtype)


@onto.variant("bias", dtype=lambda match: match.dtype)
def biased(base, lora_input, a, b, c, *, scale: float, delta_dtype: torch.dtype, dtype: torch.dtype):
    """PEFT's lora_bias=True: of the adapter's second layer."""
    up = F.linear(F.linear(lora_input.to(a.dtype), a), b, c)
    return (base + (up * scale).to(delta_dtype)).to(dtype)


@lora.check
def same_dtype(match):
    match.require(match.x.meta.dtype == match.weight.meta.dtype, "input and weight differ in dtype")
    bias = match.tensors.get("bias", match.weight)  # eager adds one of another dtype where x is not contiguous
    match.require(bias.meta.dtype == match.weight.meta.dtype, "weight and bias differ in dtype")
