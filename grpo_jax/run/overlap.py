"""Sampling ahead: the next batch is sampled while the rewards of this one are computed.

    halves, state = overlap.ahead(step, batch, state, width=512)          # or halves = overlap.in_turn(step, batch)
    with run.loop(config, state, ...) as loop:
        for n in loop:
            experience = halves.collect(loop.state, n)
            rewards, reward_mask = reward(experience.rollout)
            experience = experience._replace(rewards=rewards, reward_mask=reward_mask)
            loop.state, metrics = halves.learn(loop.state, experience)
            loop.log(metrics)

The policy of every batch but the first is then the one before the last update, which the ratio takes into account: make
the step with `score_old=True`. The batch in flight is a part of the state, `TrainState.extra`, so that a checkpoint
holds it and a resumed run learns from the same bits.

What goes through the host, as conversations and servers do, is collected by a thread: environments answer while the
device learns. Which policy a batch is of does not depend on who is faster. What the thread raises is raised in the
loop where the state is whole and can be saved; a run that ended so samples that batch anew, from the policy of then.
"""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import sharding
from grpo_jax.train_step import Step
from grpo_jax.types import Experience, Metrics, Prompts, TrainState

Batch = Callable[[int], Prompts]  # the prompts of step n


class Ahead(NamedTuple):
    """What the state's `extra` is while a batch is in flight."""

    experience: Experience | None  # of the next step; None while that is collected
    extra: Any  # what it is otherwise


class NumberedStep(NamedTuple):
    """The two halves of a step whose prompts follow from its number."""

    collect: Callable[[TrainState, int], Experience]
    learn: Callable[[TrainState, Experience], tuple[TrainState, Metrics]]


def in_turn(step: Step, batch: Batch) -> NumberedStep:
    """Samples each batch when it is needed, with the policy that learns from it."""
    return NumberedStep(lambda state, n: step.collect(state, batch(n)), step.learn)


def ahead(step: Step, batch: Batch, state: TrainState, *, width: int) -> tuple[NumberedStep, TrainState]:
    """Samples each batch one step before it is needed.

    Args:
      step: jitted, without a reward, made with `score_old=True`. Where its `collect` goes through the host, the first
        batch is collected here, also in a run that is resumed: only then are its shapes known.
      batch: the prompts of step `n`, as a function of `n` alone.
      state: that a run begins with.
      width: of the widest prompts; to that, the prompts of a batch in flight are padded, since the arrays of a state
        have one shape. `collect` takes the padding off.

    Returns:
      The step's halves, of which `learn` puts the next batch into `state.extra`; and the state with room for a batch
      there, an `Ahead`.
    """
    fit: Callable[[Experience], Experience] = functools.partial(resize_prompts, width=width)
    first_prompts = batch(0)  # not within a trace: several processes put the values of arrays onto a mesh
    first = step.collect(state, first_prompts) if step.on_host else None
    form = jax.eval_shape(fit, first or jax.eval_shape(step.collect, state, first_prompts))
    if (mesh := _mesh_of(first_prompts)) is not None:
        # A batch lies alike when it is sampled and when it is read from a checkpoint: `learn` is the same program.
        places = sharding.batch_shardings(mesh, form)
        fit = jax.jit(fit, out_shardings=places)
        empty = jax.tree.map(lambda x, place: jnp.zeros(x.shape, x.dtype, device=place), form, places)
    else:
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), form)
    waiting: list[concurrent.futures.Future[Experience]] = []
    failed: list[concurrent.futures.Future[Experience]] = []
    thread = concurrent.futures.ThreadPoolExecutor(1, "collect")

    def sample(state: TrainState, n: int) -> Experience:
        state = state._replace(step=jnp.int32(n), extra=state.extra.extra)  # the key of step n
        return fit(step.collect(state, batch(n)))

    def begin(state: TrainState, n: int) -> concurrent.futures.Future[Experience]:
        if not step.on_host:
            made: concurrent.futures.Future[Experience] = concurrent.futures.Future()
            made.set_result(sample(state, n))  # under way when this returns
            return made
        # Of copies, since `learn` donates its state meanwhile.
        read = {"params": state.params, "key": state.key, "extra": Ahead(None, state.extra.extra)}
        copied = jax.tree.map(lambda x: x.copy(), read)
        return thread.submit(sample, state._replace(**copied, opt_state=None, ref_params=None), n)

    def collect(state: TrainState, n: int) -> Experience:
        if failed:
            failed.pop().result()  # raises
        experience = state.extra.experience
        if not n:
            experience = sample(state, 0) if first is None else fit(first)
        elif step.on_host and not np.any(experience.rollout.prompts.lengths):  # of a run that a failure ended
            experience = sample(state, n)
        waiting[:] = [begin(state, n + 1)]
        return resize_prompts(experience, batch(n).tokens.shape[1])

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        following = waiting.pop()
        if following.done():
            following.result()  # what it raises, it raises while there is a state to save
        state, metrics = step.learn(state._replace(extra=state.extra.extra), experience)
        if following.exception() is not None:
            failed.append(following)
        return state._replace(extra=Ahead(empty if failed else following.result(), state.extra)), metrics

    return NumberedStep(collect, learn), state._replace(extra=Ahead(empty, state.extra))


def _mesh_of(prompts: Prompts) -> jax.sharding.Mesh | None:
    mesh = getattr(getattr(prompts.tokens, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, jax.sharding.Mesh) else None


def resize_prompts(experience: Experience, width: int) -> Experience:
    """The same experience with prompts padded to, or cut to, `[B, width]`; what is cut must be padding."""
    prompts = experience.rollout.prompts
    tokens = prompts.tokens[:, :width]
    tokens = jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    return experience._replace(rollout=experience.rollout._replace(prompts=prompts._replace(tokens=tokens)))
