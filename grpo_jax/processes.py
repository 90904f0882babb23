"""Several processes that run one program, and what their hosts tell each other.

    with processes.joined("10.0.0.1:1234", count=2, index=0):
        train(config)                                   # the same in each process

The arrays of a mesh go from device to device within the programs. What is left is little, and goes over the service by
which JAX brought the processes together: rewards, what environments answered, metrics, and whether one of them has
failed. A device waits for it between the turns of conversations alone. Every process calls these functions in the same
order; in a single process each of them does nothing.
"""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the service's keys and values have no public name; Orbax takes them from here, too
from jax.experimental import multihost_utils

from grpo_jax.types import Array

Tree = TypeVar("Tree")

_WEEK = 7 * 24 * 3600 * 1000  # milliseconds; a process that has died is found otherwise, by `_watch`
_HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead
_GRACE = 15.0  # seconds in which a process may end by itself after another has
_STATUS = re.compile(r"[A-Z_]+: ")  # how the words of XLA begin, which some calls of a program raise as ValueError
_BLOCK = 2**26  # bytes of an array that are gathered at a time
_counts: collections.Counter[str] = collections.Counter()  # how often each name was used, which makes keys of them


class ProcessError(RuntimeError):
    """Something was raised in another process."""


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, exports, the table on the screen."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(
    coordinator: str | None, count: int | None = None, index: int | None = None, *, wait: float = 300.0
) -> Iterator[None]:
    """Makes this process one of several for as long as the block lasts; before anything is computed.

    An exception in one process ends the others, too, after seconds in which each may raise its own; a process that is
    killed ends them within a minute. Each says on stderr which it was. Only the first process prints to stdout.

    Args:
      coordinator: `HOST:PORT`, where the first process serves the others; `cluster` for what JAX finds out by itself
        (Slurm, Open MPI, Kubernetes, Cloud TPUs); None for a process by itself.
      count: of the processes; not with `cluster`.
      index: of this one, from 0; not with `cluster`.
      wait: seconds for the processes to find each other.

    Raises:
      ValueError: for settings that do not go together.
      ConnectionError: if nothing answers at the coordinator, or the first process cannot serve there.
    """
    _check(coordinator, count, index)
    if coordinator is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    jax.config.update("jax_enable_recoverability", True)  # else the death of one aborts the others without a word
    # CPUs would run independent programs in another order in each process, and what they send would meet another's.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    settings: dict[str, Any] = {"initialization_timeout": int(wait), "heartbeat_timeout_seconds": _HEARTBEAT}
    if coordinator != "cluster":
        _find(coordinator, index == 0, wait)
        settings |= {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    jax.distributed.initialize(**settings, cluster_detection_method=None if coordinator == "cluster" else "deactivate")
    if jax.default_backend() == "cpu":
        # Programs that are read back there send in another order than they were compiled to (seen with jax 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)
    me = f"process {jax.process_index()} ({socket.gethostname()}, {os.getpid()})"
    over = threading.Event()
    with socket.create_server(("", 0), backlog=jax.process_count()) as server:
        names, ports = exchange("names", me), exchange("ports", server.getsockname()[1])
        watcher = threading.Thread(target=_watch, args=(names, over), daemon=True)
        watcher.start()
        if not is_first():
            threading.Thread(target=_watch_first, args=(names, ports[0], over), daemon=True).start()
        with _left(me, over, watcher), contextlib.nullcontext() if is_first() else _silent():
            yield


@contextlib.contextmanager
def _left(me: str, over: threading.Event, watcher: threading.Thread) -> Iterator[None]:
    """Leaves the others when the block ends, and says why if it fails."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            exchange("done", None)  # of all, after the same step; one may be busy with its checkpoint for long
        else:
            _tell(me, error, over)
        raise
    else:
        exchange("done", None)
    finally:
        over.set()
        watcher.join()  # a thread that the interpreter finds within the service as it ends aborts it
        _leave()


def _service() -> Any:
    return distributed.global_state.client


def exchange(name: str, value: Any) -> list[Any]:
    """What each process says, in their order.

    Args:
      name: of what is exchanged. Names of one kind may be exchanged by several threads at a time.
      value: of JSON.
    """
    if jax.process_count() == 1:
        return [value]
    number = _counts[name]
    _counts[name] += 1
    service, index = _service(), jax.process_index()
    service.key_value_set(f"grpo_jax/{name}/{number}/{index}", json.dumps(value))
    said = [
        value if i == index else json.loads(service.blocking_key_value_get(f"grpo_jax/{name}/{number}/{i}", _WEEK))
        for i in range(jax.process_count())
    ]
    if number:  # which everyone has read, or they had not come to this one
        service.key_value_delete(f"grpo_jax/{name}/{number - 1}/{index}")
    return said


@contextlib.contextmanager
def alike(name: str) -> Iterator[None]:
    """If the block raises in one process, it raises in all.

    Raises:
      ProcessError: for an exception of another process, with its text.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if (found := shared_error(name, error)) is not None:
        raise found


def shared_error(name: str, error: Exception | None) -> Exception | None:
    """The exception of this process, or else that of another, as a `ProcessError`; None where there is none."""
    told = None if error is None else f"{type(error).__name__}: {error}"
    others = [(i, text) for i, text in enumerate(exchange(name, told)) if text is not None]
    if error is not None or not others:
        return error
    return ProcessError(f"in process {others[0][0]}: {others[0][1]}")


def agree(name: str, *, seconds: float) -> bool:
    """Whether all processes come here within some seconds."""
    if jax.process_count() == 1:
        return True
    number = _counts[name]
    _counts[name] += 1
    try:
        _service().wait_at_barrier(f"grpo_jax/{name}/{number}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def is_spread(array: Any) -> bool:
    """Whether an array has parts that only other processes hold."""
    sharding = getattr(array, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable and not sharding.is_fully_replicated


def whole(tree: Any) -> Any:
    """The same tree of NumPy arrays, gathered from all processes, in each of them."""
    return jax.tree.map(
        lambda x: multihost_utils.process_allgather(x, tiled=True) if is_spread(x) else np.asarray(x), tree
    )


def blocks(array: Any) -> Iterator[np.ndarray]:
    """An array in pieces along its first axis, each gathered from all processes: the host never holds all of it."""
    if not is_spread(array):
        yield np.asarray(array)
        return
    rows = max(1, _BLOCK * array.shape[0] // max(1, array.size * array.dtype.itemsize))
    for start in range(0, array.shape[0], rows):
        yield whole(array[start : start + rows])


def own_rows(tree: Tree, of: Array) -> tuple[np.ndarray, Tree]:
    """The rows that this process looks after, such as groups whose rewards it computes, as NumPy arrays.

    Each row is one process's: of those on whose devices all of it lies, or of any of them where it lies on no one's.

    Args:
      tree: of arrays with leading axis `B`.
      of: the array `[B, ...]` that says where rows lie.

    Returns:
      Their numbers, in order, and the tree with these rows.
    """
    B, count = of.shape[0], jax.process_count()
    owners = np.zeros(B, int) if count == 1 else _owners(_held(of))
    own = np.flatnonzero(owners == jax.process_index())

    def rows_of(x: Any) -> np.ndarray:
        if not is_spread(x):
            return np.asarray(x)[own]
        if not _held(x)[owners, np.arange(B)].all():
            return np.asarray(whole(x))[own]
        rows = np.empty((len(own), *x.shape[1:]), x.dtype)
        for shard in x.addressable_shards:
            first, *others = shard.index
            start, stop, _ = first.indices(B)
            there = np.flatnonzero((own >= start) & (own < stop))
            rows[(there, *others)] = np.asarray(shard.data)[own[there] - start]
        return rows

    return own, jax.tree.map(rows_of, tree)


def beside(array: Any, x: np.ndarray) -> Array:
    """An array of leading axis `B`, which each process has whole, with its rows where those of another lie.

    Each process puts down the rows that are on its devices. Where the other lies on no mesh, nor does this.
    """
    where = getattr(array, "sharding", None)
    if not isinstance(where, jax.NamedSharding):
        return jnp.asarray(x)
    rows = jax.NamedSharding(where.mesh, jax.P(*where.spec[:1]))
    return jax.make_array_from_callback(x.shape, rows, x.__getitem__)


def _held(array: Any) -> np.ndarray:
    """Which rows of an array lie whole on the devices of a process; `[processes, B]` bool."""
    B, count = array.shape[0], jax.process_count()
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.ones((count, B), bool)
    there = np.zeros((count, B), int)
    places: dict[Any, Any] = dict(array.sharding.devices_indices_map(array.shape))
    parts = {(device.process_index, str(index)): index for device, index in places.items()}
    for (process, _), (rows, *others) in parts.items():
        sizes = [len(range(*part.indices(n))) for part, n in zip(others, array.shape[1:], strict=True)]
        there[process, rows] += int(np.prod(sizes))
    return there == int(np.prod(array.shape[1:]))


def _owners(held: np.ndarray) -> np.ndarray:
    """A process for each row of `held [processes, B]`; rows that several hold are divided among them."""
    owners = np.zeros(held.shape[1], int)
    kinds, kind_of = np.unique(held, axis=1, return_inverse=True)
    for number, kind in enumerate(kinds.T):
        rows = np.flatnonzero(kind_of.ravel() == number)
        holders = np.flatnonzero(kind) if kind.any() else np.arange(len(kind))
        owners[rows] = holders[np.arange(len(rows)) * len(holders) // len(rows)]
    return owners


def _check(coordinator: str | None, count: int | None, index: int | None) -> None:
    if coordinator in (None, "cluster"):
        if count is not None or index is not None:
            said = "the cluster says" if coordinator else "without a coordinator there are no"
            raise ValueError(f"{count} processes, of which this is {index}: {said} how many processes there are")
        return
    assert coordinator is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"the coordinator is HOST:PORT, as in 10.0.0.1:1234, or cluster; got {coordinator!r}")
    if count is None or index is None or count < 1:
        raise ValueError(
            f"with a coordinator, say how many processes there are and which this is; got {count}, {index}"
        )
    if not 0 <= index < count:
        raise ValueError(f"{count} processes have the numbers 0 to {count - 1}, got {index}")


def _find(coordinator: str, serves: bool, wait: float) -> None:
    """Refuses an address where the first process cannot serve, or does not: JAX would abort."""
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if serves:
        try:
            with socket.create_server(("", int(port))):
                return
        except OSError as error:
            raise ConnectionError(f"the first process cannot serve at port {port}: {error.strerror}") from error
    end = time.monotonic() + wait
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(
                    f"nothing answers at {coordinator} after {wait:g} s ({error}): start process 0 there, or name the "
                    "host that it runs on"
                ) from error
        time.sleep(0.2)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _watch(names: list[str], over: threading.Event) -> None:
    """Ends this process after another has ended or died, and says which."""
    service, everyone = _service(), range(len(names))
    while not over.is_set():
        told, grace = None, _GRACE
        try:
            told = service.blocking_key_value_get("grpo_jax/ended", 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                told, grace = f"{names[0]}, the coordinator, does not answer: it has died", 0.0
        if told is None:
            try:
                living = service.get_live_nodes([*everyone])
            except jax.errors.JaxRuntimeError:
                continue  # of the coordinator, too
            if dead := [names[i] for i in everyone if i not in living]:
                told, grace = f"{' and '.join(dead)} has died, or its host is out of reach", 0.0
        if told is not None and not over.wait(grace):
            _end(told, names)


def _watch_first(names: list[str], port: int, over: threading.Event) -> None:
    """Says that the first process has died: it serves the others, and JAX aborts them at once without its name."""
    host = str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as connection:
        connection.settimeout(None)
        with contextlib.suppress(ConnectionResetError):
            connection.recv(1)  # which is never sent: the connection ends with the process
        if not over.is_set():
            _end(f"{names[0]}, the coordinator, has died", names)


def _end(told: str, names: list[str]) -> None:
    os.write(2, f"\n{told}; so {names[jax.process_index()]} ends, too. The same command goes on.\n".encode())
    os._exit(1)


def _tell(me: str, error: BaseException, over: threading.Event) -> None:
    """Lets the other processes know that this one ends. Where a program failed, another may have died: that is said."""
    if isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and _STATUS.match(str(error))):
        over.wait(_HEARTBEAT + 10)  # `_watch` ends this process if one is found dead
    if isinstance(error, SystemExit):
        reason = f"exit status {error.code}"
    else:
        reason = traceback.format_exception_only(error)[-1].strip()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _service().key_value_set("grpo_jax/ended", f"{me} ended: {reason[:2000]}")


def _leave() -> None:
    """Disconnects, the first process last, since it serves the others."""
    service = _service()
    if is_first():
        end = time.monotonic() + _GRACE + 5
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while len(service.get_live_nodes([*range(jax.process_count())])) > 1 and time.monotonic() < end:
                time.sleep(0.1)
    sys.stdout.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()
