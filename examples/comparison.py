"""Table, plot and JSON of several contenders that trained the same model on the same data."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from run_folder import Settings, write_json

Results = dict[str, dict[str, Any] | None]


def device_name() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """The largest difference of two loss curves, over the steps that both have."""
    return max(abs(a - b) for a, b in zip(losses, reference, strict=False))


def summary(results: Results) -> dict[str, dict[str, float | None]]:
    """One row a contender: the numbers of the table. A contender that failed has none."""
    reference = results.get("eager")
    rows: dict[str, dict[str, float | None]] = {}
    for name, result in results.items():
        if result is None:
            rows[name] = {}
            continue
        rows[name] = {
            "loss": result["loss"][-1],
            "eval_loss": result["eval"][-1][1],
            "difference_to_eager": largest_difference(result["loss"], reference["loss"]) if reference else None,
            "tokens_per_second": result["tokens_per_second"],
            "speed_to_eager": result["tokens_per_second"] / reference["tokens_per_second"] if reference else None,
            "peak_memory_gib": result["peak_memory"] / 2**30,
            "compile_seconds": result["compile_seconds"],
        }
    return rows


def table(results: Results) -> Table:
    """The comparison as a table for the terminal."""
    memory = "peak GPU\nmemory" if torch.cuda.is_available() else "peak\nRSS"
    shown = Table(title=f"Same model, data and seed on {device_name()}")
    shown.add_column("backend", no_wrap=True)
    # Broken by hand, so that the table fits 80 columns.
    for heading in ("last\nloss", "held\nout", "largest Δ\nto eager", "tokens\n/s", "to\neager", memory, "compile"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, row in summary(results).items():
        if not row:
            shown.add_row(name, *["failed"] * 7)
            continue
        speed, difference = row["speed_to_eager"], row["difference_to_eager"]
        shown.add_row(
            name,
            f"{row['loss']:.4f}",
            f"{row['eval_loss']:.4f}",
            "–" if difference is None else f"{difference:.1e}",
            f"{row['tokens_per_second']:.0f}",
            "–" if speed is None else f"{speed:.2f}×",
            f"{row['peak_memory_gib']:.2f} GiB",
            f"{row['compile_seconds']:.1f} s",
        )
    return shown


def write(results: Results, settings: Settings, file: Path) -> None:
    """Everything measured, as JSON."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"device": device_name(), "cpus": os.cpu_count(), "python": platform.python_version(), **versions}
    write_json(file, {"machine": machine, "settings": asdict(settings), "summary": summary(results), "results": results})


def plot(results: Results, file: Path) -> None:
    """Loss curves on the left, speed, memory and compile time as bars on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = {name: result for name, result in results.items() if result is not None}
    rows = summary(done)
    colours = {name: f"C{i}" for i, name in enumerate(done)}
    figure, axes = pyplot.subplot_mosaic("LLLABC", figsize=(15, 5), layout="constrained")
    for i, (name, result) in enumerate(done.items()):
        steps = range(1, len(result["loss"]) + 1)
        # The curves lie on one another: the later ones are drawn thinner, so that all are seen.
        axes["L"].plot(steps, result["loss"], color=colours[name], lw=5 - 1.8 * min(i, 2), alpha=0.75, label=name)
        axes["L"].plot(*zip(*result["eval"], strict=True), "o", ms=11 - 3 * min(i, 2), color=colours[name], mec="black")
    axes["L"].set(xlabel="step", ylabel="loss", title="Training loss (held-out loss: dots)")
    axes["L"].legend()
    bars = (("A", "tokens_per_second", "tokens/s"), ("B", "peak_memory_gib", "peak memory, GiB"))
    for place, key, title in (*bars, ("C", "compile_seconds", "compile time, s")):
        drawn = axes[place].bar(rows.keys(), [row[key] for row in rows.values()], color=colours.values())
        axes[place].bar_label(drawn, fmt="{:,.4g}")
        axes[place].set_title(title)
    partial = file.with_name(f".{file.name}.partial.png")
    figure.savefig(partial, dpi=110)
    pyplot.close(figure)
    os.replace(partial, file)
