"""Sampling ahead: the next batch is sampled while the rewards of this one are computed.

    state = state._replace(extra=overlap.in_flight(step, batch, state, width=512))
    step = overlap.ahead(step, batch, width=512)                          # or overlap.in_turn(step, batch)
    with run.loop(config, state, ...) as loop:
        for n in loop:
            experience = step.collect(loop.state, n)
            rewards, reward_mask = reward(experience.rollout)
            loop.state, metrics = step.learn(loop.state, experience._replace(rewards=rewards, reward_mask=reward_mask))
            loop.log(metrics)

The policy of every batch but the first is then the one before the last update, which the ratio takes into account: make
the step with `score_old=True`. The batch in flight is a part of the state, `TrainState.extra`, so that a checkpoint
holds it and a resumed run learns from the same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.train_step import Step
from grpo_jax.types import Experience, Metrics, Prompts, TrainState

Batch = Callable[[int], Prompts]  # the prompts of step n


class NumberedStep(NamedTuple):
    """The two halves of a step whose prompts follow from its number."""

    collect: Callable[[TrainState, int], Experience]
    learn: Callable[[TrainState, Experience], tuple[TrainState, Metrics]]


def in_turn(step: Step, batch: Batch) -> NumberedStep:
    """Samples each batch when it is needed, with the policy that learns from it."""
    return NumberedStep(lambda state, n: step.collect(state, batch(n)), step.learn)


def ahead(step: Step, batch: Batch, *, width: int) -> NumberedStep:
    """Samples each batch one step before it is needed.

    Args:
      step: jitted, without a reward, made with `score_old=True`.
      batch: the prompts of step `n`, as a function of `n` alone.
      width: of the widest prompts; to that, the prompts of a batch in flight are padded, since the arrays of a state
        have one shape. `collect` takes the padding off.

    Returns:
      Its halves. `learn` puts the next batch into `state.extra`; the run begins with `in_flight` there.
    """
    waiting: list[Experience] = []

    def sample(state: TrainState, n: int) -> Experience:
        state = state._replace(step=jnp.int32(n), extra=())  # the key of step n
        return resize_prompts(step.collect(state, batch(n)), width)

    def collect(state: TrainState, n: int) -> Experience:
        experience = state.extra if n else sample(state, 0)
        waiting[:] = [sample(state, n + 1)]  # under way when this returns
        return resize_prompts(experience, batch(n).tokens.shape[1])

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        state, metrics = step.learn(state._replace(extra=()), experience)
        return state._replace(extra=waiting.pop()), metrics

    return NumberedStep(collect, learn)


def in_flight(step: Step, batch: Batch, state: TrainState, *, width: int) -> Experience:
    """An empty batch, for `state.extra` of the state that a run with `ahead` begins with."""
    form = jax.eval_shape(lambda state, prompts: resize_prompts(step.collect(state, prompts), width), state, batch(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), form)


def resize_prompts(experience: Experience, width: int) -> Experience:
    """The same experience with prompts padded to, or cut to, `[B, width]`; what is cut must be padding."""
    prompts = experience.rollout.prompts
    tokens = prompts.tokens[:, :width]
    tokens = jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    return experience._replace(rollout=experience.rollout._replace(prompts=prompts._replace(tokens=tokens)))
