"""Generating is not compiled as training is: its cache grows by a token a call, and each kind of call would be a graph.

`model.compile(backend="sloth")` makes every call of the model a compiled one, those of `model.generate(…)` too: six graphs
(prompt, first and later tokens, each at new sizes) of the eight that Dynamo allows a function, spent between two training
steps. Meanwhile the model is called as it is. Steps over a static cache may be compiled and replayed by a session, which is
entered around `generate` (sloth.generation.session); where there is none, transformers compiles them by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from types import ModuleType
from typing import Any

from sloth.compat.dynamo import innermost_backend
from sloth.integrations.integration import integration

Session = Callable[[Any, dict[str, Any]], AbstractContextManager[None]]
POSITIONAL = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
SESSIONS: list[Session] = []  # entered around `generate`, with the model and the keyword arguments


def backend_of(call: Any) -> Any:
    """What torch made of the arguments of torch.compile(…, backend="sloth"), where `call` is what that gave; else None."""
    free = getattr(getattr(call, "__code__", None), "co_freevars", ())
    if "callback" not in free:
        return None
    backend = innermost_backend(call.__closure__[free.index("callback")].cell_contents)
    return backend if "sloth" in (getattr(backend, "compiler_name", None), getattr(backend, "__name__", None)) else None


def is_compiled_for_sloth(call: Any) -> bool:
    """Is it what torch.compile(…, backend="sloth") gives?"""
    return backend_of(call) is not None


@integration("transformers.generation.utils", touches="GenerationMixin.generate", why="generating spends no graphs")
def _leave_alone(generation: ModuleType) -> None:
    generate = generation.GenerationMixin.generate

    @wraps(generate)
    def as_it_is(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = getattr(self, "_compiled_call_impl", None)
        ours = is_compiled_for_sloth(compiled)
        with ExitStack() as sessions:
            for session in SESSIONS:
                sessions.enter_context(session(self, {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}))
            if not ours:
                return generate(self, *args, **kwargs)
            self._compiled_call_impl = None
            try:
                return generate(self, *args, **kwargs)
            finally:
                self._compiled_call_impl = compiled

    generation.GenerationMixin.generate = as_it_is


@integration(
    "transformers.generation.utils",
    touches="DeferredStopCheck.is_supported",
    why="the host queues a step while another is replayed",
)
def _stop_a_step_late(generation: ModuleType) -> None:
    """transformers asks in every step whether all rows have ended, and waits for the answer; on Apple's devices it takes that of
    the step before. So it may where steps are replayed and nothing can see the token too many: it is dropped, but processors,
    criteria and random numbers of the caller's would have had a turn more.
    """
    check = getattr(generation, "DeferredStopCheck", None)
    if check is None:
        return
    is_supported = check.is_supported

    @wraps(is_supported)
    def also_for_replays(device: Any, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
        ours = device.type == "cuda" and getattr(cache, "sloth_stops_late", False) and not (cache_is_returned or is_assistant)
        return ours or is_supported(device, cache, cache_is_returned, is_assistant)

    check.is_supported = staticmethod(also_for_replays)
