"""A run may be stopped at any moment and started again, but never run twice at once.

A loop reads

    with preemption.lock(run_dir), preemption.graceful_stop() as stop_requested:
        for step in range(int(state.step), steps):
            state, measured = train_step(state, prompts(step))
            if stop_requested():
                checkpoint.save(checkpoints, state, meta)
                raise SystemExit(preemption.STOPPED)

and what a kill at any other moment leaves behind is the business of `checkpoint` and `metrics`.
"""

import contextlib
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import filelock

STOPPED = 143  # the exit status after a graceful stop: 128 + SIGTERM, as a shell reports a terminated process


@contextlib.contextmanager
def lock(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes out of a folder, which is created where absent.

    The lock is the kernel's, on `run.lock`, and ends with its process; the text inside only serves the message. It is
    re-entrant: a process, in one thread, may hold it several times.

    Raises:
      OSError: if another run holds it, naming its process and host; if the folder cannot be written.
    """
    path = pathlib.Path(run_dir).absolute() / "run.lock"
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(
                filelock.FileLock(
                    path,
                    blocking=False,
                    is_singleton=True,
                    fallback_to_soft=False,
                    preserve_lock_file=True,
                    on_acquired=_sign,
                )
            )
        except filelock.Timeout as error:
            holder = path.read_text() or "another process"
            raise OSError(f"the run folder {run_dir} is in use by {holder}; stop it or use another") from error
        except OSError as error:
            raise OSError(error.errno, f"cannot write in the run folder ({error.strerror})", str(run_dir)) from error
        yield


def _sign(descriptor: int) -> None:
    """Writes the holder into the locked file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


@contextlib.contextmanager
def graceful_stop(
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> Iterator[Callable[[], bool]]:
    """Turns the first signal into a request to stop after the step; the second ends the process at once.

    Yields a function that tells whether a stop is requested. The exit status at the second signal is `128 + signal`.
    For the main thread only, as are signals in Python.

    Python runs signal handlers between its own instructions, of which the main thread may have none for minutes while
    it waits for a device. So a thread counts the signals, which the interpreter also writes to its wake-up socket.
    """
    requested = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        asked = False
        while received := reader.recv(1):
            if received[0] not in signals:
                continue  # such as an alarm, of another handler
            if asked:
                os._exit(128 + received[0])
            asked = True
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def request(number: int, frame: object) -> None:
        requested.set()

    def forget() -> None:
        """A forked worker shares the socket; terminated, it would stop this run and not itself."""
        if request in map(signal.getsignal, signals):
            signal.set_wakeup_fd(-1)
            for number in signals:
                signal.signal(number, signal.SIG_DFL)

    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, request) for number in signals}
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    os.register_at_fork(after_in_child=forget)
    try:
        yield requested.is_set
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()  # ends the watcher
        watcher.join()
        reader.close()
