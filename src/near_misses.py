"""`python -m sloth explain MODEL --near-misses`: each miss, with the model's line, the nearest reference, and what to do."""

from __future__ import annotations

import inspect
import linecache
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent, wrap

import torch

from sloth.rewriter.match.pattern import Variant
from sloth.rewriter.match.registry import patterns
from sloth.rewriter.report import MATCHED, Report, Site

SPELLING = (
    "the same mathematics: give the entry a variant, or the normal form a rule. Other mathematics: `python -m sloth new-pattern`"
)
TO_DO = {  # by status; `python docs/tables.py` puts it into docs/patterns.md
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


def near_misses(report: Report, model: torch.nn.Module | None = None) -> str:
    """A paragraph for each place and kind of miss of a report: construct, how often, where; the model's line; the first
    difference; the nearest reference with its source; what to do about it. Then what is no site, and was not rewritten either:
    modules that the graphs do not show, layers not looked into, graphs left alone. Of the model, the classes in whose code is no
    site.
    """
    missed = [*_misses(report), *_not_shown(report)] or ["no near misses: every site is rewritten"]
    return "\n\n".join([*missed, *_unseen(report, model)])


def _misses(report: Report) -> list[str]:
    missed: dict[tuple, list[Site]] = {}
    for s in report.sites:
        if s.status != MATCHED:
            missed.setdefault((s.construct, s.status, s.file, s.line), []).append(s)
    variants = {str(v): v for p in patterns() for v in p.variants}
    return [_paragraph(sites, report.titles, variants) for sites in missed.values()]


def _not_shown(report: Report) -> list[str]:
    told = "of the modules called: no code in the graphs looks like it"
    lines = [f"{n} {report.titles.get(c, c)} {told}" for c, n in report.unseen.items()]
    lines += [f"{n} {kind} not looked into" for kind, n in report.unread.items()]
    lines += [f"a graph is left as it was: {g.untouched}" for g in report.graphs if g.untouched]
    return ["\n".join(lines)] if lines else []


def _unseen(report: Report, model: torch.nn.Module | None) -> list[str]:
    """Of modules without others in them, and not torch's own: what no anchor sees looks like this."""
    leaves = [m for m in model.modules() if not any(True for _ in m.children())] if model is not None else []
    counts = Counter(type(m) for m in leaves if not type(m).__module__.startswith("torch."))
    found = []
    for kind, times in counts.items():
        if (code := getattr(inspect.unwrap(kind.forward), "__code__", None)) is None:  # a callable object, or not Python's
            continue
        last = max((line for *_, line in code.co_lines() if line), default=code.co_firstlineno)
        if not any(s.file == code.co_filename and code.co_firstlineno <= s.line <= last for s in report.sites):
            found.append(f"{kind.__name__} ×{times} ({_short(code.co_filename)}:{code.co_firstlineno})")
    if not found:
        return []
    lines = [
        f"no site lies in the code of {', '.join(found)}",
        "if that is mathematics that an operator is for, no anchor sees it:",
    ]
    return ["\n".join([*lines, "docs/patterns.md (when it does not match), or `python -m sloth new-pattern`"])]


def _paragraph(sites: list[Site], titles: dict[str, str], variants: dict[str, Variant]) -> str:
    """Of one line of the model. Of the references that came nearest, the one that did so most often, the first of equals."""
    nearest = Counter(s.variant for s in sites).most_common(1)[0][0]
    site = next(s for s in sites if s.variant == nearest)
    lines = [f"{titles.get(site.construct, site.construct)} ×{len(sites)}, {_short(site.file)}:{site.line}: {site.status}"]
    if site.file and (line := linecache.getline(site.file, site.line).strip()):
        lines.append(f"  the model has     {line}")
    lines.append(f"  first difference  {site.reason}")
    if nearest in variants:
        reference = variants[nearest].reference
        code = reference.__code__
        lines.append(f"  nearest           {nearest}, {_short(code.co_filename)}:{code.co_firstlineno}")
        held = [cell.cell_contents for cell in reference.__closure__ or ()]  # forms that it is made of
        lines += [indent(_source(f), " " * 20) for f in (reference, *filter(inspect.isfunction, held))]
    first, *more = wrap(TO_DO.get(site.status, SPELLING), 90)
    lines.append(f"  what to do        {first}")
    return "\n".join([*lines, *(" " * 20 + line for line in more)])


def _source(function: Callable) -> str:
    """Without decorators and docstrings."""
    try:
        lines = dedent(inspect.getsource(function)).rstrip().splitlines()
    except (OSError, TypeError):
        return "(its source is not on disk)"
    start = next((i for i, line in enumerate(lines) if line.startswith(("def ", "return", "lambda"))), 0)
    return "\n".join(line for line in lines[start:] if not line.strip().startswith('"""'))


def _short(file: str) -> str:
    """As short as tells where it is: from the package's root, or the file alone."""
    here = Path(__file__).parent
    path = Path(file)
    if path.is_relative_to(here):
        return f"sloth/{path.relative_to(here)}"
    return file.split("site-packages/")[-1] if "site-packages/" in file else path.name
