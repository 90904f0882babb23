"""One event loop for all that is async: it goes on whatever runs on it."""

import asyncio
import sys

import pytest

from grpo_jax.event_loop import all_of, run_async


async def number(n):
    await asyncio.sleep(0)
    return n


def test_results_come_together_and_from_one_loop():
    async def loop():
        return asyncio.get_running_loop()

    assert run_async(all_of(map(number, range(3)))) == [0, 1, 2]
    assert run_async(loop()) is run_async(loop())


def test_where_one_raises_the_others_are_cancelled_before_that_is_told():
    cancelled = []

    async def waits():
        try:
            await asyncio.sleep(9)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    async def raises():
        await asyncio.sleep(0)
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        run_async(all_of([waits(), raises(), waits()]))
    assert cancelled == [1, 1]


def test_the_loop_outlives_an_exit_and_what_takes_too_long():
    async def leaves():
        await asyncio.sleep(0)
        sys.exit(3)

    with pytest.raises(SystemExit):
        run_async(leaves())
    with pytest.raises(TimeoutError):
        run_async(asyncio.sleep(9), timeout=0.01)
    assert run_async(number(2)) == 2


def test_a_function_of_the_loop_may_wait_for_another():
    async def waits():
        return run_async(number(5))

    assert run_async(waits()) == 5
