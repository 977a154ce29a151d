"""`python -m sloth new-pattern NAME`: an entry, its operator and its test, which work as they are and are to be edited."""

from __future__ import annotations

import keyword
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch

TEMPLATES = Path(__file__).parent / "templates"

THIRD = "import sympy\nimport torch"
SLOTH = "from sloth.testing import assert_no_worse, check_pattern\nfrom sloth.testing.judge import DEVICE, make"

REGISTRY = (
    "from sloth.rewriter.match.domain import domain, finite\n"
    "from sloth.rewriter.match.pattern import Construct\n"
    "from sloth.rewriter.match.registry import pattern"
)


class NewPatternError(ValueError):
    """Nothing was written; the message says why."""


@dataclass(frozen=True)
class Layout:
    """Where the files go, by template, and how they import each other."""

    files: dict[str, str]
    kernel_imports: str
    imports: str
    torch: str  # how torch is imported before sloth: with a blank line behind it where sloth is the package at hand
    namespace: str
    steps: tuple[str, ...]


def layout(folder: Path, name: str) -> Layout:
    """In a checkout of sloth as its own entries lie; else three files beside each other."""
    if (folder / "src" / "patterns" / "__init__.py").is_file():
        return Layout(
            {"kernel": f"src/kernels/{name}.py", "pattern": f"src/patterns/{name}.py", "test": f"tests/kernels/test_{name}.py"},
            f"from sloth.kernels.{name} import {name}\n{REGISTRY}",
            f"{THIRD}\n\nimport sloth.kernels.{name} as kernels\nimport sloth.patterns.{name} as patterns\n{SLOTH}",
            "import torch\n",
            "sloth",
            (
                f"name it in src/patterns/__init__.py, a row in docs/support.md (constructs: `{name}`), a line in CHANGELOG.md",
                "what else must be there before it is merged: CONTRIBUTING.md",
            ),
        )
    return Layout(
        {"kernel": f"{name}_kernels.py", "pattern": f"{name}_pattern.py", "test": f"test_{name}.py", "conftest": "conftest.py"},
        f"{REGISTRY}\n\nfrom {name}_kernels import {name}",
        f"{THIRD}\n{SLOTH}\n\nimport {name}_kernels as kernels\nimport {name}_pattern as patterns",
        "import torch",
        name,
        (f"import {name}_pattern before the model is compiled, or declare it as an entry point (docs/patterns.md)",),
    )


def write(folder: Path, name: str) -> tuple[list[Path], tuple[str, ...]]:
    """Write the files of an entry of this name, all or none. Returns them, and what is to be done by hand. Raises NewPatternError
    for a name that is none of Python's or is taken (an entry's, an operator's, a package's), folders that are not there, files
    that are, and what cannot be written.
    """
    from sloth.rewriter.match.registry import patterns

    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise NewPatternError(f"{name!r} is to name files, functions and an entry: lower-case letters, digits and underscores")
    if name in {p.name for p in patterns()}:
        raise NewPatternError(f"there is an entry named {name} already: see `python -m sloth patterns`")
    made = layout(folder, name)
    for op in (name, f"{name}_backward"):
        if hasattr(getattr(torch.ops, made.namespace), op):
            raise NewPatternError(f"there is an operator {made.namespace}::{op} already")
    words = {
        "name": name, "title": name.replace("_", " "), "class_name": name.title().replace("_", ""), "namespace": made.namespace,
        "kernel_imports": made.kernel_imports, "imports": made.imports, "torch": made.torch,
    }  # fmt: skip
    files = {t: folder / f for t, f in made.files.items() if t != "conftest" or not (folder / f).exists()}
    if lacking := sorted({str(f.parent) for f in files.values() if not f.parent.is_dir()}):
        raise NewPatternError(f"there is no folder {', '.join(lacking)}")
    taken = [p for f in files.values() for p in (f, f.with_suffix(""))]  # of one name, Python imports the folder
    if there := [str(p) for p in taken if p.exists()]:
        raise NewPatternError(f"{', '.join(there)} is there already: nothing was written")
    try:
        for template, file in files.items():
            file.write_text(Template((TEMPLATES / f"{template}.txt").read_text()).substitute(words))
    except OSError as e:
        for file in files.values():
            file.unlink(missing_ok=True)
        raise NewPatternError(f"{e}: nothing was written") from e
    steps = (
        "write the mathematics between the lines that say `formula`: the derivation in the docstring, ATen, Triton, sympy",
        "write the model's code in place of `wide` and `in_dtype`, and what marks a place in `is_site`",
        f"python -m pytest {made.files['test']}",
        *made.steps,
    )
    return list(files.values()), steps
