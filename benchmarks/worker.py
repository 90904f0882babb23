"""The conversation between the command and its workers: a line of JSON each way, over a pipe.

Each system runs each cell in a process of its own, so that its peak memory is that
of the cell. The process builds the model once and then makes one step a request.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Line = dict[str, Any]
ROOT = Path(__file__).parents[1]


def peak_memory() -> float:
    """The largest resident size that this process has had since `forget_peak`, in MiB (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM; the benchmark runs on Linux")


def forget_peak() -> None:
    """The largest resident size is the present one from here on."""
    Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------ in the worker


def open_channel() -> tuple[Callable[[], Iterator[Line]], Callable[[Line], None]]:
    """`requests` and `send`; whatever libraries print goes to stderr from here on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def requests() -> Iterator[Line]:
        return (json.loads(line) for line in sys.stdin)

    def send(line: Line) -> None:
        print(json.dumps(line), file=channel, flush=True)

    return requests, send


def serve(answer: Callable[[Line], Line]) -> None:
    """Answers each request until the command closes the pipe."""
    requests, send = open_channel()
    send({"ready": True})
    for request in requests():
        send(answer(request))


# ----------------------------------------------------------------- in the command


class Worker(NamedTuple):
    """A running worker."""

    process: subprocess.Popen[str]
    log: Path  # its stderr


ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


# transformers imports torch wherever it is installed: 250 MiB that only systems made of torch should answer for.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_module("benchmarks.{module}", run_name="__main__", alter_sys=True)
"""


def start(
    python: str,
    module: str,
    arguments: Line,
    log: Path,
    *,
    torch: bool = False,
    environment: dict[str, str] | None = None,
) -> Worker:
    """Starts `python -m benchmarks.<module>`; call `receive` to wait until it is ready."""
    log.parent.mkdir(parents=True, exist_ok=True)
    program = ["-m", f"benchmarks.{module}"] if torch else ["-c", WITHOUT_TORCH.format(module=module)]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [python, *program, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | (environment or {}),
        )
    return Worker(process, log)


def receive(worker: Worker) -> Line:
    """The worker's next line.

    Raises:
      RuntimeError: if the worker has ended, with the end of its stderr.
    """
    assert worker.process.stdout is not None
    line = worker.process.stdout.readline()
    if not line:
        code = worker.process.wait()
        raise RuntimeError(f"a worker ended with {code}; {worker.log} ends so:\n{worker.log.read_text()[-2000:]}")
    return json.loads(line)


def ask(worker: Worker, request: Line) -> Line:
    """Sends a request and waits for the answer."""
    assert worker.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # `receive` says how it ended
        print(json.dumps(request), file=worker.process.stdin, flush=True)
    return receive(worker)


def stop(worker: Worker) -> None:
    """Ends the worker."""
    worker.process.kill()
    worker.process.communicate()
