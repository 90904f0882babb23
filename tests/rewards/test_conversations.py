"""Rewards of conversations see who said what, and what the environment gave; where it failed, there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import data, processes, rewards
from grpo_jax.run import completions
from grpo_jax.sampling import turn_rewards
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import Experience, Prompts, Rollout, Turns

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
BETWEEN, READ = data.between_turns(TOKENIZER), data.read_between(TOKENIZER)
ROWS = [{"prompt": [{"role": "user", "content": "begin"}], "answer": 7}] * 2


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def rollout_of(conversations, *, given, failed):
    """`[B=1, G]` of lists of texts, the policy's first; a text that ends in ! ends without the end token."""
    G, T, K = len(conversations), 120, 3
    tokens, mask = np.zeros((1, G, T), np.int32), np.zeros((1, G, T), bool)
    lengths, ends = np.zeros((1, G), np.int32), np.zeros((1, G, K), np.int32)
    for g, texts in enumerate(conversations):
        line, wrote = [], []
        for n, text in enumerate(texts):
            if n % 2 == 0:
                part = ids(text) + ([] if text.endswith("!") else [END])
                ends[0, g, n // 2] = len(line) + len(part)
            else:
                part = BETWEEN([{"role": "user", "content": text}], line[-1])
            line, wrote = line + part, wrote + [n % 2 == 0] * len(part)
        tokens[0, g, : len(line)], mask[0, g, : len(line)], lengths[0, g] = line, wrote, len(line)
    log_probs = np.where(mask, -1.0, 0.0).astype(np.float32)
    failed = np.array([failed])
    reward_mask = np.array([[[r is not None for r in row] for row in given]])
    values = np.array([[[r or 0.0 for r in row] for row in given]], np.float32)
    prompts = Prompts(jnp.ones((1, 2), jnp.int32), jnp.array([2]), {"row": jnp.array([0])})
    turns = Turns(ends, values, reward_mask & ~failed[..., None], failed)
    return Rollout(prompts, tokens, lengths, mask & ~failed[..., None], log_probs, np.zeros((1, G), bool), turns=turns)


ROLLOUT = rollout_of(
    [["5", "higher", "is it 7?"], ["9!", "lower <|im_end|>", "8"], ["7"]],
    given=[[-0.5, 1.0, None], [None, None, None], [1.0, None, None]],
    failed=[False, True, False],
)
SAID = [
    [("assistant", "5"), ("user", "higher"), ("assistant", "is it 7?")],
    [("assistant", "9!"), ("user", "lower <|im_end|>"), ("assistant", "8")],
    [("assistant", "7")],
]


def test_functions_see_messages_and_what_was_given_for_each_turn():
    seen = {}

    def remember(prompts, completions, turn_rewards, **columns):
        seen.update(completions=completions, turn_rewards=turn_rewards)
        return [float("7" in rewards.text_of(completion)) for completion in completions]

    reward = rewards.host([remember, rewards.environment], ROWS, TOKENIZER, eos_ids=(END,), read=READ)
    values, mask = reward(ROLLOUT)
    assert [[(m["role"], m["content"]) for m in completion] for completion in seen["completions"]] == SAID
    assert seen["turn_rewards"] == [[-0.5, 1.0], [None, None], [1.0]]
    np.testing.assert_array_equal(mask[0, :, 0], [True, False, True])  # it failed in the second
    np.testing.assert_array_equal(values[0, :, 0], [1.0, 0.0, 1.0])
    traced, traced_mask = turn_rewards(ROLLOUT)
    np.testing.assert_array_equal(mask[..., 1], traced_mask[..., 0])
    np.testing.assert_array_equal(values[..., 1], traced[..., 0])


def test_tokens_that_are_certain_tear_no_turn():
    """Their log-prob is 0, as that of what an environment wrote, and a failed conversation has no mask."""
    wrote = ROLLOUT.log_probs < 0
    begins = wrote & ~np.pad(wrote, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    rollout = ROLLOUT._replace(log_probs=np.where(begins, ROLLOUT.log_probs, 0.0))
    (said,) = rewards.conversation_messages(rollout, TOKENIZER, (END,), READ)
    assert [[(m["role"], m["content"]) for m in completion] for completion in said] == SAID


def test_the_tokens_of_a_conversation_are_those_that_the_policy_wrote():
    seen = []

    def remember(completion_ids, **columns):
        seen.extend(completion_ids)
        return [0.0] * 3

    rewards.host([remember], ROWS, TOKENIZER, eos_ids=(END,))(ROLLOUT)
    assert seen == [[*ids("5"), END, *ids("is it 7?"), END], [*ids("9!"), *ids("8"), END], [*ids("7"), END]]


def test_of_several_processes_each_sees_its_own_conversations(monkeypatch):
    """Here the process looks after the second of two groups."""
    two = jax.tree.map(
        lambda *groups: np.concatenate([*map(np.asarray, groups)]),
        rollout_of([["1", "a", "2"]], given=[[0.1, 0.2, None]], failed=[False]),
        rollout_of([["3"]], given=[[0.5, None, None]], failed=[False]),
    )
    two.prompts.info["row"] = np.arange(2)
    seen = {}

    def remember(completions, turn_rewards, completion_ids, **columns):
        seen.update(completions=completions, turn_rewards=turn_rewards, completion_ids=completion_ids)
        return [1.0]

    own = np.array([1])
    monkeypatch.setattr(processes, "own_rows", lambda tree, of: (own, jax.tree.map(lambda x: np.asarray(x)[own], tree)))
    values, _ = rewards.host([remember], ROWS, TOKENIZER, eos_ids=(END,), read=READ)(two)
    assert values[1, 0, 0] == 1.0
    assert seen == {
        "completions": [[{"role": "assistant", "content": "3"}]],
        "turn_rewards": [[0.5]],
        "completion_ids": [[*ids("3"), END]],
    }
    experience = Experience(two, rewards=np.zeros((2, 1, 1)), reward_mask=np.ones((2, 1, 1), bool))
    (line,) = completions.lines(experience, TOKENIZER, ROWS, ["r"])
    assert line["turns"] == [{"by": "policy", "text": TOKENIZER.decode([*ids("3"), END])}]


def test_without_a_reader_the_text_between_is_as_it_stands():
    ((messages, *_),) = rewards.conversation_messages(ROLLOUT, TOKENIZER, (END,))
    assert messages[1] == {"role": "user", "content": "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"}


def test_the_environments_reward_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="sample with an environment"):
        rewards.environment(["a"])
