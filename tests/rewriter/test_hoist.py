"""sloth.rewriter.plan.hoist: what layers have in common is computed once, outside of them."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch.utils.checkpoint import checkpoint
from toys import rewritten_graph
from transformers import AutoModelForCausalLM as Auto
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig

from sloth.kernels.attention.attention import attention, attention_bounds

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}


def graph_of(fn, *args, **kwargs) -> fx.GraphModule:
    return rewritten_graph(fn, *args, dynamic=True, **kwargs)


def placed(gm: fx.GraphModule) -> dict[str, int]:
    """How often bounds are computed in the graph itself, and in bodies; how many calls of attention are told them, or not."""
    count = dict.fromkeys(("outside", "inside", "told", "alone"), 0)
    for module in gm.modules():
        for n in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if n.target is attention_bounds:
                count["outside" if module is gm else "inside"] += 1
            elif n.target is attention:
                count["told" if n.args[-1] is not None else "alone"] += 1
    return count


def batch(S: int = 24):
    ids = torch.randint(5, 60, (2, S))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


PACKED = {"input_ids": torch.randint(5, 60, (1, 24)), "position_ids": torch.cat([torch.arange(10), torch.arange(14)])[None]}
KINDS = ["sliding_attention"] * 3 + ["full_attention"]
MODELS = {
    "llama": (LlamaConfig(num_hidden_layers=3, **SIZES), 1),
    "mistral": (MistralConfig(num_hidden_layers=3, sliding_window=8, **SIZES), 1),
    "gemma3": (Gemma3TextConfig(num_hidden_layers=4, sliding_window=8, head_dim=8, layer_types=KINDS, **SIZES), 2),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("given", ["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.covered(1)
def test_once_for_all_layers_with_the_same_mask(name, given, checkpointing):
    config, kinds = MODELS[name]
    model = Auto.from_config(config, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    given = PACKED | {"use_cache": False} if given == "packed" else batch() | {"use_cache": False}
    found = placed(graph_of(model, **given))
    assert found.pop("told") > 0  # of layers that share a body, one call
    assert found == {"outside": kinds, "inside": 0, "alone": 0}


@pytest.mark.nightly
def test_gradients_and_other_lengths():
    model = Auto.from_config(MODELS["gemma3"][0], attn_implementation="sdpa").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sloth", dynamic=True, options={"sloth.inner_backend": "aot_eager"})
    torch._dynamo.utils.counters.clear()
    for S in (24, 31, 17):
        given = batch(S) | {"use_cache": False}
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(**given).loss
            loss.backward()
            grads.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(grads[1], grads[0], rtol=2e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def layer(x, mask):
    q = x.view(2, -1, 4, 8).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask, scale=0.3).transpose(1, 2).reshape(x.shape)


def causal_and(keys):
    at = torch.arange(keys.shape[-1])
    return (at[None] <= at[:, None])[None, None] & keys[:, None, None]


def test_a_body_in_a_body():
    def inner(x, mask):
        return checkpoint(layer, x, mask, use_reentrant=False) + x

    def fn(x, keys):
        mask = causal_and(keys)
        return checkpoint(inner, checkpoint(inner, x, mask, use_reentrant=False), mask, use_reentrant=False)

    keys = torch.rand(2, 12) < 0.8
    found = placed(graph_of(fn, torch.randn(2, 12, 32, requires_grad=True), keys))
    assert found == {"outside": 1, "inside": 0, "told": 2, "alone": 0}


def test_what_a_body_computes_itself_stays_in_it():
    def inner(x, keys):
        return layer(x, causal_and(keys & (x[..., 0] > -9)))

    x, keys = torch.randn(2, 12, 32, requires_grad=True), torch.rand(2, 12) < 0.8
    found = placed(graph_of(lambda x, keys: checkpoint(inner, x, keys, use_reentrant=False), x, keys))
    assert found["outside"] == 0 and found["told"] + found["alone"] == 1


def test_a_mask_that_is_written_later_is_read_before():
    def fn(x, keys):
        keys = keys.clone()
        first = layer(x, causal_and(keys))
        keys.logical_not_()
        return first + layer(x, causal_and(keys))

    x, keys = torch.randn(2, 12, 32), torch.rand(2, 12) < 0.5
    keys[:, 0] = True
    torch._dynamo.reset()
    found = torch.compile(fn, backend="sloth", options={"sloth.inner_backend": "eager"})(x, keys)
    torch.testing.assert_close(found, fn(x, keys), equal_nan=True)


def test_a_mask_that_is_written_once_it_has_a_name_is_read_behind_the_writes():
    """Told of its transpose, the operator copies it: what it is told would be of the zeros."""

    def fn(x, keys):
        written = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
        mask = written.mT
        written[..., :6, :] = keys[:, None, :6, None]
        return layer(x, mask)

    x, keys = torch.randn(2, 12, 32), torch.rand(2, 12) < 0.5
    keys[:, 0] = True
    torch._dynamo.reset()
    found = torch.compile(fn, backend="sloth", options={"sloth.inner_backend": "eager"})(x, keys)
    torch.testing.assert_close(found, fn(x, keys))


def test_one_query():
    """A single position: its length cannot be told from the batch in a mask's shape."""
    x, keys = torch.randn(2, 1, 32), torch.tensor([[True], [False]])
    torch._dynamo.reset()
    found = torch.compile(lambda x, keys: layer(x, causal_and(keys)), backend="sloth", options={"sloth.inner_backend": "eager"})
    torch.testing.assert_close(found(x, keys), layer(x, causal_and(keys)), equal_nan=True)


def test_bodies_are_given_what_they_read():
    """Each call has an argument for each input; what only the call of the operator read is no input any more."""

    def fn(x, keys):
        mask = causal_and(keys)
        return checkpoint(layer, checkpoint(layer, x, mask, use_reentrant=False), mask, use_reentrant=False)

    gm = graph_of(fn, torch.randn(2, 12, 32, requires_grad=True), torch.rand(2, 12) < 0.8)
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and any(a.op == "get_attr" for a in n.all_input_nodes)]
    assert len(calls) == 2
    for call in calls:
        body, *given = call.args
        inputs = getattr(gm, body.target).graph.find_nodes(op="placeholder")
        assert len(inputs) == len(given)
        added = [n for n in inputs if "_passed" in n.name]
        assert added and all(n.users for n in added)
        outer = dict(zip(inputs, given, strict=True))
        assert all(outer[n].target is operator.getitem and outer[n].args[0].target is attention_bounds for n in added)


@pytest.mark.parametrize("depth", [1, 2], ids=["a body", "a body in a body"])
def test_what_nobody_reads_any_more_is_not_computed(depth):
    """The mask of [S, S] goes into a checkpoint; attention is told what it means, and it is neither made nor kept."""

    def body(x, mask):
        return layer(x, mask) if depth == 1 else checkpoint(layer, x, mask, use_reentrant=False)

    def fn(x, keys):
        return checkpoint(body, x, causal_and(keys), use_reentrant=False)

    gm = graph_of(fn, torch.randn(2, 12, 32, requires_grad=True), torch.rand(2, 12) < 0.8)
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    assert len(graphs) == 1 + depth
    inputs = [n for graph in graphs if graph is not gm.graph for n in graph.find_nodes(op="placeholder")]
    assert all(n.users for n in inputs if isinstance(n.meta["example_value"], torch.Tensor))
    calls = [n for graph in graphs for n in graph.nodes if any(a.op == "get_attr" for a in n.all_input_nodes)]
    given = [a.meta["example_value"] for call in calls for a in call.args[1:]]
    assert not [x.shape for x in given if isinstance(x, torch.Tensor) and x.shape[-2:] == (12, 12)]


def test_a_function_that_attends_in_both_directions():
    """The backward body of an autograd function is given what was saved and gradients, not what its call is."""

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, keys):
            ctx.save_for_backward(x, keys)
            return layer(x, causal_and(keys))

        @staticmethod
        def backward(ctx, g):
            x, keys = ctx.saved_tensors
            return g * layer(x, causal_and(keys)), None

    keys = torch.rand(2, 12) < 0.8
    keys[:, 0] = True
    x = torch.randn(2, 12, 32, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, keys: Attend.apply(x, keys), backend="sloth", options={"sloth.inner_backend": "aot_eager"})
    for run in (compiled, Attend.apply):
        x.grad, before = None, x.grad
        out = run(x, keys)
        out.sum().backward()
    torch.testing.assert_close(before, x.grad)
