"""sloth.rewriter.compile.plain_inputs: subclasses in Python cost nothing in a compiled step."""

import torch
from torch import nn

from sloth.rewriter.compile.plain_inputs import plain_inputs

asked = []


class Dressed(nn.Parameter):
    """As bitsandbytes' Params4bit: a parameter with a `__torch_function__`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if not torch.compiler.is_compiling():
            asked.append(func)
        return super(nn.Parameter, cls).__torch_function__(func, types, args, kwargs or {})


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))
        self.frozen = Dressed(torch.randn(8, 8), requires_grad=False)

    def forward(self, x):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        return h @ self.frozen.t()


def test_nothing_is_asked_of_them_in_a_step():
    layer, x = Layer(), torch.randn(4, 8)
    expected = layer(x)
    compiled = torch.compile(layer, backend="sloth")
    compiled(x).sum().backward()
    asked.clear()
    found = compiled(x)
    assert not [f for f in asked if getattr(f, "__name__", "") != "__get__"]  # guards look at attributes
    torch.testing.assert_close(found, expected)


def test_what_is_passed():
    frozen, trained, plain = (
        Dressed(torch.randn(3), requires_grad=False), Dressed(torch.randn(3)), nn.Parameter(torch.randn(3))
    )  # fmt: skip
    got = plain_inputs(lambda *args: args)(frozen, trained, plain, 3, None)
    assert type(got[0]) is torch.Tensor and got[0].data_ptr() == frozen.data_ptr()
    assert got[1] is trained and got[2] is plain and got[3:] == (3, None)
