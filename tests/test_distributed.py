"""Two processes: DistributedDataParallel around compiled code and inside of it gives eager's gradients, whoever reads logits.

On two GPUs through NCCL, otherwise on the CPU through gloo."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sloth.lazy import rows as lazy_rows
from sloth.lazy.functions import LazyLogits, lazy
from sloth.rewriter.backend import listening

V = 40_000  # embedding and head are a bucket each
GPUS = torch.cuda.device_count() >= 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(V, 8), nn.Linear(8, 8), nn.Linear(8, V, bias=False)

    def forward(self, ids, labels=None):
        logits = self.head(self.layer(self.embedding(ids)).tanh())
        loss = None if labels is None else F.cross_entropy(logits.float().view(-1, V), labels.view(-1))
        return {"loss": loss, "logits": logits}


def compiled(module, inner="aot_eager"):
    return torch.compile(module, backend="sloth", options={"sloth.inner_backend": inner})


def nobody(out):
    return out["loss"]


def everybody(out):
    """By rows, and all of them."""
    return out["logits"].logsumexp(-1).mean() + out["logits"].square().mean()


CASES = {  # who reads the logits, and how the model is wrapped
    "around": (everybody, lambda model: DistributedDataParallel(compiled(model))),
    "around, by Inductor": (everybody, lambda model: DistributedDataParallel(compiled(model, "inductor"))),
    "inside": (everybody, lambda model: compiled(DistributedDataParallel(model))),
    # Unused parameters are looked for in the autograd graph of what the model returns.
    "unused": (nobody, lambda model: DistributedDataParallel(compiled(model), find_unused_parameters=True)),
}


def gradients(wrap, loss, ids):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model().to(ids.device)
    wrapped = wrap(model)  # it averages gradients as long as it lives
    out = wrapped(ids, ids if loss is nobody else None)
    loss(out).backward()
    return [p.grad for p in model.parameters()], isinstance(out["logits"], LazyLogits)


def gathered(rank: int, device: torch.device) -> None:
    """What Trainer's evaluation does with logits of batches that differ in length, in both processes."""
    accelerator = Accelerator(cpu=not GPUS)
    h, w = torch.randn(2, 3 + rank, 4, device=device, requires_grad=True), torch.randn(10, 4, device=device)
    ours, real = (accelerator.gather(accelerator.pad_across_processes(z, dim=1)) for z in (lazy(h, w), F.linear(h, w)))
    assert type(ours) is torch.Tensor and ours.shape == (4, 4, 10)
    torch.testing.assert_close(ours, real)


def work(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if GPUS else torch.device("cpu")
    if GPUS:
        torch.cuda.set_device(device)
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }  # what accelerate asks
    os.environ |= {name: str(value) for name, value in told.items()}
    dist.init_process_group("nccl" if GPUS else "gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    lazy_rows.CHUNK = 4 * V * 4
    ids = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(rank)).to(device)
    for name, (loss, wrap) in CASES.items():
        expected, _ = gradients(DistributedDataParallel, loss, ids)
        with listening() as reports:
            found, is_lazy = gradients(wrap, loss, ids)
        assert is_lazy and len(reports) == 2, name  # Dynamo splits graphs between buckets of parameters
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    gathered(rank, device)
    everyone = [torch.empty_like(found[-1]) for _ in range(2)]
    dist.all_gather(everyone, found[-1])
    assert torch.equal(*everyone) and everyone[0].any()  # they were averaged
    dist.destroy_process_group()


@pytest.mark.nightly
def test_gradients_of_two_processes(tmp_path):
    mp.spawn(work, args=(str(tmp_path / "meeting"),), nprocs=2)
