"""grpo.py as two processes of one device each: the run of one process with two devices, and interchangeable with it."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from compiling import QUICKLY

from grpo_jax import testing

ROOT = pathlib.Path(__file__).parents[2]
REWARD = """
import jax

def brevity(completions, trainer_state):
    if trainer_state.global_step == 1 and jax.process_index() == jax.process_count() - 1:
        raise KeyError("of one process")
    return [1.0 / (1 + len(completion)) for completion in completions]

def length(completions):
    return [1.0 * len(completion) for completion in completions]
"""
SETTINGS = {
    "model": "model", "data": "data.jsonl", "reward": "my_rewards:brevity", "compute-dtype": "float32",
    "mesh": "fsdp=2", "prompts-per-step": 4, "group-size": 2, "max-tokens": 6, "bucket": 32,
    "learning-rate": 1e-3, "warmup-steps": 1, "save-every": 1, "show-every": 1,
}  # fmt: skip


def run(folder, processes=1, **changes):
    """Runs grpo.py as one process with two devices, or as two with one each; the processes, ended."""
    flags = f"--xla_force_host_platform_device_count={2 // processes} {QUICKLY}"
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    given = {name: value for name, value in (SETTINGS | changes).items() if value is not None}
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, str(ROOT / "experiments/grpo.py"), *options]
    commands = [command]
    if processes > 1:
        with socket.create_server(("", 0)) as server:
            place = f"127.0.0.1:{server.getsockname()[1]}"
        commands = [
            [*command, "--coordinator", place, "--processes", str(processes), "--process-id", str(i)]
            for i in range(processes)
        ]
    started = [
        subprocess.Popen(c, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    return [subprocess.CompletedProcess(p.args, p.returncode, *out) for p in started for out in [p.communicate()]]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    testing.tiny_checkpoint(tmp_path / "model")
    rows = [{"prompt": f"What is {a} + {b}?"} for a in range(4) for b in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    return tmp_path


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_also_where_one_of_them_fails_to_reward_and_one_goes_on(folder):
    (whole,) = run(folder, **{"run-dir": "one", "steps": 3})
    assert whole.returncode == 0, whole.stderr[-3000:]
    first, second = run(folder, processes=2, **{"run-dir": "two", "steps": 2})
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-2000:] + second.stderr[-2000:]
    assert "failed on a batch" in second.stderr
    assert "KeyError: 'of one process'" in first.stderr
    assert "step 2/2" in first.stdout
    assert "step" not in second.stdout
    (resumed,) = run(folder, **{"run-dir": "two", "steps": 3})
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed at step 2" in resumed.stdout

    one, two = (lines(folder / d / "completions.jsonl") for d in ("one", "two"))
    assert [line["completion"] for line in two] == [line["completion"] for line in one]
    assert [line.get("brevity/failed") for line in lines(folder / "two/metrics.jsonl")] == [0.0, 1.0, 0.0]
    expected, found = (safetensors.numpy.load_file(folder / d / "step_3/model.safetensors") for d in ("one", "two"))
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_two_processes_sample_ahead_and_go_on_with_the_batch_in_flight(folder):
    ahead = {"overlap": True, "reward": "my_rewards:length"}
    (whole,) = run(folder, **ahead, **{"run-dir": "one", "steps": 3})
    assert whole.returncode == 0, whole.stderr[-3000:]
    for steps in (1, 3):
        first, second = run(folder, processes=2, **ahead, **{"run-dir": "two", "steps": steps})
        assert (first.returncode, second.returncode) == (0, 0), first.stderr[-2000:] + second.stderr[-2000:]
    assert "resumed at step 1 of 3" in first.stdout
    one, two = (lines(folder / d / "completions.jsonl") for d in ("one", "two"))
    assert [line["completion"] for line in two] == [line["completion"] for line in one]


@pytest.mark.slow
def test_a_mesh_is_asked_for_where_there_are_several_processes(folder):
    for process in run(folder, processes=2, **{"run-dir": "refused", "mesh": None}):
        assert process.returncode == 1
        assert "say how the 2 devices of the 2 processes share the work: --mesh fsdp=2" in process.stderr
