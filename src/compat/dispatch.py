"""Private names of torch below its compilers. All are there in torch 2.11 to 2.13."""

from contextlib import suppress

import torch

# ---------------------------------------------------------------- operators

with suppress(ImportError):
    from torch._ops import OpOverload  # an operator of ATen or of a library, as a node calls it
with suppress(ImportError):
    from torch._ops import HigherOrderOperator  # checkpoints, autograd functions, Triton's kernels: nodes with bodies
with suppress(ImportError):
    from torch._library.custom_ops import _maybe_get_opdef as opdef_of  # has an operator a gradient? torch >= 2.4
with suppress(ImportError):
    from torch._C import DispatchKey  # the recorder is a mode of the key PreDispatch
with suppress(ImportError):
    from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel  # for autograd, for autocast
with suppress(ImportError):
    from torch._dispatch.python import enable_python_dispatcher  # symbolic sizes in decompositions

with suppress(ImportError):
    from torch._C import _cuda_clearCublasWorkspaces  # kept by stream; builds for CPUs have none


def clear_workspaces() -> None:
    """Of cuBLAS, where this torch has that."""
    if (clear := globals().get("_cuda_clearCublasWorkspaces")) is not None:
        clear()


# ---------------------------------------------------------------- fake tensors and symbols

with suppress(ImportError):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # graphs are run without data
with suppress(ImportError):
    from torch._subclasses.fake_tensor import disable_fake_tensor_cache  # of calls that come once
with suppress(ImportError):
    from torch._subclasses.schema_check_mode import SchemaCheckMode  # what the recorder is: it sees operators before autograd
with suppress(ImportError):
    from torch.utils import _pytree as pytree  # arguments and results of nodes
with suppress(ImportError):
    from torch.utils._python_dispatch import TorchDispatchMode  # what is computed while verifying is computed in fp64
with suppress(ImportError):
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # a tensor that holds others: DTensor, torchao's
with suppress(ImportError):
    from torch.utils._sympy.symbol import SymT, symbol_is_type  # which symbols are floats, which sizes

# ---------------------------------------------------------------- modes, as nodes of a graph switch them

with suppress(ImportError):
    from torch._C import _set_grad_enabled as set_grad_enabled
with suppress(ImportError):
    from torch.amp.autocast_mode import _enter_autocast as enter_autocast
    from torch.amp.autocast_mode import _exit_autocast as exit_autocast
with suppress(ImportError):
    from torch.autograd.grad_mode import _enter_inference_mode as enter_inference_mode
    from torch.autograd.grad_mode import _exit_inference_mode as exit_inference_mode

# ---------------------------------------------------------------- subclasses of Tensor, and autograd

with suppress(ImportError):
    from torch._C import DisableTorchFunctionSubclass  # a subclass is asked without its __torch_function__
with suppress(ImportError):
    from torch._C import _disabled_torch_function_impl as disabled_torch_function  # what a subclass has that wants none
with suppress(AttributeError):
    make_wrapper_subclass = torch.Tensor._make_wrapper_subclass  # lazy logits: a tensor without memory
with suppress(ImportError):
    from torch._C import _current_graph_task_id as current_graph_task_id  # which backward pass runs; -1: none
with suppress(ImportError):
    from torch._C._autograd import _top_saved_tensors_default_hooks as saved_tensors_hooks  # is this part of a checkpoint?

with suppress(ImportError):
    from torch.utils.checkpoint import _StopRecomputationError as CheckpointStop  # raised in what is computed again: enough of it

# ---------------------------------------------------------------- what is compiled just now

with suppress(ImportError):
    from torch._guards import CompileContext  # the number of the graph
with suppress(ImportError):
    from torch._guards import TracingContext, tracing  # its fake tensors and guards; one for each region
with suppress(ImportError):
    from torch._guards import detect_fake_mode  # is anything traced?
