"""The process that a `WorkerPool` runs: reads requests from standard input, answers each with a line of JSON.

It is started by its path, in an interpreter of its own, and imports the standard library alone, so that it is ready
in a few hundredths of a second. The function to call is loaded from its file under another name: its packages are not
imported, unless the file does so itself.
"""

import functools
import importlib.util
import inspect
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

MESSAGE = 4000  # characters of an error that are sent


def load(file: str, function: str) -> Callable[..., Any]:
    """The function of that name in that file."""
    spec = importlib.util.spec_from_file_location("grpo_jax_pool_target", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look their module up
    spec.loader.exec_module(module)
    target: Callable[..., Any] = getattr(module, function)
    return target


def called(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What the function returns, plain or awaited."""
    value = function(**arguments)
    return runner().run(value) if inspect.iscoroutine(value) else value


@functools.cache
def runner() -> Any:
    """One event loop for all items: a client that a function keeps belongs to the loop of the first."""
    import asyncio

    return asyncio.Runner()


def answer(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The function's result for one item: `{"value": ...}` or `{"fault": ..., "message": ...}`."""
    try:
        value = called(function, arguments)
    except (RecursionError, MemoryError, OverflowError) as error:
        return {"fault": "exhausted", "message": type(error).__name__}
    except BaseException:
        return {"fault": "error", "message": traceback.format_exc()[-MESSAGE:]}
    try:
        if isinstance(value, str | bytes):  # Python would make numbers of them
            raise TypeError
        return {"value": None if value is None else float(value)}
    except (TypeError, ValueError, OverflowError):
        kind = type(value).__name__
        return {"fault": "error", "message": f"the function returned a {kind}, and not a finite number or None"}


def answer_json(function: Callable[..., Any], arguments: dict[str, Any], returned: list[str]) -> dict[str, Any]:
    """The function's result as it is, plain or awaited, with the arguments that it may have changed."""
    try:
        value = called(function, arguments)
        result = [value, {name: arguments[name] for name in returned}]
        return {"value": None, "returned": json.loads(json.dumps(result, default=listed))}
    except (RecursionError, MemoryError, OverflowError) as error:
        return {"fault": "exhausted", "message": type(error).__name__}
    except BaseException:
        return {"fault": "error", "message": traceback.format_exc()[-MESSAGE:]}


def listed(value: Any) -> Any:
    """An array, or a number of NumPy, as JSON can hold it."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return value.tolist()


def limit(what: int, value: int) -> None:
    """Sets a limit of this process for good, or leaves one that is stricter."""
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def main() -> None:
    """Takes `{"load": [file, function], ...}` and then items, until standard input ends."""
    # The channel is kept apart from what verifiers print and read, and from programs that they start.
    requests, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    function: Callable[..., Any] | None = None
    for line in requests:
        request = json.loads(line)
        reply: dict[str, Any] = {"value": None}
        if "load" in request:
            sys.path.extend(path for path in request["paths"] if path not in sys.path)
            limit(resource.RLIMIT_CORE, 0)
            limit(resource.RLIMIT_AS, request["memory"])
            try:
                function = load(*request["load"])
            except BaseException:
                reply = {"fault": "error", "message": traceback.format_exc()[-MESSAGE:]}
            os.dup2(null, 2)
        else:
            assert function is not None
            # The pool's own clock is the limit. This one ends a worker whose pool is no more, also within C code.
            signal.setitimer(signal.ITIMER_REAL, 2 * request["timeout"] + 5)
            if "returned" in request:
                reply = answer_json(function, request["arguments"], request["returned"])
            else:
                reply = answer(function, request["arguments"])
            signal.setitimer(signal.ITIMER_REAL, 0)
        results.write(json.dumps({"id": request["id"], **reply}).encode() + b"\n")
        results.flush()
        if reply.get("fault") == "exhausted":
            return  # its state is unknown; the pool starts another


if __name__ == "__main__":
    main()
