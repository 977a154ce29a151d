"""Threads that compile first at the same time find sloth by its name, each of them.

torch looks a backend up, loads its entry point and enters it, without a lock: two threads that are in there together both enter
it, and the second one fails with `duplicate name: sloth`. Entered again, it is now the same function as before. Loaded with
accelerate's name, at the end of `import torch`: a thread that looks sloth up has torch's function in its hands before it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from sloth.integrations.integration import integration


@integration("torch._dynamo.backends.registry", touches="register_backend", why="threads may compile first at the same time")
def _enter_twice(registry: ModuleType) -> None:
    enter = registry.register_backend

    @wraps(enter)
    def register_backend(compiler_fn: Callable[..., Any] | None = None, name: str | None = None, tags: Any = ()) -> Any:
        if name != "sloth" or compiler_fn is None or not compiler_fn.__module__.startswith("sloth."):
            return enter(compiler_fn, name, tags)
        compiler_fn._tags = tuple(tags)
        registry._COMPILER_FNS[name] = compiler_fn  # its entry point stays where other threads look for it
        return compiler_fn

    registry.register_backend = register_backend
