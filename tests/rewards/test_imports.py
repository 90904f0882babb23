"""The rewards are functions on text: importing them loads neither networks nor transformers."""

import subprocess
import sys

PROGRAM = """
import sys
import grpo_jax.rewards
print(*(name for name in sys.modules if name.startswith(("transformers", "grpo_jax.models", "grpo_jax.data"))))
"""


def test_importing_the_rewards_loads_neither_the_models_nor_transformers():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
