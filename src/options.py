"""The options of the backend, from `torch.compile(…, options={…})` and from the environment.

    SLOTH_OPTIONS="sloth.disable=rope,layer_norm;sloth.linear_cross_entropy.budget=83886080"

The environment serves those who have no `options=` to write to: Trainer, TRL's command line, accelerate's config. What the call
says counts more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sloth.rewriter.match.pattern import Construct, LazyOutputRule, Pattern
from sloth.rewriter.match.registry import constructs, deferrals, patterns
from sloth.rewriter.notices import did_you_mean

VARIABLE = "SLOTH_OPTIONS"
OPTIONS = {
    "sloth.disable": "names of patterns or constructs not to rewrite, comma-separated or a list",
    "sloth.only": "the same, of those to rewrite: no others are",
    "sloth.always": "the same, of those to rewrite wherever it is legal, though the cost stage says that it does not pay",
    "sloth.limit": "how many rewrites are made in a graph, in its order; halving it finds the one that is to blame",
    "sloth.linear_cross_entropy.budget": "bytes of logits at a time; any number of an entry's operator is set so",
    "sloth.checkpoint_offload": "True: inputs of checkpointed layers wait in host memory for their backward pass",
    "sloth.verify": "True: each distinct rewrite is checked against what it replaces and against fp64, and left out if it fails",
    "sloth.inner_backend": "what compiles the rewritten graph instead of Inductor: the name of any Dynamo backend",
}


@dataclass(frozen=True)
class Options:
    """inner: the compiler behind; rest: what is Inductor's; arguments: of operators, by entry; entries, deferrals: all that are
    wanted; limit: of rewrites in a graph; checkpoint_offload: inputs of layers wait in host memory for their backward pass;
    verify: rewrites are checked while they are compiled.
    """

    inner: str = "inductor"
    rest: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: tuple[Pattern, ...] = ()
    deferrals: tuple[LazyOutputRule, ...] = ()
    limit: int | None = None
    always: frozenset[str] = frozenset()
    checkpoint_offload: bool = False
    verify: bool = False

    def without(self, names: Collection[str]) -> Options:
        """The same, without entries of these names."""
        entries, deferrals = (tuple(e for e in each if e.name not in names) for each in (self.entries, self.deferrals))
        return replace(self, entries=entries, deferrals=deferrals)


def parse(options: dict[str, Any] | None) -> Options:
    """Raises ValueError for an option `sloth.…` that is not known or has a value that it cannot have."""
    given = {**_of_environment(), **(options or {})}
    own = {k: v for k, v in given.items() if k.startswith("sloth.")}
    arguments = _arguments(own)
    if unknown := sorted(own.keys() - OPTIONS.keys()):
        known = "; ".join(f"{k}: {what}" for k, what in OPTIONS.items())
        hint = did_you_mean(unknown[0], OPTIONS)
        raise ValueError(f"unknown option {', '.join(unknown)} of backend 'sloth'.{hint} Known are: {known}")
    inner = own.get("sloth.inner_backend", "inductor")
    if not isinstance(inner, str):
        raise ValueError(f"sloth.inner_backend is the name of a backend, not {inner!r}")
    limit = own.get("sloth.limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise ValueError(f"sloth.limit is a number of rewrites, 0 or more, not {limit!r}")
    switches = {name: own.get(name, False) for name in ("sloth.checkpoint_offload", "sloth.verify")}
    for name, value in switches.items():
        if value not in (False, True):
            raise ValueError(f"{name} is True or False (in {VARIABLE}: 1 or 0), not {value!r}")
    disabled = _named("sloth.disable", own)
    only = _named("sloth.only", own) if "sloth.only" in own else None

    def is_wanted(entry: Pattern | LazyOutputRule, constructs: Iterable[Construct]) -> bool:
        names = {c.name for c in constructs}
        return not {entry.name, *names} & disabled and (only is None or entry.name in only or names <= only)

    return Options(
        inner,
        {k: v for k, v in given.items() if k not in own and not k.startswith("sloth.")},
        arguments,
        tuple(e for e in patterns() if is_wanted(e, (e.construct, *e.also))),
        tuple(d for d in deferrals() if is_wanted(d, (d.construct,))),
        limit,
        frozenset(_named("sloth.always", own)),
        *map(bool, switches.values()),
    )


def _of_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(";"))):
        key, equals, value = (s.strip() for s in part.partition("="))
        if not equals or not key.startswith("sloth."):
            raise ValueError(f"{VARIABLE} holds {part!r}; it is a list of sloth.NAME=VALUE, separated by ';'")
        found[key] = int(value) if re.fullmatch(r"-?\d+", value) else value
    return found


def _named(option: str, options: dict[str, Any]) -> set[str]:
    names = options.get(option, ())
    if not isinstance(names, str | list | tuple | set) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{option} is a list of names, or names with commas between, not {names!r}")
    named = {name.strip() for name in (names.split(",") if isinstance(names, str) else names)} - {""}
    known = list(dict.fromkeys([*(e.name for e in (*patterns(), *deferrals())), *(c.name for c in constructs())]))
    if strange := sorted(named - set(known)):
        hint = did_you_mean(strange[0], known)
        raise ValueError(f"{option} names {', '.join(strange)}.{hint} Known are {', '.join(known)}")
    return named


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
                raise ValueError(f"{key}={value!r}: {argument} is of type {kinds[argument]}, and only numbers can be set")
            found.setdefault(p.name, {})[argument] = value
            known.add(key)
    for key in known:
        del options[key]
    return found
