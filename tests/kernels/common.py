"""What the operator tests share: the judge, the comparison of an operator with the code it replaces, and strategies.

    @cases
    @given(st.data(), dtypes)
    def test(data, dtype):
        x = data.draw(tensors((4, 8), dtype))
        compare(op, eager, [x, w], grads=[True, False])

The judge itself is sloth.testing's.
"""

import os

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from sloth.testing.judge import (  # noqa: F401  (what the tests of kernels import from here)
    DEVICE,
    LAYOUTS,
    MANY,
    assert_no_worse,
    compare,
    compare_many,
    each_way,
    evaluate,
    make,
    wide,
)  # fmt: skip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _repair_interpreter() -> None:
    """Triton's interpreter cuts fp32 off to bf16, and takes the bits of bf16 for numbers in products of matrices; GPUs round to
    nearest even, and multiply. Bring it in line, so that tests can be exact.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16().view(torch.int16)
            return bits.numpy().view(np.uint16)
        return convert(data, source, target, mode)

    def product(self, a, b, *rest):
        return multiply(self, *(widened(t) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)), *rest)

    def widened(t):
        bits = torch.from_numpy(np.ascontiguousarray(t.data).view(np.int16))
        return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    interpreter._convert_float = rounding
    multiply, interpreter.InterpreterBuilder.create_dot = interpreter.InterpreterBuilder.create_dot, product


_repair_interpreter()

cases = settings()  # 10 examples; 30 in `make nightly`: conftest.py


# ---------------------------------------------------------------- strategies

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**24)


def shapes(last=st.integers(3, 70), rank=(0, 3), side=st.integers(1, 5)):
    """Leading dimensions, `rank` of them, before a last one."""
    leading = st.lists(side, min_size=rank[0], max_size=rank[1])
    return st.tuples(leading, last).map(lambda t: (*t[0], t[1]))


def tensors(shape, dtype, layouts=LAYOUTS, *, salt: int = 0, **how):
    """Strategy: `make(shape, dtype)` in any of `layouts`. Tensors with different `salt` never hold the same values: a gradient
    parallel to its input, say, would cancel to nothing but rounding errors, which can be compared with nothing."""
    return st.builds(lambda layout, seed: make(shape, dtype, layout, 64 * seed + salt, **how), st.sampled_from(layouts), seeds)
