"""Many architectures, a process each with a limit of time: a crash or a hang costs one row. What is found is written at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sloth import __version__
from sloth.rewriter.match.registry import patterns
from sloth.zoo.measure import Row, failed, measure
from sloth.zoo.results import counted

# A child that another thread forks before the pipe's writing end is closed here would hold that open: nobody saw this one die.
FORKING = threading.Lock()
Found = dict[str, Any]  # {"versions": what a run is "of" → package → version, "rows": architecture → row}


def load(file: Path) -> Found:
    """A result that was written before. Raises ValueError for what is none."""
    try:
        found = json.loads(file.read_text())
        return {"versions": found["versions"], "rows": found["rows"]}
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{file} holds no result of `sloth zoo` ({type(e).__name__}: {e})") from e


def write(file: Path, found: Found) -> None:
    """A line for each architecture, so that a diff shows what changed."""
    rows = ",\n".join(f"{json.dumps(arch)}: {json.dumps(found['rows'][arch])}" for arch in sorted(found["rows"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")  # so that who ends this process does not leave half a file
    part.write_text(f'{{"versions": {json.dumps(found["versions"])},\n"rows": {{\n{rows}\n}}}}\n')
    os.replace(part, file)


def versions() -> dict[str, str]:
    """What a result is of; "source" is a digest of sloth's files."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    found = {"python": platform.python_version(), "sloth": __version__, "source": digest.hexdigest()[:12]}
    for name in ("torch", "transformers", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def key(versions: dict[str, str]) -> str:
    """A short name for them, which each run of a result has under "of"."""
    return hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:8]


def sweep(todo: Mapping[str, tuple[str, ...]], limit: float, jobs: int = 1) -> Iterator[Row]:
    """The row of each architecture, as they are ready. todo: its runs; limit: seconds for all of them."""
    _made_ready()
    pool = ThreadPoolExecutor(jobs)
    try:
        for row in as_completed([pool.submit(_in_child, arch, runs, limit) for arch, runs in todo.items()]):
            yield row.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _made_ready() -> None:
    """What all processes would do first: they are forked from this one."""
    warnings.filterwarnings("ignore")
    for entry in patterns():
        for variant in entry.variants:
            variant.is_seen  # noqa: B018  (traces the reference)
    with contextlib.suppress(ModuleNotFoundError):  # its runs say so
        import peft  # noqa: F401


def _in_child(arch: str, runs: tuple[str, ...], limit: float) -> Row:
    """Runs that were not reached are "fails"; "late" are those that another time may be enough for."""
    context = multiprocessing.get_context("fork")
    start = time.perf_counter()
    with FORKING:
        here, there = context.Pipe(False)
        child = context.Process(target=_child, args=(there, arch, runs), daemon=True)
        child.start()
        there.close()
    row: Row = {"arch": arch, "class": "", "runs": {}}
    lost = failed(f"took more than {limit:.0f} s") | {"late": True}
    try:
        while len(row["runs"]) < len(runs) and here.poll(max(0.0, start + limit - time.perf_counter())):
            one = here.recv()
            row |= one | {"runs": row["runs"] | one["runs"]}
    except (EOFError, OSError):
        child.join(5)
        lost = failed(f"died with exit code {child.exitcode}")
    child.join(2 if len(row["runs"]) == len(runs) else 0)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
    here.close()
    row["runs"] = {r: row["runs"].get(r, lost) for r in runs}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def _child(pipe: Connection, arch: str, runs: tuple[str, ...]) -> None:
    os.setsid()  # so that what it starts can be ended with it
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1), os.dup2(silent, 2)
    torch.set_num_threads(1)  # more wait for each other, with sizes as small as these
    for run in runs:
        pipe.send(measure(arch, (run,)))


def summary(row: Row) -> str:
    """One line for people: the first run whole, of the others what is otherwise."""
    parts, before = [], None
    for name, run in row["runs"].items():
        counts = counted(run.get("constructs", {}))
        shown = counts if counts != before else "the same"
        how = run["state"] if run["state"] == "ok" else f"{run['state'].upper()} {run.get('why') or run.get('worst', '')}"[:100]
        parts.append(f"{name} {how}: {shown}" if run["state"] != "untrained" else f"{name} {how}")
        before = counts
    return f"{row['arch']:24} {row['seconds']:5} s  {' | '.join(parts)}"
