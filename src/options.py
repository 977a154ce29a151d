"""The options of the backend, from `torch.compile(…, options={…})` and from the environment.

    SLOTH_OPTIONS="sloth.disable=rope,layer_norm;sloth.linear_cross_entropy.budget=83886080"

The environment serves those who have no `options=` to write to: Trainer, TRL's command line, accelerate's config. What the call
says counts more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from sloth.rewriter.match.pattern import Deferral, Pattern
from sloth.rewriter.match.registry import constructs, deferrals, patterns

VARIABLE = "SLOTH_OPTIONS"
OPTIONS = {
    "sloth.disable": "names of patterns or constructs not to rewrite, comma-separated or a list",
    "sloth.linear_cross_entropy.budget": "bytes of logits at a time; any number of an entry's operator is set so",
    "sloth.inner_backend": "what compiles the rewritten graph instead of Inductor: the name of any Dynamo backend",
}


@dataclass(frozen=True)
class Options:
    """inner: the compiler behind; rest: what is Inductor's; arguments: of operators, by entry; entries, deferrals: all that are
    not disabled.
    """

    inner: str = "inductor"
    rest: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: tuple[Pattern, ...] = ()
    deferrals: tuple[Deferral, ...] = ()


def parse(options: dict[str, Any] | None) -> Options:
    """Raises ValueError for an option `sloth.…` that is not known or has a value that it cannot have."""
    given = {**_of_environment(), **(options or {})}
    own = {k: v for k, v in given.items() if k.startswith("sloth.")}
    arguments = _arguments(own)
    if unknown := sorted(own.keys() - OPTIONS.keys()):
        known = "; ".join(f"{k}: {what}" for k, what in OPTIONS.items())
        near = get_close_matches(unknown[0], OPTIONS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown option {', '.join(unknown)} of backend 'sloth'.{hint} Known are: {known}")
    inner = own.get("sloth.inner_backend", "inductor")
    if not isinstance(inner, str):
        raise ValueError(f"sloth.inner_backend is the name of a backend, not {inner!r}")
    disabled = _disabled(own.get("sloth.disable", ()))
    return Options(
        inner,
        {k: v for k, v in given.items() if k not in own and not k.startswith("sloth.")},
        arguments,
        tuple(e for e in patterns() if not {e.name, *(c.name for c in (e.construct, *e.also))} & disabled),
        tuple(d for d in deferrals() if not {d.name, d.construct.name} & disabled),
    )


def _of_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(";"))):
        key, equals, value = (s.strip() for s in part.partition("="))
        if not equals or not key.startswith("sloth."):
            raise ValueError(f"{VARIABLE} holds {part!r}; it is a list of sloth.NAME=VALUE, separated by ';'")
        found[key] = int(value) if value.lstrip("-").isdigit() else value
    return found


def _disabled(names: Any) -> set[str]:
    if not isinstance(names, str | list | tuple | set):
        raise ValueError(f"sloth.disable is a list of names, or names with commas between, not {names!r}")
    disabled = {name.strip() for name in (names.split(",") if isinstance(names, str) else names)} - {""}
    known = (*patterns(), *deferrals())
    if strange := disabled - {e.name for e in known} - {c.name for c in constructs()}:
        raise ValueError(f"sloth.disable names {', '.join(sorted(strange))}; known are {', '.join(e.name for e in known)}")
    return disabled


def _arguments(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Takes `sloth.NAME.ARGUMENT` out of the options: a number for the operators of the entry NAME and of those named NAME_…
    (the same in other cases). ValueError for what is no number.
    """
    found: dict[str, dict[str, Any]] = {}
    known = set()
    for key in sorted(options, key=len):  # the most special one last
        name, _, argument = key.removeprefix("sloth.").partition(".")
        for p in patterns():
            kinds = {a.name: str(a.type) for a in p.op._schema.arguments}
            if argument not in kinds or not f"{p.name}_".startswith(f"{name}_"):
                continue
            value = options[key]
            if kinds[argument] not in ("int", "float") or not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{key}={value!r}: only numbers can be set, and this is a {kinds[argument]}")
            found.setdefault(p.name, {})[argument] = value
            known.add(key)
    for key in known:
        del options[key]
    return found
