"""All rewards on text: their signature, messages, and under the host."""

import inspect

import numpy as np
import pytest
import tokenizers
import transformers
from calls import scores
from makers import MAKERS, NAMES

from grpo_jax import rewards
from grpo_jax.data import make_prompts
from grpo_jax.types import Rollout

every_reward = pytest.mark.parametrize(("make", "name"), list(zip(MAKERS, NAMES, strict=True)), ids=NAMES)
COLUMNS = {"answer": ["3", None], "completion_ids": [[1, 2, 1], []]}


@every_reward
def test_a_reward_function_has_its_name_and_the_signature_of_trl(make, name):
    reward = make()
    assert rewards.name_of(reward) == name
    parameters = inspect.signature(reward).parameters
    assert list(parameters)[:2] == ["prompts", "completions"]
    extra = {"trainer_state": None, "log_extra": print, "tags": ["a"] * 2, "pattern": ["b"] * 2, "per": [1, 2]}
    completions = ["<think>1+2=3</think><answer>3</answer>", ""]
    plain = reward(prompts=["p", "p"], completions=completions, **COLUMNS)
    assert plain == reward(prompts=["p", "p"], completions=completions, **COLUMNS, **extra)
    assert len(plain) == 2
    assert all(value is None or type(value) is float for value in plain)


@every_reward
def test_chat_messages_are_scored_as_their_text(make, name):
    completions = ["<think>1+2=3</think><answer>3</answer>", "<answer>4</answer>"]
    messages = [[{"role": "assistant", "content": completion}] for completion in completions]
    assert scores(make(), messages, **COLUMNS) == scores(make(), completions, **COLUMNS)


def test_rewards_run_under_host_on_a_rollout():
    letters = {letter: i for i, letter in enumerate("<>/abcdefghiklnrstwkx=+1234 ")}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="x"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), behavior="isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast)
    texts = ["<think>1+2=3</think><answer>3</answer>", "<think>1+2=4</think><answer>4</answer>"]
    ids = np.array(tokenizer(texts)["input_ids"], np.int32)[None]
    rollout = Rollout(make_prompts([[1]], rows=[0]), ids, np.full((1, 2), ids.shape[-1]), None, None, None)
    functions = [make() for make in MAKERS]
    values, mask = rewards.host(functions, [{"prompt": "p", "answer": 3}], tokenizer)(rollout)
    assert mask.all()
    found = dict(zip(NAMES, values[0].T.tolist(), strict=True))
    assert found["exact_answer"] == [1, 0]
    assert found["strict_format"] == [1, 1]
    assert found["worked_steps"] == [1, 0]
    assert found["soft_overlong"] == [-1, -1]
    np.testing.assert_allclose(found["self_consistency"], [-0.1, -0.1])
    assert found["cosine_length"] == [0.5, -0.5]


def test_the_r1_preset_weighs_accuracy_format_and_reasoning_length():
    functions = [rewards.exact_answer(), rewards.soft_format(), rewards.reasoning_length()]
    combined = rewards.combine(functions, weights=rewards.R1_WEIGHTS)
    completion = f"<think>{'a' * 500}</think><answer>7</answer>"
    values = scores(combined, [completion, "<answer>7</answer>", ""], answer=["7", "7", "7"])
    np.testing.assert_allclose(values, [1.0 + 0.1 + 0.01 * 0.5, 1.0 + 0.1 * 0.5, 0.0])
