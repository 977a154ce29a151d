"""`python -m sloth`: what would be rewritten in a model, which patterns there are, and caches filled ahead of a run."""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as e:
    raise SystemExit(f"python -m sloth needs {e.name}: pip install 'sloth-compile[cli]'") from e
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def _version(wanted: bool) -> None:
    if wanted:
        import sloth

        print(f"sloth {sloth.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


def _lacks(command: str, e: ModuleNotFoundError) -> typer.Exit:
    """A package that the command needs is not installed."""
    print(f"sloth {command} needs {e.name}: pip install 'sloth-compile[hf]'", file=sys.stderr)
    return typer.Exit(2)


class Precision(StrEnum):
    bf16, fp16, no = "bf16", "fp16", "no"


class Dtype(StrEnum):
    auto, bf16, fp16, fp32 = "auto", "bf16", "fp16", "fp32"
    bfloat16, float16, float32 = "bfloat16", "float16", "float32"  # torch's names of them

    @property
    def torch(self) -> Any:
        import torch

        short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(self.value, self.value)
        return None if short == "auto" else getattr(torch, short)


# What `explain` and `verify` build, and run.
Model = Annotated[
    str,
    typer.Argument(
        help="a checkpoint folder, a config.json (widths are shrunk), a model_type such as llama (built tiny), or FILE.py:NAME, a"
        " function of yours that gives the model (the file is run)"
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="sequences in the batch")]
Seq = Annotated[int, typer.Option(min=2, help="tokens in a sequence")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="with gradient checkpointing")]


@app.command()
def explain(
    model: Model,
    batch: Batch = 2,
    seq: Seq = 64,
    checkpointing: Checkpointing = False,
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = Dtype.auto,
    lora: Annotated[bool, typer.Option("--lora", help="with adapters on all linear layers, the rest frozen")] = False,
    four_bit: Annotated[
        bool, typer.Option("--4bit", help="linear layers in NF4, the call under autocast in DTYPE (bf16), as Trainer's is")
    ] = False,
    packed: Annotated[bool, typer.Option("--packed", help="sequences laid end to end, told apart by position_ids")] = False,
    near: Annotated[bool, typer.Option("--near-misses", help="each miss beside the reference that came nearest")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """What the backend rewrites in one training call of MODEL, what it leaves alone, and why. No weights are needed or
    trained.
    """
    import torch

    import sloth
    from sloth.near_misses import near_misses
    from sloth.tiny_model import check_call

    ids = torch.ones((1, batch * seq) if packed else (batch, seq), dtype=torch.int64)
    call = {"input_ids": ids, "labels": ids}
    if packed:
        call["position_ids"] = torch.arange(seq).repeat(batch)[None]
    with _bad_input("explain"):
        net = _built(model, checkpointing, lora, four_bit, dtype.torch)
        check_call(net, *call)
    with torch.autocast("cpu", dtype=dtype.torch or torch.bfloat16, enabled=four_bit):
        report = sloth.explain(net, call)
    if as_json:
        print(report.to_json())
    else:
        Console().print(Group(*report.shown(misses=not near)))
    if near:
        print(near_misses(report, net), file=sys.stderr if as_json else sys.stdout)


@app.command()
def verify(
    model: Model,
    batch: Batch = 2,
    seq: Seq = 64,
    checkpointing: Checkpointing = False,
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = Dtype.auto,
    as_json: Annotated[Path | None, typer.Option("--json", help="write what was found to this file, too")] = None,
) -> None:
    """Are the rewrites of one training call of MODEL as exact as the model? Each distinct one, and the whole step, forward and
    backward, beside eager and fp64, on the GPU if there is one. Exit code 1 where one is not.
    """
    import torch

    import sloth
    from sloth.tiny_model import check_call, words

    with _bad_input("verify"):
        net = _built(model, checkpointing, dtype=dtype.torch)
        check_call(net, "input_ids", "labels")
        known = words(net)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(0, known, (batch, seq), generator=torch.Generator().manual_seed(0)).to(device)
    found = sloth.verify(net.to(device), {"input_ids": ids, "labels": ids})
    Console().print(found)
    if as_json is not None:
        as_json.write_text(found.to_json())
    if not found.ok:
        raise typer.Exit(1)


@contextmanager
def _bad_input(command: str) -> Iterator[None]:
    """What is raised here ends the command with exit code 2 and a line that says what to give."""
    try:
        yield
    except ValueError as e:  # ModelError is one
        print(f"sloth {command}: {e}", file=sys.stderr)
        raise typer.Exit(2) from e
    except ModuleNotFoundError as e:
        raise _lacks(command, e) from e


def _built(model: str, checkpointing: bool, lora: bool = False, four_bit: bool = False, dtype: Any = None) -> Any:
    from sloth.options import parse
    from sloth.tiny_model import as_trained, build, checkpointed

    parse(None)  # what the environment says
    net = as_trained(build(model), lora, four_bit, dtype)
    return checkpointed(net) if checkpointing else net


@app.command("new-pattern")
def new_pattern(
    name: Annotated[str, typer.Argument(help="of the entry, its operator and its files: lower case, with underscores")],
    folder: Annotated[Path, typer.Option(help="where: a checkout of sloth, or a folder of yours")] = Path("."),
) -> None:
    """Write an entry, its operator (ATen, Triton, a place for the derivation) and its test. They work as they are written, for a
    small example that is to be edited.
    """
    from sloth.new_pattern import NewPatternError, write

    try:
        files, steps = write(folder, name)
    except NewPatternError as e:
        print(f"sloth new-pattern: {e}", file=sys.stderr)
        raise typer.Exit(2) from e
    for file in files:
        print(f"wrote {file}")
    for i, step in enumerate(steps, 1):
        print(f"{i}. {step}")


@app.command()
def doctor() -> None:
    """What is installed and tested, the GPU, what of other packages is touched; ends with "ready", or with what is missing."""
    from sloth.doctor import doctor as examine

    if not examine(Console(width=160)):
        raise typer.Exit(1)


@app.command()
def warm(
    model: Annotated[str, typer.Argument(help="a checkpoint folder, or a config.json (random weights of its sizes)")] = "",
    lora: Annotated[int, typer.Option(min=0, help="rank of adapters on all linear layers; 0: trained in full")] = 0,
    lora_alpha: Annotated[int, typer.Option(min=0, help="their alpha; 0: the rank")] = 0,
    four_bit: Annotated[bool, typer.Option("--load-in-4bit", help="NF4, prepared for k-bit training")] = False,
    double_quant: Annotated[bool, typer.Option(help="scales of NF4 quantised too")] = True,
    precision: Annotated[Precision, typer.Option(help="of Trainer")] = Precision.bf16,
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = Dtype.auto,
    checkpointing: Annotated[bool, typer.Option(help="with gradient checkpointing")] = True,
    packed: Annotated[bool, typer.Option("--packed", help="rows laid end to end instead of padded ones")] = False,
    rows: Annotated[int, typer.Option(min=1, help="rows in a batch")] = 4,
    save: Annotated[Path | None, typer.Option(help="write what was compiled to this file")] = None,
    load: Annotated[Path | None, typer.Option(help="instead: put such a file into this machine's caches")] = None,
) -> None:
    """Fill the compiler's caches with a recipe of transformers' Trainer, so that its first step takes seconds.

    Runs two batches of random tokens at a learning rate of 0; nothing is trained or kept. A file that --save wrote serves
    machines with the same card and versions: `sloth warm --load FILE`. It holds code: load files that you made.
    """
    from sloth import warm as ahead
    from sloth.options import parse

    try:
        if bool(model) == (load is not None):
            raise ahead.WarmError("give a MODEL to compile for, or --load FILE, one of the two")
        if load is not None and save is not None:
            raise ahead.WarmError("give --load or --save, one of the two")
        if load is not None:
            print(f"{load}: {ahead.load(load)} entries put into the caches")
            return
        if save is not None and save.is_dir():
            raise ahead.WarmError(f"--save {save} is a folder: give the name of a file")
        if save is not None and not save.resolve().parent.is_dir():
            raise ahead.WarmError(f"--save {save}: there is no folder {save.resolve().parent}")
        parse(None)  # what the environment says
        recipe = ahead.Recipe(
            model, lora=lora, lora_alpha=lora_alpha, four_bit=four_bit, double_quant=double_quant, dtype=dtype.torch,
            precision=precision.value, checkpointing=checkpointing, packed=packed, rows=rows,
        )  # fmt: skip
        start = time.perf_counter()
        graphs = ahead.warm(recipe)
        print(f"{model}: {len(graphs)} graph(s) compiled, {time.perf_counter() - start:.0f} s")
        if save is not None:
            print(f"{save}: {ahead.save(save) / 1e6:.1f} MB, for `sloth warm --load {save}` on a machine like this one")
    except ValueError as e:  # WarmError and ModelError are
        print(f"sloth warm: {e}", file=sys.stderr)
        raise typer.Exit(2) from e
    except ModuleNotFoundError as e:
        raise _lacks("warm", e) from e


@app.command()
def zoo(
    archs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARCH]...", help="model types such as llama; none: every causal LM of transformers"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write what is found to this file, as JSON; what it holds of this code is not run again")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="an earlier result: print what is worse, better or new")] = None,
    only: Annotated[list[str] | None, typer.Option(help="these of the runs: fp32, 'fp32 LoRA', bf16, 'bf16 LoRA'")] = None,
    limit: Annotated[float, typer.Option(min=1, help="seconds for an architecture, which has a process of its own")] = 300,
    jobs: Annotated[int, typer.Option(min=1, help="processes at once")] = 1,
) -> None:
    """Train tiny models of every causal LM for one step, in eager and under the backend, in full and with LoRA on all linear
    layers, in fp32 and bf16: do loss and gradients agree, what is matched, how many graphs and breaks. Exit code 1 where one
    does not train as in eager; with --compare, where something is worse than there, or does not train and is not in there.
    """
    try:
        from sloth.zoo.command import ZooError, run
    except ModuleNotFoundError as e:
        raise _lacks("zoo", e) from e
    try:
        good = run(Console(highlight=False, soft_wrap=True), archs or [], out, compare, tuple(only or ()), limit, jobs)
    except ZooError as e:
        print(f"sloth zoo: {e}", file=sys.stderr)
        raise typer.Exit(2) from e
    if not good:
        raise typer.Exit(1)


@app.command()
def patterns(
    rules: Annotated[bool, typer.Option("--rules", help="the rules of the normal form instead")] = False,
    operators: Annotated[bool, typer.Option("--operators", help="instead: what computes each operator, by device")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="names and variants as JSON")] = False,
) -> None:
    """The registered pattern entries: construct, entry, operator, variants."""
    from sloth.rewriter.graph.normal_form import RULES
    from sloth.rewriter.match.registry import deferrals
    from sloth.rewriter.match.registry import patterns as registered

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
    if operators:
        Console(width=130).print(_operators())
        return
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


def _operators() -> Table:
    """Those that Triton computes on a GPU; the others are made of these and of torch's."""
    from sloth.kernels.common.dispatch import IMPLEMENTATIONS

    table = Table("operator", "module", "triton (on a GPU)", "aten (elsewhere, and in fp64)", title="operators")
    for name, of in sorted(IMPLEMENTATIONS.items()):
        table.add_row(name, of["triton"].__module__.removeprefix("sloth."), *(f.__name__ for f in of.values()))
    return table


if __name__ == "__main__":
    app(prog_name="python -m sloth")
