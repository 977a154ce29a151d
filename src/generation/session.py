"""`model.generate(…)` with a Decoder: transformers' own loop, asked at its own seams for the cache and for the forward pass.

transformers compiles the steps of static caches itself: it asks `_valid_auto_compile_criteria` whether, `get_compiled_call` for
what to call, `_prepare_cache_for_generation` for the cache, and `_prefill` to read the prompt. For the time of one `generate` the
model answers these itself, as attributes of the object; its class is as it was. Sampling, processors, stopping and streaming are
transformers'.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from inspect import signature
from threading import get_ident
from typing import Any

import torch

from sloth.compat.dynamo import allow_more_graphs
from sloth.generation.by_layer import ByLayer, run_layer, run_layer_of_prompt
from sloth.generation.caches import SMALLEST, has_plain_layers, holds_two_dtypes, is_made, is_static, prepare
from sloth.generation.capture import capture_for
from sloth.generation.decoder import Decoder
from sloth.integrations import generation
from sloth.rewriter.notices import tell_once

SEAMS = ("_prepare_cache_for_generation", "_prefill", "_valid_auto_compile_criteria", "get_compiled_call")
STATIC = (None, "static")
MODES = ("greedy_search", "sample")
ATTENTION = ("sdpa", "eager")
PAYS_AFTER = 256  # tokens of a row: 15 s to compile a layer's prompt and step, 5 ms a token in place of 70 (H200)
DRAWN = re.compile("drop|jitter|noise")  # in the names of what modules draw by
CUSTOM = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")  # what may count how often it is called
_decoders: weakref.WeakKeyDictionary[torch.nn.Module, Decoder] = weakref.WeakKeyDictionary()


def start(model: torch.nn.Module, backend: Callable[..., Any] | str, after: int = 0) -> bool:
    """Let `generate` of a model of transformers replay its steps, once so many were asked for, compiled with this backend.

    False, and nothing is changed, where there are no CUDA graphs, or where another version of transformers has other seams.
    """
    device = _device(model)
    held = _decoders.get(model)
    if held is not None and held.device == device:
        held.replay_after = min(held.replay_after, after)
        return True
    stop(model)
    capture = capture_for(device)
    if capture is None or not all(hasattr(model, seam) for seam in SEAMS) or model.config.is_encoder_decoder:
        return False
    allow_more_graphs()
    _decoders[model] = Decoder(model, ByLayer(*_compiled(backend)), capture, device, after)
    return True


def stop(model: torch.nn.Module) -> None:
    """`generate` is transformers' own again, and the memory of graphs and caches is free."""
    decoder = _decoders.pop(model, None)
    if decoder is not None:
        decoder.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _device(model: Any) -> torch.device:
    devices = {p.device for p in model.parameters()}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


@cache  # what was compiled stays so from one `start` to the next
def _compiled(backend: Callable[..., Any] | str) -> tuple[Callable[..., Any], ...]:
    """What ByLayer takes."""

    def run_model(model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        return model(**inputs)

    # Logits that are computed when they are read would be computed once, of what the graph writes anew in each step.
    prompt = {"sloth.disable": "head"}
    step = prompt | {"sloth.inner_backend": "eager"}  # what is captured needs no compiler
    given = (run_model, step), (run_layer, step), (run_layer_of_prompt, prompt)
    return tuple(torch.compile(fn, backend=backend, options=options) for fn, options in given)


@contextmanager
def session(model: Any, given: dict[str, Any]) -> Iterator[None]:
    """Around one call of `generate` with these keyword arguments.

    Without `for_inference`, `cache_implementation="static"` and `compile_config=CompileConfig(backend="sloth")` ask for the same.
    """
    asks = _asks_for_static(model, given) and _asks_for_sloth(model, given)
    started = asks and model not in _decoders and start(model, "sloth")
    decoder = _decoders.get(model)
    if asks and decoder is not None:
        decoder.replay_after = 0
    if decoder is not None and decoder.device != _device(model):
        tell_once("generating runs the model's own code: the model was moved. for_inference(model) begins anew")
        stop(model)
        decoder = None
    with ExitStack() as ends:
        if started:  # the model may train next, which nobody says
            ends.callback(stop, model)
        if decoder is None:
            yield
        elif decoder.busy.acquire(blocking=False):
            ends.callback(decoder.busy.release)
            with _answering(model, decoder, any(given.get(name) for name in CUSTOM)):
                yield
        else:
            with _left_alone(decoder):
                yield


@contextmanager
def _answering(model: Any, decoder: Decoder, custom: bool) -> Iterator[None]:
    """The model answers for itself, to the thread that is in here. custom: something of the caller's is called in each step."""
    decoder.begin()
    lent: list[Any] = []
    fit: list[Callable[..., None] | None] = []  # one, where it is: how transformers makes the cache in place of which is ours
    theirs = {seam: partial(getattr(type(model), seam), model) for seam in SEAMS}
    ours = {
        "_prepare_cache_for_generation": partial(_prepare_cache, model, decoder, lent, fit, custom),
        "_prefill": lambda *of, **more: (partial(_prefill, model, decoder, fit) if fit else theirs["_prefill"])(*of, **more),
        "_valid_auto_compile_criteria": lambda *of: True if fit else theirs["_valid_auto_compile_criteria"](*of),
        "get_compiled_call": lambda config: decoder if fit else theirs["get_compiled_call"](config),
    }

    def answer(seam: str, *of: Any, **more: Any) -> Any:
        return (ours if decoder.owner == get_ident() else theirs)[seam](*of, **more)

    decoder.owner = get_ident()
    vars(model).update({seam: partial(answer, seam) for seam in SEAMS})
    try:
        yield
        for held in lent:
            decoder.caches.give_back(held)
    finally:
        decoder.owner = None
        for seam in SEAMS:
            vars(model).pop(seam, None)


@contextmanager
def _left_alone(decoder: Decoder) -> Iterator[None]:
    """A `generate` beside another one of the model, in a thread of its own, or within it."""
    within = decoder.owner == get_ident()
    if within:
        decoder.owner = None
    try:
        yield
    finally:
        if within:
            decoder.owner = get_ident()


generation.SESSIONS.append(session)


def _asked(model: Any, given: dict[str, Any], name: str) -> Any:
    """An argument of `generate`, wherever it is given."""
    of = (given.get("generation_config"), getattr(model, "generation_config", None))
    return next((v for v in (given.get(name), *(getattr(config, name, None) for config in of)) if v is not None), None)


def _asks_for_static(model: Any, given: dict[str, Any]) -> bool:
    return _asked(model, given, "cache_implementation") == "static"


def _asks_for_sloth(model: Any, given: dict[str, Any]) -> bool:
    return getattr(_asked(model, given, "compile_config"), "backend", None) == "sloth"


def _prepare_cache(
    model: Any, decoder: Decoder, lent: list[Any], fit: list[Callable[..., None] | None], custom: bool, config: Any,
    kwargs: dict[str, Any], mode: Any, rows: int, length: int,
) -> None:  # fmt: skip
    """In place of a cache that grows, a static one, where steps over it can be replayed."""
    why = next(_unfit(model, config, kwargs, mode), None)
    prompt = kwargs.get("attention_mask")
    if not why:
        decoder.tokens_requested += config.max_new_tokens or length - (0 if prompt is None else prompt.shape[1])
    few = decoder.tokens_requested < decoder.replay_after
    if why:
        tell_once(f"generating runs the model's own code: {why}")
    theirs = partial(type(model)._prepare_cache_for_generation, model, config)
    given = kwargs.get(_name_of_cache(model)) is not None
    if not (why or few):
        fit.append(None if given else lambda kwargs, rows=rows: theirs(kwargs, mode, rows, length))
    if why or few or given:
        theirs(kwargs, mode, rows, length)
        return
    rows *= config.num_return_sequences or 1
    taken = decoder.caches.take(_text(model), rows, max(length, config.max_cache_len or 0))
    taken.sloth_stops_late = not (custom or config.do_sample or config.return_dict_in_generate)
    kwargs[_name_of_cache(model)] = taken
    if not config.return_dict_in_generate:  # else it is the caller's
        lent.append(taken)


def _prefill(
    model: Any, decoder: Decoder, fit: list[Callable[..., None] | None], ids: torch.Tensor, config: Any, kwargs: dict[str, Any],
    *of: Any, **more: Any,
) -> Any:  # fmt: skip
    """The prompt, through the layers that a step goes through. What raises over a cache of ours is transformers' to read."""
    from transformers import StaticCache

    cache, by_layer = kwargs.get(name := _name_of_cache(model)), decoder.compiled
    read = partial(type(model)._prefill, model, ids, config, kwargs, *of, **more)
    try:
        if decoder.failed or not ids.numel():
            return read()
        by_layer.find(model, ids, name, partial(StaticCache, config=_text(model), max_cache_len=SMALLEST))
        by_layer.make(cache, len(ids))
        if is_made(cache):
            prepare(cache)
        with by_layer.reading(cache):
            return read()
    except Exception as e:
        if (theirs := fit.pop()) is None or isinstance(e, torch.OutOfMemoryError):
            raise
        told = f"{type(e).__name__}: {e}".split("\n")[0]
    tell_once(f"generating runs the model's own code: over a static cache it cannot read a prompt ({told})")
    kwargs.pop(name)
    theirs(kwargs)
    return read()


def _unfit(model: Any, config: Any, kwargs: dict[str, Any], mode: Any) -> Iterator[str]:
    """Why steps of this `generate` are not replayed, or are without a cache of ours. What comes later may hold only where nothing
    came before.
    """
    given, text = kwargs.get(_name_of_cache(model)), _text(model)
    if model.training and (why := _of_training(model)):
        yield f"the model is in training mode, where {why}"
    if mode.value not in MODES or config.is_assistant:
        yield f"generation mode is {mode.value}"
    if not config.use_cache:
        yield "no cache is used"
    if config.cache_implementation not in STATIC:
        yield f"cache_implementation={config.cache_implementation!r}"
    if given is not None and not is_static(given):
        yield f"the cache given is a {type(given).__name__}"
    if config.prefill_chunk_size is not None:
        yield "the prompt is read in chunks"
    if text._attn_implementation not in ATTENTION:
        yield f"attention is {text._attn_implementation!r}"
    if not getattr(model, "_can_compile_fullgraph", False):
        yield "transformers cannot compile its forward pass whole"
    if torch.is_autocast_enabled(model.device.type) and not holds_two_dtypes():
        yield "autocast may give keys and values two dtypes, which static caches of this transformers do not hold"
    if not has_plain_layers(text):
        yield "its layers keep more than keys and values"


def _of_training(model: torch.nn.Module) -> str | None:
    """Why its forward pass is another one in training mode, if it is. GRPO generates in that mode."""
    for name, module in (("config", _text(model)), *model.named_modules()):
        if not getattr(module, "training", True):
            continue
        if getattr(module, "gradient_checkpointing", False):
            return "checkpointing keeps no cache"
        if getattr(module, "track_running_stats", False):
            return f"{name} takes its statistics from what it is given"
        for attribute, value in vars(module).items():
            if not _draws(attribute) and not (attribute == "p" and "Dropout" in type(module).__name__):
                continue
            for number in value.values() if isinstance(value, dict) else (value,):  # PEFT's, by adapter
                if isinstance(number, int | float) and number > 0:
                    return f"{name}.{attribute} is {value}"
    return None


@cache
def _draws(attribute: str) -> bool:
    return DRAWN.search(attribute) is not None


def _text(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


@cache
def _name_of_cache_of(kind: type) -> str:
    return "cache" if "cache" in signature(kind.prepare_inputs_for_generation).parameters else "past_key_values"


def _name_of_cache(model: Any) -> str:
    """As the version of transformers calls it."""
    return _name_of_cache_of(type(model))
