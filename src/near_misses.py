"""`python -m sloth explain MODEL --near-misses`: each miss, with the model's line, the reference that came nearest, and what to do."""

from __future__ import annotations

import inspect
import linecache
from collections import Counter
from pathlib import Path
from textwrap import dedent, indent

from sloth.rewriter.match.registry import patterns
from sloth.rewriter.report import MATCHED, Report, Site

SPELLING = (
    "the same mathematics: give the entry a variant, or the normal form a rule. Other mathematics: `python -m sloth new-pattern`"
)
TO_DO = {  # by status; docs/patterns.md has the same as a table
    "structure": SPELLING,
    "constant": "any number will do: a keyword-only parameter of the reference. This one alone: a variant",
    "dtype": "a variant with the casts where the model has them: it is other arithmetic",
    "shape": "a variant for operands of these shapes, if the operator takes them",
    "escape": "have the operator return this value too, or the model not read it",
    "mutation": "the model writes in place what the operator would read: write to a new tensor",
    "region": "let the model change grad mode or autocast before or behind the whole, not inside of it",
    "hidden": "a rule of the normal form that shows what the call holds (docs/patterns.md, operands that no node holds)",
    "gradient": "register_autograd for the operator, or take the tensor out of no_grad",
    "domain": "nothing: the operator's formula does not hold there",
    "subclass": "nothing: sharded tensors are left to their own operators",
    "operator": "mend the operator: it raises on operands like these",
    "check": "lift the entry's check if the operator takes this too, or leave it",
    "unprofitable": "nothing: it would be right and would not pay; sloth.always makes it all the same",
    "convexity": "nothing: an operand depends on a result",
    "sizes": "have the operator's fake and options ask nothing of symbolic sizes",
    "disabled": "take the entry out of sloth.disable, or into sloth.only",
    "verify": "mend the operator: sloth.verify found it less exact than eager",
    "limit": "a larger sloth.limit",
    "error": "mend the entry's own check, option or cost: it raises",
}


def near_misses(report: Report) -> str:
    """A paragraph for each distinct miss of a report: construct, how often, where, the first difference; the model's line; the
    nearest reference with its source; what to do about it.
    """
    missed = Counter(s for s in report.sites if s.status != MATCHED)
    if not missed:
        return "no near misses: every place that looks like a construct is rewritten"
    return "\n\n".join(_paragraph(site, times, report.titles) for site, times in missed.items())


def _paragraph(site: Site, times: int, titles: dict[str, str]) -> str:
    lines = [f"{titles.get(site.construct, site.construct)} ×{times}, {_short(site.file)}:{site.line}: {site.status}"]
    if site.file and (line := linecache.getline(site.file, site.line).strip()):
        lines.append(f"  the model has     {line}")
    lines.append(f"  first difference  {site.reason}")
    variants = {str(v): v for p in patterns() for v in p.variants}
    if (nearest := variants.get(site.variant)) is not None:
        code = nearest.reference.__code__
        lines.append(f"  nearest           {site.variant}, {_short(code.co_filename)}:{code.co_firstlineno}")
        lines.append(indent(_source(nearest.reference), " " * 20))
    lines.append(f"  what to do        {TO_DO.get(site.status, SPELLING)}")
    return "\n".join(lines)


def _source(reference: object) -> str:
    """Without decorators and docstrings."""
    try:
        text = dedent(inspect.getsource(reference)).rstrip()  # pyright: ignore[reportArgumentType]  (a function)
    except (OSError, TypeError):
        return "(its source is not on disk)"
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(("def ", "return", "lambda"))), 0)
    return "\n".join(line for line in lines[start:] if not line.strip().startswith('"""'))


def _short(file: str) -> str:
    """As short as tells where it is: from the package's root, or the file alone."""
    here = Path(__file__).parent
    path = Path(file)
    if path.is_relative_to(here):
        return f"sloth/{path.relative_to(here)}"
    return file.split("site-packages/")[-1] if "site-packages/" in file else path.name
