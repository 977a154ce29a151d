"""What a sweep found: what changed since another one, sums over all architectures, and the tables of docs/zoo.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from sloth.zoo.measure import AOT, RUNS, Row

Rows = Mapping[str, Row]
WRONG = ("differs", "fails")
WORTH = {"ok": 0, "untrained": 1, "differs": 2, "fails": 3}  # which state is the worse


def totals(rows: Rows, run: str) -> dict[str, Any]:
    """Of one run: architectures that train in eager, those that train here too and, of them, those that AOTAutograd compiled
    ("joint"), and matched / expected by construct.
    """
    found = [r["runs"][run] for r in rows.values() if r["runs"].get(run, {}).get("state", "untrained") != "untrained"]
    sites: dict[str, list[int]] = {}
    for one in found:
        for construct, counts in one.get("constructs", {}).items():
            sites[construct] = [a + b for a, b in zip(sites.get(construct, (0, 0)), counts, strict=True)]
    ok = [one for one in found if one["state"] == "ok"]
    joint = sum(one.get("inner") == AOT for one in ok)
    return {"train": len(found), "ok": len(ok), "joint": joint, "constructs": sites}


def share(sites: Mapping[str, Iterable[int]]) -> float:
    matched, expected = map(sum, zip(*sites.values(), strict=True)) if sites else (0, 0)
    return matched / expected if expected else 1.0


def counted(sites: Mapping[str, Iterable[int]], titles: Mapping[str, str] = MappingProxyType({})) -> str:
    """`5/5 RMSNorm, 2/2 RoPE`"""
    return ", ".join(f"{m}/{e} {titles.get(c, c)}" for c, (m, e) in sites.items())


def compared(before: Rows, now: Rows, whole: bool = True) -> tuple[list[str], list[str]]:
    """(what is worse, what is better or new): a line for each architecture and run. whole: `now` is of all architectures, so that
    one that is in `before` alone is gone. A run that `before` lacks is worse where it does not train as in eager.
    """
    worse, better = [], []
    for arch in sorted({*before, *now} if whole else {*now}):
        if arch not in now:
            worse.append(f"{arch}: is gone")
            continue
        if arch not in before:
            better.append(f"{arch}: is new ({_states(now[arch])})")
        for run, one in now[arch]["runs"].items():
            was = before.get(arch, {"runs": {}})["runs"].get(run)
            if was is not None:
                down, up = _changes(was, one)
                worse += [f"{arch}, {run}: {what}" for what in down]
                better += [f"{arch}, {run}: {what}" for what in up]
            elif one["state"] in WRONG:
                worse.append(f"{arch}, {run}: is {one['state']} ({wrong(one)})")
    return worse, better


def wrong(run: Row) -> str:
    """Why a run is not as in eager."""
    return run.get("why") or f"loss {run['loss']:.0e}, gradient {run['gradient']:.0e} of {run['worst']}"


def _states(row: Row) -> str:
    parts = []
    for run, one in row["runs"].items():
        counts = counted(one.get("constructs", {}))
        parts.append(f"{run} {one['state']}{': ' * bool(counts)}{counts}")
    return "; ".join(parts)


def _changes(was: Row, now: Row) -> tuple[list[str], list[str]]:
    worse: list[str] = []
    better: list[str] = []
    if was["state"] != now["state"]:
        into = worse if WORTH[now["state"]] > WORTH[was["state"]] else better
        into.append(f"was {was['state']}, is {now['state']} ({now.get('why') or now.get('worst', '')})".replace(" ()", ""))
    if "untrained" in (was["state"], now["state"]) or "fails" in (was["state"], now["state"]):
        return worse, better
    for construct in {**was["constructs"], **now["constructs"]}:
        (m0, e0), (m1, e1) = was["constructs"].get(construct, (0, 0)), now["constructs"].get(construct, (0, 0))
        text = f"{construct} was {m0}/{e0}, is {m1}/{e1}"
        if m1 < m0 or e1 - m1 > e0 - m0:
            why = [f"{m['where']} {m['status']}: {m['reason']}" for m in now["missed"] if m["construct"] == construct][:1]
            worse.append(" · ".join((text, *why)))
        elif (m0, e0) != (m1, e1):
            better.append(text)
    for what, a, b in (("graphs", was["graphs"], now["graphs"]), ("breaks", len(was["breaks"]), len(now["breaks"]))):
        if a != b:
            (worse if b > a else better).append(f"{what}: {a} before, {b} now")
    return worse, better


# ---------------------------------------------------------------- tables of docs/zoo.md


def sums_table(rows: Rows, titles: Mapping[str, str]) -> str:
    """By run: architectures that train, and matched / expected of each construct."""
    found = {run: totals(rows, run) for run in RUNS}
    known = [c for c in titles if any(c in f["constructs"] for f in found.values())]
    lines = [
        "| | " + " | ".join(found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for title, what in (
        ("architectures that train in eager", "train"),
        ("… that train here, with eager's numbers", "ok"),
        ("… of these through AOTAutograd", "joint"),
    ):
        lines.append(f"| {title} | " + " | ".join(str(f[what]) if f["train"] else "–" for f in found.values()) + " |")
    for c in known:
        cells = ["{}/{}".format(*f["constructs"].get(c, (0, 0))) if f["train"] else "–" for f in found.values()]
        lines.append(f"| {titles[c]} | " + " | ".join(cells) + " |")
    shares = [f"{share(f['constructs']):.1%}" if f["train"] else "–" for f in found.values()]
    return "\n".join([*lines, "| all sites | " + " | ".join(shares) + " |"])


def architectures_table(rows: Rows, titles: Mapping[str, str]) -> str:
    """One line each: sites in the first run, and what is otherwise in the others, or that they were not run."""
    lines = ["| architecture | sites | graphs | breaks | LoRA, bf16 |", "|---|---|---|---|---|"]
    for arch, row in sorted(rows.items()):
        first = next(iter(row["runs"].values()), None)
        if first is None or first["state"] == "untrained":
            continue
        others = [f"{name}: {_short(run, first, titles)}" for name, run in list(row["runs"].items())[1:]]
        others = [text for text in others if not text.endswith(": ")]
        if len(row["runs"]) < len(RUNS):
            lacking = [name for name in RUNS if name not in row["runs"]]
            others.append(f"not run: {', '.join(lacking)}" if len(row["runs"]) > 1 else "not run")
        cells = (_sites(first, titles), str(first["graphs"]), str(len(first["breaks"])), "; ".join(others) or "the same")
        lines.append(f"| `{arch}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sites(run: Row, titles: Mapping[str, str]) -> str:
    text = counted(run.get("constructs", {}), titles)
    return text if run["state"] == "ok" else f"**{run['state']}** {_cell(run.get('why', ''))} {text}".strip()


def _short(run: Row, first: Row, titles: Mapping[str, str]) -> str:
    """Constructs that are not all matched, unless they are not in the first run either."""
    if run["state"] == "untrained":
        return f"not in eager ({_cell(run['why'])})"
    same = {c: n for c, n in first.get("constructs", {}).items() if n[0] != n[1]}
    odd = {c: n for c, n in run.get("constructs", {}).items() if n[0] != n[1] and same.get(c) != n}
    text = counted(odd, titles)
    return text if run["state"] == "ok" else f"**{run['state']}** {_cell(run.get('why', ''))} {text}".strip()


def misses_table(rows: Rows, titles: Mapping[str, str]) -> str:
    """Each reason once, with the places and architectures that it is given for."""
    sites: Counter = Counter()
    archs: dict[tuple, set[str]] = defaultdict(set)
    places: dict[tuple, set[str]] = defaultdict(set)
    for arch, row in rows.items():
        counted: dict[tuple, int] = {}
        for run in row["runs"].values():  # in several runs of one architecture it is one miss
            here: Counter = Counter()
            for m in run.get("missed", ()):
                key = (m["construct"], m["status"], re.sub(r"\b([a-z_]+?)_\d+\b", r"\1", m["reason"]))
                here[key] += m["sites"]
                places[key].add(m["where"])
            counted |= {key: max(n, counted.get(key, 0)) for key, n in here.items()}
        for key, n in counted.items():
            sites[key] += n
            archs[key].add(arch)
    lines = ["| construct | sites | status | reason | where | architectures |", "|---|---|---|---|---|---|"]
    order = list(titles)
    for key, n in sorted(sites.items(), key=lambda one: (order.index(one[0][0]) if one[0][0] in order else 99, -one[1], one[0])):
        construct, status, reason = key
        where = ", ".join(sorted(p for p in places[key] if p)[:3]) + " …" * (len(places[key]) > 3)
        cells = titles.get(construct, construct), str(n), f"`{status}`", _cell(reason), where, ", ".join(sorted(archs[key]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def others_table(rows: Rows) -> str:
    """What does not train in eager, or not as in eager."""
    lines = ["| architecture | run | state | why | aot_eager alone |", "|---|---|---|---|---|"]
    for arch, row in sorted(rows.items()):
        states: dict[tuple, list[str]] = defaultdict(list)
        for name, run in row["runs"].items():
            if run["state"] != "ok":
                numbers = f"loss {run['loss']:.0e}, gradient {run['gradient']:.0e} ({run['worst']})" if "worst" in run else ""
                why = _cell(run.get("why") or numbers)
                states[run["state"], why, _cell(run.get("torch", ""))].append(name)
        for (state, why, alone), names in states.items():
            said = ("all" if len(names) == len(row["runs"]) else ", ".join(names)), state, why, alone
            lines.append(f"| `{arch}` | " + " | ".join(said) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
