"""How long the quickstart takes to its first step and in all, without and with programs kept from an earlier run."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from benchmarks import worker

SCRIPT = "experiments/quickstart.py"


def measure(repeats: int = 2) -> Iterator[worker.Line]:
    """A line a run: the first compiles, the others find its programs; all start with a folder of their own.

    Args:
      repeats: runs after the first.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"XDG_CACHE_HOME": scratch, "PYTHONUNBUFFERED": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        for n in range(1 + repeats):
            command = [sys.executable, SCRIPT, "--run-dir", f"{scratch}/{n}"]
            started, first_step = time.perf_counter(), None
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, cwd=worker.ROOT, env=environment
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("step 1/") and first_step is None:
                        first_step = time.perf_counter() - started
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
            yield {"kept": n > 0, "first_step": first_step, "whole": time.perf_counter() - started}


if __name__ == "__main__":
    _, send = worker.open_channel()
    for line in measure():
        send(line)
