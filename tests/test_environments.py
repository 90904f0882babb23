"""Environments are called together, in time, and what is no answer is told."""

import asyncio
import threading
import time

import numpy as np
import pytest

from grpo_jax.environments import THREADS, Failure, Turn, answers


def conversations(count):
    return [({"number": n}, [{"role": "user", "content": str(n)}]) for n in range(count)]


def number_of(row, messages):
    return Turn(messages[-1]["content"], reward=row["number"])


async def number_of_async(row, messages):
    await asyncio.sleep(0.01)
    return number_of(row, messages)


class Game:
    """An object whose call is async, which no function tells of."""

    async def __call__(self, row, messages):
        return await number_of_async(row, messages)


@pytest.mark.parametrize("respond", [number_of, number_of_async, Game()], ids=["plain", "async", "object"])
def test_each_conversation_gets_its_own_answer(respond):
    given = answers(respond, conversations(100), timeout=5.0)
    assert given == [Turn([{"role": "user", "content": str(n)}], float(n)) for n in range(100)]


def test_plain_functions_wait_together():
    together = threading.Barrier(20)

    def respond(row, messages):
        together.wait(timeout=5.0)

    assert answers(respond, conversations(20), timeout=6.0) == [Turn(None)] * 20


def hangs(row, messages):
    if row["number"] % 2:
        time.sleep(3)
    return number_of(row, messages)


async def hangs_async(row, messages):
    if row["number"] % 2:
        await asyncio.sleep(3)
    return number_of(row, messages)


@pytest.mark.parametrize("respond", [hangs, hangs_async])
def test_those_that_hang_are_left_behind_and_the_others_answer(respond):
    count, begun = 2 * THREADS + 10, time.monotonic()
    given = answers(respond, conversations(count), timeout=0.4)
    assert time.monotonic() - begun < 3
    assert [isinstance(answer, Failure) for answer in given] == [bool(n % 2) for n in range(count)]
    assert given[1].message == "it has not answered within 0.4 s"


def test_an_event_loop_that_is_held_up_does_not_hold_up_the_run():
    async def respond(row, messages):
        time.sleep(4)

    begun = time.monotonic()
    assert all(isinstance(answer, Failure) for answer in answers(respond, conversations(3), timeout=0.2))
    assert time.monotonic() - begun < 3
    assert answers(number_of_async, conversations(1), timeout=5.0) == [Turn([{"role": "user", "content": "0"}], 0.0)]


def test_a_timeout_of_the_functions_own_is_a_failure_with_its_traceback():
    async def respond(row, messages):
        raise TimeoutError("the server")

    (given,) = answers(respond, conversations(1), timeout=1.0)
    assert "TimeoutError: the server" in given.message


async def cancelled(row, messages):
    task = asyncio.create_task(asyncio.sleep(9))
    await asyncio.sleep(0)
    if row["number"] == 3:
        task.cancel()
        await task
    return number_of(row, messages)


def cancelled_at_once(row, messages):
    if row["number"] == 3:
        raise asyncio.CancelledError
    return number_of(row, messages)


class OutOfTime(BaseException):
    """As that of func_timeout."""


def times_out(row, messages):
    raise OutOfTime


async def times_out_later(row, messages):
    await asyncio.sleep(0)
    raise OutOfTime


@pytest.mark.parametrize("respond", [times_out, times_out_later])
def test_what_is_no_exception_of_pythons_is_a_failure_at_once(respond):
    begun = time.monotonic()
    (given,) = answers(respond, conversations(1), timeout=9.0)
    assert time.monotonic() - begun < 5
    assert "OutOfTime" in given.message


@pytest.mark.parametrize("respond", [cancelled, cancelled_at_once])
def test_a_cancelled_task_is_the_failure_of_its_own_conversation(respond):
    begun = time.monotonic()
    given = answers(respond, conversations(20), timeout=5.0)
    assert time.monotonic() - begun < 4
    assert [n for n, answer in enumerate(given) if isinstance(answer, Failure)] == [3]
    assert "CancelledError" in given[3].message


def test_a_client_may_be_kept_from_one_call_to_the_next_as_it_belongs_to_one_event_loop():
    loops = set()

    async def respond(row, messages):
        loops.add(asyncio.get_running_loop())
        return Turn(None)

    for _ in range(2):
        assert answers(respond, conversations(3), timeout=5.0) == [Turn(None)] * 3
    assert len(loops) == 1


def test_half_of_a_pair_of_surrogates_is_replaced_as_no_tokenizer_takes_it():
    (given,) = answers(lambda row, messages: Turn("a\ud83d b"), conversations(1), timeout=5.0)
    assert given.content == [{"role": "user", "content": "a? b"}]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ("text", "returned str, and not a Turn"),
        (Turn(""), "no text: ''"),
        (Turn([]), r"no text: \[\]"),
        (Turn(3), "no text: 3"),
        (Turn([{"role": "user", "content": None}]), "no text"),
        (Turn([{"role": "tool", "content": "a"}, {"role": "tool", "content": 3}]), "not a text of another role"),
        (Turn([{"role": "system", "content": "a"}]), "not a text of another role"),
        (Turn("a", float("nan")), "reward is nan"),
        (Turn("a", "3"), "reward is '3'"),
        (Turn("a", b"3"), "reward is b'3'"),
        (Turn("a", np.ones(1)), "reward is array"),
        (Turn("a", 1e39), r"reward is 1e\+39"),  # infinite in float32
        (Turn("a", 1.0, [(0, -1e39)]), "rewards of earlier turns are"),
        (Turn([{"role": ["user"], "content": "a"}]), "not a text of another role"),
        (Turn("a", 1.0, [(0, float("nan"))]), "rewards of earlier turns are"),
        (Turn("a", 1.0, {0: 1.0}), "not pairs of a turn and a number"),
        (Turn("a", 1.0, [(-1, 1.0)]), "not pairs of a turn and a number"),
        (Turn("a", [1.0, 2.0]), r"reward is \[1.0, 2.0\]"),
    ],
)
def test_what_is_no_answer_is_told(outcome, message):
    (given,) = answers(lambda row, messages: outcome, conversations(1), timeout=1.0)
    assert isinstance(given, Failure)
    with pytest.raises(ValueError, match=message):
        raise ValueError(given.message)


@pytest.mark.parametrize("reward", [True, np.float32(1), np.int64(1), np.bool_(True)], ids=str)
def test_a_reward_may_be_whatever_is_a_number(reward):
    assert answers(lambda row, messages: Turn(None, reward), conversations(1), timeout=1.0) == [Turn(None, 1.0)]


def test_sys_exit_ends_no_run():
    def respond(row, messages):
        raise SystemExit(3)

    (given,) = answers(respond, conversations(1), timeout=1.0)
    assert "SystemExit: 3" in given.message
