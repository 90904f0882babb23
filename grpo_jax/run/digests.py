"""Digests of what a run depends on beside its settings, so that a resumed run is known to be the same run.

with run.loop(config, state, digests=of_run(tokenizer, params, prompts=prompts), ...) as loop:
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from grpo_jax import processes


def of_json(value: Any) -> str:
    """Of JSON values, in their order: encoded prompts, rows. Other values count as their text."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


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


def of_run(tokenizer: Any, params: Any, *, prompts: Any, held_out: Any = ()) -> dict[str, str]:
    """Of all inputs of a run, by names that a message can use.

    Args:
      tokenizer: of the model.
      params: its weights.
      prompts: to train on, encoded, in their order; of demonstrations with their completions.
      held_out: to evaluate on.
    """
    return {
        "the data to train on": of_json(prompts),
        "the data to evaluate on": of_json(held_out),
        "the tokenizer or its template": of_tokenizer(tokenizer),
        "the weights of the model": of_arrays(params),
    }


def check(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuses to resume on other inputs.

    Raises:
      ValueError: with the names of all that differ. One that either side does not have is not compared.
    """
    differing = [name for name in current if name in saved and saved[name] != current[name]]
    if differing:
        raise ValueError(
            f"not what the run began with: {', '.join(differing)}. Settings name the same sources, but their content "
            "is another one: put it back, or begin in another run folder"
        )
