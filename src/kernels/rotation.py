"""Rotation of pairs of channels, however they are laid out: RoPE in the spellings that `sloth.kernels.rope` does not have.

Shapes   x [..., D] of two dimensions or more; dimension `axis` of it holds positions. Where axis is 0, tables are one for all
         others; else dimension 0 is the batch, and the others are heads.
         cos, sin, cos_second, sin_second [S, h] or [B or 1, S, h] with any strides: a number for each position and pair.
         R = 2 h channels from `start` on are rotated, the others pass through.

Forward  y₁ = c₁·a + first·s₁·b        in fp32, rounded once
         y₂ = c₂·b + second·s₂·a
         (a, b)    the two channels of a pair of x: (i, i + h), or (2i, 2i + 1) where `interleaved`
         (y₁, y₂)  those of the result, likewise where `interleaves`
         first, second ∈ {−1, 1}: (−1, 1) is a rotation, (1, −1) its inverse.
         c₂, s₂ are c₁, s₁ where cos_second and sin_second are not given.

Backward The transpose of a linear map,  da = c₁·dy₁ + second·s₂·dy₂,  db = c₂·dy₂ + first·s₁·dy₁:  the forward with s₁ and s₂,
         first and second, interleaved and interleaves exchanged. cos and sin are functions of the positions: no gradient.
(Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.)

Saved    the tables only.
Layout   of the result: like x's memory order, contiguous, or (of gradients, as the projection before consumes them) positions
         before heads.
Bytes    reads and writes x once; the tables, of a position's h pairs, stay in cache for its heads.
"""

import torch

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import compute_dtype, launch, triton_op
from sloth.kernels.rope import NUM_WARPS, block_heads, blocks, padded, unit_stride

# ---------------------------------------------------------------- Triton


@triton.jit
def _channel(pair, second, START: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    return START + (2 * pair + second if INTERLEAVED else pair + second * HALF)


@triton.jit
def _entries(first_at, second_at, first_p, second_p, pair, second, turned, SECOND: tl.constexpr):
    """Of one token's tables, what belongs to these channels."""
    if not SECOND:
        return tl.load(first_at + pair * first_p, turned, 0.0, eviction_policy="evict_last").to(tl.float32)
    one = tl.load(first_at + pair * first_p, turned & (second == 0), 0.0, eviction_policy="evict_last").to(tl.float32)
    return one + tl.load(second_at + pair * second_p, turned & (second == 1), 0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _turn(x_at, y_at, x_head, y_head, block, heads, c, s, col, own, other, D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS heads of one token."""
    head = block * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    mask = (head < heads) & (col < D)
    x, y = x_at + head * x_head, y_at + head * y_head
    turned = tl.load(x + own, mask, 0.0).to(tl.float32) * c + tl.load(x + other, mask, 0.0).to(tl.float32) * s
    tl.store(y + col, turned.to(y.dtype.element_ty), mask)


@triton.jit
def _rotation_kernel(
    q_ptr, k_ptr, yq_ptr, yk_ptr, c1_ptr, s1_ptr, c2_ptr, s2_ptr, S, H, G,
    q_b, q_h, q_s, k_b, k_h, k_s, yq_b, yq_h, yq_s, yk_b, yk_h, yk_s,
    c1_b, c1_s, c1_p, s1_b, s1_s, s1_p, c2_b, c2_s, c2_p, s2_b, s2_s, s2_p,
    D: tl.constexpr, HALF: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, K_ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, INTERLEAVES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Program (b·S + s, block of heads), of q in the first blocks, of k in the others. Strides are named tensor_dimension."""
    pid = tl.program_id(0).to(tl.int64)
    b, s = pid // S, pid % S
    col = tl.arange(0, BLOCK)[None, :]
    i = col - START
    turned = (i >= 0) & (i < 2 * HALF)
    second = tl.where(turned, i % 2 if INTERLEAVES else (i >= HALF).to(tl.int32), 0)
    pair = tl.where(turned, i // 2 if INTERLEAVES else i - second * HALF, 0)
    other = tl.where(turned, _channel(pair, 1 - second, START, HALF, INTERLEAVED), col)
    own = col
    if INTERLEAVED != INTERLEAVES:
        own = tl.where(turned, _channel(pair, second, START, HALF, INTERLEAVED), col)
    c1_at, s1_at = c1_ptr + b * c1_b + s * c1_s, s1_ptr + b * s1_b + s * s1_s
    c2_at, s2_at = c2_ptr + b * c2_b + s * c2_s, s2_ptr + b * s2_b + s * s2_s
    cos = tl.where(turned, _entries(c1_at, c2_at, c1_p, c2_p, pair, second, turned, SECOND), 1.0)
    sin = _entries(s1_at, s2_at, s1_p, s2_p, pair, second, turned, SECOND) * tl.where(second == 1, LAST, FIRST)
    block, q_blocks = tl.program_id(1), tl.cdiv(H, ROWS)
    if block < q_blocks:
        q, y = q_ptr + b * q_b + s * q_s, yq_ptr + b * yq_b + s * yq_s
        _turn(q, y, q_h, yq_h, block, H, cos, sin, col, own, other, D, ROWS)
    else:
        k, y = k_ptr + b * k_b + s * k_s, yk_ptr + b * yk_b + s * yk_s
        _turn(k, y, k_h, yk_h, block - q_blocks, G, cos, sin, col, own, other, D, K_ROWS)


def rotated_triton(xs, tables, start, interleaved, interleaves, first, second, outs) -> None:
    """Into `outs`; all [B, heads, S, D], one or two."""
    xs = [unit_stride(x) for x in xs]
    (q, yq), (k, yk) = (xs[0], outs[0]), (xs[-1], outs[-1])
    B, H, S, D = q.shape
    G = k.shape[1] if len(xs) > 1 else 0
    SECOND = tables[2] is not tables[0] or tables[3] is not tables[1]
    tables = [t.expand(B, -1, -1) for t in tables]
    strides = [t.stride(d) for t in (q, k, yq, yk) for d in range(3)] + [t.stride(d) for t in tables for d in range(3)]
    rows, k_rows = block_heads(H, D), block_heads(G or 1, D)
    launch(_rotation_kernel)[(B * S, blocks(H, rows) + blocks(G, k_rows))](
        q, k, yq, yk, *tables, S, H, G, *strides,
        D=D, HALF=tables[0].shape[-1], START=start, BLOCK=padded(D), ROWS=rows, K_ROWS=k_rows,
        INTERLEAVED=interleaved, INTERLEAVES=interleaves, FIRST=first, LAST=second, SECOND=SECOND, num_warps=NUM_WARPS,
    )  # fmt: skip


# ---------------------------------------------------------------- ATen


def rotated_aten(xs, tables, start, interleaved, interleaves, first, second, outs) -> None:
    """As rotated_triton."""
    for x, out in zip(xs, outs, strict=True):
        _rotated_one(x, tables, start, interleaved, interleaves, first, second, out)


def _rotated_one(x, tables, start, interleaved, interleaves, first, second, out) -> None:
    """Into `out`; both [B, heads, S, D]."""
    wide = compute_dtype(x, *tables)
    c1, s1, c2, s2 = (t.unsqueeze(1).to(wide) for t in tables)
    h = c1.shape[-1]
    turned = x[..., start : start + 2 * h].to(wide)
    a, b = turned.unflatten(-1, (h, 2)).unbind(-1) if interleaved else turned.unflatten(-1, (2, h)).unbind(-2)
    y1, y2 = a * c1 + b * (first * s1), b * c2 + a * (second * s2)
    y = torch.stack((y1, y2), -1 if interleaves else -2).flatten(-2)
    if 2 * h < x.shape[-1]:
        y = torch.cat((x[..., :start].to(out.dtype), y.to(out.dtype), x[..., start + 2 * h :].to(out.dtype)), -1)
    out.copy_(y)


# ---------------------------------------------------------------- operators

LIKE, CONTIGUOUS, POSITIONS_FIRST = range(3)  # the layout of the result
rotated_for = implementations("sloth::rotate", "sloth::rotate_both", triton=rotated_triton, aten=rotated_aten)


def _arranged(x: torch.Tensor, axis: int) -> torch.Tensor:
    """[B, heads, S, D]"""
    x = x.movedim(axis, -2)
    if x.dim() == 2:
        return x[None, None]
    if x.dim() == 3:
        return x[None] if axis == 0 else x[:, None]
    if axis == 0 and x.dim() > 4:
        return x.flatten(0, -3)[None]
    return x.flatten(1, -3) if x.dim() > 4 else x


def _restored(x: torch.Tensor, shape: torch.Size, axis: int) -> torch.Tensor:
    """Of [B, heads, S, D] the tensor of this shape that was arranged so."""
    if len(shape) == 2:
        return x[0, 0]
    others = [s for d, s in enumerate(shape[:-1]) if d != axis]
    if len(shape) == 3:
        x = x[0] if axis == 0 else x[:, 0]
    elif len(shape) > 4:
        x = x[0].unflatten(0, others) if axis == 0 else x.unflatten(1, others[1:])
    return x.movedim(-2, axis)


def _allocated(x: torch.Tensor, axis: int, layout: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, in memory as `layout` says, and what is written: it, arranged."""
    if layout == POSITIONS_FIRST or x.dim() > 4:
        B, H, S, D = _arranged(x, axis).shape
        into = torch.empty((B, S, H, D), dtype=dtype, device=x.device).transpose(1, 2)
        return _restored(into, x.shape, axis), into
    kept = torch.contiguous_format if layout == CONTIGUOUS else torch.preserve_format
    out = torch.empty_like(x, dtype=dtype, memory_format=kept)
    return out, _arranged(out, axis)


def _rotated(xs, tables, axis, start, how, layout, dtypes) -> list[torch.Tensor]:
    cos, sin, *seconds = tables
    given = [t if t.dim() == 3 else t[None] for t in (cos, sin)]
    given += [one if t is None else t if t.dim() == 3 else t[None] for t, one in zip(seconds, given, strict=True)]
    _check(xs, given, axis, start)
    flat, made = [_arranged(x, axis) for x in xs], [_allocated(x, axis, layout, d) for x, d in zip(xs, dtypes, strict=True)]
    rotated_for(*xs, *given)(flat, given, start, *how, [into for _, into in made])
    return [out.contiguous() if layout == CONTIGUOUS else out for out, _ in made]


def _check(xs, tables, axis: int, start: int) -> None:
    positions, h = tables[0].shape[-2:]
    for t in tables[1:]:
        torch._check(
            t.shape[-2] == positions and t.shape[-1] == h,
            lambda: f"tables differ in shape: {[tuple(t.shape) for t in tables]}",
        )
    for x in xs:
        torch._check(
            0 <= axis < x.dim() - 1 and x.shape[axis] == positions,
            lambda: f"dimension {axis} of x {tuple(x.shape)} is not that of {positions} positions",  # noqa: B023
        )
        torch._check(
            start >= 0 and h > 0 and start + 2 * h <= x.shape[-1],
            lambda: f"{h} pairs from channel {start} on are more than x has: {x.shape[-1]} channels",  # noqa: B023
        )


@triton_op("sloth::rotate", "rope")
def _rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_second: torch.Tensor | None = None,
    sin_second: torch.Tensor | None = None,
    axis: int = 1,
    start: int = 0,
    interleaved: bool = False,
    interleaves: bool = False,
    first: int = -1,
    second: int = 1,
    layout: int = LIKE,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    how = interleaved, interleaves, first, second
    return _rotated([x], (cos, sin, cos_second, sin_second), axis, start, how, layout, [dtype or x.dtype])[0]


@triton_op("sloth::rotate_both", "rope")
def _rotate_both(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_second: torch.Tensor | None = None,
    sin_second: torch.Tensor | None = None,
    axis: int = 1,
    start: int = 0,
    interleaved: bool = False,
    interleaves: bool = False,
    first: int = -1,
    second: int = 1,
    layout: int = LIKE,
    dtype: torch.dtype | None = None,
    k_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    how, dtypes = (interleaved, interleaves, first, second), [dtype or q.dtype, k_dtype or dtype or k.dtype]
    yq, yk = _rotated([q, k], (cos, sin, cos_second, sin_second), axis, start, how, layout, dtypes)
    return yq, yk


rotate = torch.ops.sloth.rotate.default
rotate_both = torch.ops.sloth.rotate_both.default


def _save(ctx, dtypes, tables, how) -> None:
    ctx.dtypes, ctx.how = dtypes, how[:6]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tables)


def _setup(ctx, inputs, output):
    x, *rest = inputs
    _save(ctx, (x.dtype,), rest[:4], rest[4:])


def _setup_both(ctx, inputs, output):
    q, k, *rest = inputs
    _save(ctx, (q.dtype, k.dtype), rest[:4], rest[4:])


def _transposed(ctx) -> tuple:
    """The other arguments with which the operator is its own backward."""
    cos, sin, cos_second, sin_second = ctx.saved_tensors
    axis, start, interleaved, interleaves, first, second = ctx.how
    sines = (sin, None) if sin_second is None else (sin_second, sin)
    return cos, sines[0], cos_second, sines[1], axis, start, interleaves, interleaved, second, first, POSITIONS_FIRST


def _backward(ctx, dy):
    return (None if dy is None else rotate(dy, *_transposed(ctx), ctx.dtypes[0]), *[None] * 12)


def _backward_both(ctx, dq, dk):
    how, (q_dtype, k_dtype) = _transposed(ctx), ctx.dtypes
    need_q, need_k = (need and d is not None for need, d in zip(ctx.needs_input_grad, (dq, dk), strict=False))
    if need_q and need_k:
        dq, dk = rotate_both(dq, dk, *how, q_dtype, k_dtype)
    else:
        dq = rotate(dq, *how, q_dtype) if need_q else None
        dk = rotate(dk, *how, k_dtype) if need_k else None
    return dq, dk, *[None] * 13


_rotate.register_autograd(_backward, setup_context=_setup)
_rotate_both.register_autograd(_backward_both, setup_context=_setup_both)


# ---------------------------------------------------------------- compiled for every target by the tests


def _compile_case(start: int, interleaved: bool, interleaves: bool, second: bool, out: str = "*bf16"):
    pointers = [name for name in _rotation_kernel.arg_names if name.endswith("_ptr")]
    constants = dict(
        D=128, HALF=32, START=start, BLOCK=128, ROWS=8, K_ROWS=8, INTERLEAVED=interleaved, INTERLEAVES=interleaves, FIRST=-1,
        LAST=1, SECOND=second,
    )  # fmt: skip
    signature = {name: "i32" for name in _rotation_kernel.arg_names if name not in pointers and name not in constants}
    signature |= {name: out if name.startswith("y") else "*bf16" for name in pointers}
    return _rotation_kernel, signature, constants, {"num_warps": NUM_WARPS}


COMPILE = [
    _compile_case(0, False, False, False),
    _compile_case(64, True, True, False, out="*fp32"),
    _compile_case(0, True, False, True),
]
