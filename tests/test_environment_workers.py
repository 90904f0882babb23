"""Environments in worker processes: those that hang or crash cost their own conversation, and state comes back."""

import importlib.util
import sys

import pytest

from grpo_jax.environment_workers import in_worker_processes
from grpo_jax.environments import Failure, Turn, answers

MODULE = """
import asyncio
import os
import time

import numpy

def respond(row, messages):
    row["seen"] = row.get("seen", 0) + 1
    how = messages[-1]["content"]
    if how == "hang":
        time.sleep(60)
    if how == "crash":
        os._exit(3)
    if how == "raise":
        raise KeyError("no such city")
    if how == "much":
        return ("x" * 1_200_000, None)
    if how == "set":
        return ({1, 2}, None)
    if how == "number":
        return 3
    if how == "text":
        return "7"
    if how == "object":
        return {"content": "x"}
    if how == "arrays":
        row["board"] = numpy.ones((2, 2), int)
        return (None, numpy.float32(0.5))
    if how == "end":
        return None
    return (f"{row['answer']} {row['seen']}", 0.5)

LOOPS = set()

async def patient(row, messages):
    await asyncio.sleep(0.01)
    LOOPS.add(asyncio.get_running_loop())
    return (f"waited on {len(LOOPS)}", None)
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("environment") / "worked_environment.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("worked_environment", path)
    sys.modules["worked_environment"] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules["worked_environment"]


FAULTS = {
    "hang": "has not answered within 1.5 s",
    "crash": "ended with the fault 'lost'",
    "raise": "KeyError: 'no such city'",
    "much": "its answer has more than 1048576 bytes",
    "set": "is not JSON serializable",
    "number": "it returned [3, ",
    "text": "it returned ['7', ",
    "object": "it returned [{'content': 'x'}, ",
}


def test_what_hangs_or_crashes_costs_its_own_conversation_and_the_row_comes_back(module):
    hows = ["well", *FAULTS, "end", "well"]
    rows = [{"answer": n, "seen": 4} for n in range(len(hows))]
    said = [(row, [{"role": "assistant", "content": how}]) for row, how in zip(rows, hows, strict=True)]
    made = in_worker_processes(module.respond, workers=2)
    given = answers(made, said, timeout=1.5)
    told = [{"role": "user", "content": f"{n} 5"} for n in range(len(hows))]
    assert given[0] == Turn([told[0]], 0.5)
    assert given[-2] == Turn(None)
    assert given[-1] == Turn([told[-1]], 0.5)
    for how, failure in zip(hows[1:-2], given[1:-2], strict=True):
        assert isinstance(failure, Failure)
        assert FAULTS[how] in failure.message
    assert [row["seen"] for row in rows] == [5 if how in ("well", "end") else 4 for how in hows]


def test_a_row_may_be_large(module):
    row = {"answer": 1, "board": "x" * 200_000}
    made = in_worker_processes(module.respond, workers=1)
    ((content, *_),) = answers(made, [(row, [{"role": "assistant", "content": "well"}])], timeout=10.0)
    assert content == [{"role": "user", "content": "1 1"}]
    assert len(row["board"]) == 200_000


def test_numbers_of_numpy_come_back_as_those_of_json(module):
    row = {}
    made = in_worker_processes(module.respond, workers=1)
    given = answers(made, [(row, [{"role": "assistant", "content": "arrays"}])], timeout=10.0)
    assert given == [Turn(None, 0.5)]
    assert row == {"seen": 1, "board": [[1, 1], [1, 1]]}


def test_one_that_is_async_is_awaited_there_on_one_event_loop(module):
    made = in_worker_processes(module.patient, workers=1)
    assert answers(made, [({}, [])] * 2, timeout=10.0) == [Turn([{"role": "user", "content": "waited on 1"}])] * 2


def test_settings_out_of_range_and_functions_that_workers_cannot_find_are_refused():
    with pytest.raises(ValueError, match="at least 1 worker, got 0"):
        in_worker_processes(lambda row, messages: None, workers=0)
    with pytest.raises(ValueError, match=r"top level of a \.py file"):
        in_worker_processes(lambda row, messages: None)
