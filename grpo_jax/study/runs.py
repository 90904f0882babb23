"""Whole runs as pure functions: a train step under `lax.scan`, to be jitted and vmapped.

    def init(key, hyper):
        return init_state(hyper["params"], optax.adam(hyper["learning_rate"]), key)

    def step(hyper):
        loss = losses.grpo(penalty=losses.k3(hyper["beta"]))
        return make_train_step(policy, optax.adam(hyper["learning_rate"]), sampler, loss=loss, reward=reward)

    def prompts(key, step, hyper):
        return modular_sums.problems(jax.random.fold_in(key, step), 8, terms=4)

    run = make_run(init, step, prompts, num_steps=100, evaluate=evaluate, evaluate_every=10)
    state, history = jax.jit(run)(key, hyper)                             # one run, one program
    states, histories = jax.jit(jax.vmap(run, (0, None)))(keys, hyper)    # several seeds in one

`hyper` is any pytree: what a run is a function of beside its key. Its numbers (learning rate,
beta, clip bounds, temperature) may be mapped over; its arrays (parameters to start from, a
data set) are arguments of the program and no constants of it. What changes a shape or the
code, such as the group size or the objective, makes another program: another `make_run`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax import statistics
from grpo_jax.freezing import bind
from grpo_jax.types import Array, Metrics, Params, PRNGKey, Prompts, TrainState

Hyper = Any  # a pytree of numbers and arrays

Init = Callable[[PRNGKey, Hyper], TrainState]
StepFunction = Callable[[TrainState, Prompts], tuple[TrainState, Metrics]]  # such as a `train_step.Step`
MakeStep = Callable[[Hyper], StepFunction]
MakePrompts = Callable[[PRNGKey, Array, Hyper], Prompts]  # (key of the run's prompts, step, hyper)
TracedEvaluation = Callable[[Params, Hyper], dict[str, Array]]  # numbers


class History(NamedTuple):
    """What a run has measured."""

    steps: dict[str, Array]  # name -> [num_steps], the metrics of each step
    evaluations: dict[str, Array]  # name -> [1 + num_steps / evaluate_every], the first one before any step


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in chunks, between which a loop on the host may write checkpoints and show progress; called, the whole."""

    start: Callable[[PRNGKey, Hyper], tuple[TrainState, dict[str, Array]]]  # the state, and its evaluation
    advance: Callable[[TrainState, Hyper], tuple[TrainState, dict[str, Array], dict[str, Array]]]
    chunks: int  # how often `advance` is called in a run
    chunk_steps: int  # steps of a chunk, after which comes an evaluation

    def __call__(self, key: PRNGKey, hyper: Hyper) -> tuple[TrainState, History]:
        """`(state, history)` of the whole run; pure."""
        state, first = self.start(key, hyper)

        def chunk(state: TrainState, _: None) -> tuple[TrainState, tuple[dict[str, Array], dict[str, Array]]]:
            state, steps, evaluation = self.advance(state, hyper)
            return state, (steps, evaluation)

        state, (steps, evaluations) = jax.lax.scan(chunk, state, length=self.chunks)
        steps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
        return state, History(steps, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, evaluations))


def make_run(
    init: Init,
    step: MakeStep,
    prompts: MakePrompts,
    *,
    num_steps: int,
    evaluate: TracedEvaluation | None = None,
    evaluate_every: int | None = None,
    frozen: Callable[[Hyper], Params] | None = None,
) -> Run:
    """A run of `num_steps` as a pure function `(key, hyper) -> (state, history)`.

    Args:
      init: `(key, hyper) -> state`, at step 0.
      step: `hyper -> step`, where `step(state, prompts) -> (state, metrics)` is what
        `make_train_step` makes, or anything else of this signature. It is called while
        tracing, so that the numbers of `hyper` may go into the optimiser and the loss.
      prompts: `(key, step, hyper) -> prompts`, traced: a task that makes problems from
        keys, or rows of a data set in `hyper` (`shuffled_rows`). The key is the same at every step of
        a run, and none that sampling uses.
      num_steps: of the run.
      evaluate: `(params, hyper) -> {name: number}`, traced.
      evaluate_every: steps between evaluations, and of a chunk; `num_steps` unless given.
      frozen: `hyper -> ` what the network reads beside `state.params`, such as the base of adapters, which `init`
        then leaves out. The states of the run are without it, so that runs that are mapped over share one.

    Raises:
      ValueError: if `evaluate_every` does not divide `num_steps`.
    """
    chunk_steps = num_steps if evaluate_every is None else evaluate_every
    if num_steps < 1 or chunk_steps < 1 or num_steps % chunk_steps:
        raise ValueError(f"a run is made of whole chunks: {num_steps} steps are no multiple of {chunk_steps}")

    def whole(state: TrainState, hyper: Hyper) -> TrainState:
        return state if frozen is None else state._replace(frozen=frozen(hyper))

    def measure(state: TrainState, hyper: Hyper) -> dict[str, Array]:
        state = whole(state, hyper)
        return {} if evaluate is None else evaluate(bind(state.params, state.frozen), hyper)

    def start(key: PRNGKey, hyper: Hyper) -> tuple[TrainState, dict[str, Array]]:
        state = init(key, hyper)
        return state, measure(state, hyper)

    def advance(state: TrainState, hyper: Hyper) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:
        train_step = step(hyper)

        def one(state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
            made = prompts(prompt_key(state.key), state.step, hyper)
            after, metrics = train_step(whole(state, hyper), made)
            return after._replace(frozen=state.frozen), statistics.summary(metrics)

        state, steps = jax.lax.scan(one, state, length=chunk_steps)
        return state, steps, measure(state, hyper)

    return Run(start, advance, num_steps // chunk_steps, chunk_steps)


def prompt_key(key: PRNGKey) -> PRNGKey:
    """The key of a run's prompts. Steps use `fold_in(key, step)`, and no step reaches 2^32 - 1."""
    return jax.random.fold_in(key, jnp.uint32(2**32 - 1))


def shuffled_rows(key: PRNGKey, step: Array, size: int, batch: int) -> Array:
    """The rows `[batch]` of a step, of a data set of `size` rows in another order each epoch.

    An epoch has `size // batch` steps; the rows that are left over come in another one.

    Raises:
      ValueError: for a batch that is larger than the data set.
    """
    if not 1 <= batch <= size:
        raise ValueError(f"a batch has between 1 and the data set's {size} rows, got {batch}")
    epoch, place = jnp.divmod(step, size // batch)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
    return jax.lax.dynamic_slice_in_dim(order, place * batch, batch)
