"""The tables of a model's rotary embedding are computed once for all layers, however their frequencies are scaled."""

from collections import Counter

import pytest
import torch
from harness import compiled_graphs

from sloth.zoo import models as zoo

LAYERS = 3
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "longrope": LONG,
}
CASES = [
    *(pytest.param("llama", name, True, marks=pytest.mark.nightly) for name in ("llama3", "yarn", "dynamic")),
    pytest.param("llama", "linear", False, marks=pytest.mark.nightly),
    ("phi3", "longrope", True),
    ("glm", None, True),  # its layers make the tables of halves of them
]


@pytest.mark.parametrize("arch, scaled, checkpointed", CASES)
def test_once_for_all_layers(arch, scaled, checkpointed):
    """One cosine and one sine in the forward pass; the backward pass may keep them or compute them again, once. What layers make
    of them each (slices, repetitions) is shared as well, also by checkpointed ones.
    """
    rope = {"rope_parameters": {"rope_type": scaled, "rope_theta": 1e4, **SCALED[scaled]}} if scaled else {}
    model = zoo.tiny_model(arch, depth=LAYERS, **rope)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = 0
    for graph in compiled_graphs(model, lambda compiled: compiled(**zoo.tiny_batch(model, arch)).loss.backward()):
        tables = {n for n in graph.nodes if n.target in (torch.ops.aten.cos.default, torch.ops.aten.sin.default)}
        found += len(tables)
        assert all(count == 1 for count in Counter(n.target for n in tables).values())
        for n in graph.nodes:  # what is made of the tables alone
            if n.op == "call_function" and set(n.all_input_nodes) and set(n.all_input_nodes) <= tables:
                tables.add(n)
        repeated = [n for n in tables if n.target is torch.ops.aten.clone.default]
        assert len(repeated) == 2 * (arch == "glm" and bool(tables)), repeated
    assert found >= 2
