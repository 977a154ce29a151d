"""What a run is told: once what it should know, and on one line what was found."""

from __future__ import annotations

import logging

import torch
from torch._dynamo.utils import counters

log = logging.getLogger("sloth")
TESTED = ((2, 11), (2, 13))  # the versions of torch, first and last, that sloth is tested with
_said: set[str] = set()


def warn_once(message: str) -> None:
    """A warning, the first time that it is given in this process."""
    if message not in _said:
        _said.add(message)
        log.warning("sloth: %s", message)


def warn_of_torch() -> None:
    """Of a version that nobody tried."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        first, last = (".".join(map(str, v)) for v in TESTED)
        warn_once(
            f"torch {torch.__version__} was not tested (torch {first} to {last} are). What cannot be handled is left to Inductor;"
            " compare losses with backend='inductor' once"
        )


def warn_of_recompilations(compile_id: torch._guards.CompileId | None) -> None:
    """Where the graph that is compiled is the last one that Dynamo allows for its code."""
    number = getattr(compile_id, "frame_compile_id", None)
    limit = torch._dynamo.config.recompile_limit
    if number is not None and number + 1 == limit:
        warn_once(
            f"the same code is compiled a last time (recompile_limit is {limit}): after that Dynamo runs it without a compiler."
            " TORCH_LOGS=recompiles prints what changes from call to call; torch._dynamo.config.recompile_limit allows more"
        )


def warn_of_breaks() -> None:
    """Where Dynamo could not trace all: for each reason, what it was."""
    for reason in list(counters["graph_break"]):
        warn_once(
            f"the model is not one graph ({reason.strip().splitlines()[0]}): it is compiled in pieces, and some of it not at all."
            " TORCH_LOGS=graph_breaks says where"
        )


class _Aside(logging.StreamHandler):
    """To stderr, for programs that set up no logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def speak() -> None:
    """Let one line for each graph be seen where nobody said what to do with sloth's messages."""
    if log.level == logging.NOTSET and not log.handlers:
        log.setLevel(logging.INFO)
        log.addHandler(_Aside())
