"""Layers of a model that generates, called one by one through one compiled function: the same tokens, and a graph for each kind
of layer, not for each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from test_generation import IDS, KINDS, PADDED, _never, made, tokens
from torch import nn

from sloth.generation import decoder, session
from sloth.generation.by_layer import CALL, ByLayer, LayerCache, run_layer
from sloth.generation.caches import SMALLEST

pytestmark = pytest.mark.filterwarnings("ignore")


def found_in(model: Any, run: Callable[..., Any] = run_layer) -> tuple[ByLayer, Any]:
    """With a cache that has its memory."""
    from transformers import StaticCache

    by_layer = ByLayer(lambda model, inputs: model(**inputs), run, run)
    make_cache = partial(StaticCache, config=model.config, max_cache_len=SMALLEST)
    with torch.no_grad():
        by_layer.find(model, IDS, session._name_of_cache(model), make_cache)
        by_layer.make(cache := make_cache(), len(IDS))
    return by_layer, cache


def graphs_of(model: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[torch.Tensor, list[int]]:
    """Tokens of steps that are never captured, and how many nodes each graph has that Dynamo made for them."""
    sizes: list[int] = []

    def counting(graph: Any, inputs: Any, **options: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph

    monkeypatch.setattr(session, "capture_for", lambda device: _never)
    monkeypatch.setattr(decoder, "ATTEMPTS", 1 << 20)
    torch._dynamo.reset()
    session._compiled.cache_clear()
    assert session.start(model, counting)
    return tokens(model, **given), sizes


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_found(kind: str) -> None:
    model = made(kind, num_hidden_layers=3)
    by_layer, cache = found_in(model)
    assert {module: n for n, module in enumerate(model.model.layers)} == dict(by_layer._parts)
    assert all(part.is_initialized and part.keys.shape[0] == 2 for part in cache.layers)
    assert not any(CALL in vars(m) for m in model.modules())


def test_layers_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the prompt, which has no mask, and one for steps, whatever the number of layers."""
    model = made(num_hidden_layers=3)
    expected = tokens(model)
    found, sizes = graphs_of(model, monkeypatch)
    assert torch.equal(found, expected) and len(sizes) == 2
    session.stop(model)
    assert len(graphs_of(made(num_hidden_layers=1), monkeypatch)[1]) == 2


def test_kinds_of_layers_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a window and without, the first of which fill up, with padding: fewer than one for each layer."""
    model = made("gemma3", num_hidden_layers=8)
    expected = tokens(model, attention_mask=PADDED)
    found, sizes = graphs_of(model, monkeypatch, attention_mask=PADDED)
    assert torch.equal(found, expected) and 4 <= len(sizes) <= 6


def test_what_peft_marks_makes_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's results require a gradient after prepare_model_for_kbit_training, those of layers do not."""
    model = made(num_hidden_layers=3)
    model.enable_input_require_grads()
    expected = tokens(model)
    found, sizes = graphs_of(model, monkeypatch)
    assert torch.equal(found, expected) and len(sizes) == 2


def test_a_layer_of_two_parts() -> None:
    """A module that stands for two layers has no number of its own: such a model's steps are compiled whole."""
    model = made(num_hidden_layers=2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(model.model.layers)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            for layer in self.layers:
                args = layer(*args, **kwargs), *args[1:]
            return args[0]

    whole, (first, second) = model.model, model.model.layers
    whole.layers = nn.ModuleList([Twice()])
    whole.config.num_hidden_layers = 1
    with torch.no_grad():
        cache = session_cache(model, layers=2)
        by_layer = ByLayer(lambda model, inputs: "whole", run_layer, run_layer)
        by_layer.find(model, IDS, session._name_of_cache(model), lambda: cache)
    assert not by_layer._parts and by_layer(model, {}, cache) == "whole"
    assert not any(CALL in vars(m) for m in (first, second))


def session_cache(model: Any, layers: int) -> Any:
    from transformers import StaticCache

    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": layers})
    return StaticCache(config=config, max_cache_len=SMALLEST)


def test_layers_that_are_compiled_by_their_owner() -> None:
    model = made()
    model.model.layers[1].compile(backend="eager")
    call = getattr(model.model.layers[1], CALL)
    by_layer, _ = found_in(model)
    assert not by_layer._parts and getattr(model.model.layers[1], CALL) is call


def test_a_layer_that_its_owner_compiles_later() -> None:
    """Its compiled call is there again once a prompt was read, or was not; no memory of the cache that found layers is kept."""
    model = made()
    by_layer, cache = found_in(model)
    model.model.layers[1].compile(backend="eager")
    call = getattr(model.model.layers[1], CALL)
    with pytest.raises(ZeroDivisionError), by_layer.reading(cache):
        assert getattr(model.model.layers[1], CALL) is not call
        raise ZeroDivisionError
    assert getattr(model.model.layers[1], CALL) is call and CALL not in vars(model.model.layers[0])
    assert not sum(t.untyped_storage().nbytes() for pair in by_layer._empty for t in pair)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_of_one_layer(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run for that layer alone, and no more once it is removed."""
    model = made(num_hidden_layers=3)
    without = tokens(model)
    mlp = model.model.layers[1].mlp
    handle = getattr(mlp, hook)(lambda module, args, *out: -5 * (out or args)[0])
    expected = tokens(model)
    assert not torch.equal(expected, without)
    assert torch.equal(graphs_of(model, monkeypatch)[0], expected)
    handle.remove()
    assert torch.equal(tokens(model), without)


def test_a_model_that_fails_is_left_whole() -> None:
    model = made()
    model.model.layers[1].forward = lambda *args, **kwargs: 1 / 0
    by_layer, _ = found_in(model)
    assert not by_layer._parts and not any(CALL in vars(m) for m in model.modules())


def test_others_call_layers_as_they_are() -> None:
    """Another thread, and calls with another cache or none; nothing is left after an error."""
    calls = []

    def run(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        calls.append(layer)
        return run_layer(layer, args, kwargs)

    model = made()
    by_layer, cache = found_in(model, run)
    name = session._name_of_cache(model)
    with torch.no_grad(), pytest.raises(ZeroDivisionError), by_layer.reading(cache):
        expected = model(IDS).logits
        assert not calls
        found: list[torch.Tensor] = []

        def elsewhere() -> None:
            with torch.no_grad():
                found.append(model(IDS, **{name: session_cache(model, 2)}).logits)

        thread = Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert not calls and torch.allclose(found[0], expected, atol=1e-5)
        assert torch.allclose(model(IDS, **{name: cache}).logits, expected, atol=1e-5)
        assert calls == list(model.model.layers)
        raise ZeroDivisionError
    assert not any(CALL in vars(m) for m in model.modules())


def test_a_part_answers_as_the_cache_does() -> None:
    """One token in the cache's dtypes is written by sloth's operator, others by transformers'."""
    model = made("gemma2", num_hidden_layers=2)
    _, cache = found_in(model)
    token = torch.ones(2, 2, 1, 8)
    for n, given in ((0, token), (1, token), (1, token.expand(2, 2, 3, 8))):
        seen = LayerCache(cache, cache.layers[n])
        before = int(cache.layers[n].cumulative_length)
        keys, values = seen.update(given, 2 * given, 7)
        assert keys is cache.layers[n].keys and values is cache.layers[n].values
        at = slice(before, before + given.shape[2])
        assert keys[:, :, at].eq(1).all() and values[:, :, at].eq(2).all() and keys[:, :, at.stop :].eq(0).all()
        assert int(cache.layers[n].cumulative_length) == at.stop
    part = cache.layers[1]
    part.keys = part.keys.transpose(1, 2).contiguous().transpose(1, 2)
    before = int(part.cumulative_length)
    LayerCache(cache, part).update(3 * token, token, 0)
    assert part.keys[:, :, before].eq(3).all() and int(part.cumulative_length) == before + 1
    assert seen.get_seq_length(0) == cache.get_seq_length(0) and seen.is_compileable == cache.is_compileable
