"""A worker process as the pool holds it: its pipes, the item that it works on, and how it is killed."""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.rewards.outcomes import Fault, Outcome

LINE_LIMIT = 1 << 16  # bytes of one answer; a worker that writes more is not answering
RETURN_LIMIT = 1 << 20  # of one that brings arguments back, such as the row of a conversation


def environment() -> dict[str, str]:
    """The environment of a process that sees model output: `PATH`, the locale, and no secret."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **kept}


def kill_group(process: subprocess.Popen[bytes]) -> int:
    """Kills a process that leads a group, with the group; its exit status, -9 if it was alive."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so that the number is still its own
    return process.wait()


class WorkerProcess:
    """A process and its present item, which is None when idle and -1 while it loads its function."""

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
        """Whether it died, or wrote something, while it was idle."""
        self.received = b""
        self.read()
        return self.ended or bool(self.received)

    def outcome(self, limit: int) -> Outcome | None:
        """The outcome of the item, of at most so many bytes; None while it is still at work."""
        line, newline, rest = self.received.partition(b"\n")
        if newline and not rest:
            return _decode(line, self.item)
        if len(self.received) > limit:
            return Outcome(None, "lost", f"its answer has more than {limit} bytes")
        if newline or self.ended:
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


def wait(workers: Sequence[WorkerProcess], end: float) -> None:
    """Moves bytes until something has happened to a worker, or a limit is reached."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.results, selectors.EVENT_READ, worker.read)
            if worker.unsent:
                selector.register(worker.requests, selectors.EVENT_WRITE, worker.write)
        limit = min([end, *(worker.deadline for worker in workers)]) - time.monotonic()
        for key, _ in selector.select(max(limit, 0.0)):
            key.data()


def encode(request: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(request, default=_listed).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"an item does not fit into JSON, in which workers are given it: {error}") from error


def _listed(value: Any) -> Any:
    """An array, or a number of NumPy, as JSON can hold it."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"a {type(value).__name__} is not of JSON")
    return value.tolist()


def _decode(line: bytes, item: int | None) -> Outcome:
    """The outcome that a worker reports. The line is not trusted: its writer has seen model output."""
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
        return Outcome(None if value is None else float(value), returned=reply.get("returned"))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Outcome(None, "lost")
