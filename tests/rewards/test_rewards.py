"""Rewards on text, which users write, and on tokens, which are traced."""

import fractions
import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import losses, rewards, sampling
from grpo_jax.advantages import from_rewards
from grpo_jax.data import make_prompts, pad
from grpo_jax.policies import from_logits_fn
from grpo_jax.statistics import summary
from grpo_jax.tasks import arithmetic
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Experience, Prompts, Rollout
from grpo_jax.updates import init_state

# ---------------------------------------------------------------------------- text

LETTERS = "abcdefgh .0123456789"


@functools.cache
def letters():
    """A tokenizer in which each letter is a token, and the token of the padding is an `a`."""
    vocabulary = {letter: i for i, letter in enumerate([*LETTERS, "<eos>"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="."))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), behavior="isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>")


def a_rollout(groups, rows=None):
    """What was sampled, if it was these texts."""
    B, G = len(groups), len(groups[0])
    ids = [letters()(text)["input_ids"] for group in groups for text in group]
    width = max(map(len, ids)) + 2
    tokens = pad(ids, width).reshape(B, G, width)
    lengths = np.array([len(row) for row in ids], np.int32).reshape(B, G)
    return Rollout(
        prompts=make_prompts([[1]] * B, rows=range(B) if rows is None else rows),
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        mask=jnp.arange(width) < lengths[..., None],
        log_probs=jnp.zeros(tokens.shape),
        truncated=jnp.zeros((B, G), bool),
    )


DATASET = [
    {"prompt": "what is 1+1?", "answer": "2", "level": 1},
    {"prompt": "what is 2+2?", "answer": "4", "level": 1},
    {"prompt": "what is 3+9?", "answer": "12", "level": 2},
]


def judge(function, rollout, dataset=DATASET, **settings):
    given, mask = rewards.host([function], dataset, letters(), **settings)(rollout)
    assert given.dtype == np.float32
    assert mask.dtype == bool
    assert given.shape == mask.shape == (*rollout.lengths.shape, 1)
    return given[..., 0], mask[..., 0]


def contains_answer(prompts, completions, answer, **kwargs):
    """As a user of TRL has it."""
    return [(1.0 if str(a) in c else (-0.1 if len(c) > 200 else 0.0)) for c, a in zip(completions, answer)]  # noqa: B905


def test_a_reward_function_written_for_trl_runs_unchanged():
    given, mask = judge(contains_answer, a_rollout([["2", "3<eos>"], ["a" * 201, "it is 4.<eos>"], ["1 2", "12"]]))
    np.testing.assert_allclose(given, [[1, 0], [-0.1, 1], [0, 1]])
    assert mask.all()


def test_it_runs_unchanged_on_answers_that_are_numbers():
    given, _ = judge(contains_answer, a_rollout([["2<eos>", "3<eos>"]]), [{"prompt": "1+1", "answer": 2}])
    assert given.tolist() == [[1, 0]]


@pytest.mark.parametrize(("B", "G"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_completions_and_columns_come_group_after_group(B, G):
    """Each prompt, answer and level stands beside a completion of its own row, which the batch has in its own order."""
    rows = [2, 0, 1][:B]
    texts = [[f"{b}{g}" for g in range(G)] for b in range(B)]
    seen = {}

    def reward(**columns):
        seen.update(columns)
        return list(range(B * G))

    given, _ = judge(reward, a_rollout(texts, rows))
    assert given.tolist() == np.arange(B * G).reshape(B, G).tolist()
    repeated = [row for row in rows for _ in range(G)]
    assert seen.pop("completion_ids") == [letters()(text)["input_ids"] for group in texts for text in group]
    assert callable(seen.pop("log_metric"))
    assert callable(seen.pop("log_extra"))
    assert seen.pop("prompt_tail") == [letters().decode([1])] * B * G
    assert seen.pop("trainer_state") is None
    assert seen == {
        "prompts": [DATASET[row]["prompt"] for row in repeated],
        "completions": [text for group in texts for text in group],
        "answer": [DATASET[row]["answer"] for row in repeated],
        "level": [DATASET[row]["level"] for row in repeated],
    }


def test_several_functions_have_a_column_of_rewards_each():
    functions = [lambda completions: [len(text) for text in completions], contains_answer]
    given, mask = rewards.host(functions, DATASET, letters())(a_rollout([["2", "3 3"], ["4 4 4", "a"]]))
    assert given.tolist() == [[[1, 1], [3, 0]], [[5, 1], [1, 0]]]
    assert mask.shape == (2, 2, 2)


def test_a_function_without_kwargs_is_given_what_it_names():
    def reward(completions, level):
        return [len(text) * n for text, n in zip(completions, level, strict=True)]

    given, _ = judge(reward, a_rollout([["a", "bb"]], rows=[2]))
    assert given.tolist() == [[2, 4]]


def test_a_default_is_kept_where_there_is_no_such_column_and_replaced_where_there_is():
    def reward(completions, weight=0.5, level=None):
        return [weight * n for n in level]

    assert judge(reward, a_rollout([["a", "b"]]))[0].tolist() == [[0.5, 0.5]]


class Judge:
    """A function that is an object."""

    def __call__(self, completions, **columns):
        """Half a point each."""
        return [0.5] * len(completions)


@pytest.mark.parametrize(
    "function",
    [Judge(), Judge().__call__, functools.partial(lambda value, completions: [value] * len(completions), 0.5)],
    ids=["object", "method", "partial"],
)
def test_any_callable_will_do(function):
    assert judge(function, a_rollout([["a", "b"]]))[0].tolist() == [[0.5, 0.5]]


def test_padding_and_special_tokens_are_not_in_the_text():
    """The padding is token 0, which is also the letter `a`; the end is a token that counts but is no text."""
    seen = []

    def reward(completions, completion_ids):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    judge(reward, a_rollout([["", "b<eos>"], ["<eos>", "a<eos>"]]))
    end = letters().eos_token_id
    assert seen == [("", []), ("b", [1, end]), ("", [end]), ("a", [0, end])]


def test_completions_of_messages_are_messages():
    messages = [{"role": "user", "content": "what is 1+1?"}]
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions)
        return [float("2" in completion[0]["content"]) for completion in completions]

    given, _ = judge(reward, a_rollout([["2<eos>", "3"]]), [{"prompt": messages}])
    assert given.tolist() == [[1, 0]]
    assert seen["prompts"] == [messages, messages]
    assert seen["completions"] == [[{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "3"}]]


def test_the_column_of_the_prompts_can_have_another_name():
    def reward(prompts, completions, **columns):
        assert "question" not in columns
        return [float(prompt == "1+1") for prompt in prompts]

    given, _ = judge(reward, a_rollout([["a", "b"]]), [{"question": "1+1"}], prompt_column="question")
    assert given.all()


def test_a_column_that_a_row_lacks_is_none_there():
    """Also where the first row of the batch, or each of them, lacks it."""
    dataset = [{"prompt": "p"}, {"prompt": "q", "hint": "h"}, {"prompt": "r", "hint": None}]

    def reward(completions, hint):
        return [float(h is not None) for h in hint]

    for rows in ([0, 1], [1, 0], [0, 2]):
        given, _ = judge(reward, a_rollout([["a"], ["b"]], rows), dataset)
        assert given[:, 0].tolist() == [float(row == 1) for row in rows]


def test_a_column_that_no_row_has_fails_in_the_function_that_asks_for_it():
    def graded(completions, grade):
        return grade

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'grade'") as error:
        judge(graded, a_rollout([["a", "b"]]))
    assert error.value.__notes__ == ["raised by the reward function graded over 2 completions"]


def test_a_data_set_that_knows_its_columns_is_not_read_for_them():
    """As a `datasets.Dataset` does, of which a loop over all rows would take long."""

    class Dataset(list):
        column_names = ("prompt", "answer", "level")

        def __iter__(self):
            raise AssertionError("read")

    assert judge(contains_answer, a_rollout([["2", "3"]]), Dataset(DATASET))[0].tolist() == [[1, 0]]


def test_a_data_set_without_prompts_is_refused():
    with pytest.raises(ValueError, match=re.escape("no column 'prompt' for the prompts, only ['question', 'answer']")):
        rewards.host([contains_answer], [{"question": "1+1", "answer": 2}], letters())


def test_a_data_set_without_rows_has_no_columns_to_miss():
    """As that of an evaluation that was not asked for."""
    rewards.host([contains_answer], [], letters())


def test_prompts_that_do_not_name_their_rows_are_refused():
    rollout = a_rollout([["a", "b"]])
    for info in ((), {}):
        with pytest.raises(ValueError, match="do not name their rows"):
            judge(contains_answer, rollout._replace(prompts=rollout.prompts._replace(info=info)))


def constant(*values):
    """A reward function of this name."""

    def constant(completions):
        return list(values)

    return constant


def test_none_is_masked_and_is_not_a_zero():
    """So the advantages of a group with a None are those of the group without that completion."""
    rollout = a_rollout([["a", "b", "c"]])
    given, mask = judge(constant(1.0, None, 0.5), rollout)
    assert given.tolist() == [[1, 0, 0.5]]
    assert mask.tolist() == [[True, False, True]]

    @jax.jit
    def advantages(given, mask):
        experience = Experience(rollout, jnp.asarray(given)[..., None], jnp.asarray(mask)[..., None])
        return from_rewards()(experience)[0]

    of_all = advantages(given, mask)
    np.testing.assert_allclose(of_all[0, [0, 2]], advantages(given[:, [0, 2]], mask[:, [0, 2]])[0], rtol=1e-6)
    assert of_all[0, 1] == 0


NUMBERS = {
    "bool": True,
    "int": 1,
    "NumPy bool": np.bool_(True),
    "NumPy int": np.int64(1),
    "NumPy half": np.float16(1),
    "NumPy float": np.float64(1),
    "0-d NumPy array": np.array(1.0),
    "0-d JAX array": jnp.ones(()),
    "fraction": fractions.Fraction(1),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_every_kind_of_number_is_taken(number):
    given, mask = judge(constant(number, 0.5), a_rollout([["a", "b"]]))
    assert given.tolist() == [[1, 0.5]]
    assert mask.all()


@pytest.mark.parametrize("kind", [tuple, np.array, jnp.array], ids=["tuple", "NumPy", "JAX"])
def test_any_sequence_of_numbers_is_taken(kind):
    given, _ = judge(lambda completions: kind([1.0, -0.5]), a_rollout([["a", "b"]]))
    assert given.tolist() == [[1, -0.5]]


NO_NUMBERS = {
    "infinity": float("inf"),
    "minus infinity": -np.inf,
    "too large for float32": 1e39,
    "too large for any float": 10**400,
    "text": "right",
    "text of a number": "1.0",
    "bytes": b"1",
    "list": [1.0],
    "nested list": [[1.0], [2.0]],
    "array of one": np.ones(1),
    "JAX array of one": jnp.ones(1),
    "array of two": np.ones(2),
    "dict": {"score": 1.0},
    "complex": 1j,
    "object": object(),
}


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_finite_number_is_refused_with_the_function_and_the_value(value):
    expected = f"the reward function constant returned {value!r} for completion 1; a reward is a finite number"
    with pytest.raises(ValueError, match=re.escape(expected)):
        judge(constant(0.0, value), a_rollout([["a", "b"]]))


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, 2.0, 3.0)])
def test_another_number_of_values_is_refused_with_both_counts(values):
    expected = f"the reward function constant returned {len(values)} values for 2 completions"
    with pytest.raises(ValueError, match=expected):
        judge(constant(*values), a_rollout([["a", "b"]]))


def yields(completions):
    """A generator, by mistake."""
    yield from [0.0] * len(completions)


NO_LISTS = {
    "None": (lambda completions: None, "NoneType"),
    "a generator": (yields, "generator"),
    "a generator expression": (lambda completions: (0.0 for _ in completions), "generator"),
    "a number": (lambda completions: 1.0, "float"),
    "a 0-d array": (lambda completions: np.array(1.0), "ndarray"),
    "text": (lambda completions: "1" * len(completions), "str"),
    "a dict": (lambda completions: dict.fromkeys(range(len(completions)), 1.0), "dict"),
    "a set": (lambda completions: set(range(len(completions))), "set"),
}


@pytest.mark.parametrize(("function", "kind"), NO_LISTS.values(), ids=NO_LISTS)
def test_what_is_no_list_is_refused_with_its_type(function, kind):
    name = re.escape(function.__name__)
    with pytest.raises(ValueError, match=rf"the reward function {name} returned {kind} for 2 completions"):
        judge(function, a_rollout([["a", "b"]]))


def test_an_exception_keeps_its_type_and_names_the_function():
    def divides(completions):
        return [1 / 0 for _ in completions]

    with pytest.raises(ZeroDivisionError, match="division by zero") as error:
        judge(divides, a_rollout([["a", "b"], ["c", "d"]]))
    assert error.value.__notes__ == ["raised by the reward function divides over 4 completions"]


def test_an_exception_of_one_function_is_not_hidden_by_another():
    def divides(completions):
        return [1 / 0 for _ in completions]

    with pytest.raises(ZeroDivisionError):
        rewards.host([contains_answer, divides], DATASET, letters())(a_rollout([["a", "b"]]))


# ---------------------------------------------------------- text, inside one program

V = len(LETTERS) + 1
POLICY = from_logits_fn(lambda table, tokens, mask: table[tokens])  # row `a` of the table follows token `a`
B, G, T = 2, 4, 3


def make_step(reward):
    return make_train_step(
        POLICY,
        optax.sgd(1.0),
        sampling.sampler(group_size=G, max_tokens=T, eos_ids=(V - 1,)),
        reward=reward,
        loss=losses.grpo(),
    )


def first_state():
    return init_state(jax.random.normal(jax.random.key(0), (V, V)), optax.sgd(1.0), jax.random.key(1))


PROMPTS = make_prompts([[1, 2], [3]], rows=[1, 2])


class Program(NamedTuple):
    """A step that is one program, and five of them that are, with a reward for each test to put in."""

    step: Any  # (state, prompts) -> (state, metrics)
    run: Any  # the same, with what each step returned stacked
    reraise: Any
    reward: dict[str, Any]


@pytest.fixture(scope="module")
def program():
    current = {}
    host = rewards.host([lambda **columns: current["function"](**columns)], DATASET, letters())
    traced, reraise = rewards.callback(host, num_rewards=1)
    step = make_step(traced)

    def step_and_params(state, prompts):
        state, metrics = step(state, prompts)
        return state, (state.params, metrics)

    def run(state, prompts):
        return jax.lax.scan(lambda state, _: step_and_params(state, prompts), state, length=5)

    return Program(jax.jit(step), jax.jit(run), reraise, current)


def test_rewards_of_the_host_arrive_in_a_step_that_is_one_program(program):
    """They change the params as the same rewards, traced, would."""
    program.reward["function"] = lambda completion_ids, **columns: [ids[0] for ids in completion_ids]
    state, metrics = program.step(first_state(), PROMPTS)
    program.reraise()
    traced = jax.jit(make_step(rewards.traced(lambda rollout: rollout.tokens[..., 0])))
    expected, expected_metrics = traced(first_state(), PROMPTS)
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-6, atol=1e-7)
    assert np.abs(state.params - first_state().params).max() > 1e-3
    assert summary(metrics)["reward"] == summary(expected_metrics)["reward"] > 0


def test_a_program_that_scans_calls_the_reward_once_a_step_with_what_that_step_sampled(program):
    seen = []

    def reward(completions, prompts, level, **columns):
        seen.append((tuple(prompts), tuple(level), tuple(completions)))
        return [float(len(text)) for text in completions]

    program.reward["function"] = reward
    state, (_, metrics) = program.run(first_state(), PROMPTS)
    program.reraise()
    assert state.step == 5
    assert len(seen) == 5
    assert len(set(seen)) == 5
    assert {(prompts, level) for prompts, level, _ in seen} == {
        (("what is 2+2?",) * G + ("what is 3+9?",) * G, (1,) * G + (2,) * G)
    }
    means = [np.mean([len(text) for text in texts]) for _, _, texts in seen]
    np.testing.assert_allclose(sorted(summary(metrics)["reward"]), sorted(means), rtol=1e-6)

    jax.block_until_ready(program.run(first_state(), PROMPTS))
    assert len(seen) == 10, "the program calls it each time, not when it is compiled"


def test_the_reward_is_called_anew_for_the_same_completions():
    """A program in which nothing changes from step to step may not call it once for all of them."""
    calls = []
    reward = rewards.host([lambda completions: calls.append(completions) or [len(calls), 0.0]], DATASET, letters())
    traced, _ = rewards.callback(reward, num_rewards=1)

    @jax.jit
    def run(rollout):
        return jax.lax.scan(lambda carry, _: (carry, traced(rollout)[0]), None, length=3)[1]

    assert run(a_rollout([["a", "b"]]))[:, 0, 0, 0].tolist() == [1, 2, 3]


def fails(**columns):
    """A reward that does."""
    raise KeyError("lost")


def test_a_step_without_rewards_goes_on_and_learns_nothing(program):
    program.reward["function"] = fails
    before = first_state()
    after, metrics = program.step(before, PROMPTS)
    np.testing.assert_array_equal(after.params, before.params)
    assert after.step == 1
    assert after.skipped == 0
    assert all(np.isfinite(value) for value in summary(metrics).values())
    with pytest.raises(KeyError, match="lost"):
        program.reraise()


def test_one_step_without_rewards_leaves_the_others_of_a_scan_as_they_are(program):
    calls = []

    def fails_once(completions, **columns):
        calls.append(completions)
        if len(calls) == 2:
            raise KeyError("lost")
        return [float(i) for i in range(len(completions))]

    program.reward["function"] = fails_once
    _, (params, _) = program.run(first_state(), PROMPTS)
    params = np.concatenate([first_state().params[None], params])
    moved = np.abs(np.diff(params, axis=0)).max(axis=(1, 2)) > 0
    assert moved.tolist() == [True, False, True, True, True]
    with pytest.raises(KeyError, match="lost"):
        program.reraise()


def test_the_exception_is_raised_once_as_it_was():
    error = OSError(28, "no space left")

    def full(completions):
        raise error

    traced, reraise = rewards.callback(rewards.host([full], DATASET, letters()), num_rewards=1)
    program, rollout = jax.jit(traced), a_rollout([["a", "b"], ["c", "d"]])
    reraise()
    given, mask = program(rollout)
    assert given.shape == mask.shape == (2, 2, 1)
    assert not given.any()
    assert not mask.any()
    with pytest.raises(OSError, match="no space left") as caught:
        reraise()
    assert caught.value is error
    assert error.__notes__ == ["raised by the reward function full over 4 completions"]
    reraise()
    program(rollout)
    with pytest.raises(OSError, match="no space left"):
        reraise()


def test_the_exception_is_not_missed_while_the_step_is_still_running():
    """A device is asked for a step and not waited for; here, the rewards wait for a rollout that is still computed."""

    def reward(rollout):
        time.sleep(0.3)
        raise KeyError("lost")

    traced, reraise = rewards.callback(reward, num_rewards=1)
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: x @ x / jnp.linalg.norm(x), x))
    program = jax.jit(traced)
    rollout = a_rollout([["a", "b"]])
    matrix = jnp.ones((500, 500))
    jax.block_until_ready(program(rollout._replace(log_probs=work(matrix))))  # compiles
    with pytest.raises(KeyError):
        reraise()
    program(rollout._replace(log_probs=work(matrix)))
    with pytest.raises(KeyError):
        reraise()


def test_another_number_of_reward_functions_than_was_said_is_an_error():
    traced, reraise = rewards.callback(rewards.host([contains_answer] * 2, DATASET, letters()), num_rewards=1)
    given, mask = jax.jit(traced)(a_rollout([["a", "b"]]))
    assert given.shape == (1, 2, 1)
    assert not mask.any()
    with pytest.raises(
        ValueError, match=re.escape("the reward returned shapes (1, 2, 2) and (1, 2, 2), not (1, 2, 1)")
    ):
        reraise()


# -------------------------------------------------------------------------- tokens

TASK = arithmetic.tokenizer()
THINK, END_THINK, ANSWER, END_ANSWER = TAGS = TASK.convert_tokens_to_ids(list(arithmetic.TAGS))
EOS = TASK.eos_token_id
WIDTH = 12  # tokens of a completion; the longest answer has 3


def completions_of(texts, answers, width=WIDTH):
    """A rollout of one completion per prompt, cut at the width as sampling does; padding looks like an end."""
    ids = [TASK(text)["input_ids"][:width] for text in texts]
    lengths = np.array([[len(row)] for row in ids], np.int32)
    tokens = np.full((len(ids), 1, width), END_ANSWER, np.int32)
    answer = np.full((len(ids), 3), TASK.convert_tokens_to_ids("7"), np.int32)  # the padding is a digit
    for i, row in enumerate(ids):
        tokens[i, 0, : len(row)] = row
        wanted = TASK(answers[i])["input_ids"]
        answer[i, : len(wanted)] = wanted
    info = {"answer": jnp.asarray(answer), "answer_length": jnp.array([len(a) for a in answers], jnp.int32)}
    return Rollout(
        prompts=Prompts(jnp.ones((len(ids), 1), jnp.int32), jnp.ones(len(ids), jnp.int32), info),
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        mask=jnp.arange(width) < lengths[..., None],
        log_probs=jnp.zeros(tokens.shape),
        truncated=jnp.array([[EOS not in row] for row in ids]),
    )


def visible_text(rollout, i):
    return TASK.decode(np.asarray(rollout.tokens[i, 0, : rollout.lengths[i, 0]]))


def has_answer(text, answer):
    """`exact_answer` on text: what stands between the first tag and the end after it."""
    _, opened, rest = text.partition("<answer>")
    written, closed, _ = rest.partition("</answer>")
    return float(bool(opened and closed and answer) and written == answer)


def has_format(text):
    """`tag_format` on text."""
    return float(bool(re.fullmatch("<think>[^<]*</think><answer>[^<]*</answer><eos>", text)))


exact_answer = rewards.tokens.exact_answer(ANSWER, END_ANSWER)
tag_format = rewards.tokens.strict_format(TAGS, [EOS])
TRANSFORMS = pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])

RIGHT = "<think>1+2</think><answer>12</answer><eos>"
CASES = {  # text, answer, has the answer, has the format
    "right": (RIGHT, "12", 1, 1),
    "nothing thought": ("<think></think><answer>12</answer><eos>", "12", 1, 1),
    "nothing answered": ("<think></think><answer></answer><eos>", "", 0, 1),
    "nothing answered, but asked": ("<think></think><answer></answer><eos>", "1", 0, 1),
    "wrong": ("<think></think><answer>21</answer><eos>", "12", 0, 1),
    "longer": ("<think></think><answer>123</answer><eos>", "12", 0, 1),
    "longer at the front": ("<think></think><answer>012</answer><eos>", "12", 0, 1),
    "shorter": ("<think></think><answer>1</answer><eos>", "12", 0, 1),
    "much longer": ("<think></think><answer>12121</answer><eos>", "12", 0, 1),
    "longest answer": ("<think></think><answer>123</answer><eos>", "123", 1, 1),
    "longest answer, one short": ("<think></think><answer>12</answer><eos>", "123", 0, 1),
    "padding of the answer written": ("<think></think><answer>127</answer><eos>", "12", 0, 1),
    "two answers, right first": ("<answer>12</answer><answer>13</answer><eos>", "12", 1, 0),
    "two answers, right last": ("<answer>13</answer><answer>12</answer><eos>", "12", 0, 0),
    "two answers in the format": ("<think></think><answer>1</answer><answer>12</answer><eos>", "12", 0, 0),
    "the answer among the thoughts": ("<think><answer>12</answer></think><answer>13</answer><eos>", "12", 1, 0),
    "nested answers": ("<think></think><answer><answer>12</answer></answer><eos>", "12", 0, 0),
    "nested thoughts": ("<think><think></think></think><answer>12</answer><eos>", "12", 1, 0),
    "opened twice": ("<think></think><answer>1<answer>2</answer><eos>", "12", 0, 0),
    "closed before it is opened": ("</answer><answer>12<eos>", "12", 0, 0),
    "a stray close first": ("</answer><answer>12</answer><eos>", "12", 1, 0),
    "tags out of order": ("<answer>12</answer><think></think><eos>", "12", 1, 0),
    "thoughts turned round": ("</think><think><answer>12</answer><eos>", "12", 1, 0),
    "text before": ("1<think></think><answer>12</answer><eos>", "12", 1, 0),
    "text between": ("<think></think>1<answer>12</answer><eos>", "12", 1, 0),
    "text after": ("<think></think><answer>12</answer>1<eos>", "12", 1, 0),
    "the answer alone": ("<answer>12</answer><eos>", "12", 1, 0),
    "no close": ("<think></think><answer>12<eos>", "12", 0, 0),
    "no open": ("<think></think>12</answer><eos>", "12", 0, 0),
    "no tags": ("12<eos>", "12", 0, 0),
    "no end": ("<think></think><answer>12</answer>", "12", 1, 0),
    "closed at the last place": ("<think>123</think><answer>1234</answer>", "123", 0, 0),
    "right up to the last place": ("<think>1234</think><answer>123</answer>", "123", 1, 0),
    "cut before the end": ("<think>12345</think><answer>123</answer><eos>", "123", 1, 0),
    "cut before the close": ("<think>123456</think><answer>123</answer><eos>", "123", 0, 0),
    "cut in the answer": ("<think>12345678</think><answer>12</answer><eos>", "12", 0, 0),
    "cut after the tag": ("<think>123456789</think><answer>12</answer><eos>", "12", 0, 0),
    "cut, and an empty answer": ("<think>123456789</think><answer></answer><eos>", "", 0, 0),
    "right in every place": ("<think>123</think><answer>123</answer><eos>", "123", 1, 1),
    "only the end": ("<eos>", "12", 0, 0),
    "only the end, of an empty answer": ("<eos>", "", 0, 0),
    "empty": ("", "12", 0, 0),
    "empty, of an empty answer": ("", "", 0, 0),
    "only the tag": ("<answer>", "12", 0, 0),
}


@TRANSFORMS
def test_hostile_completions_get_what_they_deserve(transform):
    texts, answers, *expected = zip(*CASES.values(), strict=True)
    rollout = completions_of(texts, answers)
    found = [transform(reward)(rollout)[:, 0].astype(int).tolist() for reward in (exact_answer, tag_format)]
    assert dict(zip(CASES, zip(*found, strict=True), strict=True)) == dict(
        zip(CASES, zip(*expected, strict=True), strict=True)
    )


def test_the_cases_agree_with_the_reference_on_text():
    rollout = completions_of([case[0] for case in CASES.values()], [case[1] for case in CASES.values()])
    for i, (name, (_, answer, right, formed)) in enumerate(CASES.items()):
        text = visible_text(rollout, i)
        assert (has_answer(text, answer), has_format(text)) == (right, formed), name


FRAGMENTS = st.sampled_from([*arithmetic.TAGS, *"12", "12</answer>", "<think>1</think><answer>", "</think><answer>1"])
COMPLETION = st.builds(
    lambda fragments, end: "".join(fragments) + end, st.lists(FRAGMENTS, max_size=8), st.sampled_from(["", "<eos>"])
)
jitted_answer, jitted_format = jax.jit(exact_answer), jax.jit(tag_format)


@settings(deadline=None)
@given(st.lists(st.tuples(COMPLETION, st.text("12", max_size=3)), min_size=16, max_size=16))
def test_any_completion_is_judged_as_its_text_is(cases):
    rollout = completions_of(*zip(*cases, strict=True))
    texts = [visible_text(rollout, i) for i in range(len(cases))]
    expected = [has_answer(text, answer) for text, (_, answer) in zip(texts, cases, strict=True)]
    assert jitted_answer(rollout)[:, 0].tolist() == expected
    expected = [has_format(text) for text in texts]
    assert jitted_format(rollout)[:, 0].tolist() == expected


@settings(deadline=None)
@given(st.text("12", max_size=3), st.text("12", max_size=3), st.text("12+", max_size=3))
def test_a_well_formed_completion_is_right_where_its_answer_is(answer, written, thoughts):
    """Random fragments seldom make one."""
    text = f"<think>{thoughts}</think><answer>{written}</answer><eos>"
    rollout = completions_of([text] * 2, [answer, written])
    assert jitted_answer(rollout)[:, 0].tolist() == [float(answer == written != ""), float(written != "")]
    assert jitted_format(rollout)[:, 0].tolist() == [1, 1]


def test_every_completion_of_a_group_is_judged_by_the_answer_of_its_prompt():
    rollout = completions_of(["<answer>1</answer><eos>", "<answer>2</answer><eos>"] * 2, "1122")
    grouped = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[2:]), rollout._replace(prompts=None))
    prompts = jax.tree.map(lambda x: x[::2], rollout.prompts)
    assert jax.jit(exact_answer)(grouped._replace(prompts=prompts)).tolist() == [[1, 0], [0, 1]]


def test_any_of_several_end_tokens_ends_the_format():
    plus = TASK.convert_tokens_to_ids("+")
    rollout = completions_of(["<think></think><answer></answer>+", "<think></think><answer></answer>1"], ["", ""])
    assert jax.jit(rewards.tokens.strict_format(TAGS, [EOS, plus]))(rollout).tolist() == [[1], [0]]


def test_only_the_last_token_is_the_end():
    """Demonstrations may have anything anywhere."""
    rollout = completions_of(["<think><eos></think><answer></answer>1"], [""])
    assert jax.jit(tag_format)(rollout).tolist() == [[0]]


@pytest.mark.parametrize("tags", [[], [1, 2, 3], [1, 2, 3, 4, 5]])
def test_a_format_of_other_than_four_tags_is_refused(tags):
    with pytest.raises(ValueError, match=f"the format has 4 tags, got {len(tags)}"):
        rewards.tokens.strict_format(tags, [EOS])


@TRANSFORMS
def test_traced_rewards_stand_beside_each_other_and_are_all_given(transform):
    rollout = completions_of([RIGHT, "<answer>12</answer>", "1"], ["12"] * 3)
    given, mask = transform(rewards.traced(exact_answer, tag_format, lambda r: r.lengths))(rollout)
    assert given.dtype == jnp.float32
    assert given[:, 0].tolist() == [[1, 1, 10], [1, 0, 4], [0, 0, 1]]
    assert mask.shape == (3, 1, 3)
    assert mask.all()
