"""With the batch spread over devices, value and gradient are those of the whole batch, for every objective."""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent

# In a process of its own: the number of devices is settled when JAX starts.
SCRIPT = """
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from grpo_jax import losses, types
from grpo_jax.advantages import from_rewards
from grpo_jax.losses import *
from grpo_jax.train_step import make_learn
from test_train_step import POLICY, experience_of, state_of, with_other_reference

assert jax.device_count() == 4
over_data = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
everywhere = NamedSharding(over_data.mesh, PartitionSpec())

OBJECTIVES = [
    grpo(penalty=k3(0.1)), dapo(delta=2.0), dr_grpo(7), gspo(epsilon=0.1), gspo_token(epsilon=0.1), luspo(epsilon=0.1),
    gmpo(), cispo(), sapo(), vespo(), reinforce(), plus(grpo(aggregate=completion_mean_of_all), entropy_bonus(0.1)),
    grpo(aggregate=prompt_mean, weight=product(truncated_importance(1.5), off_policy_mask(0.1))),
    grpo(aggregate=per_prompt_count(9), weight=masked_importance(0.5, 2.0, ratio=product_ratio)),
]

experience = experience_of()
assert len(set(np.asarray(experience.rollout.mask.reshape(4, -1).sum(-1)).tolist())) > 1  # unequal shares
state = with_other_reference(state_of(optax.sgd(1.0)))

def learn(state, experience, micro_batches):
    found = []
    for loss in OBJECTIVES:
        step = make_learn(POLICY, optax.sgd(1.0), loss=loss, advantage=from_rewards(), micro_batches=micro_batches)
        after, metrics = step(state, experience)
        found.append((after.params["table"], types.summary(metrics)))
    return found

whole = jax.jit(learn, static_argnums=2)(state, experience, 1)
spread = jax.device_put(experience, over_data)
for micro_batches in (1, 2):
    parts = jax.jit(learn, static_argnums=2)(jax.device_put(state, everywhere), spread, micro_batches)
    for n, (a, b) in enumerate(zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True)):
        assert len(a.sharding.device_set) == 4
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=f"{micro_batches} micro-batches, leaf {n}")
tables = {np.asarray(table).tobytes() for table, _ in whole}
assert len(tables) >= len(OBJECTIVES) - 1  # gspo_token is gspo where a completion has one advantage
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4])
def test_data_sharding_and_micro_batches_give_the_whole_batchs_gradient_for_every_objective(devices):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
