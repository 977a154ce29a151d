"""A token's keys and values written into a cache behind those that are there, which are counted on the device, as in generating:

    keys[:, :, length] = key,  values[:, :, length] = value,  length ← length + 1

Shapes   keys [B, G, T, D] and values [B, G, T, E], contiguous; key [B, G, 1, D], value [B, G, 1, E]; length: one int64.
Dtypes   any; key in that of keys, value in that of values.

Nothing is differentiable. One launch of one program in place of five: all of it reads the length before it is counted up. Of a
great many rows ATen has more programs for what is copied. A cache that is full raises: on a GPU the launch fails, as ATen's does.
Bytes    those of key and value, read once and written once.
"""

import torch
from torch import Tensor

from sloth.kernels.common.device import device_of
from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.faults import falls_back
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import launch_cached, no_derivative

MOST = 65536  # elements of key and value that one program copies
TILE = 4096  # at a time


@triton.jit
def _copy_rows(to_ptr, from_ptr, at, T, rows, b_stride, g_stride, G, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr):
    d = tl.arange(0, BD)
    for start in range(0, rows, TILE // BD):
        row = start + tl.arange(0, TILE // BD)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        given = (row // G).to(tl.int64) * b_stride + (row % G).to(tl.int64) * g_stride
        element = tl.load(from_ptr + given[:, None] + d[None, :], inside)
        tl.store(to_ptr + (row.to(tl.int64) * T + at)[:, None] * D + d[None, :], element, inside)


@triton.jit(do_not_specialize=["T"])
def _write_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, length_ptr, T, rows, G, key_b, key_g, value_b, value_g,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, TILE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    at = tl.load(length_ptr)
    if at < T:
        _copy_rows(keys_ptr, key_ptr, at, T, rows, key_b, key_g, G, D, BD, TILE)
        _copy_rows(values_ptr, value_ptr, at, T, rows, value_b, value_g, G, E, BE, TILE)
        tl.debug_barrier()  # all threads have read it
        tl.store(length_ptr, at + 1)
    elif PTX:
        tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)


# ---------------------------------------------------------------- launches


def _constants(D: int, E: int, ptx: bool) -> dict:
    return {"D": D, "BD": 1 << (D - 1).bit_length(), "E": E, "BE": 1 << (E - 1).bit_length(), "TILE": TILE, "PTX": ptx}


def _triton(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    (B, G, T, D), E = keys.shape, values.shape[3]
    if key.numel() + value.numel() > MOST or max(D, E) > TILE:
        return _aten(keys, values, length, key, value)
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    numbers = [T, B * G, G, *key.stride()[:2], *value.stride()[:2]]
    constants = _constants(D, E, device_of(key.device).ptx)
    launch_cached(_write_kernel, (1,), [key, value, keys, values, length], numbers, constants, num_warps=8)
    return None


def _aten(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    at = length.view(1).clone()  # a view of what is counted up
    keys.index_copy_(2, at, key)
    values.index_copy_(2, at, value)
    length.add_(1)


# ---------------------------------------------------------------- the operator

torch.library.define(
    "sloth::write_token",
    "(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) length, Tensor key, Tensor value) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@falls_back("sloth::write_token", "attention_by_mask")
def compute_write_token(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    """The operator, for operands that were checked when the graph was traced."""
    _write_for(keys, values)(keys, values, length, key, value)


_write_for = implementations("sloth::write_token", triton=_triton, aten=_aten)


def _check(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    no_derivative(keys, values, key, value)
    told = f"write_token: keys {list(keys.shape)}, values {list(values.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    torch._check(keys.dim() == key.dim() == values.dim() == value.dim() == 4, lambda: told)
    for cache, token in ((keys, key), (values, value)):
        torch._check(token.shape[2] == 1 and cache.shape[1] == token.shape[1] and cache.shape[3] == token.shape[3], lambda: told)
    dtypes = f"write_token: {key.dtype} and {value.dtype} for a cache of {keys.dtype} and {values.dtype}"
    torch._check(keys.dtype == key.dtype and values.dtype == value.dtype, lambda: dtypes)
    torch._check(length.numel() == 1 and length.dtype == torch.int64, lambda: "write_token: length is one int64")


@torch.library.impl("sloth::write_token", "CompositeExplicitAutograd")
def write_token_impl(keys, values, length, key, value):
    _check(keys, values, length, key, value)
    told = f"write_token: keys {list(keys.shape)}, values {list(values.shape)}, key {list(key.shape)}"
    fits = keys.shape[0] == values.shape[0] == key.shape[0] == value.shape[0] and keys.shape[2] == values.shape[2]
    torch._check(fits and keys.is_contiguous() and values.is_contiguous(), lambda: told + ", contiguous")
    compute_write_token(keys, values, length, key, value)


@torch.library.register_fake("sloth::write_token")
def write_token_fake(keys, values, length, key, value):
    _check(keys, values, length, key, value)


write_token = torch.ops.sloth.write_token.default
"""write_token(keys, values, length, key, value): all three of the cache are written"""


def _compile_case(D: int, E: int):
    signature = dict.fromkeys(("key_ptr", "value_ptr", "keys_ptr", "values_ptr"), "*bf16") | {"length_ptr": "*i64"}
    signature |= dict.fromkeys(("T", "rows", "G", "key_b", "key_g", "value_b", "value_g"), "i32")
    return _write_kernel, signature, _constants(D, E, ptx=True), {"num_warps": 8}


COMPILE = [_compile_case(128, 128), _compile_case(80, 64)]
