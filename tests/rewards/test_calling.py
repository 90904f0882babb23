"""What reward functions are given, and what comes of the ways in which they fail."""

import asyncio
import copy
import dataclasses
import sys
import threading

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from test_rewards import DATASET, a_rollout, letters

from grpo_jax import rewards
from grpo_jax.data import make_prompts

ROLLOUT = a_rollout([["a", "bb"], ["ccc", "d"]])


def scored(*functions, dataset=DATASET, rollout=ROLLOUT, trainer_state=None, **settings):
    values, mask = rewards.host(functions, dataset, letters(), **settings)(rollout, trainer_state)
    return np.where(mask, values, np.nan)


# ---------------------------------------------------------------------------- the place in the run


def test_the_trainers_state_reaches_functions_that_name_it_or_take_everything():
    """As in TRL, where a reward may change with the step."""
    seen = []

    def names(completions, trainer_state):
        seen.append(trainer_state)
        return [float(trainer_state.global_step)] * len(completions)

    def takes_all(completions, **kwargs):
        return [kwargs["trainer_state"].global_step / kwargs["trainer_state"].max_steps] * len(completions)

    def takes_neither(completions):
        return [0.0] * len(completions)

    both = rewards.combine([names, rewards.skip_failed_batches(takes_all)])
    state = rewards.TrainerState(global_step=3, max_steps=4)
    values = scored(names, takes_all, takes_neither, both, trainer_state=state)
    assert values[0, 0].tolist() == [3.0, 0.75, 0.0, 3.75]
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].global_step = 5


def test_outside_of_a_run_the_trainers_state_is_none():
    assert scored(lambda completions, trainer_state: [float(trainer_state is None)] * len(completions)).all()


# ---------------------------------------------------------------------------- functions that fail


def leaves(completions, **columns):
    sys.exit(0)


async def leaves_later(completions, **columns):
    await asyncio.sleep(0)
    sys.exit("done")


def cancels(completions, **columns):
    raise asyncio.CancelledError


async def cancels_later(completions, **columns):
    task = asyncio.create_task(asyncio.sleep(9))
    await asyncio.sleep(0)
    task.cancel()
    await task


def closes(completions, **columns):
    raise GeneratorExit


@pytest.mark.parametrize("function", [cancels, cancels_later, closes])
def test_a_cancelled_task_of_a_reward_is_an_error_and_a_failed_batch(function):
    with pytest.raises(RuntimeError, match=r"raised (CancelledError|GeneratorExit)") as error:
        scored(function)
    assert error.value.__notes__ == [f"raised by the reward function {function.__name__} over 4 completions"]
    with pytest.warns(RuntimeWarning, match=rf"{function.__name__} failed on a batch of 4"):
        assert np.isnan(scored(rewards.skip_failed_batches(function))).all()


class TimedOut(BaseException):
    """As that of func_timeout."""


def times_out(completions, **columns):
    raise TimedOut


async def times_out_later(completions, **columns):
    await asyncio.sleep(0)
    raise TimedOut


@pytest.mark.parametrize("function", [times_out, times_out_later])
def test_what_is_no_exception_of_pythons_is_an_error_and_a_failed_batch(function):
    with pytest.raises(RuntimeError, match="a reward function raised TimedOut"):
        scored(function)
    with pytest.warns(RuntimeWarning, match=rf"{function.__name__} failed on a batch of 4"):
        assert np.isnan(scored(rewards.skip_failed_batches(function))).all()


def test_a_reward_that_is_cancelled_since_another_raised_is_no_second_error(caplog):
    async def waits(completions, **columns):
        await asyncio.sleep(9)

    async def raises(completions, **columns):
        raise KeyError("the first")

    with pytest.raises(KeyError, match="the first"):
        scored(waits, raises)
    assert not caplog.records


@pytest.mark.parametrize(("function", "code"), [(leaves, "0"), (leaves_later, "'done'")], ids=["plain", "async"])
def test_sys_exit_in_a_reward_is_an_error_and_a_failed_batch_and_not_the_end_of_the_run(function, code):
    with pytest.raises(RuntimeError, match=rf"called sys.exit\({code}\)") as error:
        scored(function)
    assert error.value.__notes__ == [f"raised by the reward function {function.__name__} over 4 completions"]
    with pytest.warns(RuntimeWarning, match=rf"{function.__name__} failed on a batch of 4(.|\n)*called sys.exit"):
        assert np.isnan(scored(rewards.skip_failed_batches(function))).all()


@pytest.mark.parametrize("nan", [float("nan"), np.float32("nan"), np.array(np.nan)], ids=["float", "NumPy", "array"])
def test_nan_masks_its_completion_with_a_warning_and_a_metric(nan):
    metrics = {}

    def ratio(completions):
        return [0.5, nan, 1.0, None]

    with pytest.warns(RuntimeWarning, match="ratio returned NaN for 1 of 4 completions, .* the first is completion 1"):
        values = scored(ratio, log_metric=metrics.__setitem__)
    np.testing.assert_array_equal(values[..., 0], [[0.5, np.nan], [1.0, np.nan]])
    assert metrics == {"ratio/nan": 1.0}
    with pytest.warns(RuntimeWarning, match="ratio returned NaN"):
        assert scored(rewards.combine([ratio, lambda completions: [1.0] * 4]))[..., 0].tolist() == [[1.5, 1], [2, 1]]


def test_an_async_reward_keeps_its_client_and_may_call_others_that_wait():
    loops = []

    async def inner(completions, **columns):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def outer(completions, **columns):
        loops.append(asyncio.get_running_loop())
        return rewards.combine([inner])(prompts=completions, completions=completions)

    assert (scored(outer) == 1).all()
    assert (scored(outer) == 1).all()
    assert loops[0] is loops[1]


def test_none_is_no_nan_and_no_warning():
    assert np.isnan(scored(lambda completions: [None] * 4)).all()


def test_a_reward_that_hangs_is_reported_with_its_line_and_the_way_out():
    release = threading.Event()
    threading.Timer(0.6, release.set).start()

    def slow(completions):
        release.wait()  # the line
        return [1.0] * len(completions)

    with pytest.warns(RuntimeWarning) as told:
        assert scored(slow, report_after=0.1).all()
    (warning,) = told
    assert "the reward slow has been at work on 4 completions for 0.1 s" in str(warning.message)
    assert "in_worker_processes" in str(warning.message)
    assert "release.wait()  # the line" in str(warning.message)


def test_one_that_is_async_and_hangs_is_reported_too_and_a_quick_one_is_not():
    async def slow(completions):
        await asyncio.sleep(0.5)
        return [1.0] * len(completions)

    with pytest.warns(RuntimeWarning, match="the reward slow has been at work"):
        scored(slow, lambda completions: [1.0] * 4, report_after=0.1)
    scored(lambda completions: [1.0] * 4, report_after=0.1)
    threading.Event().wait(0.3)  # its timer would have come by now


# ---------------------------------------------------------------------------- values of its own


def vandal(prompts, completions, completion_ids, tests, **columns):
    """Writes into all that it is given."""
    sizes = [
        len(test["cases"]) + len(prompt) + len(ids)
        for test, prompt, ids in zip(tests, prompts, completion_ids, strict=True)
    ]
    for values in (prompts, completions, completion_ids, tests):
        for value in values:
            value["cases"].pop() if isinstance(value, dict) else value.append("more")
        values.clear()
    return [float(size) for size in sizes]


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "combined"])
def test_a_reward_that_writes_into_its_arguments_changes_nothing_for_others(wrapped):
    """Neither for the other completions of a group, nor for other rewards, nor in the data set."""
    dataset = [{"prompt": [{"role": "user", "content": "?"}], "tests": {"cases": [1, 2, 3]}} for _ in range(2)]
    rollout = a_rollout([["a", "bb"], ["ccc", "d"]], rows=[1, 0])
    function = rewards.combine([vandal, vandal]) if wrapped else vandal
    first = scored(function, vandal, dataset=dataset, rollout=rollout)
    again = scored(function, vandal, dataset=dataset, rollout=rollout)
    np.testing.assert_array_equal(first, again)
    assert first[..., 1].tolist() == [[5, 6], [7, 5]]
    assert dataset == [{"prompt": [{"role": "user", "content": "?"}], "tests": {"cases": [1, 2, 3]}}] * 2


# ---------------------------------------------------------------------------- numbers that float32 does not have


def test_rewards_that_float32_would_merge_are_refused_and_rounding_is_not():
    """1e8 and 1e8 + 3 are one number there, so that all advantages would be 0."""
    for values in ([1e8, 1e8 + 1, 1e8 + 2, 1e8 + 3], [-3e9, -3e9 + 7, 0.0, 0.0]):
        with pytest.raises(ValueError, match=r"the reward function <lambda> returned .* float32 cannot tell apart"):
            scored(lambda completions, values=values: values)
    for values in ([1e8, 1e8, 1e20, 0.0], [0.1 + 0.2, 0.3, None, 1e9], [2.0**24, 2.0**24 - 1, -1e12, 1e12]):
        given = scored(lambda completions, values=values: values)
        np.testing.assert_array_equal(given.ravel(), np.array(values, np.float32))


def test_a_completion_is_seen_as_it_was_written_whatever_the_tokenizer_would_tidy_up():
    tokenizer = copy.deepcopy(letters())
    tokenizer.clean_up_tokenization_spaces = True
    seen = []
    reward = rewards.host([lambda completions: seen.extend(completions) or [0.0] * 4], DATASET, tokenizer)
    reward(a_rollout([["a .", "b ."], ["a", "b"]]))
    assert seen == ["a .", "b .", "a", "b"]


# ---------------------------------------------------------------------------- rewards that need a group


def test_a_reward_that_compares_a_group_says_so_through_what_wraps_it():
    majority = rewards.self_consistency(group_size=2)

    def own(completions):
        return [0.0] * len(completions)

    assert rewards.group_size_of(own) is None
    own.group_size = 4
    assert rewards.group_size_of(own) == 4
    assert rewards.group_size_of(majority) == 2
    assert rewards.group_size_of(rewards.skip_failed_batches(majority)) == 2
    assert rewards.group_size_of(rewards.combine([majority, vandal])) == 2
    with pytest.raises(ValueError, match="groups of different sizes"):
        rewards.combine([majority, own])


def test_groups_of_another_size_are_refused():
    assert scored(rewards.self_consistency(group_size=2)).shape == (2, 2, 1)
    for texts in ([["a"], ["b"]], [["a"] * 4]):
        with pytest.raises(ValueError, match=f"self_consistency compares groups of 2 .* these have {len(texts[0])}"):
            scored(rewards.self_consistency(group_size=2), rollout=a_rollout(texts))


def test_of_several_processes_all_functions_tell_of_failures_or_none_does(monkeypatch):
    def plain(completions):
        return [0.0] * len(completions)

    skipping = rewards.skip_failed_batches(lambda completions: plain(completions))
    rewards.host([plain, skipping], DATASET, letters())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for functions in ([plain, plain], [skipping, skipping]):
        rewards.host(functions, DATASET, letters())
    with pytest.raises(ValueError, match="<lambda> would wait for other processes in which plain has raised"):
        rewards.host([plain, skipping], DATASET, letters())


# ---------------------------------------------------------------------------- text of special tokens

SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>", "<eos>", "<pad>"]


def chat_tokenizer(*, special_tags):
    """Letters, tags that are tokens, special or not, and special tokens between turns."""
    fast = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: i for i, letter in enumerate("abc.\n")}, unk_token=".")
    )
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    tags = ["<think>", "</think>"]
    fast.add_special_tokens(SPECIAL + (tags if special_tags else []))
    fast.add_tokens([] if special_tags else tags)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>{{ '\n<think>\n' }}"
    )
    return tokenizer


def rollout_of(tokenizer, prompt, texts):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rollout = a_rollout([texts])
    width = max(map(len, ids))
    tokens = np.array([row + [0] * (width - len(row)) for row in ids])
    prompts = make_prompts([prompt], rows=[0])
    return rollout._replace(prompts=prompts, tokens=tokens[None], lengths=np.array([list(map(len, ids))]))


@pytest.mark.parametrize("special_tags", [False, True], ids=["tags of text", "tags that are special tokens"])
def test_all_but_the_end_tokens_is_visible_to_rewards(special_tags):
    tokenizer = chat_tokenizer(special_tags=special_tags)
    rollout = rollout_of(tokenizer, [1], ["<think>a</think>b<|end|>", "<think>a<|user|>b", "c<eos>"])
    seen = {}

    def reward(completions, completion_ids, **columns):
        seen.update(texts=completions, ids=completion_ids)
        return [0.0] * len(completions)

    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<eos>"])
    rewards.host([reward], DATASET, tokenizer, eos_ids=ends)(rollout)
    assert seen["texts"] == ["<think>a</think>b", "<think>a<|user|>b", "c"]
    assert [ids[-1] for ids in seen["ids"]] == [ends[0], tokenizer.convert_tokens_to_ids("b"), ends[1]]
    assert rewards.completion_texts(rollout, tokenizer, ends) == [seen["texts"]]
    # By default the tokenizer's own end alone is left out.
    assert rewards.completion_texts(rollout, tokenizer)[0] == ["<think>a</think>b<|end|>", "<think>a<|user|>b", "c"]


@pytest.mark.parametrize("special_tags", [False, True], ids=["tags of text", "tags that are special tokens"])
def test_format_rewards_go_on_from_the_tag_that_the_template_opens(special_tags):
    """As those of R1-Distill, QwQ and Qwen3-Thinking do: a second `<think>` is one too many."""
    tokenizer = chat_tokenizer(special_tags=special_tags)
    messages = [{"role": "user", "content": "abc"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    rollout = rollout_of(
        tokenizer,
        tokenizer(text)["input_ids"],
        ["a</think>b<|end|>", "<think>a</think>b<|end|>", "ab<|end|>"],
    )
    tails = []

    def reward(completions, prompt_tail):
        tails.extend(prompt_tail)
        return [0.0] * len(completions)

    one = rewards.soft_format(tags=["think"])
    host = rewards.host([one, reward], [{"prompt": messages}], tokenizer, eos_ids=tokenizer("<|end|>")["input_ids"])
    assert host(rollout)[0][0, :, 0].tolist() == [1, 0, 0]
    assert tails == ["\n<think>\n"] * 3
