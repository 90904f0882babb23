"""On the task of the quickstart, every objective makes the reward rise."""

import functools
import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from grpo_jax import data, losses, rewards, sampling, transforms
from grpo_jax.advantages import (
    batch_normalised_advantages,
    centered_advantages,
    from_rewards,
    group_advantages,
    leave_one_out_advantages,
)
from grpo_jax.schedules import Scheduled
from grpo_jax.statistics import Mean, summary
from grpo_jax.tasks import arithmetic
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Experience
from grpo_jax.updates import Updates, init_state

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments"))
import quickstart

pytestmark = pytest.mark.slow
T = arithmetic.MAX_TOKENS
STEPS, PROMPTS, WARMUP_STEPS = 11, 16, 300
WEIGHTS = (1.0, 0.1)

# The published pair of loss and advantage where there is one.
OBJECTIVES = {
    "grpo": (losses.grpo(), group_advantages),
    "grpo_kl_and_entropy": (
        losses.plus(losses.grpo(penalty=losses.k3(0.01)), losses.entropy_bonus(1e-4)),
        group_advantages,
    ),
    "bnpo": (losses.bnpo(), group_advantages),
    "dr_grpo": (losses.dr_grpo(T), centered_advantages),
    "dapo": (losses.dapo(), group_advantages),
    "gspo": (losses.gspo(), group_advantages),
    "gspo_token": (losses.gspo_token(), group_advantages),
    "luspo": (losses.luspo(), group_advantages),
    "gmpo": (losses.gmpo(), group_advantages),
    "cispo": (losses.cispo(), group_advantages),
    "sapo": (losses.sapo(), group_advantages),
    "vespo": (losses.vespo(), group_advantages),
    "dppo": (losses.dppo(), centered_advantages),
    "drpo": (losses.drpo(), centered_advantages),
    "dro": (losses.dro(), group_advantages),
    "pspo": (losses.pspo(), group_advantages),
    "m2po": (losses.m2po(), group_advantages),
    "kl_cov": (losses.kl_cov(), group_advantages),
    "rloo": (losses.reinforce(), leave_one_out_advantages),
    "reinforce_plus_plus": (losses.reinforce(), batch_normalised_advantages),
}


def test_the_table_has_every_objective():
    """All functions of the module that take parts; `reinforce` is there under two published names."""
    takes_parts = {
        name
        for name, f in vars(losses.objectives).items()
        if inspect.isfunction(f) and "parts" in inspect.signature(f).parameters
    }
    assert takes_parts - {"reinforce"} <= set(OBJECTIVES)


@functools.cache
def warmed_up():
    """The policy of the quickstart after its supervised warm-up, about half right."""
    tokenizer, splits = arithmetic.tokenizer(), arithmetic.splits(0)
    policy = quickstart.make_policy(tokenizer)
    prompts, completions = arithmetic.flawed_demonstrations(splits.demonstrations, 0)
    demonstrations = data.make_demonstrations(tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"])
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, WARMUP_STEPS))
    learn = make_learn(policy, optimizer, loss=losses.sft(), updates=Updates(max_grad_norm=1.0))
    rows = jnp.stack([data.batch_indices(0, n, len(prompts), 64) for n in range(WARMUP_STEPS)])

    @jax.jit
    def imitate(state):
        def step(state, rows):
            return learn(state, Experience(jax.tree.map(lambda x: x[rows], demonstrations)))

        return jax.lax.scan(step, state, rows)[0].params

    state = init_state(policy.init(jax.random.key(0)), optimizer, jax.random.key(0))
    return policy, tokenizer, splits, imitate(state)


@functools.cache
def run():
    """`objective -> reward [STEPS]`: a run whose objective is chosen by a number, so that all are one program."""
    policy, tokenizer, splits, params = warmed_up()
    optimizer = optax.adam(optax.linear_schedule(0.0, 1e-4, 8), b2=0.99)

    def chosen(step, number):
        def loss(scores, experience):
            def value(of_one):
                return lambda: losses.value(of_one[0](scores, experience)[0])

            return (Mean(jax.lax.switch(number, [value(o) for o in OBJECTIVES.values()]), jnp.ones(())),), {}

        return loss

    def advantage(step, number):
        def estimate(rewards, mask):
            return jax.lax.switch(number, [lambda e=e: e(rewards, mask) for _, e in OBJECTIVES.values()])

        return from_rewards(estimate, weights=WEIGHTS)

    step = make_train_step(
        policy,
        optimizer,
        sampling.sampler(group_size=8, max_tokens=T, eos_ids=(tokenizer.eos_token_id,)),
        reward=rewards.traced(arithmetic.accuracy(tokenizer), arithmetic.strict_format(tokenizer)),
        advantage=Scheduled(advantage),
        loss=Scheduled(chosen),
        transforms=(transforms.high_covariance(),),
        updates=Updates(minibatches=2, max_grad_norm=1.0),
    )
    rows = jnp.stack([data.batch_indices(0, n, len(splits.train), PROMPTS) for n in range(STEPS)])
    prompts = jax.tree.map(lambda x: jnp.asarray(x)[rows], arithmetic.encode(tokenizer, splits.train))

    @jax.jit
    def whole(number):
        state = init_state(params, optimizer, jax.random.key(1), reference=True, extra=number)
        return jax.lax.scan(lambda s, p: (lambda s, m: (s, summary(m)["reward"]))(*step(s, p)), state, prompts)[1]

    return whole


@pytest.mark.parametrize("name", OBJECTIVES)
def test_reward_rises(name):
    reward = run()(list(OBJECTIVES).index(name))
    assert reward[-2:].mean() > reward[:2].mean() + 0.1
