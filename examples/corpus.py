"""Text, tokenizer and blocks of token ids for the fine-tuning example.

The text is at hand everywhere: the source of Python's standard library, docstrings included. Nothing is downloaded, and
the selection depends on the library alone, so that two runs on one machine see the same data.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from run_folder import BadInput
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|end|>"
HELD_OUT_EVERY = 20  # one file in twenty is kept for evaluation
EVAL_BATCHES = 2
# Installed packages are not the library; tests and tables (code pages, help topics) are not prose or programs.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}


def read_text(source: str | None, max_bytes: int = 3_000_000) -> list[str]:
    """The documents of `source` (a file or folder) or of the standard library, sorted by path, without binary files."""
    if source is None:
        files = _library_files(Path(sysconfig.get_path("stdlib")), max_bytes)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise BadInput(f"--text {source} does not exist: give a text file or a folder of them")
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if not _hidden(file, path)]
    documents = [text for text in map(_read, files) if text]
    if not documents:
        place = f"--text {source}" if source else "the standard library of this Python"
        raise BadInput(f"{place} holds no text: give --text with UTF-8 files that are not empty")
    return documents


def _hidden(file: Path, top: Path) -> bool:
    """Is `file` hidden, or in a hidden folder (.git and the like) below `top`?"""
    return any(part.startswith(".") for part in file.relative_to(top).parts)


def _library_files(library: Path, max_bytes: int) -> list[Path]:
    """A sample of the library's files, by the checksum of their name: mixed, yet the same every time."""
    files = [file.relative_to(library) for file in library.rglob("*.py")]
    files = [file for file in files if not SKIPPED & set(file.parts)]
    chosen, size = [], 0
    for file in sorted(files, key=lambda file: (zlib.crc32(file.as_posix().encode()), file.as_posix())):
        if size >= max_bytes:
            break
        chosen.append(library / file)
        size += chosen[-1].stat().st_size
    return sorted(chosen)


def _read(file: Path) -> str | None:
    """The text of a file, or None where it is no text."""
    try:
        return file.read_bytes().decode().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents to train on, and held-out ones. A single document is cut near its end."""
    if len(documents) == 1:
        cut = len(documents[0]) * (HELD_OUT_EVERY - 1) // HELD_OUT_EVERY
        return [documents[0][:cut]], [documents[0][cut:]]
    last = len(documents) - 1
    held_out = {last - i for i in range(0, len(documents), HELD_OUT_EVERY)}
    return (
        [text for i, text in enumerate(documents) if i not in held_out],
        [text for i, text in enumerate(documents) if i in held_out],
    )


def train_tokenizer(documents: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be written in it, whatever it was trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def blocks(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq: int) -> np.ndarray:
    """All documents behind one another, each closed by the end token, cut into rows of `seq` ids."""
    ids: list[int] = []
    for encoded in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        ids += encoded if tokenizer.eos_token_id is None else [*encoded, tokenizer.eos_token_id]
    rows = len(ids) // seq
    return np.asarray(ids[: rows * seq], dtype=np.int64).reshape(rows, seq)


def make_tokens(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks for training and for evaluation, whole batches of both (a smaller last batch would compile anew)."""
    train, held_out = (blocks(tokenizer, part, seq) for part in split(documents))
    if len(held_out) < batch:  # few or short files: evaluate on the end of the text
        train, held_out = train[: -batch or None], np.concatenate([train[-batch:], held_out])[:batch]
    if len(train) < batch or len(held_out) < batch:
        have = (len(train) + len(held_out)) * seq
        raise BadInput(
            f"the text is too short: about {have} tokens, and --seq {seq} --batch {batch} needs {2 * batch * seq}: "
            "give more text with --text, or a smaller --seq or --batch"
        )
    return train, held_out[: min(EVAL_BATCHES, len(held_out) // batch) * batch]


def check_ids(ids: np.ndarray, vocab: int) -> None:
    """Refuse token ids (they are the labels too) that the model has no embedding for."""
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab):
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise BadInput(
            f"token id {bad} is out of range, the model's vocabulary is 0 to {vocab - 1}: use the tokenizer that "
            "belongs to the model, or resize the model's embeddings"
        )
