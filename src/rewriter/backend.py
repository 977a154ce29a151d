"""`torch.compile(model, backend="sloth")`: rewrite what the registry knows, then hand the graph to Inductor."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from sloth import kernels
from sloth.rewriter.pipeline import rewrite
from sloth.rewriter.registry import constructs, patterns
from sloth.rewriter.report import GraphReport

log = logging.getLogger("sloth")
_listeners: list[list[GraphReport]] = []

OPTIONS = {
    "sloth.disable": "names of patterns or constructs not to rewrite, comma-separated or a list",
    "sloth.inner_backend": "what compiles the rewritten graph instead of Inductor: the name of any Dynamo backend",
}


def sloth(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The Dynamo backend. `mode` and `options` are Inductor's; sloth's own options are those of OPTIONS.

    Raises ValueError for an option `sloth.…` that is not known, and what Inductor raises for its own.
    """
    own = {k: v for k, v in (options or {}).items() if k.startswith("sloth.")}
    rest = {k: v for k, v in (options or {}).items() if not k.startswith("sloth.")}
    if unknown := sorted(own.keys() - OPTIONS.keys()):
        known = "; ".join(f"{k}: {what}" for k, what in OPTIONS.items())
        raise ValueError(f"unknown option {', '.join(unknown)} of backend 'sloth'. Known are: {known}")
    inner = own.get("sloth.inner_backend", "inductor")
    compiler = torch._TorchCompileInductorWrapper(mode, rest, None) if inner == "inductor" else lookup_backend(inner)

    disabled = own.get("sloth.disable", ())
    disabled = set(disabled.split(",") if isinstance(disabled, str) else disabled)
    if strange := disabled - {p.name for p in patterns()} - {c.name for c in constructs()}:
        raise ValueError(f"sloth.disable names {', '.join(sorted(strange))}; known are {', '.join(p.name for p in patterns())}")
    entries = [p for p in patterns() if not {p.name, p.construct.name} & disabled]

    report = rewrite(gm, entries, constructs())
    log.info("sloth: %s", report.line({c.name: c.title for c in constructs()}))
    for listener in _listeners:
        listener.append(report)
    start = time.perf_counter()
    with torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag}sloth-{_sources()}"):
        compiled = compiler(gm, example_inputs)
    report.seconds[inner] = time.perf_counter() - start
    return compiled


@cache
def _sources() -> str:
    """A digest of our kernels: torch's caches on disk must not outlive the code that was compiled into them."""
    digest = hashlib.sha256()
    for file in sorted(Path(kernels.__path__[0]).glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def listening() -> Iterator[list[GraphReport]]:
    """The reports of the graphs compiled meanwhile, by this thread or any other."""
    reports: list[GraphReport] = []
    _listeners.append(reports)
    try:
        yield reports
    finally:
        _listeners.remove(reports)
