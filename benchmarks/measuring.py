"""What the benchmarks share: device time, the rates that floors are taken from, the machine, and the command line."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton

MARK = "measured: "


def l2_flush() -> torch.Tensor:
    """A buffer larger than any L2; zeroing it empties the cache."""
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")


def device_us(fn: Callable[[], Any], flush: torch.Tensor, repeats: int = 25) -> float:
    """Median device time of `fn` in microseconds."""
    for _ in range(4):
        fn()
    events = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(3_000_000)
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        fn()
        b.record()
        events.append((a, b))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) * 1e3


def peak_mib(fn: Callable[[], Any]) -> float:
    """What `fn` allocates at the most, beyond what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_rate(flush: torch.Tensor) -> float:
    """Bytes per second, read plus written, of an 8 GiB device-to-device copy."""
    a = torch.empty(2**33, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (device_us(lambda: b.copy_(a), flush, 9) * 1e-6)


def matmul_rate(flush: torch.Tensor) -> float:
    """FLOP/s of a bf16 matmul of 8192³ on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (device_us(lambda: a @ b, flush) * 1e-6)


def optional(module: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        return None


def machine(commit: str) -> dict[str, str]:
    """What was measured on: device, versions, commit (git's, where none is given), date."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    peers = {d: version(d) for d in ("liger-kernel", "transformers") if optional(d.replace("-", "_"))}
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or git.stdout.strip() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **peers,
    }


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="write the results as JSON")
    made.add_argument("--commit", default="", help="the commit that is measured, where the copy has no .git")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; ends the program where there is no GPU."""
    args = made.parse_args()
    if not torch.cuda.is_available():
        print(f"{sys.argv[0]} needs a GPU that torch can see", file=sys.stderr)
        sys.exit(2)
    return args


def tell(work: Callable[[], dict[str, Any]]) -> None:
    """Print what a process of one contender has measured, or how it failed, on a line that `told` finds."""
    try:
        found = work()
    except Exception:
        found = {"failed": traceback.format_exc()[-1500:]}
    print(MARK + json.dumps(found), flush=True)


def told(output: str) -> dict[str, Any]:
    """What the process with this output has measured; the end of it, if it said nothing."""
    lines = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1]) if lines else {"failed": output[-1500:]}


def write(results: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
