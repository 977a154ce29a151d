"""What is a gated MLP, and what only looks like one."""

import torch
import torch.nn.functional as F

from sloth.rewriter.backend import listening


def sites(function, *tensors):
    torch._dynamo.reset()
    with listening() as reports:
        torch.compile(function, backend="sloth", options={"sloth.inner_backend": "eager"})(*tensors)
    return [(s.construct, s.status) for r in reports for s in r.sites]


def test_an_activation_that_is_scaled_is_no_site():
    """Mamba: a convolution's activation times one number for each channel."""
    x, scale = torch.randn(2, 6, 5), torch.randn(6)
    assert sites(lambda x, scale: F.silu(x) * scale[None, :, None], x, scale) == []
    assert sites(lambda x, y: F.silu(x) * y, x, torch.randn(2, 6, 5)) == [("gated_mlp", "matched")]
