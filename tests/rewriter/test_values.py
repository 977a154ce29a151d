"""Values that a formula does not hold for, and copies that are not what they were copied from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_legality import custom, derivative, entry, statuses, x_like  # noqa: F401  (entry is a fixture)
from torch.testing._internal.two_tensor import TwoTensor
from toys import Call, checked, compiled, llama_norm, matched, tables, turned

from sloth.rewriter.backend import listening
from sloth.rewriter.match.domain import has_domain
from sloth.rewriter.match.registry import patterns
from sloth.rewriter.report import MATCHED, Report

COMPLEX = torch.complex64
IDS = torch.arange(6) % 5


def head(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w).flatten(0, 1)


# ---------------------------------------------------------------- copies that are written, through whatever view

COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": lambda x: x.clone(),
    "times one": lambda x: x * 1,
    "plus nothing": lambda x: x + 0,
    "cat of one": lambda x: torch.cat([x]),
    "narrowed and widened": lambda x: x.double().to(x.dtype),
}
WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "diagonal": lambda h: h.diagonal(0, 1, 2).mul_(3.0),
    "view_as_complex": lambda h: torch.view_as_complex(h.view(2, 3, 4, 2)).mul_(1j),
    "as_strided": lambda h: torch.as_strided(h, (4,), (2,)).mul_(3.0),
    "unfold": lambda h: h.unfold(-1, 2, 2).mul_(3.0),
    "movedim": lambda h: h.movedim(0, 1).mul_(3.0),
    "a view of a view": lambda h: h[0].diagonal()[1:].mul_(3.0),
}


PAIRS = [("clone", write) for write in WRITES] + [(copy, "view_as_complex") for copy in COPIES if copy != "clone"]


@pytest.mark.parametrize(("copy", "write"), PAIRS)
def test_a_copy_that_is_written_is_what_was_written(copy: str, write: str) -> None:
    copy, write = COPIES[copy], WRITES[write]

    def fn(m, x):
        h = copy(x)
        write(h)
        return llama_norm(h, m.w), x + 1

    checked(Call(fn), x_like(2, 3, 8))


def test_a_copy_beside_the_one_that_is_written() -> None:
    def fn(m, x):
        h, kept = x.clone(), x.clone()
        h.diagonal(0, 1, 2).mul_(3.0)
        return h * llama_norm(kept, m.w), llama_norm(h, m.v)

    checked(Call(fn), x_like(2, 3, 8))


@torch.library.custom_op("test_values::triple", mutates_args=("x",))
def triple(x: torch.Tensor) -> None:
    x.mul_(3.0)


SILENT: dict[str, Callable[[torch.Tensor], Any]] = {
    "an operator that returns nothing": lambda h: triple(h.detach()),
    "… of a view": lambda h: triple(h.detach().diagonal(0, 1, 2)),
    "a list of tensors": lambda h: torch._foreach_mul_([h.detach()], 2.0),
}


@pytest.mark.parametrize("write", SILENT.values(), ids=SILENT.keys())
def test_writes_that_return_nothing(write: Callable) -> None:
    def fn(m, x):
        h = x.detach() * 2
        n = llama_norm(h, m.w)
        write(h)
        return n + llama_norm(h, m.v)

    checked(Call(fn), x_like(2, 3, 8))


RESULTS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "cast twice": lambda m, n: (h := n.double().float(), h[0].mul_(2), h + n)[-1],
    "transposed twice": lambda m, n: (h := n.mT.contiguous().mT.contiguous(), h[0].mul_(2), h + n)[-1],
    "a view that its layout allows": lambda m, n: n.mT.contiguous().mT.mT.view(-1) * 2,
    "written, and copied before": lambda m, n: (h := n.double().float(), n.mul_(2), h + n)[-1],
}


@pytest.mark.parametrize("use", RESULTS.values(), ids=RESULTS.keys())
def test_a_result_and_copies_of_it(use: Callable) -> None:
    checked(Call(lambda m, x: use(m, llama_norm(x, m.w))), x_like(2, 3, 8))


@pytest.mark.parametrize("pick", [lambda n, h: h, lambda n, h: n])
def test_a_copy_of_a_result_that_is_one_by_its_layout(pick: Callable) -> None:
    def fn(m, x):
        n = llama_norm(x.mT.contiguous().mT, m.w)
        h = n.contiguous()
        pick(n, h).mul_(2)
        return h + n

    checked(Call(fn), x_like(2, 3, 8))


# ---------------------------------------------------------------- domains


def lora(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return turned(x, cos, sin)


def empty(*shape: int) -> torch.Tensor:
    return torch.randn(shape).requires_grad_()


def attended(scale: float) -> Callable[..., torch.Tensor]:
    def fn(q, k, v):
        i = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, i[None] <= i[:, None], scale=scale)

    return fn


def spelled(by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fn(q, k, v):
        i = torch.arange(q.shape[2])
        mask = torch.where(i[None] <= i[:, None], 0.0, torch.finfo(torch.float32).min)
        return F.softmax(by(q @ k.transpose(2, 3)) + mask, -1) @ v

    return fn


SMALLER = {"rms_norm[no_weight]", "cross_entropy[mean_flat]", "cross_entropy[mean_scale_flat]"}  # without what is in question
QKV = tuple(x_like(1, 2, 4, 8) * (i + 1) for i in range(3))
OUTSIDE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "a complex weight": (llama_norm, (x_like(2, 3, 8), x_like(8, dtype=COMPLEX))),
    "a complex LoRA": (lora, tuple(x_like(*s, dtype=COMPLEX) for s in ((2, 3, 8), (8, 8), (2, 8), (8, 2)))),
    "complex q": (rotated, (x_like(1, 2, 3, 8, dtype=COMPLEX), *tables(1, 3, 8))),
    "complex tables": (rotated, (x_like(1, 2, 3, 8), *(t.to(COMPLEX) for t in tables(1, 3, 8)))),
    "an integer weight": (llama_norm, (x_like(2, 3, 8), torch.arange(8))),
    "a norm of nothing": (llama_norm, (empty(2, 3, 0), empty(0))),
    "a norm of no rows": (llama_norm, (empty(0, 3, 8), empty(8))),
    "a layer norm of nothing": (lambda x, w: F.layer_norm(x, (0,), w, w), (empty(2, 3, 0), empty(0))),
    "a gate of nothing": (lambda x, y: F.silu(x) * y, (empty(2, 3, 0), empty(2, 3, 0))),
    "a rotation of no heads": (rotated, (empty(1, 0, 3, 8), *tables(1, 3, 8))),
    "a LoRA of rank 0": (lora, (x_like(2, 3, 8), empty(8, 8), empty(0, 8), empty(8, 0))),
    "a head of no width": (lambda x, w: F.cross_entropy(head(x, w), IDS), (empty(2, 3, 0), empty(5, 0))),
    "a loss of no rows": (lambda x, w: F.cross_entropy(head(x, w), IDS[:0], reduction="sum"), (empty(0, 3, 8), empty(5, 8))),
    "softcap 0": (lambda x, w: F.cross_entropy(torch.tanh(head(x, w) / 0.0) * 0.0, IDS), (x_like(2, 3, 8), x_like(5, 8))),
    "divisor 0": (lambda x, w: F.cross_entropy(head(x, w) / 0.0, IDS), (x_like(2, 3, 8), x_like(5, 8))),
    "scale 0": (attended(0.0), QKV),
    "a negative scale": (attended(-1.0), QKV),
    "an infinite scale": (attended(float("inf")), QKV),
    "spelled, scale 0": (spelled(lambda s: s * 0.0), QKV),
    "spelled, a negative scale": (spelled(lambda s: s * -2.0), QKV),
    "spelled, a negative divisor": (spelled(lambda s: s / -2.0), QKV),
    "spelled, divisor 0": (spelled(lambda s: s / 0.0), QKV),
    "spelled, softcap 0": (spelled(lambda s: torch.tanh(s * 0.5 / 0.0) * 0.0), QKV),
}


@pytest.mark.parametrize(("fn", "args"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_what_no_formula_holds_for_is_left_alone(fn: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> None:
    def real(m, *args):
        out = fn(*args)
        return torch.view_as_real(out) if out.is_complex() else out

    args = tuple(a.detach().requires_grad_(a.requires_grad) for a in args)
    report = checked(Call(real), *args)
    found = {s.variant for s in report.sites if s.status == MATCHED} - SMALLER
    assert not found and "error" not in {s.status for s in report.sites}, report.to_json()


INSIDE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "a negative scale of logits": (lambda x, w: F.cross_entropy(head(x, w) * -2.0, IDS), (x_like(2, 3, 8), x_like(5, 8))),
    "scale 0 of logits": (lambda x, w: F.cross_entropy(head(x, w) * 0.0, IDS), (x_like(2, 3, 8), x_like(5, 8))),
    "a negative softcap": (
        lambda x, w: F.cross_entropy(torch.tanh(head(x, w) / -3.0) * -3.0, IDS), (x_like(2, 3, 8), x_like(5, 8))
    ),
    "a small scale": (attended(1e-3), QKV),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "args"), INSIDE.values(), ids=INSIDE.keys())
def test_what_a_formula_holds_for_is_rewritten(fn: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> None:
    args = tuple(a.detach().requires_grad_(a.requires_grad) for a in args)
    assert matched(checked(Call(lambda m, *args: fn(*args)), *args))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_that_eager_refuses(dtype: torch.dtype) -> None:
    x, w, ids = x_like(2, 3, 8), x_like(5, 8), IDS.to(dtype)
    with listening() as graphs, pytest.raises(Exception):  # noqa: B017  (torch's: of which kind depends on where it notices)
        compiled(lambda x, w, ids: F.cross_entropy(head(x, w), ids))(x, w, ids)
    assert not matched(Report(graphs))


def test_each_operator_of_ours_states_its_domain() -> None:
    assert {p.name for p in patterns() if str(p.op).startswith("sloth.") and not has_domain(p.op)} == set()


# ---------------------------------------------------------------- subclasses


def two(t: torch.Tensor) -> torch.Tensor:
    return TwoTensor(t.detach(), t.detach() * 2).requires_grad_(t.requires_grad)


DRESSED: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], Any]] = {
    "a norm": lambda m, x, w: llama_norm(x * w, m.w),
    "a layer norm": lambda m, x, w: F.layer_norm(x, (8,), w),
    "a gate": lambda m, x, w: F.silu(x) * (x * w),
    "a gate whose operands are plain": lambda m, x, w: F.silu(x) * x + w,
    "a rotation": lambda m, x, w: turned((x * w)[None], *tables(1, 3, 8)),
    "a LoRA": lambda m, x, w: lora(x * w, torch.outer(m.w, m.v).detach(), m.w[None], m.v[:, None]),
    "a head": lambda m, x, w: F.cross_entropy(head(x * w, torch.outer(m.w, m.v)), IDS),
    "attention": lambda m, x, w: attended(0.3)(*[(x * w)[None]] * 3),
}


@pytest.mark.parametrize("fn", DRESSED.values(), ids=DRESSED.keys())
def test_tensors_of_subclasses_that_hold_others(fn: Callable[..., Any]) -> None:
    x, w = x_like(2, 3, 8), two(x_like(8))
    model = Call(fn)
    with listening() as graphs:
        found = compiled(model)(x, w)
    assert isinstance(found, TwoTensor)
    expected = model(x, w)
    torch.testing.assert_close(found.a, expected.a), torch.testing.assert_close(found.b, expected.b)
    report = Report(graphs)
    assert not report.graphs[0].untouched
    read = {s.status for s in report.sites if s.variant not in SMALLER}
    assert read == ({MATCHED} if fn is DRESSED["a gate whose operands are plain"] else {"subclass"}), report.to_json()
