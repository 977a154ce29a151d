"""sloth.rewriter.compile.direct_calls: compiled code calls these operators as Python functions, with the same results."""

from __future__ import annotations

import bitsandbytes  # noqa: F401  (its operators compute on a CPU)
import pytest
import torch
from torch._inductor.utils import run_and_get_code

from sloth.kernels.linear.dequantize_4bit import dequantize_4bit, dequantize_4bit_together
from sloth.kernels.linear.gemm import sum_of_products
from sloth.kernels.linear.gemm_columns import products_in_columns
from sloth.kernels.linear.gemm_rows import product_in_rows
from sloth.kernels.linear.linear_4bit_rows import linear_4bit_rows
from sloth.kernels.linear.lora_grad_b import lora_grad_b
from sloth.kernels.loss.linear_cross_entropy import linear_cross_entropy_forward
from sloth.rewriter.backend import patterns
from sloth.rewriter.compile import direct_calls
from sloth.rewriter.compile.direct_calls import called_directly

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def packed(n: int, k: int) -> tuple:
    return torch.randint(256, (n * k // 2, 1), dtype=torch.uint8, device=DEVICE), torch.rand(n * k // 64, device=DEVICE)


PLAIN = (None, None, None, 64, "nf4")
CASES = {
    sum_of_products: lambda: ([matrix(48, 16), matrix(48, 64)], [matrix(16, 32), matrix(64, 32)], [0.5, 1.0], matrix(32)),
    products_in_columns: lambda: (matrix(48, 16), matrix(16, 48), matrix(48, 64), [matrix(32, 64).t(), matrix(16, 64).t()], 0.5),
    product_in_rows: lambda: (matrix(48, 32).t(), matrix(48, 64), [16, 16], 1.0, torch.float32),
    lora_grad_b: lambda: ([matrix(48, 32)], [matrix(32, 16)], matrix(48, 16), [0.5]),
    linear_cross_entropy_forward: lambda: (
        matrix(48, 64), matrix(96, 64), None, None, None, torch.arange(48, device=DEVICE), torch.tensor(40.0, device=DEVICE),
        -100, "sum", None, 1.0, None, 0.0, 0.0, 1.0, [True, False, False, False, False], 0
    ),
    linear_4bit_rows: lambda: (
        matrix(2, 64), *([t] for t in packed(16, 64)), *([[None]] * 4), [matrix(8, 64)], [matrix(16, 8)], [0.5], [16], 64, "nf4"
    ),
    dequantize_4bit: lambda: (*packed(16, 64), *PLAIN, [16, 64], torch.bfloat16),
    dequantize_4bit_together: lambda: (
        *map(list, zip(packed(16, 64), packed(8, 64), strict=True)), [], [], [], 64, "nf4", [16, 64, 8, 64], torch.bfloat16
    ),
}  # fmt: skip


def compiled(op, args) -> tuple[list[torch.Tensor], str]:
    """What the operator gives in a compiled graph, whose other results are Inductor's own; and the code."""
    torch._dynamo.reset()

    def fn(*args):
        out = op(*args)
        return [2 * x for x in ([out] if isinstance(out, torch.Tensor) else out)]

    with torch.no_grad():
        out, code = run_and_get_code(torch.compile(fn, backend="sloth"), *args)
    return out, "".join(code)


@pytest.mark.parametrize("op", CASES, ids=str)
def test_called_directly(op):
    args = CASES[op]()
    out, code = compiled(op, args)
    assert f"extern_kernels.{str(op).replace('.', '_')}(" in code and f"= torch.ops.{op}(" not in code
    expected = op(*args)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    torch.testing.assert_close(out, [2 * x for x in expected], rtol=0, atol=0)


def test_each_has_a_case():
    assert patterns() and set(direct_calls._DIRECT) == set(CASES)


def test_entered_while_inductor_is_in_use(monkeypatch):
    """An entry of another package may come late."""
    monkeypatch.setattr(direct_calls, "_DIRECT", dict(direct_calls._DIRECT))
    lib = torch.library.Library("sloth_late", "DEF")
    lib.define("twice(Tensor x, float by=2.0) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl("twice", lambda x, by=2.0: x * by, "CompositeExplicitAutograd")
    torch.library.register_fake("sloth_late::twice", lambda x, by=2.0: torch.empty_like(x), lib=lib)
    op, calls = torch.ops.sloth_late.twice.default, []
    called_directly(op, lambda x, by=2.0: calls.append(by) or x * by)
    x = matrix(4, 8)
    out, _ = compiled(op, (x, 3.0))
    assert calls == [3.0]
    torch.testing.assert_close(out, [6 * x])
