"""Worker processes that can be killed, for verifiers that parse what a model wrote.

A parser that hangs, exhausts the memory or crashes takes its worker with it and nothing else. This is isolation from
faults, not from malice: a worker has the rights of the user who started it, and an answer that takes it over can
report any reward. Code that a model wrote belongs in a sandbox (`python_tests`); a verifier that evaluates answers
can run in one too (`WorkerPool(prefix=bubblewrap(...))`), where it harms nothing but its own verdicts.
"""

import contextlib
import importlib.util
import inspect
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from grpo_jax.rewards.text import text_of

Fault = Literal["timeout", "exhausted", "error", "lost"]

START_TIMEOUT = 120.0  # seconds for a worker to start and to import what its function needs
LINE_LIMIT = 1 << 16  # bytes of one answer; a worker that writes more is not answering


class Outcome(NamedTuple):
    """What became of one item."""

    value: float | None  # None where the function returned None, or where there is a fault
    fault: Fault | None = None
    message: str = ""


class WorkerPool:
    """Calls a function on items in worker processes, each item under a wall-clock limit.

        with WorkerPool(workers=4, timeout=5.0) as pool:
            outcomes = pool.map(score, [{"completion": "...", "answer": 4}, ...])

    A fault of an item is one of

    - `timeout`: it took longer than `timeout`, and its worker was killed with its process group;
    - `exhausted`: the function raised `MemoryError`, `RecursionError` or `OverflowError`;
    - `error`: the function raised another exception or returned no finite number; `message` has the traceback;
    - `lost`: the worker died or wrote something else than its answer, or the batch's time was up.

    Whatever an item does, the others are judged, and `map` returns. Workers start when
    first needed and serve until `close`, or until the pool is collected. They have none of
    this process's environment but `PATH` and the locale, none of its open files, and a
    session of their own. One `map` runs at a time, from any thread.

    Args:
      workers: how many processes.
      timeout: seconds for an item, by this process's clock. Starting a worker and importing is not counted.
      batch_timeout: seconds for a `map`, or None for no limit but that of the items. What is
        unfinished by then is `lost`: it did not use up its own time.
      memory: bytes of address space for a worker (`RLIMIT_AS`).
      prefix: a command that runs the command after it, for instance a sandbox's.

    Raises:
      ValueError: for a setting out of range.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout: float = 5.0,
        batch_timeout: float | None = None,
        memory: int = 2 * 2**30,
        prefix: Sequence[str] = (),
    ) -> None:
        if workers < 1:
            raise ValueError(f"a pool needs at least 1 worker, got {workers}")
        for name, seconds in (("timeout", timeout), ("batch_timeout", batch_timeout)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name} is a finite number of seconds above 0, got {seconds}")
        if memory < 2**27:
            raise ValueError(f"memory is at least 128 MiB (2**27), which an interpreter needs, got {memory}")
        self._timeout, self._batch_timeout = timeout, batch_timeout
        self._settings = {"memory": memory, "timeout": timeout}
        self._prefix = list(prefix)
        self._size = workers
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _kill_all, self._workers)

    def map(self, function: Callable[..., float | None] | str, items: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """`[function(**item) for item in items]`, in the order of the items, whatever becomes of each.

        Args:
          function: of a module's top level, or its name as `"package.module:function"`. Workers load
            its file by itself: one that imports neither JAX nor this package is ready at once.
          items: keyword arguments, of what JSON can hold.

        Returns:
          One outcome an item.

        Raises:
          ValueError: if workers could not find the function.
          TypeError: if an item does not fit into JSON.
          RuntimeError: if a worker cannot start or cannot load the function: no item is to blame.
        """
        target = _target(function)
        requests = [_encode({"id": i, "arguments": dict(item), **self._settings}) for i, item in enumerate(items)]
        with self._lock:
            try:
                return self._run(target, requests)
            except BaseException:
                _kill_all(self._workers)  # no answer to a call that was interrupted may reach the next
                raise

    def close(self) -> None:
        """Kills the workers. A later `map` starts others."""
        with self._lock:
            _kill_all(self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run(self, target: tuple[str, str], requests: Sequence[bytes]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(requests)))
        end = math.inf if self._batch_timeout is None else time.monotonic() + self._batch_timeout
        while len(outcomes) < len(requests):
            self._assign(target, requests, waiting, len(requests) - len(outcomes))
            busy = [worker for worker in self._workers if worker.item is not None]
            _wait(busy, end)
            for worker in busy:
                item, outcome = worker.item, worker.outcome()
                if item is None or outcome is None:
                    continue
                worker.item = None
                if outcome.fault not in (None, "error"):
                    self._workers.remove(worker)
                    status = worker.kill()
                    # The worker's own timer can be first where this process was held up; a child of
                    # a dead worker can hold its pipe open.
                    if outcome.fault == "lost" and status == -signal.SIGALRM:
                        outcome = Outcome(None, "timeout")
                    elif outcome.fault == "lost" or (outcome.fault == "timeout" and status != -signal.SIGKILL):
                        outcome = Outcome(None, "lost", f"the worker died or misspoke (exit status {status})")
                if item >= 0:
                    outcomes[item] = outcome
                elif outcome.fault:
                    message = f"{outcome.message} {worker.complaint}".strip()
                    raise RuntimeError(f"a worker could not load {target[1]} of {target[0]}: {message}")
            if time.monotonic() >= end and len(outcomes) < len(requests):
                _kill_all(self._workers)
                late = Outcome(None, "lost", f"not judged within the batch's {self._batch_timeout} s")
                outcomes = {i: outcomes.get(i, late) for i in range(len(requests))}
        return [outcomes[i] for i in range(len(requests))]

    def _assign(self, target: tuple[str, str], requests: Sequence[bytes], waiting: deque[int], unfinished: int) -> None:
        """Gives each idle worker something to do, and replaces those that said something unasked."""
        for worker in [worker for worker in self._workers if worker.item is None and worker.stale()]:
            self._workers.remove(worker)
            worker.kill()
        while len(self._workers) < min(self._size, unfinished):
            self._workers.append(_Worker(self._prefix))
        for worker in self._workers:
            if worker.item is None and worker.target != target:
                paths = [os.path.abspath(path) for path in sys.path]
                worker.target = target
                worker.send(-1, _encode({"id": -1, "load": target, "paths": paths, **self._settings}), START_TIMEOUT)
            elif worker.item is None and waiting:
                i = waiting.popleft()
                worker.send(i, requests[i], self._timeout)


def in_worker_processes(
    score: Callable[..., float | None],
    *,
    pool: WorkerPool | None = None,
    workers: int = 2,
    timeout: float = 5.0,
    memory: int = 2 * 2**30,
    wrong: float = 0.0,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., list[float | None]]:
    """Makes a reward function of `score(completion, **columns) -> float | None`, which runs in worker processes.

        reward = `wrong`  where the completion is to blame, else hanging would pay: it took longer than `timeout`, or
                          made the verifier raise `MemoryError`, `RecursionError` or `OverflowError`
                 None     where the verifier is to blame: it raised another exception, or its worker died
                 score    otherwise; None masks, as ever

    `score` says itself what else is wrong, for instance an answer that it cannot parse.
    Both kinds are reported as by `to_rewards`.

    Args:
      score: of a module's top level; see `WorkerPool.map`. It is given the completion's text,
        the prompt where it names `prompt`, and the data set's columns that it names (all, if it has `**kwargs`).
      pool: one to share with other rewards, whose own limits hold.
      workers: how many processes a pool of its own has.
      timeout: seconds for a completion, in a pool of its own.
      memory: bytes of address space for a worker, in a pool of its own.
      wrong: the reward of a wrong answer.
      settings: arguments of `score` that are the same for every completion.
      name: what metrics call the reward, by default the name of `score`.
    """
    pool = WorkerPool(workers=workers, timeout=timeout, memory=memory) if pool is None else pool
    label = name or score.__name__
    fixed = dict(settings or {})
    parameters = inspect.signature(score).parameters.values()
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {parameter.name for parameter in parameters}

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        # TRL also passes its state and its loggers; columns are what has an entry a completion.
        lists = {k: v for k, v in columns.items() if isinstance(v, list) and len(v) == len(completions)}
        given = {"prompt": list(prompts), **lists, "completion": [text_of(completion) for completion in completions]}
        wanted = {k: v for k, v in given.items() if (everything or k in named) and k not in fixed}
        items = [fixed | {k: v[i] for k, v in wanted.items()} for i in range(len(completions))]
        return to_rewards(pool.map(score, items), label, wrong=wrong, log_metric=log_metric)

    reward.__name__ = reward.__qualname__ = label
    return reward


def to_rewards(
    outcomes: Sequence[Outcome],
    name: str,
    *,
    wrong: float = 0.0,
    log_metric: Callable[[str, float], None] | None = None,
) -> list[float | None]:
    """Rewards of outcomes: `wrong` for `timeout` and `exhausted`, None for `error` and `lost`.

    Their numbers are logged as `<name>/timeouts` and `<name>/faults` where there is a
    `log_metric(name, value)`. Faults are also a `RuntimeWarning`, which shows the first.
    """
    slow = sum(outcome.fault in ("timeout", "exhausted") for outcome in outcomes)
    faults = [i for i, outcome in enumerate(outcomes) if outcome.fault in ("error", "lost")]
    if log_metric is not None:
        log_metric(f"{name}/timeouts", slow)
        log_metric(f"{name}/faults", len(faults))
    if faults:
        warnings.warn(
            f"{name} could not judge {len(faults)} of {len(outcomes)} completions, which are masked; "
            f"the first is completion {faults[0]}: {outcomes[faults[0]].message}",
            RuntimeWarning,
            stacklevel=3,
        )
    return [wrong if outcome.fault in ("timeout", "exhausted") else outcome.value for outcome in outcomes]


def environment() -> dict[str, str]:
    """The environment of a process that sees model output: what an interpreter needs, and no secret."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **kept}


def kill_group(process: subprocess.Popen[bytes]) -> int:
    """Kills a process that leads a group, with the group; its exit status, -9 if it was alive."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so that the number is still its own
    return process.wait()


class _Worker:
    """A process, and what is under way with it. `item` is None when idle and -1 while it loads its function."""

    def __init__(self, prefix: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process; `kill` closes it
        # No preexec_fn: it would fork this process, which has JAX's threads.
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-I", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment(),
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.results = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)
        os.set_blocking(self.results.fileno(), False)
        self.target: tuple[str, str] | None = None
        self.item: int | None = None
        self.deadline = math.inf
        self.unsent = b""
        self.received = b""
        self.ended = False
        self.complaint = ""

    def send(self, item: int, request: bytes, timeout: float) -> None:
        self.item, self.unsent, self.received = item, request, b""
        self.deadline = time.monotonic() + timeout

    def write(self) -> None:
        try:
            self.unsent = self.unsent[os.write(self.requests.fileno(), self.unsent[:LINE_LIMIT]) :]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent, self.ended = b"", True

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            received = os.read(self.results.fileno(), LINE_LIMIT)
            self.received += received
            self.ended = not received

    def stale(self) -> bool:
        """Whether it died, or wrote something, while it had nothing to do."""
        self.received = b""
        self.read()
        return self.ended or bool(self.received)

    def outcome(self) -> Outcome | None:
        """What became of the item, or None while that is open."""
        line, newline, rest = self.received.partition(b"\n")
        if newline and not rest:
            return _decode(line, self.item)
        if newline or self.ended or len(self.received) > LINE_LIMIT:
            return Outcome(None, "lost")
        if time.monotonic() >= self.deadline:
            return Outcome(None, "timeout", "the item took longer than its limit")
        return None

    def kill(self) -> int:
        status = kill_group(self.process)
        self.errors.seek(0)
        self.complaint = self.errors.read(2000).decode(errors="replace").strip()
        for file in (self.requests, self.results, self.errors):
            file.close()
        return status


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


def _wait(workers: Sequence[_Worker], end: float) -> None:
    """Moves bytes until something has happened to a worker, or a limit is reached."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.results, selectors.EVENT_READ, worker.read)
            if worker.unsent:
                selector.register(worker.requests, selectors.EVENT_WRITE, worker.write)
        limit = min([end, *(worker.deadline for worker in workers)]) - time.monotonic()
        for key, _ in selector.select(max(limit, 0.0)):
            key.data()


def _encode(request: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(request).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"an item does not fit into JSON, in which workers are given it: {error}") from error


def _decode(line: bytes, item: int | None) -> Outcome:
    """The outcome that a worker reports. The line is not trusted: what saw model output wrote it."""
    try:
        reply = json.loads(line)
        if reply["id"] != item:
            return Outcome(None, "lost")
        if "fault" in reply:
            faults: dict[str, Fault] = {"error": "error", "exhausted": "exhausted"}
            return Outcome(None, faults[reply["fault"]], str(reply["message"]))
        value = reply["value"]
        if value is not None and not math.isfinite(value):
            return Outcome(None, "error", f"the function returned {value}, and not a finite number or None")
        return Outcome(None if value is None else float(value))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Outcome(None, "lost")


def _target(function: Callable[..., Any] | str) -> tuple[str, str]:
    """The file and the name by which workers load the function."""
    if isinstance(function, str):
        module, _, name = function.partition(":")
        spec = importlib.util.find_spec(module)
        file = None if spec is None else spec.origin
    else:
        name = getattr(function, "__qualname__", "")
        file = getattr(sys.modules.get(function.__module__), "__file__", None)
    if not name.isidentifier() or file is None or not Path(file).is_file():
        raise ValueError(
            f"workers load a function by its name from its file, so {function!r} must be defined with def at the top "
            "level of a .py file"
        )
    return os.path.abspath(file), name
