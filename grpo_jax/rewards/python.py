"""Code that a model wrote, run against unit tests, where it can do no harm."""

import ast
import contextlib
import fcntl
import functools
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from grpo_jax.rewards import harness
from grpo_jax.rewards.calling import reading
from grpo_jax.rewards.completions import after_thoughts, text_of
from grpo_jax.rewards.formats import marks_of, opened_by
from grpo_jax.rewards.outcomes import Outcome, to_rewards
from grpo_jax.rewards.pool import START_TIMEOUT
from grpo_jax.rewards.program_tests import pairs_of, parsed
from grpo_jax.rewards.sandbox import bubblewrap
from grpo_jax.rewards.worker_process import environment, kill_group

HARNESS = Path(__file__).with_name("harness.py")
THOUGHTS = marks_of(["think"])
CODE_LIMIT = 1 << 16  # characters; longer code is wrong
ENDED = ("error: it took longer than", "error: it printed more than")  # how what is said of a program ended early ends


def python_tests(
    *,
    share: bool = False,
    timeout: float = 10.0,
    memory: int = 512 * 2**20,
    output: int = 2**20,
    workers: int = 2,
    executor: Callable[[str, Any], Sequence[bool]] | None = None,
    accept_unsandboxed_execution: bool = False,
) -> Callable[..., list[float | None]]:
    """1 where the completion's code passes all of the row's tests, else 0; or the share that it passes.

    The code is the completion's last block of Markdown marked `python` or `py` (also `python3`,
    attributes, `~~~`, in a list, quoted) that defines a name which tests in Python take from it, so that a block that
    shows its use may follow; or else its last such block; or else its last block without a mark; or else, where it
    opens no block, all of it. Of a completion that thinks, only what follows the last `</think>` is read, and nothing
    where a `<think>`, its own or the prompt's, is not closed. It has the standard library. The column `tests` holds
    either

    - Python, as a string or a list of strings that are run one after the other. Every
      `assert`, every call, every compound statement with an assert in it, and every function `test...`, plain or async,
      at the top level is a test, and so is every test method of a `unittest.TestCase` or of a class `Test...` as pytest
      has them (`unittest.main()` itself is none): passed if nothing is raised. What else there is prepares them, and
      is a test that fails where the code makes it fail. Asserts behind `if __name__ == "__main__"` are run. Names that
      it does not define are the code's (`assert add(1, 2) == 3`), or imported (`from solution import add`, or `*`).
    - Or pairs of what a program reads and what it prints, `[(stdin, stdout), ...]`, or as APPS, TACO, CodeContests and
      DeepCoder write them (`program_tests.pairs_of`), as a string of JSON too: for each the code is run as a program,
      which has to end with status 0, and what it prints must be that, but for spaces at the ends of lines and empty
      lines at the end.

    Code and tests never share a process. Programs' output is compared here. Tests in
    Python run in a sandbox of their own, and call the code's functions through a pipe that
    carries plain data. So there is no result that the code could write, no checker that it
    could patch, no expected value that it could read, and ending the process early passes
    nothing. The price: what tests pass to the code is plain data (numbers, `Fraction` and `Decimal`, text, bytes, dates
    and times, lists, tuples, sets, dictionaries and their views, ranges, deques) and copied, so that changes of an
    argument in place are not seen. What the code returns is plain data too, or an object which the code is asked
    about: it can be called, iterated over, indexed, changed, printed, awaited, entered by `with`, asked for attributes
    and by `isinstance` for a class of the code's, and compared and computed with other objects of the code. With plain
    data it is not: it equals none, has no order, and nothing is added to it, or an object could agree with whatever it
    is compared with; so code whose objects are tested by `Vector(1, 2) * 3` gets 0. `in` goes through its items. An
    exception arrives as its class, with the builtin class that it derives from. A result of more than 1 MiB is
    refused: its test fails, and a warning says why.

    The sandbox is bubblewrap's (`sandbox.bubblewrap`): no network, a read-only system, no
    environment, no `/proc`, a `/tmp` of 32 MiB. Of the kernel a process gets `memory` bytes of
    addresses, files of `output` bytes, 64 open files, and no further processes
    (`harness.seccomp_filter`, on x86_64 and aarch64). Not prevented: code that knows a test's input by heart and
    computes nothing, threads (within `memory`), use of a processor for `timeout`, and holes in the kernel.

    Scores 0: failed tests, no code, code of more than 65536 characters, and, whatever
    passed before, tests that together took longer than `timeout` (counted in `timeouts`).
    Masked and counted in `faults`: tests that cannot be run whatever the code (no Python, no test, another form,
    a function as an argument, a test that takes arguments or yields), and a sandbox that does not start. See
    `outcomes.to_rewards`.

    Args:
      share: reward the share of tests passed, not only all of them.
      timeout: seconds for all tests of a completion, from when the interpreter is ready.
      memory: bytes of address space for the code, and as many for the tests.
      output: bytes that a program may print, and that a file may have. A program that prints more fails.
      workers: how many completions are tested at a time.
      executor: `(code, tests) -> [passed, ...]`, one bool a test, instead of all that: a
        sandbox of the caller's own, which keeps its own limits. `TimeoutError` from it is
        the completion's fault, another exception its own.
      accept_unsandboxed_execution: run what a model writes with the rights of this process
        where there is no bubblewrap: it can read and delete your files, use the network, and
        forge the verdict. The limits still hold.

    Raises:
      ValueError: where there is no sandbox and none of the two arguments before; for a
        setting out of range; from the reward, if the data set has no column `tests`.
    """
    if timeout <= 0 or memory < 2**26 or output < 1 or workers < 1:
        raise ValueError(
            f"timeout is above 0 s, memory at least 64 MiB (2**26), output and workers at least 1, "
            f"got {timeout}, {memory}, {output} and {workers}"
        )
    run = _by(executor) if executor else _Runner(_prefix(accept_unsandboxed_execution), timeout, memory, output).judge

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_tail: Sequence[str | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if "tests" not in columns:
            raise ValueError("the python_tests reward needs a column tests with unit tests for the code")
        tails = prompt_tail or [None] * len(completions)
        texts = [opened_by(tail or "", THOUGHTS) + text_of(c) for tail, c in zip(tails, completions, strict=True)]
        sources = [_tests_in_python(parsed(tests)) for tests in columns["tests"]]
        codes = [code_of(t, _tested_names(source) if source else ()) for t, source in zip(texts, sources, strict=True)]
        with ThreadPoolExecutor(workers) as threads:
            outcomes = list(threads.map(run, codes, columns["tests"]))
        refused = [(i, o.message) for i, o in enumerate(outcomes) if o.value is not None and o.message]
        if refused:
            i, reason = refused[0]
            message = f"python_tests: tests of {len(refused)} completions fail on a result that is refused; completion"
            warnings.warn(f"{message} {i}: {reason}", RuntimeWarning, stacklevel=2)
        if not share:
            outcomes = [o if o.value is None else o._replace(value=float(o.value == 1)) for o in outcomes]
        return to_rewards(outcomes, "python_tests", log_metric=log_metric)

    reward.__name__ = reward.__qualname__ = "python_tests"
    return reading(reward, columns=["tests"])


def make_python_output(
    *,
    timeout: float = 10.0,
    memory: int = 512 * 2**20,
    output: int = 2**16,
    accept_unsandboxed_execution: bool = False,
) -> Callable[[str], str]:
    """Makes `code -> text`: what code prints in the sandbox of `python_tests`, and the last line of its exception.

    Args:
      timeout: seconds, from when the interpreter is ready.
      memory: bytes of address space.
      output: bytes that may be printed; what comes after them is left out.
      accept_unsandboxed_execution: as in `python_tests`.

    Returns:
      The function. It raises RuntimeError where the sandbox does not start.

    Raises:
      ValueError: where there is no sandbox; for a setting out of range.
    """
    if timeout <= 0 or memory < 2**26 or output < 1:
        raise ValueError(
            f"timeout is above 0 s, memory at least 64 MiB, output at least 1, got {timeout}, {memory}, {output}"
        )
    runner = _Runner(_prefix(accept_unsandboxed_execution), timeout, memory, output)

    def run(code: str) -> str:
        if len(code) > CODE_LIMIT:
            return f"error: the code has {len(code)} characters, more than {CODE_LIMIT}"
        with _file(code) as source, _file() as errors:
            with runner.process(["program", source.fileno()], stderr=errors) as process:
                said = _listen(process, timeout, output)
            if not said.ready:
                raise RuntimeError(_lost(errors).message)
            errors.seek(0)
            complaint = errors.read()[-2000:].decode(errors="replace").strip().split("\n")[-1]
        if said.end == "late":
            complaint = f"{ENDED[0]} {timeout:g} s"
        elif said.end == "flood":
            complaint = f"{ENDED[1]} {output} bytes"
        return "\n".join(filter(None, [said.text[:output].rstrip(), complaint]))

    return run


def code_of(completion: str, names: Collection[str] = ()) -> str:
    """The code of a completion, by the rule of `python_tests`; a block that is not closed is none.

    Args:
      completion: with what its prompt opens.
      names: that the tests take from the code. The last marked block that defines one of them is the code, if any does.
    """
    text = after_thoughts(completion)
    if text is None:
        return ""
    marked, plain, opened = [""], "", False
    fence: re.Match[str] | None = None  # of the block that the line is in
    block: list[str] = []
    for written in text.split("\n"):
        line = written
        if fence is None:
            if found := _FENCE.fullmatch(line):
                fence, block, opened, quotes = found, [], True, found[1].count(">")
            continue
        for _ in range(quotes):
            line = _QUOTED.sub("", line, count=1)
        found = _CLOSING.fullmatch(line)
        if found and found[1].startswith(fence[2]):
            columns = len(fence[1].rpartition(">")[2].removeprefix(" ") if quotes else fence[1])
            code = textwrap.dedent("\n".join(_outdented(line, columns) for line in block))
            if _PYTHON.match(fence[3]):
                marked.append(code)
            elif not fence[3]:
                plain = code
            fence = None
        else:
            block.append(line)
    defining = [code for code in marked if names and _definitions(code) & set(names)]
    return ((defining or marked)[-1] or plain) if opened else text


# Before a block: white space, the marks of lists whose items begin with it, and of quotations.
_FENCE = re.compile(r"(\s*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+|>[ \t]*)*)(`{3,}|~{3,})[ \t]*([^`\r]*?)\s*")
_CLOSING = re.compile(r"\s*(`{3,}|~{3,})\s*")
_QUOTED = re.compile(r"^[ \t]*> ?")
_PYTHON = re.compile(r"[{.\s]*py(?:thon)?[\d.]*(?![\w+-])", re.IGNORECASE)  # python3, {.python}, py title="a.py"
# At the start of a line, by the text: a parser may fail on what a model writes.
_DEFINED = re.compile(r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)|^(\w+)[ \t]*=(?!=)", re.MULTILINE)


def _definitions(code: str) -> set[str]:
    return {name for match in _DEFINED.finditer(code) for name in match.groups() if name}


@functools.lru_cache(maxsize=64)  # the completions of a group have the same tests
def _tested_names(tests: str) -> frozenset[str]:
    """The names that tests in Python take from the code; none where the tests cannot be read, which is told later."""
    try:
        tree = ast.parse(tests)
        if not harness.imports_solution(tree):
            return frozenset(harness.asked_for(tests))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "solution"]
    return frozenset(alias.name for node in imports for alias in node.names)


def _tests_in_python(tests: Any) -> str | None:
    """The source of tests that are a string or a list of strings, None for others."""
    tests = [tests] if isinstance(tests, str) else tests
    strings = isinstance(tests, list | tuple) and len(tests) > 0 and all(isinstance(test, str) for test in tests)
    return "\n".join(tests) if strings else None


def _outdented(line: str, columns: int) -> str:
    """The line without the indentation of its block, or what it has of it."""
    return line[min(columns, len(line) - len(line.lstrip())) :]


def _prefix(unsandboxed: bool) -> list[str]:
    try:
        # A virtual environment is not shown: the interpreter behind it has the standard library.
        return bubblewrap(read=[os.path.realpath(sys.base_prefix), sys.base_prefix, str(HARNESS)])
    except ValueError as error:
        if unsandboxed:
            return []
        raise ValueError(
            f"python_tests runs code that a model wrote. {error}. Or give executor=, a sandbox of your own. "
            "accept_unsandboxed_execution=True runs the code with all your rights"
        ) from error


def _by(executor: Callable[[str, Any], Sequence[bool]]) -> Callable[[str, Any], Outcome]:
    def run(code: str, tests: Any) -> Outcome:
        try:
            passed = list(executor(code, tests))
        except TimeoutError:
            return Outcome(None, "timeout")
        except Exception as error:
            return Outcome(None, "error", f"the executor raised {type(error).__name__}: {error}")
        return Outcome(sum(map(bool, passed)) / len(passed)) if passed else Outcome(None, "error", "no test was run")

    return run


class _Runner(NamedTuple):
    """Runs code and tests in processes, with these limits."""

    prefix: list[str]
    timeout: float
    memory: int
    output: int

    def judge(self, code: str, tests: Any) -> Outcome:
        """The share of tests that the code passes."""
        if not code.strip() or len(code) > CODE_LIMIT:
            return Outcome(0.0)
        tests = parsed(tests)
        if (source := _tests_in_python(tests)) is not None:
            return self.run_asserts(code, source)
        try:
            pairs = pairs_of(tests)
        except ValueError as error:
            return Outcome(None, "error", str(error))
        return self.run_pairs(code, pairs)

    def run_pairs(self, code: str, pairs: Sequence[tuple[str, str]]) -> Outcome:
        passed, left = 0, self.timeout
        for given, wanted in pairs:
            with _file(code) as source, _file(given) as stdin, _file() as errors:
                with self.process(["program", source.fileno()], stdin=stdin, stderr=errors) as process:
                    said = _listen(process, left, self.output)
                    left -= said.seconds
                    status, waited = _status(process, left) if said.end == "closed" else (None, 0.0)
                if not said.ready:
                    return _lost(errors)
            left -= waited
            if said.end == "late" or (said.end == "closed" and status is None):
                return Outcome(None, "timeout", "the tests took longer than their limit")
            passed += status == 0 and _lines(said.text) == _lines(wanted)
        return Outcome(passed / len(pairs))

    def run_asserts(self, code: str, tests: str) -> Outcome:
        from_code, to_tests = map(_renumbered, os.pipe())
        from_tests, to_code = map(_renumbered, os.pipe())
        with _file(code) as source, _file(tests) as checks, _file() as errors, contextlib.ExitStack() as processes:
            try:
                subject = self.process(["subject", source.fileno()], stdin=from_tests, stdout=to_tests, stderr=errors)
                processes.enter_context(subject)
                checker = self.process(["checker", checks.fileno(), from_code, to_code], stderr=errors)
                process = processes.enter_context(checker)
            finally:
                for end in (from_code, to_tests, from_tests, to_code):  # else neither would see the other's end
                    os.close(end)
            said = _listen(process, self.timeout, self.output)
            for line in said.text.splitlines():
                if line.startswith("unusable"):
                    return Outcome(None, "error", f"the tests cannot be run: {line.removeprefix('unusable ')}")
            if not said.ready:
                return _lost(errors)
        if said.end == "late":
            return Outcome(None, "timeout", "the tests took longer than their limit")
        lines = said.text.splitlines()
        refused = next((line.removeprefix("refused ") for line in lines if line.startswith("refused ")), "")
        passed = sum(line.startswith("passed ") for line in lines)
        spoiled = sum(line.startswith("spoiled ") for line in lines)  # a preparation, which counts as a test that fails
        return Outcome(passed / (int(said.ready) + spoiled), message=refused)

    @contextlib.contextmanager
    def process(self, role: list[Any], **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
        """The harness in one of its roles, with the files that are numbered there. Killed in the end."""
        limits = {"memory": self.memory, "output": self.output, "seconds": int(self.timeout) + 2}
        # Without the packages beside this one (-S): those that start slowly would count as the code's time.
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [*self.prefix, python, "-I", "-S", str(HARNESS), *map(str, role), json.dumps(limits)],
                **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **streams},
                pass_fds=[number for number in role if isinstance(number, int)],
                env=environment() | {"PYTHONHASHSEED": "0"},
                cwd=folder,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                kill_group(process)
                if process.stdout:
                    process.stdout.close()


def _file(text: str = "") -> IO[bytes]:
    """An open file without a name, for the caller to close."""
    with tempfile.TemporaryFile() as low:
        file = os.fdopen(_renumbered(os.dup(low.fileno())), "r+b")
    file.write(text.encode(errors="replace"))
    file.seek(0)
    return file


def _renumbered(number: int) -> int:
    """The open file under a number of at least 10: those below are the sandbox's shell's, which redirects 9."""
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10)
    finally:
        os.close(number)


def _lost(errors: IO[bytes]) -> Outcome:
    errors.seek(0)
    return Outcome(None, "lost", f"the sandbox did not start: {errors.read(2000).decode(errors='replace').strip()}")


class _Said(NamedTuple):
    """What a process wrote to standard output, from when it was ready."""

    ready: str  # its first line, without the word; empty if it never came
    text: str
    end: str  # "closed", "late" or "flood"
    seconds: float


def _listen(process: subprocess.Popen[bytes], timeout: float, limit: int) -> _Said:
    """Reads what a process writes, whose first line says that it is ready, until it ends or a limit is reached."""
    assert process.stdout is not None
    received, first, since = b"", b"", time.monotonic()
    deadline = since + START_TIMEOUT
    end = ""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not end:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                end = "late" if time.monotonic() >= deadline else ""
                continue
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            received += chunk
            if not first and received.startswith(b"ready") and b"\n" in received:
                first, _, received = received.partition(b"\n")
                since = time.monotonic()
                deadline = since + timeout
            if not chunk or len(received) > limit:
                end = "flood" if chunk else "closed"
    ready = first.decode(errors="replace").partition(" ")[2]
    return _Said(ready, received.decode(errors="replace"), end, time.monotonic() - since)


def _status(process: subprocess.Popen[bytes], limit: float) -> tuple[int | None, float]:
    """The exit status of a process that has closed its output, None if it goes on for too long, and the seconds."""
    since, pause = time.monotonic(), 1e-4
    # Not reaped here, so that its number stays its own until its group is killed.
    while (ended := os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
        if time.monotonic() - since >= limit:
            return None, limit
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return ended.si_status, time.monotonic() - since


def _lines(text: str) -> list[str]:
    """What two programs' outputs are compared by."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
