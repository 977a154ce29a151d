"""Losses that people compute of logits outside of the compiled model: as exact as with real logits, and never all logits at once.

TRL's own functions, as its trainers call them: DPO, GRPO, ORPO; and distillation.
"""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, DTYPES, compare, make, wide
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import LabelSmoother
from trl.kernels import logprob_entropy
from trl.kernels import selective_log_softmax_and_entropy as trl_kernel
from trl.trainer import utils as trl_utils
from trl.trainer.utils import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

from sloth.kernels.loss import linear_cross_entropy
from sloth.lazy import rows as lazy_rows
from sloth.lazy.functions import LazyLogits, lazy

B, S, H, V = 4, 24, 16, 512
IDS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(0)).to(DEVICE)
CLASSES = torch.linspace(0.5, 2, V, device=DEVICE)
MASK = (torch.arange(S, device=DEVICE) % 5 != 2).expand(B, S)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def little_at_a_time(monkeypatch):
    """The logits of 10 positions, of 96, in fp32."""
    monkeypatch.setattr(lazy_rows, "CHUNK", 10 * V * 4)
    monkeypatch.setitem(linear_cross_entropy.BUDGET, DEVICE, 10 * V * 4)


def dpo(logits):
    """Log-probabilities of completions, chosen ones in the first half of the batch."""
    logps = selective_log_softmax(logits[:, :-1], IDS[:, 1:], row_mask=MASK[:, 1:].int()).sum(-1)
    chosen, rejected = logps.chunk(2)
    return logps, -F.logsigmoid(0.1 * (chosen - rejected))


def grpo(logits):
    """The last positions at a temperature, and their entropy for the logs."""
    logits = logits[:, :-1, :][:, -12:] / 0.9
    logps, entropy = selective_log_softmax_and_entropy(logits, IDS[:, -12:], entropy_requires_grad=False)
    ratio = torch.exp(logps - logps.detach() - 0.1)
    return torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean(-1), entropy


def orpo(logits):
    shifted = logits[..., :-1, :].contiguous()
    nll = F.cross_entropy(shifted.view(-1, V), IDS[..., 1:].reshape(-1))
    return nll[None], selective_log_softmax(logits[:2, :-1], IDS[:2, 1:]).mean(-1), logits[:2].detach().mean()[None]


def with_entropy(logits):
    """A bonus for entropy: its gradient counts."""
    return (entropy_from_logits(logits[MASK], chunk_size=7),)


def distillation(logits):
    """To the best words of a teacher."""
    values, where = logits.topk(4, dim=-1)
    return logits.logsumexp(-1), values, logits.log_softmax(-1).gather(-1, where.flip(-1)), logits.max(-1).values


def several(logits):
    """Results of the same rows, each with a gradient of its own: of one cast, and of the logits themselves."""
    z = wide(logits)
    logp = z.log_softmax(-1)
    picked = logp.gather(-1, IDS[..., None]).squeeze(-1)
    return z.logsumexp(-1), picked, -(logp.exp() * logp).sum(-1), logits.logsumexp(-1), logits.max(-1).values


LOSSES = [dpo, grpo, orpo, with_entropy, distillation, several]
TRLS = [dpo, grpo, orpo, with_entropy]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


@each_loss
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_with_real_logits(loss, trained, dtype):
    tensors = [make((B, S, H), dtype, seed=1), make((V, H), dtype, seed=2, scale=H**-0.5)]
    few = 200 if dtype != torch.float32 else 0
    compare(lambda h, w: loss(lazy(h, w)), lambda h, w: loss(F.linear(h, w)), tensors, [True, trained], few=few, strides=False)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_with_an_adapter(loss, dtype):
    """Two layers side by side, the second one in fp32."""
    sizes = {(B, S, H): dtype, (V, H): dtype, (B, S, 3): torch.float32, (V, 3): torch.float32}
    tensors = [make(size, kind, seed=i, scale=size[-1] ** -0.5) for i, (size, kind) in enumerate(sizes.items())]
    onto = lambda z, change: (z + change * 1.7).to(z.dtype)  # noqa: E731
    ours = lambda h, w, t, u: loss(lazy(torch.cat([h, t], -1), w, None, onto, plain=False, more=[(u, None)]))  # noqa: E731
    real = lambda h, w, t, u: loss(onto(F.linear(h, w), F.linear(t, u)))  # noqa: E731
    how = {"few": 200 if dtype != torch.float32 else 0, "strides": False}
    compare(ours, real, tensors, [True, False, True, True], **how, scale=1e-2)  # a mean of numbers of either sign is in orpo


def test_results_of_a_trained_head_are_rounded_once_together():
    """Many results of one forward pass in bf16: each would round its part of the head's gradient."""
    tensors = [make((B, 16 * S, H), torch.bfloat16, seed=1), make((V, H), torch.bfloat16, seed=2, scale=H**-0.5)]
    loss = lambda logits: torch.cat([part.logsumexp(-1) for part in logits.split(4, dim=1)], 1)  # noqa: E731
    compare(lambda h, w: loss(lazy(h, w)), lambda h, w: loss(F.linear(h, w)), tensors, slack=0, strides=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [False, True], ids=["log-probabilities", "a loss"])
def test_results_of_the_same_rows_are_added_before_they_are_rounded(mean, dtype):
    """Log-probabilities at two temperatures: the gradients of their difference nearly cancel. A loss waits for them, too."""
    tensors = [make((B, S, H), dtype, seed=1), make((V, H), dtype, seed=2, scale=H**-0.5)]
    index = F.linear(*tensors).argmax(-1).view(-1, 1)

    def loss(logits):
        z = wide(logits).view(-1, V)
        first, second = [(z / t).log_softmax(-1).gather(-1, index) for t in (1.0, 2.0)]
        return (F.cross_entropy(z, index[:, 0], CLASSES.to(z.dtype)), first.mean()) if mean else (first, second)

    douts = [torch.full(() if mean else (B * S, 1), 1.0 if mean else d, device=DEVICE) for d in (1.0, -1.0)]
    compare(lambda h, w: loss(lazy(h, w)), lambda h, w: loss(F.linear(h, w)), tensors, douts=douts, slack=0, strides=False)


def test_label_smoothing_of_the_trainer():
    """transformers' writes in place to what it has computed of the logits."""
    tensors = [make((B, S, H), torch.float32, seed=1), make((V, H), torch.float32, seed=2, scale=H**-0.5)]
    labels = torch.where(MASK, IDS, -100)
    loss = lambda logits: LabelSmoother(0.1)({"logits": logits}, labels.clone(), shift_labels=True)[None]  # noqa: E731
    compare(lambda h, w: loss(lazy(h, w)), lambda h, w: loss(F.linear(h, w)), tensors, slack=16)


def test_kernels_that_read_all_logits():
    """TRL's on a GPU, an autograd function that takes the tensor as it is."""
    tensors = [make((B, S, H), torch.float32, seed=1), make((V, H), torch.float32, seed=2, scale=H**-0.5)]
    loss = lambda logits: trl_kernel(logits, IDS, temperature=0.7, row_mask=MASK.int())  # noqa: E731
    real = lambda h, w: selective_log_softmax_and_entropy(F.linear(h, w).cpu(), IDS.cpu(), True, 0.7, MASK.int().cpu())  # noqa: E731
    compare(lambda h, w: [t.cpu() for t in loss(lazy(h, w))], real, tensors, slack=64, strides=False)


@pytest.fixture
def with_kernel(monkeypatch):
    """TRL's own choice on a GPU."""
    monkeypatch.setattr(trl_utils, "_supports_trl_loss_kernel", lambda *_: True)


@pytest.mark.parametrize("loss", TRLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.covered(1)
def test_as_exact_as_the_kernel_of_trl(loss, dtype, with_kernel):
    """Which is given rows of lazy logits, and real ones as they are."""
    tensors = [make((B, S, H), dtype, seed=1), make((V, H), dtype, seed=2, scale=H**-0.5)]
    logits, given = lazy(*tensors), []
    apply = logprob_entropy._LogProbEntropyFunction.apply
    with mock.patch.object(logprob_entropy._LogProbEntropyFunction, "apply", lambda z, *more: given.append(z) or apply(z, *more)):
        loss(logits)
        assert given and all(type(z) is torch.Tensor and z.nbytes <= lazy_rows.CHUNK for z in given) and logits.known is None
        given.clear()
        loss(F.linear(*tensors))
        assert all(z.numel() > 10 * V for z in given)
    few = 200 if dtype != torch.float32 else 0
    compare(lambda h, w: loss(lazy(h, w)), lambda h, w: loss(F.linear(h, w)), tensors, few=few, strides=False)


def largest(fn: Callable[[], object]) -> int:
    """Bytes of the largest allocation that it makes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        fn()
    return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


@each_loss
@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "kernel"])
def test_never_all_logits_at_once(loss, kernel, monkeypatch):
    monkeypatch.setattr(trl_utils, "_supports_trl_loss_kernel", lambda *_: kernel)
    tensors = [make((B, S, H), torch.float32, seed=1), make((V, H), torch.float32, seed=2)]

    def step(logits_of):
        out = loss(logits_of(*(t.detach().requires_grad_() for t in tensors)))
        sum(t.sum() for t in out if t.requires_grad).backward()

    everything, weight = B * S * V * 4, V * H * 4
    assert largest(lambda: step(F.linear)) >= everything / 2  # of GRPO half of the positions
    assert largest(lambda: step(lazy)) <= max(2 * lazy_rows.CHUNK, weight) < everything / 4


def test_never_all_logits_of_a_model(monkeypatch):
    """Policy and reference of DPO, forward and backward: the largest tensor is the head."""
    words = 30_000
    monkeypatch.setattr(lazy_rows, "CHUNK", words * 4)
    config = LlamaConfig(
        vocab_size=words, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, use_cache=False
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sloth", options={"sloth.inner_backend": "aot_eager"})

    def step(call, expected):
        with torch.no_grad():
            reference, _ = dpo(call(input_ids=IDS).logits)
        logits = call(input_ids=IDS).logits
        assert isinstance(logits, LazyLogits) == expected
        (dpo(logits)[0] - reference).square().sum().backward()

    step(compiled, True)  # compiles
    assert largest(lambda: step(compiled, True)) == words * 8 * 4 < largest(lambda: step(model, False)) / 8
