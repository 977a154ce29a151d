"""`python -m sloth zoo`."""

from __future__ import annotations

import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: configurations are made, weights are random

from rich.console import Console

from sloth.rewriter.match.registry import constructs
from sloth.rewriter.notices import did_you_mean
from sloth.zoo.measure import RUNS, Row
from sloth.zoo.models import architectures
from sloth.zoo.results import WRONG, compared, counted, share, totals, wrong
from sloth.zoo.sizes import VARIANTS
from sloth.zoo.sweep import Found, key, load, summary, sweep, versions, write


class ZooError(ValueError):
    """What was asked for cannot be run; the message says what to give."""


def run(
    console: Console, archs: list[str], out: Path | None, compare: Path | None, only: tuple[str, ...], limit: float, jobs: int
) -> bool:
    """Does everything train as in eager? With `compare`: is nothing worse than there, and all that it lacks as in eager? Raises
    ZooError for what it cannot run.
    """
    known = [*architectures(), *VARIANTS]
    for names, all_of_them, what in ((archs, known, "an architecture"), (only, list(RUNS), "a run")):
        for name in names:
            if name not in all_of_them:
                raise ZooError(f"{name!r} is not {what} that is known.{did_you_mean(name, all_of_them)}")
    try:
        before = load(compare)["rows"] if compare else None
        held: Found = load(out) if out and out.exists() else {"versions": {}, "rows": {}}
    except (OSError, ValueError) as e:
        raise ZooError(str(e)) from e
    wanted, runs, started = archs or known, only or tuple(RUNS), time.perf_counter()
    rows: dict[str, Row] = held["rows"]
    now = versions()
    code = key(now)
    there = {a: rows.get(a, {"runs": {}})["runs"] for a in wanted}
    missing = {a: tuple(r for r in runs if not _stands(there[a].get(r), code)) for a in wanted}
    todo = {a: names for a, names in missing.items() if names}
    console.print(f"{len(wanted)} architectures" + f", {len(wanted) - len(todo)} of them in {out}" * bool(rows))
    if other := sum(r in there[a] and there[a][r].get("of") != code for a, names in missing.items() for r in names):
        console.print(f"{other} runs in {out} are of other code or other versions: they are run again", markup=False)
    for i, row in enumerate(sweep(todo, limit, jobs), 1):
        known_runs = there[row["arch"]] | {r: one | {"of": code} for r, one in row["runs"].items()}
        rows[row["arch"]] = row | {"runs": {r: known_runs[r] for r in RUNS if r in known_runs}}
        left = (time.perf_counter() - started) / i * (len(todo) - i)
        console.print(f"{i:3}/{len(todo)}, {left / 60:2.0f} min left  {summary(row)}", markup=False)
        if out:
            used = {one.get("of") for row in rows.values() for one in row["runs"].values()}
            known_versions = {k: v for k, v in held["versions"].items() if k in used} | {code: now}
            write(out, {"versions": known_versions, "rows": rows})
    chosen = {a: rows[a] | {"runs": {r: rows[a]["runs"][r] for r in runs}} for a in wanted}
    good = _sums(console, chosen)
    if before is None:
        return good
    worse, better = compared(before, chosen, whole=not archs)
    for title, lines in (("better or new", better), ("worse", worse)):
        console.print(f"{title} than in {compare}:" if lines else f"nothing is {title}", markup=False)
        for line in lines:
            console.print(f"  {line}", markup=False)
    return not worse  # what went wrong before, too, is no news


def _stands(run: Row | None, code: str) -> bool:
    """Is this run of this code, and not one that more time might end?"""
    return run is not None and run.get("of") == code and not run.get("late")


def _sums(console: Console, rows: dict[str, Row]) -> bool:
    titles, good = {c.name: c.title for c in constructs()}, True
    for name in RUNS:
        found = totals(rows, name)
        if found["train"]:
            good = good and found["ok"] == found["train"]
            sites = counted(found["constructs"], titles)
            whole = share(found["constructs"])
            console.print(f"{name}: {found['ok']} of {found['train']} train as in eager; {whole:.1%} ({sites})")
    for arch, row in rows.items():
        for name, one in row["runs"].items():
            if one["state"] in WRONG:
                console.print(f"{one['state']}: {arch}, {name}: {wrong(one)}; aot_eager alone: {one.get('torch')}", markup=False)
    return good
