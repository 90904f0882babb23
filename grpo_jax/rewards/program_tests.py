"""Tests of programs, what they read and what they print, in the forms that public data sets have."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

FORMS = (
    "tests are Python as a string or a list of strings, or a list of pairs (stdin, stdout), a list of "
    '{"input": ..., "output": ...}, or {"inputs": [...], "outputs": [...]}'
)
_NAMES = (("input", "output"), ("inputs", "outputs"))
_KINDS = ("type", "testtype")
_FUNCTIONS = ("fn_name", "func_name")


def parsed(tests: Any) -> Any:
    """Tests out of a string of JSON, which APPS, TACO and LiveCodeBench have, and out of an array; others as they are.

    No Python that tests code is JSON of a list or a dictionary: it would call nothing.
    """
    if isinstance(tests, str) and tests.lstrip().startswith(("{", "[")):
        try:
            return json.loads(tests)
        except (ValueError, RecursionError):
            return tests
    return tests.tolist() if hasattr(tests, "tolist") else tests


def pairs_of(tests: Any) -> list[tuple[str, str]]:
    """The pairs `(stdin, stdout)` of a row's tests.

        [("1 2", "3"), ["0 0", "0"]]                                 pairs, lists or tuples of two
        [{"input": "1 2", "output": "3", "type": "stdin_stdout"}]    DeepCoder, LiveCodeBench (`testtype`)
        {"inputs": ["1 2"], "outputs": ["3"]}                        APPS, TACO
        {"input": ["1 2"], "output": ["3"]}                          CodeContests

    A text is one, or a list of its lines (TACO); a number is its text.

    Raises:
      ValueError: for anything else, no tests, and tests that call a function (`fn_name`, `type`): data sets do not
        agree on how its arguments are written, so that they are for the user to write as Python.
    """
    if isinstance(tests, Mapping):
        given, wanted = _sides(tests)
        if not (_listed(given) and _listed(wanted) and len(given) == len(wanted)):
            raise ValueError(f"{FORMS}; inputs and outputs are lists of one length, got {tests!r:.200}")
        pairs = list(zip(given, wanted, strict=True))
    else:
        pairs = [_pair(test, tests) for test in tests] if _listed(tests) else []
    if not pairs:
        raise ValueError(f"{FORMS}, got {tests!r:.200}")
    return [(_text(given), _text(wanted)) for given, wanted in pairs]


def _listed(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _pair(test: Any, tests: Any) -> tuple[Any, Any]:
    if isinstance(test, Mapping):
        return _sides(test)
    if not _listed(test) or len(test) != 2:
        raise ValueError(f"{FORMS}, got {tests!r:.200}")
    return test[0], test[1]


def _sides(test: Mapping[str, Any]) -> tuple[Any, Any]:
    """What is read and what is printed, of a mapping in which everything is understood."""
    present = {name: value for name, value in test.items() if value not in (None, "") or name in sum(_NAMES, ())}
    metadata = present.pop("metadata", {})
    present |= {name: metadata[name] for name in _FUNCTIONS if isinstance(metadata, Mapping) and metadata.get(name)}
    calls = any(present.pop(name, None) for name in _FUNCTIONS)
    kinds = {present.pop(name) for name in _KINDS if name in present}
    if calls or kinds - {"stdin_stdout", "stdin"}:
        raise ValueError(f"tests that call a function are written as Python, `assert f(1) == 2`, got {test!r:.200}")
    for given, wanted in _NAMES:
        if present.keys() == {given, wanted}:
            return present[given], present[wanted]
    raise ValueError(f"{FORMS}, got {test!r:.200}")


def _text(side: Any) -> str:
    if _listed(side) and all(isinstance(line, str) for line in side):
        return "\n".join(side)
    if (isinstance(side, Sequence | Mapping) and not isinstance(side, str)) or side is None:
        raise ValueError(f"what a program reads and prints is text, or a list of its lines, got {side!r:.200}")
    return str(side)
