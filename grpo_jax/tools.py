"""Tools: Python functions that the policy calls in the words of its chat template, as an environment of conversations.

    functions = [weather, calculator, python()]                      # weather: `(city: str) -> str`, your own
    told = {"tools": schemas(functions)}                             # what the template tells the policy of them
    prompts = data.encode_rows(tokenizer, rows, chat=True, template=told)
    respond = environment(functions, call_format(tokenizer))
    between = data.between_turns(tokenizer, role="tool", **told)
    talking = sampling.conversations(sampler, respond, tokenizer, prompts.rows, max_turns=5, between=between)

A tool is any function with type hints and a docstring in Google's style, from which the template's description is made.
"""

import ast
import inspect
import json
import operator
import re
import time
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from decimal import Context, Decimal
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from grpo_jax import data
from grpo_jax.data import Row
from grpo_jax.data.rows import object_of
from grpo_jax.data.templates import render
from grpo_jax.environments import RAISED, Message, Respond, Turn
from grpo_jax.event_loop import run_async
from grpo_jax.rewards.python import ENDED, make_python_output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tool = Callable[..., Any]
IN_A_ROW = 20  # exceptions of a tool, after which it is taken for broken
LATE = "error: this call was not made, since those before it took"


class Call(NamedTuple):
    """A call that the policy wrote; `error` says what is wrong with it."""

    name: str = ""
    arguments: Mapping[str, Any] = {}
    error: str | None = None


Calls = Callable[[str], list[Call]]  # the calls in the text of a turn


def schemas(functions: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as chat templates take them, from type hints and docstrings (`transformers.utils.get_json_schema`).

    Raises:
      ValueError: for a function without hints or without a docstring that tells its arguments; for `*args` and others
        without a name; for two of one name.
    """
    from transformers.utils import get_json_schema

    made = []
    for function in functions:
        try:
            made.append(get_json_schema(function))
        except Exception as error:  # two of transformers' own, which differ by version
            raise ValueError(
                f"the tool {_name(function)} needs a type hint and a line in its docstring's `Args:` for each "
                f"argument, from which the policy learns of it: {error}"
            ) from error
        for argument in inspect.signature(function).parameters.values():
            if argument.kind in (argument.POSITIONAL_ONLY, argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
                raise ValueError(
                    f"the tool {_name(function)} has the argument {argument} without a name, by which calls tell their "
                    "arguments: give it one, or take a list"
                )
    names = [_name(function) for function in functions]
    if len({*names}) < len(names):
        raise ValueError(f"tools have names of their own, got {', '.join(names)}")
    return made


def call_format(tokenizer: "PreTrainedTokenizerBase") -> Calls:
    """The reader of calls as the tokenizer's chat template asks for them.

    Raises:
      ValueError: for a template of another format, or none.
    """
    template, written = tokenizer.chat_template, _written_call(tokenizer)
    marks: dict[str, Calls] = {"<tool_call>": hermes_calls, '"parameters"': llama_calls}
    reader = next((marks[mark] for mark in marks if isinstance(template, str) and mark in template), None)
    if reader is None:
        raise ValueError(
            'the chat template has neither <tool_call> (Qwen, Hermes) nor {"name": ..., "parameters": ...} (Llama 3): '
            "give a reader of your own, `text -> list[Call]`"
        )
    if written is not None and reader(written) != [Call("look_up", {"word": "tea"})]:
        raise ValueError(
            f"the chat template writes a call as {written!r}, and not in the JSON of Hermes or Llama 3: give a reader "
            "of your own, `text -> list[Call]`"
        )
    return reader


def _written_call(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A call as the chat template writes it into the history; None where it writes none."""
    function = {"name": "look_up", "arguments": {"word": "tea"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    asked = {"role": "user", "content": "What is tea?"}
    try:
        text = render(tokenizer, [asked, call], add_generation_prompt=False, continue_final_message=False).text
    except ValueError:
        return None
    found = re.search(r"<tool_call>.*</tool_call>|\{.*\}", text.rpartition(asked["content"])[2], re.DOTALL)
    return None if found is None else found[0]


def hermes_calls(text: str) -> list[Call]:
    """Calls as Qwen 2.5, Qwen 3 and Hermes write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    What stands in `<think>`...`</think>` is no call.
    """
    calls = []
    _, opened, rest = _outside_thoughts(text).partition("<tool_call>")
    while opened:
        call, closed, rest = _closed(rest)
        calls.append(_read(call, "arguments") if closed else Call(error="<tool_call> is not closed"))
        _, opened, rest = rest.partition("<tool_call>")
    return calls


def _closed(text: str) -> tuple[str, bool, str]:
    """What stands in a call that was opened, whether it is closed, and what follows.

    The tags themselves may stand in an argument, such as a program that prints them: they are part of its JSON.
    """
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):
        end = 0
    rest = text[end:].lstrip()
    if end and rest.startswith("</tool_call>"):
        return text[:end], True, rest.removeprefix("</tool_call>")
    call, closed, _ = text.partition("<tool_call>")[0].partition("</tool_call>")
    return call, bool(closed), text[len(call) + len(closed) :]


def _outside_thoughts(text: str) -> str:
    """What follows the last `</think>`, up to a `<think>` after it; what calls have in their arguments is neither."""
    masked = re.sub(r"<tool_call>(?:(?!<tool_call>).)*?</tool_call>", lambda call: " " * len(call[0]), text, flags=re.S)
    start = masked.rfind("</think>") + 1  # the mark's own rest is no call
    end = masked.find("<think>", start)
    return text[start:] if end < 0 else text[start:end]


def llama_calls(text: str) -> list[Call]:
    """A call as Llama 3.1 to 3.3 write it: the turn is `{"name": ..., "parameters": {...}}` and nothing else."""
    text = text.strip().removeprefix("<|python_tag|>").strip()
    return [_read(text, "parameters")] if text.startswith("{") and '"name"' in text else []


def any_calls(text: str) -> list[Call]:
    """Calls in either of these formats, for an environment that knows no tokenizer."""
    return hermes_calls(text) or llama_calls(text)


def _read(text: str, arguments: str) -> Call:
    try:
        call = json.loads(text, object_pairs_hook=object_of, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return Call(error=f"the call is not JSON: {error}")
    named = isinstance(call, dict) and isinstance(call.get("name"), str)
    if not named or (arguments not in call and len(call) > 1):  # such as those of the other format
        return Call(error='a call is {"name": ..., ' + f'"{arguments}": {{...}}}}')
    given = call.get(arguments, {})
    if not isinstance(given, dict):
        return Call(error=f'"{arguments}" of {call["name"]} are an object of names and values')
    return Call(call["name"], given)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is none of its numbers")


def environment(
    functions: Sequence[Tool],
    calls: Calls,
    *,
    score: Callable[[Row, list[Message]], float | None] | None = None,
    longest: int = 4000,
    seconds: float = 45.0,
) -> Respond:
    """Makes the environment that answers the policy's calls; a turn without one ends the conversation.

    A call of no tool, with arguments that it does not take, with a value that is none of its `Literal`s, or on which it
    raises is answered with a message that says so, and the conversation goes on; a tool that has raised 20 times in a
    row is reported as a warning. Several calls in a turn are answered in their order.

    Args:
      functions: tools, plain or async. One with an attribute `continued` is called as `continued(earlier, arguments)`
        instead, with the arguments of its earlier calls in the conversation, and so has a state there.
      calls: `call_format(tokenizer)`, or your own reader.
      score: `(row, messages) -> reward` of the whole conversation, given for its last turn; None for no reward.
      longest: characters of a result; the rest of a longer one is left out.
      seconds: for the calls of a turn; those that would begin later are not made, and answered so, and one that is
        async is ended then. Below the timeout of the conversations: a policy that calls too much is not to have its
        conversation masked.

    Raises:
      ValueError: as `schemas`.
    """
    schemas(functions)
    by_name = {_name(function): function for function in functions}
    raised: dict[str, int] = {}

    def respond(row: Row, messages: list[Message]) -> Turn:
        earlier: list[Call] = []
        present: list[Call] = []
        for message in messages:
            if message["role"] == "assistant":
                earlier, present = [*earlier, *present], calls(message.get("content") or "")
            elif message["content"].startswith(LATE):  # the last calls of a turn are those that are not made
                present = present[:-1]
        if not present:
            return Turn(None, None if score is None else score(row, messages))
        return called(by_name, present, earlier, longest=longest, seconds=seconds, raised=raised)

    return respond


def called(
    by_name: Mapping[str, Tool], calls: Sequence[Call], earlier: Sequence[Call] = (), *, longest: int, seconds: float,
    raised: dict[str, int],
) -> Turn:  # fmt: skip
    """The answers to the calls of one turn, as messages of tools.

    Args:
      by_name: the tools, plain or async.
      calls: in their order.
      earlier: of the conversation, for tools that are `continued`; see `environment`.
      longest: characters of a result.
      seconds: see `environment`.
      raised: by tool, how many calls in a row it has raised on; kept up here.
    """
    began = time.monotonic()

    def answer(call: Call, earlier: Sequence[Call]) -> str:
        if time.monotonic() - began > seconds:
            return f"{LATE} {seconds:g} s"
        if call.error is not None:
            return f"error: {call.error}"
        if (function := by_name.get(call.name)) is None:
            return f"error: there is no tool {call.name!r}, only {', '.join(by_name)}"
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            return f"error: {call.name}: {error}"
        for name, choices in _choices(function).items():
            if (value := call.arguments.get(name, choices[0])) not in choices:
                return f"error: {call.name}: {name} is one of {', '.join(map(repr, choices))}, got {value!r}"
        try:
            if (continued := getattr(function, "continued", None)) is not None:
                result = continued([c.arguments for c in earlier if c.name == call.name], call.arguments)
            else:
                result = function(**call.arguments)
            if inspect.iscoroutine(result):
                result = run_async(result, timeout=max(0.0, seconds - (time.monotonic() - began)))
            text = result if isinstance(result, str) else json.dumps(result, default=str, ensure_ascii=False)
            raised[call.name] = 0
        except RAISED as error:
            reason = str(error) or ("it took too long" if isinstance(error, TimeoutError) else "")
            text = f"error: {type(error).__name__}: {reason}"
            raised[call.name] = raised.get(call.name, 0) + 1
            if raised[call.name] == IN_A_ROW:
                warnings.warn(
                    f"the tool {call.name} has raised {IN_A_ROW} times in a row, which the policy is told and nobody "
                    f"else; the last time\n{traceback.format_exc()}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return text if len(text) <= longest else f"{text[:longest]} ... ({len(text) - longest} characters left out)"

    contents = [answer(call, [*earlier, *calls[:n]]) for n, call in enumerate(calls)]
    return Turn([{"role": "tool", "content": content or "(no output)"} for content in contents])


def _choices(function: Tool) -> dict[str, Sequence[Any]]:
    """The values that arguments may have whose hints name them, as `Literal` and enumerations do."""
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # of a method that no template was told of
        return {}
    found = {name: _values(hint) for name, hint in hints.items() if name != "return"}
    return {name: values for name, values in found.items() if values}


def _values(hint: Any) -> list[Any]:
    """What a type hint names; nothing where it leaves the value open."""
    if hint is type(None):
        return [None]
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    if get_origin(hint) not in (Union, types.UnionType):
        return []
    of_parts = [_values(part) for part in get_args(hint)]
    return [value for values in of_parts for value in values] if all(of_parts) else []


def _name(function: Tool) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


# ---------------------------------------------------------------------------------- three tools


def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression exactly.

    Args:
        expression: numbers, + - * / // % ** and parentheses, such as "(12 + 30) * 7 / 4".
    """
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    if value.denominator == 1:
        return str(value.numerator)
    # Not by a float, which ends at 2**1024.
    rounded = Context(prec=12).divide(Decimal(value.numerator), Decimal(value.denominator)).normalize()
    return str(rounded) if Fraction(rounded) == value else f"{rounded} (rounded; exactly {value})"


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_BITS = 4096  # of a number on the way; larger ones take too long


def _value(node: ast.AST) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = Fraction(str(number))
        case ast.UnaryOp(op=sign, operand=inner) if type(sign) in _OPERATORS:
            value = Fraction(_OPERATORS[type(sign)](_value(inner)))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _value(left), _value(right)
            if power.denominator != 1 or abs(power) > _BITS or abs(power) * _bits(base) > _BITS:
                raise ValueError("a power has a whole exponent that is not too large")
            value = base ** int(power)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            value = Fraction(_OPERATORS[type(sign)](_value(left), _value(right)))
        case _:
            raise ValueError(f"an expression has numbers, + - * / // % ** and parentheses, got {ast.unparse(node)!r}")
    if _bits(value) > _BITS:
        raise ValueError("a number on the way is too large")
    return value


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length() - 1


def search(documents: Sequence[str] | str, *, column: str = "text", results: int = 3, longest: int = 1000) -> Tool:
    """Makes a tool that finds passages of a corpus by their words (BM25, of the extra `search`).

    Words are runs of letters and digits, in lower case.

    Args:
      documents: the passages; or a file of rows, as `data.read_rows` reads it.
      column: of such rows, with the passage.
      results: passages that a search returns at most.
      longest: characters of each; the rest is left out.

    Raises:
      ValueError: for no passages, or numbers below 1.
    """
    from rank_bm25 import BM25Okapi

    texts = [row[column] for row in data.read_rows(documents)] if isinstance(documents, str) else [*documents]
    if not texts or results < 1 or longest < 1:
        raise ValueError(
            f"a search needs passages, results and longest of at least 1, got {len(texts)}, {results} and {longest}"
        )
    words = [_words(text) for text in texts]
    index = BM25Okapi(words)

    def search(query: str) -> str:
        """Finds the passages of a collection that fit a query best.

        Args:
            query: a few words to look for.
        """
        asked = _words(query)
        scores = index.get_scores(asked)
        order = sorted(range(len(texts)), key=lambda i: -scores[i])
        found = [i for i in order if not set(asked).isdisjoint(words[i])][:results]
        return "\n\n".join(f"[{i + 1}] {texts[i][:longest]}" for i in found) or "nothing found"

    return search


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def python(**settings: Any) -> Any:
    """Makes a tool that runs Python in the sandbox of `rewards.python_tests`; names stay from one call to the next.

    The earlier calls of a conversation are run again before the present one, with what they print left out, and
    without those that took too long or printed too much.

    Args:
      settings: of `rewards.python.make_python_output`.

    Raises:
      ValueError: where there is no sandbox; for a setting out of range.
    """
    run = make_python_output(**settings)
    unfinished: set[tuple[str, ...]] = set()  # programs that were ended, each after those before it

    def python(code: str) -> str:
        """Runs Python and returns what it prints. Names that earlier calls defined are known.

        Args:
            code: the program.
        """
        return run(code)

    def continued(earlier: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        before: list[str] = []
        for code in [str(call["code"]) for call in earlier if "code" in call]:
            before += [code] if (*before, code) not in unfinished else []
        code = str(arguments["code"])
        said = run(_AGAIN.format(before=before, code=code) if before else code)
        if said.rpartition("\n")[2].startswith(ENDED):
            unfinished.add((*before, code))
        return said

    tool: Any = python
    tool.continued = continued
    return tool


_AGAIN = """\
import contextlib as _contextlib, io as _io
for _code in {before!r}:
    with _contextlib.redirect_stdout(_io.StringIO()), _contextlib.suppress(BaseException):
        exec(compile(_code, "earlier.py", "exec"), globals())
exec(compile({code!r}, "program.py", "exec"), globals())
"""
