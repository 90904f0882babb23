"""What a training step takes: memory on paper, memory by the compiler, and memory and seconds when it is run.

    line = footprint(init, step, prompts)                                    # bytes by name; nothing is allocated
    line |= in_a_process(measure, init, step, prompts)                       # seconds and, on a GPU, its peak

`init` is `key -> state`, `step` a `train_step.Step` without a reward: one reward of each completion is put in between
its halves.
"""

import concurrent.futures
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from grpo_jax.run import memory
from grpo_jax.train_step import Step
from grpo_jax.types import PRNGKey, Prompts, TrainState

InitState = Callable[[PRNGKey], TrainState]


def on_paper(init: InitState) -> dict[str, int]:
    """Bytes of what is kept from step to step, and of the gradients, by their shapes."""
    state = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    return {
        "parameters": memory.size(state.params),
        "gradients": memory.size(state.params),
        "optimizer": memory.size(state.opt_state),
        "reference": memory.size(state.ref_params),
    }


def footprint(init: InitState, step: Step, prompts: Prompts) -> dict[str, int]:
    """Bytes on paper and by the compiler, for the default backend; no state is made.

    Args:
      init: `key -> state`.
      step: without a reward.
      prompts: of a step.

    Returns:
      The names of `on_paper` and their sum, `on paper`; `sampling` and `learning`, what these programs hold at their
      worst beside the state; `activations`, what learning holds but for one copy of the gradients; and `compiled`, the
      state with the larger of the two.
    """
    paper = on_paper(init)
    state = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    sampling, learning = memory.programs(step, state, prompts)
    kept = paper["parameters"] + paper["optimizer"] + paper["reference"]
    return {
        **paper,
        "on paper": kept + paper["gradients"],
        "sampling": sampling,
        "learning": learning,
        "activations": learning - paper["gradients"],
        "compiled": kept + max(sampling, learning),
    }


def measure(init: InitState, step: Step, prompts: Prompts, repeats: int = 3) -> dict[str, float]:
    """Runs steps.

    Args:
      init: `key -> state`.
      step: without a reward; rewards are drawn at random.
      prompts: of a step.
      repeats: steps that are timed, after one that compiles.

    Returns:
      The median `seconds of sampling` and `seconds of learning` and, where the device tells it, `peak`: the most bytes
      of its memory that this process has held.
    """
    state, step, rng = jax.jit(init)(jax.random.key(0)), step.jit(), np.random.default_rng(0)
    sampling, learning = [], []
    for _ in range(repeats + 1):
        seconds, experience = timed(step.collect, state, prompts)
        sampling.append(seconds)
        shape = (*experience.rollout.tokens.shape[:2], 1)
        experience = experience._replace(rewards=rng.random(shape, np.float32), reward_mask=np.ones(shape, bool))
        seconds, (state, _) = timed(step.learn, state, experience)
        learning.append(seconds)
    found = {
        "seconds of sampling": statistics.median(sampling[1:]),
        "seconds of learning": statistics.median(learning[1:]),
    }
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found if peak is None else found | {"peak": peak}


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call until its result is there, and the result."""
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started, result


def in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Calls a function, on a GPU in a process of its own: the peak of the device's memory is then its own.

    Args:
      function: a module's, so that another process finds it.
      *arguments: to be pickled.
    """
    if jax.default_backend() != "gpu":
        return function(*arguments)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
