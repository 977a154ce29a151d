"""Equal layers are traced once, and what differs is traced: what comes out is what eager computes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sloth.rewriter.backend import listening
from sloth.rewriter.dynamo import repeated_layers

AOT = {"sloth.inner_backend": "aot_eager"}


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Layer(nn.Module):
    def __init__(self, width: int = 8, scale: float = 1.0):
        super().__init__()
        self.norm, self.linear, self.scale = Norm(width), nn.Linear(width, width), scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.linear(self.norm(x)) * self.scale
        return x + (h if mask is None else h * mask)


class Checkpointed(Layer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, mask, use_reentrant=False)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, masks[i % len(masks)] if masks else None)
        return x.square().mean()


def stack(*scales: float, make: type[Layer] = Layer) -> Stack:
    torch.manual_seed(0)
    return Stack(*(make(scale=s) for s in scales))


def gradients(model: nn.Module, call, *args) -> list[Tensor]:
    model.zero_grad()
    loss = call(*args)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def stamped(model: nn.Module, *args, dynamic: bool | None = None) -> int:
    """How many layers were made of a template, where the step is eager's and each layer has its norm rewritten."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sloth", options=AOT, dynamic=dynamic)
    with mock.patch.object(repeated_layers, "_copied", wraps=repeated_layers._copied) as copied, listening() as reports:
        ours = gradients(model, compiled, *args)
    torch.testing.assert_close(ours, gradients(model, model, *args), rtol=1e-5, atol=1e-6)
    (report,) = reports
    assert sum(s.construct == "rms_norm" and s.status == "matched" for s in report.sites) == len(model.layers)
    return copied.call_count


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dynamic", [None, True])  # True asks for sizes that vary; a scale that is a symbol has no value
@pytest.mark.parametrize("make", [Layer, Checkpointed])
def test_equal_layers_are_traced_once(make: type[Layer], dynamic: bool | None) -> None:
    """But the first, whose input needs no gradient, has a trace of its own."""
    assert stamped(stack(1, 1, 1, 1, 1, make=make), X, dynamic=dynamic) == 3


@pytest.mark.parametrize("make", [Layer, Checkpointed])
def test_another_number_is_another_layer(make: type[Layer]) -> None:
    assert stamped(stack(1, 1, 2, 1, 2, make=make), X) == 2


def test_layers_with_a_hook_are_traced() -> None:
    model = stack(1, 1, 1, 1)
    model.layers[3].linear.register_forward_hook(lambda module, args, out: out * 2)
    assert stamped(model, X) == 1


def test_a_frozen_parameter_is_another_layer() -> None:
    """One without a gradient is not stamped as one that has it."""
    model = stack(1, 1, 1, 1)
    model.layers[2].linear.weight.requires_grad_(False)
    torch._dynamo.reset()
    torch.compile(model, backend="sloth", options=AOT)(X).backward()
    assert [layer.linear.weight.grad is None for layer in model.layers] == [False, False, True, False]


def test_what_layers_are_given_in_turn_is_told_apart() -> None:
    """Masks, say, of layers that look back a window and of those that see all."""
    masks = torch.ones(5, 1), torch.rand(5, 1, generator=torch.Generator().manual_seed(2))
    assert stamped(stack(*[1] * 6), X, masks) == 3


def test_later_layers_have_guards_of_their_own() -> None:
    model = stack(1, 1, 1, 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sloth", options=AOT)
    before = gradients(model, compiled, X)
    model.layers[3].scale = 3.0
    after = gradients(model, compiled, X)
    torch.testing.assert_close(after, gradients(model, model, X), rtol=1e-5, atol=1e-6)
    assert not torch.equal(before[0], after[0])


class OfItsClass(Layer):
    factor = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.factor


class Doubled(OfItsClass):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * 2


def changed_class_attribute(model: nn.Module) -> None:
    OfItsClass.factor = 3.0


def changed_class(model: nn.Module) -> None:
    model.layers[3].__class__ = Doubled


def changed_classes(model: nn.Module) -> None:
    """The template's layer too, to another one than the later."""
    model.layers[1].__class__ = model.layers[2].__class__ = Doubled


def own_attribute(model: nn.Module) -> None:
    """Of the object, where that of its class was read."""
    model.layers[3].factor = 5.0


@pytest.mark.parametrize("change", [changed_class_attribute, changed_class, changed_classes, own_attribute])
def test_what_layers_have_of_their_class_is_guarded(change) -> None:
    """For the template's layer; of later ones, that they are of the same class."""
    with mock.patch.object(OfItsClass, "factor", 1.0):
        model = stack(1, 1, 1, 1, 1, make=OfItsClass)
        assert stamped(model, X) == 3
        compiled = torch.compile(model, backend="sloth", options=AOT)
        before = gradients(model, compiled, X)
        change(model)
        after = gradients(model, compiled, X)
        torch.testing.assert_close(after, gradients(model, model, X), rtol=1e-5, atol=1e-6)
        assert not torch.equal(before[0], after[0])


def guards_of_a_template(model: nn.Module) -> list:
    kept = []
    stamp = repeated_layers.stamp

    def keeping(template, *args):
        made = stamp(template, *args)
        kept.append(template.guards)
        return made

    torch._dynamo.reset()
    with mock.patch.object(repeated_layers, "stamp", keeping):
        torch.compile(model, backend="sloth", options=AOT)(X)
    return kept[0]


def test_nothing_is_asked_twice() -> None:
    guards = guards_of_a_template(stack(1, 1, 1, 1, make=OfItsClass))
    asked = [(g.name, g.create_fn_name(), getattr(g.create_fn, "keywords", {}), getattr(g.create_fn, "args", ())) for g in guards]
    assert all(asked.count(one) == 1 for one in asked)
    of_types = [(name, kind) for name, kind, *_ in asked if name.startswith("type(")]
    assert 0 < len(of_types) < len(asked) / 3, of_types


@pytest.mark.parametrize("skipped", [True, False])
def test_guards_on_hooks_are_those_that_torch_makes(skipped: bool) -> None:
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=skipped):
        kinds = {g.create_fn_name() for g in guards_of_a_template(stack(1, 1, 1, 1))}
    assert ("EMPTY_NN_MODULE_HOOKS_DICT" in kinds) != skipped


def test_other_backends_trace_as_ever() -> None:
    model = stack(1, 1, 1, 1)
    torch._dynamo.reset()
    with mock.patch.object(repeated_layers, "stamp") as stamp:
        torch.compile(model, backend="aot_eager")(X)
    assert not stamp.called


def test_a_compilation_that_failed_keeps_no_module_alive_and_is_not_counted() -> None:
    """Modules are counted while they are traced; ids of compilations begin anew with a reset."""
    import gc
    import weakref

    class Failing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            y = self.inner(x)
            torch._dynamo.graph_break()
            return y

    torch._dynamo.reset()
    model = Failing()
    inner = weakref.ref(model.inner)
    with pytest.raises(Exception, match="graph_break"):
        torch.compile(model, backend="sloth", fullgraph=True)(torch.ones(2, 4))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert inner() is None
