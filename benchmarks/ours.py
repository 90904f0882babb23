"""One step of grpo_jax, as experiments/grpo.py makes it: `collect`, host rewards, `learn`.

Where lengths differ the completions are sampled in slots, by `sampling.continuous`, and packed between the two, as its
`--pack` does.

Seconds of a step: `generate` is `collect`; `score` is the reference's log-probs in a
program of their own, run after the step and not counted in `whole`; `train` is what
remains of `learn` without them, the update included. Nor does `score` count in the peak
memory: it is compiled and run after that is read, and the mark is then set anew.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cells, worker
from benchmarks.cells import Cell
from grpo_jax import advantages, losses, packing, sampling, scoring
from grpo_jax.compiler_options import saving_memory
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.run import compilation
from grpo_jax.train_step import make_collect, make_learn
from grpo_jax.types import Array, Experience, Packing, Params, Prompts, Rollout
from grpo_jax.updates import Updates, init_state

MICRO_BATCHES = 4  # one or two prompts at a time: less memory, and what is computed stays in the processor's cache
KEPT = jax.checkpoint_policies.save_from_both_policies(  # for the backward pass; the rest of a layer is computed again
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
)


def ends_at_random(policy: Policy, mean_length: float) -> Policy:
    """The policy with a constant chance of `1 / mean_length` that a token is the end: lengths are geometric.

    The other tokens keep their odds. Peers are told the lengths and end there.
    """
    odds = float(np.log(1 / (mean_length - 1)))

    def unembed(params: Params, hidden: Array) -> Array:
        logits = policy.unembed(params, hidden).astype(jnp.float32)
        others = jax.nn.logsumexp(logits.at[..., cells.END].set(-jnp.inf), axis=-1)
        return logits.at[..., cells.END].set(others + odds)

    return policy._replace(unembed=unembed)


def make_step(cell: Cell, checkpoint: Path) -> Callable[[worker.Line], worker.Line]:
    """Builds the model and returns `request -> seconds`; each call trains on the next prompts."""
    policy, params = hf.load_pretrained(checkpoint, remat=KEPT)
    optimizer = optax.adamw(cells.LEARNING_RATE, weight_decay=0.0)
    sampling_policy = policy if cell.mean_length is None else ends_at_random(policy, cell.mean_length)
    eos_ids = () if cell.mean_length is None else (cells.END,)
    sampler = sampling.sampler(group_size=cell.group, max_tokens=cell.completion_tokens, eos_ids=eos_ids)
    if cell.mean_length is not None:
        sampler = dataclasses.replace(sampler, slots=cell.slots)
    collect = jax.jit(make_collect(sampling_policy, sampler))
    learn = jax.jit(
        make_learn(
            policy,
            optimizer,
            loss=losses.grpo(penalty=losses.k3(cells.BETA)),
            advantage=advantages.from_rewards(),
            updates=Updates(max_grad_norm=1.0, micro_batches=min(MICRO_BATCHES, cell.prompts)),
        ),
        donate_argnums=0,
        compiler_options=saving_memory(),
    )
    state = init_state(params, optimizer, jax.random.key(0), reference=True)
    del params
    compiled: dict[str, Callable[..., Any]] = {}  # `learn` by the shapes of what is given
    scorers: dict[str, Callable[..., Any]] = {}
    peak = 0.0

    @jax.jit
    def score(params: Params, given: Experience) -> Array:
        """The reference's log-probs, in parts as `learn` computes them."""
        parts = min(MICRO_BATCHES, cell.prompts)
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (given.rollout, given.packing))

        def of_part(part: tuple[Rollout, Packing | None]) -> Array:
            rollout, packing = part
            return scoring.score(policy, params, rollout, packing=packing, entropy=False).log_probs

        return jax.lax.map(of_part, split)

    def step(request: worker.Line) -> worker.Line:
        nonlocal state, peak
        if request.get("agreement"):
            return agreement(cell, checkpoint)
        prompts = prompts_of(cell, int(state.step))
        started = time.perf_counter()
        experience = jax.block_until_ready(collect(state, prompts))
        sampled = time.perf_counter()
        rollout = experience.rollout
        tokens, lengths = np.asarray(rollout.tokens), np.asarray(rollout.lengths)
        rewards = np.array(
            [
                [cells.reward(row[:n]) for row, n in zip(*group, strict=True)]
                for group in zip(tokens, lengths, strict=True)
            ],
            np.float32,
        )[..., None]
        given = experience._replace(rewards=rewards, reward_mask=np.ones(rewards.shape, bool))
        if cell.mean_length is not None:
            given = given._replace(packing=packing.pack(given.rollout))
        rewarded = time.perf_counter()
        shapes = str(jax.tree.map(np.shape, given))
        if shapes not in compiled:  # outside the time
            given = jax.tree.map(jnp.asarray, given)
            compiled[shapes] = learn.lower(state, given).compile()
        learning = time.perf_counter()
        state, metrics = compiled[shapes](state, given)
        jax.block_until_ready((state, metrics))
        learned = time.perf_counter()
        peak = max(peak, worker.peak_memory())
        if shapes not in scorers:
            scorers[shapes] = score.lower(state.ref_params, given).compile()
        scoring_began = time.perf_counter()
        jax.block_until_ready(scorers[shapes](state.ref_params, given))
        scored = time.perf_counter() - scoring_began
        worker.forget_peak()
        return {
            "whole": rewarded - started + learned - learning,
            "generate": sampled - started,
            "score": scored,
            "train": learned - learning - scored,
            "peak_mib": peak,
            "programs": len(compiled),
            "lengths": [int(n) for n in (lengths + np.asarray(rollout.truncated)).ravel()],
        }

    return step


def prompts_of(cell: Cell, step: int) -> Prompts:
    tokens = cells.prompt_tokens(cell, step)
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.full(cell.prompts, cell.prompt_tokens, jnp.int32))


def rewarded(experience: Experience, rng: np.random.Generator) -> Experience:
    """The experience with a reward of each completion, drawn from 0 to 1."""
    shape = (*experience.rollout.tokens.shape[:2], 1)
    rewards = jnp.asarray(rng.random(shape, np.float32))
    return experience._replace(rewards=rewards, reward_mask=jnp.ones(shape, bool))


def agreement(cell: Cell, checkpoint: Path) -> worker.Line:
    """The largest difference between the sampler's log-probs and the scorer's, by compute dtype."""

    def largest(dtype: str) -> float:
        policy, params = hf.load_pretrained(checkpoint, compute_dtype=jnp.dtype(dtype))
        sampler = sampling.sampler(group_size=cell.group, max_tokens=cell.completion_tokens, eos_ids=())
        rollout = sampler(policy, params, prompts_of(cell, 0), jax.random.key(1))
        scores = scoring.score(policy, params, rollout, entropy=False)
        return float(jnp.max(jnp.abs(scores.log_probs - rollout.log_probs) * rollout.mask))

    return {dtype: largest(dtype) for dtype in cells.AGREEMENT}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    compilation.enable_compilation_cache(arguments["programs"])
    compilation.trim_malloc()
    worker.serve(make_step(cells.from_json(arguments["cell"]), Path(arguments["checkpoint"])))
