"""Embeddings that are made to require gradients, for reentrant checkpointing's sake, break no graph and lose no gradient."""

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import LlamaConfig, PreTrainedModel

from sloth.integrations.transformers import _hooks
from sloth.zoo.models import tiny_batch, tiny_model


def adapted(breaks: bool = False) -> PreTrainedModel:
    """Frozen embeddings, trained MLPs and transformers' hook. The model may break the graph behind them and in each layer."""
    torch._dynamo.reset()
    model = tiny_model("llama").train()
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" in name)
    model.enable_input_require_grads()
    if breaks:
        for module in (model.model.rotary_emb, *(layer.input_layernorm for layer in model.model.layers)):
            module.register_forward_hook(lambda module, args, out: torch._dynamo.graph_break())
    return model


def gradients(model: PreTrainedModel, function) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    function(**tiny_batch(model, "llama")).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def compiled(model: torch.nn.Module, inner: str = "aot_eager"):
    return torch.compile(model, backend="sloth", options={"sloth.inner_backend": inner})


def test_the_hook_is_known():
    """Others are known where a test of this process has met LLaMA-Factory's wrapper."""
    assert [c.co_name for c in _hooks].count("make_inputs_require_grads") == 1


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_one_graph(reentrant):
    model = adapted()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    expected = gradients(model, model)
    counters.clear()
    got = gradients(model, compiled(model))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert {n for n, g in got.items() if g is not None} == {n for n in expected if "mlp" in n}
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("inner", [pytest.param("aot_eager", marks=pytest.mark.nightly), "eager"])
def test_eager_code_behind_a_break_finds_its_inputs_requiring_gradients(inner):
    """Reentrant checkpointing, run by Python because its layer breaks the graph, would else give no parameter a gradient."""
    model = adapted(breaks=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    expected = gradients(model, model)
    got = gradients(model, compiled(model, inner))
    assert all(got[n] is not None for n in expected if "mlp" in n)
    torch.testing.assert_close(got, expected)


class Embedded(PreTrainedModel):
    """What its embedding's output gives, in several ways."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(8, 4)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids, trained):
        x = self.embedding(ids)
        with torch.no_grad():
            apart = x * 2
        return x + 1, x.detach() + 1, apart, (x > 0), x * trained


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_require_what_they_do_in_eager(grad, inner):
    torch._dynamo.reset()
    model = Embedded(LlamaConfig(attn_implementation="eager")).requires_grad_(False)
    model.enable_input_require_grads()
    given = torch.arange(3), torch.ones(4, requires_grad=True)
    with torch.set_grad_enabled(grad):
        expected = [t.requires_grad for t in model(*given)]
        got = [t.requires_grad for t in compiled(model, inner)(*given)]
    assert got == expected == [grad, False, False, False, grad]


def test_other_backends_and_other_calls_are_left_alone():
    torch._dynamo.reset()

    def own(x):
        y = (x * 2).requires_grad_()
        (z,) = torch.autograd.grad((y**2).sum(), y)
        return z.detach()

    x = torch.ones(3)
    torch.testing.assert_close(compiled(own)(x), own(x))
    seen = []
    model = adapted()

    def other(gm, inputs):
        seen.append(gm)
        return gm.forward

    torch.compile(model, backend=other)(**tiny_batch(model, "llama"))
    assert len(seen) > 1  # it breaks its graph, as without us


@pytest.mark.parametrize("dynamic", [None, True])
def test_warnings_are_said_and_break_nothing(dynamic):
    """As `use_cache=True` beside checkpointing: transformers says so in each forward pass, once in all."""
    logger, said = transformers.utils.logging.get_logger(f"transformers.sloths_test_{dynamic}"), []
    logger.setLevel("WARNING")
    logger.addFilter(lambda record: said.append(record.getMessage()))

    def f(x, k):
        logger.warning_once(f"this is {dynamic}")
        logger.warning_once(f"not known while it is traced: {x.shape[0]}")
        return x.sin() * k

    torch._dynamo.reset()
    run = torch.compile(f, backend="sloth", fullgraph=True, dynamic=dynamic, options={"sloth.inner_backend": "aot_eager"})
    for n in (3, 4):
        torch.testing.assert_close(run(torch.ones(n), 2), 2 * torch.ones(n).sin())
    assert said[0] == f"this is {dynamic}" and said.count(said[0]) == 1
