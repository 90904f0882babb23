"""A few steps of GRPO on SmolLM2-135M-Instruct, by the command that trains it: a minute or two on two cores."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from grpo_jax.models import hf
from grpo_jax.run import metrics

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("error")]  # CI runs notebooks beside them, which may warn
ROOT = pathlib.Path(__file__).parents[2]


def test_the_format_is_learned_in_a_few_steps_and_in_less_than_four_gib(smollm2, tmp_path):
    settings = {
        "model": smollm2, "run-dir": tmp_path / "run", "steps": 5, "learning-rate": 2e-5, "warmup-steps": 1,
        "test-rows": 4, "samples": 2, "validation-rows": 2, "evaluate-every": 5, "save-every": 5,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, ROOT / "experiments" / "smollm2.py", *options]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}, check=True)
    tags = [line["reward/soft_format"] for line in metrics.read(tmp_path / "run") if "reward/soft_format" in line]
    before, after = np.mean(tags[:2]), np.mean(tags[-2:])
    print(f"with the tags: {before:.2f} -> {after:.2f}")
    assert before < 0.4
    assert after > before + 0.3
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    print(f"peak memory {results['peak_gib']:.2f} GiB, {results['cpu_minutes']:.1f} minutes of a core")
    assert results["peak_gib"] < 4
    policy, _ = hf.load_pretrained(tmp_path / "run" / "model")
    assert policy.config.num_layers == 30
