"""A folder that is replaced whole or not at all.

What is new is written into a folder beside, then the two change places in one call of the kernel (Linux: renameat2 with
RENAME_EXCHANGE), or by two renames where there is none. Whoever kills the process leaves the old files, or the new ones, whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

# Of an earlier save: they go with it. Other files of the folder stay.
ADAPTERS = ("adapter_config.json", "adapter_model*")
WHOLE = ("config.json", "generation_config.json", "model*.safetensors*", "pytorch_model*.bin*")
WEIGHTS = (*ADAPTERS, *WHOLE)  # transformers would put adapters that lie beside a merged model onto it
OLD = "-old"  # how the name of an old folder ends while it is aside
SPARE = 64 << 20  # bytes, for tokenizers and configurations


@contextmanager
def replaced(folder: Path, size: int, drops: tuple[str, ...] = WEIGHTS) -> Iterator[Path]:
    """Fill a folder beside `folder`, which takes its place at the end; on any error `folder` is as it was.

    size: bytes that will be written. drops: which of the old files are not taken along. Raises OSError (ENOSPC) where the disk
    has less room, before anything is written, NotADirectoryError for a path that is a file.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a model is saved to a folder, and this is a file", str(folder))
    parents = [p for p in folder.parents if not p.exists()]
    check_space(folder, size)
    beside = folder if folder.is_mount() else folder.parent  # files change places within one disk
    beside.mkdir(parents=True, exist_ok=True)
    _sweep(folder, beside)
    staging = Path(tempfile.mkdtemp(prefix=_prefix(folder, os.getpid()), dir=beside))
    try:
        yield staging
        staging.chmod(folder.stat().st_mode if folder.exists() else 0o777 & ~_umask())
        if _must_stay(folder):
            _move_in(staging, folder, drops)
        else:
            _take_along(folder, staging, drops)
            _exchange(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(staging, ignore_errors=True)


def check_space(folder: Path, size: int) -> None:
    """Raises OSError (ENOSPC) that says how much is missing, and that nothing was touched."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE:
        told = (
            f"{(size + SPARE) / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; nothing was written or overwritten."
            " An earlier save stays until the new one is whole. Free some space, or save to another disk"
        )
        raise OSError(errno.ENOSPC, told, str(folder))


def _prefix(folder: Path, process: int) -> str:
    return f".{folder.name}.saving-{process}-"


def _sweep(folder: Path, beside: Path) -> None:
    """Remove what a save left that was killed; the old folder, if it was killed between two renames, comes back."""
    beginning = f".{folder.name}.saving-"
    for left in sorted(beside.iterdir()):
        process = left.name.removeprefix(beginning).partition("-")[0] if left.name.startswith(beginning) else ""
        if not process.isdigit() or int(process) == os.getpid() or _runs(int(process)):
            continue
        if left.name.endswith(OLD) and not folder.exists():
            os.rename(left, folder)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _must_stay(folder: Path) -> bool:
    """A folder that a process works in, or that a disk is mounted at, cannot change places."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed under the process
        return folder.is_mount()
    return folder.exists() and (folder.is_mount() or here.is_relative_to(folder))


def _kept(folder: Path, drops: tuple[str, ...]) -> list[Path]:
    return [p for p in folder.iterdir() if p.is_dir() or not any(fnmatch(p.name, pattern) for pattern in drops)]


def _take_along(folder: Path, staging: Path, drops: tuple[str, ...]) -> None:
    """Other files of the old folder, as hard links where the disk has them."""
    for old in _kept(folder, drops) if folder.exists() else ():
        new = staging / old.name
        if new.exists():
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.copytree(old, new, symlinks=True, copy_function=_link)
        else:
            _link(str(old), str(new))


def _link(old: str, new: str) -> str:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)
    return new


def _move_in(staging: Path, folder: Path, drops: tuple[str, ...]) -> None:
    """File by file; not in one go, but each whole, and none is deleted before all new ones are there."""
    new = {p.name for p in staging.iterdir()}
    old = [p for p in folder.iterdir() if p not in _kept(folder, drops) and p.name not in new]
    for file in sorted(staging.iterdir()):
        os.replace(file, folder / file.name)
    for file in old:
        file.unlink()


def _exchange(staging: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(staging, folder)
    elif not _exchanged_at_once(staging, folder):
        aside = staging.with_name(staging.name + OLD)
        try:
            os.rename(folder, aside)
            os.rename(staging, folder)
        except BaseException:
            if not folder.exists():
                os.rename(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchanged_at_once(one: Path, other: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
