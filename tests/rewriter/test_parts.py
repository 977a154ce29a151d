"""Graphs that repeat themselves are compiled in parts, equal ones once, and compute what they computed."""

import weakref

import pytest
import torch
from common import DEVICE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers import Gemma2Config, GPT2Config, LlamaConfig

from sloth.rewriter.backend import listening
from sloth.rewriter.compile import regions

AOT = {"sloth.inner_backend": "aot_eager"}


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("", (0, 1, 0)),
        ("abcdef", (0, 1, 0)),
        ("xyabcabcabcz", (2, 3, 6)),
        ("abab" + "cdecdecde", (4, 3, 6)),
        ("abacabacabac", (0, 4, 8)),
        ("abcabxabcabx", (0, 1, 0)),  # twice only
        ("abcabxabcabxabcabx", (0, 6, 12)),
        ("aaaa", (0, 1, 3)),
        ("aaaaaabCbCbC", (6, 2, 4)),  # C weighs more than all others
    ],
)
def test_the_longest_repetition(labels, found):
    assert regions.longest_repetition([ord(c) for c in labels], [10 if c == "C" else 1 for c in labels]) == found


class Layer(nn.Module):
    """Enough calls to be worth a part."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x):
        y = x
        for _ in range(regions.CALLS // 2):
            y = torch.tanh(y @ self.w)
        return x + y


class Stack(nn.Module):
    def __init__(self, layers=5, make=Layer):
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sin()


def step(model, run, *args, **kwargs):
    """What it computes, and all gradients."""
    model.zero_grad(set_to_none=True)
    out = run(*args, **kwargs)
    out = out if isinstance(out, torch.Tensor) else out.loss
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def compared(model, *args, options=AOT, dynamic=False, **kwargs):
    """(parts, of these compiled) of its only graph, when results and gradients are eager's."""
    torch._dynamo.reset()
    with listening() as reports:
        ours = step(model, torch.compile(model, backend="sloth", options=options, dynamic=dynamic), *args, **kwargs)
    torch.testing.assert_close(ours, step(model, model, *args, **kwargs), rtol=2e-4, atol=1e-6)
    (report,) = reports
    return report.parts, report.compiled


def stack(*how, **more):
    torch.manual_seed(0)
    return Stack(*how, **more).to(DEVICE)


X = torch.randn(3, 8, device=DEVICE)


@pytest.mark.parametrize("options", [AOT, {}], ids=["aot_eager", "inductor"])
def test_equal_layers_are_compiled_once(options):
    """But the first, whose input needs no gradient."""
    assert compared(stack(), X, options=options) == (6, 3)  # five layers, and the sine


def test_a_gradient_of_the_input_too():
    x = X.clone().requires_grad_()
    model = stack()
    ours = torch.autograd.grad(torch.compile(model, backend="sloth", options=AOT)(x).sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(model(x).sum(), x))


def test_few_layers_stay_whole():
    assert compared(stack(regions.REPETITIONS - 1), X) == (1, 1)


def test_short_layers_stay_whole():
    assert compared(stack(5, lambda: nn.Linear(8, 8)), X) == (1, 1)


def test_layers_that_differ_are_compiled_for_themselves():
    model = stack(6)
    model.layers[3].w.requires_grad_(False)
    assert compared(model, X) == (7, 4)  # the first, that one, the others, and the sine
    model = stack(6)
    model.layers[2].forward = lambda x: x * 2 + torch.tanh(x @ model.layers[2].w)
    compared(model, X)


def llama(**more):
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, use_cache=False
    )
    return LlamaConfig(**sizes, **{"num_hidden_layers": 5} | more)


CONFIGS = {
    "llama": llama(),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=5, n_head=4, vocab_size=64, use_cache=False, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
    "gemma2": Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=64, sliding_window=8, use_cache=False, attn_implementation="eager",
    ),
}  # fmt: skip


def model_of(name, checkpointing=False):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(DEVICE).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batch(length=24):
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma2", True)])
@pytest.mark.covered(1)
def test_models(name, checkpointing):
    """Gemma 2's layers take turns: two of them are one part."""
    found, compiled = compared(model_of(name, checkpointing), **batch())
    assert found >= 4 and compiled <= 4


def test_sizes_come_in_the_order_of_the_graph(monkeypatch):
    """Or caches on disk would not know a part again: symbols are in sets, whose order is another one in every process."""
    found = []
    split = regions.split_repeated_regions
    monkeypatch.setattr(regions, "split_repeated_regions", lambda *args: (found.extend(parts := split(*args)), parts)[1])
    monkeypatch.setattr(regions, "_free_symbols", lambda n, own=regions._free_symbols: sorted(own(n), key=str, reverse=True))
    x = torch.randn(3, 5, 7, 8, device=DEVICE)
    torch.compile(stack(), backend="sloth", options=AOT, dynamic=True)(x)
    order = {n: i for i, n in enumerate(found[0].calls[0].graph.nodes)}
    sizes = [[order[n] for n in part.inputs if isinstance(n.meta["example_value"], torch.SymInt)] for part in found]
    assert max(map(len, sizes)) == 3 and all(each == sorted(each) for each in sizes)


def test_results_by_heads_do_not_cross(monkeypatch):
    """As many tensors would cross between attention and the reshaping of its result."""
    found, split = [], regions.split_repeated_regions
    monkeypatch.setattr(regions, "split_repeated_regions", lambda *given: found.append(split(*given)) or found[-1])
    compared(model_of("llama"), **batch())
    dimensions = [[n.meta["example_value"].dim() for n in part.outputs] for part in found[0][1:-1]]
    assert len(dimensions) == 4 and all(each == [3, 3] for each in dimensions)


def test_without_gradients():
    model = model_of("llama").eval()
    torch._dynamo.reset()
    with torch.no_grad(), listening() as reports:
        ours = torch.compile(model, backend="sloth", options=AOT)(**batch()).loss
        torch.testing.assert_close(ours, model(**batch()).loss)
    assert reports[0].parts == 6


def test_what_all_layers_give_out():
    model = model_of("llama")
    torch._dynamo.reset()
    ours = torch.compile(model, backend="sloth", options=AOT)(**batch(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours, model(**batch(), output_hidden_states=True).hidden_states, rtol=2e-4, atol=1e-6)


class Counting(Layer):
    """Writes to memory that all layers share."""

    memory = torch.zeros(3, 8, device=DEVICE)

    def forward(self, x):
        self.memory.add_(x.detach())
        return super().forward(x) + self.memory


class Scaling(Layer):
    """Writes to memory of its own."""

    def forward(self, x):
        y = super().forward(x).clone()
        y.mul_(2)
        return y


def test_memory_that_parts_share_is_written_by_none():
    results = []
    for compiled in (True, False):
        Counting.memory.zero_()
        model = stack(make=Counting)
        with listening() as reports:
            torch._dynamo.reset()
            run = torch.compile(model, backend="sloth", options=AOT) if compiled else model
            results.append([*step(model, run, X), Counting.memory.clone()])
        assert all(r.parts == 1 for r in reports)
    torch.testing.assert_close(*results)


def test_memory_of_a_part_may_be_written():
    assert compared(stack(make=Scaling), X)[0] > 1


class Autocast(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return self.inner(x).float()


def test_each_part_of_a_block_of_autocast_enters_it():
    """As accelerate puts one around a model's forward: its layers are compiled once all the same."""
    model = Autocast(stack())
    torch._dynamo.reset()
    with listening() as reports:
        ours = step(model, torch.compile(model, backend="sloth", options=AOT), X)
    torch._dynamo.reset()
    torch.testing.assert_close(ours, step(model, torch.compile(model, backend="aot_eager"), X), rtol=0, atol=0)
    assert (reports[0].parts, reports[0].compiled) == (7, 4)


class Framed(Layer):
    """A block inside of each layer may be cut around."""

    def forward(self, x):
        with torch.no_grad():
            scale = x.abs().mean()
        return super().forward(x) * (1 + scale)


def test_blocks_inside_of_parts():
    assert compared(stack(make=Framed), X)[0] > 1


def test_whatever_goes_wrong_the_graph_is_compiled_whole(monkeypatch):
    monkeypatch.setattr(regions, "graph_key", lambda *_: [])  # which cannot be compared
    assert compared(stack(), X) == (1, 1)


def test_cuda_graphs_are_of_the_whole():
    from sloth.rewriter.compile import inductor

    assert inductor.uses_cudagraphs("reduce-overhead", {}) and inductor.uses_cudagraphs(None, {"triton.cudagraphs": True})
    assert not inductor.uses_cudagraphs(None, {}) and not inductor.uses_cudagraphs("default", {})
    with torch._inductor.config.patch("triton.cudagraphs", True):
        assert inductor.uses_cudagraphs(None, {})


def test_what_no_later_part_reads_is_let_go():
    """Between layers, one tensor is alive."""
    alive: list = []

    def remembering(gm, example_inputs):
        def run(*args):
            assert sum(r() is not None for r in alive) <= 1
            out = gm(*args)
            alive.extend(weakref.ref(t) for t in out)
            return out

        return run

    model = stack()
    torch._dynamo.reset()

    def backend(gm, example_inputs):
        return regions.compile_by_region(gm, example_inputs, remembering)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(X), model(X))
    assert len(alive) == 6


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_result_in_other_strides_is_brought_into_those_that_were_compiled_for(dynamic):
    def transposing(gm, example_inputs):
        """A compiler that lays out results as it likes."""
        return lambda *args: tuple(t.t().contiguous().t() if t.dim() == 2 else t for t in gm(*args))

    model, seen = stack(), []

    def backend(gm, example_inputs):
        def compile_one(part, given):
            run = transposing(part, given)
            return lambda *args: (
                seen.append([t.stride() for t in args if isinstance(t, torch.Tensor) and t.shape == X.shape]) or run(*args)
            )

        return regions.compile_by_region(gm, example_inputs, compile_one)

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, dynamic=dynamic)
    torch.testing.assert_close(step(model, run, X), step(model, model, X))
    assert len(seen) == 6 and all(stride == (8, 1) for strides in seen for stride in strides)


def test_the_order_of_dimensions_of_unknown_sizes():
    """What is known of them to be dense; asking leaves no guards."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(
        torch.zeros(2, 24, 4, 8),
        symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]),
    )
    views = [x, x.transpose(1, 2), x.unsqueeze(1).transpose(0, 1), x[:, :, :2], x[..., 0]]
    assert [regions._order(view) for view in views] == [[3, 2, 1, 0], [3, 1, 2, 0], [4, 3, 2, 0, 1], None, None]
    layout = regions._layout(views[1])(torch.zeros(3, 4, 5, 8))
    assert layout == [(3, 1), (1, 8), (2, 32), (0, 160)]
    assert not mode.shape_env.guards
