"""Sampling ahead: the next batches are sampled while the rewards of this one are computed.

    halves, state = overlap.ahead(step, batch, state, width=512)          # or halves = overlap.in_turn(step, batch)
    with run.loop(config, state, whole=halves.whole, ...) as loop:
        for n in loop:
            experience = halves.collect(loop.state, n)
            rewards, reward_mask = reward(experience.rollout)
            experience = experience._replace(rewards=rewards, reward_mask=reward_mask)
            loop.state, metrics = halves.learn(loop.state, experience)
            loop.log(metrics)

A batch is then of the policy some updates before, which the ratio takes into account: make the step with
`score_old=True`. The queue of batches is a part of the state, `TrainState.extra`, so that a checkpoint holds it and a
resumed run learns from the same bits.

What goes through the host, as conversations and servers do, is collected by a thread: environments answer while the
device learns. Which policy a batch is of does not depend on who is faster. What the thread raises is raised where the
batch is needed, at the head of a step, where the state is whole and can be saved; a run that ended so samples that
batch anew, from the policy of then. Over several processes such samplers are refused: each process would start the
thread's programs and those of `learn` in an order of its own, and what they send would meet another's.
"""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import processes
from grpo_jax.models import sharding
from grpo_jax.train_step import Step
from grpo_jax.types import Array, Experience, Metrics, Prompts, TrainState

PromptsOfStep = Callable[[int], Prompts]  # the prompts of step n
UNKNOWN = -1  # the version of a batch that is not there


class Ahead(NamedTuple):
    """What the state's `extra` is while batches are in flight."""

    queue: tuple[Experience, ...]  # of the next steps, in their order; zeros for one that is still being collected
    versions: Array  # [depth] int32, the updates of the policy that each of them is of; -1 for one that is not there
    extra: Any  # what it is otherwise


class NumberedStep(NamedTuple):
    """The two halves of a step whose prompts follow from its number."""

    collect: Callable[[TrainState, int], Experience]
    learn: Callable[[TrainState, Experience], tuple[TrainState, Metrics]]
    whole: Callable[[TrainState], TrainState]  # waits for what is being collected, and puts it into the state


def in_turn(step: Step, batch: PromptsOfStep) -> NumberedStep:
    """Samples each batch when it is needed, with the policy that learns from it."""
    return NumberedStep(lambda state, n: step.collect(state, batch(n)), step.learn, lambda state: state)


def ahead(
    step: Step, batch: PromptsOfStep, state: TrainState, *, width: int, depth: int = 1
) -> tuple[NumberedStep, TrainState]:
    """Samples each batch `depth` steps before it is needed.

    The batch of step `n` is of the policy after `max(0, n - depth)` updates, and never of an older one; only where a
    run was ended by a failure of its collector, of a newer one. `learn` logs how many updates lie between as `lag`.

    A thread collects one batch after the other. With a larger depth one that takes long, since a conversation in it
    does, is made up for by others, as long as they take no longer than a step on average. Each batch that waits for
    the thread has a copy of the trained parameters. Before a checkpoint all of them are waited for.

    Args:
      step: jitted, without a reward, made with `score_old=True`.
      batch: the prompts of step `n`, as a function of `n` alone.
      state: that a run begins with.
      width: of the widest prompts; to that, the prompts of a batch in flight are padded, since the arrays of a state
        have one shape. `collect` takes the padding off.
      depth: batches in flight.

    Returns:
      The step's halves, of which `learn` puts the next batches into `state.extra`; and the state with room for them
      there, an `Ahead`.

    Raises:
      ValueError: for a depth below 1; in a run of several processes, for a sampler of the host; as the sampler, for one
        of the host that has no `blank`.
    """
    if depth < 1:
        raise ValueError(f"depth is at least 1, got {depth}; without batches in flight: overlap.in_turn")
    if step.on_host and jax.process_count() > 1:
        raise ValueError(
            f"a thread would collect ahead through the host, and the {jax.process_count()} processes would start its "
            "programs and those of `learn` in other orders: overlap.in_turn, or a sampler that is traced"
        )
    fit: Callable[[Experience], Experience] = functools.partial(resize_prompts, width=width)
    first_prompts = batch(0)  # not within a trace: several processes put the values of arrays onto a mesh
    form = jax.eval_shape(fit, jax.eval_shape(step.shaped or step.collect, state, first_prompts))
    mesh = _mesh_of(first_prompts)
    if mesh is None:
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), form)
    else:
        # A batch lies alike when it is sampled and when it is read from a checkpoint: `learn` is the same program.
        places = sharding.batch_shardings(mesh, form)
        fit = jax.jit(fit, out_shardings=places)
        empty = jax.tree.map(lambda x, place: jnp.zeros(x.shape, x.dtype, device=place), form, places)
    flights: dict[int, _Flight] = {}  # by the step that needs them, from the present one to `depth` later
    thread = concurrent.futures.ThreadPoolExecutor(1, "collect")

    def sample(state: TrainState, n: int) -> Experience:
        state = state._replace(step=jnp.int32(n))  # the key of step n
        return fit(step.collect(state, batch(n)))

    def begin(state: TrainState, n: int, version: int) -> _Flight:
        if step.on_host:
            return _Flight(version, thread.submit(sample, state, n))
        return _landed(version, sample(state, n))  # under way when this returns

    def collect(state: TrainState, n: int) -> Experience:
        if not {n, n + 1} & flights.keys():  # of a run that is resumed, or none yet
            flights.clear()
            for i, version in enumerate(processes.whole(state.extra.versions).tolist()):
                if version != UNKNOWN:
                    flights[n + i] = _landed(version, state.extra.queue[i])
        missing = [m for m in range(n, n + depth + 1) if m not in flights]
        read = state._replace(extra=state.extra.extra)
        if step.on_host and missing:  # copies, since `learn` donates its state meanwhile
            kept = {"params": state.params, "key": state.key, "extra": read.extra}
            read = read._replace(**jax.tree.map(lambda x: x.copy(), kept), opt_state=None, ref_params=None)
        for m in missing:
            flights[m] = begin(read, m, n)
        try:
            experience = flights[n].future.result()
        except BaseException:
            del flights[n]  # to be collected anew
            raise
        return resize_prompts(experience, batch(n).tokens.shape[1])

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        n = min(flights)
        held, extra = state.extra, state.extra.extra
        state, metrics = step.learn(state._replace(extra=extra), experience)
        lag = jnp.float32(n - flights.pop(n).version)
        state = state._replace(extra=held._replace(extra=state.extra))
        return filled(state, n + 1, wait=False), metrics | {"lag": lag}

    def filled(state: TrainState, n: int, *, wait: bool) -> TrainState:
        """A state after `n` steps, with those of the batches in flight that are there."""
        queue, versions = [empty] * depth, np.full(depth, UNKNOWN, np.int32)
        for i in range(depth):
            flight = flights.get(n + i)
            if flight is not None and (wait or flight.future.done()) and flight.future.exception() is None:
                queue[i], versions[i] = flight.future.result(), flight.version
        return state._replace(extra=state.extra._replace(queue=tuple(queue), versions=everywhere(versions)))

    def whole(state: TrainState) -> TrainState:
        return filled(state, int(state.step), wait=True) if flights else state

    def everywhere(versions: np.ndarray) -> Array:
        if mesh is None:
            return jnp.asarray(versions)
        place = jax.NamedSharding(mesh, jax.P())
        return jax.make_array_from_callback(versions.shape, place, versions.__getitem__)

    room = Ahead((empty,) * depth, everywhere(np.full(depth, UNKNOWN, np.int32)), state.extra)
    return NumberedStep(collect, learn, whole), state._replace(extra=room)


class _Flight(NamedTuple):
    """A batch that is collected, or was."""

    version: int
    future: concurrent.futures.Future[Experience]


def _landed(version: int, experience: Experience) -> _Flight:
    future: concurrent.futures.Future[Experience] = concurrent.futures.Future()
    future.set_result(experience)
    return _Flight(version, future)


def _mesh_of(prompts: Prompts) -> jax.sharding.Mesh | None:
    mesh = getattr(getattr(prompts.tokens, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, jax.sharding.Mesh) else None


def resize_prompts(experience: Experience, width: int) -> Experience:
    """The same experience with prompts padded to, or cut to, `[B, width]`; what is cut must be padding."""
    prompts = experience.rollout.prompts
    tokens = prompts.tokens[:, :width]
    tokens = jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    return experience._replace(rollout=experience.rollout._replace(prompts=prompts._replace(tokens=tokens)))
