"""Jitted functions that may be compiled ahead, in a thread, and that give back what compiling them has freed."""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import sys
import threading
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import numpy as np

_DONE: concurrent.futures.Future[None] = concurrent.futures.Future()
_DONE.set_result(None)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function, called as it is.

    Of each form of its arguments, their structure, shapes and dtypes, one program is compiled: by the first call with
    it, or before that by `ahead`. On Linux what XLA's compiler has freed then goes back to the system, hundreds of MiB
    that the GNU C library keeps else.

    Attributes:
      jitted: of `jax.jit`.
      compiled: the forms whose programs are there, or are being compiled.
    """

    jitted: Any
    compiled: dict[Hashable, concurrent.futures.Future[None]] = dataclasses.field(default_factory=dict)

    def __call__(self, *arguments: Any) -> Any:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments)):
            return self.jitted(*arguments)  # within another function that is traced
        form = _form(arguments)
        known = self.compiled.get(form)
        if known is None or known.cancel():  # a thread that has not begun with it leaves it to this call
            result = self.jitted(*arguments)
            self.compiled[form] = _DONE
            give_back_freed()
            return result
        concurrent.futures.wait([known])
        return self.jitted(*arguments)

    def ahead(self, calls: Iterable[tuple[Any, ...]]) -> int:
        """Compiles the programs of some calls in a thread, one after the other, and returns how many are new.

        A call that comes meanwhile waits for its program, or compiles it by itself if the thread has not come to it. A
        process that ends waits for the one that is being compiled.

        Args:
          calls: the arguments of each, or their shapes and dtypes.
        """
        waiting = []
        for arguments in calls:
            shapes = jax.tree.map(_shape, arguments)
            if (form := _form(shapes)) not in self.compiled:
                self.compiled[form] = concurrent.futures.Future()
                waiting.append((self.compiled[form], shapes))
        if waiting:
            threading.Thread(target=self._compile, args=(waiting,), name="compiling ahead").start()
        return len(waiting)

    def _compile(self, waiting: list[tuple[concurrent.futures.Future[None], tuple[Any, ...]]]) -> None:
        for future, shapes in waiting:
            if not threading.main_thread().is_alive() or not future.set_running_or_notify_cancel():
                continue
            with contextlib.suppress(Exception):  # the call meets it again
                self.jitted.lower(*shapes).compile()  # which the call finds where JAX keeps it
            future.set_result(None)
            give_back_freed()


def give_back_freed() -> None:
    """Gives freed memory that the GNU C library keeps back to the system, in milliseconds; nothing with another one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _form(arguments: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in leaves)


def _shape(x: Any) -> Any:
    """The form of an array, and where it lies, if it has to lie there; what is no array as it is."""
    if not isinstance(x, jax.Array):
        return x
    place = x.sharding if x.committed else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place, weak_type=getattr(x, "weak_type", False))
