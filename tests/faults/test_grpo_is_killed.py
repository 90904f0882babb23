"""What `experiments/grpo.py` leaves behind when it is killed for real, against what it leaves undisturbed.

The run evaluates, keeps the best model, exports, shows completions and samples ahead, so that a batch is in flight.
`GRPO_KILL_STRIDE=1` kills it at every file event.
"""

import filecmp
import json
import os
import pathlib
import subprocess
import sys

import grpo_run
import pytest

from grpo_jax import testing
from grpo_jax.run import metrics

STRIDE = os.environ.get("GRPO_KILL_STRIDE", "70")
SAME = (metrics.METRICS_FILE, metrics.COMPLETIONS_FILE, "best", "step_2", "step_4")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_undisturbed(tmp_path):
    testing.tiny_checkpoint(tmp_path / "model")
    rows = [{"prompt": f"What is {a} plus {b}?"} for a in range(4) for b in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completions, **columns):\n    return [1.0 / (1 + len(c)) for c in completions]\n"
    )
    command = [sys.executable, grpo_run.__file__, tmp_path / "runs", "undisturbed=finish", f"killed=files:20:{STRIDE}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    processes = [line.split() for line in done.stdout.splitlines()]
    statuses = [int(status) for name, _, status, _ in processes if name == "killed"]
    assert statuses[:-1] == [-9] * (len(statuses) - 1)
    assert len(statuses) >= 4
    assert statuses[-1] == 0, done.stderr
    undisturbed, killed = tmp_path / "runs" / "undisturbed", tmp_path / "runs" / "killed"
    assert sorted(os.listdir(killed)) == sorted(os.listdir(undisturbed))
    for name in SAME:
        files = [path for path in [undisturbed / name, *(undisturbed / name).rglob("*")] if path.is_file()]
        assert files
        for path in files:
            assert filecmp.cmp(path, killed / path.relative_to(undisturbed), shallow=False), path
