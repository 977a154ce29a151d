"""GGUF, by llama.cpp's own converter, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf.py")
BY_CONVERTER = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")  # the others are made of f16 by llama-quantize
ALIASES = {"not_quantized": "bf16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
WHERE = "LLAMA_CPP"  # the folder of llama.cpp


def methods_of(given: str | list[str] | tuple[str, ...]) -> list[str]:
    """Names of llama.cpp's types, in lower case. Raises ValueError for what is no name."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"quantization_method={given!r}: give a name of llama.cpp's such as 'q8_0' or 'q4_k_m', or a list of them"
        )
    return [ALIASES.get(n.lower(), n.lower()) for n in names]


def tools(methods: list[str]) -> tuple[Path, str | None]:
    """The converter, and llama-quantize where a method needs it. Raises RuntimeError that says what to install."""
    folders = [Path(f) for f in (os.environ.get(WHERE), "llama.cpp", Path.home() / "llama.cpp") if f]
    places = [*(f / n for f in folders for n in CONVERTERS), *(Path(p) for n in CONVERTERS if (p := shutil.which(n)))]
    converter = next((p for p in places if p.is_file()), None)
    if converter is None:
        raise RuntimeError(
            "GGUF is written by llama.cpp's converter, and there is none: git clone https://github.com/ggml-org/llama.cpp,"
            f" pip install gguf, and set {WHERE} to that folder. Or save_pretrained_merged(…), and convert that folder"
        )
    other = [m for m in methods if m not in BY_CONVERTER]
    binaries = [*(f / b / "llama-quantize" for f in folders for b in ("build/bin", ".")), shutil.which("llama-quantize")]
    quantize = next((str(p) for p in binaries if p and Path(p).is_file()), None)
    if other and quantize is None:
        raise RuntimeError(
            f"{', '.join(other)} is made by llama-quantize, and there is none: build llama.cpp (cmake), or ask for q8_0"
        )
    return converter, quantize


def convert(model: Path, into: Path, name: str, methods: list[str]) -> list[Path]:
    """Files NAME.METHOD.gguf in `into`. model: a folder merged to 16 bits. Raises RuntimeError with what the converter said."""
    converter, quantize = tools(methods)
    made, whole = [], into / f"{name}.f16.gguf"
    for method in methods:
        file = into / f"{name}.{method}.gguf"
        if method in BY_CONVERTER:
            _run([sys.executable, str(converter), str(model), "--outfile", str(file), "--outtype", method])
        else:
            if not whole.exists():
                _run([sys.executable, str(converter), str(model), "--outfile", str(whole), "--outtype", "f16"])
            _run([str(quantize), str(whole), str(file), method.upper()])
        made.append(file)
    if whole.exists() and whole not in made:
        whole.unlink()
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise RuntimeError(f"{Path(command[-1 if command[0] != sys.executable else 1]).name} failed:\n{last}")
