"""A folder that takes the place of an earlier one whole, and leaves nothing behind when its process is killed."""

import contextlib
import ctypes
import fcntl
import fnmatch
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from grpo_jax.models.hf.folders import TEXT_FILES, open_shard, short, sync

MARK = {"written_by": "grpo_jax"}  # in the metadata of a shard: what an export may replace
_EXPORTED_FILES = [*TEXT_FILES, "additional_chat_templates", "model*.safetensors", "adapter_model.safetensors"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends; if the block fails, `path` is as it was.

    What killed processes have left beside `path` is deleted first. The new folder is locked meanwhile, so that
    another process does not take it for such.

    Raises:
      FileExistsError: if `path` holds what no export wrote.
    """
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    with _locked(partial):
        try:
            yield partial
            for written in [*partial.rglob("*"), partial]:
                sync(written)
            replaced = partial.with_name(partial.name + ".replaced")
            if not path.exists():
                partial.rename(path)
            elif not _exchange(partial, path):  # a file system without it: for a moment there is none
                path.rename(replaced)
                partial.rename(path)
            sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # the earlier export, or a block's that failed


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders in one step, if the system can (Linux: renameat2)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock, which ends with the process; False where another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _clean(path: Path) -> None:
    """Deletes what killed exports have left beside `path`; an earlier export that is put aside goes back."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}(\.replaced)?")
    for left in sorted(filter(pattern.fullmatch, os.listdir(path.parent)), reverse=True):
        with _locked(path.with_name(left)) as dead:
            if dead and left.endswith(".replaced") and not path.exists():
                path.with_name(left).rename(path)
            elif dead:
                shutil.rmtree(path.with_name(left), ignore_errors=True)


def _check_replaceable(path: Path) -> None:
    """An export may take the place of nothing, of an empty folder or of another export with nothing added."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    marks = []
    if path.is_dir():
        for shard in path.glob("*model*.safetensors"):
            with open_shard(shard) as opened:
                marks.append((opened.metadata() or {}).items() >= MARK.items())
    if not marks or not all(marks):
        raise FileExistsError(f"{path} exists and was not written by an export; choose another path")
    exported = {name for pattern in _EXPORTED_FILES for name in fnmatch.filter(os.listdir(path), pattern)}
    if added := sorted({*os.listdir(path)} - exported):
        raise FileExistsError(f"{path} also holds what no export wrote: {short(added)}; choose another path")
