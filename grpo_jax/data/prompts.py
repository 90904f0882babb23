"""Prompts as token ids: text as it is, chat messages through the template; and what follows from a template's turns."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from grpo_jax.data.templates import Rendered, render, special_pattern, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[Mapping[str, str]]  # plain, or chat messages of role and content
TooLong = Literal["refuse", "drop", "cut"]


def chat(prompt: Text, system: str | None = None) -> list[Mapping[str, str]]:
    """A prompt as chat messages: text becomes a user's message; the system's comes first, where there is one.

    Raises:
      ValueError: for a system message beside one that the prompt has.
    """
    roles = [] if isinstance(prompt, str) else [message.get("role") for message in prompt]
    if system is not None and "system" in roles:
        raise ValueError(
            f"the prompt has a system message, so that {system!r} would be a second one: leave it out (--system), or "
            "take it from the prompts"
        )
    messages: list[Mapping[str, str]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Text, **template: Any) -> list[int]:
    """Token ids of a prompt: messages through the chat template, text as it is.

    Plain text is taken as the author of the data wrote it, special tokens included. What the tokenizer adds to a
    text is added, but no beginning-of-sequence token that the text has already, and no end-of-sequence token.

    An assistant's last message is continued; after any other the assistant's turn is opened. Special tokens in a
    message stay text: a user who writes the end-of-turn token does not end the turn.

    Args:
      tokenizer: of the model.
      prompt: a string, or messages of `role` and `content`.
      template: arguments of the chat template, such as `enable_thinking=False` or `date_string="26 Jul 2024"`.

    Raises:
      ValueError: for messages where the tokenizer has no chat template, whose content is not text, or which the
        template refuses.
    """
    if not isinstance(prompt, str):
        return encode_rendered(tokenizer, render(tokenizer, prompt, **template))
    ids = _encode(tokenizer, prompt)
    before, after = _added(tokenizer)
    overlap = next((n for n in range(len(before), 0, -1) if before[-n:] == ids[:n]), 0)
    while after and after[-1] == tokenizer.eos_token_id:
        after = after[:-1]
    return before[: len(before) - overlap] + ids + after


def encode_demonstration(
    tokenizer: "PreTrainedTokenizerBase", prompt: Text, completion: Text, *, end: int, **template: Any
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion, which ends in `end`, once also where its text does already.

    The completion's tokens are those of the whole text, or the whole chat, after the prompt's. Where there are none,
    since a token lies across the border, they are those of the text behind it, as it stands after other text; and where
    the template strips reasoning from the answer, those of the completion's text.

    Args:
      tokenizer: of the model.
      prompt: text or messages, as in `encode_prompt`.
      completion: text, or one message of the assistant.
      end: the token that ends the completion, `turn_end(tokenizer)` for messages.
      template: arguments of the chat template.

    Raises:
      ValueError: as `encode_prompt`; for an empty completion, and one of messages that is not one of the assistant, or
        whose prompt is text.
    """
    ids = encode_prompt(tokenizer, prompt, **template)
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise ValueError(
                "the completion is chat messages, but the prompt is text: make the prompt messages as well"
            )
        if not completion.strip():
            raise ValueError(f"the completion is empty: {completion!r}")
        whole = encode_prompt(tokenizer, prompt + completion)
        follows = whole[: len(ids)] == ids
        written = whole[len(ids) :] if follows else _encode_after_text(tokenizer, completion)
        return ids, [*written, *([] if written[-1:] == [end] else [end])]

    text = completion if isinstance(completion, str) else _only_message(completion)
    if not text.strip():
        raise ValueError(f"the completion is empty: {text!r}")
    opened = render(tokenizer, prompt, **template)
    messages = [*prompt, {"role": "assistant", "content": text}]
    if prompt[-1].get("role") == "assistant":
        messages = [*prompt[:-1], {**prompt[-1], "content": (prompt[-1].get("content") or "") + text}]
    closed = render(tokenizer, messages, **template, add_generation_prompt=False, continue_final_message=False)
    if closed.text.startswith(opened.text) and text.strip() in closed.text[len(opened.text) :]:
        whole = encode_rendered(tokenizer, closed)
        if whole[: len(ids)] == ids:
            rest = whole[len(ids) :]
            return ids, [*(rest[: rest.index(end)] if end in rest else rest), end]
        return ids, [*_up_to(tokenizer, closed, len(opened.text), end, ids[-1]), end]
    tail = prompt_tail(tokenizer, ids)  # a completion that repeats it, as <think>, would have it twice
    for repeated in (tail, tail.strip()):
        if repeated and text.startswith(repeated):
            text = text[len(repeated) :].lstrip()
            break
    return ids, [*encode_after(tokenizer, text, ids[-1]), end]


def _up_to(tokenizer: "PreTrainedTokenizerBase", chat: Rendered, start: int, end: int, last: int) -> list[int]:
    """Token ids of a chat's text from `start` to the token `end`, as it stands after the token `last`."""
    special = special_tokens(tokenizer)
    marks = list(special_pattern(tokenizer).finditer(chat.masked, start))
    stop = next((match.start() for match in marks if special[match[0]] == end), len(chat.text))
    first = marks[0].start() if marks else stop  # that the template has written
    behind = Rendered(chat.text[first:stop], chat.masked[first:stop])
    return encode_after(tokenizer, chat.text[start:first], last) + encode_rendered(tokenizer, behind)


def turn_end(tokenizer: "PreTrainedTokenizerBase", **template: Any) -> int | None:
    """The token that ends an assistant's turn in the chat template, such as `<|im_end|>`.

    A base model's configs often name another one, which ends a text.

    Returns:
      The id of the first special token after the content of a message, or the tokenizer's `eos_token_id` where the
      template has none or the tokenizer no template.
    """
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    content = "\ue000answer\ue001"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
    whole = render(tokenizer, messages, **template, add_generation_prompt=False, continue_final_message=False).text
    match = special_pattern(tokenizer).search(whole.rpartition(content)[2])
    return tokenizer.eos_token_id if match is None else special_tokens(tokenizer)[match[0]]


def prompt_tail(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    r"""What the assistant's turn holds already at the end of a prompt, such as `<think>\n`; "" where it is nothing.

    Templates of reasoning models write the opening tag into the prompt, so that a completion has only the closing
    one; what looks at the layout of an answer looks at this text and the completion together. In a chat it is the
    text after the last special token and the role's name; in plain text, the tags at its end.

    Args:
      tokenizer: of the model.
      ids: of the prompt, as `encode_prompt` makes them.
    """
    special = special_tokens(tokenizer)
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    paired = {i for text, i in special.items() if re.fullmatch(r"</?\w+>", text) and _twin(text) in special}
    turns = {*special.values()} - (paired - named)
    last = next((n for n in range(len(ids) - 1, 0, -1) if ids[n] in turns), 0)  # the first token starts the text
    end = [*ids[last + 1 :]] if last else [*ids[-64:]]
    text = str(tokenizer.decode(end, clean_up_tokenization_spaces=False))
    if last:
        return re.sub(r"^\s*((assistant|model)\s*(\n|$))?\s*", "", text)
    tags = re.search(r"(</?\w+>\s*)*$", text)
    return tags[0] if tags and ids else ""


def limit_prompts(
    prompts: Sequence[list[int]], max_tokens: int, *, too_long: TooLong = "refuse", places: Sequence[str] = ()
) -> list[int]:
    """The indices of the prompts that can be used; prompts longer than `max_tokens` are cut in place if asked.

    Args:
      prompts: token ids.
      max_tokens: the longest prompt that is taken.
      too_long: `refuse` raises, `drop` leaves them out, `cut` keeps their last
        `max_tokens` tokens.
      places: what an error calls them, such as their file and row; by default `row 1` and so on.

    Raises:
      ValueError: for an empty prompt; for one too long, under `refuse`; if none of them is left.
    """
    if too_long not in get_args(TooLong):
        raise ValueError(f"too_long is one of {get_args(TooLong)}, got {too_long!r}")

    def place(i: int) -> str:
        return places[i] if places else f"row {i + 1}"

    kept = []
    for i, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"{place(i)}: the prompt has no tokens; a prompt needs at least 1")
        if len(ids) > max_tokens and too_long == "refuse":
            raise ValueError(
                f"{place(i)}: the prompt has {len(ids)} tokens and the limit is {max_tokens}: raise the limit, "
                "drop such prompts, or cut them on the left"
            )
        if len(ids) > max_tokens and too_long == "cut":
            del ids[:-max_tokens]
        if len(ids) <= max_tokens:
            kept.append(i)
    if prompts and not kept:
        raise ValueError(f"all {len(prompts)} prompts are longer than the limit of {max_tokens} tokens")
    return kept


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, **settings: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **settings)["input_ids"])


def _added(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after the tokens of a text."""
    plain, whole = _encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    start = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def encode_rendered(tokenizer: "PreTrainedTokenizerBase", rendered: Rendered) -> list[int]:
    """Token ids of a chat's text: the template's special tokens are tokens, those of messages are text."""
    if rendered.text == rendered.masked:
        return _encode(tokenizer, rendered.text)
    ids: list[int] = []
    done = 0  # characters that are encoded
    borders = [match.span() for match in special_pattern(tokenizer).finditer(rendered.masked)]
    starts, ends = [0, *(end for _, end in borders)], [*(start for start, _ in borders), len(rendered.text)]
    for start, end in zip(starts, ends, strict=True):  # between two special tokens of the template
        part = rendered.text[start:end]
        if part != rendered.masked[start:end]:
            ids += _encode(tokenizer, rendered.text[done:start])
            encode = _encode_after_special if start else _encode
            ids += _without_special(tokenizer, encode(tokenizer, part, split_special_tokens=True))
            done = end
    return ids + _encode(tokenizer, rendered.text[done:])


def encode_after(tokenizer: "PreTrainedTokenizerBase", text: str, last: int) -> list[int]:
    """Token ids of a text as it stands after the token `last`; special tokens in it stay text."""
    encode = _encode_after_special if last in special_tokens(tokenizer).values() else _encode_after_text
    return _without_special(tokenizer, encode(tokenizer, text, split_special_tokens=True))


def _encode_after_special(tokenizer: "PreTrainedTokenizerBase", text: str, **settings: Any) -> list[int]:
    """Token ids of a text as it stands after a special token, where some tokenizers put a space as at the start."""
    special = next(iter(special_tokens(tokenizer)), None)
    if special and _encode(tokenizer, special + "a")[1:] == _encode(tokenizer, "a"):
        return _encode(tokenizer, text, **settings)
    return _encode_after_text(tokenizer, text, **settings)


def _encode_after_text(tokenizer: "PreTrainedTokenizerBase", text: str, **settings: Any) -> list[int]:
    """Token ids of a text as it stands after another; SentencePiece puts a space before the first word of a text."""
    for other in "\uf8ff\n|" if text else "":  # the first that has no token in common with the text
        encoded = tokenizer(other + text, add_special_tokens=False, return_offsets_mapping=True, **settings)
        offsets = encoded["offset_mapping"]
        start = next((n for n, (_, end) in enumerate(offsets) if end > 1), len(offsets))
        if start < len(offsets) and offsets[start][0] >= 1:
            return list(encoded["input_ids"][start:])
    return _encode(tokenizer, text, **settings)


def _without_special(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    """The ids with special tokens spelled out: Unigram models have them among their pieces and find them in text."""
    texts = {i: text for text, i in special_tokens(tokenizer).items()}
    spelled: list[int] = []
    for i in ids:
        if i not in texts:
            spelled.append(i)
        for character in texts.get(i, ""):
            spelled += _encode_after_text(tokenizer, character)
    return spelled


def _only_message(completion: Sequence[Mapping[str, str]]) -> str:
    told = all(isinstance(message, Mapping) for message in completion)
    if not told or len(completion) != 1 or completion[0].get("role") != "assistant":
        roles = [message.get("role") for message in completion] if told else completion
        raise ValueError(f"a completion is text or one message of the assistant, got messages of {roles}")
    if not isinstance(completion[0].get("content"), str):
        raise ValueError(f"the content of a completion is text, got {completion[0]}")
    return completion[0]["content"]


def _twin(tag: str) -> str:
    return tag.replace("</", "<") if tag.startswith("</") else tag.replace("<", "</")
