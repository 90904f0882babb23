"""What `train_loop.py` leaves behind when it is killed for real, against what it leaves undisturbed.

A nightly run may set `GRPO_KILL_STRIDE=1` to kill at every file event there is, about fifty processes.
"""

import os
import pathlib
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
import train_loop

from grpo_jax.run import checkpoint, metrics, preemption

STRIDE = os.environ.get("GRPO_KILL_STRIDE", "7")
PLANS = [
    "undisturbed=finish",
    f"between_files=files:4:{STRIDE}",
    *("within_files=writing", "within_files=writing", "within_files=finish"),
    *("asked=stop:4", "asked=finish"),
    "locked=finish",
]


class Process(NamedTuple):
    plan: str
    status: int
    newest: int  # checkpoint


class Outcome(NamedTuple):
    folder: pathlib.Path
    processes: dict[str, list[Process]]  # of each run
    errors: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, train_loop.__file__, folder, *PLANS]
    with preemption.lock(folder / "locked"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    processes = {}
    for name, plan, *numbers in map(str.split, done.stdout.splitlines()):
        processes.setdefault(name, []).append(Process(plan, *map(int, numbers)))
    return Outcome(folder, processes, done.stderr)


def assert_ended_as_if_undisturbed(folder: pathlib.Path, name: str) -> None:
    states = []
    for run_dir in (folder / "undisturbed", folder / name):
        with checkpoint.manager(run_dir / "checkpoints", read_only=True) as checkpoints:
            states.append(checkpoint.restore(checkpoints, train_loop.initial_state())[0])
    assert int(states[0].step) == train_loop.STEPS
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        a, b = (jax.random.key_data(x) if path[0].name == "key" else x for x in (a, b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)

    lines = [(folder / run / metrics.METRICS_FILE).read_bytes() for run in ("undisturbed", name)]
    assert lines[0].count(b"\n") == train_loop.STEPS
    assert lines[0] == lines[1]
    completions = [(folder / run / metrics.COMPLETIONS_FILE).read_bytes() for run in ("undisturbed", name)]
    assert completions[0] == completions[1] != b""
    assert {"6", "8"} <= set(os.listdir(folder / name / "checkpoints")) <= {"4", "5", "6", "8"}  # and no leftovers
    assert sorted(os.listdir(folder / name)) == sorted(os.listdir(folder / "undisturbed"))


@pytest.mark.slow
def test_killed_between_any_two_files_and_resumed_a_run_ends_as_if_undisturbed(outcome):
    *killed, last = outcome.processes["between_files"]
    assert all(process.status == -9 for process in killed)
    assert last.status == 0
    assert {process.newest for process in killed} > {0, 2}  # before the first checkpoint, and after one
    assert_ended_as_if_undisturbed(outcome.folder, "between_files")


def test_killed_while_it_writes_arrays_and_resumed_a_run_ends_as_if_undisturbed(outcome):
    *killed, last = outcome.processes["within_files"]
    assert {process.status for process in killed} <= {-9, 0}  # 0 if it was too quick to be caught
    assert last.status == 0
    assert_ended_as_if_undisturbed(outcome.folder, "within_files")


def test_asked_to_stop_a_run_saves_the_step_it_is_in_and_ends_well(outcome):
    asked, resumed = outcome.processes["asked"]
    assert asked == Process("stop:4", preemption.STOPPED, newest=5)
    assert resumed.status == 0
    assert_ended_as_if_undisturbed(outcome.folder, "asked")


def test_a_second_run_in_a_folder_is_refused_and_told_who_is_there(outcome):
    assert outcome.processes["locked"] == [Process("finish", 1, newest=0)]
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"{outcome.folder / 'locked'} is in use by {holder}; stop it or use another" in outcome.errors
    assert os.listdir(outcome.folder / "locked") == ["run.lock"]
