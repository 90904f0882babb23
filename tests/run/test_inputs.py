"""Inputs that would go wrong without a word are refused before any weight is read."""

import pytest
from transformers import AutoTokenizer

from grpo_jax import rewards, testing
from grpo_jax.data.rows import with_answer
from grpo_jax.rewards.calling import reading
from grpo_jax.rewards.rubrics import rubric
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


def test_settings_of_experts_are_refused_for_a_model_without(model, tmp_path):
    inputs.check_experts(str(model), record_experts=False, load_balance=0.0)
    with pytest.raises(ValueError, match="is no mixture of experts: leave out --load-balance"):
        inputs.check_experts(str(model), record_experts=False, load_balance=0.1)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    testing.tiny_hf_config("qwen3_moe", **sizes).save_pretrained(tmp_path)
    inputs.check_experts(str(tmp_path), record_experts=True, load_balance=0.1)


def test_weights_that_are_not_finite_are_refused():
    def length(completions, **columns): ...

    with pytest.raises(ValueError, match=r"finite numbers, got \[nan\]"):
        inputs.check_rewards([length], weights=[float("nan")])


def test_no_reward_at_all_is_refused():
    with pytest.raises(ValueError, match="there is no reward function, so that nothing would be learned"):
        inputs.check_rewards([])


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


@pytest.mark.parametrize(
    ("make", "absent"),
    [
        (lambda: rewards.accuracy(), "accuracy requires solution or answer"),
        (lambda: rewards.accuracy(column="final"), "accuracy requires final"),
        (lambda: rewards.exact_answer(), "exact_answer requires answer"),
        (lambda: rewards.python_tests(executor=list), "python_tests requires tests"),
        (lambda: rubric("http://localhost", "judge", column="criteria"), "rubric requires criteria"),
        (lambda: rewards.combine([rewards.exact_answer(), _of_target]), "exact_answer requires answer"),
        (lambda: rewards.skip_failed_batches(rewards.combine([_of_target])), "_of_target requires target"),
        (lambda: rewards.cosine_length(_of_target, rewards.cosine_scale(9)), "_of_target requires target"),
    ],
    ids=["accuracy", "of a column", "exact_answer", "python_tests", "rubric", "combined", "wrapped twice", "scaled"],
)
def test_columns_that_a_reward_looks_for_itself_are_looked_at_too(make, absent):
    """Else a model is read and samples, and every batch is masked, before that is told."""
    with pytest.raises(ValueError, match=f"the reward function {absent}, and the data has the columns gold"):
        inputs.check_arguments([make()], [{"prompt": "1 + 1?", "gold": "2"}], prompt_column="prompt")
    there = dict.fromkeys(("answer", "final", "tests", "criteria", "target"), "2")
    inputs.check_arguments([make()], [{"prompt": "1 + 1?"} | there], prompt_column="prompt")


def _of_target(completions, target):
    return [0.0] * len(completions)


@pytest.mark.parametrize("answer", [["5"], {"value": 5}], ids=["list", "object"])
def test_a_gold_answer_that_is_neither_text_nor_a_number_is_refused_with_its_place(answer):
    rows = [{"prompt": "a", "answer": 5, "solution": ["worked"]}, {"prompt": "b", "answer": answer}]
    message = f"row 2: answer: a gold answer is text or a number, got a {type(answer).__name__}"
    with pytest.raises(ValueError, match=message):
        inputs.check_arguments([rewards.exact_answer()], rows, prompt_column="prompt")
    with pytest.raises(ValueError, match="row 1: solution: a gold answer is text or a number, got a list"):
        inputs.check_arguments([rewards.accuracy()], rows, prompt_column="prompt")
    told = [with_answer(row, "5") for row in rows]  # as by --answer-column
    inputs.check_arguments([rewards.accuracy(), rewards.exact_answer()], told, prompt_column="prompt")


@pytest.mark.parametrize(
    ("make", "golds"),
    [
        (rewards.exact_answer, [None, float("nan"), "NaN"]),
        (rewards.accuracy, [None, "nan", "it is 5 or 6, but not 7 or 8"]),
    ],
)
def test_gold_answers_that_a_reward_cannot_tell_are_told_and_refused_if_there_are_no_others(make, golds, capsys):
    """Each such row was masked at every step, without a word."""
    rows = [{"prompt": "a", "answer": gold} for gold in ["5", *golds]]
    inputs.check_arguments([make()], [rows[0]] * 3, prompt_column="prompt")
    assert not capsys.readouterr().out
    inputs.check_arguments([make()], rows, prompt_column="prompt")
    told = f"warning: 3 of 4 rows have no gold answer that {make.__name__} can tell, such as row 2"
    assert told in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=f"all 3 rows that were looked at have no gold answer that {make.__name__} can"
    ):
        inputs.check_arguments([make()], rows[1:], prompt_column="prompt")


def test_a_part_of_the_gold_answers_is_read_where_that_takes_time():
    read = []
    reward = reading(lambda completions, **columns: [], golds=["answer"], told=lambda gold: not read.append(gold))
    inputs.check_arguments([reward], [{"prompt": "a", "answer": i} for i in range(1001)], prompt_column="prompt")
    assert read == [str(i) for i in range(0, 1001, 5)]


def test_prompts_that_are_evaluated_and_trained_on_are_told(capsys):
    inputs.tell_repeated([[1, 2], [3], [3]], [[4], [2, 1]])
    assert not capsys.readouterr().out
    inputs.tell_repeated([[1, 2], [3], [3]], [[3], [4], [1, 2]])
    assert "warning: 2 of the 3 prompts to evaluate on are also trained on" in capsys.readouterr().out
