"""The lines that the pages give for an objective compose that objective."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.types import Experience, Prompts, Rollout, Scores

ROOT = pathlib.Path(__file__).parent.parent.parent
T = 9  # the limit of sampling in the tables


def rows_of(page):
    """Of the table of objectives: each one as it is called, and the line that composes it."""
    return dict(re.findall(r"^\| `(\w+\(T?\))` \| [^|]+ \| ([^|]+) \|", (ROOT / page).read_text(), re.MULTILINE))


ROWS = rows_of("docs/pages/objectives/index.md")
COMPOSED = [(name, line.split("`")[1]) for name, line in ROWS.items() if "policy_loss" in line]
BLOCKS = re.findall(r"^(policy_loss\(.*\))  # (.+)$", (ROOT / "docs/pages/objectives/surrogates.md").read_text(), re.M)


def test_the_table_of_objectives_has_them_all():
    makers = {
        name
        for name, f in vars(losses.objectives).items()
        if inspect.isfunction(f) and "parts" in inspect.signature(f).parameters
    }
    assert {name.partition("(")[0] for name in ROWS} == makers | {"sft"}
    readme = rows_of("README.md")
    assert {name: line.split("`")[1:2] for name, line in readme.items()} == {
        name: line.split("`")[1:2] for name, line in ROWS.items()
    }
    assert len(COMPOSED) == len(ROWS) - 2
    assert {name for name, _ in COMPOSED} <= {name for _, name in BLOCKS}


@pytest.mark.parametrize(("name", "line"), [*COMPOSED, *((name, line) for line, name in BLOCKS)])
def test_the_line_that_composes_an_objective_is_that_objective(name, line):
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

    made, composed = (eval(code, vars(losses) | {"T": T}) for code in (name, line))
    np.testing.assert_array_equal(gradient(made), gradient(composed))
    assert jnp.any(gradient(made) != 0)
