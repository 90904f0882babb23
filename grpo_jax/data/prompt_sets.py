"""From a source of rows to prompts that a run can use: the rows that rewards see beside the tokens of their prompts."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grpo_jax.data.batches import batch_indices, make_prompts
from grpo_jax.data.prompts import Text, TooLong, encode_demonstration, encode_prompt, limit_prompts, prompt_tail
from grpo_jax.data.prompts import chat as to_messages
from grpo_jax.data.rows import Row, field, place_of, read_rows, with_answer
from grpo_jax.data.templates import is_message, tell_unusual
from grpo_jax.types import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptSet(NamedTuple):
    """Prompts in the order of their rows."""

    rows: list[Row]  # as the reward functions see them
    prompts: list[list[int]]  # token ids

    def batch(self, seed: int, step: int, size: int, *, multiple: int = 1) -> Prompts:
        """The prompts of a step, from endless shuffled epochs: a function of its arguments alone.

        Args:
          seed: of the run.
          step: of the run, from 0.
          size: prompts in a step.
          multiple: the width is rounded up to a multiple of it, so that few programs compile.

        Returns:
          Prompts with `info["row"]`, by which `rewards.host` finds their rows.
        """
        indices = batch_indices(seed, step, len(self.prompts), size)
        return make_prompts([self.prompts[i] for i in indices], indices, multiple=multiple)


def read_problems(
    source: str | os.PathLike[str],
    *,
    prompt_column: str = "prompt",
    answer_column: str | None = None,
    answer_after: str | None = None,
    columns: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
) -> list[Row]:
    """Reads rows with a prompt and, where asked for, the reference answer as the column `answer`.

    Args:
      source: a file or a data set, as in `read_rows`.
      prompt_column: where the prompt is, text or chat messages. `outer.inner` names a nested field, here and below.
      answer_column: where the answer is; by default `answer`, if `answer_after` is given. Verifiers that look for gold
        answers in several columns, such as `rewards.accuracy`, then read this one.
      answer_after: the answer is the text after the last of these marks, such as `####` in GSM8K; not empty.
      columns: what else every row must have.
      rename: `{old: new}` names of columns, for reward functions that expect others; the old ones stay, unless they are
        new names, too, as where two columns change places. One that has the new name already is replaced.
      split: of a data set.
      subset: of a data set.

    Raises:
      ValueError: with source and row, for a row without one of these columns, a prompt that is neither text nor
        messages, a blank one, one whose text is a written-out list of messages, prompts of both kinds, an answer that
        is no text or number, an empty one, `nan`, or one without the mark; for two columns that would be renamed to
        one.
    """
    if answer_after == "":
        raise ValueError("--answer-after is the mark before the answer, such as '####', and not empty")
    rename = rename or {}
    answer_column = answer_column or ("answer" if answer_after else None)
    renamed = {new: old for old, new in rename.items()}
    if len(renamed) < len(rename):
        raise ValueError(f"each new name is of one column, got {dict(rename)}")
    wanted = [prompt_column, *columns, *([answer_column] if answer_column else [])]
    wanted = [*dict.fromkeys([*rename, *(renamed.get(name, name) for name in wanted)])]
    rows = read_rows(source, wanted, split=split, subset=subset)
    for number, row in enumerate(rows, start=1):
        where = place_of(row, number)
        row.update({new: field(row, old) for old, new in rename.items()})
        prompt = row[prompt_column] = field(row, prompt_column)
        _check_prompt(prompt, prompt_column, where)
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError(f"{where}: {prompt_column} is empty: {prompt!r}")
        if isinstance(prompt, str) != isinstance(rows[0][prompt_column], str):
            kinds = ["messages", "text"]
            raise ValueError(
                f"{where}: {prompt_column} is {kinds[isinstance(prompt, str)]}, and "
                f"{kinds[not isinstance(prompt, str)]} in the first row; give all prompts in one form"
            )
        if answer_column is not None:
            answer = _answer(field(row, answer_column), answer_column, answer_after, where)
            rows[number - 1] = with_answer(row, answer)
    return rows


def hold_out(rows: Sequence[Row], count: int, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into those to train on and `count` held-out ones, by a permutation of the seed.

    Raises:
      ValueError: if that leaves no row to train on.
    """
    if not 0 <= count < len(rows):
        raise ValueError(f"to hold out {count} rows leaves none of the {len(rows)} rows to train on")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    *,
    prompt_column: str = "prompt",
    chat: bool = False,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    max_prompt_tokens: int | None = None,
    too_long: TooLong = "refuse",
) -> PromptSet:
    """The rows with their prompts as tokens, less those that are too long under `drop`.

    Warns of prompts that end with the assistant's answer, of roles that models do not know, and of arguments that the
    chat template does not read.

    Args:
      tokenizer: of the model.
      rows: with a prompt each; they stay as they are. Of chats a column `tools` of schemas, or of their JSON, is what
        the template is told of tools, unless `template` tells it of others, and one `chat_template_kwargs` are more of
        its arguments (TRL 1.16 reads them in its SFT trainer and not in its GRPO trainer).
      prompt_column: where the prompt is.
      chat: put a prompt that is text through the chat template, as a user's message.
      system: a system message before each prompt, which has none of its own; implies `chat`.
      template: arguments of the chat template, such as `{"enable_thinking": False, "date_string": "26 Jul 2024"}`.
      max_prompt_tokens: the longest prompt that is taken; None for any.
      too_long: what becomes of longer ones, see `limit_prompts`.

    Raises:
      ValueError: with the row's place (`rows.place_of`), for a prompt that cannot be encoded, has no tokens or is too
        long.
    """
    prompts: list[list[int]] = []
    chats: list[Any] = []
    for number, row in enumerate(rows, start=1):
        prompt: Text = field(row, prompt_column)
        _check_prompt(prompt, prompt_column, place_of(row, number))
        try:
            if chat or system is not None:
                prompt = to_messages(prompt, system)
            own = {} if isinstance(prompt, str) else _template_of(row)
            chats += [] if isinstance(prompt, str) else [prompt]
            prompts.append(encode_prompt(tokenizer, prompt, **own | _given(template)))
        except ValueError as error:
            raise ValueError(f"{place_of(row, number)}: {error}") from error
    if rows:
        tell_unusual(tokenizer, chats, template or {}, of=len(rows))
    limit = max(map(len, prompts), default=0) if max_prompt_tokens is None else max_prompt_tokens
    places = [place_of(row, number) for number, row in enumerate(rows, start=1)]
    kept = limit_prompts(prompts, limit, too_long=too_long, places=places)
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept)} of {len(rows)} prompts, longer than {limit} tokens")
    return PromptSet([rows[i] for i in kept], [prompts[i] for i in kept])


def encode_demonstrations(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    *,
    end: int,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    chat: bool = False,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of prompts and of their completions, for supervised learning; see `encode_demonstration`.

    Args:
      tokenizer: of the model.
      rows: with a prompt and a completion each: text, or for the completion a list of one message; `tools` and
        `chat_template_kwargs` as in `encode_rows`.
      end: the token that ends a completion.
      prompt_column: where the prompt is.
      completion_column: where the completion is.
      chat: put a prompt that is text through the chat template, as a user's message.
      system: a system message before each prompt, which has none of its own; implies `chat`.
      template: arguments of the chat template.
      max_prompt_tokens: the longest prompt that is taken; None for any.
      max_tokens: the longest completion that is taken, its end included; None for any.

    Prints a warning if completions do not close the thought that the template opens in their prompts.

    Raises:
      ValueError: with the row's place (`rows.place_of`), for one that cannot be encoded or is too long, or a prompt
        without tokens.
    """
    pairs, unclosed = [], []
    for number, row in enumerate(rows, start=1):
        prompt, completion = field(row, prompt_column), field(row, completion_column)
        where = place_of(row, number)
        _check_prompt(prompt, prompt_column, where)
        try:
            if chat or system is not None:
                prompt = to_messages(prompt, system)
            if not isinstance(completion, str | list):
                raise ValueError(f"{completion_column} is text or a list of one message, got {_short(completion)}")
            if isinstance(completion, str) and _WRITTEN_OUT.match(completion):
                raise ValueError(
                    f"{completion_column} is text that writes out a list of messages: give the list itself; got "
                    f"{_short(completion)}"
                )
            own = {} if isinstance(prompt, str) else _template_of(row)
            pairs.append(encode_demonstration(tokenizer, prompt, completion, end=end, **own | _given(template)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not pairs[-1][0]:
            raise ValueError(f"{where}: the prompt has no tokens; a prompt needs at least 1")
        for name, ids, limit in zip(("prompt", "completion"), pairs[-1], (max_prompt_tokens, max_tokens), strict=True):
            if limit is not None and len(ids) > limit:
                raise ValueError(f"{where}: the {name} has {len(ids)} tokens and the limit is {limit}: raise it")
        opened = None if isinstance(prompt, str) else re.search(r"<(\w+)>\s*$", prompt_tail(tokenizer, pairs[-1][0]))
        if opened and f"</{opened[1]}>" not in tokenizer.decode(pairs[-1][1]):
            unclosed.append((where, opened[1]))
    if unclosed:
        (where, name), count = unclosed[0], len(unclosed)
        print(
            f"warning: {count} of {len(rows)} completions do not close the <{name}> that the chat template opens in "
            f"their prompts, such as {where}: the answer is learned as a part of it. Write </{name}> into them, or see "
            "whether the template knows --no-thinking"
        )
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def _given(template: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (template or {}).items() if value is not None}


def _template_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template that a row has."""
    tools, more = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools is a list of schemas, or the JSON of one: {error}; got {_short(tools)}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is a list of schemas, or the JSON of one; got {_short(tools)}")
    if more is not None and not isinstance(more, dict):
        raise ValueError(f"chat_template_kwargs is an object, got {_short(more)}")
    return (more or {}) | ({"tools": tools} if tools else {})


def has_chats(
    rows: Sequence[Mapping[str, Any]],
    *,
    prompt_column: str = "prompt",
    chat: bool = False,
    system: str | None = None,
) -> bool:
    """Whether `encode_rows` puts prompts through the chat template, whose end of a turn then ends completions."""
    return chat or system is not None or any(not isinstance(field(row, prompt_column), str) for row in rows)


_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")


def _check_prompt(prompt: Any, column: str, where: str) -> None:
    if isinstance(prompt, str):
        if _WRITTEN_OUT.match(prompt):
            raise ValueError(
                f"{where}: {column} is text that writes out a list of chat messages: give the list itself, in JSON or "
                f"Parquet; got {_short(prompt)}"
            )
        return
    if not isinstance(prompt, list | tuple) or not prompt:
        raise ValueError(f"{where}: {column} is text or a list of chat messages, got {_short(prompt)}")
    for message in prompt:
        if not is_message(message):
            raise ValueError(
                f"{where}: a message of {column} has a role and a content, both text; got {_short(message)}"
            )


_MISSING = ("", "nan")  # as tables write it, and as rewards read it (`rewards.answers.gold_text`)


def _answer(answer: Any, column: str, after: str | None, where: str) -> str | int | float:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: {column} is text or a number, got {_short(answer)}")
    if isinstance(answer, str) and answer.strip().casefold() in _MISSING:
        raise ValueError(f"{where}: {column} is {'empty' if not answer.strip() else 'missing'}: {answer!r}")
    if after is None:
        return answer
    if not isinstance(answer, str):
        raise ValueError(f"{where}: {column} is {answer!r}, no text that could hold the mark {after!r}")
    if after not in answer:
        raise ValueError(f"{where}: {column} has no mark {after!r}: {_short(answer)}")
    if (kept := answer.rpartition(after)[2].strip()).casefold() in _MISSING:
        raise ValueError(f"{where}: {column} has nothing after the mark {after!r}: {_short(answer)}")
    return kept


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"
