"""One event loop for what is `async`: environments, tools, rewards, servers.

```python
results = run_async(all_of(ask(question) for question in questions))
```
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Coroutine, Iterable
from typing import Any


def run_async(coroutine: Coroutine[Any, Any, Any], *, timeout: float | None = None) -> Any:
    """The result of a coroutine, on an event loop in a thread: a notebook has a running loop already.

    It is one loop for the whole process, as TRL's: a client that a function keeps from one call to the next belongs to
    the loop of the first.

    Raises:
      TimeoutError: where it has not returned after `timeout` seconds.
    """
    loop = _loop()
    if _is_running(loop):  # called by one of the loop's own functions, which would wait for itself
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, coroutine).result(timeout)
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result(timeout)
    except BaseException:
        future.cancel()
        raise


def leave_loop_if_held_up() -> None:
    """Has later coroutines run on another event loop, if something that never yields holds this one up."""
    try:
        run_async(asyncio.sleep(0), timeout=1.0)
    except TimeoutError:
        with _LOOP:
            _loop_of.cache_clear()


async def all_of(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Their results, waited for together; where one raises, the others are cancelled, since the loop goes on."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


_LOOP = threading.Lock()  # so that functions which are called together get the same loop


def _loop() -> asyncio.AbstractEventLoop:
    with _LOOP:
        return _loop_of(os.getpid())  # a process that is forked has no thread of its parent


@functools.cache
def _loop_of(process: int) -> asyncio.AbstractEventLoop:
    del process
    loop = asyncio.new_event_loop()

    def run() -> None:
        while True:
            with contextlib.suppress(SystemExit, KeyboardInterrupt):  # of a task, which has it as its exception
                loop.run_forever()

    threading.Thread(target=run, name="async", daemon=True).start()
    return loop


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def is_cancelled() -> bool:
    """Whether the present task is cancelled itself, and not a task that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
