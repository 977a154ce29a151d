"""`python -m sloth`: what would be rewritten in a model, and which patterns there are."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(help="a checkpoint folder, a config.json (widths are shrunk), or a model_type such as llama (built tiny)"),
    ],
    batch: Annotated[int, typer.Option(min=1, help="sequences in the batch")] = 2,
    seq: Annotated[int, typer.Option(min=2, help="tokens in a sequence")] = 64,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="with gradient checkpointing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """What the backend rewrites in one training call of MODEL, what it leaves alone, and why. No weights are needed or
    trained.
    """
    import torch

    import sloth
    from sloth.rewriter.build import ModelError, build

    try:
        net = build(model)
    except ModelError as e:
        print(f"sloth explain: {e}", file=sys.stderr)
        raise typer.Exit(2) from e
    if checkpointing:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.ones(batch, seq, dtype=torch.int64)
    report = sloth.explain(net, {"input_ids": ids, "labels": ids})
    if as_json:
        print(report.to_json())
    else:
        Console().print(report)


@app.command()
def patterns(
    rules: Annotated[bool, typer.Option("--rules", help="the rules of the normal form instead")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="names and variants as JSON")] = False,
) -> None:
    """The registered pattern entries: construct, entry, operator, variants."""
    from sloth.rewriter.normal_form import RULES
    from sloth.rewriter.registry import deferrals
    from sloth.rewriter.registry import patterns as registered

    if rules:
        table = Table("ATen", "law", title="normal form")
        laws: dict[object, list[str]] = {}
        for op, functions in RULES.items():
            for f in functions:
                laws.setdefault(f, []).append(op)
        for f, ops in laws.items():
            table.add_row(Text(", ".join(ops)), Text(inspect.getdoc(f) or ""))
        Console().print(table)
        return
    entries = registered()
    if as_json:
        print(
            json.dumps(
                {p.name: {"construct": p.construct.name, "variants": [v.name for v in p.variants]} for p in entries}, indent=1
            )
        )
        return
    table = Table("construct", "entry", "operator", "variants", title="patterns")
    for p in entries:
        table.add_row(p.construct.title, p.name, str(p.op), Text(", ".join(v.name for v in p.variants)))
    for d in deferrals():
        table.add_row(d.construct.title, d.name, "none: computed when it is read", "")
    Console().print(table)


if __name__ == "__main__":
    sys.argv[0] = Path(sys.argv[0]).parent.name or "sloth"
    app()
