"""The house: which folder may import which, and how long a file may be."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from faults import FAULTS

SRC = Path(__file__).parent.parent / "src"
# What the modules of each folder may import of sloth, beside their own folder and compat. A module alone stands for itself.
ARROWS = {
    "rewriter/graph": {"rewriter/notices"},
    "rewriter/match": {"rewriter/graph", "rewriter/notices"},
    "rewriter/plan": {"rewriter/match", "rewriter/graph", "rewriter/notices", "rewriter/report", "lazy/weights"},
    "rewriter/compile": {"rewriter/graph", "rewriter/plan", "rewriter/notices", "integrations", "__init__"},
    "rewriter/dynamo": {"rewriter/graph", "rewriter/match/pattern", "rewriter/notices", "integrations"},
    "rewriter/report": set(),
    "rewriter/notices": set(),
    "rewriter/progress": {"rewriter/notices"},
    "rewriter/reasons": {"rewriter/graph", "rewriter/match", "rewriter/report"},
    "rewriter/sites": {"rewriter/graph", "rewriter/match", "rewriter/reasons", "rewriter/report", "rewriter/notices"},
    "rewriter/pipeline": {
        "rewriter/graph", "rewriter/match", "rewriter/plan", "rewriter/report", "rewriter/sites", "rewriter/notices"
    },
    "rewriter/faults": {"rewriter/graph", "rewriter/match", "rewriter/report", "rewriter/notices"},
    "rewriter/backend": {"rewriter", "integrations", "options"},
    "rewriter/verify": {"rewriter", "options"},
    "rewriter/entry_point": {"rewriter/backend", "rewriter/notices"},
    "rewriter/explain": {"rewriter"},
    "options": {"rewriter/match", "rewriter/notices"},
    "lazy": {"kernels"},
    "integrations": {"lazy"},
    "generation": {"integrations", "kernels/attention/write_token", "rewriter/notices"},
    "kernels": set(),
    "patterns": {"rewriter", "kernels", "lazy"},
    "testing": {"rewriter"},
    "compat": set(),
    "doctor": {"__init__", "integrations", "rewriter", "options"},
    "tiny_model": set(),
    "near_misses": {"rewriter"},
    "new_pattern": {"rewriter/match/registry"},
    "models": {"generation", "integrations", "saving", "rewriter/backend", "rewriter/notices", "options"},
    "saving": {"rewriter/notices"},
    "zoo": {"rewriter"},
    "warm": {"rewriter", "kernels", "tiny_model"},
    "accelerate_name": {"integrations"},
    "__init__": {"rewriter/explain", "rewriter/verify", "rewriter/report", "rewriter/match", "models"},  # for type checkers alone
    "__main__": {
        "compat", "doctor", "integrations", "kernels/common/dispatch", "near_misses", "new_pattern", "options", "rewriter",
        "tiny_model", "warm", "zoo",
    },
}  # fmt: skip
FILES = sorted(SRC.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Modules of sloth that a file imports, as paths; at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")[1:] if name.startswith("sloth.") else []
            while parts and not (SRC.joinpath(*parts).with_suffix(".py").exists() or SRC.joinpath(*parts).is_dir()):
                parts.pop()
            if parts:
                found.add("/".join(parts))
    return found


def room(name: str) -> str:
    """The longest entry of the table that the module is, or lies in."""
    return max((r for r in ARROWS if name == r or name.startswith(r + "/")), key=len, default="")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(SRC).as_posix())
def test_imports_run_one_way(file: Path) -> None:
    name = file.relative_to(SRC).with_suffix("").as_posix().removesuffix("/__init__")
    here = room(name)
    if file.name == "__init__.py" and file.parent != SRC and not file.read_text().strip():
        return
    assert here, f"{name} is in no room of the table"
    allowed = ARROWS[here] | {here, "compat"}
    wrong = {m for m in imported(file) if not any(m == a or m.startswith(a + "/") for a in allowed)}
    assert not wrong, f"{name} imports {sorted(wrong)}; {here} may import {sorted(allowed)}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(SRC).as_posix())
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400, "a file of more than 400 lines has two ideas: part them"


def test_the_rewriter_knows_no_pattern_and_no_kernel() -> None:
    for file in (SRC / "rewriter").rglob("*.py"):
        assert not {m.split("/")[0] for m in imported(file)} & {"patterns", "kernels"}, file


@pytest.mark.nightly  # not where one of them is planted
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_faults_stand_once_where_they_are_planted(fault):
    assert (SRC / fault.file).read_text().count(fault.old) == 1


def test_every_folder_is_packaged() -> None:
    """An installed sloth has them all: the tests run from a checkout."""
    told = tomllib.loads((SRC.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(told) == sorted(".".join(("sloth", *f.parent.relative_to(SRC).parts)) for f in SRC.rglob("__init__.py"))


def test_where_an_operator_runs_is_chosen_in_one_place() -> None:
    """kernels/common/dispatch.py, by the function of launch.py."""
    asked = {f.relative_to(SRC).as_posix() for f in (SRC / "kernels").rglob("*.py") if "use_triton(" in f.read_text()}
    layouts = {"kernels/linear/lora.py", "kernels/attention/attention.py"}  # what pays on a GPU, whoever computes it
    assert asked == {"kernels/common/dispatch.py", "kernels/common/launch.py"} | layouts
