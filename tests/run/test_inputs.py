"""Inputs that would go wrong without a word are refused before any weight is read."""

import pytest
from transformers import AutoTokenizer

from grpo_jax import rewards, testing
from grpo_jax.run import inputs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(testing.tiny_checkpoint(tmp_path_factory.mktemp("model")))


def test_a_token_outside_of_the_model_is_refused_with_its_place(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs.check_tokens(model, tokenizer, [[0, 1], [2]])
    with pytest.raises(ValueError, match=r"row 2 has the token 99999; .* has 0 to \d+"):
        inputs.check_tokens(model, tokenizer, [[0, 1], [2, 99999]])
    with pytest.raises(ValueError, match=r"row 1 has the token -1"):
        inputs.check_tokens(model, tokenizer, [[-1]])


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"new{i}" for i in range(5000)])
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and .* only \d+"):
        inputs.check_tokens(model, tokenizer, [[0]])


def test_positions_beyond_those_of_the_model_are_told(model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs.check_tokens(model, tokenizer, [[0] * 10], max_tokens=16)
    assert capsys.readouterr().out == ""
    inputs.check_tokens(model, tokenizer, [[0] * 10], max_tokens=100_000)
    assert "the longest prompt (10 tokens) and a completion of 100000 pass the" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_refused():
    def length(completions, **columns): ...

    with pytest.raises(ValueError, match=r"finite numbers, got \[nan\]"):
        inputs.check_rewards([length], weights=[float("nan")])


def test_a_maker_without_its_brackets_is_refused():
    class Scorer:
        def __init__(self, **settings): ...
        def __call__(self, completions): ...

    def settings(tolerance=0.0): ...

    rows = [{"prompt": "a", "answer": "1"}]
    for maker in (rewards.accuracy, rewards.python_tests, settings, Scorer):
        with pytest.raises(ValueError, match=rf"A maker\? Then write {maker.__name__}\(\)"):
            inputs.check_arguments([maker], rows, prompt_column="prompt")
    inputs.check_arguments(
        [rewards.accuracy(), Scorer(), lambda completion_ids: [], lambda **columns: []],
        rows,
        prompt_column="prompt",
    )


def test_what_a_function_in_worker_processes_requires_is_looked_at_too():
    def score(completion, answer, scale, tolerance=0.0, **columns): ...

    reward = rewards.in_worker_processes(score, settings={"scale": 2.0})
    inputs.check_arguments([reward], [{"prompt": "1 + 1?", "answer": 2}], prompt_column="prompt")
    with pytest.raises(
        ValueError, match="the reward function score requires answer, and the data has the columns gold"
    ):
        inputs.check_arguments([reward], [{"prompt": "1 + 1?", "gold": 2}], prompt_column="prompt")


def test_a_reward_whose_required_arguments_nothing_gives_is_refused():
    def right(completions, answer, log_metric, scale=1.0, **columns): ...

    def wrong(prompts, completions, solution): ...

    rows = [{"prompt": "a", "answer": 0}]
    inputs.check_arguments([right], rows, prompt_column="prompt")
    with pytest.raises(ValueError, match="wrong requires solution, and the data has the columns answer"):
        inputs.check_arguments([right, wrong], rows, prompt_column="prompt")


@pytest.mark.parametrize(
    ("columns", "found"), [({"answr": "2"}, "not there"), ({"answer": None}, "null"), ({"answer": ""}, "empty")]
)
def test_a_row_without_what_a_reward_requires_is_refused_with_its_place(columns, found):
    def right(completions, answer, level=None, **others): ...

    rows = [{"prompt": "a", "answer": "1", "level": 3}, {"prompt": "b", **columns}]
    message = f"row 2: the reward function right requires answer, which is {found}; the row has the columns prompt, "
    with pytest.raises(ValueError, match=message):
        inputs.check_arguments([right], rows, prompt_column="prompt")
    inputs.check_arguments([lambda completions, answer=None: []], rows, prompt_column="prompt")


def test_prompts_that_are_evaluated_and_trained_on_are_told(capsys):
    inputs.tell_repeated([[1, 2], [3], [3]], [[4], [2, 1]])
    assert not capsys.readouterr().out
    inputs.tell_repeated([[1, 2], [3], [3]], [[3], [4], [1, 2]])
    assert "warning: 2 of the 3 prompts to evaluate on are also trained on" in capsys.readouterr().out
