"""What answers the policy: plain functions that see a conversation and say what comes next.

    def respond(row, messages):
        said = messages[-1]["content"].strip()
        if not said.isdecimal():
            return Turn("a number, please", reward=0.0)
        if int(said) == row["number"]:
            return Turn(None, reward=1.0)                 # the conversation is over
        return Turn("higher" if int(said) < row["number"] else "lower", reward=0.0)

They may be `async`. `sampling.conversations` calls one for all conversations that wait, together. A reward of None is
none: conversations in which no turn has one are masked, whereas 0 is compared with the others. So are those in which
the function raises.
"""

import asyncio
import contextlib
import inspect
import math
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from grpo_jax.event_loop import all_of, is_cancelled, leave_loop_if_held_up, run_async
from grpo_jax.user_code import put_back

if TYPE_CHECKING:  # the reader of data sets imports JAX, which a worker process does without
    from grpo_jax.data import Row

Message = Mapping[str, str]  # role and content
LARGEST = 1e30  # of a reward: of a larger one, sums over turns and groups may not fit into float32
THREADS = 64  # plain functions that are called at a time
RAISED = BaseException  # in threads, where what is no Exception, such as some libraries' timeouts, would pass unsaid


class Turn(NamedTuple):
    """What an environment answers."""

    content: str | Sequence[Message] | None  # text of the user's role; messages of other roles; None ends it all
    reward: float | None = None  # for the policy's turn that is answered
    earlier: Sequence[tuple[int, float]] = ()  # more for turns before it, by their numbers from 0: what is known now


class Respond(Protocol):
    """An environment: answers a turn of the policy, plain or `async`; those that wait are called together."""

    def __call__(self, row: "Row", messages: list[Message], /) -> Any:
        """Answers.

        Args:
          row: of the data set, the conversation's own copy, which may be changed to remember.
          messages: so far, the policy's turn last.

        Returns:
          A `Turn`, or None to end the conversation; awaitable where it is `async`.
        """


class Failure(NamedTuple):
    """Why an environment gave no answer."""

    message: str


def answers(
    respond: Respond, conversations: Sequence[tuple["Row", list[Message]]], *, timeout: float
) -> list[Turn | Failure]:
    """Calls an environment for several conversations together.

    Plain functions run in threads; `async` ones on one event loop. A function that has not returned in time is left
    behind, since Python cannot stop it. One with an attribute `together` is called as
    `together(conversations, timeout) -> list[Turn | None | Failure]` instead (`environment_workers`).

    Args:
      respond: `(row, messages) -> Turn | None`; None is `Turn(None)`.
      conversations: rows, which a function may change, and the messages so far.
      timeout: seconds for each.

    Returns:
      An answer for each, or a failure by an exception, by no answer in time or by something else than a turn.
    """
    if (together := getattr(respond, "together", None)) is not None:
        return [*map(_checked, together(conversations, timeout))]
    outcomes: dict[int, Any] = {}
    run = _run_async if inspect.iscoroutinefunction(respond) else _run_in_threads
    with put_back(f"the environment {getattr(respond, '__name__', type(respond).__name__)}"):
        run(respond, conversations, timeout, outcomes)
    if len(outcomes) < len(conversations):
        leave_loop_if_held_up()
    late = Failure(f"it has not answered within {timeout:g} s")
    return [_checked(outcomes.get(i, late)) for i in range(len(conversations))]


def _run_in_threads(
    respond: Respond, conversations: Sequence[tuple["Row", list[Message]]], timeout: float, outcomes: dict[int, Any]
) -> None:
    changed, waiting, deadlines = threading.Condition(), iter(range(len(conversations))), dict[int, float]()
    given_up: set[int] = set()

    def work() -> None:
        while True:
            with changed:
                i = next(waiting, None)
                if i is None:
                    return
                deadlines[i] = time.monotonic() + timeout
                changed.notify()
            outcome = _attempt(respond, conversations[i])
            with changed:
                if i in given_up:
                    return
                del deadlines[i]
                outcomes[i] = outcome
                changed.notify()

    def start() -> None:
        # Daemons, so that one that hangs does not keep the program from ending.
        threading.Thread(target=work, name="environment", daemon=True).start()

    for _ in range(min(THREADS, len(conversations))):
        start()
    with changed:
        while len(outcomes) + len(given_up) < len(conversations):
            changed.wait(max(0.0, min(deadlines.values(), default=math.inf) - time.monotonic()) if deadlines else None)
            for i in [i for i, deadline in deadlines.items() if deadline <= time.monotonic()]:
                del deadlines[i]
                given_up.add(i)
                start()


def _run_async(
    respond: Respond, conversations: Sequence[tuple["Row", list[Message]]], timeout: float, outcomes: dict[int, Any]
) -> None:
    async def one(i: int) -> None:
        with contextlib.suppress(TimeoutError):  # its own TimeoutError is a failure below
            async with asyncio.timeout(timeout):
                outcomes[i] = await _attempt_async(respond, conversations[i])

    async def together() -> None:
        await all_of(map(one, range(len(conversations))))

    # One that never yields must not hold this thread.
    with contextlib.suppress(TimeoutError):
        run_async(together(), timeout=timeout + 1.0)


def _attempt(respond: Respond, conversation: tuple["Row", list[Message]]) -> Any:
    try:
        answer = respond(*conversation)
        return run_async(answer) if inspect.iscoroutine(answer) else answer  # of an object whose `__call__` is async
    except RAISED:
        return Failure(f"it raised\n{traceback.format_exc()}")


async def _attempt_async(respond: Respond, conversation: tuple["Row", list[Message]]) -> Any:
    try:
        return await respond(*conversation)
    except RAISED as error:
        cancelled = isinstance(error, asyncio.CancelledError) and is_cancelled()  # out of time, not of its own
        if cancelled or isinstance(error, GeneratorExit):
            raise
        return Failure(f"it raised\n{traceback.format_exc()}")


def _checked(outcome: Any) -> Turn | Failure:
    if outcome is None:
        return Turn(None)
    if isinstance(outcome, Failure):
        return outcome
    if not isinstance(outcome, Turn):
        return Failure(f"it returned {type(outcome).__name__}, and not a Turn or None")
    content, reward, earlier = outcome
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if content is not None:
        fits = isinstance(content, Sequence) and all(isinstance(message, Mapping) for message in content)
        if not fits or not any(message.get("content") for message in content):
            return Failure(f"it returned no text: {outcome.content!r}; Turn(None) or None ends a conversation")
        for message in content:
            content_of, role = message.get("content"), message.get("role")
            if not isinstance(content_of, str) or not isinstance(role, str) or role in ("", "assistant", "system"):
                return Failure(f"a message of it is not a text of another role than the policy's: {message!r}")
        # Half of a pair of surrogates, as a policy may write it in JSON, is no text to a tokenizer.
        content = [{**message, "content": message["content"].encode(errors="replace").decode()} for message in content]
    if reward is not None:
        if not abs(number := _number(reward)) < LARGEST:  # not so for NaN
            return Failure(f"its reward is {reward!r}, and not a finite number (below {LARGEST:g}) or None")
        reward = number
    try:
        earlier = tuple((int(turn), float(more)) for turn, more in earlier)
        fits = all(turn >= 0 and abs(more) < LARGEST for turn, more in earlier)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        return Failure(f"its rewards of earlier turns are {outcome.earlier!r}, and not pairs of a turn and a number")
    return Turn(content, reward, earlier)


def _number(value: Any) -> float:
    try:
        # Python makes a number of text, and NumPy before 2.4 of an array of one element.
        return math.nan if isinstance(value, str | bytes) or getattr(value, "ndim", 0) > 0 else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
