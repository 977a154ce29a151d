"""Write the tables of README.md and docs/ that come from the code and from benchmarks/results, which tests/test_docs.py compares:

python docs/tables.py
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from sloth.near_misses import TO_DO
from sloth.rewriter.graph.normal_form import RULES
from sloth.rewriter.match.registry import constructs, patterns
from sloth.rewriter.plan import legality
from sloth.zoo import results, sweep

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
import figures  # noqa: E402

patterns()  # they bring rules of their own


def rules() -> str:
    """The normal form: which ATen calls a rule sees, and its law."""
    calls: dict[Callable, list[str]] = {}
    for name, functions in RULES.items():
        for function in functions:
            calls.setdefault(function, []).append(f"`{name}`")
    rows = [f"| {', '.join(names)} | {text(function)} |" for function, names in calls.items()]
    return "\n".join(("| ATen | law |", "|---|---|", *rows))


def legality_rules() -> str:
    """What a match must satisfy, and the status of the site where it does not."""
    rows = []
    for rule in legality.RULES:
        statuses = dict.fromkeys(re.findall(r'Refused\(\s*"(\w+)"', inspect.getsource(rule)))
        rows.append(f"| `{rule.__name__}` | {', '.join(f'`{s}`' for s in statuses)} | {text(rule)} |")
    return "\n".join(("| rule | status | what must hold |", "|---|---|---|", *rows))


MEANINGS = {  # of what stands in a report as a site's status
    "matched": "rewritten",
    "structure": "another operation than expected, or operands that should be one value are two",
    "constant": "a number, dimension or flag differs",
    "dtype": "a cast stands elsewhere, or the operator's result has another shape or dtype",
    "shape": "the reference does not accept the operands",
    "escape": "a value inside the match is used outside too, and is not cheap to compute twice",
    "mutation": "an operand or a value inside lies in memory that is written in place",
    "region": "the match spans a change of grad mode or autocast",
    "hidden": "an operand or result is inside one call of the traced graph and cannot be read or replaced",
    "gradient": "a gradient is needed that the operator does not give, or a result that needs none would need one, or get none",
    "domain": "an operand or number for which the operator's formula does not hold: complex, without elements, a scale of 0",
    "subclass": "a tensor of the match is of a subclass that holds other tensors (DTensor)",
    "operator": "the operator raises on operands like these",
    "check": "a check of the entry refused",
    "unprofitable": "it would be right, and [would not pay](#whether-it-pays)",
    "convexity": "an operand depends on a result, or a result is read before all operands exist",
    "sizes": "the operator, tried on these sizes, compares them: it would hold for some only, and each other length would be"
    " compiled anew",
    "disabled": "no entry of the construct is in use: `sloth.disable` or `sloth.only` leaves it out",
    "verify": "[`sloth.verify`](troubleshooting.md#is-it-as-exact-as-eager) found it less exact than eager, or a gradient lost",
    "limit": "`sloth.limit` allows no more rewrites in this graph",
    "error": "the entry's own check, option or cost raises; the rest of the graph is rewritten all the same",
}


def statuses() -> str:
    """What stands in a report as a site's status, and what is to be done."""
    rows = [f"| `{status}` | {meaning} | {TO_DO.get(status, '')} |" for status, meaning in MEANINGS.items()]
    return "\n".join(("| status | meaning | what to do |", "|---|---|---|", *rows))


def zoo(table: Callable[..., str], *more: dict[str, str]) -> Callable[[], str]:
    """A table of what `python -m sloth zoo` found."""
    return lambda: table(sweep.load(DOCS.parent / "benchmarks" / "results" / "zoo.json")["rows"], *more)


def text(function: Callable) -> str:
    """The docstring as one cell of a table."""
    return " ".join((inspect.getdoc(function) or "").split()).replace("|", "\\|")


TITLES = {c.name: c.title for c in constructs()}
TABLES = {
    "patterns.md": {"statuses": statuses, "rules": rules},
    "architecture.md": {"legality": legality_rules},
    "performance.md": figures.PERFORMANCE,
    "zoo.md": {
        "sums": zoo(results.sums_table, TITLES),
        "others": zoo(results.others_table),
        "zoo_misses": zoo(results.misses_table, TITLES),
        "architectures": zoo(results.architectures_table, TITLES),
    },
    "guides/generation.md": figures.GENERATION,
    "../README.md": figures.README,
}


def filled(page: str, content: str) -> str:
    """The page with its tables as the code has them now."""
    for name, table in TABLES[page].items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert place.search(content), f"docs/{page} has no place for the table {name}"
        content = place.sub(lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", content)
    return content


if __name__ == "__main__":
    for page in TABLES:
        (DOCS / page).write_text(filled(page, (DOCS / page).read_text()))
