"""A forward pass over a static cache whose layers go, one by one, through one compiled function.

In a graph of the whole model each layer is traced and rewritten again: 30 s for 32 of them. Called one by one, those that are
alike are one graph, which Dynamo's guards decide, but for hooks, which they do not ask for: layers with these are not called so.
Only the number of a layer is another one in each, and it is read for nothing but the layer's part of the cache: so each layer is
given a cache that knows its part, and no graph depends on the number.
What is beside the layers (embedding, last norm, head) runs as the model has it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from sloth.generation.caches import modes, vary
from sloth.kernels.attention.write_token import write_token
from sloth.rewriter.notices import log

CALL = "_compiled_call_impl"  # attribute of a module that is called in its place: what `module.compile()` sets


class LayerCache:
    """A cache as one of its model's layers sees it. What is asked of it beside `update`, the whole cache answers."""

    def __init__(self, whole: Any, own: Any):
        self.whole, self.own = whole, own

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        own, dtypes = self.own, (key_states.dtype, value_states.dtype)
        one = key_states.shape[2] == 1 and not own.is_sliding and dtypes == (own.keys.dtype, own.values.dtype)
        if one and own.keys.is_contiguous() and own.values.is_contiguous():
            write_token(own.keys, own.values, own.cumulative_length, key_states, value_states)
            return own.keys, own.values
        return own.update(key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


class _Noting(LayerCache):
    """It notes the numbers that a layer gives."""

    def __init__(self, whole: Any, noted: list[int]):
        super().__init__(whole, None)
        self.noted = noted

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.noted.append(layer_idx)
        return self.whole.update(key_states, value_states, layer_idx, *args, **kwargs)


class ByLayer:
    """Of one model. whole: `whole(model, inputs)` gives what `model(**inputs)` does, compiled; step and prompt: `run_layer` and
    `run_layer_of_prompt`, compiled.
    """

    def __init__(self, whole: Callable[..., Any], step: Callable[..., Any], prompt: Callable[..., Any]):
        self._whole, self._step, self._prompt = whole, step, prompt
        self._parts: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # of caches, by module
        self._empty: list[tuple[Tensor, Tensor]] = []  # keys and values of each part, without rows
        self._found_in: tuple | None = None  # these modes

    def forget(self) -> None:
        self._parts.clear()
        self._empty, self._found_in = [], None

    def __call__(self, model: nn.Module, inputs: dict[str, Any], cache: Any) -> Any:
        """What `model(**inputs)` gives. cache: that among the inputs, with its memory made."""
        if not self._parts:
            return self._whole(model, inputs)
        with self._over(cache, self._step):
            return model(**inputs)

    def reading(self, cache: Any) -> AbstractContextManager[None]:
        """Meanwhile layers that were found read a prompt into this cache, compiled."""
        return self._over(cache, self._prompt)

    @contextmanager
    def _over(self, cache: Any, run: Callable[..., Any]) -> Iterator[None]:
        """Calls with this cache, of layers that were found, are `run`'s."""

        def call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            given = _with(args, kwargs, cache, LayerCache(cache, cache.layers[self._parts[module]]))
            for t in _tensors(given):  # rows, tokens, and of masks the length of the cache
                vary(t, *range(t.dim() - (t.dim() < 4)))
            return run(module, *given)

        with _called_by(dict.fromkeys(self._parts, call), cache):
            yield

    def find(self, model: nn.Module, ids: Tensor, name: str, make_cache: Callable[[], Any]) -> None:
        """Which modules write one part of a cache each, by a forward pass of one token; the model takes the cache by this name.
        None, where one writes several parts, has a compiled call of its own, or hooks: Dynamo does not ask which of the layers of
        a graph have these.
        """
        if self._found_in == (now := modes(ids.device.type)):
            return
        self.forget()
        self._found_in, cache, noted = now, make_cache(), dict[nn.Module, list[int]]()

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            args, kwargs = _with(args, kwargs, cache, _Noting(cache, noted.setdefault(module, [])))
            return module._call_impl(*args, **kwargs)

        layers = list(_items_of_lists(model))
        if any(getattr(m, CALL, None) is not None or any(map(_has_hooks, m.modules())) for m in layers):
            return
        try:
            with _called_by(dict.fromkeys(layers, note), cache):
                model(input_ids=ids[:1, :1], **{name: cache}, use_cache=True)
        except Exception as e:
            log.debug("sloth: steps of generating are compiled whole: %s: %s", type(e).__name__, e)
            return
        numbers = [n for found in noted.values() for n in found]
        if sorted(numbers) == list(range(len(cache.layers))) and all(len(found) == 1 for found in noted.values()):
            self._parts.update({module: n for module, (n,) in noted.items()})
            self._empty = [(part.keys[:0].clone(), part.values[:0].clone()) for part in cache.layers]  # their memory ends

    def make(self, cache: Any, rows: int) -> None:
        """Give a cache its memory, as its first tokens would."""
        for part, (keys, values) in zip(cache.layers, self._empty, strict=False):
            if not part.is_initialized:
                part.lazy_initialization(*(t.new_empty(rows, t.shape[1], 0, t.shape[3]) for t in (keys, values)))


def run_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What is compiled, of a step."""
    return layer._call_impl(*args, **kwargs)


def run_layer_of_prompt(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A function of its own: Dynamo looks through the graphs of a function one by one, and allows so many of them."""
    return layer._call_impl(*args, **kwargs)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _items_of_lists(module: nn.Module) -> Iterator[nn.Module]:
    """Items of lists of modules, but for those within other items."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (m for m in child if any(m.children()))
        else:
            yield from _items_of_lists(child)


@contextmanager
def _called_by(how: dict[nn.Module, Callable[..., Any]], cache: Any) -> Iterator[None]:
    """Calls of these modules with this cache, by this thread, are made by `how[module](module, args, kwargs)`."""
    thread = get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if get_ident() == thread and any(v is cache for v in (*args, *kwargs.values())):
            return how[module](module, args, kwargs)
        return module._call_impl(*args, **kwargs)

    before = {module: vars(module).get(CALL) for module in how}
    for module in how:
        vars(module)[CALL] = partial(call, module)
    try:
        yield
    finally:
        for module, theirs in before.items():
            vars(module).pop(CALL)
            if theirs is not None:
                vars(module)[CALL] = theirs


def _with(args: tuple, kwargs: dict[str, Any], old: Any, new: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments with a cache in place of another, and as nothing that autograd knows: PEFT marks what an embedding gives, which
    only the first layer reads.
    """

    def given(v: Any) -> Any:
        return new if v is old else v.detach() if isinstance(v, Tensor) and v.requires_grad else v

    return tuple(map(given, args)), {name: given(v) for name, v in kwargs.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _tensors(v)
