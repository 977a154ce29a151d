"""How another package is met: what of it is touched, why, and whether it worked.

    @integration("transformers.trainer", touches="Trainer._wrap_model", why="evaluation runs the compiled model")
    def evaluate_compiled(trainer: ModuleType) -> None: …

The function is called with the module now, or right behind its import; nothing is imported for it. What it raises is logged and
costs this integration alone: no import and no run of somebody else's fails for it. `integrations()` lists them all.
A module of integrations that cannot be imported, because another torch lacks a name that it needs, costs those of that module:
it is loaded with `load`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from sloth.integrations.import_hook import when_imported

log = logging.getLogger("sloth")
WAITING, ON = "waiting for its import", "on"
_known: dict[tuple[str, str], Integration] = {}


@dataclass
class Integration:
    """One touch. module: as it is imported. touches: the names in it. state: WAITING, ON, or what was raised."""

    module: str
    touches: str
    why: str
    install: Callable[[ModuleType], None]
    state: str = WAITING

    def __call__(self, module: ModuleType) -> None:
        if self.state == ON:
            return
        try:
            self.install(module)
            self.state = ON
        except Exception as e:
            self.state = f"off: {type(e).__name__}: {e}"
            log.warning("sloth: %s %s is left alone (%s), so not: %s", self.module, self.touches, self.state, self.why)


def integration(module: str, *, touches: str, why: str) -> Callable[[Callable[[ModuleType], None]], Callable[[ModuleType], None]]:
    """Install the function below, at once or when `module` is imported."""

    def enter(install: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        if (module, touches) not in _known:  # an entry point may import its module twice
            _known[module, touches] = Integration(module, touches, why, install)
            when_imported(module, _known[module, touches])
        return install

    return enter


def load(*modules: str) -> None:
    """Import these modules of integrations. Of one that cannot be, that is logged and listed."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as e:
            missing = Integration(name, "all of it", "what this module is for", lambda _: None, f"off: {type(e).__name__}: {e}")
            _known[name, missing.touches] = missing
            log.warning("sloth: %s is %s", name, missing.state)


def integrations() -> list[Integration]:
    """All that were entered, by the module that they touch."""
    return [_known[key] for key in sorted(_known)]
