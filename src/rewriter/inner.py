"""The compiler behind the rewriter: Inductor with the user's mode and options, or any other Dynamo backend."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._higher_order_ops import triton_kernel_wrap

from sloth.rewriter.again import MadeAgain
from sloth.rewriter.ir import Symbol


def compiler(name: str, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """The compiler of this name. Raises what Inductor raises for options that it does not know."""
    if name == "inductor":
        if torch._inductor.config.post_grad_custom_post_pass is None:  # nobody's own
            options = {"post_grad_custom_post_pass": MadeAgain(_sources())} | options
        return torch._TorchCompileInductorWrapper(mode, options, None)
    if mode or options:
        raise ValueError(f"mode and options are Inductor's, and sloth.inner_backend is {name!r}")
    return lookup_backend(name)


def compile_with(inner: Callable[..., Any], gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """`inner(gm, example_inputs)`, under cache keys that know our sources."""
    tag = f"{torch.compiler.config.cache_key_tag}sloth-{_sources()}"
    with torch.compiler.config.patch(cache_key_tag=tag), _analysed_once():
        return inner(gm, example_inputs)


@cache
def _sources() -> str:
    """A digest of this package: torch's caches on disk must not outlive the code that was compiled into them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.parent.glob("*/*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _analysed_once() -> Iterator[None]:
    """Let torch analyse each Triton kernel once per signature while one graph is compiled.

    To learn which pointers a kernel writes, torch lowers it to Triton's IR anew for every launch, three or four times over a
    compilation: a quarter of the first step of a model with hundreds of launches. What it finds depends on the kernel, the dtypes
    and the constants alone. The memo lives for one compilation; where torch has no such function, nothing happens.
    """
    name = next((n for n in ("identify_accessed_tensors", "identify_mutated_tensors") if hasattr(triton_kernel_wrap, n)), None)
    if name is None:
        yield
        return
    analyse, known = getattr(triton_kernel_wrap, name), {}

    def once(kernel: Any, arguments: dict[str, Any], *rest: Any) -> Any:
        signature = tuple(_signature(v) for v in arguments.values())
        if None in signature or any(rest):
            return analyse(kernel, arguments, *rest)
        key = (_source(kernel), tuple(arguments), signature)
        if key not in known:
            known[key] = analyse(kernel, arguments, *rest)
        return known[key]

    with patch.object(triton_kernel_wrap, name, once):
        yield


def _source(kernel: Any) -> tuple:
    """The function behind a kernel: a launch with num_warps= wraps it in an autotuner of its own, with one configuration."""
    configs = getattr(kernel, "configs", None)
    return (kernel.fn, *sorted(configs[0].kwargs.items())) if configs else (kernel,)


def _signature(value: Any) -> tuple | None:
    """What the analysis sees of an argument; None for what is not understood here."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype)
    if isinstance(value, Symbol):
        return ("symbol", type(value))
    return ("constant", type(value), value) if isinstance(value, bool | int | float | str | None) else None
