"""What a chat template writes between the policy's turns, as token ids that continue those that were sampled."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from grpo_jax.data.prompts import encode_after, encode_rendered, turn_end
from grpo_jax.data.templates import render, special_pattern, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED = {"role": "user", "content": "Shall we begin?"}
SAID = "Yes, let us begin."
REASONED = "<think>\nI may as well.\n</think>\n\n" + SAID


class Between(Protocol):
    """Encodes what comes between two turns of the policy."""

    def __call__(self, messages: Sequence[Mapping[str, str]], last: int) -> list[int]:
        """Token ids that follow the policy's turn up to where its next one begins.

        Args:
          messages: of the environment: `role` and `content`.
          last: the token that the policy's turn ended with. Where it is not the template's own end of a turn, as
            after a stop string, that comes first.
        """


def between_turns(
    tokenizer: "PreTrainedTokenizerBase", *, role: str = "user", keep_history: bool = False, **template: Any
) -> Between:
    """Makes the encoder of what an environment says, in the words of a chat template.

    The template is rendered with the messages after a short exchange, and what it writes after the policy's turn is
    taken over, so that nothing that was sampled is encoded again. Special tokens in messages stay text, as in
    `encode_prompt`: a tool that prints the end of a turn does not end one. What else the template marks its parts with,
    such as `</tool_response>`, is written in messages with its first character as an entity, `&lt;/tool_response>`.

    Args:
      tokenizer: with a chat template.
      role: of the messages, to be checked here: `user`, or `tool`. Others are when the first one comes.
      keep_history: True goes on with the tokens as they were sampled where the template would write earlier turns
        anew. The policy then sees what a server that applies the template would not show it.
      template: arguments of the chat template.

    Raises:
      ValueError: if the template does not take such messages, does not end the policy's turn with a special token,
        or writes earlier turns otherwise than they were, as those of reasoning models do that strip what was thought.
    """
    opened = render(tokenizer, [ASKED], **template)
    end = turn_end(tokenizer, **template)
    end_text = next((text for text, i in special_tokens(tokenizer).items() if i == end), None)

    @functools.cache
    def check(role: str) -> None:
        for said in (SAID, REASONED):
            whole = render(tokenizer, _exchange(said, [{"role": role, "content": SAID}]), **template).text
            if whole.startswith(opened.text) and whole[len(opened.text) :].lstrip().startswith(said):
                continue
            what = "strips the reasoning of" if "<think>" in said else "does not keep"
            raise ValueError(
                f"the chat template {what} earlier turns, so that the tokens of a conversation are not those that its "
                f"next turn would be sampled after: {opened.text + said!r} becomes the beginning of {whole!r}. Give "
                "the tokenizer a template that keeps them (tokenizer.chat_template = ...); or keep_history=True, and "
                "the policy goes on after what it wrote"
            )

    marks = _marks(tokenizer)

    def encode(messages: Sequence[Mapping[str, str]], last: int) -> list[int]:
        if not keep_history:
            for role in {message["role"] for message in messages}:
                check(role)
        messages = [{**message, "content": marks.sub(_as_entity, message["content"])} for message in messages]
        rendered = render(tokenizer, _exchange(SAID, messages), **template)
        before, _, after = rendered.text.partition(SAID)
        closing = special_pattern(tokenizer).match(after.lstrip())
        # Where a last turn has an end of its own, as in gpt-oss, the history has that which was sampled.
        if end_text is None or closing is None or (closing[0] != end_text and not keep_history):
            raise ValueError(
                f"the chat template does not end the policy's turn with a special token, which would tell where the "
                f"environment's begins: {rendered.text!r}"
            )
        ids = encode_rendered(tokenizer, rendered)
        # Special tokens of messages are spelled out, so that these are the template's own.
        closes = special_tokens(tokenizer)[closing[0]]
        ends = [place for place, token in enumerate(ids) if token == closes]
        place = ends[rendered.masked[: len(before)].count(closing[0])]
        return ids[place + 1 :] if last in (end, closes) else ids[place:]

    encode([{"role": role, "content": "Go."}], 0)
    return encode


def between_texts(tokenizer: "PreTrainedTokenizerBase") -> Between:
    """The same for prompts that are plain text, which the environment's text follows; special tokens stay text."""

    def encode(messages: Sequence[Mapping[str, str]], last: int) -> list[int]:
        return encode_after(tokenizer, "".join(message["content"] for message in messages), last)

    return encode


def read_between(
    tokenizer: "PreTrainedTokenizerBase", *, roles: Sequence[str] = ("user",), **template: Any
) -> Callable[[str], dict[str, str]]:
    """Makes the reader of what `between_turns` encoded: from the text between two turns to the environment's message.

    What the template writes around it is taken off; between the messages of one answer, as of several calls of tools,
    it stays.

    Args:
      tokenizer: as in `between_turns`.
      roles: that messages may have; the last one is that of a text which begins as none of them does.
      template: as in `between_turns`.
    """
    mark = "\ue000said\ue001"
    around = []
    for role in roles:
        whole = render(tokenizer, _exchange(SAID, [{"role": role, "content": mark}]), **template).text
        rest = whole.partition(SAID)[2]
        # The end of an earlier turn: that of a last one may be another, as in gpt-oss.
        closing = special_pattern(tokenizer).match(rest.lstrip())
        closes = "" if closing is None else closing[0]
        before, _, after = rest.partition(mark)
        around.append((role, before.partition(closes)[2] if closes else before, after))

    def read(text: str) -> dict[str, str]:
        text = text.removeprefix(closes)
        role, opening, after = next((one for one in around if text.startswith(one[1])), around[-1])
        return {"role": role, "content": text.removeprefix(opening).removesuffix(after)}

    return read


def _marks(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches the words of a chat template that mark its parts and are no special tokens, with their counterparts.

    They are the tags and the capitals in brackets in its text, and those of the tokenizer's added tokens that it has:
    in DeepSeek's distilled models even the beginning of a turn is one that is not special.
    """
    templates = tokenizer.chat_template
    source = "".join(templates.values()) if isinstance(templates, dict) else str(templates)
    found = {*re.findall(r"</?[A-Za-z_][\w-]*>|\[/?[A-Z_]+\]", source)}
    added = {str(token) for token in tokenizer.get_added_vocab()}
    found |= {token for token in added if token.strip() and token in source}
    twins = {mark.replace("/", "", 1) if mark[1:2] == "/" else f"{mark[0]}/{mark[1:]}" for mark in found if mark[1:]}
    marks = sorted((found | twins) - special_tokens(tokenizer).keys(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marks)) or "(?!)")


def _as_entity(mark: re.Match[str]) -> str:
    first = mark[0][0]
    return f"{'&lt;' if first == '<' else f'&#{ord(first)};'}{mark[0][1:]}"


def _exchange(said: str, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    return [ASKED, {"role": "assistant", "content": said}, *messages]
