"""The run folder of the fine-tuning example: settings, layout, checkpoints, and what may be wrong with them.

OUT/run.json         the settings; their presence is what makes a folder "ours"
OUT/tokenizer        the tokenizer
OUT/tokens           train.npy and eval.npy, blocks of token ids
OUT/start            the model before training
OUT/runs/BACKEND     one contender: checkpoints and result.json
OUT/model            the trained model, for plain `from_pretrained`
OUT/comparison.*     the table (json) and the plot (png)
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# This module is imported before transformers, which imports bitsandbytes, which warns on a CPU of 4-bit kernels that it
# misses: they are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

MADE_BY = "sloth examples/finetune.py"


class BadInput(Exception):
    """What the user gave cannot be used. The message is one line: what was wrong, and what to do."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes. Two runs with equal settings see the same data in the same order."""

    arch: str
    model: str | None  # a folder or hub name to start from, instead of a new model of `arch`
    text: str | None  # a folder or file, instead of the standard library
    hidden: int
    layers: int
    vocab: int
    seq: int
    batch: int
    steps: int
    lr: float
    seed: int
    backend: str

    @property
    def tokens_a_step(self) -> int:
        """Tokens between two updates of the weights."""
        return self.batch * self.seq


class RunFolder:
    """Paths of one run folder. Creates nothing by itself."""

    made_by = MADE_BY
    settings_type = Settings
    earlier = "continue it with --resume, replace it with --force"  # what to do with a run that is there

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings_file = root / "run.json"
        self.tokenizer = root / "tokenizer"
        self.tokens = root / "tokens"
        self.start = root / "start"
        self.model = root / "model"
        self.comparison = root / "comparison.json"
        self.plot = root / "comparison.png"

    def contender(self, backend: str) -> Path:
        """Folder of one contender's checkpoints and result."""
        return self.root / "runs" / backend

    def result_file(self, backend: str) -> Path:
        """What one contender measured."""
        return self.contender(backend) / "result.json"

    def is_ours(self) -> bool:
        """Was this folder made by the example?"""
        try:
            return json.loads(self.settings_file.read_text())["made_by"] == self.made_by
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def read_settings(self) -> Settings:
        """The settings the folder was made with."""
        try:
            saved = json.loads(self.settings_file.read_text())["settings"]
            return self.settings_type(**{field.name: saved[field.name] for field in fields(self.settings_type)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{self.settings_file} cannot be read ({error!r}): start again with --force or --out") from error

    def write_settings(self, settings: Settings) -> None:
        """Write run.json in one go."""
        write_json(self.settings_file, {"made_by": self.made_by, "settings": asdict(settings)})


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all: a run killed half-way must not leave half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Fill a temporary sibling of `folder`, then put it in the place of `folder`. On failure `folder` is as it was."""
    made = _missing_parents(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(staging, folder)
            shutil.rmtree(old)
        else:
            os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _missing_parents(folder: Path) -> list[Path]:
    """The parents of `folder` that do not exist yet, innermost first."""
    return [parent for parent in folder.parents if not parent.exists()]


def check_out(run: RunFolder, *, force: bool, resume: bool) -> None:
    """Refuse an output folder that we must not touch."""
    out = run.root
    if force and resume:
        raise BadInput("--force starts anew and --resume continues: give one of them")
    if resume:
        if not run.is_ours():
            raise BadInput(f"--resume: {out} holds no run of this example; leave --resume out, or check --out")
        return
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file: choose a folder")
    if out.is_dir() and any(out.iterdir()):
        if not run.is_ours():
            raise BadInput(f"--out {out} exists and was not made by this example, so it is left alone: choose another")
        if not force:
            raise BadInput(f"--out {out} holds an earlier run: {run.earlier}")
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(f"--out {out}: {existing} cannot be written to, choose another folder")


def merge_settings(saved: Settings, asked: Settings, given: set[str], out: Path) -> Settings:
    """Settings of a resumed run: the saved ones, and a new number of steps. Any other change would be another run."""
    for name in sorted(given - {"steps"}):
        if hasattr(saved, name) and getattr(saved, name) != getattr(asked, name):
            raise BadInput(
                f"--resume: the run in {out} has --{name} {getattr(saved, name)}, not {getattr(asked, name)}: "
                f"leave --{name} out, or choose another --out"
            )
    steps = asked.steps if "steps" in given else saved.steps
    return Settings(**{**asdict(saved), "steps": steps})


def last_checkpoint(contender: Path, steps: int) -> Path | None:
    """The newest checkpoint from which there are steps left to `steps`.

    Only one that was written to its end: the Trainer writes trainer_state.json last.
    """
    found = {int(path.parent.name.rpartition("-")[2]): path.parent for path in contender.glob("checkpoint-*/trainer_state.json")}
    return found.get(max((step for step in found if step < steps), default=0))


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of the saved weights, read from the headers only."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    return shapes


def check_fits(checkpoint: Path, start: Path) -> None:
    """Refuse a checkpoint whose weights are not those of the model in `start`."""
    advice = "remove it to go on from the one before, or start again with --force"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        there, here = weight_shapes(checkpoint), weight_shapes(start)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"checkpoint {checkpoint} is damaged ({error}): {advice}") from error
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise BadInput(
                f"checkpoint {checkpoint} does not fit the model: {name} is {there.get(name, 'absent')} in the "
                f"checkpoint and {here.get(name, 'absent')} in the model: {advice}"
            )
