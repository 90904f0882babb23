"""JSON files that are there whole or not at all, and work of which each part is found again in its file."""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from grpo_jax.run import preemption

Part = TypeVar("Part")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file whole or not at all."""
    path = pathlib.Path(path)
    half = path.with_suffix(".half")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)


def is_writable(path: str | os.PathLike[str], *, folder: bool = False) -> bool:
    """Whether a file, or files in a folder, may be written, which need not be there yet: to be asked before long work.

    Args:
      path: of the file, or of the folder.
      folder: True for a folder.
    """
    path = pathlib.Path(path).absolute()
    above = next(place for place in ((path, *path.parents) if folder else path.parents) if place.exists())
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK) and (folder or not path.is_dir())


def made_once(folder: str | os.PathLike[str], parts: Sequence[Part], make: Callable[[int, Part], Any]) -> list[Any]:
    """`make(number, part)` of each part, as JSON: read from `folder/00000.json` and on, or made and written there.

    A run that was killed goes on with the first part that has no file. At a request to stop it ends between two parts,
    with the exit status of `preemption`.

    Args:
      folder: of these parts alone; it is made.
      parts: in an order that is always the same.
      make: `(number, part) -> ` JSON values.
    """
    folder, found = pathlib.Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    with preemption.graceful_stop() as stop_requested:
        for number, part in enumerate(parts):
            path = folder / f"{number:05d}.json"
            if not path.exists():
                if stop_requested():
                    print(f"stopped after {number} parts of {folder}; the same command goes on")
                    raise SystemExit(preemption.STOPPED)
                write_json(path, make(number, part))
            found.append(json.loads(path.read_text()))
    return found
