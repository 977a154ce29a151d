"""Private names of Inductor and of AOTAutograd's partitioner. Those of LATE are imported when they are asked for: they import
Inductor itself, which takes seconds, and `sloth.explain` has no use for it.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

with suppress(ImportError):
    from torch import _TorchCompileInductorWrapper as InductorOptions  # mode and options, as torch.compile reads them
with suppress(ImportError):
    from torch._inductor import config  # slots of passes, combo kernels, CUDA graphs, the launcher of Triton's kernels
with suppress(ImportError):
    from torch._functorch import config as functorch_config  # is a backward pass compiled with its forward pass?
with suppress(ImportError):
    from torch._inductor.custom_graph_pass import CustomGraphPass  # a pass with a name for the caches; torch >= 2.6
with suppress(ImportError):
    from torch._inductor.fx_utils import get_node_storage  # which nodes lie in the same memory
with suppress(ImportError):
    from torch._functorch.partitioners import must_recompute  # is a node tagged so?
with suppress(ImportError):
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional  # kernels' calls
with suppress(ImportError):
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

if TYPE_CHECKING:
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache, torch_key
    from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees
    from torch._inductor.virtualized import V

LATE = {
    "PyCodeCache": "torch._inductor.codecache",  # source that is written, kept on disk and imported
    "torch_key": "torch._inductor.codecache",  # what caches know torch by: a digest of its files, made once in a process
    "AsyncCompile": "torch._inductor.async_compile",  # its processes are started before they are needed
    "CUSTOM_EXTERN_KERNEL_CODEGEN": "torch._inductor.codegen.custom_extern_kernel_codegen",  # how an operator's call is written
    "CustomCodegen": "torch._inductor.codegen.custom_extern_kernel_codegen",
    "V": "torch._inductor.virtualized",  # the graph whose code is written
    "compile_fx": "torch._inductor.compile_fx",
    "compile_fx_inner": "torch._inductor.compile_fx",  # forward and backward pass, each by itself
    "reset_cudagraph_trees": "torch._inductor.cudagraph_trees",  # torch.compiler.reset()
}


def __getattr__(name: str) -> Any:
    if name in LATE:
        return getattr(import_module(LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: this torch lacks what it stands for")
