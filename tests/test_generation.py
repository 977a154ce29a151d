"""`generate` whose steps are replayed: the same tokens as transformers' own, whatever is asked of it.

CUDA graphs are stood in for (generating.py), and steps are not compiled, but where a test says so.
"""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from generating import StandIn

from sloth.generation import by_layer, decoder, session
from sloth.generation.caches import Caches, bucket, holds_two_dtypes
from sloth.generation.capture import CudaCapture
from sloth.generation.decoder import state_of

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
WINDOW = {"sliding_window": 8}
KINDS = {"llama": ("Llama", {}), "mistral": ("Mistral", WINDOW), "gemma2": ("Gemma2", WINDOW), "gemma3": ("Gemma3", WINDOW)}


def made(kind: str = "llama", **changes: Any) -> Any:
    import transformers

    name, more = KINDS[kind]
    config = getattr(transformers, f"{name}{'Text' * (kind == 'gemma3')}Config")(**SIZES | more | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # tokens depend on what was read
    return model


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Steps of models for which a test calls `session.start` are replayed by this."""
    stand_in = StandIn()
    monkeypatch.setattr(session, "capture_for", lambda device: stand_in)
    uncompiled = lambda model, inputs: model(**inputs), by_layer.run_layer, by_layer.run_layer
    monkeypatch.setattr(session, "_compiled", lambda backend: uncompiled)
    return stand_in


IDS = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(3))
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def tokens(model: Any, ids: torch.Tensor = IDS, **given: Any) -> torch.Tensor:
    torch.manual_seed(7)
    return model.generate(ids, **{"max_new_tokens": 9, "do_sample": False} | given)


def both(graphs: StandIn, model: Any, **given: Any) -> torch.Tensor:
    """transformers' own tokens, which those of graphs are equal to."""
    expected = tokens(model, **given)
    assert session.start(model, lambda: None)
    captured, replayed = graphs.captured, graphs.replayed
    assert torch.equal(tokens(model, **given), expected)
    assert graphs.captured > captured and graphs.replayed > replayed + 2
    return expected


# ---------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("kind", KINDS)
def test_greedy(graphs: StandIn, kind: str) -> None:
    """With left padding, over windows that fill up on the way. Another prompt finds cache and graph."""
    model = made(kind)
    found = both(graphs, model, attention_mask=PADDED)
    assert len(found[:, 5:].unique()) > 4
    captured = graphs.captured
    assert captured == (1 if kind == "llama" else 2)
    other = IDS.flip(0)[:, :3]
    mine = tokens(model, other)
    assert graphs.captured == captured
    session.stop(model)
    assert torch.equal(tokens(model, other), mine)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_256_tokens(graphs: StandIn, kind: str) -> None:
    both(graphs, made(kind), max_new_tokens=256)


def test_few_tokens_are_not_worth_it(graphs: StandIn) -> None:
    """The model's own code, until enough were asked for; or at once, where that is said later."""
    model = made()
    expected = tokens(model)
    for after in (3, 1):
        session.start(model, lambda: None, 20)
        for calls in range(1, 4):
            if calls == after:
                session.start(model, lambda: None)
            assert torch.equal(tokens(model), expected)
            assert (model in session._decoders) and bool(graphs.captured) == (calls >= min(after, 3))
        session.stop(model)
        graphs.captured = 0


def test_who_asks_for_it_gets_it_at_once(graphs: StandIn) -> None:
    """By arguments of `generate`, or not at all by for_inference."""
    from transformers import CompileConfig

    from sloth import FastLanguageModel

    model = made()
    expected = tokens(model)
    session.start(model, lambda: None, 1000)
    assert torch.equal(tokens(model), expected) and not graphs.captured
    asked = {"cache_implementation": "static", "compile_config": CompileConfig(backend="sloth")}
    assert torch.equal(tokens(model, **asked), expected) and graphs.captured
    FastLanguageModel.for_inference(model, replay_steps=False)
    assert model not in session._decoders


def test_who_may_stop_a_step_late(graphs: StandIn) -> None:
    """Where nobody sees the token too many: nothing is drawn, and nothing of the caller's runs in each step."""
    from transformers import LogitsProcessorList

    model, flags = made(), []
    session.start(model, lambda: None)
    session._decoders[model].caches.give_back = lambda held: flags.append(held.sloth_stops_late)
    mine = LogitsProcessorList([Banned()])
    tokens(model)
    tokens(model, do_sample=True)
    tokens(model, logits_processor=mine)
    model.generate(IDS, model.generation_config, mine, max_new_tokens=3)
    assert flags == [True, False, False, False]


class Banned:
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, input_ids[0, -1:], -float("inf"))


ASKED = {
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "own processor": {"logits_processor": [Banned()]},
    "static": {"cache_implementation": "static"},
    "logits": {"max_new_tokens": 6, "min_new_tokens": 6, "eos_token_id": 5},
}


@pytest.mark.parametrize("asked", ASKED)
def test_whatever_is_asked(graphs: StandIn, asked: str) -> None:
    both(graphs, made(), **ASKED[asked])


def test_stops_and_streams(graphs: StandIn) -> None:
    """A criterion of one's own ends it, and a streamer sees each token."""
    from transformers import StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    class Seen(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.values += value.flatten().tolist()

        def end(self) -> None:
            self.values.append(-1)

    def seven(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 12)

    model = made()
    expected = tokens(model, IDS[:1])[:, :12]
    session.start(model, lambda: None)
    seen = Seen()
    found = tokens(model, IDS[:1], max_new_tokens=20, streamer=seen, stopping_criteria=StoppingCriteriaList([seven]))
    assert torch.equal(found, expected) and seen.values == [*expected[0].tolist(), -1] and graphs.replayed


def test_outputs_are_the_callers(graphs: StandIn) -> None:
    """Logits and a cache that were given out stay what they were; a chat goes on from the cache."""
    model = made()
    asked = {"return_dict_in_generate": True, "output_logits": True}
    expected = tokens(model, **asked)
    longer = torch.cat([expected.sequences, IDS], 1)
    plain = tokens(model, longer, max_new_tokens=6)
    session.start(model, lambda: None)
    first = tokens(model, max_new_tokens=9, max_length=None, **asked)
    logits = [t.clone() for t in first.logits]
    cache = first["cache" if "cache" in first else "past_key_values"]
    keys = cache.layers[0].keys.clone()
    tokens(model, IDS + 1, **asked)
    assert torch.equal(cache.layers[0].keys, keys)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, logits, strict=True))
    torch.testing.assert_close(torch.stack(first.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)
    replayed = graphs.replayed
    assert torch.equal(tokens(model, longer, past_key_values=cache, max_new_tokens=6), plain)
    assert graphs.replayed > replayed


def test_a_fresh_cache_that_is_given(graphs: StandIn) -> None:
    from transformers import StaticCache

    model = made()
    expected = tokens(model)
    session.start(model, lambda: None)
    cache = StaticCache(config=model.config, max_cache_len=20)
    assert torch.equal(tokens(model, past_key_values=cache), expected) and graphs.replayed


def test_a_cache_whose_tensors_are_others(graphs: StandIn) -> None:
    """Between two calls, and another address under the same tensor: each is captured anew."""
    model = made()
    plain, expected = made(), []
    session.start(model, lambda: None)
    for of, found in ((plain, expected), (model, [])):
        cache, ids = None, IDS
        for change in (lambda t: t.clone(), lambda t: t.set_(t.clone()), lambda t: t):
            out = tokens(of, ids, past_key_values=cache, return_dict_in_generate=True, max_new_tokens=6)
            cache, ids = out["cache" if "cache" in out else "past_key_values"], out["sequences"]
            found.append(ids)
            for layer in cache.layers if of is model else ():
                layer.keys, layer.values = change(layer.keys), change(layer.values)
    assert all(map(torch.equal, found, expected)) and graphs.captured >= 3


def test_what_was_given_out_is_freed(graphs: StandIn) -> None:
    """A cache ends with the last who holds it, and its graph with it."""
    model = made("mistral")
    session.start(model, lambda: None)
    found = tokens(model, return_dict_in_generate=True)
    cache = weakref.ref(found["cache" if "cache" in found else "past_key_values"])
    assert graphs.replayed and len(session._decoders[model]._known) == 1
    del found
    gc.collect()
    assert cache() is None and not session._decoders[model]._known


# ---------------------------------------------------------------- back and forth


def test_back_to_training(graphs: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were trained meanwhile are generated with, by the same graph; gradients are as before; nothing is left."""
    from sloth import FastLanguageModel

    model = made()
    held = set(vars(model))
    other = made()

    def gradients(of: Any) -> list[torch.Tensor]:
        of.zero_grad()
        of(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in of.parameters()]

    for _ in range(2):
        assert FastLanguageModel.for_inference(model, replay_steps=True) is model
        assert torch.equal(tokens(model), tokens(other))
        captured = graphs.captured
        with torch.no_grad():
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                b.copy_(a.mul_(1.1))
        assert torch.equal(tokens(model), tokens(other)) and graphs.captured == captured
        FastLanguageModel.for_training(model)
        assert model not in session._decoders
        other.train()
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(other), strict=True))
        other.eval()
    assert set(vars(model)) - held <= {"_previous_max_cache_length"}


def test_another_model_is_captured_anew(graphs: StandIn) -> None:
    """Adapters that are switched, merged, scaled; weights that lie elsewhere."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(made(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    base = model.get_base_model()
    session.start(base, lambda: None)
    states, found = [state_of(base)], [tokens(model)]
    assert state_of(base) == states[0]
    layer = base.model.layers[0].self_attn.q_proj

    def another(change: Any) -> None:
        change()
        states.append(state_of(base))
        found.append(tokens(model))

    another(lambda: layer.scaling.update(default=30.0))
    another(lambda: model.base_model.disable_adapter_layers())
    another(lambda: setattr(layer.base_layer, "weight", torch.nn.Parameter(layer.base_layer.weight * 2)))
    assert len(set(states)) == 4
    session.stop(base)
    assert torch.equal(tokens(model), found[-1])
    model.base_model.enable_adapter_layers()
    layer.base_layer.weight.data /= 2
    assert torch.equal(tokens(model), found[1]) and not torch.equal(found[0], found[1])


def test_what_a_model_holds_is_read_by_value() -> None:
    """Numbers of any class, in place of those before; hooks that mark gradients are no change."""
    import numpy as np

    class Scale(float): ...

    base = made()
    layer = base.model.layers[0]
    layer.scaling, layer.factor = {"default": np.float64(0.5)}, Scale(1.0)
    plain = state_of(base)
    layer.scaling["default"] = np.float64(0.5)
    assert state_of(base) == plain
    base.enable_input_require_grads()
    assert state_of(base) == plain
    base.disable_input_require_grads()
    assert state_of(base) == plain
    found = {plain}
    for n in range(20):  # freed numbers leave their addresses to later ones
        layer.scaling["default"], layer.factor = np.float64(n + 1.5), Scale(n + 2.0)
        found.add(state_of(base))
    assert len(found) == 21
    layer.names = []
    empty = state_of(base)
    layer.names = ["default"]
    assert state_of(base) not in found | {empty}


def test_another_dtype(graphs: StandIn) -> None:
    """By autocast, and of the weights: neither graphs nor caches serve it."""
    model, wide = made(), made().double()
    expected = tokens(model)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = tokens(model)
    session.start(model, lambda: None)
    for _ in range(2):
        assert torch.equal(tokens(model), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tokens(model), narrow)
    kinds = 1 + holds_two_dtypes()
    assert graphs.captured == kinds
    assert torch.equal(tokens(model.double()), tokens(wide)) and graphs.captured == kinds + 1


@pytest.mark.skipif(not holds_two_dtypes(), reason="static caches under autocast raise")
def test_weights_that_autocast_casts_are_read_anew(graphs: StandIn) -> None:
    """Autocast keeps casts of weights that train: a graph must not read what was kept before it, and freed."""
    model, fresh = made(), made()
    session.start(model, lambda: None)
    for _ in range(3):
        session.start(fresh, lambda: None)
        found = []
        for each in (model, fresh):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                found.append(tokens(each))
        assert torch.equal(*found)
        session.stop(fresh)
        with torch.no_grad():
            for p in (*model.parameters(), *fresh.parameters()):
                p.copy_(p.roll(1, 0))
    assert graphs.captured == 4


def test_the_backend_alone(graphs: StandIn) -> None:
    """A CompileConfig, and a static cache; without the one nothing is replayed."""
    from transformers import CompileConfig

    model = made()
    expected = tokens(model)
    assert torch.equal(tokens(model), expected) and not graphs.replayed
    asked = {"cache_implementation": "static", "compile_config": CompileConfig(backend="sloth")}
    assert torch.equal(tokens(model, **asked), expected) and graphs.replayed
    assert model not in session._decoders  # as nobody says when it trains


@pytest.mark.parametrize("beside", [True, False])
def test_one_at_a_time(graphs: StandIn, beside: bool) -> None:
    """A call in another thread, or within a call, is transformers' own."""
    from threading import Thread

    model, found = made(), []
    expected = both(graphs, model)
    captured, replayed = graphs.captured, graphs.replayed
    tokens(model)
    alone = graphs.replayed - replayed

    class Meanwhile:
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 8:
                run = Thread(target=lambda: found.append(tokens(model)))
                run.start() if beside else run.run()
                if beside:
                    run.join()
            return scores

    assert torch.equal(tokens(model, logits_processor=[Meanwhile()]), expected) and torch.equal(found[0], expected)
    assert (graphs.captured, graphs.replayed - replayed) == (captured, 2 * alone)
    assert torch.equal(tokens(model), expected) and graphs.replayed - replayed == 3 * alone


def test_caches_are_few() -> None:
    config, caches = made().config, Caches("cpu")
    assert [bucket(n) for n in (1, 256, 257, 2049, 2561, 5000)] == [256, 256, 512, 2560, 3072, 5120]
    taken = [caches.take(config, rows, 20) for rows in (1, 2, 3)]
    for cache in taken:
        caches.give_back(cache)
    assert caches.take(config, 3, 250) is taken[2] and caches.take(config, 1, 250) not in taken
    with torch.inference_mode():  # what is made in it cannot be written without
        assert caches.take(config, 2, 250) is not taken[1]
    assert caches.take(config, 2, 257) is not taken[1] and caches.take(config, 2, 250) is taken[1]


# ---------------------------------------------------------------- what is not fast

LEFT = {
    "beams": ({"num_beams": 2}, "generation mode is beam_search"),
    "own cache": ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
    "chunks": ({"cache_implementation": "static", "prefill_chunk_size": 2}, "the prompt is read in chunks"),
    "no cache": ({"use_cache": False}, "no cache is used"),
}


@pytest.mark.parametrize("left", LEFT)
def test_left_to_transformers(graphs: StandIn, left: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    given, why = LEFT[left]
    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    model = made()
    expected = tokens(model, **given)
    session.start(model, lambda: None)
    with caplog.at_level(logging.INFO, "sloth"):
        assert torch.equal(tokens(model, **given), expected) and torch.equal(tokens(model, **given), expected)
    assert [r.getMessage() for r in caplog.records if why in r.getMessage()] == [
        f"sloth: generating runs the model's own code: {why}"
    ]
    assert not graphs.captured


TRAINING = {
    "dropout": (lambda model: setattr(model.model.layers[0].self_attn, "attention_dropout", 0.5), "attention_dropout is 0.5"),
    "checkpointing": (lambda model: model.gradient_checkpointing_enable(), "checkpointing keeps no cache"),
    "noise": (lambda model: setattr(model.model.embed_tokens, "neftune_noise_alpha", 5), "neftune_noise_alpha is 5"),
    "by adapter": (lambda model: setattr(model.model.layers[1], "rank_dropout", {"default": 0.1}), "rank_dropout is {"),
    "config": (lambda model: setattr(model.config, "dropout", 0.1), "config.dropout is 0.1"),
    "statistics": (lambda model: model.add_module("norm", torch.nn.BatchNorm1d(3)), "norm takes its statistics"),
}


@pytest.mark.parametrize("left", TRAINING)
def test_training_mode_where_it_changes_something(
    graphs: StandIn, left: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    change, why = TRAINING[left]
    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    model = made().train()
    change(model)
    session.start(model, lambda: None)
    with caplog.at_level(logging.INFO, "sloth"), torch.no_grad():
        tokens(model)
    assert "the model is in training mode, where " in caplog.text and why in caplog.text and not graphs.captured
    session.stop(model)
    both(graphs, model.eval())


def test_training_mode_where_it_changes_nothing(graphs: StandIn) -> None:
    """GRPO generates in it."""
    model = made().train()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    both(graphs, model)
    captured = graphs.captured
    for _ in range(2):  # as trainers do around each round, of a model with adapters
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.gradient_checkpointing_disable()
        with torch.no_grad():
            tokens(model)
    assert graphs.captured == captured


def test_layers_without_a_static_cache(graphs: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    expected = tokens(model)
    session.start(model, lambda: None)
    monkeypatch.setattr("transformers.cache_utils.STATIC_LAYER_TYPE_MAPPING", {})
    assert torch.equal(tokens(model), expected) and not graphs.captured


def test_what_cannot_be_captured(monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fails(function: Any) -> Any:
        StandIn()(function)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    monkeypatch.setattr(session, "capture_for", lambda device: fails)
    uncompiled = lambda model, inputs: model(**inputs), by_layer.run_layer, by_layer.run_layer
    monkeypatch.setattr(session, "_compiled", lambda backend: uncompiled)
    model = made("mistral")
    expected = tokens(model)
    session.start(model, lambda: None)
    assert torch.equal(tokens(model), expected)
    assert "cannot be a CUDA graph: RuntimeError: operation not permitted" in caplog.text


def test_too_little_memory(graphs: StandIn, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    """leaves one `generate` to transformers, not the next."""

    def fails(function: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    model = made("mistral")
    expected = tokens(model)
    session.start(model, lambda: None)
    held = session._decoders[model]
    monkeypatch.setattr(held, "_capture", fails)
    assert torch.equal(tokens(model), expected) and "the rest of a `generate` runs" in caplog.text
    monkeypatch.setattr(held, "_capture", graphs)
    assert torch.equal(tokens(model), expected) and graphs.replayed


def test_steps_that_are_all_different(graphs: StandIn, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """They are no graphs, and keep no memory."""
    from transformers import StaticCache

    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    model = made()
    session.start(model, lambda: None)
    step, cache = session._decoders[model], StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        for n in range(decoder.KINDS + 3):
            step(input_ids=IDS[:, :1], past_key_values=cache, logits_to_keep=n)
    assert len(step._known[cache].kinds) == decoder.KINDS and "another form at each" in caplog.text


def test_a_model_that_was_moved(graphs: StandIn, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Between two calls, and unnoticed: a graph of another device than the model's would hold nothing."""
    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    model = made()
    expected = both(graphs, model)
    monkeypatch.setattr(session, "_device", lambda model: torch.device("cuda", 1))
    replayed = graphs.replayed
    assert torch.equal(tokens(model), expected) and model not in session._decoders
    session.start(model, lambda: None)
    assert session._decoders[model].device == torch.device("cuda", 1)
    assert torch.equal(tokens(model), expected) and graphs.replayed == replayed
    assert "its logits are on cpu, and its graph on cuda:1" in caplog.text


def test_without_cuda_nothing_changes() -> None:
    model = made()
    assert not session.start(model, lambda: None) and model not in session._decoders


@pytest.mark.nightly
def test_logits_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training they are computed when they are read; a graph computes them in every step."""
    from torch._dynamo.backends.registry import lookup_backend

    from sloth.lazy.tensor import LazyLogits
    from sloth.rewriter.compile import inductor

    monkeypatch.setattr(inductor, "_inductor", lambda _, *graph: lookup_backend("aot_eager")(*graph))
    torch._dynamo.reset()
    model = made("llama", vocab_size=30_001)
    ids = torch.ones(2, 1, dtype=torch.long)
    torch._dynamo.mark_dynamic(ids, 0)
    with torch.no_grad():
        assert isinstance(torch.compile(model, backend="sloth")(input_ids=ids).logits, LazyLogits)
        assert type(session._compiled("sloth")[0](model, {"input_ids": ids}).logits) is torch.Tensor


@pytest.mark.nightly
def test_compiled_once_for_all_lengths(graphs: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that Dynamo has traced, and steps over caches of two lengths, are one graph each, of all layers."""
    from torch._dynamo.utils import counters

    monkeypatch.undo()
    monkeypatch.setattr(session, "capture_for", lambda device: _never)
    monkeypatch.setattr(decoder, "ATTEMPTS", 1 << 20)
    torch._dynamo.reset()
    counters.clear()
    model = made()
    expected = tokens(model), tokens(model, max_new_tokens=260)
    session.start(model, "eager")
    assert torch.equal(tokens(model), expected[0]) and torch.equal(tokens(model, max_new_tokens=260), expected[1])
    assert counters["stats"]["unique_graphs"] == 2


def test_compiled_once_for_all_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From training to generating and back, ten times: prompt and step are compiled once."""
    from sloth import FastLanguageModel
    from sloth.models import compiled

    calls = []

    def counting(graph: Any, inputs: Any, **options: Any) -> Any:
        calls.append(options)
        return graph

    monkeypatch.setattr(session, "capture_for", lambda device: _never)
    monkeypatch.setattr(decoder, "ATTEMPTS", 1 << 20)
    monkeypatch.setattr(compiled, "_backend", lambda: counting)
    torch._dynamo.reset()
    model = made(num_hidden_layers=1)
    for _ in range(10):
        FastLanguageModel.for_inference(model, replay_steps=True)
        tokens(model, IDS[:1], max_new_tokens=3)
        FastLanguageModel.for_training(model)
    assert len(calls) == 2


def _never(function: Any) -> Any:
    raise RuntimeError("not now")


def test_a_model_that_takes_no_static_cache(graphs: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    """It generates as without sloth, and that is told; what raises without sloth too is raised."""
    from transformers import StaticCache

    model = made()
    expected = tokens(model)
    forward = model.model.norm.forward

    def refusing(x: torch.Tensor) -> torch.Tensor:
        if isinstance(cache[0], StaticCache):
            raise ValueError("not over this")
        return forward(x)

    cache: list[Any] = [None]

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        cache[0] = next((v for v in kwargs.values() if decoder.is_cache(v)), None)

    model.model.norm.forward = refusing
    model.model.register_forward_pre_hook(before, with_kwargs=True)
    session.start(model, lambda: None)
    with caplog.at_level(logging.INFO, "sloth"):
        for _ in range(2):
            assert torch.equal(tokens(model), expected)
    assert caplog.text.count("cannot read a prompt (ValueError: not over this)") == 1 and not graphs.captured
    with pytest.raises(ValueError, match="not over this"):
        tokens(model, **{session._name_of_cache(model): StaticCache(config=model.config, max_cache_len=32)})
    assert not [seam for seam in session.SEAMS if seam in vars(model)]


# ---------------------------------------------------------------- CUDA graphs themselves


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captures_on_a_gpu() -> None:
    """One after the other, after the last graph of a pool is gone while a result of it lives, and after one that failed."""
    capture = CudaCapture(torch.device("cuda", 0))
    x, w = torch.ones(4, 64, device="cuda:0"), torch.ones(64, 64, device="cuda:0")
    x @ w
    before = torch.cuda.current_stream()
    replay, held = capture(lambda: x @ w)
    replay()
    assert held.unique().tolist() == [64.0]
    del replay
    gc.collect()
    first, one = capture(lambda: x @ w)
    second, two = capture(lambda: (x + 1) @ w)
    with pytest.raises(RuntimeError):
        capture(lambda: (x @ w).sum().item())
    assert torch.cuda.current_stream() == before
    third, three = capture(lambda: (x + 2) @ w)
    x.fill_(2.0)
    for run, result, expected in ((first, one, 128.0), (second, two, 192.0), (third, three, 256.0), (first, one, 128.0)):
        run()
        assert result.unique().tolist() == [expected]
    assert held.unique().tolist() == [64.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu() -> None:
    """Compiled and captured; moved away and back; without for_inference."""
    from sloth import FastLanguageModel

    model, ids = made().cuda(), IDS.cuda()
    expected = tokens(model, ids)
    for _ in range(2):
        FastLanguageModel.for_inference(model, replay_steps=True)
        assert torch.equal(tokens(model, ids), expected) and torch.equal(tokens(model, ids), expected)
        kinds = [kind for of in session._decoders[model]._known.values() for kind in of.kinds.values()]
        assert kinds and all(kind._replay is not None for kind in kinds)
        assert torch.equal(tokens(model.cpu()).cuda(), expected) and model not in session._decoders
        model.cuda()
    model.compile(backend="sloth")
    for _ in range(3):
        assert torch.equal(tokens(model, ids, cache_implementation="static"), expected)
