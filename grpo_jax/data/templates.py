"""Chat messages as the text of a template, in which special tokens that users write stay text."""

import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


_DATED = "{%- macro strftime_now(format) -%}{{ date_string }}{%- endmacro -%}"  # in place of transformers' function


class Rendered(NamedTuple):
    """A chat as its template renders it."""

    text: str
    masked: str  # the same, with a private-use character for each character of a special token that a message contains


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The ids of the special tokens by their text.

    Not `all_special_tokens`, which has only those with a name, as eos_token is; often not the one that starts a turn.
    """
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def special_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches a special token; where one is the beginning of another, the longer."""
    return _special_pattern(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=4)
def _special_pattern(tokenizer: "PreTrainedTokenizerBase", size: int) -> re.Pattern[str]:
    texts = sorted(filter(None, special_tokens(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, **template: Any) -> Rendered:
    """Renders messages: an assistant's last message is left open, anything else opens the assistant's turn.

    So does TRL. A template may trim a message, strip its reasoning, move it or drop an assistant's; it does so with the
    messages as they are. Where their special tokens have come to stand is seen in a second rendering, which has
    private-use characters in their place.

    Args:
      tokenizer: with a chat template.
      messages: of `role` and `content`; an assistant's that calls tools has `tool_calls`, and may have no content.
        Arguments of a call that are the text of a JSON object, as OpenAI has them, are given as an object, unless the
        template takes text.
      template: arguments of the chat template, such as `enable_thinking=False`; None is not given. `date_string` is
        also what the template's `strftime_now` gives, in whatever format it asks for the date.

    Raises:
      ValueError: without a chat template; for a message without a role or whose content is not text; where the template
        refuses the messages, leaves out a call of a tool or what a user or the system says, or does to a special token
        in them what it would not do to other text.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompt is chat messages, but the tokenizer has no chat template: give prompts as text, "
            f"or put a chat_template.jinja beside the tokenizer; the prompt is {_short(messages)}"
        )
    for message in messages:
        if not is_message(message):
            raise ValueError(f"a message has a role and a content, both text; got {_short(message)}")
    continued = bool(messages) and messages[-1].get("role") == "assistant"
    given = {name: value for name, value in template.items() if value is not None}
    template = {"add_generation_prompt": not continued, "continue_final_message": continued} | given
    if "date_string" in given:
        own = tokenizer.get_chat_template(tools=given.get("tools"))
        template = {"chat_template": _DATED + own if "strftime_now" in own else own} | template

    def apply(messages: Messages) -> str:
        try:
            return str(
                tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **template)
            )
        except Exception as error:  # jinja2's, and whatever a template raises
            raise ValueError(f"the chat template refuses {_short(messages)}: {error}") from error

    messages = [{"content": None} | dict(message) if message.get("tool_calls") else message for message in messages]
    read = [_with_read_arguments(message) for message in messages]
    try:
        text, messages = apply(read), read
    except ValueError:
        if read == messages:
            raise
        text = apply(messages)
    said = [message for message in messages if message["role"] in ("user", "system", "developer")]
    if lacking := [message for message in said if not _is_in(message, text)]:
        raise ValueError(
            f"the chat template does not write {_short(lacking[0])}: it has no such role, or takes content in another "
            "form: give what it says in another message, or another chat_template.jinja"
        )
    if lost := [name for message in messages for name in _called(message) if name not in text]:
        raise ValueError(f"the chat template does not write the call of {lost[0]} in {_short(messages)}")
    pattern = special_pattern(tokenizer)
    written = dict.fromkeys(
        (i, match) for i, message in enumerate(messages) for part in _texts(message) for match in pattern.findall(part)
    )
    if not written:
        return Rendered(text, text)
    taken = {*text, *(character for message in messages for part in _texts(message) for character in part)}
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in taken)

    def masked(tokens: Sequence[tuple[int, str]]) -> str | None:
        """The text with these special tokens masked, or None if the template treats a mask otherwise than them."""

        def replace(i: int, part: str) -> str:
            return pattern.sub(lambda m: mark * len(m[0]) if (i, m[0]) in tokens else m[0], part)

        try:
            rendered = apply([_mapped(message, functools.partial(replace, i)) for i, message in enumerate(messages)])
        except ValueError:
            return None
        same = len(rendered) == len(text) and all(a in (b, mark) for a, b in zip(rendered, text, strict=True))
        return rendered if same else None

    if (result := masked([*written])) is None:
        # A template that looks for a token, as for </think>, strips or writes it itself: it is the template's.
        result = masked([token for token in written if masked([token]) is not None])
    if result is None:
        raise ValueError(f"the chat template does not keep apart the special tokens in {_short(messages)}")
    return Rendered(text, result)


ROLES = ("user", "assistant", "system", "developer", "tool", "function", "ipython", "environment", "model")
_READ_AS = {"enable_thinking": ("enable_thinking",), "date_string": ("date_string", "strftime_now")}


def tell_unusual(
    tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Messages], template: Mapping[str, Any], *, of: int
) -> None:
    """Warns of what templates take without a word, and which is seldom meant.

    Arguments that the template does not read, roles that are none, and prompts that end with the assistant's answer.

    Args:
      tokenizer: of the model.
      chats: those of the prompts that are messages.
      template: arguments of the chat template.
      of: how many prompts there are.
    """
    told = []
    text = tokenizer.get_chat_template(tools=template.get("tools")) if chats else ""
    for name in [name for name, value in template.items() if value is not None and name in _READ_AS]:
        if not any(word in text for word in _READ_AS[name]):
            told.append(f"{name} changes nothing: " + ("the chat template does not read it" if chats else "no chats"))
    roles = {str(message.get("role")): None for messages in chats for message in messages}
    if unknown := [role for role in roles if role not in ROLES]:
        told.append(f"messages have the role {', '.join(unknown)}; those that models know are {', '.join(ROLES[:5])}")
    if continued := sum(messages[-1].get("role") == "assistant" for messages in chats):
        told.append(f"{continued} of {of} prompts end with a message of the assistant, which completions go on from")
    for line in told:
        warnings.warn(line, stacklevel=3)


def is_message(message: Any) -> bool:
    """Whether it has a role and a content, both text, or calls of tools in place of the content."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _called(message: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tools that a message calls."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f"a call of a tool has the function's name, got {_short(call)}")
        yield name


def _is_in(message: Mapping[str, Any], text: str) -> bool:
    """Whether a text has something of a message: templates trim, and take marks such as `/no_think` out."""
    lines = [line.strip() for line in message["content"].splitlines() if line.strip()]
    return not lines or any(line in text for line in lines)


def _with_read_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with objects for the arguments of its calls that are the text of one."""

    def read(call: Any) -> Any:
        inner = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(inner, Mapping):
            return {**call, "function": read(inner)}
        try:
            found = json.loads(call["arguments"]) if isinstance(call, Mapping) else None
        except (KeyError, TypeError, ValueError):
            return call
        return {**call, "arguments": found} if isinstance(found, dict) else call

    calls = message.get("tool_calls")
    return message if not calls else {**message, "tool_calls": [read(call) for call in calls]}


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    """All text of a message but its role."""
    waiting = [value for name, value in message.items() if name != "role"]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


def _mapped(message: Mapping[str, Any], function: Callable[[str], str]) -> dict[str, Any]:
    """The message with the function's result for each text but its role."""

    def mapped(value: Any) -> Any:
        if isinstance(value, str):
            return function(value)
        if isinstance(value, Mapping):
            return {name: mapped(inner) for name, inner in value.items()}
        return [mapped(inner) for inner in value] if isinstance(value, list | tuple) else value

    return {name: value if name == "role" else mapped(value) for name, value in message.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-60:]}"
