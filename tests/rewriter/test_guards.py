"""No stage adds a guard: one graph serves all lengths, at the sizes and on the device that people have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import sloth
from sloth.rewriter.backend import listening
from sloth.rewriter.dynamo import varying_sizes
from sloth.rewriter.match.registry import unregister

LLAMA_8B = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
BATCHES = ((4, 456), (4, 488), (3, 300), (2, 1200), (4, 4000))


def fake_model(mode: FakeTensorMode) -> torch.nn.Module:
    """Two layers of an 8B with adapters and checkpointing, without memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B, num_hidden_layers=2, use_cache=False))
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    with mode:
        for module in model.modules():
            for of in (module._parameters, module._buffers):
                for name, t in of.items():
                    if t is not None:
                        made = torch.empty(t.shape, dtype=t.dtype)
                        of[name] = torch.nn.Parameter(made, t.requires_grad) if isinstance(t, torch.nn.Parameter) else made
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model.train()


def one_graph() -> None:
    """Traces all batches through AOTAutograd; fails where a second graph is made, a guard is added or a site is missed."""
    varying_sizes.sizes_vary = lambda: True
    mode = FakeTensorMode()
    model = fake_model(mode)
    counters.clear()
    with mode, listening() as reports:
        compiled = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})
        for rows, length in BATCHES:
            ids = torch.randint(5, 250, (rows, length))
            compiled(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
            guards = [g for r in reports for g in r.guards]
    missed = [(s.construct, s.reason) for r in reports for s in r.sites if s.status != "matched"]
    assert (counters["stats"]["unique_graphs"], guards, missed) == (1, [], []), (counters["stats"], guards, missed)
    print("one graph")


PRETEND = "from sloth.kernels.common import device; device._pretended['cpu'] = device.H100; "


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "h100"])
@pytest.mark.nightly
def test_one_graph_for_all_lengths_at_real_sizes(gpu: bool) -> None:
    """In a process of its own, without Triton's interpreter: what a GPU would get is traced by saying that there is one."""
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_guards; "
    code = here + (PRETEND if gpu else "") + "test_guards.one_graph()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("one graph"), done.stderr[-3000:]


@torch.library.custom_op("test_guards::nosy", mutates_args=())
def nosy(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * 3


@nosy.register_fake
def _(x):
    return x.new_empty(x.shape if x.shape[0] <= 7 else tuple(x.shape))


def test_an_operator_that_compares_sizes_is_refused_and_leaves_no_guard() -> None:
    @sloth.pattern(sloth.Construct("nosy", "nosy", anchor=lambda v: v.op == "sigmoid"), op=nosy, dims={"x": "B S"}, name="nosy")
    def reference(x):
        return torch.sigmoid(x) * 3

    try:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(lambda x: torch.sigmoid(x) * 3, backend="sloth", options={"sloth.inner_backend": "aot_eager"})
        with listening() as reports:
            for n in (6, 7, 8, 9):
                compiled(torch.randn(n, 4))
    finally:
        unregister("nosy")
    assert counters["stats"]["unique_graphs"] == 2
    (site,) = reports[-1].sites
    assert site.status == "sizes" and "some sizes only" in site.reason


def test_packed_rows_are_two_graphs() -> None:
    """Of ids whose positions begin anew: which rows are one document is found in every length alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=97, use_cache=False))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})
    for n in (64, 72, 56, 88):
        ids, positions = torch.randint(0, 97, (1, n)), torch.arange(n // 4).repeat(4)[None]
        compiled(input_ids=ids, labels=ids, position_ids=positions).loss.backward()
    assert counters["stats"]["unique_graphs"] == 2


def test_packed_texts_of_a_trainer_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, however long the longest is: as TRL's collator tells transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(varying_sizes, "sizes_vary", lambda: True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))
    compiled = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "eager"})
    with listening() as reports:
        for texts in ((9, 3), (5, 8, 2), (17,), (4, 4, 4, 4)):
            positions = torch.cat([torch.arange(n) for n in texts])[None]
            starts = torch.tensor([0, *texts]).cumsum(0).to(torch.int32)
            told = {f"cu_seq_lens_{of}": starts for of in "qk"} | {f"max_length_{of}": max(texts) for of in "qk"}
            ids = torch.randint(0, 64, positions.shape, generator=torch.Generator().manual_seed(len(texts)))
            expected = model(input_ids=ids, position_ids=positions, labels=ids).loss
            torch.testing.assert_close(compiled(input_ids=ids, position_ids=positions, labels=ids, **told).loss, expected)
    assert len(reports) == 1 and not reports[0].guards
