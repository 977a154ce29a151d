"""Compiles Triton kernels to machine code for GPUs that are not there; run by test_compile_targets.py in a fresh interpreter,
because Triton's interpreter, which the other tests use, cannot be switched off again in a process.

Each module of sloth.kernels lists what to compile:

    COMPILE = [(kernel, signature, constexprs), ...]

signature   {argument: type} of the arguments that are no constants, such as "*bf16", "*fp32", "*i64", "i32", and descriptors:
            "tensordesc<bf16[128, 64]>". bf16 in these stands for "any activation dtype": it becomes fp16 on a target without
            bf16, and fp32 as well where DTYPES says so.
constexprs  {argument: value} of the constant ones
A fourth element, {"num_warps": 8}, is optional. "shared" in it: the KiB of shared memory that it says it takes on sm_90; "only":
the pairs of target and dtype that it is for; "sweep": the targets for which it takes so long that only the sweep compiles it.

    python tests/kernels/compile_targets.py default|nightly|sweep         one JSON line for each compilation

The default tier compiles all kernels for one target, and one kernel for the others. What compiled once is in Triton's cache, by
a digest of the kernel's source, of what it calls, and of all else that decides about it: 145 of these take five seconds then.
"""

import importlib
import json
import multiprocessing
import pkgutil
import sys

TARGETS = {
    "sm_75": ("cuda", 75, 32),
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"sm_75": ("fp16", "fp32"), "sm_80": ("bf16", "fp16"), "sm_90": ("bf16", "fp16", "fp32")}  # others: bf16
FIRST = "sm_90"  # the target of the default tier
SMOKE = "sloth.kernels.rms_norm", 0  # what that compiles for the others: each backend and each target is there and works
TIERS = ("default", "nightly", "sweep")


def modules() -> list[str]:
    """Kernel modules with something to compile."""
    import sloth.kernels

    names = [m.name for m in pkgutil.walk_packages(sloth.kernels.__path__, "sloth.kernels.")]
    return [name for name in names if getattr(importlib.import_module(name), "COMPILE", None)]


def tier(name: str, index: int, target: str) -> str:
    """The first tier that compiles this kernel for this target."""
    if target in dict(*importlib.import_module(name).COMPILE[index][3:]).get("sweep", ()):
        return "sweep"
    return "default" if target == FIRST or (name, index) == SMOKE else "nightly"


def jobs(wanted: str) -> list[tuple[str, int, str, str]]:
    """(module, index in its COMPILE, target, dtype) of one tier."""
    return [
        (name, i, target, dtype)
        for name in modules()
        for i, entry in enumerate(importlib.import_module(name).COMPILE)
        for target in TARGETS
        for dtype in DTYPES.get(target, ("bf16",))
        if (target, dtype) in dict(*entry[3:]).get("only", [(target, dtype)])
        if wanted == tier(name, i, target)
        if dtype == "bf16" or "*bf16" in entry[1].values() or dtype == DTYPES[target][0]
    ]


def compile_one(job: tuple[str, int, str, str]) -> dict:
    """What came of one compilation: `error` is empty where it went well."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, index, target, dtype = job
    kernel, signature, constexprs, *options = importlib.import_module(name).COMPILE[index]
    activation = ("*bf16", "tensordesc<bf16")
    signature = {arg: kind.replace("bf16", dtype) if kind.startswith(activation) else kind for arg, kind in signature.items()}
    signature |= dict.fromkeys(constexprs, "constexpr")
    signature = {arg: signature[arg] for arg in kernel.arg_names}
    report = {"module": name, "index": index, "kernel": kernel.__name__, "target": target, "dtype": dtype, "error": ""}
    options = dict(*options)
    told = options.pop("shared", 0)
    options = {name: value for name, value in options.items() if name not in ("only", "sweep")}
    # Loads in flight take shared memory where pointers and strides are multiples of 16, as those of models are.
    aligned = [i for i, arg in enumerate(kernel.arg_names) if "*" in signature[arg] or "_" in arg and signature[arg] == "i32"]
    try:
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs=constexprs,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        binary = compiled.asm.get("cubin") or compiled.asm.get("hsaco")
        assert binary, f"no machine code among {list(compiled.asm)}"
        if options.get("enable_fp_fusion") is False:
            assert "fma.rn.f32" not in compiled.asm.get("ptx", ""), "a product and a sum were contracted"
        taken = compiled.metadata.shared
        assert not told or target != "sm_90" or taken // 1024 <= told, f"{taken} bytes of shared memory, not {told} KiB"
    except Exception as error:  # reported to the test
        report["error"] = f"{type(error).__name__}: {error}"[:2000]
    return report


if __name__ == "__main__":
    todo = jobs(sys.argv[1])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for line in pool.imap_unordered(compile_one, todo, chunksize=2):
            print(json.dumps(line))
            sys.stdout.flush()
