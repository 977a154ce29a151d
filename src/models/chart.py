"""A chart of a training: loss, tokens a second and memory over the steps, as a picture beside what the trainer saves.

    SFTTrainer(model, …, callbacks=[TrainingChart()])                     # OUTPUT_DIR/training.png

It draws what the trainer logs, at each save and at the end; nothing is measured on the device, and nothing waits for it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # then there is no trainer either
        TrainerCallback = object

log = logging.getLogger("sloth")
TOKENS = ("num_tokens", "num_input_tokens_seen")  # as TRL and transformers log how many were read


class TrainingChart(TrainerCallback):
    """For any trainer of transformers and TRL.

    file: a picture that matplotlib can write; None: training.png in the trainer's output_dir. Tokens are those that the trainer
    logs: TRL does, Trainer with `include_num_input_tokens_seen=True`; elsewhere steps a second are drawn. Memory is the most
    that was allocated on the GPU so far, or the most that the process held where there is none, in GiB.

    Raises ImportError where matplotlib is missing. A picture that cannot be written costs a warning, not the training.
    """

    def __init__(self, file: str | os.PathLike | None = None) -> None:
        if find_spec("matplotlib") is None:
            raise ImportError("TrainingChart draws with matplotlib: pip install matplotlib", name="matplotlib")
        self.file = None if file is None else Path(file)
        self.losses: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self.rates: list[tuple[int, float]] = []
        self.memory: list[tuple[int, float]] = []
        self.unit = "steps"
        self._last: tuple[float, float] | None = None  # when was logged, and what had been read by then

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = (time.perf_counter(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs, step = logs or {}, state.global_step
        if "eval_loss" in logs:
            self.held_out.append((step, logs["eval_loss"]))
        if "loss" not in logs:
            return
        self.losses.append((step, logs["loss"]))
        self.memory.append((step, _peak() / 2**30))
        read = next((float(logs[name]) for name in TOKENS if name in logs), None)
        if read is not None and self.unit == "steps":
            self.unit, self.rates = "tokens", []
            self._last = (self._last[0], 0.0) if self._last and not self.losses[:-1] else None
        now, count = time.perf_counter(), float(step) if read is None else read
        if self._last is not None and now > self._last[0]:
            self.rates.append((step, (count - self._last[1]) / (now - self._last[0])))
        self._last = (now, count)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero or not self.losses:
            return
        file = Path(args.output_dir, "training.png") if self.file is None else self.file
        partial = file.with_name(f".{file.stem}.partial{file.suffix}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.figure().savefig(partial, dpi=110)
            os.replace(partial, file)
        except Exception as e:
            log.warning("sloth: the chart %s is not drawn: %s: %s", file, type(e).__name__, e)

    def figure(self) -> Any:
        """matplotlib's Figure of what was logged so far."""
        from matplotlib.figure import Figure

        made = Figure(figsize=(12, 3.6), layout="constrained")
        loss, rate, memory = made.subplots(1, 3)
        loss.plot(*zip(*self.losses, strict=True), label="training")
        if self.held_out:
            loss.plot(*zip(*self.held_out, strict=True), "o", label="held out")
            loss.legend()
        if self.rates:
            rate.plot(*zip(*self.rates, strict=True))
        memory.plot(*zip(*self.memory, strict=True))
        kind = "allocated on the GPU" if torch.cuda.is_available() else "held by the process"
        for axes, title in ((loss, "loss"), (rate, f"{self.unit} a second"), (memory, f"most memory {kind}, GiB")):
            axes.set(xlabel="step", title=title)
            axes.grid(alpha=0.3)
        rate.set_ylim(bottom=0)
        memory.set_ylim(bottom=0)
        return made


def _peak() -> int:
    """Bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
