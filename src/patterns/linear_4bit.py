"""Linear layers over weights that bitsandbytes keeps in 4 bits: how they are written, those without an adapter, and those of few
rows.

bitsandbytes writes the layer as one `gemm_4bit` where its input needs no gradient, and as an autograd function where it does; up
to 0.49 as a dequantisation and a matmul. All reach  linear(x, weight_4bit(…), bias)  in normal form, and `weight_4bit` is written
by `dequantize_4bit`, whose result is not kept for the backward pass. Without gradients, up to 16 rows of x are multiplied with
the packed weight (linear_4bit_rows), their adapters with them; what its kernels are not made for, up to 32 rows, is left to
bitsandbytes.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sloth.compat import installed
from sloth.kernels.common.ahead import compile_ahead
from sloth.kernels.common.device import device_of
from sloth.kernels.linear.dequantize_4bit import (
    NESTED_BLOCK,
    compute_dequantize_4bit,
    compute_dequantize_4bit_together,
    dequantize_4bit,
    dequantize_4bit_together,
    together,
)
from sloth.kernels.linear.linear_4bit_rows import MOST, compute_linear_4bit_rows, linear_4bit_rows, takes
from sloth.kernels.linear.lora import lora_linear
from sloth.patterns.lora import DIMS, LORA, fused, fused_bias
from sloth.rewriter.compile.direct_calls import called_directly
from sloth.rewriter.compile.passes import called_together
from sloth.rewriter.graph.normal_form import rule
from sloth.rewriter.graph.value import Value, uncast
from sloth.rewriter.match.cost import cost
from sloth.rewriter.match.domain import domain
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.notices import log
from sloth.rewriter.plan.materialize import emit
from sloth.rewriter.plan.narrow import rounds_once
from sloth.rewriter.verify.run import exact

OLDEST = (0, 46)
FEW_ROWS = 32  # without gradients bitsandbytes' products of packed weights are faster up to here

emit("weight_4bit", dequantize_4bit)
called_together(dequantize_4bit, dequantize_4bit_together, 3, together)
called_directly(dequantize_4bit, compute_dequantize_4bit, compile_ahead)
called_directly(dequantize_4bit_together, compute_dequantize_4bit_together, compile_ahead)
called_directly(linear_4bit_rows, compute_linear_4bit_rows, compile_ahead)


@rule("bitsandbytes::dequantize_4bit")
def weight_4bit(n, c, packed, absmax, blocksize, quant_type, shape, dtype):
    """dequantize_4bit(p, absmax, …) = weight_4bit(p, absmax, …), with 8-bit scales where absmax is computed from such."""
    scales = (absmax, None, None, None)
    if absmax.op == "add" and isinstance(absmax.args[1], Value):
        for inner, offset in (absmax.args, absmax.args[::-1]):
            if inner.op == "bitsandbytes::dequantize_blockwise" and inner.args[3] == NESTED_BLOCK:
                scales = (inner.args[1], inner.args[0], inner.args[2], offset)
    return _weight(n, packed, scales, blocksize, quant_type, c.meta)


@rule("bitsandbytes::gemm_4bit")
def linear_of_weight_4bit(n, c, x, packed, shape, absmax, blocksize, quant_type, bias, absmax_8bit, code8, offset):
    """gemm_4bit(x, p, …, bias) = linear(x, weight_4bit(p, …), bias)."""
    meta = c.meta._replace(shape=tuple(shape), dtype=x.meta.dtype)
    weight = _weight(n, packed, (absmax, absmax_8bit, code8, offset), blocksize, quant_type, meta)
    return n.call("linear", (x, weight, bias), c.metas)


@exact("bitsandbytes::gemm_4bit")
def product_in_fp64(
    x, packed, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None, *, traced
):
    """linear(x, W, b) in fp64, W made of 4 bits in the dtype that x was traced in."""
    of = torch.ops.bitsandbytes
    absmax, code8, offset = (t if t is None else t.float() for t in (absmax, absmax_code, absmax_offset))
    if absmax_8bit is not None:
        absmax = of.dequantize_blockwise(absmax_8bit, absmax, code8, NESTED_BLOCK, torch.float32) + offset
    weight = of.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, traced)
    return F.linear(x, weight.double(), bias)


def _weight(n, packed, scales, blocksize, quant_type, meta):
    while packed.op in ("view", "permute"):  # one column or one row
        packed = packed.args[0]
    return n.add("weight_4bit", (packed, *scales, blocksize, quant_type, tuple(meta.shape), meta.dtype), meta)


def is_linear_4bit(v: Value) -> bool:
    return v.op == "linear" and v.args[1].op == "weight_4bit"


LINEAR_4BIT = Construct("linear_4bit", "4-bit linear", anchor=is_linear_4bit)
NO_ADAPTER = {"a": None, "b": None, "lora_input": None, "scale": 1.0, "dtype": lambda match: match.x.meta.dtype}


def linear(x, weight):
    return F.linear(x, weight)


def linear_bias(x, weight, bias):
    return F.linear(x, weight, bias)


linear_4bit = pattern(
    LINEAR_4BIT, op=lora_linear, dims=DIMS, no_grad=("weight",), name="linear_4bit", variant="linear", **NO_ADAPTER
)(linear)
linear_4bit.variant("linear_bias", **NO_ADAPTER)(linear_bias)


@linear_4bit.check
def weight_is_4bit(match):
    match.require(match.weight.op == "weight_4bit", "its weight is not in 4 bits")


# ---------------------------------------------------------------- a few rows without gradients, as in generating

PACKED = ("packed", "absmax", "absmax_8bit", "code8", "offset", "blocksize", "quant_type")  # arguments of `weight_4bit`, in order
OF_WEIGHT = {name: (lambda match, i=i: match.weight.args[i] if is_packed(match) else None) for i, name in enumerate(PACKED)}
OF_WEIGHT["rows"] = lambda match: match.weight.meta.shape[0]
rounds_once(linear_4bit_rows, sums=True)
STORED = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)  # dtypes that the bytes of 4-bit weights have
domain(linear_4bit_rows, packed=STORED, absmax_8bit=(torch.uint8,))


def is_packed(match) -> bool:
    return match.weight.op == "weight_4bit"


lora_rows = pattern(LORA, op=linear_4bit_rows, dims=DIMS, name="lora_rows", variant="linear", **OF_WEIGHT)(fused)
lora_rows.variant("linear_bias", **OF_WEIGHT)(fused_bias)
ALONE = OF_WEIGHT | {name: value for name, value in NO_ADAPTER.items() if name != "lora_input"}


linear_rows = pattern(LINEAR_4BIT, op=linear_4bit_rows, dims=DIMS, name="linear_4bit_rows", variant="linear", **ALONE)(linear)
linear_rows.variant("linear_bias", **ALONE)(linear_bias)


@lora_rows.check
@linear_rows.check
def few_rows_of_packed_weights(match):
    match.require(is_packed(match), "its weight is not in 4 bits")
    match.require(kernels_take(match.x.meta, match.weight), "no kernel is made for its device, dtype, sizes or blocks of 4 bits")
    match.require(has_few_rows(match, MOST), "it has many rows, or gradients")
    bias = match.tensors.get("bias", match.x)
    match.require(match.x.meta.dtype == match.weight.meta.dtype == bias.meta.dtype, "input, weight and bias differ in dtype")
    own = match.tensors.get("lora_input", match.x)
    wide = torch.promote_types(own.meta.dtype, match.x.meta.dtype) == own.meta.dtype
    match.require(own is match.x or uncast(own) is match.x and wide, "its adapter reads something else")


def has_few_rows(match, most: int) -> bool:
    """No gradient, and few rows: at most so many, or one token of a number of sequences that is not known, where the kernels take
    such. (Of so many sequences that they are not few, the operator dequantises the weights.)
    """
    shape = match.x.meta.shape
    rows = prod(shape[:-1])
    one = len(shape) == 3 and statically_known_true(shape[1] == 1) and kernels_take(match.x.meta, match.weight)
    few = one and not statically_known_true(rows > MOST) or statically_known_true(rows <= most)
    return few and not any(r.meta.requires_grad for r in match.roots)


def kernels_take(meta, weight: Value) -> bool:
    """Of x, and of a packed weight, but for the number of rows."""
    return takes(meta.dtype, weight.meta.shape[1], weight.args[5]) and device_of(meta.device).triton


@cost(lora_linear)
def few_rows(match):
    """A few rows without gradients, as in generation, are better multiplied with the packed weights, here or by bitsandbytes."""
    x, weight = (match.tensors.get(name) for name in ("x", "weight"))
    if x is None or weight is None or weight.op != "weight_4bit" or not has_few_rows(match, FEW_ROWS):
        return None
    return f"{prod(x.meta.shape[:-1])} rows without gradients"


def _warn_of_old_bitsandbytes() -> None:
    """Before 0.46 its layers were no operators of torch: there is nothing to match."""
    version = installed("bitsandbytes")
    if version is not None and tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        message = "sloth: bitsandbytes %s cannot be traced (0.46 is the oldest that can): its layers are left as they are. %s"
        log.warning(message, version, "pip install -U bitsandbytes")


_warn_of_old_bitsandbytes()
