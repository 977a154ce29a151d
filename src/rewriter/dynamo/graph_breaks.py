"""Where Dynamo cannot trace all of a model for sloth, that is told: what it does not compile is not rewritten."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from sloth.compat.dynamo import is_ours
from sloth.integrations.integration import integration
from sloth.integrations.trl import BEHIND
from sloth.rewriter.notices import tell_once, warn_once, was_told


def _telling(log: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's own notes of a break."""

    @wraps(log)
    def log_graph_break(self: Any, code_options: Any, reason: str, exc: BaseException) -> Any:
        if is_ours(self) and BEHIND in str(exc):
            tell_once(f"{BEHIND}. Nothing is lost: it is as fast as TRL's own code is")
        elif is_ours(self) and not (was_told(BEHIND) and _is_wrapper(self.f_code.co_filename)):
            first = next(iter(str(exc).strip().splitlines()), reason)
            warn_once(
                f"the model is not one graph ({first}): it is compiled in pieces, and some of it not at all."
                " TORCH_LOGS=graph_breaks says where"
            )
        return log(self, code_options, reason=reason, exc=exc)

    return log_graph_break


def _is_wrapper(file: str) -> bool:
    """Of those around a model, which stay as they are where it is cut at their call?"""
    return any(f"/{package}/" in file for package in ("accelerate", "peft"))


@integration(
    "torch._dynamo.symbolic_convert", touches="InstructionTranslatorBase.log_graph_break",
    why="a model that is not one graph is told",
)  # fmt: skip
def _tell(module: ModuleType) -> None:
    base = module.InstructionTranslatorBase
    base.log_graph_break = _telling(base.log_graph_break)
