"""Faults that the suite must catch: each is planted in a copy of the tree, and the test that fails first is noted.

    python -m tests.faults                all of them; each writes its row of the table of docs/testing.md
    python -m tests.faults --only 3 17    some of them
    python -m tests.faults --missing      those that have no row
    python -m tests.faults --verify       instead: in which of the programs of tests/verified.py `sloth.verify` finds them;
                                          behind it, names of programs: of these alone
    python -m tests.faults --everything   where the tests named beside a fault pass, all of the default tier too
    python -m tests.faults --list

A fault is a small change that leaves code that runs: a term that is left out, a condition that is not asked. The tests that are
most likely to see it are named beside it and run first, those of the default tier before those of the nightly one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- table: faults -->\n", "<!-- end -->"
LIMIT = 1800  # seconds for the tests of one fault


class Fault(NamedTuple):
    kind: str
    what: str
    file: str  # of src/
    old: str  # stands once in the file
    new: str
    likely: str  # files of tests/, and perhaps the words of those that run first


KERNELS, FORM, MATCHER, LEGALITY, CHOICE, PATTERNS, LAZY, PLAN, REGIONS, TRUST = (
    "kernels", "normal form", "matcher", "legality", "plans", "patterns", "lazy logits", "narrowing, hoisting", "regions, passes",
    "same bits, no code from data",
)  # fmt: skip

# fmt: off
FAULTS = [
    Fault(
        KERNELS, "RMSNorm's gradient: the mean over the padded row",
        "kernels/rms_norm.py", "(tl.sum(dy * x, 1, keep_dims=True) / OVER)",
        "(tl.sum(dy * x, 1, keep_dims=True) / BLOCK)", "kernels/test_rms_norm.py -k degenerate",
    ),
    Fault(
        KERNELS, "RMSNorm of x alone where a residual was added",
        "kernels/rms_norm.py", "x = h.to(tl.float32)  #",
        "h = h.to(tl.float32)  #", "kernels/test_rms_norm.py -k triton",
    ),
    Fault(
        KERNELS, "the residual's gradient is left out, in ATen alone",
        "kernels/rms_norm.py", "(dx if dh is None else dx + dh.to(dtype)).to(x.dtype)",
        "dx.to(x.dtype)", "patterns/test_entries.py -k in_fp64",
    ),
    Fault(
        KERNELS, "LayerNorm's gradient without the mean of dy",
        "kernels/layer_norm.py", "(dy - tl.sum(dy, 1, keep_dims=True) / D - x",
        "(dy - x", "kernels/test_layer_norm.py -k many_rows",
    ),
    Fault(
        KERNELS, "RoPE's backward reads sin where the forward does",
        "kernels/rope.py", "sin_at + (other if TRANSPOSE else col)",
        "sin_at + col", "kernels/test_rope.py -k test_kernels",
    ),
    Fault(
        KERNELS, "a rotation of pairs goes the same way in the backward pass",
        "kernels/rotation.py", "interleaves, interleaved, second, first, POSITIONS_FIRST",
        "interleaves, interleaved, first, second, POSITIONS_FIRST", "kernels/test_rotation.py -k gradcheck",
    ),
    Fault(
        KERNELS, "the derivative of GELU's tanh form lacks a factor 3, in ATen alone",
        "kernels/gated_act.py", "* 2 * k * (1 + 3 * 0.044715",
        "* 2 * k * (1 + 0.044715", "kernels/test_gated_act.py -k gradcheck",
    ),
    Fault(
        KERNELS, "ignored labels have a gradient, in ATen alone",
        "kernels/loss/cross_entropy.py", "torch.where(target_N1 != ignore_index, (G * slope) * dz, 0.0)",
        "((G * slope) * dz)", "kernels/test_cross_entropy.py -k ignored_rows",
    ),
    Fault(
        KERNELS, "attention takes tiles for whole that are not",
        "kernels/attention/interval_kernels.py", "(whole_to + 1 - whole) // BLOCK",
        "(whole_to + BLOCK - whole) // BLOCK", "kernels/test_interval_attention.py -k masks",
    ),
    Fault(
        KERNELS, "scales of double-quantised blocks are those of the first program",
        "kernels/linear/dequantize_4bit.py", "(start + block) // NESTED_BLOCK",
        "block // NESTED_BLOCK", "kernels/test_dequantize_4bit.py -k many_blocks",
    ),
    Fault(
        KERNELS, "LoRA: gradients of frozen A are computed and taken for others'",
        "kernels/linear/lora.py", "if of_a := [i for i in read_by if need_a[i]]:",
        "if of_a := list(read_by):", "kernels/test_lora_linear.py -k vain",
    ),
    Fault(
        KERNELS, "DoRA: the magnitude's gradient without the adapter's scale",
        "kernels/linear/adapter.py", "l = (t @ b.t()).to(wide) * scale",
        "l = (t @ b.t()).to(wide)", "kernels/test_adapter.py -k gradcheck",
    ),
    Fault(
        KERNELS, "a kernel that the interpreter runs and no GPU's compiler takes",
        "kernels/attention/interval_kernels.py", "    else:  # or Triton looks at both returns\n        return 0.0",
        "    return 0.0", "kernels/test_compile_targets.py -k test_compiles",
    ),
    Fault(
        KERNELS, "a second derivative is zero instead of refused",
        "kernels/common/row_reduction.py", 'raise RuntimeError("sloth\'s operators can be differentiated once, not twice")',
        "return None", "kernels/test_rms_norm.py -k refused",
    ),
    Fault(
        FORM, "float16 is taken to hold all of bfloat16",
        "rewriter/graph/normal_form.py", "(torch.bfloat16, torch.float16), (torch.float32, torch.float64))",
        "(torch.bfloat16, torch.float16), (torch.float16, torch.float32, torch.float64))", "rewriter/test_normal_form.py",
    ),
    Fault(
        FORM, "x + 0 is x where the dtype changes too",
        "rewriter/graph/normal_form.py", "b == 0 and isinstance(a, Value) and a.meta.dtype == c.meta.dtype else None",
        "b == 0 and isinstance(a, Value) else None", "rewriter/test_normal_form.py",
    ),
    Fault(
        FORM, "div(a, sqrt(b), rounding_mode='floor') is a · rsqrt(b)",
        "rewriter/graph/normal_form.py", "if any(rounding) or not isinstance(a, Value)",
        "if not isinstance(a, Value)", "rewriter/test_normal_form.py",
    ),
    Fault(
        FORM, "a negative bound beyond the front is not clipped",
        "rewriter/graph/normal_form.py", "isinstance(size, Symbol) else max(i + size, 0)",
        "isinstance(size, Symbol) else i + size", "rewriter/test_normal_form.py",
    ),
    Fault(
        FORM, "pieces that overlap are taken for a split",
        "rewriter/graph/normal_form.py", "return tuple(out) if same_literal(start, x.meta.shape[dim]) else None  #",
        "return tuple(out)  #", "rewriter/test_normal_form.py",
    ),
    Fault(
        FORM, "rules look through what is written in place",
        "rewriter/graph/canonical.py", "x.region == self.region and not x.mutated_storage",
        "x.region == self.region", "rewriter/test_memory.py -k seen_through",
    ),
    Fault(
        FORM, "where gradients are off, a copy still has one",
        "rewriter/graph/canonical.py", "if self.region.grad or x is None",
        "if True or x is None", "rewriter/test_normal_form.py rewriter/test_legality.py rewriter/test_shadow.py",
    ),
    Fault(
        FORM, "rsub(a, b) is a − b",
        "rewriter/graph/normal_form.py", 'return n.add("sub", (b, a), c.meta)',
        'return n.add("sub", (a, b), c.meta)', "rewriter/test_normal_form.py",
    ),
    Fault(
        FORM, "what does not return its derivative is taken for a linear layer",
        "rewriter/graph/autograd_functions.py", " and _same(uncast(d.args[1]), uncast(weight))",
        "", "rewriter/test_functions.py",
    ),
    Fault(
        MATCHER, "sub is commutative",
        "rewriter/graph/canonical.py", 'COMMUTATIVE = frozenset({"add", "mul"})',
        'COMMUTATIVE = frozenset({"add", "mul", "sub"})', "rewriter/test_match.py",
    ),
    Fault(
        MATCHER, "one tensor of the reference may be two",
        "rewriter/match/matcher.py", "            if b[p] is g:",
        "            if True:", "rewriter/test_match.py",
    ),
    Fault(
        MATCHER, "literals that are alike are taken for equal",
        "rewriter/match/matcher.py", "return same_literal(p, g) if self.exact else _like(p, g)",
        "return _like(p, g)", "rewriter/test_match.py",
    ),
    Fault(
        FORM, "x.data is taken for x",
        "rewriter/graph/record.py", "if self.is_made_of_tensors(known):",
        "if False:", "rewriter/test_links.py",
    ),
    Fault(
        FORM, "a copy that is written is what it was copied from",
        "rewriter/graph/identity.py", "if n.mutated_storage else v",
        "if False else v", "rewriter/test_values.py rewriter/test_memory.py",
    ),
    Fault(
        LEGALITY, "what is written in place after it was read is matched",
        "rewriter/plan/legality.py", ">= min([first, *copies])",
        "> 10**9 + min([first, *copies])", "rewriter/test_memory.py rewriter/test_legality.py",
    ),
    Fault(
        LEGALITY, "a match spans a change of autocast",
        "rewriter/plan/legality.py", "(v.region._replace(autocast=own.autocast) != own or may_be_cast(v))",
        "False", "rewriter/test_autocast.py rewriter/test_legality.py",
    ),
    Fault(
        LEGALITY, "a cast of what is dear is taken to be cheap",
        "rewriter/plan/legality.py", "v.op in VIEWS | POINTWISE and all(map(is_cheap, v.inputs))",
        "v.op in VIEWS | POINTWISE", "rewriter/test_legality.py",
    ),
    Fault(
        LEGALITY, "an operator skips a tensor that needs a gradient",
        "rewriter/plan/legality.py", "[name for name in wanting if name in match.pattern.no_grad]",
        "[]", "rewriter/test_links.py rewriter/test_legality.py",
    ),
    Fault(
        LEGALITY, "an operator's backward is not tried",
        "rewriter/plan/legality.py", "and v not in given]",
        "and False]", "rewriter/test_links.py",
    ),
    Fault(
        LEGALITY, "a result may need a gradient that needed none",
        "rewriter/plan/legality.py", "[r for r in match.roots if not r.meta.requires_grad]",
        "[]", "rewriter/test_links.py",
    ),
    Fault(
        LEGALITY, "an operator's domain is not asked",
        "rewriter/match/domain.py", "if number and not number(given):",
        "if False:", "rewriter/test_values.py",
    ),
    Fault(
        LEGALITY, "a result of another dtype is taken",
        "rewriter/plan/legality.py", "if r.meta.dtype != m.dtype or not same_literal",
        "if not same_literal", "rewriter/test_legality.py rewriter/test_match.py",
    ),
    Fault(
        LEGALITY, "an operand may depend on a result",
        "rewriter/plan/places.py", "if any(n in found for m in matches for n in self.sources(m)):",
        "if False:", "rewriter/test_rewrite.py rewriter/test_legality.py",
    ),
    Fault(
        LEGALITY, "random calls change places",
        "rewriter/plan/places.py", "or _random(n) or",
        "or", "rewriter/test_rewrite.py rewriter/test_legality.py",
    ),
    Fault(
        LEGALITY, "an operator without a backward where a gradient is wanted",
        "rewriter/plan/legality.py", "if not has_backward(match.pattern.op):",
        "if False:", "rewriter/test_legality.py",
    ),
    Fault(
        CHOICE, "matches overlap",
        "rewriter/plan/choice.py", "next((taken[v] for v in _own(m) if v in taken), None)",
        "None", "rewriter/test_rewrite.py rewriter/test_plan.py",
    ),
    Fault(
        CHOICE, "matches with other numbers share a call",
        "rewriter/plan/choice.py", "(op, literal_key(tuple(shared)), m.roots",
        "(op, m.roots", "rewriter/test_rewrite.py patterns/test_lora.py",
    ),
    Fault(
        CHOICE, "a call does not wait for what writes to its operands",
        "rewriter/plan/places.py", "if h.mutated_storage else ()",
        "if False else ()", "rewriter/test_memory.py",
    ),
    Fault(
        PATTERNS, "channels that are flipped are read as they stand",
        "patterns/rotation/operations.py", "return r.read(x, axes).map(lambda a: np.flip(a, flipped))",
        "return r.read(x, axes)", "patterns/test_rotation_spellings.py -k backwards",
    ),
    Fault(
        PATTERNS, "j < i + a is read as j ≤ i + a: a window is one key too wide",
        "patterns/attention/mask_analysis.py", "sympy.Lt: lambda: r.rhs - r.lhs - 1",
        "sympy.Lt: lambda: r.rhs - r.lhs", "patterns/test_mask_meaning.py",
    ),
    Fault(
        PATTERNS, "of two bounds of a mask, the wider",
        "patterns/attention/mask_analysis.py", "max(-FAR, min(int(bound), FAR if known is None else known))",
        "max(-FAR if known is None else known, int(bound))", "patterns/test_mask_meaning.py",
    ),
    Fault(
        PATTERNS, "any cumulative sum is taken to never fall",
        "patterns/attention/mask_analysis.py", " and uncast(v.args[0]).meta.dtype == torch.bool",
        "", "patterns/test_mask_meaning.py",
    ),
    Fault(
        PATTERNS, "a mask that differs from head to head is taken for one of the batch",
        "patterns/attention/attention_dense_mask.py", "(len(shape) == 2 or len(shape) == 4 and is_one(shape[1]))",
        "len(shape) in (2, 4)", "patterns/test_attention_by_mask.py -k each_head",
    ),
    Fault(
        PATTERNS, "a packed MLP: gate and up exchanged in one variant",
        "patterns/gated_mlp.py", 'f"{act}_up_first", act=act, up_first=True',
        'f"{act}_up_first", act=act, up_first=False', "patterns/test_entries.py -k gated_mlp",
    ),
    Fault(
        PATTERNS, "attention: what a query that sees nothing gets is not asked",
        "patterns/attention/attention.py", "return not is_truth(match.attn_mask) and may_see",
        "return False and may_see", "patterns/test_added_mask.py patterns/test_attention.py",
    ),
    Fault(
        LAZY, "an index into the vocabulary is taken for one of positions",
        "lazy/functions.py", "fine = taken < x.dim() or taken == x.dim() and whole",
        "fine = taken <= x.dim()", "test_lazy_logits.py",
    ),
    Fault(
        LAZY, "a mean with weights of classes is divided by the count",
        "lazy/functions.py", "divisor = counts.sum() if weight is None else",
        "divisor = counts.sum() if True else", "test_losses_of_logits.py test_lazy_logits.py",
    ),
    Fault(
        LAZY, "weights that changed before logits are read are not noticed",
        "lazy/snapshot.py", "or not torch.equal(fingerprint(t), then):",
        "or False:", "test_lazy_as_tensors.py",
    ),
    Fault(
        LAZY, "gradients of later chunks of rows replace those of earlier ones",
        "lazy/gradient.py", "add_product(dz.t(), x, self.dw)",
        "product(dz.t(), x, self.dw)", "test_lazy_logits.py test_many_logits.py",
    ),
    Fault(
        LAZY, "fingerprints of a head's weights are not asked",
        "lazy/rows.py", "self.head.snapshot.check()",
        "pass", "test_lazy_as_tensors.py",
    ),
    Fault(
        LAZY, "fingerprints of hidden states are not asked",
        "lazy/rows.py", "        if self.snapshot is not None:\n            self.snapshot.check()",
        "        pass", "test_lazy_logits.py",
    ),
    Fault(
        LAZY, "detached logits have gradients",
        "lazy/functions.py", "    with torch.no_grad():\n        return _with(x)",
        "    return _with(x)", "test_lazy_logits.py",
    ),
    Fault(
        LAZY, "views do not show what was written",
        "lazy/tensor.py", "(parent.written or _has_other_past(parent) or _overwritten(parent)) and x.is_view",
        "False", "test_lazy_logits.py test_lazy_as_tensors.py",
    ),
    Fault(
        LAZY, "of several results of the same logits, one gives a gradient",
        "lazy/gradient.py", "for part in parts:\n            one",
        "for part in parts[:1]:\n            one", "test_losses_of_logits.py test_lazy_logits.py",
    ),
    Fault(
        LAZY, "steps run under the autocast of whoever reads",
        "lazy/functions.py", "with torch.autocast(*ambient):",
        "if ambient:", "test_lazy_logits.py test_losses_of_logits.py",
    ),
    Fault(
        LAZY, "the bias has the gradient of the last rows",
        "lazy/gradient.py", "self.db = db if self.db is None else self.db.add_(db)",
        "self.db = db", "test_lazy_logits.py test_many_logits.py",
    ),
    Fault(
        PLAN, "a result with two readers is kept narrow",
        "rewriter/plan/narrow.py", "return len(readers) == 1 and self.takes",
        "return len(readers) > 0 and self.takes", "rewriter/test_narrow.py",
    ),
    Fault(
        PLAN, "what is computed of written memory is hoisted",
        "rewriter/plan/hoist.py", "if any(v.mutated_storage for n in _nodes(given) for v in values_in((view.env.get(n),))):",
        "if False:", "rewriter/test_hoist.py -k written",
    ),
    Fault(
        PLAN, "a sum of two results that both become narrow",
        "rewriter/plan/narrow.py", " and not self.is_narrow(others[0])",
        "", "rewriter/test_narrow.py",
    ),
    Fault(
        REGIONS, "parts with and without gradients share what they are compiled to",
        "rewriter/compile/structural_key.py", "t.device, t.requires_grad, type(t)",
        "t.device, type(t)", "rewriter/test_parts.py",
    ),
    Fault(
        REGIONS, "a graph is cut where a later part writes an earlier one's memory",
        "rewriter/compile/regions.py", "if any(made_in.get(n) != i for i, piece in enumerate(pieces) for n in",
        "if any(False for i, piece in enumerate(pieces) for n in", "rewriter/test_parts.py",
    ),
    Fault(
        REGIONS, "a kernel writes over an operand that is read later",
        "rewriter/compile/passes.py", "all(order[u] <= order[call] for u in n.users)",
        "True", "rewriter/test_written_over.py",
    ),
    Fault(
        REGIONS, "calls that read each other are made one",
        "rewriter/compile/passes.py", " or set(n.all_input_nodes) & set(row)",
        "", "rewriter/test_in_one_call.py",
    ),
    Fault(
        CHOICE, "calls with and without gradients are made one",
        "rewriter/plan/choice.py", ", m.roots[0].region, m.roots[0].meta.requires_grad) if takes_many(op)",
        ", m.roots[0].region) if takes_many(op)", "rewriter/test_links.py patterns/test_lora.py",
    ),
    Fault(
        CHOICE, "readers of a result are moved across writes",
        "rewriter/plan/places.py", " or _random(n) or self.in_written_memory(n) for n in moved",
        " or _random(n) for n in moved", "rewriter/test_memory.py -k stay_where",
    ),
    Fault(
        CHOICE, "readers of a result are moved out of their grad mode",
        "rewriter/plan/places.py", "n.is_impure() or self.view.regions[n] != region or _random(n)",
        "n.is_impure() or _random(n)", "rewriter/test_memory.py -k stay_where",
    ),
    Fault(
        CHOICE, "what a refused match took the place of is not tried",
        "rewriter/plan/plan.py", "todo[:0] = graph.instead_of(placement, why, todo)",
        "graph.instead_of(placement, why, todo)", "rewriter/test_rewrite.py rewriter/test_plan.py rewriter/test_legality.py",
    ),
    Fault(
        LEGALITY, "what is written needs a gradient, whatever the tracer says",
        "rewriter/graph/value.py", " and not _told_frozen(origin):",
        ":", "rewriter/test_memory.py -k without_gradients_has",
    ),
    Fault(
        LEGALITY, "gradients of a cast that others read too are rounded before they are added up",
        "rewriter/plan/legality.py", "for n in v.nodes) and _is_widened(v, match):",
        "for n in v.nodes) and False:", "rewriter/test_legality.py -k added_up",
    ),
    Fault(
        PATTERNS, "RoPE of pairs of channels is told to be of halves",
        "patterns/rope.py", "(pairs, True)",
        "(pairs, False)", "test_programs.py",
    ),
    Fault(
        PATTERNS, "Gemma's norm is told that its weight is no distance from one",
        "patterns/rms_norm.py", '"gemma": (gemma, {"offset": 1.0})',
        '"gemma": (gemma, {"offset": 0.0})', "test_programs.py",
    ),
    Fault(
        LAZY, "a second derivative of lazy logits is nothing instead of refused",
        "lazy/autograd.py", 'raise RuntimeError("sloth: losses of lazy logits can be differentiated once, not twice")',
        "return None, None", "test_lazy_as_tensors.py test_losses_of_logits.py test_lazy_logits.py",
    ),
    Fault(
        LAZY, "of several operands of a result all have the first one's gradient",
        "lazy/autograd.py", "via = Via(ctx.fn, ctx.operands, i)",
        "via = Via(ctx.fn, ctx.operands, 0)", "test_losses_of_logits.py test_lazy_programs.py",
    ),
    Fault(
        LAZY, "weights that changed are not noticed where gradients of gradients are wanted",
        "lazy/autograd.py", "if ctx.versions != _versions(ctx.inputs):",
        "if False:", "test_lazy_as_tensors.py -k gradients_of_gradients",
    ),
    Fault(
        LAZY, "gradients of logits made of others forget the steps between",
        "lazy/autograd.py", "through = [p._replace(steps=(*before, via, *p.steps[len(steps) :]), made=None)",
        "through = [p._replace(steps=(*before, via), made=None)", "test_lazy_as_tensors.py -k steps_behind",
    ),
    Fault(
        TRUST, "Inductor times reductions in each process",
        "rewriter/compile/inductor.py", "preferred[SAME_BITS] = True",
        "preferred[SAME_BITS] = False", "rewriter/test_determinism.py -k clock",
    ),
    Fault(
        TRUST, "code that lies beside a config is run",
        "tiny_model.py", '"local_files_only": True, "trust_remote_code": False}',
        '"local_files_only": True, "trust_remote_code": True}', "test_no_code_from_data.py",
    ),
    Fault(
        TRUST, "anybody may read and write caches",
        "warm.py", "os.O_EXCL | os.O_WRONLY, 0o600",
        "os.O_EXCL | os.O_WRONLY, 0o666", "test_no_code_from_data.py -k caches",
    ),
]
# fmt: on


class Caught(NamedTuple):
    tier: str  # empty: by none
    test: str
    seconds: float


def planted(fault: Fault, to: Path) -> None:
    """A copy of the tree with the fault in it. `to/path` is what PYTHONPATH needs."""
    skipped = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".pytest_cache", ".ruff_cache", ".hypothesis")
    shutil.copytree(ROOT, to / "tree", ignore=skipped)
    (to / "path").mkdir()
    (to / "path" / "sloth").symlink_to(to / "tree" / "src")
    file = to / "tree" / "src" / fault.file
    source = file.read_text()
    if source.count(fault.old) != 1:
        raise ValueError(f"{fault.what}: {fault.old!r} stands {source.count(fault.old)} times in {fault.file}")
    file.write_text(source.replace(fault.old, fault.new))


def failing(tree: Path, tier: str, *tests: str) -> str:
    """The first test that fails, or what stopped pytest; empty where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", MARKS[tier], *tests]
    command += ["--hypothesis-profile", "faults"]
    env = os.environ | {"PYTHONPATH": str(tree.parent / "path"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode in (0, 5):
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - |$)", done.stdout, re.MULTILINE)
    return found[1] if found else f"pytest ended with {done.returncode}"


MARKS = {"default": "not sweep and not nightly", "nightly": "nightly"}


def caught(fault: Fault, everything: bool) -> Caught:
    """By the likely tests of the default tier, by those of the nightly tier, or, if wanted, by any test of the default tier."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        planted(fault, Path(folder))
        tree = Path(folder, "tree")
        likely = [
            t if t.startswith("-") or "/" not in t and not t.endswith(".py") else f"tests/{t}" for t in fault.likely.split()
        ]
        runs = [("default", *likely), *([("default", "tests")] if everything else []), ("nightly", *likely)]
        for tier, *tests in runs:
            if test := failing(tree, tier, *tests):
                return Caught(tier, test.removeprefix("tests/"), time.monotonic() - start)
    return Caught("", "", time.monotonic() - start)


# Of what verify finds in no program: which other rule stands in the way of what the fault lets through, so that no value changes.
SECOND = {
    "LoRA: gradients of frozen A are computed and taken for others'": "backward passes are tried: legality refuses",
    "x.data is taken for x": "the tracer says what needs no gradient",
    "an operator skips a tensor that needs a gradient": "backward passes are tried: legality refuses",
}


def verified(fault: Fault, programs: list[str]) -> str:
    """Those of these programs (none: all) in which `sloth.verify` finds it; "–" where in none, and why."""
    with tempfile.TemporaryDirectory() as folder:
        planted(fault, Path(folder))
        env = os.environ | {"PYTHONPATH": str(Path(folder, "path")), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tests.verified", *programs]
        done = subprocess.run(command, cwd=Path(folder, "tree"), env=env, capture_output=True, text=True, timeout=LIMIT)
    names = dict.fromkeys(re.findall(r"^(\w+): .* wrong: ", done.stdout, re.MULTILINE))
    if done.returncode not in (0, 1) or bool(names) != bool(done.returncode):
        raise RuntimeError(f"{fault.what}: the programs end with {done.returncode}: {done.stderr[-2000:]}")
    return ", ".join(f"`{name}`" for name in names) or ("– " + SECOND.get(fault.what, "")).strip()


def row(fault: Fault, found: Caught) -> list[str]:
    """All but the last column."""
    return [fault.kind, fault.what, f"`{found.test}`" if found.tier else "**nothing**", found.tier]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", nargs="*", type=int, help="those of these numbers, in this order")
    parser.add_argument("--missing", action="store_true", help="those that have no row yet")
    parser.add_argument("--everything", action="store_true", help="where the likely tests pass, run the whole default tier")
    parser.add_argument(
        "--verify", nargs="*", help="fill the last column instead, of these programs or of all", metavar="PROGRAM"
    )
    given = parser.parse_args()
    for i in range(len(FAULTS)) if given.only is None else given.only:
        fault = FAULTS[i]
        if given.list:
            print(f"{i:3} {fault.kind}: {fault.what} ({fault.file})")
        elif given.verify is not None:
            cells = rows().get(fault.what) or [fault.kind, fault.what, "", "", ""]
            write(rows() | {fault.what: [*cells[:4], verified(fault, given.verify)]})
            print(f"{i:3} {fault.what}: {rows()[fault.what][4]}", flush=True)
        elif not given.missing or not rows().get(fault.what, ["", "", ""])[2]:
            found = caught(fault, given.everything)
            cells = row(fault, found)
            write(rows() | {fault.what: [*cells, rows().get(fault.what, [""])[-1]]})
            print(f"{i:3} {found.seconds:5.0f} s {' | '.join(cells)}", flush=True)


def rows() -> dict[str, list[str]]:
    """The cells of the page's rows, by what the fault is."""
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    cells = (line[2:-2].split(" | ") for line in table.splitlines()[2:])
    return {row[1]: row for row in cells}


def write(known: dict[str, list[str]]) -> None:
    page = PAGE.read_text()
    table = ["| kind | fault | caught by | tier | by verify |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join(known[f.what])} |" for f in FAULTS if f.what in known]
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(page[:before] + "\n".join(table) + "\n" + page[after:])


if __name__ == "__main__":
    main()
