"""One step of grpo_jax as a reader of the README writes it: `step.jit()`, the two halves, and nothing else.

No options of memory, no programs kept unless a folder is given, no micro-batches. Seconds are of all that happens,
compiling included. Where lengths differ the completions are sampled in slots and packed, as the page on long
completions says.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cells, worker
from benchmarks.cells import Cell
from benchmarks.ours import ends_at_random, prompts_of
from grpo_jax import losses, packing, sampling
from grpo_jax.models import hf
from grpo_jax.run import compilation
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.updates import init_state


def make_step(cell: Cell, checkpoint: Path) -> Callable[[worker.Line], worker.Line]:
    """Builds the model and returns `request -> seconds`; each call trains on the next prompts."""
    programs = compilation.count_compilations()
    policy, params = hf.load_pretrained(checkpoint)
    optimizer = optax.adamw(cells.LEARNING_RATE, weight_decay=0.0)
    eos_ids = () if cell.mean_length is None else (cells.END,)
    sampler = sampling.sampler(group_size=cell.group, max_tokens=cell.completion_tokens, eos_ids=eos_ids)
    if cell.mean_length is not None:
        sampler = dataclasses.replace(sampler, slots=cell.slots)
    step = make_train_step(policy, optimizer, sampler, loss=losses.grpo(penalty=losses.k3(cells.BETA)))
    if cell.mean_length is not None:  # the chance of the end token is fixed where tokens are drawn, not where scored
        ending = ends_at_random(policy, cell.mean_length)
        collect = make_train_step(ending, optimizer, sampler, loss=losses.grpo()).collect
        step = Step(collect, step.learn)
    step = step.jit()
    state = init_state(params, optimizer, jax.random.key(0), reference=True)

    def answer(request: worker.Line) -> worker.Line:
        nonlocal state
        prompts = prompts_of(cell, int(state.step))
        pages, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        started = time.perf_counter()
        experience = jax.block_until_ready(step.collect(state, prompts))
        sampled = time.perf_counter()
        rollout = experience.rollout
        tokens, lengths = np.asarray(rollout.tokens), np.asarray(rollout.lengths)
        rewards = np.zeros((*lengths.shape, 1), np.float32)
        for b, g in np.ndindex(lengths.shape):
            rewards[b, g] = cells.reward(tokens[b, g, : lengths[b, g]])
        experience = experience._replace(rewards=jnp.asarray(rewards), reward_mask=jnp.ones(rewards.shape, bool))
        if cell.mean_length is not None:
            experience = experience._replace(packing=packing.pack(rollout))
            if not int(state.step):
                packing.compile_ahead(step.learn, state, experience)
        learning = time.perf_counter()
        state, metrics = step.learn(state, experience)
        jax.block_until_ready((state, metrics))
        ended = time.perf_counter()
        return {
            "whole": ended - started,
            "collect": sampled - started,
            "learn": ended - learning,
            "cpu": time.process_time() - cpu,
            "pages": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages,
            "peak_mib": worker.peak_memory(),
            "programs": programs(),
            "lengths": [int(n) for n in (lengths + np.asarray(rollout.truncated)).ravel()],
        }

    return answer


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    if arguments.get("cores"):  # before XLA makes its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments["cores"]])
    if arguments.get("programs"):
        compilation.enable_compilation_cache(arguments["programs"])
    worker.serve(make_step(cells.from_json(arguments["cell"]), Path(arguments["checkpoint"])))
