"""Set-up that must come before torch's compiler or Triton is imported."""

import getpass
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from cover import cover
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels on the CPU
# Hypothesis takes numbers for its examples out of all modules it finds, what Inductor wrote among them: a test's examples would
# depend on what ran before it. It leaves out folders named "tests". One for each checkout, so that none reads another's.
_CHECKOUT = hashlib.sha256(str(Path(__file__).resolve().parent).encode()).hexdigest()[:12]
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"sloth-{getpass.getuser()}", _CHECKOUT, "tests"))
os.environ |= {"TORCHINDUCTOR_SIZE_ASSERTS": "1", "TORCHINDUCTOR_ALIGNMENT_ASSERTS": "1"}  # of what operators say they return
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # there is a worker for each core

_HOW = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", max_examples=10, **_HOW)
settings.register_profile("nightly", max_examples=30, **_HOW)
settings.register_profile("faults", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])  # as found, not shrunk
settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `covered`, what no cover of its combinations needs is of the nightly tier."""
    tests: dict = {}
    for item in items:
        if item.get_closest_marker("covered") and not any(item.get_closest_marker(m) for m in ("nightly", "sweep")):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for same in tests.values():
        how = same[0].get_closest_marker("covered")
        chosen = cover([item.callspec.params for item in same], *how.args, how.kwargs)
        for i, item in enumerate(same):
            if i not in chosen:
                item.add_marker(pytest.mark.nightly)


@pytest.fixture(autouse=True)
def exact_fp32_products():
    """accelerate and transformers turn TF32 on for whoever compiles, and for good: no other test shall see it."""
    yield
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.fixture(autouse=True)
def no_trainer_of_before():
    """accelerate remembers for good that a trainer ran; with one, sizes are symbols from the first graph on."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
