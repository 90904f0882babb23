"""With the batch or the weights spread over devices, a step is that of one device."""

import os
import pathlib
import subprocess
import sys

import pytest
from compiling import QUICKLY

TESTS = pathlib.Path(__file__).parent

# In a process of its own: the number of devices is settled when JAX starts.
SCRIPT = """
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from grpo_jax import losses, statistics
from grpo_jax.advantages import from_rewards
from grpo_jax.losses import *
from grpo_jax.train_step import make_learn
from grpo_jax.updates import Updates
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
        updates = Updates(micro_batches=micro_batches)
        step = make_learn(POLICY, optax.sgd(1.0), loss=loss, advantage=from_rewards(), updates=updates)
        after, metrics = step(state, experience)
        found.append((after.params["table"], statistics.summary(metrics)))
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

A_DECODERS_STEP = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from grpo_jax import losses, models, sampling, testing
from grpo_jax.advantages import from_rewards
from grpo_jax.models import attention
from grpo_jax.train_step import make_collect, make_learn
from grpo_jax.updates import Updates, init_state

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
optimizer, prompts = optax.sgd(1.0), testing.random_prompts(0, 8, 6)
config = dataclasses.replace(testing.tiny_policy("qwen2").config, attention=attention.reference)
policy = models.decoder(config)
collect = make_collect(policy, sampling.sampler(group_size=2, max_tokens=6, eos_ids=(0,)), score_old=True)
loss, advantage = losses.grpo(penalty=losses.k3(0.1)), from_rewards()
learn = make_learn(policy, optimizer, loss=loss, advantage=advantage, updates=Updates(micro_batches=2))

@jax.jit
def step(state, prompts):
    experience = collect(state, prompts)
    rewards = jnp.mean(experience.rollout.tokens % 2, axis=-1, dtype=jnp.float32)[..., None]
    given = experience._replace(rewards=rewards, reward_mask=jnp.ones(rewards.shape, bool))
    return learn(state, given)[0].params, experience.rollout.tokens

state = init_state(policy.init(jax.random.key(0)), optimizer, jax.random.key(1), reference=True)
params, tokens = step(state, prompts)
assert max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (params, state.params)))) > 1e-3

def columns(x):
    whole = x.ndim < 2 or x.shape[-1] % 2
    return NamedSharding(mesh, PartitionSpec() if whole else PartitionSpec(*[None] * (x.ndim - 1), "model"))

def everywhere(x):
    return NamedSharding(mesh, PartitionSpec())

for of_weights, of_prompts in ((everywhere, ("data", "model")), (columns, "data")):
    spread = jax.device_put(state, jax.tree.map(everywhere, state))
    placed = jax.tree.map(of_weights, state.params)
    spread = spread._replace(**{name: jax.device_put(state.params, placed) for name in ("params", "ref_params")})
    after, drawn = step(spread, jax.device_put(prompts, NamedSharding(mesh, PartitionSpec(of_prompts))))
    np.testing.assert_array_equal(drawn, tokens)
    for a, b, was in zip(*map(jax.tree.leaves, (after, params, spread.params)), strict=True):
        if not was.sharding.is_fully_replicated:
            assert a.sharding.is_equivalent_to(was.sharding, a.ndim), (a.sharding, was.sharding)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [pytest.param(SCRIPT, id="every objective"), pytest.param(A_DECODERS_STEP, id="a decoder's step")]
)
def test_a_step_over_four_devices_is_that_of_one(script):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICKLY}",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
