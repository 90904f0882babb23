"""Traced verifiers: their rules on tokens, and that they agree with their counterparts on text."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import rewards
from grpo_jax.rewards import tokens
from grpo_jax.tasks import arithmetic
from grpo_jax.types import Prompts, Rollout

TASK = arithmetic.tokenizer()
TAGS = TASK.convert_tokens_to_ids(list(arithmetic.TAGS))
START, END = TAGS[2:]
EOS = TASK.eos_token_id
WIDTH = 20
TRANSFORMS = pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])


def a_rollout(groups, answers=None, width=WIDTH, padding=START):
    """What was sampled, if it was these tokens; the padding looks like the start of an answer. Answers of up to 3."""
    B, G = len(groups), len(groups[0])
    ids = np.full((B, G, width), padding, np.int32)
    lengths = np.array([[len(row) for row in group] for group in groups], np.int32)
    for b, group in enumerate(groups):
        for g, row in enumerate(group):
            ids[b, g, : len(row)] = row
    info = {}
    if answers is not None:
        answer = np.full((B, 3), padding, np.int32)
        for b, row in enumerate(answers):
            answer[b, : len(row)] = row
        info = {"answer": jnp.asarray(answer), "answer_length": jnp.array(list(map(len, answers)), jnp.int32)}
    return Rollout(
        prompts=Prompts(jnp.ones((B, 1), jnp.int32), jnp.ones(B, jnp.int32), info),
        tokens=jnp.asarray(ids),
        lengths=jnp.asarray(lengths),
        mask=jnp.arange(width) < lengths[..., None],
        log_probs=jnp.zeros(ids.shape),
        truncated=jnp.asarray([[EOS not in row for row in group] for group in groups]),
    )


def written(*texts):
    """A rollout of one completion per prompt."""
    return a_rollout([[TASK(completion)["input_ids"]] for completion in texts])


# -------------------------------------------------------------------- agreement with text

PIECES = [
    *[[tag] for tag in TAGS],
    *[[tag] for tag in TAGS],
    *TASK(["1", "2", "+", "12", "<think></think>", "<answer>1</answer>", "</think><answer>"])["input_ids"],
]


def joined(pieces):
    return [token for piece in pieces for token in piece]


FORMED = st.tuples(*[st.lists(st.sampled_from(TASK("12+=,")["input_ids"]), max_size=4)] * 2).map(
    lambda parts: [TAGS[0], *parts[0], *TAGS[1:3], *parts[1], TAGS[3], EOS]
)


def as_sampled(ids):
    """Up to the first end token, or cut at the width."""
    ids = ids[: ids.index(EOS) + 1] if EOS in ids else ids
    return ids[:WIDTH]


ANYTHING = st.lists(st.integers(0, len(TASK) - 1), max_size=WIDTH)
COMPLETION = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=9).map(joined),
    st.lists(st.sampled_from(PIECES), max_size=7).map(lambda pieces: [*joined(pieces), EOS]),
    st.permutations(TAGS).map(lambda tags: [*tags, EOS]),
    FORMED,
    FORMED.map(lambda ids: ids[:-1]),
    ANYTHING,
).map(as_sampled)
DIGITS = st.lists(st.sampled_from(TASK("12")["input_ids"]), min_size=1, max_size=3)  # on text an empty one is missing
B, G = 4, 3  # always of one shape, which compiles once

PAIRS = {  # traced, on text
    "exact_answer": (
        tokens.exact_answer(START, END, thought_start=TAGS[0], thought_end=TAGS[1]),
        rewards.exact_answer(),
    ),
    "format": (tokens.soft_format(TAGS), rewards.soft_format()),
    "tag_count": (tokens.tag_count(TAGS), rewards.tag_count()),
    "strict_format": (tokens.strict_format(TAGS, [EOS]), rewards.strict_format()),
    "self_consistency": (
        tokens.self_consistency(START, END, thought_start=TAGS[0], thought_end=TAGS[1]),
        rewards.self_consistency(group_size=3),
    ),
    "soft_overlong": (tokens.soft_overlong(12, 7), rewards.soft_overlong(12, 7)),
    "repetition of 1": (tokens.repetition_penalty(ngram=1), rewards.repetition_penalty(ngram=1)),
    "repetition of 3": (tokens.repetition_penalty(), rewards.repetition_penalty()),
    "repetition of 2, half": (
        tokens.repetition_penalty(ngram=2, max_penalty=-0.5),
        rewards.repetition_penalty(ngram=2, max_penalty=-0.5),
    ),
    "cosine_length": (
        tokens.cosine_length(
            tokens.exact_answer(START, END, thought_start=TAGS[0], thought_end=TAGS[1]), rewards.cosine_scale(15)
        ),
        rewards.cosine_length(rewards.exact_answer(), rewards.cosine_scale(15)),
    ),
    "cosine_length of the format": (
        tokens.cosine_length(tokens.tag_count(TAGS), rewards.cosine_scale(9, min_wrong=-3.0), threshold=0.6),
        rewards.cosine_length(rewards.tag_count(), rewards.cosine_scale(9, min_wrong=-3.0), threshold=0.6),
    ),
}
EXACT = ["exact_answer", "format", "tag_count", "strict_format"]  # the others may differ by rounding


@functools.cache
def compiled(name):
    return jax.jit(PAIRS[name][0])


def on_text(name, groups, answers):
    """The reward on text, of what the host would be given."""
    rows = [row for group in groups for row in group]
    per_group = len(groups[0])
    values = PAIRS[name][1](
        prompts=[b for b in range(len(groups)) for _ in range(per_group)],
        completions=TASK.batch_decode(rows, skip_special_tokens=True),
        completion_ids=rows,
        answer=[TASK.decode(answer) for answer in answers for _ in range(per_group)],
    )
    if name == "strict_format":  # the text does not tell whether an end came
        values = [value if row and row[-1] == EOS else 0.0 for value, row in zip(values, rows, strict=True)]
    return np.array(values, np.float32).reshape(len(groups), per_group)


@pytest.mark.parametrize("name", PAIRS)
@settings(deadline=None, max_examples=50)  # of 12 completions each
@given(st.lists(st.lists(COMPLETION, min_size=G, max_size=G), min_size=B, max_size=B), st.data())
def test_traced_rewards_agree_with_those_on_text(name, groups, data):
    answers = data.draw(st.lists(DIGITS, min_size=B, max_size=B))
    rollout = a_rollout(groups, answers)
    found, expected = compiled(name)(rollout), on_text(name, groups, answers)
    assert found.dtype == jnp.float32
    if name in EXACT:
        assert found.tolist() == expected.tolist()
    elif name.startswith("cosine"):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    else:
        np.testing.assert_array_max_ulp(np.asarray(found), expected, maxulp=1)  # 0 is 0
        assert not np.signbit(np.asarray(found)[expected == 0]).any()


def test_a_majority_is_of_answers_and_a_tie_is_none():
    one, two, empty, none = ("<answer>1</answer>", "<answer>2</answer>", "<answer></answer>", "1")
    groups = [[one, two, one], [one, two, none], [none, none, one], [empty, empty, two], [none, none, none]]
    rollout = a_rollout([[TASK(completion)["input_ids"] for completion in group] for group in groups])
    lost, tie = np.float32(-0.1), [np.float32(-0.1)] * 3
    found = tokens.self_consistency(START, END)(rollout)
    assert found.tolist() == [[1, lost, 1], tie, [lost, lost, 1], [lost, lost, 1], tie]
    found = tokens.self_consistency(START, END, majority=3.0, other=-2.0)(rollout)
    assert found[0].tolist() == [3, -2, 3]


def test_the_agreement_is_tested_on_every_outcome():
    """Each value of a share, and right and wrong answers, are among what hypothesis would draw."""
    cases = ["<think>1</think><answer>12</answer><eos>", "<think>1</think>", "1", "<answer>1</answer><eos>", "<think>"]
    ids = [TASK(case)["input_ids"] for case in cases]
    seen = collections.defaultdict(set)
    for name in EXACT:
        rollout = a_rollout([ids], [TASK("12")["input_ids"]])
        values = compiled(name)(rollout)
        assert values.tolist() == on_text(name, [ids], [TASK("12")["input_ids"]]).tolist()
        seen[name] |= set(values[0].tolist())
    assert seen == {
        "exact_answer": {0, 1},
        "format": {0, 0.5, 1},
        "tag_count": {0, 0.25, 0.5, 1},
        "strict_format": {0, 1},
    }


# ------------------------------------------------------------------------------ format

FORMATS = {  # completion, tag_pairs, tag_count
    "right": ("<think>1</think><answer>2</answer><eos>", 1, 1),
    "right, without an end": ("<think>1</think><answer>2</answer>", 1, 1),
    "text around": ("1<think>1</think>1<answer>2</answer>1", 1, 1),
    "only the thoughts": ("<think>1</think>2", 0.5, 0.5),
    "only the answer": ("1<answer>2</answer>", 0.5, 0.5),
    "not closed": ("<think>1</think><answer>2", 0.5, 0.75),
    "two answers": ("<think></think><answer>1</answer><answer>2</answer>", 0.5, 0.5),
    "out of order": ("<answer>2</answer><think>1</think>", 0.5, 1),
    "nested": ("<think><answer>2</answer></think>", 0.5, 1),
    "nested the other way": ("<answer><think>2</think></answer>", 0.5, 1),
    "crossed": ("<think><answer></think></answer>", 0.5, 1),
    "all turned round": ("</answer></think><answer><think>", 0, 1),
    "turned round at the start": ("</think><think><answer></answer>", 0.5, 1),
    "no tags": ("1+2<eos>", 0, 0),
    "nothing": ("", 0, 0),
}


@TRANSFORMS
def test_the_format_of_a_completion(transform):
    rollout = written(*[case[0] for case in FORMATS.values()])
    found = [transform(reward(TAGS))(rollout)[:, 0].tolist() for reward in (tokens.soft_format, tokens.tag_count)]
    assert dict(zip(FORMATS, zip(*found, strict=True), strict=True)) == {
        name: tuple(expected) for name, (_, *expected) in FORMATS.items()
    }


def test_any_number_of_pairs_has_a_share():
    plus, comma = TASK.convert_tokens_to_ids(["+", ","])
    rollout = written("+,<think></think>", "<think></think>+,", "+<think></think>,")
    three = [plus, comma, *TAGS]
    np.testing.assert_allclose(tokens.soft_format(three)(rollout)[:, 0], [2 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(tokens.tag_count(three)(rollout)[:, 0], [4 / 6] * 3, rtol=1e-6)


@TRANSFORMS
def test_a_completion_goes_on_from_the_tag_that_its_prompt_ends_with(transform):
    think, answer = TAGS[0], TAGS[2]
    rollout = written("11</think><answer>2</answer><eos>", "<think>11</think><answer>2</answer><eos>", "2</answer>")
    opened = rollout._replace(prompts=rollout.prompts._replace(tokens=jnp.full((3, 1), think, jnp.int32)))
    values = {
        name: transform(reward)(opened)[:, 0].tolist()
        for name, reward in {
            "strict": tokens.strict_format(TAGS, [EOS]),
            "soft": tokens.soft_format(TAGS),
            "count": tokens.tag_count(TAGS),
            "reasoning": tokens.reasoning_length(TAGS, [EOS], per=4),
        }.items()
    }
    assert values == {"strict": [1, 0, 0], "soft": [1, 0.5, 0], "count": [1, 0.75, 0.5], "reasoning": [0.5, 0, 0]}
    info = {"answer": jnp.full((3, 1), TASK.convert_tokens_to_ids("2")), "answer_length": jnp.ones(3, jnp.int32)}
    asked = opened.prompts._replace(tokens=jnp.full((3, 1), answer, jnp.int32), info=info)
    assert transform(tokens.exact_answer(START, END))(opened._replace(prompts=asked))[:, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("tags", [[], [1], [1, 2, 3], [1, 1], [1, 2, 3, 2]], ids=str)
def test_tags_that_are_no_pairs_are_refused(tags):
    for reward in (tokens.soft_format, tokens.tag_count):
        with pytest.raises(ValueError, match="tags are different tokens, opening and closing in turn, got"):
            reward(tags)


# ------------------------------------------------------------------------------ length


@TRANSFORMS
def test_reasoning_is_measured_in_tokens_where_the_format_is_right(transform):
    formed = [f"<think>{'1' * n}</think><answer>22</answer><eos>" for n in (0, 1, 4, 8, 9)]
    others = [
        "<think>1111</think><answer>22</answer>",
        "<think>1111</think>",
        "1<think>1</think><answer></answer><eos>",
        "",
    ]
    reward = tokens.reasoning_length(TAGS, [EOS], per=8)
    assert transform(reward)(written(*formed, *others))[:, 0].tolist() == [0, 0.125, 0.5, 1, 1, 0, 0, 0, 0]


def test_reasoning_of_a_thousand_tokens_earns_all_by_default():
    n = 500
    ids = [TAGS[0], *[TASK.convert_tokens_to_ids("1")] * n, *TAGS[1:], EOS]
    assert tokens.reasoning_length(TAGS, [EOS])(a_rollout([[ids]], width=n + 9)).tolist() == [[0.5]]


@pytest.mark.parametrize("per", [0, -2])
def test_reasoning_per_no_tokens_is_refused(per):
    with pytest.raises(ValueError, match=f"a number of tokens above 0, got {per}"):
        tokens.reasoning_length(TAGS, [EOS], per=per)


@TRANSFORMS
def test_cosine_length_gives_the_values_of_trl(transform):
    """The example in TRL 1.16's docstring is a right and a wrong answer of half the length: 0.75, -0.75."""
    one = TASK("1")["input_ids"]
    rollout = a_rollout([[[], one * 5, one * 10, one * 20]] * 2)
    right = jnp.array([[1.0], [0.0]])
    reward = tokens.cosine_length(
        lambda rollout: jnp.broadcast_to(right, rollout.lengths.shape), rewards.cosine_scale(10)
    )
    expected = [[1, 0.75, 0.5, 0.5], [-1, -0.75, -0.5, -0.5]]
    np.testing.assert_allclose(transform(reward)(rollout), expected, atol=1e-6)


# -------------------------------------------------------------------------- repetition


@TRANSFORMS
def test_repetition_penalty_gives_the_values_of_trl(transform):
    """The first two are the example in TRL 1.16's docstring."""
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], [], [1, 2], [1, 2, 1, 2, 1]]
    reward = tokens.repetition_penalty(ngram=2)
    assert transform(reward)(a_rollout([ids], width=7)).tolist() == [[0, -0.75, 0, 0, 0, -0.5]]


@pytest.mark.parametrize("padding", [0, 5, -1, 2**31 - 1])
def test_padding_is_no_repetition(padding):
    """Neither n-grams of padding nor those that reach into it count."""
    ids = [[5, 5, 5, 5], [1, 2, 5], [1, 2], [5], [0, 0, 0, 0]]
    found = tokens.repetition_penalty(ngram=2)(a_rollout([ids], width=12, padding=padding))
    np.testing.assert_allclose(found[0], [-2 / 3, 0, 0, 0, -2 / 3], rtol=1e-6)


def test_a_rollout_shorter_than_an_ngram_repeats_nothing():
    for ngram in (4, 5, 9):
        assert tokens.repetition_penalty(ngram=ngram)(a_rollout([[[5, 5, 5], [5]]], width=3)).tolist() == [[0, 0]]
    assert tokens.repetition_penalty(ngram=3)(a_rollout([[[5, 5, 5], [5]]], width=3)).tolist() == [[0, 0]]


def test_long_completions_and_large_vocabularies_agree_too():
    rng = np.random.default_rng(0)
    lengths = [4000, 3999, 17, 4000]
    rows = [
        rng.integers(0, high, n).tolist() for high, n in zip([2, 40, 3, 150_000], lengths, strict=True)
    ]  # fewer and fewer repeat
    found = jax.jit(tokens.repetition_penalty())(a_rollout([rows], width=4000))
    expected = rewards.repetition_penalty()(prompts=[0] * 4, completions=[""] * 4, completion_ids=rows)
    np.testing.assert_array_max_ulp(np.asarray(found[0]), np.array(expected, np.float32), maxulp=1)
    assert -1 < expected[0] < -0.99
    assert -0.1 < expected[1] < 0


@pytest.mark.parametrize("settings", [{"ngram": 0}, {"max_penalty": 0.1}, {"max_penalty": -float("inf")}], ids=str)
def test_a_penalty_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match="ngram is above 0 and max_penalty at most 0, got"):
        tokens.repetition_penalty(**settings)
