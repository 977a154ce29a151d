"""Which of the legal matches are made: the largest that do not overlap, and which of these one call can stand for."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from sloth.rewriter.graph.canonical import VIEWS
from sloth.rewriter.graph.value import Value, literal_key
from sloth.rewriter.match.matcher import Match
from sloth.rewriter.plan.legality import is_list, match_arguments, takes_many
from sloth.rewriter.plan.trained import gets_gradient


def select_non_overlapping(matches: list[Match], standing: Iterable[Match] = ()) -> tuple[list[Match], list[tuple[Match, Match]]]:
    """The largest matches that overlap neither each other nor `standing` ones, in graph order, and the losers, each with the
    match that took its place.
    """
    taken = {v: m for m in standing for v in _own(m)}
    accepted, losers = [], []
    for m in sorted(matches, key=lambda m: (*(-n for n in m.size), m.roots[0].id)):
        winner = next((taken[v] for v in _own(m) if v in taken), None)
        if winner is not None:
            losers.append((m, winner))
            continue
        taken.update(dict.fromkeys(_own(m), m))
        accepted.append(m)
    _trade(accepted, losers, set(standing))
    return sorted(accepted, key=lambda m: m.roots[0].id), losers


def _trade(accepted: list[Match], losers: list[tuple[Match, Match]], standing: set[Match]) -> None:
    """Where a winner keeps out a match of another construct, but a smaller match for its own result would not: those two, if they
    cover more together. An adapter's sum in front of a norm is the adapter's, not the norm's residual.
    """
    by_root: dict[Value, list[Match]] = {}
    for m, _ in losers:
        for root in m.roots:
            by_root.setdefault(root, []).append(m)
    for loser, winner in list(losers):
        own = winner.pattern.construct
        if winner in standing or winner not in accepted or loser in accepted or loser.pattern.construct is own:
            continue
        others = {v for m in (*accepted, *standing) if m is not winner for v in _own(m)}
        smaller = [m for root in winner.roots for m in by_root.get(root, ()) if m.pattern.construct is own]
        fitting = [m for m in smaller if others.isdisjoint(_own(m)) and not set(_own(m)) & set(_own(loser))]
        best = max(fitting, key=lambda m: m.size, default=None)
        if best is not None and others.isdisjoint(_own(loser)) and best.size[0] + loser.size[0] > winner.size[0]:
            accepted[accepted.index(winner)] = best
            accepted.append(loser)
            losers[:] = [(m, w) for m, w in losers if m not in (loser, best)] + [(winner, best)]


def _own(m: Match) -> list[Value]:
    """What no other match may compute too: anything but views."""
    return [v for v in m.values if v.op not in VIEWS] or list(m.roots)


def group_horizontally(accepted: list[Match], trained: frozenset[fx.Node]) -> list[list[Match]]:
    """Matches that one call can stand for: their operator takes lists, and all its other arguments are the same. Where a result
    of a call needs a gradient, all of them do, and get one (trained.py).
    """
    groups: dict[object, list[Match]] = {}
    for m in accepted:
        op, root = m.pattern.op, m.roots[0]
        shared = [a for p, a in zip(op._schema.arguments, match_arguments(m), strict=True) if not is_list(p)]
        needs = root.meta.requires_grad, gets_gradient(root, trained)
        key = (op, literal_key(tuple(shared)), root.region, *needs) if takes_many(op) else m
        groups.setdefault(key, []).append(m)
    return list(groups.values())
