"""The addition task, on all of its 10,000 problems."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import data
from grpo_jax.tasks import arithmetic

PROBLEMS = np.stack(np.divmod(np.arange(10_000), 100), axis=1)
TENS, ONES = np.divmod(PROBLEMS, 10)
TOKENIZER = arithmetic.tokenizer()


def worked(keep_carry=(True, True)):
    return [arithmetic.worked(problem, keep_carry=keep_carry) for problem in PROBLEMS]


def answers(completions):
    return np.array([int(re.search("<answer>([0-9]{3})</answer>", text)[1]) for text in completions])


# -------------------------------------------------------------------------- splits


def codes(problems):
    return (problems @ [100, 1]).tolist()


def test_the_splits_share_no_problem_and_have_all_of_them():
    splits = arithmetic.splits(0)
    assert [len(split) for split in splits] == [2500, 6244, 256, 1000]
    assert sorted(code for split in splits for code in codes(split)) == list(range(10_000))


def test_the_sizes_of_the_splits_are_those_asked_for():
    splits = arithmetic.splits(1, demonstrations=10, validation=20, test=30)
    assert list(map(len, (splits.demonstrations, splits.validation, splits.test))) == [10, 20, 30]
    assert sorted(code for split in splits for code in codes(split)) == list(range(10_000))


def test_the_splits_follow_from_the_seed():
    once, again, other = map(arithmetic.splits, (3, 3, 4))
    for a, b, c in zip(once, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert codes(a) != codes(c)
        assert codes(a) != sorted(codes(a))


def test_splits_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ValueError, match="the splits take 10000 problems and leave none"):
        arithmetic.splits(0, demonstrations=10_000 - 256 - 1000)


# ------------------------------------------------------------------ worked completions


def test_a_worked_completion_reads_as_in_the_example():
    problem = np.array([37, 58])
    assert arithmetic.prompt(problem) == "37+58="
    assert arithmetic.worked(problem) == "<think>7+8+0=15,3+5+1=09</think><answer>095</answer><eos>"
    forgotten = arithmetic.worked(problem, keep_carry=(False, True))
    assert forgotten == "<think>7+8+0=15,3+5+0=08</think><answer>085</answer><eos>"


def test_numbers_below_ten_are_written_with_two_digits():
    assert arithmetic.prompt(np.array([3, 0])) == "03+00="
    assert arithmetic.worked(np.array([3, 0])) == "<think>3+0+0=03,0+0+0=00</think><answer>003</answer><eos>"


def test_every_answer_is_right_where_the_carries_are_kept():
    np.testing.assert_array_equal(answers(worked()), PROBLEMS.sum(axis=1))


@pytest.mark.parametrize("keep_carry", [(True, True), (True, False), (False, True), (False, False)])
def test_an_answer_is_wrong_exactly_where_a_carry_was_forgotten_that_mattered(keep_carry):
    """And by what that carry was worth."""
    first = ONES.sum(axis=1) >= 10
    second = TENS.sum(axis=1) + (first & keep_carry[0]) >= 10
    lost = 10 * (first & ~np.array(keep_carry[0])) + 100 * (second & ~np.array(keep_carry[1]))
    np.testing.assert_array_equal(answers(worked(keep_carry)), PROBLEMS.sum(axis=1) - lost)


@pytest.mark.parametrize("keep_carry", [(True, True), (False, False)])
def test_the_steps_are_additions_that_are_right_and_lead_to_the_answer(keep_carry):
    """A forgotten carry is forgotten between the steps, not added wrongly within one."""
    step = r"(\d)\+(\d)\+([01])=(\d)(\d)"
    for problem, text in zip(PROBLEMS, worked(keep_carry), strict=True):
        a, b = problem
        pattern = rf"<think>{step},{step}</think><answer>(\d)(\d)(\d)</answer><eos>"
        digits = list(map(int, re.fullmatch(pattern, text).groups()))
        right, left, answer = digits[:5], digits[5:10], digits[10:]
        assert (right[:3], left[:2]) == ([a % 10, b % 10, 0], [a // 10, b // 10])
        for x, y, carry, high, low in (right, left):
            assert x + y + carry == 10 * high + low
        assert answer[1:] == [left[4], right[4]]
        assert (left[2], answer[0]) == ((right[3], left[3]) if all(keep_carry) else (0, 0))


# --------------------------------------------------------------------------- tokens


def test_every_tag_and_every_character_is_a_token():
    assert TOKENIZER.tokenize("12+3=,<think></think><answer></answer><eos>") == [
        *"12+3=,",
        *arithmetic.TAGS,
        arithmetic.EOS,
    ]
    assert len(TOKENIZER) == 2 + 4 + 3 + 10
    assert len(set(TOKENIZER.convert_tokens_to_ids([*arithmetic.TAGS, arithmetic.EOS]))) == 5


def test_every_problem_and_completion_comes_back_from_its_tokens():
    texts = [arithmetic.prompt(problem) for problem in PROBLEMS] + worked()
    assert TOKENIZER.batch_decode(TOKENIZER(texts)["input_ids"]) == texts


def test_the_end_token_ends_a_completion_and_is_left_out_of_its_text():
    ids = TOKENIZER(arithmetic.worked(np.array([1, 2])))["input_ids"]
    assert ids[-1] == TOKENIZER.eos_token_id
    assert ids.count(TOKENIZER.eos_token_id) == 1
    assert TOKENIZER.decode(ids, skip_special_tokens=True).endswith("<answer>003</answer>")


def test_a_saved_tokenizer_is_the_same(tmp_path):
    """A run is exported with it."""
    TOKENIZER.save_pretrained(tmp_path)
    loaded = type(TOKENIZER).from_pretrained(tmp_path)
    texts = worked()[:50]
    assert loaded(texts)["input_ids"] == TOKENIZER(texts)["input_ids"]
    assert loaded.eos_token == arithmetic.EOS


def test_a_right_completion_fits():
    lengths = set(map(len, TOKENIZER(worked())["input_ids"]))
    assert lengths == {25}
    assert max(lengths) <= arithmetic.MAX_TOKENS


def test_prompts_carry_their_answers():
    prompts = arithmetic.encode(TOKENIZER, PROBLEMS)
    assert prompts.tokens.shape == (10_000, 6)
    assert set(prompts.lengths.tolist()) == {6}
    assert TOKENIZER.batch_decode(np.asarray(prompts.tokens[3757:3759])) == ["37+57=", "37+58="]
    assert TOKENIZER.batch_decode(prompts.info["answer"]) == [f"{total:03d}" for total in PROBLEMS.sum(axis=1)]
    assert set(prompts.info["answer_length"].tolist()) == {3}


# -------------------------------------------------------------------- demonstrations


def share_wrong(drop_carry):
    """The probability that a teacher who forgets carries independently is wrong, over all problems."""
    keep = 1 - drop_carry
    first, second = ONES.sum(axis=1) >= 10, TENS.sum(axis=1)
    right_if_no_first = np.where(second >= 10, keep, 1.0)
    right_if_first = keep * np.where(second + 1 >= 10, keep, 1.0)
    return 1 - np.where(first, right_if_first, right_if_no_first).mean()


@pytest.mark.parametrize("drop_carry", [0.0, 0.3, 0.7, 1.0])
def test_the_teacher_is_wrong_as_often_as_forgotten_carries_make_him(drop_carry):
    prompts, completions = arithmetic.flawed_demonstrations(PROBLEMS, 0, drop_carry=drop_carry)
    assert prompts == [arithmetic.prompt(problem) for problem in PROBLEMS]
    wrong = (answers(completions) != PROBLEMS.sum(axis=1)).mean()
    expected = share_wrong(drop_carry)
    assert abs(wrong - expected) <= 4 * np.sqrt(expected * (1 - expected) / 10_000)


def test_the_teacher_shows_both_ways_of_adding():
    completions = set(arithmetic.flawed_demonstrations(np.array([[57, 68]] * 200), 0)[1])
    ways = [(True, True), (True, False), (False, True), (False, False)]
    assert completions == {arithmetic.worked(np.array([57, 68]), keep_carry=way) for way in ways}


def test_demonstrations_follow_from_the_seed():
    once, again, other = (arithmetic.flawed_demonstrations(PROBLEMS[::97], seed) for seed in (0, 0, 1))
    assert once == again
    assert once[0] == other[0]
    assert once[1] != other[1]


# --------------------------------------------------------------------------- rewards


def judged(completions):
    """Accuracy and format of a completion of each problem."""
    ids = TOKENIZER(completions)["input_ids"]
    rollout = data.make_demonstrations([[1]] * len(PROBLEMS), ids, max_tokens=arithmetic.MAX_TOKENS)
    rollout = rollout._replace(prompts=arithmetic.encode(TOKENIZER, PROBLEMS))
    return [np.asarray(ACCURACY(rollout))[:, 0], np.asarray(FORMAT(rollout))[:, 0]]


ACCURACY, FORMAT = jax.jit(arithmetic.accuracy(TOKENIZER)), jax.jit(arithmetic.strict_format(TOKENIZER))


def test_right_completions_have_both_rewards():
    accuracy, formed = judged(worked())
    assert accuracy.all()
    assert formed.all()


def test_wrong_completions_have_the_reward_of_the_format_alone():
    completions = worked((False, False))
    accuracy, formed = judged(completions)
    np.testing.assert_array_equal(accuracy, answers(completions) == PROBLEMS.sum(axis=1))
    assert 0 < accuracy.mean() < 1
    assert formed.all()


def test_an_answer_is_wrong_by_any_digit():
    for digit in (1, 10, 100):
        others = (PROBLEMS.sum(axis=1) + digit) % 1000
        accuracy, _ = judged([f"<think></think><answer>{other:03d}</answer><eos>" for other in others])
        assert not accuracy.any()


def test_a_right_answer_without_the_format_has_the_reward_of_accuracy_alone():
    accuracy, formed = judged([f"<answer>{total:03d}</answer><eos>" for total in PROBLEMS.sum(axis=1)])
    assert accuracy.all()
    assert not formed.any()


def test_an_answer_without_its_leading_zero_is_another():
    totals = PROBLEMS.sum(axis=1)
    accuracy, _ = judged([f"<think></think><answer>{total}</answer><eos>" for total in totals])
    np.testing.assert_array_equal(accuracy, totals >= 100)


def test_both_rewards_are_float32_a_completion():
    rollout = data.make_demonstrations([[1]], [[1]])
    rollout = rollout._replace(prompts=arithmetic.encode(TOKENIZER, PROBLEMS[:1]))
    for reward in (ACCURACY, FORMAT):
        assert (reward(rollout).shape, reward(rollout).dtype) == ((1, 1), jnp.float32)
