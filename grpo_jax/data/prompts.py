"""Prompts as token ids: text as it is, chat messages through the template."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[Mapping[str, str]]  # plain, or chat messages of role and content
TooLong = Literal["refuse", "drop", "cut"]


def chat(prompt: Text, system: str | None = None) -> list[Mapping[str, str]]:
    """A prompt as chat messages: text becomes a user's message; the system's comes first, where there is one."""
    messages: list[Mapping[str, str]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Text, **template: Any) -> list[int]:
    """Token ids of a prompt: messages through the chat template, text as it is.

    Special tokens in the content of a message stay text: a user who writes the
    end-of-turn token does not end the turn. Plain text is taken as the author of the
    data wrote it, special tokens included.

    Args:
      tokenizer: of the model.
      prompt: a string, or messages of `role` and `content`.
      template: arguments of the chat template, such as `enable_thinking=False`.

    Raises:
      ValueError: for messages where the tokenizer has no chat template, or whose
        content is not a string.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompt is chat messages, but the tokenizer has no chat template: give prompts as text, "
            f"or put a chat_template.jinja beside the tokenizer; the prompt is {prompt!r}"
        )
    # Not all_special_tokens, which has only those that are named, as eos_token is; often not what starts a turn.
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    messages, inert = [dict(message) for message in prompt], {}
    for i, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            raise ValueError(f"the content of a message is text, got {message}")
        if any(token in message["content"] for token in [*special, "\ue000"]):
            placeholder = f"\ue000{i}\ue001"  # of the private-use area
            inert[placeholder], message["content"] = message["content"], placeholder
    template = {"add_generation_prompt": True} | template
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, **template)
    ids: list[int] = []
    for part in re.split("(\ue000[0-9]+\ue001)", text):  # in any order: a template may move or drop a message
        content = inert.get(part)
        if content is None:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
        else:
            ids += tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def limit_prompts(prompts: Sequence[list[int]], max_tokens: int, *, too_long: TooLong = "refuse") -> list[int]:
    """The indices of the prompts that can be used; prompts longer than `max_tokens` are cut in place if asked.

    Args:
      prompts: token ids.
      max_tokens: the longest prompt that is taken.
      too_long: `refuse` raises, `drop` leaves them out, `cut` keeps their last
        `max_tokens` tokens.

    Raises:
      ValueError: for an empty prompt; for one too long, under `refuse`; if none is left.
    """
    if too_long not in get_args(TooLong):
        raise ValueError(f"too_long is one of {get_args(TooLong)}, got {too_long!r}")
    kept = []
    for i, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {i} has no tokens; a prompt needs at least 1")
        if len(ids) > max_tokens and too_long == "refuse":
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and the limit is {max_tokens}: raise the limit, "
                "drop such prompts, or cut them on the left"
            )
        if len(ids) > max_tokens and too_long == "cut":
            del ids[:-max_tokens]
        if len(ids) <= max_tokens:
            kept.append(i)
    if not kept:
        raise ValueError(f"all {len(prompts)} prompts are longer than the limit of {max_tokens} tokens")
    return kept
