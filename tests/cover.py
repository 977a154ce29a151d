"""Which of the combinations of a test's parameters run in the default tier: a few that hold all of them two by two, say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any


def cover(rows: Sequence[Mapping[str, Any]], strength: int, alike: Mapping[str, Callable[[Any], Any]]) -> list[int]:
    """Rows that hold each value, and each combination of `strength` values, that any row holds. alike: by name of a parameter,
    what of its value matters in combinations. Greedy, the first of equally good rows first.
    """
    held = []
    for row in rows:
        told = sorted((name, repr(alike[name](value) if name in alike else value)) for name, value in row.items())
        single = {((name, repr(value)),) for name, value in row.items()}
        held.append(single | set(combinations(told, min(strength, len(told)))))
    chosen, left = [], set().union(*held)
    while left:
        best = max(range(len(rows)), key=lambda i: len(held[i] & left))
        chosen.append(best)
        left -= held[best]
    return sorted(chosen)
