"""Sums of digits modulo a number, with worked steps: traced, and dialled by the number of terms.

    3852=   ->   <think>3168</think><answer>8</answer><eos>          (modulo 10)

The working is the running sums. Problems, their answers and the demonstrations of an
imperfect teacher are made on the device from a key, so that a whole run, a supervised
warm-up before it included, is one program (`grpo_jax.study.runs`).

There are as many ways to complete a prompt as the teacher knows, of different lengths
and different worth, which is what ablations want to look at: to work it out, to work it out
and check it (twice as long, no better), to slip at a term, to guess without any work.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax import rewards
from grpo_jax.types import Array, PRNGKey, Prompts, Rollout

WORDS = (*"0123456789", "=", "<think>", "</think>", "<answer>", "</answer>", "<eos>")
EQUALS, *TAGS, EOS = range(10, 16)
VOCABULARY = len(WORDS)


class TeacherRates(NamedTuple):
    """How often the teacher does what; numbers, which may be traced."""

    slip: float | Array = 0.0  # a term that is left out of the running sum, of all terms but the first
    guess: float | Array = 0.0  # a completion without working, and a random digit for an answer
    check: float | Array = 0.0  # a worked completion whose working is written twice


def max_tokens(terms: int) -> int:
    """`T`, the length of the longest completion of the teacher."""
    return 2 * terms + 6


def problems(key: PRNGKey, count: int, *, terms: int, modulus: int = 10) -> Prompts:
    """Random problems, `modulus ** terms` of which differ, with their answers as tokens for traced rewards.

    Args:
      key: what they are a function of.
      count: `B`.
      terms: digits to add up, at least 2: the more, the longer and harder.
      modulus: from 2 to 10; digits are below it.

    Returns:
      Prompts `[B, terms + 1]`.

    Raises:
      ValueError: for terms or a modulus out of range.
    """
    if terms < 2 or not 2 <= modulus <= 10:
        raise ValueError(f"sums have at least 2 terms modulo 2 to 10, got {terms} terms modulo {modulus}")
    digits = jax.random.randint(key, (count, terms), 0, modulus)
    tokens = jnp.concatenate([digits, jnp.full((count, 1), EQUALS)], axis=1)
    answer = jnp.sum(digits, axis=1, keepdims=True) % modulus
    info = {"answer": answer, "answer_length": jnp.ones(count, jnp.int32)}
    return Prompts(tokens, jnp.full(count, terms + 1, jnp.int32), info)


def demonstrations(key: PRNGKey, prompts: Prompts, teacher: TeacherRates, *, modulus: int = 10) -> Rollout:
    """One completion of the teacher a prompt, `G = 1`."""
    digits = prompts.tokens[:, :-1]
    B, terms = digits.shape
    of_slips, of_guess, of_answer, of_check = jax.random.split(key, 4)
    slips = jax.random.bernoulli(of_slips, teacher.slip, (B, terms)).at[:, 0].set(False)
    guesses = jax.random.bernoulli(of_guess, teacher.guess, (B, 1))
    checks = jax.random.bernoulli(of_check, teacher.check, (B, 1))
    sums = jnp.cumsum(jnp.where(slips, 0, digits), axis=1) % modulus
    answer = jnp.where(guesses, jax.random.randint(of_answer, (B, 1), 0, modulus), sums[:, -1:])
    steps = jnp.where(guesses, 0, jnp.where(checks, 2 * terms, terms))
    # What stands at place t: the opening tag, the steps, and then the end from the closing tag on.
    T = max_tokens(terms)
    place = jnp.arange(T)[None]
    opening, thought, asked, answered = TAGS
    working = jnp.tile(sums, (1, 2))[:, (jnp.arange(T) - 1) % (2 * terms)]
    end = jnp.concatenate([jnp.broadcast_to(jnp.array([thought, asked]), (B, 2)), answer], axis=1)
    end = jnp.concatenate([end, jnp.broadcast_to(jnp.array([answered, EOS]), (B, 2))], axis=1)
    at_end = jnp.take_along_axis(end, jnp.clip(place - steps - 1, 0, 4), axis=1)
    tokens = jnp.where(place == 0, opening, jnp.where(place <= steps, working, at_end))
    lengths = (steps + 6)[:, 0]
    mask = place < lengths[:, None]
    tokens = jnp.where(mask, tokens, 0)[:, None]
    zeros = jnp.zeros((B, 1, T))
    return Rollout(prompts, tokens, lengths[:, None], mask[:, None], zeros, jnp.zeros((B, 1), bool))


def accuracy() -> rewards.TokenReward:
    """1 where the tagged answer is the sum."""
    return rewards.tokens.exact_answer(TAGS[2], TAGS[3])


def strict_format() -> rewards.TokenReward:
    """1 where the four tags stand as they should."""
    return rewards.tokens.strict_format(TAGS, (EOS,))


def text(tokens: Array, length: int | Array) -> str:
    """The words of one row of tokens."""
    return "".join(WORDS[token] for token in tokens[: int(length)])


# ------------------------------------------------------------------ a second script

SECOND_SCRIPT = "零一二三四五六七八九"  # whose tokens come after those of the task
WORDS_OF_TWO_SCRIPTS = (*WORDS, *SECOND_SCRIPT)


def in_two_scripts(key: PRNGKey, demonstrations: Rollout, share: float | Array) -> Rollout:
    """The same demonstrations with a share of the digits of their working in a second script: `<think>5五1七9</think>`.

    It stands for a language that a model mixes into its reasoning.

    Args:
      key: which digits they are is a function of it.
      demonstrations: of `demonstrations`.
      share: from 0 to 1, of the digits before the reasoning's end.
    """
    tokens = demonstrations.tokens
    working = (tokens < EQUALS) & demonstrations.mask & (jnp.cumsum(tokens == TAGS[1], axis=-1) == 0)
    other = jax.random.bernoulli(key, share, tokens.shape)
    return demonstrations._replace(tokens=jnp.where(working & other, tokens + VOCABULARY, tokens))


def first_script() -> rewards.TokenReward:
    """The share of digits that are of the first script; 0 where there are none."""

    def language(rollout: Rollout) -> Array:
        written = jnp.arange(rollout.tokens.shape[-1]) < rollout.lengths[..., None]
        wanted = jnp.sum(written & (rollout.tokens < EQUALS), axis=-1)
        other = jnp.sum(written & (rollout.tokens >= VOCABULARY), axis=-1)
        return wanted / jnp.maximum(wanted + other, 1)

    return language
