"""grpo.py over several devices, a process for each run: it draws what one device draws, and resumes elsewhere."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from compiling import QUICKLY

from grpo_jax import testing

ROOT = pathlib.Path(__file__).parents[2]
REWARD = "def brevity(completions):\n    return [1.0 / (1 + len(completion)) for completion in completions]\n"
SETTINGS = {
    "model": "model", "data": "data.jsonl", "reward": "my_rewards:brevity", "compute-dtype": "float32",
    "prompts-per-step": 4, "group-size": 2, "max-tokens": 8, "bucket": 32, "learning-rate": 1e-3, "warmup-steps": 1,
    "eval-rows": 4, "eval-batch": 4, "evaluate-every": 2, "save-every": 1, "show-every": 1, "beta": 0.01,
}  # fmt: skip


def run(folder, **changes):
    flags = f"--xla_force_host_platform_device_count=4 {QUICKLY}"
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    options = [f"--{name}={value}" for name, value in (SETTINGS | changes).items()]
    command = [sys.executable, ROOT / "experiments/grpo.py", *options]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


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
def test_a_run_over_a_mesh_draws_what_one_device_does_and_goes_on_over_another_mesh(folder):
    for options in ({"run-dir": "one", "steps": 1}, {"run-dir": "mesh", "steps": 1, "mesh": "data=2,fsdp=2"}):
        done = run(folder, **options)
        assert done.returncode == 0, done.stderr[-3000:]
    one, mesh = (lines(folder / d / "completions.jsonl") for d in ("one", "mesh"))
    assert [line["completion"] for line in mesh] == [line["completion"] for line in one]
    kept, divided = (
        safetensors.numpy.load_file(folder / d / "step_1/model.safetensors") for d in ("one", "mesh")
    )  # Adam turns the rounding of gradients near 0 into steps of the rate
    assert max(np.max(np.abs(divided[name] - kept[name])) for name in kept) <= 2.1e-3
    assert np.mean([np.mean(np.abs(divided[name] - kept[name]) < 1e-5) for name in kept]) > 0.9

    done = run(folder, **{"run-dir": "mesh", "steps": 2, "mesh": "fsdp=4"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in lines(folder / "mesh/metrics.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_rows_that_leave_devices_idle_are_refused_before_the_weights_are_read(folder):
    done = run(folder, **{"mesh": "fsdp=4", "prompts-per-step": 2, "group-size": 3, "run-dir": "refused"})
    assert done.returncode == 1
    assert "2 prompts at a time x 3 completions do not divide over data=1, fsdp=4" in done.stderr
