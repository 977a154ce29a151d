"""Set-up that must come before torch's compiler or Triton is imported."""

import getpass
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels on the CPU
# Hypothesis takes numbers for its examples out of all modules it finds, what Inductor wrote among them: a test's examples would
# depend on what ran before it. It leaves out folders of this name.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"sloth-{getpass.getuser()}", "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # there is a worker for each core


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
