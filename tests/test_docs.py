"""The documentation against the code: what it quotes, tabulates and shows is what the code has and prints.

In README.md and docs/*.md
    ```python            runs, after the blocks before it on the same page; a ```text block right behind it is what it prints
    ```py PATH           is quoted from PATH, line by line
"""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from sloth.rewriter.compile import inductor
from sloth.rewriter.match import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\S*) ?(.*)\n((?:.*\n)*?)```\n", re.MULTILINE)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pytest.fixture
def pages_own_patterns():
    """Entries that a page registers are gone afterwards."""
    before = {p.name for p in registry.patterns()}
    yield
    for name in {p.name for p in registry.patterns()} - before:
        registry.unregister(name)


@each_page
def test_examples_run_and_print_what_is_shown(page, pages_own_patterns, tmp_path, monkeypatch):
    """With aot_eager for Inductor: what that makes of rewritten graphs is tested elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inductor, "_inductor", lambda _, *graph: lookup_backend("aot_eager")(*graph))
    torch.manual_seed(0)
    torch._dynamo.reset()
    names: dict = {"__name__": "example"}
    content, end, printed = page.read_text(), 0, ""
    for block in BLOCK.finditer(content):
        kind, _, code = block.groups()
        if kind == "python":
            Path("example.py").write_text(code)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "example.py", "exec"), names)
            printed = out.getvalue()
        elif kind == "text" and block.start() == end:
            assert essence(printed) == essence(code)
        end = block.end()


def essence(text: str) -> str:
    """Without what differs between machines: seconds, line numbers, widths of tables."""
    text = re.sub(r"\d+\.\d+ s\b", "_ s", text)
    text = re.sub(r"\.py:\d+", ".py:_", text)
    return "\n".join(filter(None, (re.sub(r"[\s┏━┳┓┃┡╇┩│└─┴┘]+", " ", line).strip() for line in text.splitlines())))


@each_page
def test_quoted_code_is_there(page):
    for kind, path, code in BLOCK.findall(page.read_text()):
        if kind == "py" and path:
            source = {line.strip() for line in (ROOT / path).read_text().splitlines()}
            assert not [line for line in code.splitlines() if line.strip() not in source | {""}]


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_tables_are_current():
    """If not: python docs/tables.py"""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in tables.TABLES:
        content = (ROOT / "docs" / page).read_text()
        assert tables.filled(page, content) == content, "python docs/tables.py"


def test_every_status_is_explained():
    source = "".join(file.read_text() for file in (ROOT / "src" / "rewriter").glob("*.py"))
    statuses = set(re.findall(r'Refused\(\s*"(\w+)"', source)) | {"matched"}
    statuses |= set(re.findall(r'(?:self\.differ|Difference)\(.*"(\w+)"\)', source))
    table = (ROOT / "docs" / "patterns.md").read_text().split("| status |")[1].split("\n\n")[0]
    assert len(statuses) > 8 and statuses == set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))


def test_every_construct_and_entry_is_listed():
    supported = (ROOT / "README.md").read_text().split("## What is supported")[1].split("\n## ")[0]
    for entry in (*registry.patterns(), *registry.deferrals()):
        assert f"`{entry.name}`" in supported and f"| {entry.construct.title} |" in supported


def test_every_option_is_listed():
    from sloth.options import OPTIONS

    listed = re.findall(r"^\| `(sloth\.[\w.]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(listed) == OPTIONS.keys()


def test_the_drawing_has_the_steps_of_the_page():
    drawing = (ROOT / "docs" / "pipeline.svg").read_text()
    for step in ("shadow", "match", "legality", "choice", "rewrite", "report", "Inductor"):
        assert f">{step}<" in drawing
