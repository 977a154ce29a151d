"""The documentation against the code: what it quotes, tabulates and shows is what the code has and prints.

In README.md, CONTRIBUTING.md, CHANGELOG.md, docs/*.md and docs/guides/*.md
    ```python            runs, after the blocks before it on the same page; a ```text block right behind it is what it prints
    ```py PATH           is quoted from PATH, line by line
    `PATH.py`            is there: from the root, beside the page, in src/ or in a folder of it
    [text](PAGE#HEADING) leads to a page, and to a heading of it
"""

import contextlib
import dataclasses
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
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(\S*) ?(.*)\n((?:.*\n)*?)```\n", re.MULTILINE)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", page.read_text())


def section(page: str, heading: str) -> str:
    """What stands under a heading of a page of docs/."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"docs/{page} has no heading {heading!r}"
    return found[1]


def first_column(table: str) -> set[str]:
    """The names in backticks with which rows begin."""
    return set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))


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
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", prose(page)):
        to = page.parent / target if target else page
        assert to.exists(), target
        assert not heading or heading in headings(to), f"{target}#{heading}"


def headings(page: Path) -> set[str]:
    """As links name them: lower case, without punctuation, hyphens for spaces."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


@each_page
def test_files_that_are_named_are_there(page):
    src = ROOT / "src"
    roots = [ROOT, page.parent, src, ROOT / "benchmarks" / "results", *(d for d in src.rglob("*") if d.is_dir())]
    for named in re.findall(r"`([\w./-]+\.(?:py|svg|md|toml))`", prose(page)):
        assert any((root / named).exists() for root in roots), named
    for named in re.findall(r"`(?:benchmarks/results/)?(\w+\.json)`", prose(page)):
        assert named in OF_OTHERS or (ROOT / "benchmarks" / "results" / named).exists(), named


OF_OTHERS = {"config.json"}  # files that a user has


@each_page
def test_lines_are_short(page):
    long = [line for line in prose(page).splitlines() if len(line) > 130 and not line.startswith("|")]
    assert not long


def test_the_readme_is_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page.suffix == ".md" and page not in seen:
            seen.add(page)
            todo += [(page.parent / to).resolve() for to in re.findall(r"\]\(([^)#:]+)", prose(page))]
    assert set(PAGES) <= seen


def test_tables_are_current():
    """If not: python docs/tables.py"""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in tables.TABLES:
        content = (ROOT / "docs" / page).read_text()
        assert tables.filled(page, content) == content, "python docs/tables.py"


def test_every_status_is_explained():
    source = "".join(file.read_text() for file in (ROOT / "src" / "rewriter").rglob("*.py"))
    statuses = set(re.findall(r'Refused\(\s*"(\w+)"', source)) | {"matched"}
    statuses |= set(re.findall(r'(?:self\.differ|Difference)\(.*"(\w+)"(?:, g)?\)', source))
    table = section("patterns.md", "When it does not match").split("| status |")[1].split("\n\n")[0]
    assert len(statuses) > 8 and statuses == first_column(table)


def test_every_construct_and_entry_is_listed():
    supported = section("support.md", "Constructs")
    entries = (*registry.patterns(), *registry.deferrals())
    for entry in entries:
        assert f"`{entry.name}`" in supported and f"| {entry.construct.title} |" in supported
    titles = re.findall(r"^\| ([^|]+) \| .*`", supported, re.MULTILINE)
    assert set(titles) == {entry.construct.title for entry in entries}


def test_print_outs_have_titles_of_constructs():
    """Those that no code on the page makes: of demos and logs."""
    titles = {c.title for c in registry.constructs()}
    for page in PAGES:
        for kind, _, text in BLOCK.findall(page.read_text()):
            for line in re.findall(r"^sloth: .*\d+/\d+ .*", text, re.MULTILINE) if kind == "text" else ():
                assert set(re.findall(r"\d+/\d+ ([^,]+)", line)) <= titles, line
    demo = section("performance.md", "The demo on two cores").split("┃ construct ")[1].split("└")[0]
    found = {cell.strip() for cell in re.findall(r"^│([^│]+)│", demo, re.MULTILINE)} - {""}
    assert len(found) > 3 and found <= titles


def test_every_option_is_listed():
    from sloth.options import OPTIONS

    listed = re.findall(r"^\| `(sloth\.[\w.]+)`", section("api.md", "Options"), re.MULTILINE)
    assert set(listed) == OPTIONS.keys()


def test_every_option_that_is_named_is_one():
    from sloth.options import OPTIONS

    assert not {
        (page.name, option)
        for page in PAGES
        for option in re.findall(r"`(?:SLOTH_OPTIONS=\")?(sloth\.(?:disable|only|limit|inner|linear)[\w.]*)", page.read_text())
        if option not in OPTIONS
    }


def test_every_public_name_is_listed():
    import sloth

    listed = first_column(section("api.md", "In Python"))
    assert {name.split("(")[0] for name in listed} == {f"sloth.{name}" for name in sloth.__all__}


def test_the_format_of_reports_is_listed():
    from sloth.rewriter.report import Report, Site

    table = section("api.md", "Report")
    assert first_column(table) == Report().to_dict().keys()
    (sites,) = re.findall(r"^\| `sites` \|.*$", table, re.MULTILINE)
    assert {f.name for f in dataclasses.fields(Site)} <= set(re.findall(r"`(\w+)`", sites))


def test_every_command_and_flag_is_listed():
    from typer.main import get_command

    from sloth.__main__ import app

    rows = dict(re.findall(r"^\| `([\w-]+)[^`]*` \|(.*)$", section("api.md", "Command line"), re.MULTILINE))
    commands = get_command(app).commands
    assert rows.keys() == commands.keys()
    for name, command in commands.items():
        flags = {max(p.opts, key=len) for p in command.params if p.param_type_name == "option"} - {"--help"}
        assert flags == set(re.findall(r"`(--[\w-]+)`", rows[name])), name


def test_every_touch_of_another_package_is_listed():
    """As `python -m sloth doctor` lists them, with the same reasons."""
    import sloth.integrations.accelerate
    import sloth.integrations.trl_names
    import sloth.rewriter.backend  # noqa: F401
    from sloth.integrations.integration import integrations

    rows = re.findall(
        r"^\| `([^`]+)` `([^`]+)` \| (.*?) \|", section("support.md", "What of other packages is touched"), re.MULTILINE
    )
    assert rows == [(i.module, i.touches, i.why) for i in integrations()]


def test_tested_versions_are_listed():
    from sloth.compat import TESTED, window

    rows = re.findall(r"^\| (\w+) \| ([\w. ]+) \|$", section("support.md", "Versions"), re.MULTILINE)
    assert dict(rows[1:]) == {package: window(package) for package in TESTED}
    readme = " ".join((ROOT / "README.md").read_text().split())
    for package, name in (("torch", "torch"), ("triton", "Triton"), ("transformers", "transformers")):
        assert f"{name} {window(package)}" in readme


def test_the_changelog_begins_with_this_version():
    import sloth

    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == sloth.__version__


def test_the_drawing_has_the_steps_of_the_page():
    drawing = (ROOT / "docs" / "pipeline.svg").read_text()
    for step in ("shadow", "match", "legality", "choice", "rewrite", "report", "Inductor"):
        assert f">{step}<" in drawing
