"""Tokenizers, and the tokens that end a completion."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from grpo_jax.data import turn_end
from grpo_jax.models.hf.folders import TEXT_FILES, known_folder, local_folder, read_json


def ids_of(eos: int | Sequence[int] | None) -> set[int]:
    """A config's `eos_token_id`, which may be one, several or none, as a set."""
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def load_tokenizer(
    path_or_repo: str | os.PathLike[str], *, revision: str | None = None
) -> transformers.PreTrainedTokenizerBase:
    """Reads a tokenizer; one that needs code of its repository is refused."""
    source = known_folder(path_or_repo, revision) or path_or_repo
    # An id goes through as it is: transformers repairs some tokenizers, such as DeepSeek's, by the repository's name.
    return transformers.AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def eos_ids(
    path_or_repo: str | os.PathLike[str],
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    *,
    chat: bool = False,
    template: Mapping[str, Any] | None = None,
    also: Sequence[int] = (),
    revision: str | None = None,
) -> tuple[int, ...]:
    """The tokens that end a completion: those of generation_config.json, config.json and the tokenizer together.

    Chat models end a turn with a token of their own, which often only one of the
    three names; a sampler that misses it runs to the limit every time. Base models that
    have a chat template, such as Qwen2.5's, name it nowhere else.

    Args:
      path_or_repo: a folder, or the id of a repository on the Hugging Face Hub.
      tokenizer: None reads that of `path_or_repo`, if it has one.
      chat: prompts are chats (`data.has_chats`), so the token that ends a turn in the chat template is one of them.
      template: arguments of the chat template.
      also: more of them.
      revision: a branch, tag or commit of the repository.

    Raises:
      ValueError: if there is none.
    """
    folder = local_folder(path_or_repo, revision, TEXT_FILES)
    if tokenizer is None and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(folder)
    ids = {*also, *ids_of(getattr(tokenizer, "eos_token_id", None))}
    if chat and tokenizer is not None:
        ids |= ids_of(turn_end(tokenizer, **(template or {})))
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids |= ids_of(read_json(folder / name).get("eos_token_id"))
    if not ids:
        raise ValueError(
            f"neither the configs nor the tokenizer of {folder} name an end-of-sequence token: put an eos_token_id "
            "into its generation_config.json, or give one (also=[...]; sft.py --eos TOKEN)"
        )
    return tuple(sorted(ids))


def completion_end(
    path_or_repo: str | os.PathLike[str],
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    chat: bool = False,
    template: Mapping[str, Any] | None = None,
    eos: str | None = None,
    revision: str | None = None,
) -> tuple[int, tuple[int, ...]]:
    """The token that completions of a data set are taught to end with, and all that may end one, of which it is one.

    It is `eos`, else the end of a turn in the chat template for chats, else the tokenizer's end-of-sequence token, or
    the config's where the tokenizer has none.

    Args:
      path_or_repo: as in `eos_ids`.
      tokenizer: of the model.
      chat: prompts are chats (`data.has_chats`).
      template: arguments of the chat template.
      eos: a token, as text.
      revision: a branch, tag or commit of the repository.

    Raises:
      ValueError: if `eos` is no token of the tokenizer; if there is none.
    """
    also = []
    if eos is not None:
        if (end := tokenizer.get_vocab().get(eos)) is None:
            raise ValueError(f"{eos!r} is no token of {path_or_repo}")
        also = [end]
    ids = eos_ids(path_or_repo, tokenizer, chat=chat, template=template, also=also, revision=revision)
    named = turn_end(tokenizer, **(template or {})) if chat else tokenizer.eos_token_id
    ends = [*also, *sorted(ids_of(named)), *ids[::-1]]
    return ends[0], ids
