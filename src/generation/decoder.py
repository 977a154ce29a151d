"""The forward pass of one token a row, over a static cache, as one CUDA graph.

`generate` calls a Decoder where it would call the model. The first call of a kind runs what sloth compiled, the next is captured,
and all others are replayed: inputs are copied to where the graph reads them, and what the cache counts in Python goes on.
A kind is what Python sees: the cache, names and forms of the inputs, and which windows are full. What cannot be captured runs
the model's own code, and is told once.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from operator import is_
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from sloth.generation.by_layer import ByLayer
from sloth.generation.caches import Caches, counters, full, is_made, is_static, modes, prepare, tensors_of, vary
from sloth.integrations.transformers import marks_gradients
from sloth.rewriter.notices import warn_once

ATTEMPTS = 4  # to capture a kind; Dynamo may need two graphs until it takes a number for one that varies
KINDS = 8  # of one cache: windows that fill, masks or none; each has a graph
PLAIN = (bool, int, float, str, torch.dtype, type(None))
PLAIN_TYPES, CONTAINERS = frozenset(PLAIN), frozenset((dict, list, tuple, set, OrderedDict))
UNCAPTURED = ("output_attentions", "output_hidden_states", "output_router_logits")
# No part of a step's graph: they come and go where a trainer begins, evaluates, and switches checkpointing off and on.
OF_TRAINERS = ("_compiled_call_impl", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks")
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class Decoder:
    """Of one model; it holds no reference to it."""

    def __init__(self, model: torch.nn.Module, compiled: ByLayer, capture: Capture, device: torch.device, after: int = 0):
        self._model = weakref.ref(model)
        self.compiled = compiled
        self._capture = capture
        self.device = device
        self.tokens_requested, self.replay_after = 0, after  # of a row, in all calls; from how many on steps are replayed
        self._known: weakref.WeakKeyDictionary[Any, _OfCache] = weakref.WeakKeyDictionary()
        self._state: int | None = None
        self.failed = False
        self._short = False  # of memory, in this `generate`
        self.caches = Caches(device.type)
        self.busy = Lock()  # for one `generate` at a time
        self.owner: int | None = None  # the thread whose it is

    def begin(self) -> None:
        """Forget graphs of a model that has changed since: other adapters, other tensors. Values may be others. Its caches may
        have another dtype.
        """
        self._short = False
        for of in self._known.values():
            of.tensors = []
        if (state := state_of(self._model())) != self._state:
            self.clear()
            self._state = state

    def clear(self) -> None:
        """Let go of graphs and caches."""
        self._known.clear()
        self.caches.clear()
        self.compiled.forget()

    def __call__(self, **inputs: Any) -> Any:
        """What `model(**inputs)` gives; logits are overwritten by the next call."""
        model = self._model()
        cache = None if self.failed or self._short else self._cache_of_step(inputs)
        form = () if cache is None else tuple(_form(inputs))
        if cache is None or None in form:
            return model(**inputs)
        of = self._known.get(cache)
        if of is None:
            prepare(cache)
            of = self._known[cache] = _OfCache(cache)
        kinds, key = of.kinds, (form, full(of.windows), modes(self.device.type), of.places(cache))
        kind = kinds.get(key)
        if kind is None:
            if len(kinds) == KINDS:
                warn_once("steps of generating run the model's own code, since its inputs have another form at each of them")
                return model(**inputs)
            kind = kinds[key] = _Kind(inputs)
        try:
            return kind(model, self.compiled, self._capture, self.device, cache, inputs)
        except _NotCaptured as why:
            self._short = why.of_memory
            self.failed = not why.of_memory
            self.clear()
            rest = "the rest of a `generate` runs" if self._short else "generating runs"
            warn_once(f"{rest} the model's own code, since a step of it cannot be a CUDA graph: {why}")
            return model(**inputs)

    def _cache_of_step(self, inputs: dict[str, Any]) -> Any:
        """The cache of a step that may be captured: one token a row, a static cache that has its memory; else None."""
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[1] != 1 or any(inputs.get(name) for name in UNCAPTURED):
            return None
        held = [v for v in inputs.values() if is_cache(v)]
        if len(held) != 1 or held[0] not in self._known and not (is_static(held[0]) and is_made(held[0])):
            return None
        return held[0]


class _NotCaptured(Exception):
    """Nothing was computed of this step. of_memory: there was too little, which may be otherwise next time."""

    def __init__(self, why: str, of_memory: bool = False):
        super().__init__(why)
        self.of_memory = of_memory


class _OfCache:
    """What is known of one cache, without a reference to it: its kinds of steps, layers with a window, and where its tensors are.

    Which tensors it has is asked in every step, and where they are once in a `generate`: there are a hundred.
    """

    def __init__(self, cache: Any):
        self.kinds: dict[tuple, _Kind] = {}
        self.windows = [layer for layer in cache.layers if layer.is_sliding]
        self.tensors: list[Tensor] = []
        self._places: tuple[int, ...] = ()

    def places(self, cache: Any) -> tuple[int, ...]:
        now = tensors_of(cache)
        if len(now) != len(self.tensors) or not all(map(is_, now, self.tensors)):
            self.tensors, self._places = now, tuple(t.data_ptr() for t in now)
        return self._places


class _Kind:
    """Steps of one kind, and their graph once there is one. It holds no reference to its cache, with which it ends."""

    def __init__(self, inputs: dict[str, Any]):
        self._cache = next(name for name, v in inputs.items() if is_cache(v))
        self._buffers = _map_tensors(torch.clone, {name: v for name, v in inputs.items() if name != self._cache})
        self._places = [t for _, t in _tensors(self._buffers)]
        for place in self._places:
            vary(place, 0, 3)  # rows; of masks, the length of the cache
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._made: Any = None  # type of the output, its logits, and the name of the cache in it
        self._counted: list[tuple[int, str, int]] = []  # number of a layer, what it counts, and how much a step

    def __call__(
        self, model: Any, compiled: ByLayer, capture: Capture, device: torch.device, cache: Any,
        inputs: dict[str, Any],
    ) -> Any:  # fmt: skip
        for place, (_, given) in zip(self._places, _tensors(inputs), strict=True):
            place.copy_(given)
        if self._replay is None and self._runs:
            self._try(model, compiled, capture, device, cache)
        if self._replay is None:
            self._runs += 1
            return compiled(model, self._inputs(cache), cache)
        self._replay()
        for i, name, more in self._counted:
            layer = cache.layers[i]
            setattr(layer, name, getattr(layer, name) + more)
        kind, logits, held = self._made
        return kind(logits=logits, **dict.fromkeys(held, cache))

    def _inputs(self, cache: Any) -> dict[str, Any]:
        return {**self._buffers, self._cache: cache}

    def _try(self, model: Any, compiled: ByLayer, capture: Capture, device: torch.device, cache: Any) -> None:
        """Capture, which computes nothing. What is not compiled yet raises, and is compiled by a run like the first."""
        before = counters(cache)
        # Casts of weights are a part of the graph: not those that autocast keeps from before, nor for later.
        torch.clear_autocast_cache()
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                replay, output = capture(lambda: compiled(model, self._inputs(cache), cache))
        except Exception as e:
            # A capture that is broken off may raise an error of its own on top.
            of_memory = any(isinstance(error, torch.OutOfMemoryError) for error in (e, e.__context__))
            if self._runs < ATTEMPTS and not of_memory:
                return
            raise _NotCaptured(f"{type(e).__name__}: {e}".split("\n")[0], of_memory) from e
        finally:
            torch.clear_autocast_cache()
            after = counters(cache)
            for i, name, n in before:
                setattr(cache.layers[i], name, n)
        self._counted = [(i, name, m - n) for (i, name, n), (_, _, m) in zip(before, after, strict=True) if m != n]
        fields = {name: v for name, v in output.items() if v is not None}
        held = [name for name, v in fields.items() if is_cache(v)]
        if others := fields.keys() - {"logits", *held}:
            raise _NotCaptured(f"it gives {', '.join(sorted(others))} too")
        if type(logits := fields["logits"]) is not Tensor:
            raise _NotCaptured(f"its logits are a {type(logits).__name__}")
        if logits.device != device:  # the graph is empty: a replay would change nothing
            raise _NotCaptured(f"its logits are on {logits.device}, and its graph on {device}")
        self._made = type(output), logits, held
        self._replay = replay


def is_cache(value: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def _form(inputs: dict[str, Any], prefix: str = "") -> Iterator[Any]:
    """What of inputs is not the values of their tensors; None for what only Python understands."""
    for name, v in inputs.items():
        at = prefix + name
        if isinstance(v, Tensor):
            yield at, v.shape, v.dtype, v.device
        elif isinstance(v, dict):
            yield from _form(v, at + ".")
        elif isinstance(v, PLAIN):
            yield at, v
        else:
            yield (at, "cache") if is_cache(v) else None


def _tensors(inputs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, v in inputs.items():
        if isinstance(v, Tensor):
            yield prefix + name, v
        elif isinstance(v, dict):
            yield from _tensors(v, f"{prefix}{name}.")


def _map_tensors(fn: Callable[[Tensor], Tensor], inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: fn(v) if isinstance(v, Tensor) else _map_tensors(fn, v) if isinstance(v, dict) else v for name, v in inputs.items()
    }


def state_of(model: torch.nn.Module) -> int:
    """A number that is another one when a graph of the model's would be: addresses of its tensors, and what its modules hold
    beside these that is a number or a name (of adapters, their scales).
    """
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if name in OF_TRAINERS:
                continue
            kind = type(value)
            if kind not in PLAIN_TYPES:
                if name == "_forward_hooks":
                    value = [hook for hook in value.values() if not marks_gradients(hook)]
                # A model of 32 layers has 70,000 attributes, most of them empty.
                value = _hashed(value, 3) if kind not in CONTAINERS or value else ()
            found += (name, value)
    return hash(tuple(found))


def _hashed(value: Any, depth: int) -> Any:
    if type(value) in PLAIN_TYPES:
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype, value.shape, _hashed(getattr(value, "quant_state", None), depth - 1)
    if depth and isinstance(value, dict):
        return tuple((_hashed(k, 0), _hashed(v, depth - 1)) for k, v in value.items())
    if depth and isinstance(value, list | tuple | set):
        return tuple(_hashed(v, depth - 1) for v in value)
    if depth and type(value).__name__ == "QuantState":
        return _hashed(vars(value), depth - 1)
    return value if isinstance(value, PLAIN) else id(value)  # a number of numpy's
