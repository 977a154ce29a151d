"""What a run is told: once what it should know, and on one line what was found."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from sloth.compat import is_tested, window

log = logging.getLogger("sloth")
OWN_LEVEL = logging.INFO - 1  # so that INFO, as somebody else sets it, is another
_said: set[str] = set()


def warn_once(message: str) -> None:
    """A warning, the first time that it is given in this process."""
    _once(logging.WARNING, message)


def tell_once(message: str) -> None:
    """What is no warning, the first time in this process."""
    _once(logging.INFO, message)


def _once(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.log(level, "sloth: %s", message)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """For an error about a name that is not known: a sentence with the nearest one that is, if any is near."""
    near = get_close_matches(given, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def was_told(beginning: str) -> bool:
    return any(message.startswith(beginning) for message in _said)


def warn_of_versions() -> None:
    """Of what nobody tried: torch, and transformers where it is in use."""
    for package in ("torch", "transformers"):
        module = sys.modules.get(package)
        found = getattr(module, "__version__", None)
        if found is not None and not is_tested(package, str(found)):
            warn_once(
                f"{package} {found} was not tested ({package} {window(package)} are). What cannot be handled is left to Inductor;"
                " compare losses with backend='inductor' once"
            )


def warn_of_recompilations(compile_id: Any) -> None:
    """Where the graph that is compiled is the last one that Dynamo allows for its code."""
    from sloth.compat import dynamo  # not before: patterns import this module, and Dynamo takes a second to import

    number = getattr(compile_id, "frame_compile_id", None)
    limit = getattr(getattr(dynamo, "config", None), "recompile_limit", None)
    if number is not None and limit is not None and number + 1 == limit:
        warn_once(
            f"the same code is compiled a last time (recompile_limit is {limit}): after that Dynamo runs it without a compiler."
            " TORCH_LOGS=recompiles prints what changes from call to call; torch._dynamo.config.recompile_limit allows more"
        )


class _Aside(logging.StreamHandler):
    """To stderr, for programs that set up no logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _as_root_says(record: logging.LogRecord) -> bool:
    """Where the program set up logging, and said nothing of sloth's, its level counts."""
    root = logging.getLogger()
    return log.level != OWN_LEVEL or not root.handlers or record.levelno >= root.level


def speak() -> None:
    """Let one line for each graph be seen where nobody said what to do with sloth's messages."""
    if log.level == logging.NOTSET and not log.handlers:
        log.setLevel(OWN_LEVEL)
        log.addHandler(_Aside())
        log.addFilter(_as_root_says)
