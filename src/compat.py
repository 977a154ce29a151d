"""What sloth asks of torch's private parts in more than one place."""

from __future__ import annotations

from typing import Any


def is_ours(tx: Any) -> bool:
    """Does Dynamo, whose InstructionTranslator `tx` is, trace for sloth? What it is taught holds for such graphs alone."""
    return getattr(tx.output.compiler_fn, "__name__", None) == "sloth"
