"""Sums of digits on tokens, against texts that are written and read in plain Python."""

import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.scoring import score
from grpo_jax.tasks import modular_sums
from grpo_jax.tasks.modular_sums import TeacherRates
from grpo_jax.testing import tiny_policy
from grpo_jax.types import Experience, Prompts, Rollout

TERMS, B = 5, 4000
T = 2 * TERMS + 6
TRACES = []


class Drawn(NamedTuple):
    rollout: Rollout
    digits: list[list[int]]  # of each problem
    texts: list[str]  # of each demonstration


def draw(key, teacher, modulus):
    TRACES.append(modulus)
    of_problems, of_teacher = jax.random.split(key)
    prompts = modular_sums.problems(of_problems, B, terms=TERMS, modulus=modulus)
    return modular_sums.demonstrations(of_teacher, prompts, teacher, modulus=modulus)


compiled_draw = jax.jit(draw, static_argnums=2)


def drawn(*, seed=0, modulus=10, **teacher):
    rollout = jax.device_get(compiled_draw(jax.random.key(seed), TeacherRates(**teacher), modulus))
    rows = zip(rollout.tokens[:, 0].tolist(), rollout.lengths[:, 0].tolist(), strict=True)
    texts = ["".join(modular_sums.WORDS[token] for token in row[:length]) for row, length in rows]
    return Drawn(rollout, rollout.prompts.tokens[:, :-1].tolist(), texts)


def running_sums(digits, modulus, *, leave_out=False):
    kept = [digits[0]] + [0 if leave_out else digit for digit in digits[1:]]
    return [total % modulus for total in itertools.accumulate(kept)]


def written(sums, *, times=1):
    return f"<think>{''.join(map(str, sums)) * times}</think><answer>{sums[-1]}</answer><eos>"


def parsed(text):
    """The working and the answer."""
    working, answer = re.fullmatch(r"<think>(\d*)</think><answer>(\d)</answer><eos>", text).groups()
    return list(map(int, working)), int(answer)


def near(share, wanted, count):
    """Within 4 standard deviations of a binomial share."""
    return abs(share - wanted) < 4 * (wanted * (1 - wanted) / count) ** 0.5


# ------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("modulus", [10, 3])
def test_the_answer_is_the_sum_of_the_prompts_digits(modulus):
    prompts = drawn(modulus=modulus).rollout.prompts
    assert prompts.tokens.shape == (B, TERMS + 1)
    assert {"".join(modular_sums.WORDS[token] for token in row)[-1] for row in prompts.tokens} == {"="}
    assert set(prompts.lengths.tolist()) == {TERMS + 1}
    answers = [[sum(row[:-1]) % modulus] for row in prompts.tokens.tolist()]
    assert prompts.info["answer"].tolist() == answers
    assert set(prompts.info["answer_length"].tolist()) == {1}
    assert {str(x.dtype) for x in jax.tree.leaves(prompts)} == {"int32"}


@pytest.mark.parametrize("modulus", [10, 3])
def test_every_digit_below_the_modulus_comes_equally_often_at_every_place(modulus):
    digits = np.array(drawn(modulus=modulus).digits)
    for place in range(TERMS):
        counts = np.bincount(digits[:, place], minlength=modulus)
        assert len(counts) == modulus
        assert all(near(count / B, 1 / modulus, B) for count in counts)


def test_problems_are_a_function_of_the_key():
    a, again, other = drawn(), drawn(), drawn(seed=1)
    assert a.digits == again.digits != other.digits
    assert a.texts == again.texts
    assert len({tuple(row) for row in a.digits}) > 0.9 * B  # of 100,000


@pytest.mark.parametrize(("terms", "modulus"), [(1, 10), (3, 1), (3, 11)])
def test_sums_out_of_range_are_refused_with_the_numbers_met(terms, modulus):
    with pytest.raises(ValueError, match=f"got {terms} terms modulo {modulus}$"):
        modular_sums.problems(jax.random.key(0), 2, terms=terms, modulus=modulus)


# ------------------------------------------------------------------------- demonstrations


def test_the_example_of_the_module_is_what_it_says():
    prompts = Prompts(jnp.array([[3, 8, 5, 2, modular_sums.EQUALS]]), jnp.array([5]))
    rollout = jax.jit(modular_sums.demonstrations)(jax.random.key(0), prompts, TeacherRates())
    row, length = rollout.tokens[0, 0], rollout.lengths[0, 0]
    assert modular_sums.text(row, length) == "<think>3168</think><answer>8</answer><eos>"
    assert modular_sums.text(prompts.tokens[0], 5) == "3852="


@pytest.mark.parametrize("modulus", [10, 3])
@pytest.mark.parametrize(
    ("teacher", "leave_out", "times"),
    [({}, False, 1), ({"slip": 1.0}, True, 1), ({"check": 1.0}, False, 2), ({"slip": 1.0, "check": 1.0}, True, 2)],
    ids=["works it out", "leaves out", "checks", "checks what it left out"],
)
def test_each_way_of_working_reads_as_written_in_plain_python(teacher, leave_out, times, modulus):
    _, digits, texts = drawn(**teacher, modulus=modulus)
    assert texts == [written(running_sums(row, modulus, leave_out=leave_out), times=times) for row in digits]


@pytest.mark.parametrize("check", [0.0, 1.0])
def test_a_guess_has_no_working_to_check_and_any_digit_for_an_answer(check):
    _, digits, texts = drawn(guess=1.0, check=check)
    workings, answers = zip(*map(parsed, texts), strict=True)
    assert not any(workings)
    assert all(near(count / B, 0.1, B) for count in np.bincount(answers, minlength=10))
    right = np.mean([sum(row) % 10 == answer for row, answer in zip(digits, answers, strict=True)])
    assert near(right, 0.1, B)


def test_the_teacher_slips_guesses_and_checks_as_often_as_asked():
    """Of what can be told: a term of 0 that is left out leaves no trace."""
    _, digits, texts = drawn(slip=0.3, guess=0.2, check=0.25)
    slips, checked = [], []
    for row, (working, answer) in zip(digits, map(parsed, texts), strict=True):
        if not working:
            continue
        checked.append(len(working) == 2 * TERMS)
        sums = working[:TERMS]
        assert working == sums * (2 if checked[-1] else 1)
        assert answer == sums[-1]
        assert sums[0] == row[0]  # the first term is never left out
        added = [(after - before) % 10 for before, after in itertools.pairwise(sums)]
        assert all(a in (0, term) for a, term in zip(added, row[1:], strict=True))
        slips.append([a == 0 if term else np.nan for a, term in zip(added, row[1:], strict=True)])
    assert near(1 - len(checked) / B, 0.2, B)
    assert near(np.mean(checked), 0.25, len(checked))
    of_place = np.nanmean(slips, axis=0)
    assert all(near(share, 0.3, 0.9 * len(slips)) for share in of_place)
    neighbours = np.array(slips)[:, 0] * np.array(slips)[:, 1]  # independent of each other
    assert near(np.nanmean(neighbours), 0.09, 0.81 * len(slips))
    assert near(np.nanmean(np.array(slips)[checked]), 0.3, 3.6 * sum(checked))  # and of the checks


MIXED = {"slip": 0.5, "guess": 0.3, "check": 0.5}


@pytest.mark.parametrize("teacher", [{}, {"check": 1.0}, {"guess": 1.0}, MIXED], ids=str)
def test_lengths_mask_and_padding_go_with_the_end_token(teacher):
    rollout, _, texts = drawn(**teacher)
    assert rollout.tokens.shape == (B, 1, T)
    words = [re.findall("<.*?>|.", text) for text in texts]
    assert rollout.lengths[:, 0].tolist() == [len(row) for row in words]
    np.testing.assert_array_equal(rollout.mask, np.arange(T) < rollout.lengths[..., None])
    assert not rollout.tokens[~rollout.mask].any()
    assert np.sum(rollout.tokens == modular_sums.EOS) == B
    assert not rollout.truncated.any()
    assert not rollout.log_probs.any()
    assert (rollout.log_probs.shape, str(rollout.log_probs.dtype)) == ((B, 1, T), "float32")


def test_the_longest_completion_is_max_tokens_long_and_none_is_longer():
    assert modular_sums.max_tokens(TERMS) == T
    assert set(drawn(check=1.0).rollout.lengths[:, 0].tolist()) == {T}
    assert set(drawn(**MIXED).rollout.lengths[:, 0].tolist()) == {6, TERMS + 6, T}


def test_the_teachers_numbers_are_traced_and_may_be_mapped_over():
    """One program for all the teachers of this file with a modulus."""
    assert drawn().texts != drawn(slip=0.5).texts != drawn(slip=0.5, guess=0.1).texts
    assert TRACES.count(10) == 1

    def right(slip):
        rollout = draw(jax.random.key(2), TeacherRates(slip=slip), 10)
        return modular_sums.accuracy()(rollout).mean()

    shares = jax.jit(jax.vmap(right))(jnp.array([0.0, 0.3, 1.0]))
    assert shares[0] == 1.0
    assert shares[1] > shares[2] + 0.1
    assert near(float(shares[2]), 0.1, B)  # a sum of 4 uniform digits is 0 as often


# -------------------------------------------------------------------------------- rewards


compiled_rewards = jax.jit(lambda rollout: (modular_sums.accuracy()(rollout), modular_sums.strict_format()(rollout)))


@pytest.mark.parametrize("teacher", [{}, {"check": 1.0}, {"slip": 1.0}, {"guess": 1.0}, MIXED], ids=str)
def test_accuracy_tells_right_demonstrations_from_wrong_and_all_have_the_format(teacher):
    rollout, digits, texts = drawn(**teacher)
    accuracy, formed = compiled_rewards(rollout)
    answers = [answer for _, answer in map(parsed, texts)]
    right = [float(sum(row) % 10 == answer) for row, answer in zip(digits, answers, strict=True)]
    assert accuracy[:, 0].tolist() == right
    assert sum(right) > 0
    assert (sum(right) == B) == (teacher in ({}, {"check": 1.0}))
    np.testing.assert_array_equal(formed, 1.0)


FLAWED = {  # of 3852=, with accuracy and format
    "<think>3168</think><answer>8</answer><eos>": (1, 1),
    "<think>9999</think><answer>8</answer><eos>": (1, 1),  # nobody judges the working
    "<think></think><answer>8</answer><eos>": (1, 1),
    "<think>3168</think><answer>7</answer><eos>": (0, 1),
    "<think>3168</think><answer>88</answer><eos>": (0, 1),
    "<think>3168</think><answer>8</answer>": (1, 0),
    "<think>3168</think>8<answer>8</answer><eos>": (1, 0),
    "3168<answer>8</answer><eos>": (1, 0),
    "<think>3168</think><answer>7</answer><answer>8</answer><eos>": (0, 0),
    "<think>3168</think><answer>8<eos>": (0, 0),
    "3168<eos>": (0, 0),
}


def test_rewards_of_flawed_completions_are_those_written_beside_them():
    rows = [[modular_sums.WORDS.index(word) for word in re.findall("<.*?>|.", text)] for text in FLAWED]
    lengths = np.array([list(map(len, rows))])
    tokens = np.array([[row + [0] * (T - len(row)) for row in rows]])
    mask = np.arange(T) < lengths[..., None]
    prompts = Prompts(
        np.array([[3, 8, 5, 2, modular_sums.EQUALS]]),
        np.array([5]),
        {"answer": np.array([[8]]), "answer_length": np.array([1])},
    )
    rollout = Rollout(prompts, tokens, lengths, mask, np.zeros(mask.shape, np.float32), ~mask[..., -1])
    accuracy, formed = compiled_rewards(jax.tree.map(jnp.asarray, rollout))
    found = zip(accuracy[0].tolist(), formed[0].tolist(), strict=True)
    assert dict(zip(FLAWED, found, strict=True)) == FLAWED


# ------------------------------------------------------------------------------- learning


def test_a_policy_can_be_taught_by_demonstrations():
    """Their log-probs are finite up to the end and 0 beyond, and the supervised loss is their mean."""
    policy = tiny_policy(
        vocab_size=modular_sums.VOCABULARY, hidden_size=16, num_hidden_layers=1, eos_token_id=modular_sums.EOS
    )
    rollout = jax.tree.map(lambda x: x[:8], drawn(**MIXED).rollout)

    def study(key):
        scores = score(policy, policy.init(key), rollout)
        return losses.value(losses.sft()(scores, Experience(rollout))[0]), scores.log_probs

    loss, log_probs = jax.device_get(jax.jit(study)(jax.random.key(0)))
    assert np.all(np.isfinite(log_probs))
    assert np.all(log_probs[rollout.mask] < 0)
    assert not log_probs[~rollout.mask].any()
    np.testing.assert_allclose(loss, -log_probs[rollout.mask].astype(np.float64).mean(), rtol=1e-5)


def test_a_share_of_the_digits_of_the_working_is_in_the_second_script_and_the_reward_sees_it():
    rollout = drawn(check=0.3).rollout
    mixed = jax.device_get(modular_sums.in_two_scripts(jax.random.key(5), rollout, 0.3))
    words, other, working = modular_sums.WORDS_OF_TWO_SCRIPTS, modular_sums.SECOND_SCRIPT, 0
    shares = np.asarray(modular_sums.first_script()(mixed))[:, 0]
    moved = 0
    for b in range(200):
        length = int(mixed.lengths[b, 0])
        text = "".join(words[token] for token in mixed.tokens[b, 0, :length])
        back = "".join(str(other.index(x)) if x in other else x for x in text)
        assert back == modular_sums.text(np.asarray(rollout.tokens)[b, 0], length)
        thought, _, rest = text.removeprefix("<think>").partition("</think>")
        assert not set(rest) & set(other)
        digits = [x for x in thought + rest if x.isdecimal() or x in other]
        seconds = sum(x in other for x in digits)
        assert shares[b] == pytest.approx(1 - seconds / len(digits))
        working, moved = working + len(thought), moved + seconds
    assert moved / working == pytest.approx(0.3, abs=0.04)
