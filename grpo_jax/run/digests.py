"""Digests of what a run depends on beside its settings, so that a resumed run is known to be the same run.

```python
with run.loop(config, state, digests=of_run(tokenizer, params, prompts=prompts), ...) as loop:
```
"""

import functools
import hashlib
import json
import os
import pathlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from grpo_jax import processes

CODE = "the code of "  # begins the names of digests of which a change is told and not refused


def of_json(value: Any) -> str:
    """Of JSON values, in their order: encoded prompts, rows. Other values count as their text."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def of_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Of all columns of rows, in the order of the rows, whatever the order of the columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(_plain(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """The value as JSON that is the same in every process: an address in memory is none of it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(inner), sort_keys=True) for inner in value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__name__} {value!r}")


def of_arrays(tree: Any) -> str:
    """Of the names, shapes, dtypes and bytes of a tree's arrays, wherever they lie; the host holds one at a time."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        for block in processes.blocks(leaf):
            digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return digest.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """Of a tokenizer's vocabulary, rules and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return of_json([rules, tokenizer.chat_template, str(tokenizer.special_tokens_map)])


def of_run(
    tokenizer: Any,
    params: Any = None,
    *,
    prompts: Any,
    held_out: Any = (),
    rows: Sequence[Mapping[str, Any]] | None = None,
    held_out_rows: Sequence[Mapping[str, Any]] = (),
    eos_ids: Sequence[int] | None = None,
    code: Sequence[Callable[..., Any] | ModuleType] = (),
) -> dict[str, str]:
    """Of all inputs of a run, by names that a message can use.

    Args:
      tokenizer: of the model.
      params: its weights; None where each stage of a run has its own.
      prompts: to train on, encoded, in their order; of demonstrations with their completions.
      held_out: to evaluate on.
      rows: of the prompts, with all that rewards see; None where nothing but the prompts is learned from.
      held_out_rows: those to evaluate on.
      eos_ids: the tokens that end a completion.
      code: functions of the user's, such as rewards, and modules, of whose files, and of those that they have imported
        from the same folder, a change is told; this package's are left out.
    """
    found = {
        "the data to train on": of_json(prompts),
        "the data to evaluate on": of_json(held_out),
        "the tokenizer or its template": of_tokenizer(tokenizer),
    }
    if params is not None:
        found["the weights of the model"] = of_arrays(params)
    if rows is not None:
        found["the answers and other columns of the data to train on"] = of_rows(rows)
        found["the answers and other columns of the data to evaluate on"] = of_rows(held_out_rows)
    if eos_ids is not None:
        found["the tokens that end a completion"] = of_json([*map(int, eos_ids)])
    return found | of_code(code)


def of_code(code: Iterable[Callable[..., Any] | ModuleType]) -> dict[str, str]:
    """Of the files of modules and of functions, by names that begin with `CODE`; none of this package.

    With those of the modules that are imported and lie in the same folder, or below it, but for installed ones: a
    reward's helpers are as much its code.
    """
    modules = [f if isinstance(f, ModuleType) else sys.modules.get(getattr(f, "__module__", "")) for f in code]
    named = {file for file in map(_file_of, modules) if file is not None}
    places = {file: file.name for file in named}
    folders = {file.parent for file in named if not _is_installed(file.parent)}
    below = tuple(os.path.join(folder, "") for folder in folders)
    for file in filter(None, map(_file_of, [*sys.modules.values()] if folders else [])):
        if str(file).startswith(below) and not _is_installed(file.parent):
            folder = max(folders & {*file.parents}, key=lambda folder: len(folder.parts))
            places.setdefault(file, file.relative_to(folder).as_posix())
    found: dict[str, Any] = {}
    for file, place in sorted(places.items()):
        found.setdefault(f"{CODE}{place}", hashlib.sha256()).update(file.read_bytes())  # two may have one name
    return {name: digest.hexdigest() for name, digest in found.items()}


def _file_of(module: ModuleType | None) -> pathlib.Path | None:
    """The file of a module; None for this package's, and where there is none."""
    folder, name = os.path.split(getattr(module, "__file__", None) or "")
    if not name or (place := _folder(os.path.abspath(folder))) is None:
        return None
    return place / name if (place / name).is_file() else None


@functools.cache  # some two thousand modules lie in some three hundred folders
def _folder(path: str) -> pathlib.Path | None:
    """A folder without its links; None for this package's."""
    folder, own = pathlib.Path(path).resolve(), pathlib.Path(__file__).resolve().parents[1]
    return None if folder.is_relative_to(own) else folder


@functools.cache
def _is_installed(folder: pathlib.Path) -> bool:
    """Whether a folder is of Python's own or of an installed package's files."""
    return bool({"site-packages", "dist-packages", "lib-dynload"} & {*folder.parts}) or folder.is_relative_to(
        pathlib.Path(sysconfig.get_path("stdlib")).resolve()
    )


def changed_code(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """The names of files of code that are not what they were: a run may go on with a mended reward, but not unknown."""
    return [name for name in current if name.startswith(CODE) and name in saved and saved[name] != current[name]]


def check(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuses to resume on other inputs.

    Raises:
      ValueError: with the names of all that differ, but for code (`changed_code`). One that either side does not have
        is not compared.
    """
    differing = [name for name in current if name in saved and saved[name] != current[name]]
    differing = [name for name in differing if not name.startswith(CODE)]
    if differing:
        # The same rows and the same template, and other tokens: the template writes what is not in them.
        only_tokens = {"the data to train on", "the data to evaluate on"} >= {*differing}
        dated = " (or the chat template writes today's date: name the day with --date-string)" if only_tokens else ""
        raise ValueError(
            f"not what the run began with: {', '.join(differing)}. Settings name the same sources, but their content "
            f"is another one{dated}: put it back, or begin in another run folder"
        )
