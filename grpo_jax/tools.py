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
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_jax import data
from grpo_jax.environments import Message, Respond, Row, Turn
from grpo_jax.rewards.calling import run_async
from grpo_jax.rewards.python import make_python_output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tool = Callable[..., Any]


class Call(NamedTuple):
    """A call that the policy wrote; `error` says what is wrong with it."""

    name: str = ""
    arguments: Mapping[str, Any] = {}
    error: str | None = None


Calls = Callable[[str], list[Call]]  # the calls in the text of a turn


def schemas(functions: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as chat templates take them, from type hints and docstrings (`transformers.utils.get_json_schema`).

    Raises:
      ValueError: for a function without hints or without a docstring that tells its arguments; for two of one name.
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
    names = [_name(function) for function in functions]
    if len({*names}) < len(names):
        raise ValueError(f"tools have names of their own, got {', '.join(names)}")
    return made


def call_format(tokenizer: "PreTrainedTokenizerBase") -> Calls:
    """The reader of calls as the tokenizer's chat template asks for them.

    Raises:
      ValueError: for a template of another format, or none.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and "<tool_call>" in template:
        return hermes_calls
    if isinstance(template, str) and '"parameters"' in template:
        return llama_calls
    raise ValueError(
        'the chat template has neither <tool_call> (Qwen, Hermes) nor {"name": ..., "parameters": ...} (Llama 3): '
        "give a reader of your own, `text -> list[Call]`"
    )


def hermes_calls(text: str) -> list[Call]:
    """Calls as Qwen 2.5, Qwen 3 and Hermes write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""
    calls = []
    for part in text.split("<tool_call>")[1:]:
        call, closed, _ = part.partition("</tool_call>")
        calls.append(_read(call, "arguments") if closed else Call(error="<tool_call> is not closed"))
    return calls


def llama_calls(text: str) -> list[Call]:
    """A call as Llama 3.1 to 3.3 write it: the turn is `{"name": ..., "parameters": {...}}` and nothing else."""
    text = text.strip().removeprefix("<|python_tag|>").strip()
    return [_read(text, "parameters")] if text.startswith("{") and '"name"' in text else []


def any_calls(text: str) -> list[Call]:
    """Calls in either of these formats, for an environment that knows no tokenizer."""
    return hermes_calls(text) or llama_calls(text)


def _read(text: str, arguments: str) -> Call:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Call(error=f"the call is not JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Call(error='a call is {"name": ..., ' + f'"{arguments}": {{...}}}}')
    given = call.get(arguments, {})
    if not isinstance(given, dict):
        return Call(error=f'"{arguments}" of {call["name"]} are an object of names and values')
    return Call(call["name"], given)


def environment(
    functions: Sequence[Tool],
    calls: Calls,
    *,
    score: Callable[[Row, list[Message]], float | None] | None = None,
    longest: int = 4000,
) -> Respond:
    """Makes the environment that answers the policy's calls; a turn without one ends the conversation.

    A call of no tool, with arguments that it does not take, or on which it raises is answered with a message that says
    so, and the conversation goes on. Several calls in a turn are answered in their order.

    Args:
      functions: tools, plain or async. One with an attribute `continued` is called as `continued(earlier, arguments)`
        instead, with the arguments of its earlier calls in the conversation, and so has a state there.
      calls: `call_format(tokenizer)`, or your own reader.
      score: `(row, messages) -> reward` of the whole conversation, given for its last turn; None for no reward.
      longest: characters of a result; the rest of a longer one is left out.

    Raises:
      ValueError: as `schemas`.
    """
    schemas(functions)
    by_name = {_name(function): function for function in functions}

    def respond(row: Row, messages: list[Message]) -> Turn:
        written = [calls(message.get("content") or "") for message in messages if message["role"] == "assistant"]
        earlier, present = [call for turn in written[:-1] for call in turn], written[-1]
        if not present:
            return Turn(None, None if score is None else score(row, messages))
        return called(by_name, present, earlier, longest=longest)

    return respond


def called(by_name: Mapping[str, Tool], calls: Sequence[Call], earlier: Sequence[Call] = (), *, longest: int) -> Turn:
    """The answers to the calls of one turn, as messages of tools.

    Args:
      by_name: the tools, plain or async.
      calls: in their order.
      earlier: of the conversation, for tools that are `continued`; see `environment`.
      longest: characters of a result.
    """

    def answer(call: Call, earlier: Sequence[Call]) -> str:
        if call.error is not None:
            return f"error: {call.error}"
        if (function := by_name.get(call.name)) is None:
            return f"error: there is no tool {call.name!r}, only {', '.join(by_name)}"
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            return f"error: {call.name}: {error}"
        try:
            if (continued := getattr(function, "continued", None)) is not None:
                result = continued([c.arguments for c in earlier if c.name == call.name], call.arguments)
            else:
                result = function(**call.arguments)
            result = run_async(result) if inspect.iscoroutine(result) else result
            text = result if isinstance(result, str) else json.dumps(result, default=str)
        except Exception as error:
            text = f"error: {type(error).__name__}: {error}"
        return text if len(text) <= longest else f"{text[:longest]} ... ({len(text) - longest} characters left out)"

    contents = [answer(call, [*earlier, *calls[:n]]) for n, call in enumerate(calls)]
    return Turn([{"role": "tool", "content": content or "(no output)"} for content in contents])


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
    decimal = f"{float(value):.12g}"
    return decimal if Fraction(decimal) == value else f"{decimal} (rounded; exactly {value})"


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

    The earlier calls of a conversation are run again before the present one, with what they print left out.

    Args:
      settings: of `rewards.python.make_python_output`.

    Raises:
      ValueError: where there is no sandbox; for a setting out of range.
    """
    run = make_python_output(**settings)

    def python(code: str) -> str:
        """Runs Python and returns what it prints. Names that earlier calls defined are known.

        Args:
            code: the program.
        """
        return run(code)

    def continued(earlier: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        before = [str(call["code"]) for call in earlier if "code" in call]
        return run(_AGAIN.format(before=before, code=str(arguments["code"])) if before else str(arguments["code"]))

    tool: Any = python
    tool.continued = continued
    return tool


_AGAIN = """\
import contextlib as _contextlib, io as _io
for _code in {before!r}:
    with _contextlib.redirect_stdout(_io.StringIO()), _contextlib.suppress(Exception, SystemExit):
        exec(compile(_code, "earlier.py", "exec"), globals())
exec(compile({code!r}, "program.py", "exec"), globals())
"""
