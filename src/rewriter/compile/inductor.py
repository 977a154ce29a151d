"""The compiler behind the rewriter: Inductor with the user's mode and options, or any other Dynamo backend."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache, partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx

import sloth
from sloth.compat.dispatch import enter_autocast, exit_autocast
from sloth.compat.inductor import InductorOptions, config, functorch_config
from sloth.compat.triton import active_driver, triton_key
from sloth.integrations.integration import integration
from sloth.rewriter.compile.drop_rng_tag import drop_rng_tag_from_sdpa
from sloth.rewriter.compile.kernels_ahead import compile_kernels_ahead
from sloth.rewriter.compile.passes import (
    Pass,
    in_one_call,
    rematerialize_cheap_ops,
    reuse_operand_buffers,
    save_checkpoint_boundaries,
    save_thin_products,
    write_as_read,
)
from sloth.rewriter.graph.ambient import dtypes
from sloth.rewriter.graph.value import Symbol

# On a GPU, casts of adapters and of their gradients, a dozen a layer and pass, are one launch where none waits for another.
# What is computed element by element waits for memory: of its block sizes Inductor would compile and time several, seconds of the
# first step, in each process again where workers compile under another key of caches than they are looked up by.
PREFERRED = {"combo_kernels": True, "combo_kernels_pointwise_only": True, "triton.autotune_pointwise": False}
# Inductor's code asks each tensor for its sizes and strides in every call, 250 times for a layer of a QLoRA model: a twentieth of
# the host's work. Dynamo's guards, and `regions` for what parts hand on, ask the same. Whoever sets the variables gets them.
ASSERTS = {"size_asserts": "TORCHINDUCTOR_SIZE_ASSERTS", "alignment_asserts": "TORCHINDUCTOR_ALIGNMENT_ASSERTS"}
# In each process anew Inductor would time reductions of several block sizes, which add up in other orders: other bits, same seed.
# A step of a 4-layer Llama of 1,024 channels takes an H200 15.1 ms with it and 15.2 without (4 × 1,001 tokens, torch 2.11).
# `max-autotune` asks for what is fastest.
SAME_BITS = "deterministic"
# Kernels that we write are launched as Inductor's own: by torch, not by C code that gcc compiles for each of them, and the next
# process loads them from its cache instead of compiling them again. Workers that compile are told by their environment.
STATIC, STATIC_VARIABLE = "static_launch_user_defined_triton_kernels", "TORCHINDUCTOR_STATIC_LAUNCH_USER_DEFINED_TRITON_KERNELS"
AT_ONCE = {"force_non_lazy_backward_lowering": True}
AUTOCAST = tuple(f"{f.__module__}.{f.__qualname__}" for f in (enter_autocast, exit_autocast))


def compiler(name: str, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """The compiler of this name. Raises what Inductor raises for options that it does not know."""
    if name == "inductor":
        late = (rematerialize_cheap_ops, in_one_call, write_as_read, reuse_operand_buffers, compile_kernels_ahead)
        passes = {
            "joint_custom_pre_pass": (save_checkpoint_boundaries, save_thin_products, drop_rng_tag_from_sdpa),
            "post_grad_custom_post_pass": late,
        }
        theirs = {at: options.get(at) or getattr(config, at) for at in passes}
        ours = {at: Pass(sources_digest(), *passes[at], behind=theirs[at]) for at in passes}
        preferred = {name: value for name, value in PREFERRED.items() if hasattr(config, name)}
        preferred |= {name: False for name, variable in ASSERTS.items() if variable not in os.environ and hasattr(config, name)}
        if _may_launch():
            preferred[STATIC] = True
        if hasattr(config, SAME_BITS) and not InductorOptions(mode, options, None).config.get(
            "max_autotune", config.max_autotune
        ):
            preferred[SAME_BITS] = True
        return partial(_inductor, InductorOptions(mode, preferred | options | ours, None).config)
    if mode or options:
        raise ValueError(f"mode and options are Inductor's, and sloth.inner_backend is {name!r}")
    from sloth.compat.dynamo import lookup_backend

    return lookup_backend(name)


def uses_cudagraphs(mode: str | None, options: dict[str, Any]) -> bool:
    """Will Inductor capture CUDA graphs? They hold the addresses of all that they read."""
    chosen = InductorOptions(mode, options, None).config
    return chosen.get("triton.cudagraphs", config.triton.cudagraphs)


def compile_with(inner: Callable[..., Any], gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """`inner(gm, example_inputs)`, under cache keys that know our sources."""
    with cache_key_scope({}):
        return inner(gm, example_inputs)


def _inductor(chosen: dict[str, Any], gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor, which compiles the backward pass too: when `backward()` is called it is too late to do without a rewrite."""
    with _launched_by_torch(), functorch_config.patch(AT_ONCE) if hasattr(functorch_config, *AT_ONCE) else nullcontext():
        from sloth.compat.inductor import compile_fx, compile_fx_inner  # Inductor is imported by whom it compiles for

        return compile_fx(gm, example_inputs, inner_compile=cache_key_scope({})(compile_fx_inner), config_patches=chosen)


def start_workers(gm: fx.GraphModule) -> None:
    """For a graph on a GPU, if `start_early` did not: `_start_workers`. What it began is done then."""
    examples = (n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder"))
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in examples):
        for thread in _begun:  # which stay there: who compiles at the same time waits too
            thread.join()
        _start_workers()


def start_early() -> None:
    """On a machine with a GPU, what is needed before the first kernel is made while Dynamo traces: Triton's driver, which gcc
    compiles once for each cache, its key in caches and torch's, for which all their files are read, and Inductor's workers.
    Seconds each.
    """
    if not torch.cuda.is_available():
        return
    threading.Thread(target=_start_triton, name="sloth-triton-driver", daemon=True).start()
    if torch.cuda.is_initialized():  # whoever has put nothing there may be about to train on the CPU
        from sloth.compat.inductor import AsyncCompile, torch_key  # noqa: F401  (here: two threads must not import Inductor at once)

        _begun.append(threading.Thread(target=_start_inductor, name="sloth-inductor-workers", daemon=True))
        _begun[-1].start()


_begun: list[threading.Thread] = []  # that set the environment: who reads it waits for them


def _start_triton() -> None:
    active_driver()
    triton_key()


def _start_inductor() -> None:
    """What it raises, whoever compiles meets again."""
    from sloth.compat.inductor import torch_key

    with suppress(Exception):
        torch_key()  # torch remembers it
        _start_workers()


def _start_workers() -> None:
    """Let Inductor start its processes now, if it will need them: until they are ready it compiles the kernels of a GPU one by
    one itself. With a cache from before it may need none.
    """
    with _launched_by_torch():
        from sloth.compat.inductor import AsyncCompile, cache_dir

        if not Path(cache_dir(), "fxgraph").exists():
            AsyncCompile.use_process_pool()


@contextmanager
def _launched_by_torch() -> Iterator[None]:
    """For workers that Inductor starts meanwhile: they compile for everybody, and know of this from their environment."""
    started = _may_launch()
    if started:
        os.environ[STATIC_VARIABLE] = "1"
    try:
        yield
    finally:
        if started:
            os.environ.pop(STATIC_VARIABLE, None)


def _may_launch() -> bool:
    """On CUDA, unless the user's environment says something else."""
    return torch.version.cuda is not None and STATIC_VARIABLE not in os.environ and hasattr(config, STATIC)


@contextmanager
def cache_key_scope(known: dict) -> Iterator[None]:
    """While something is compiled. `known` is what `memoized_triton_analysis` remembers.

    torch's key for AOTAutograd's results knows that autocast is on around the graph, not for which dtype; and it refuses graphs
    that hold autocast themselves, as a trainer's do. What their text in the key does not say, the dtype of a block that names
    none, is what this thread has.
    """
    tag, own = torch.compiler.config.cache_key_tag, f"sloth-{sources_digest()}-{dtypes()}"
    cacheable = config.unsafe_marked_cacheable_functions | dict.fromkeys(AUTOCAST, "in the key")
    with (
        torch.compiler.config.patch(cache_key_tag=tag if tag.endswith(own) else tag + own),
        config.patch(unsafe_marked_cacheable_functions=cacheable),
        memoized_triton_analysis(known),
    ):
        yield


@cache
def sources_digest() -> str:
    """A digest of this package: torch's caches on disk must not outlive the code that was compiled into them."""
    digest = hashlib.sha256()
    for file in sorted(Path(sloth.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def memoized_triton_analysis(known: dict) -> Iterator[None]:
    """Let torch analyse each Triton kernel once per signature while one graph is compiled by this thread.

    To learn which pointers a kernel writes, torch lowers it to Triton's IR anew for every launch, three or four times over a
    compilation: a quarter of the first step of a model with hundreds of launches. What it finds depends on the kernel, the dtypes
    and the constants alone. `known` is the memo.
    """
    token = _memo.set(known)
    try:
        yield
    finally:
        _memo.reset(token)


_memo: ContextVar[dict | None] = ContextVar("sloth_analyses", default=None)  # of what this thread compiles
ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")  # as torch calls it, newer and older


def _remembering(analyse: Callable[..., Any]) -> Callable[..., Any]:
    """torch's analysis of a kernel, for whoever compiles; it asks the memo of a thread that has one."""

    @wraps(analyse)
    def once(kernel: Any, arguments: dict[str, Any], *rest: Any) -> Any:
        known = _memo.get()
        signature = tuple(_signature(v) for v in arguments.values())
        if known is None or None in signature or any(rest):
            return analyse(kernel, arguments, *rest)
        key = (_source(kernel), tuple(arguments), signature)
        if key not in known:
            known[key] = analyse(kernel, arguments, *rest)
        return known[key]

    return once


@integration("torch._higher_order_ops.triton_kernel_wrap", touches=" or ".join(ANALYSES), why="a kernel is analysed once a graph")
def _remember_analyses(module: ModuleType) -> None:
    name = next(name for name in ANALYSES if hasattr(module, name))
    setattr(module, name, _remembering(getattr(module, name)))


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
