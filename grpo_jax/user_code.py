"""What a user's function may have changed of the process that runs it, put back."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def put_back(name: str) -> Iterator[None]:
    """Puts back the working directory and the standard streams, and ends a process that was forked meanwhile.

    A function that goes into another folder, or catches what is printed, and then raises does not go back; relative
    paths of the run would then lead elsewhere. One that closes a standard stream would end the run at its next line. A
    child of `os.fork` that returns or raises would go on with the run beside its parent, in the same folder.

    Args:
      name: of what is called, for the messages.

    Warns:
      RuntimeWarning: for another working directory.
    """
    process, directory, streams = os.getpid(), _directory(), (sys.stdout, sys.stderr)
    try:
        yield
    finally:
        if os.getpid() != process:
            os.write(2, f"\na process that {name} forked came back from it, and ends\n".encode())
            os._exit(1)
        sys.stdout, sys.stderr = map(_opened, streams, (1, 2))
        if directory is not None and (now := _directory()) != directory:
            os.chdir(directory)
            to = now or "a folder that is gone"
            warnings.warn(
                f"{name} has changed the working directory to {to}; it is {directory} again",
                RuntimeWarning,
                stacklevel=3,
            )


def _opened(stream: TextIO, number: int) -> TextIO:
    """The standard stream, or another one of the same file, which stays open when a stream of it is closed."""
    return open(number, "w", buffering=1, closefd=False) if getattr(stream, "closed", False) else stream


def _directory() -> str | None:
    """The working directory; None where it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None
