"""A game of several turns, learned from nothing: guess a number, and hear "higher" or "lower".

    python experiments/guess_the_number.py

The number is one of 7 and the policy has 3 guesses: as many as a search by halves needs, and a player who hears
nothing finds 3 of 7. The game is a JAX function (`sampling.traced_conversations`), so that a condition is one program:
16 seeds, each with all of its training, under `scan` and `vmap`. The policy is a transformer of 21 thousand parameters
that starts at random. A conversation that ends with the right guess has the reward 1, every other one 0; a step plays
16 games of each number.

The second condition is told nothing: whatever it guesses, it hears "lower".

Written are `guess_the_number.csv`, `.md` and `.png`, in about a minute of two CPU cores.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax import losses, models, run, sampling
from grpo_jax.run import ranges
from grpo_jax.sampling.traced_turns import TracedEnvironment
from grpo_jax.study import results, runs
from grpo_jax.study.written import write_results
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.types import Array, Params, PRNGKey, Prompts, TrainState
from grpo_jax.updates import init_state

NAME = "guess_the_number"
NUMBERS, GUESSES = 7, 3
HIGHER, LOWER, BEGIN = NUMBERS, NUMBERS + 1, NUMBERS + 2  # tokens after those of the numbers
LENGTH = 2 * GUESSES - 1  # of a game: guesses, and what is said between them

policy = models.small_llama(
    NUMBERS + 3, width=32, intermediate_size=64, num_attention_heads=2, max_position_embeddings=16,
    initializer_range=0.1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    results: pathlib.Path = pathlib.Path(__file__).parent / "results"  # where the CSV, the table and the figure go
    seeds: int = 16
    steps: int = 200
    evaluate_every: int = 10
    group_size: int = 16
    learning_rate: float = 3e-3


def game(*, told: bool) -> TracedEnvironment:
    """The environment of one game, whose state is the number."""

    def respond(tokens: Array, length: Array, number: Array) -> tuple[Array, Array, Array, Array, Array]:
        guess, right = tokens[0], tokens[0] == number
        said = jnp.where((guess < number) & told, HIGHER, LOWER)
        return said[None], jnp.int32(1), number, right, right.astype(jnp.float32)

    return respond


def play(sampler: sampling.PolicySampler, *, told: bool) -> sampling.TracedConversationSampler:
    """Games of a sampler."""
    return sampling.traced_conversations(
        sampler, game(told=told), lambda info, key: info["number"], max_turns=GUESSES, turn_tokens=1
    )


def games() -> Prompts:
    """One game of each number."""
    begin = jnp.full((NUMBERS, 1), BEGIN, jnp.int32)
    return Prompts(begin, jnp.ones(NUMBERS, jnp.int32), {"number": jnp.arange(NUMBERS)})


def make_run(config: Config, *, told: bool) -> runs.Run:
    """A whole run as a function of its key."""
    optimizer = optax.adam(config.learning_rate)
    sampler = sampling.sampler(group_size=config.group_size, max_tokens=LENGTH, eos_ids=())
    likeliest = play(sampling.greedy(max_tokens=LENGTH, eos_ids=()), told=told)

    def init(key: PRNGKey, hyper: None) -> TrainState:
        return init_state(policy.init(key), optimizer, key)

    def step(hyper: None) -> Step:
        loss = losses.grpo()
        return make_train_step(policy, optimizer, play(sampler, told=told), loss=loss, reward=sampling.turn_rewards)

    def evaluate(params: Params, hyper: None) -> dict[str, Array]:
        rollout = likeliest(policy, params, games(), jax.random.key(0))
        return {"found": sampling.turn_rewards(rollout)[0].mean(), "guesses": (rollout.turns.ends > 0).sum(-1).mean()}

    return runs.make_run(
        init, step, lambda key, n, hyper: games(), num_steps=config.steps, evaluate=evaluate,
        evaluate_every=config.evaluate_every,
    )  # fmt: skip


def experiment(config: Config) -> list[results.Record]:
    """Both conditions, each one program; the CSV, the table and the figure."""
    ranges.check(config)
    rows: list[results.Record] = []
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    for condition, told in (("told higher or lower", True), ("told nothing", False)):
        began = time.monotonic()
        states, history = jax.jit(jax.vmap(lambda key, told=told: make_run(config, told=told)(key, None)))(keys)
        rows += rows_of(condition, config, jax.device_get(history))
        print(f"{condition}: {config.seeds} seeds, {time.monotonic() - began:.0f} s")
        if told:
            show(jax.tree.map(lambda x: x[0], states.params))
    print(write_results(config.results, NAME, rows, ["found", "guesses", "sampled"]))
    return rows


def rows_of(condition: str, config: Config, history: runs.History) -> list[results.Record]:
    """A row for each seed and evaluation; `sampled` is the reward of the steps before it."""
    rows = []
    for seed in range(config.seeds):
        found = {name: values[seed] for name, values in history.evaluations.items()}
        rewards = history.steps["reward"][seed].reshape(-1, config.evaluate_every).mean(-1)
        for n in range(len(found["found"])):
            row: dict[str, Any] = {"condition": condition, "seed": seed, "step": n * config.evaluate_every}
            row |= {name: float(values[n]) for name, values in found.items()}
            rows.append(row | ({"sampled": float(rewards[n - 1])} if n else {}))
    return rows


def show(params: Params) -> None:
    """Prints the likeliest game of each number."""
    likeliest = play(sampling.greedy(max_tokens=LENGTH, eos_ids=()), told=True)
    rollout = jax.device_get(likeliest(policy, params, games(), jax.random.key(0)))
    words = {HIGHER: "higher", LOWER: "lower", BEGIN: "begin"}
    for number in range(NUMBERS):
        tokens = rollout.tokens[number, 0, : rollout.lengths[number, 0]].tolist()
        print(f"  {number}: {' '.join(words.get(token, str(token)) for token in tokens)}")


if __name__ == "__main__":
    run.command(experiment, Config, __doc__)
