"""Worker processes that can be killed, for verifiers that parse what a model wrote.

A parser that hangs, exhausts the memory or crashes takes its worker with it and nothing else. This is isolation from
faults, not from malice: a worker has the rights of the user who started it, and an answer that takes it over can
report any reward. Code that a model wrote belongs in a sandbox (`python_tests`); a verifier that evaluates answers
can run in one too (`WorkerPool(prefix=bubblewrap())`), where it harms nothing but its own verdicts.

Why not `pebble.ProcessPool` (5.2, tried): its workers' answers are pickles, so an answer that takes a worker over
runs code in the training process; they cannot be started under a sandbox's command; they have the environment with
its keys and tokens; children of a killed worker live on, and so does a worker in C code whose run was killed.
"""

import importlib.util
import inspect
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpo_jax.rewards.completions import per_completion, text_of
from grpo_jax.rewards.outcomes import Outcome, to_rewards
from grpo_jax.rewards.worker_process import LINE_LIMIT, RETURN_LIMIT, WorkerProcess, encode, wait

START_TIMEOUT = 120.0  # seconds for a worker to start and to import its function's modules
START_ATTEMPTS = 3  # workers in a row that may die while they load the function


class WorkerPool:
    """Calls a function on items in worker processes, each item under a wall-clock limit.

        with WorkerPool(workers=4, timeout=5.0) as pool:
            outcomes = pool.map(score, [{"completion": "...", "answer": 4}, ...])

    A fault of an item is one of

    - `timeout`: it took longer than `timeout`, and its worker was killed with its process group;
    - `exhausted`: the function raised `MemoryError`, `RecursionError` or `OverflowError`;
    - `error`: the function raised another exception or returned no finite number; `message` has the traceback;
    - `lost`: the worker died or wrote something else than its answer, or the batch's time was up.

    Whatever an item does, the others are scored, and `map` returns. Workers start when first needed and serve until
    `close`, or until the pool is collected. A worker that dies while it loads the function is replaced; after 3 in a
    `map` the pool gives up. Of this process's environment workers have `PATH` and the locale alone; they have none of
    its open files, and a session of their own. One `map` runs at a time, from any thread.

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
        self._workers: list[WorkerProcess] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _kill_all, self._workers)

    def map(
        self,
        function: Callable[..., Any] | str,
        items: Sequence[Mapping[str, Any]],
        *,
        returned: Sequence[str] | None = None,
    ) -> list[Outcome]:
        """`[function(**item) for item in items]`, in the order of the items, with the fault of each that failed.

        Args:
          function: of a module's top level, or its name as `"package.module:function"`. Workers load
            its file by itself: one that imports neither JAX nor this package is ready at once.
          items: keyword arguments, as JSON can hold them.
          returned: for a function, plain or async, that returns no number but what JSON can hold: the names of the
            arguments that it may change, which come back with its result in `Outcome.returned`.

        Returns:
          One outcome per item.

        Raises:
          ValueError: if workers could not find the function.
          TypeError: if an item does not fit into JSON.
          RuntimeError: if workers cannot start or cannot load the function: no item is to blame.
        """
        target = target_of(function)
        settings = self._settings | ({} if returned is None else {"returned": [*returned]})
        requests = [encode({"id": i, "arguments": dict(item), **settings}) for i, item in enumerate(items)]
        limit = LINE_LIMIT if returned is None else RETURN_LIMIT
        with self._lock:
            try:
                return self._run(target, requests, limit)
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

    def _run(self, target: tuple[str, str], requests: Sequence[bytes], limit: int) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(requests)))
        died_loading = 0
        end = math.inf if self._batch_timeout is None else time.monotonic() + self._batch_timeout
        while len(outcomes) < len(requests):
            self._assign(target, requests, waiting, len(requests) - len(outcomes))
            busy = [worker for worker in self._workers if worker.item is not None]
            wait(busy, end)
            for worker in busy:
                item, outcome = worker.item, worker.outcome(limit)
                if item is None or outcome is None:
                    continue
                worker.item = None
                if outcome.fault not in (None, "error"):
                    outcome = self._end(worker, outcome)
                if item >= 0:
                    outcomes[item] = outcome
                elif outcome.fault:
                    died_loading += outcome.fault == "lost"
                    if outcome.fault != "lost" or died_loading == START_ATTEMPTS:
                        message = f"{outcome.message} {worker.complaint}".strip()
                        raise RuntimeError(f"a worker could not load {target[1]} of {target[0]}: {message}")
            if time.monotonic() >= end and len(outcomes) < len(requests):
                _kill_all(self._workers)
                late = Outcome(None, "lost", f"not scored within the batch's {self._batch_timeout} s")
                outcomes = {i: outcomes.get(i, late) for i in range(len(requests))}
        return [outcomes[i] for i in range(len(requests))]

    def _end(self, worker: WorkerProcess, outcome: Outcome) -> Outcome:
        """Kills a worker after a fault; the outcome by its exit status."""
        self._workers.remove(worker)
        status = worker.kill()
        # The worker's own timer can be first where this process was held up; a child of a dead worker can hold its
        # pipe open.
        if outcome.fault == "lost" and status == -signal.SIGALRM:
            return Outcome(None, "timeout")
        if outcome.fault == "lost" or (outcome.fault == "timeout" and status != -signal.SIGKILL):
            reason = f"the worker died or wrote something else (exit status {status})"
            return Outcome(None, "lost", outcome.message or reason)
        return outcome

    def _assign(self, target: tuple[str, str], requests: Sequence[bytes], waiting: deque[int], unfinished: int) -> None:
        """Gives each idle worker its next item, and replaces those that wrote something unasked."""
        for worker in [worker for worker in self._workers if worker.item is None and worker.stale()]:
            self._workers.remove(worker)
            worker.kill()
        while len(self._workers) < min(self._size, unfinished):
            self._workers.append(WorkerProcess(self._prefix))
        for worker in self._workers:
            if worker.item is None and worker.target != target:
                paths = [os.path.abspath(path) for path in sys.path]
                worker.target = target
                worker.send(-1, encode({"id": -1, "load": target, "paths": paths, **self._settings}), START_TIMEOUT)
            elif worker.item is None and waiting:
                i = waiting.popleft()
                worker.send(i, requests[i], self._timeout)


def in_worker_processes(
    score: Callable[..., Any],
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

    An answer that `score` cannot parse is `score`'s to call wrong. Both kinds of fault are reported by
    `outcomes.to_rewards`.

    Args:
      score: of a module's top level, plain or async; see `WorkerPool.map`. It is given the completion's text,
        the prompt where it names `prompt`, and the data set's columns that it names (all, if it has `**kwargs`).
      pool: one to share with other rewards, whose own limits hold.
      workers: how many processes a pool of its own has.
      timeout: seconds per completion, in a pool of its own.
      memory: bytes of address space for a worker, in a pool of its own.
      wrong: the reward of a wrong answer.
      settings: arguments of `score` that are the same for every completion.
      name: what metrics call the reward, by default the name of `score`.
    """
    pool = WorkerPool(workers=workers, timeout=timeout, memory=memory) if pool is None else pool
    label = name or score.__name__
    fixed = dict(settings or {})
    parameters = list(inspect.signature(score).parameters.values())
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {parameter.name for parameter in parameters}

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        lists = per_completion(columns, len(completions))
        columns = {"prompt": list(prompts), **lists, "completion": [text_of(completion) for completion in completions]}
        columns = {k: v for k, v in columns.items() if (everything or k in named) and k not in fixed}
        items = [fixed | {k: v[i] for k, v in columns.items()} for i in range(len(completions))]
        return to_rewards(pool.map(score, items), label, wrong=wrong, log_metric=log_metric)

    reward.__name__ = reward.__qualname__ = label
    given = {"completion", "prompt", *fixed}
    vars(reward)["requires"] = tuple(  # columns; see `run.inputs.check_arguments`
        p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in given
    )
    return reward


def _kill_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()


def target_of(function: Callable[..., Any] | str) -> tuple[str, str]:
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
