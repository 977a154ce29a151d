"""`python -m sloth`: its name, its version, what it finds of the machine, and a clone that lies in the folder it is run from."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import sloth
from sloth import compat, doctor
from sloth.__main__ import app

CLONE = Path(__file__).parent.parent


def test_version_and_public_names() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == f"sloth {sloth.__version__}"
    assert {"explain", "pattern", "Report", "__version__"} <= set(dir(sloth)) and (CLONE / "src" / "py.typed").exists()
    assert {*sloth._HOME, "__version__"} == set(sloth.__all__) and all(hasattr(sloth, name) for name in sloth.__all__)


def test_a_clone_in_the_folder_is_the_package(tmp_path: Path) -> None:
    """Python takes a folder named sloth for the package before it asks who is installed."""
    (tmp_path / "sloth").symlink_to(CLONE)
    code = "import sloth; print(sloth.__file__, sloth.explain.__module__, sloth.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[1:] == ["sloth.rewriter.explain", sloth.__version__], done.stderr
    told = subprocess.run([sys.executable, "-m", "sloth", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "Usage: python -m sloth [OPTIONS]" in told.stdout, told.stderr


def test_doctor_is_ready_here_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    assert doctor.doctor(Console(file=out, width=200))
    assert out.getvalue().rstrip().endswith("ready") and "Trainer._wrap_model" in out.getvalue()

    def broken() -> object:
        yield "import nothing: ImportError: no such module"

    monkeypatch.setattr(doctor, "_imported", broken)
    assert not doctor.doctor(Console(file=out, width=200)) and "missing: import nothing: ImportError" in out.getvalue()


@pytest.mark.parametrize(
    "package, found, tested",
    [("torch", "2.11.0+cu130", True), ("torch", "2.13.0", True), ("torch", "2.14.0a0", False), ("torch", "2.10.1", False),
     ("transformers", "5.17.0.dev0", True), ("transformers", "6.0", False), ("trl", "1", False)],
)  # fmt: skip
def test_windows_of_versions(package: str, found: str, tested: bool) -> None:
    assert compat.is_tested(package, found) is tested


@pytest.mark.parametrize("command", [["explain", "llama"], ["warm", "llama"]])
def test_a_bad_environment_is_one_line(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTH_OPTIONS", "sloth.disabel=rope")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "Did you mean sloth.disable?" in done.stderr and len(done.stderr.strip().splitlines()) == 1
