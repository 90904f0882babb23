"""The README's code does what the README says."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.types import Experience, Prompts, Rollout, Scores

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
T = 9  # what the README calls the limit of sampling
ROWS = dict(re.findall(r"^\| `(\w+\(T?\))` \| [^|]+ \| ([^|]+) \|", README, re.MULTILINE))
COMPOSED = {name: line.split("`")[1] for name, line in ROWS.items() if "policy_loss" in line}


def test_the_ten_lines_run_and_the_reward_rises(capsys):
    ten_lines = re.search(r"## Ten lines\n+```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(ten_lines, {})
    assert float(capsys.readouterr().out) > 0.8


def test_it_is_at_most_130_lines():
    assert len(README.splitlines()) <= 130


def test_the_table_of_objectives_has_them_all():
    makers = {
        name
        for name, f in vars(losses.objectives).items()
        if inspect.isfunction(f) and "parts" in inspect.signature(f).parameters
    }
    assert {name.partition("(")[0] for name in ROWS} == makers | {"sft"}
    assert len(COMPOSED) == len(ROWS) - 2


@pytest.mark.parametrize("name", COMPOSED)
def test_the_line_that_composes_an_objective_is_that_objective(name):
    rng = np.random.default_rng(0)
    mask = jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (3, 4))[..., None])
    old, noise = -rng.exponential(2.0, (3, 4, T)), rng.normal(size=(3, 4, T))
    prompts = Prompts(jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32))
    rollout = Rollout(prompts, jnp.zeros(mask.shape, jnp.int32), mask.sum(-1), mask, jnp.asarray(old), mask.all(-1))
    experience = Experience(
        rollout,
        old_log_probs=jnp.asarray(old),
        advantages=jnp.asarray(rng.normal(size=(3, 4))),
        high_covariance=mask & (rng.random(mask.shape) < 0.5),
    )

    def gradient(loss):
        return jax.grad(lambda x: losses.value(loss(Scores(x), experience)[0]))(jnp.asarray(old + noise))

    made, composed = (eval(line, vars(losses) | {"T": T}) for line in (name, COMPOSED[name]))
    np.testing.assert_array_equal(gradient(made), gradient(composed))
    assert jnp.any(gradient(made) != 0)
