"""Static caches that are kept from one `generate` to the next: a CUDA graph holds their addresses.

Their lengths are rounded up to a few sizes, so that a prompt of another length finds a cache, and the graph, that is there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from sloth.compat.dynamo import STATIC_MARK, maybe_mark_dynamic

SMALLEST = 256
KEPT = 2  # caches of one model: its training needs the memory


def bucket(length: int) -> int:
    """The length of the cache that holds so many tokens: multiples of 256, above 2,048 of a quarter of a power of two.

    >>> [bucket(n) for n in (1, 256, 257, 1500, 2049, 5000)]
    [256, 256, 512, 1536, 2560, 5120]
    """
    step = max(SMALLEST, 1 << max(0, (max(length, 1) - 1).bit_length() - 3))
    return -(-length // step) * step


def modes(device: str) -> tuple:
    """What else a step depends on: inference mode, and autocast on such devices."""
    return torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class Caches:
    """Of one model. A cache is made by transformers' own class, and given out to one `generate` at a time."""

    def __init__(self, device: str) -> None:
        self._device = device  # its type
        self._free: list[tuple[tuple, Any]] = []

    def take(self, config: Any, rows: int, length: int) -> Any:
        """A static cache, empty, for so many rows of at least so many tokens."""
        from transformers import StaticCache

        key = rows, bucket(length), *modes(self._device)
        for held in self._free:
            if held[0] == key:
                self._free.remove(held)
                held[1].reset()
                return held[1]
        cache = StaticCache(config=config, max_cache_len=key[1])
        cache.sloth_key = key
        return cache

    def give_back(self, cache: Any) -> None:
        """For a later `generate`. Of those that were not used for the longest time, the memory is free again."""
        self._free = [(cache.sloth_key, cache), *self._free][:KEPT]

    def clear(self) -> None:
        self._free.clear()


def is_static(cache: Any) -> bool:
    """Is it one that a graph can hold, once its memory is made: with nothing but keys and values in it?"""
    from transformers import StaticCache

    if type(cache) is not StaticCache or getattr(cache, "offloading", False):
        return False
    return _are_plain(cache)


def is_made(cache: Any) -> bool:
    """Does it have its memory? The prompt makes it."""
    return all(layer.is_initialized for layer in cache.layers)


def has_plain_layers(config: Any) -> bool:
    """Does a static cache of such a model hold nothing but keys and values?"""
    from transformers import StaticCache

    try:
        return _are_plain(StaticCache(config=config, max_cache_len=SMALLEST))
    except (KeyError, AttributeError):  # it has no static cache
        return False


@cache
def holds_two_dtypes() -> bool:
    """Does a static cache take keys and values of two dtypes, as autocast may give them? That of transformers 5.17 raises."""
    from transformers.cache_utils import StaticLayer

    keys = torch.zeros(1, 1, 1, 1)
    try:
        StaticLayer(max_cache_len=1).update(keys, keys.bfloat16())
    except (RuntimeError, TypeError):
        return False
    return True


def _are_plain(cache: Any) -> bool:
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    return all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers)


def tensors_of(cache: Any) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]


def prepare(cache: Any) -> None:
    """Let its tensors be inputs of graphs as others are, of any length: transformers marks them as constants, by address, for
    Inductor's CUDA graphs, and each new cache would be compiled for.
    """
    for t in tensors_of(cache):
        vars(t).pop(STATIC_MARK, None)
        vary(t, 0, 2)


def vary(t: torch.Tensor, *dims: int) -> None:
    """Let these sizes be symbols in the first graph, where they are not 1."""
    for dim in dims:
        if t.dim() > dim and t.shape[dim] > 1:
            maybe_mark_dynamic(t, dim)


def counters(cache: Any) -> list[tuple[int, str, int]]:
    """What its layers, by their number, count in Python, which no graph does."""
    return [(i, name, n) for i, layer in enumerate(cache.layers) for name, n in vars(layer).items() if type(n) is int]


def full(windows: list[Any]) -> tuple[bool, ...]:
    """Of layers with a window: is it full? They are written in another way then."""
    return tuple(layer.get_seq_length() >= layer.get_max_length() for layer in windows)
