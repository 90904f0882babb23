"""Whole conversations in one program: a game whose rules are replayed in Python, and the host's form of the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, make_train_step, sampling
from grpo_jax.environments import Turn
from grpo_jax.policies import from_logits_fn
from grpo_jax.sampling import conversations, traced_conversations, turn_rewards
from grpo_jax.scoring import score
from grpo_jax.statistics import summary
from grpo_jax.testing import tiny_policy
from grpo_jax.types import Prompts
from grpo_jax.updates import init_state

NUMBERS = 6  # tokens 0 to 5
HIGHER, LOWER, START = 6, 7, 8
V = 9
POLICY = tiny_policy("qwen3", vocab_size=V)
TINIER = tiny_policy("qwen3", vocab_size=V, num_hidden_layers=1, hidden_size=16, intermediate_size=16)


@functools.cache
def params_of():
    return jax.jit(POLICY.init)(jax.random.key(0))


def guess_the_number(tokens, length, number):
    """One token a turn; what is no number is lower than all."""
    guess = jnp.where(tokens[0] < NUMBERS, tokens[0], -1)
    answer = jnp.where(guess < number, HIGHER, LOWER)
    return jnp.stack([answer, START]), 2, number, guess == number, jnp.where(guess == number, 1.0, -0.1)


def hidden_number(info, key):
    return info["number"]


def prompts_of(seed, B=4):
    numbers = jax.random.randint(jax.random.key(seed), (B,), 0, NUMBERS)
    return Prompts(jnp.full((B, 2), START), jnp.array([2, 1] * (B // 2)), {"number": numbers})


def game(max_turns=4, **changes):
    sampler = sampling.sampler(**({"group_size": 8, "max_tokens": 12, "eos_ids": ()} | changes))
    return traced_conversations(sampler, guess_the_number, hidden_number, max_turns=max_turns, turn_tokens=1)


@pytest.mark.parametrize("max_tokens", [12, 8])
def test_a_game_follows_its_rules_replayed_in_python(max_tokens):
    prompts = prompts_of(0)
    rollout = jax.device_get(game(max_tokens=max_tokens)(POLICY, params_of(), prompts, jax.random.key(1)))
    seen = set()
    for b, g in np.ndindex(4, 8):
        number, tokens, mask, ends, rewards, won = int(prompts.info["number"][b]), [], [], [], [], False
        for turn in range(4):
            guess = int(rollout.tokens[b, g, len(tokens)])
            tokens, mask = [*tokens, guess], [*mask, True]
            won = guess == number
            ends, rewards = [*ends, len(tokens)], [*rewards, 1.0 if won else -0.1]
            if won or turn == 3 or len(tokens) + 2 >= max_tokens:
                break
            low = guess >= NUMBERS or guess < number
            tokens, mask = [*tokens, HIGHER if low else LOWER, START], [*mask, False, False]
        length, k = len(tokens), len(ends)
        assert rollout.lengths[b, g] == length
        np.testing.assert_array_equal(rollout.tokens[b, g], [*tokens, *[0] * (max_tokens - length)])
        np.testing.assert_array_equal(rollout.mask[b, g], [*mask, *[False] * (max_tokens - length)])
        assert rollout.truncated[b, g] == (not won)
        np.testing.assert_array_equal(rollout.turns.ends[b, g], [*ends, *[0] * (4 - k)])
        np.testing.assert_allclose(rollout.turns.rewards[b, g], [*rewards, *[0] * (4 - k)])
        np.testing.assert_array_equal(rollout.turns.mask[b, g], np.arange(4) < k)
        seen.add((k, won))
    assert len(seen) >= 4
    total, mask = turn_rewards(rollout)
    np.testing.assert_allclose(total[..., 0], rollout.turns.rewards.sum(-1), rtol=1e-6)
    assert mask.all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_the_scored_ones(temperature):
    rollout = game(temperature=temperature)(POLICY, params_of(), prompts_of(0), jax.random.key(1))
    scored = score(POLICY, params_of(), rollout, temperature=temperature).log_probs
    np.testing.assert_allclose(np.where(rollout.mask, scored, 0), rollout.log_probs, atol=1e-5)


def whole_game(key):
    """Three steps of training, from the first weights on, as a function that can be mapped over seeds."""
    optimizer = optax.adam(1e-3)
    step = make_train_step(TINIER, optimizer, game(max_turns=2), loss=losses.grpo(), reward=turn_rewards)

    def one(state, n):
        state, metrics = step(state, Prompts(*prompts_of(0)[:2], {"number": (jnp.arange(4) + n) % NUMBERS}))
        return state, summary(metrics)["reward"]

    return jax.lax.scan(one, init_state(TINIER.init(key), optimizer, key), jnp.arange(3))


@pytest.mark.slow
def test_whole_runs_are_scanned_and_mapped_over_seeds():
    keys = jax.random.split(jax.random.key(3), 2)
    _, rewards = jax.jit(jax.vmap(whole_game))(keys)
    assert rewards.shape == (2, 3)
    assert len(np.unique(rewards)) > 2


# ------------------------------------------------------------ the host's form of the same


WORDS = from_logits_fn(lambda params, tokens, mask: params[tokens] + 0.3 * jnp.cumsum(params[tokens], axis=1))


class Letters:
    """Ten tokens, each a letter; what conversations on the host ask of a tokenizer."""

    def decode(self, tokens, **settings):
        return "".join("abcdefghij"[token] for token in tokens)


def echo(tokens, length, state):
    """Says the turn's length and the number of turns so far, as a word of 1 to 3 tokens."""
    size = 1 + length % 3
    return jnp.full((3,), state % 10), size, state + 1, length > 6, length / 2.0


def test_the_same_conversations_are_drawn_on_the_host():
    table = jax.random.normal(jax.random.key(5), (10, 10))
    prompts = Prompts(jnp.array([[1, 2, 3], [4, 0, 0]]), jnp.array([3, 1]), {"row": jnp.arange(2)})
    sampler = sampling.sampler(group_size=6, max_tokens=30, eos_ids=(0, 9))
    traced = traced_conversations(sampler, echo, lambda info, key: jnp.array(2), max_turns=4, turn_tokens=31)

    def respond(row, messages):
        length, turns = len(messages[-1]["content"]) + 1, len(messages) // 2  # the end token is no text
        if length > 6:
            return Turn(None, length / 2)
        return Turn("x" * (1 + length % 3) + str(turns + 1), length / 2)

    def between(messages, last):
        text = messages[0]["content"]
        return [int(text[-1]) % 10] * (len(text) - 1)

    on_host = conversations(sampler, respond, Letters(), [{"prompt": "x"}] * 2, max_turns=4, between=between)
    one, other = (jax.device_get(f(WORDS, table, prompts, jax.random.key(6))) for f in (traced, on_host))
    assert len(np.unique((one.turns.ends > 0).sum(-1))) > 2
    for name in ("tokens", "lengths", "mask", "truncated", "turns"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_stop_strings_end_each_turn():
    stop = sampling.StopStrings(jnp.array([0] + [1] * 3 + [0] * 5 + [1]), jnp.array([[0, 1], [1, 1]]))
    sampler = sampling.sampler(group_size=6, max_tokens=40, eos_ids=(), stop=stop)
    say = traced_conversations(
        sampler, lambda tokens, length, state: (jnp.array([5]), state % 2, state + 1, False, 0.0),
        lambda info, key: jnp.array(0), max_turns=4, turn_tokens=9,
    )  # fmt: skip
    prompts = Prompts(jnp.array([[1]]), jnp.array([1]))
    rollout = jax.device_get(say(WORDS, jnp.zeros((10, 10)), prompts, jax.random.key(6)))
    lengths = []
    for g in range(6):
        ends = rollout.turns.ends[0, g]
        starts = [0, *(ends[:-1] + np.arange(3) % 2)]  # an answer of no token lets the policy go on
        for a, b in zip(starts, ends, strict=True):
            stops = np.isin(rollout.tokens[0, g, a:b], [1, 2, 3, 9])
            assert not stops[:-1].any()
            assert stops[-1] or b - a == 9
            lengths.append(b - a)
    assert len(set(lengths)) > 3


def wrong(**changes):
    returned = {"tokens": jnp.zeros(2, jnp.int32), "length": 1, "state": jnp.array(1), "done": True, "reward": 0.0}
    return lambda tokens, length, state: tuple((returned | changes).values())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (wrong(tokens=jnp.array(1)), r"got tokens \(\)"),
        (wrong(done=jnp.array(1)), r"done \(\) int32"),
        (wrong(reward=jnp.zeros(2)), r"reward \(2,\)"),
        (wrong(state=jnp.zeros(2)), "keeps its shapes and types"),
    ],
)
def test_an_environment_of_other_shapes_is_refused(environment, message):
    sampler = sampling.sampler(group_size=2, max_tokens=8, eos_ids=())
    made = traced_conversations(sampler, environment, hidden_number, max_turns=2, turn_tokens=1)
    with pytest.raises(ValueError, match=message):
        made(POLICY, params_of(), prompts_of(0), jax.random.key(0))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        game(max_turns=0)
    slots = sampling.continuous(slots=2, group_size=2, max_tokens=8, eos_ids=())
    with pytest.raises(ValueError, match="without slots, not 2"):
        traced_conversations(slots, guess_the_number, hidden_number, max_turns=1, turn_tokens=1)


def test_a_reward_that_is_no_number_masks_its_conversation_and_is_counted():
    rewards = jnp.ones(V).at[jnp.array([5, 6, 7])].set(jnp.array([jnp.nan, -jnp.inf, 1e30]))

    def broken(tokens, length, number):
        *answer, _ = guess_the_number(tokens, length, number)
        return *answer, rewards[tokens[0]]

    made = sampling.sampler(group_size=8, max_tokens=7, eos_ids=())
    made = traced_conversations(made, broken, hidden_number, max_turns=2, turn_tokens=1)
    policy = from_logits_fn(lambda params, tokens, mask: params[tokens])  # the quickest to compile
    rollout = jax.device_get(made(policy, jnp.zeros((V, V)), prompts_of(0), jax.random.key(1)))
    took_place = rollout.turns.ends > 0
    wrong = (np.isin(rollout.tokens[..., [0, 3]], [5, 6, 7]) & took_place).any(-1)
    assert {0, 1} == {*np.unique(wrong)} == {*np.unique(wrong & took_place[..., 1])}
    np.testing.assert_array_equal(rollout.turns.failed, wrong)
    np.testing.assert_array_equal(rollout.mask.any(-1), ~wrong)
    total, mask = turn_rewards(rollout)
    np.testing.assert_array_equal(mask[..., 0], ~wrong)
    np.testing.assert_array_equal(total[..., 0], np.where(wrong, 0, took_place.sum(-1)))
