"""A whole run as one program, for one seed and for several at once by `jax.vmap`.

The task is the quickstart's, addition with worked steps: weights from nothing, a
supervised warm-up, then GRPO, all in one jitted function of a key. Few steps and a
narrow model, since what is compared is time: `SEEDS` seeds in one program against
the same seeds in turn.
"""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import worker
from grpo_jax import data, losses, models, rewards, sampling, statistics
from grpo_jax.advantages import from_rewards
from grpo_jax.tasks import arithmetic
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Array, Experience, PRNGKey, Prompts, TrainState
from grpo_jax.updates import Updates, init_state

SEEDS = 8
Tree = TypeVar("Tree")


def make_run(
    *, hidden: int = 32, warmup_steps: int = 100, steps: int = 30, prompts: int = 8, group: int = 8
) -> tuple[Callable[..., Array], tuple[Experience, Prompts]]:
    """`run(key, demonstrations, problems) -> rewards [steps]`, and the two sets it reads."""
    tokenizer = arithmetic.tokenizer()
    policy = models.small_llama(len(tokenizer), width=hidden, eos_id=tokenizer.eos_token_id)
    splits = arithmetic.splits(0)
    shown, answers = arithmetic.flawed_demonstrations(splits.demonstrations, 0)
    demonstrations = Experience(
        data.make_demonstrations(tokenizer(shown)["input_ids"], tokenizer(answers)["input_ids"])
    )
    problems = arithmetic.encode(tokenizer, splits.train)
    warm_up = optax.adamw(2e-3, weight_decay=0.01)
    adam = optax.adam(1e-4, b2=0.99)
    imitate = make_learn(policy, warm_up, loss=losses.sft(), updates=Updates(max_grad_norm=1.0))
    grpo = make_train_step(
        policy,
        adam,
        sampling.sampler(group_size=group, max_tokens=arithmetic.MAX_TOKENS, eos_ids=(tokenizer.eos_token_id,)),
        reward=rewards.traced(arithmetic.accuracy(tokenizer), arithmetic.strict_format(tokenizer)),
        advantage=from_rewards(weights=(1.0, 0.1), names=("accuracy", "format")),
        loss=losses.grpo(),
        updates=Updates(max_grad_norm=1.0),
    )

    def pick(key: PRNGKey, n: Array, rows: int, tree: Tree) -> Tree:
        held = jax.tree.leaves(tree)[0].shape[0]
        chosen = jax.random.randint(jax.random.fold_in(key, n), (rows,), 0, held)
        return jax.tree.map(lambda x: x[chosen], tree)

    def run(key: PRNGKey, demonstrations: Experience, problems: Prompts) -> Array:
        of_weights, of_warm_up, of_grpo = jax.random.split(key, 3)

        def warm_up_step(state: TrainState, n: Array) -> tuple[TrainState, None]:
            return imitate(state, pick(of_warm_up, n, 32, demonstrations))[0], None

        def grpo_step(state: TrainState, n: Array) -> tuple[TrainState, Array]:
            state, metrics = grpo(state, pick(of_grpo, n, prompts, problems))
            return state, statistics.summary(metrics)["reward"]

        state = init_state(policy.init(of_weights), warm_up, of_warm_up)
        state, _ = jax.lax.scan(warm_up_step, state, jnp.arange(warmup_steps))
        state = init_state(state.params, adam, of_grpo)
        return jax.lax.scan(grpo_step, state, jnp.arange(steps))[1]

    return run, (demonstrations, problems)


def compare(seeds: int = SEEDS, repeats: int = 3, **sizes: int) -> Iterator[worker.Line]:
    """A line a repeat, the two ways interleaved: seconds of all seeds, and of compiling."""
    run, sets = make_run(**sizes)
    keys = jax.random.split(jax.random.key(0), seeds)
    started = time.perf_counter()
    one = jax.jit(run).lower(keys[0], *sets).compile()
    compiled_one = time.perf_counter() - started
    started = time.perf_counter()
    many = jax.jit(jax.vmap(run, (0, None, None))).lower(keys, *sets).compile()
    compiled_many = time.perf_counter() - started
    for _ in range(repeats):
        started = time.perf_counter()
        in_turn = [jax.block_until_ready(one(key, *sets)) for key in keys]
        middle = time.perf_counter()
        at_once = jax.block_until_ready(many(keys, *sets))
        ended = time.perf_counter()
        yield {
            "seeds": seeds,
            "in_turn": middle - started,
            "vmapped": ended - middle,
            "compile_one": compiled_one,
            "compile_vmapped": compiled_many,
            "reward": [float(curve[-1]) for curve in at_once],
            "largest_difference": float(np.max(np.abs(np.stack(in_turn) - np.asarray(at_once)))),
        }


if __name__ == "__main__":
    _, send = worker.open_channel()
    for line in compare():
        send(line)
