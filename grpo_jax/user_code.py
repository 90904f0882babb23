"""What a user's function may have changed of the process that runs it, put back."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def put_back(name: str) -> Iterator[None]:
    """Puts back the working directory and the standard streams, and ends a process that was forked meanwhile.

    A function that goes into another folder, or catches what is printed, and then raises does not go back; relative
    paths of the run would then lead elsewhere. A child of `os.fork` that returns or raises would go on with the run
    beside its parent, in the same folder.

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
        sys.stdout, sys.stderr = streams
        if directory is not None and (now := _directory()) != directory:
            os.chdir(directory)
            to = now or "a folder that is gone"
            warnings.warn(
                f"{name} has changed the working directory to {to}; it is {directory} again",
                RuntimeWarning,
                stacklevel=3,
            )


def _directory() -> str | None:
    """The working directory; None where it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None
