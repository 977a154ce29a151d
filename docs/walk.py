"""A page that is walked: its files are written, its edits made and its commands run, in an empty folder, in its order.

```file NAME         is written to NAME
```edit NAME         lines with - in front are there, as a whole, and are replaced by those with + behind them
```console           "$ python …" is run; what follows is what it prints (stdout)

python docs/walk.py docs/porting.md      walk the page, and write what is printed into it
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

BLOCK = re.compile(r"^```(file|edit|console) ?(.*)\n((?:.*\n)*?)```\n", re.MULTILINE)


Run = Callable[[str, Path, str], str]  # of a command, a folder, and what the page says it prints: what it prints


def walked(page: str, folder: Path, run: Run) -> str:
    """The page with what its commands print today."""
    made, end = [], 0
    for block in BLOCK.finditer(page):
        kind, name, text = block.groups()
        if kind == "file":
            (folder / name).write_text(text)
        elif kind == "edit":
            (folder / name).write_text(edited((folder / name).read_text(), text))
        else:
            said = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
            made += [page[end : block.start(3)], *(f"$ {command}\n{run(command, folder, output)}" for command, output in said)]
            end = block.end(3)
    return "".join(made) + page[end:]


def edited(content: str, edit: str) -> str:
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", edit, re.MULTILINE):
        before, after = ("".join(line[1:] for line in part.splitlines(keepends=True)) for part in (old, new))
        if before not in content:
            raise ValueError(f"these lines are not there:\n{before}")
        content = content.replace(before, after, 1)
    return content


def printed(command: str, folder: Path, _: str = "") -> str:
    """On stdout, without empty lines. Raises RuntimeError where it fails, but for tests that do."""
    env = os.environ | {"COLUMNS": "130", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = [sys.executable if word == "python" else word for word in command.split()]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines() if line.strip())


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            file.write_text(walked(file.read_text(), Path(folder), printed))
