"""Rollouts made of what an inference engine returns."""

import jax
import numpy as np
import pytest

from grpo_jax import losses, sampling, testing
from grpo_jax.sampling import from_engine
from grpo_jax.scoring import score
from grpo_jax.types import Experience

B, G, T, EOS = 3, 4, 6, (2, 5)


@pytest.fixture(scope="module")
def sampled():
    policy = testing.tiny_policy("qwen2", vocab_size=9)
    params = jax.jit(policy.init)(jax.random.key(0))
    prompts = testing.random_prompts(0, B, 5, vocab_size=9)
    return (
        policy,
        params,
        sampling.sampler(group_size=G, max_tokens=T, eos_ids=EOS)(policy, params, prompts, jax.random.key(1)),
    )


def lists(rollout):
    """Tokens and log-probs of each completion without padding, as an engine gives them."""
    return [
        [[x[b, g, : rollout.lengths[b, g]].tolist() for g in range(G)] for b in range(B)]
        for x in map(np.asarray, (rollout.tokens, rollout.log_probs))
    ]


def test_a_rollout_in_pieces_is_put_together_again(sampled):
    rollout = sampled[2]
    assert rollout.truncated.any()
    assert not rollout.truncated.all()
    built = from_engine(rollout.prompts, *lists(rollout), eos_ids=EOS, max_tokens=T)
    assert jax.tree.structure(built) == jax.tree.structure(rollout)
    for a, e in zip(jax.tree.leaves(built), jax.tree.leaves(rollout), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def test_an_engine_may_say_what_was_cut(sampled):
    rollout = sampled[2]
    truncated = ~np.asarray(rollout.truncated)
    built = from_engine(rollout.prompts, *lists(rollout), eos_ids=EOS, max_tokens=T, truncated=truncated)
    np.testing.assert_array_equal(built.truncated, truncated)


def test_the_gap_between_engine_and_trainer_is_corrected(sampled):
    """An engine that found one token half as likely as it is: its weight is 2, cut at the limit."""
    policy, params, rollout = sampled
    tokens, log_probs = lists(rollout)
    log_probs[1][2][0] -= np.log(2)
    built = from_engine(rollout.prompts, tokens, log_probs, eos_ids=EOS, max_tokens=T)
    old = score(policy, params, built)
    experience = Experience(built, old_log_probs=old.log_probs)
    for limit, expected in ((3.0, 2.0), (1.5, 1.5)):
        weight, _ = losses.truncated_importance(limit)(old, experience)
        assert weight[1, 2, 0] == pytest.approx(expected, rel=1e-4)
        others = np.asarray(built.mask).copy()
        others[1, 2, 0] = False
        np.testing.assert_allclose(weight[others], 1.0, rtol=1e-4)


WRONG = {
    "a group too few": (lambda t, l: (t[:2], l), r"3 prompts .* in completions, got groups of \[4, 4\]"),
    "a short group": (lambda t, l: (t, [l[0], l[1][:3], l[2]]), r"in log_probs, got groups of \[4, 3, 4\]"),
    "a log-prob too few": (lambda t, l: put(t, l, [7, 7], [-1.0]), "completion 1 of prompt 0 has 2 tokens and 1"),
    "no token": (lambda t, l: put(t, l, [], []), "has 0 tokens and 0 log-probs"),
    "too many": (lambda t, l: put(t, l, [7] * 7, [-1.0] * 7), "has 7 tokens .* max_tokens = 6"),
    "tokens after the end": (
        lambda t, l: put(t, l, [7, 5, 7], [-1.0] * 3),
        "after its end-of-sequence token 5 at place 1",
    ),
    "NaN": (lambda t, l: put(t, l, [7], [float("nan")]), "has the log-prob nan"),
    "a part of a token": (lambda t, l: put(t, l, [7.5], [-1.0]), r"no whole numbers from 0 on: \[7.5\]"),
    "a token below 0": (lambda t, l: put(t, l, [7, -1], [-1.0] * 2), r"no whole numbers from 0 on: \[7, -1\]"),
    "a token beyond 32 bits": (lambda t, l: put(t, l, [2**32 + 7], [-1.0]), "no whole numbers from 0 on"),
    "a probability": (lambda t, l: put(t, l, [7], [0.5]), "has the log-prob 0.5"),
}


def put(tokens, log_probs, new_tokens, new_log_probs):
    tokens[0][1], log_probs[0][1] = new_tokens, new_log_probs
    return tokens, log_probs


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(sampled, wrong):
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        from_engine(sampled[2].prompts, *change(*lists(sampled[2])), eos_ids=EOS, max_tokens=T)


def conversation_of(sampled, **changes):
    """One conversation of two turns, the first ended by 5, with an answer of two tokens between them."""
    given = {"tokens": [7, 5, 6, 8, 7, 7, 2], "log_probs": [-1.0, -2.0, 3.0, np.nan, -0.5, -0.25, -1.5]}
    given |= {"mask": [True, True, False, False, True, True, True]} | changes
    prompts = jax.tree.map(lambda x: x[:1], sampled[2].prompts)
    lists = ([[given[name]]] for name in ("tokens", "log_probs"))
    return from_engine(prompts, *lists, eos_ids=EOS, max_tokens=8, masks=[[given["mask"]]])


def test_a_conversation_counts_what_the_policy_wrote_and_may_hold_ends_of_turns(sampled):
    rollout = jax.device_get(conversation_of(sampled))
    np.testing.assert_array_equal(rollout.tokens[0, 0], [7, 5, 6, 8, 7, 7, 2, 0])
    np.testing.assert_array_equal(rollout.mask[0, 0], [True, True, False, False, True, True, True, False])
    np.testing.assert_array_equal(rollout.log_probs[0, 0], [-1.0, -2.0, 0, 0, -0.5, -0.25, -1.5, 0])
    assert rollout.lengths[0, 0] == 7
    assert not rollout.truncated[0, 0]


@pytest.mark.parametrize(
    "changes", [{"tokens": [7, 5, 6, 8, 7, 7, 7]}, {"mask": [True, True, False, False, True, True, False]}], ids=str
)
def test_a_conversation_is_cut_unless_it_ends_with_an_end_that_the_policy_wrote(sampled, changes):
    assert conversation_of(sampled, **changes).truncated[0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": [True] * 7}, "after its end-of-sequence token 5 at place 1"),
        ({"mask": [True] * 6}, "has 7 tokens and 6 entries in its mask"),
        ({"mask": [False] * 7}, "0 of them True"),
        ({"log_probs": [-1.0, np.nan, 0, 0, -0.5, -0.25, -1.5]}, "has the log-prob nan"),
    ],
    ids=str,
)
def test_a_conversation_that_does_not_fit_is_refused(sampled, changes, message):
    with pytest.raises(ValueError, match=message):
        conversation_of(sampled, **changes)
