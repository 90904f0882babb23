import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from grpo_jax.run import preemption

# The file alone, as importing the package takes seconds.
ALONE = f"import runpy; preemption = runpy.run_path({preemption.__file__!r})\n"


@contextlib.contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", ALONE + code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


HOLD = """
import os, sys
with preemption["lock"](sys.argv[1]):
    if sys.argv[2] == "alone" or os.fork() == 0:  # a worker, which outlives the run
        print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
"""


def test_a_folder_that_another_process_holds_is_refused_by_name(tmp_path):
    with process(HOLD, tmp_path / "run", "alone") as holder:
        assert holder.stdout.readline() == "held\n"
        expected = rf"run is in use by process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(OSError, match=expected), preemption.lock(tmp_path / "run"):
            pass
        holder.communicate()
    with preemption.lock(tmp_path / "run"):
        pass


def test_a_process_may_hold_its_folder_several_times_and_lets_go_at_the_end(tmp_path):
    with preemption.lock(tmp_path):
        with preemption.lock(tmp_path):
            pass
        with process(HOLD, tmp_path, "alone") as other:
            assert other.stdout.readline() == ""
    with process(HOLD, tmp_path, "alone") as other:
        assert other.stdout.readline() == "held\n"


@pytest.mark.parametrize("workers", ["alone", "forks"])
def test_the_lock_of_a_killed_process_is_taken_over_even_if_its_workers_live(tmp_path, workers):
    with process(HOLD, tmp_path, workers) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
        with preemption.lock(tmp_path):
            assert (tmp_path / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"cannot write in the run folder .*file/run"),
        preemption.lock(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_to_stop(number):
    with preemption.graceful_stop() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()


def test_afterwards_signals_are_handled_as_before():
    before, threads = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)), threading.active_count()
    with preemption.graceful_stop():
        assert signal.getsignal(signal.SIGINT) is not before[1]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threads == threading.active_count()


def test_signals_of_others_are_no_request():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(True))
    try:
        with preemption.graceful_stop() as stop_requested:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [True, True]
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGUSR1, before)


ENDLESS = """
import os, signal
import jax
with preemption["graceful_stop"]() as stop_requested:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requested()
    print("asked", flush=True)
    jax.jit(lambda x: jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 7, x))(0).block_until_ready()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_even_a_process_that_waits_for_a_device(number):
    with process(ENDLESS) as waiting:
        assert waiting.stdout.readline() == "asked\n"
        waiting.send_signal(number)
        assert waiting.wait(timeout=60) == 128 + number


FORKS = """
import os, signal
reads, writes = os.pipe()
with preemption["graceful_stop"]() as stop_requested:
    if (worker := os.fork()) == 0:
        os.close(writes)
        print("ready", flush=True)
        os.read(reads, 1)  # until terminated, or alone
        os._exit(0)
    input()
    os.kill(worker, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM
    assert not stop_requested()
"""


def test_a_forked_worker_that_is_terminated_ends_itself_and_not_the_run():
    with process(FORKS) as run:
        assert run.stdout.readline() == "ready\n"
        run.stdin.write("\n")
        run.stdin.flush()
        assert run.wait(timeout=60) == 0
