"""What all tasks have in common: disjoint splits that follow from the seed, and a verifier with TRL's signature."""

import random

import pytest

from grpo_jax import data, rewards, testing
from grpo_jax.tasks import (
    Splits,
    Task,
    code,
    competition_math,
    countdown,
    dialogue,
    draw_splits,
    gsm8k,
    held_out_splits,
    multiplication,
    with_prompts,
)

SIZES = {"train": 40, "validation": 10, "test": 12, "ood": 8}
QUESTIONS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(90)]
PROBLEMS = [
    {"problem": f"What is {n} + 1?", "solution": rf"\boxed{{{n + 1}}}", "level": f"Level {n % 5 + 1}"}
    for n in range(90)
]


def never(prompts, completions, **columns):
    return [0.0] * len(completions)


def a_gsm8k(seed):
    parts = {"train": QUESTIONS[:50], "test": QUESTIONS[50:62], "ood": QUESTIONS[62:70]}
    return gsm8k.task(seed, **parts, validation=10)


def a_competition_math(seed):
    parts = {"train": PROBLEMS[:50], "test": PROBLEMS[50:62], "ood": PROBLEMS[62:70]}
    return competition_math.task(seed, **parts, validation=10, verifier=never)


# A task of a seed, and what makes two of its rows the same problem, written out independently of the task.
TASKS = {
    "countdown": (
        lambda seed: countdown.task(seed, **SIZES),
        lambda row: (tuple(sorted(row["numbers"])), row["target"]),
    ),
    "multiplication": (lambda seed: multiplication.task(seed, **SIZES), lambda row: frozenset(row["factors"])),
    "code": (lambda seed: code.task(seed, **SIZES, verifier=never), lambda row: "\n".join(row["steps"])),
    "gsm8k": (a_gsm8k, lambda row: row["prompt"]),
    "competition_math": (a_competition_math, lambda row: row["prompt"]),
}
EVERY_TASK = pytest.mark.parametrize(("make", "key"), TASKS.values(), ids=TASKS)


@EVERY_TASK
def test_the_splits_have_the_sizes_asked_for_and_share_no_problem(make, key):
    task = make(0)
    assert isinstance(task, Task)
    assert isinstance(task.splits, Splits)
    assert {name: len(rows) for name, rows in task.splits._asdict().items()} == SIZES
    problems = [key(row) for rows in task.splits for row in rows]
    assert len(set(problems)) == len(problems)


@EVERY_TASK
def test_the_splits_follow_from_the_seed(make, key):
    once, again, other = (make(seed).splits for seed in (3, 3, 4))
    assert once == again
    assert {key(row) for row in once.train} != {key(row) for row in other.train}


@EVERY_TASK
def test_the_name_is_the_modules_and_every_row_has_the_same_columns(make, key, request):
    task = make(0)
    assert task.name == request.node.callspec.id
    rows = [row for rows in task.splits for row in rows]
    assert len({frozenset(row) for row in rows}) == 1
    assert all(isinstance(row["prompt"], str) and "<answer>" in row["prompt"] for row in rows)


@EVERY_TASK
def test_prompts_become_chat_messages_and_nothing_else_changes(make, key):
    task = make(0)
    chat = with_prompts(task, lambda text: data.chat(text, system="Be brief."))
    for plain, made in zip(task.splits.test, chat.splits.test, strict=True):
        assert made == plain | {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": plain["prompt"]}]
        }
    assert (chat.name, chat.verifier) == (task.name, task.verifier)
    assert isinstance(task.splits.test[0]["prompt"], str)


def test_a_dialogue_is_a_prompt_that_a_base_model_goes_on_with():
    text = dialogue("What is 2 + 2?")
    assert text.endswith("\nUser: What is 2 + 2?\nAssistant:")


GENERATED = {
    "countdown": countdown.splits,
    "multiplication": multiplication.splits,
    "code": code.splits,
}


@pytest.mark.parametrize("splits", GENERATED.values(), ids=GENERATED)
def test_more_rows_to_train_on_leave_the_other_splits_as_they_are(splits):
    few, many = (splits(0, **SIZES | {"train": train}) for train in (20, 60))
    assert few[1:] == many[1:]
    assert few.train == many.train[:20]


def test_a_task_with_too_few_problems_is_refused_and_not_searched_forever():
    def coin(rng: random.Random):
        while True:
            yield {"prompt": rng.choice("ab")}

    with pytest.raises(ValueError, match="5 rows of train are wanted, and only 1 more problems were found"):
        draw_splits(coin, coin, lambda row: row["prompt"], seed=0, train=5, validation=0, test=1, ood=0)


def rows_of(text):
    return [{"prompt": letter} for letter in text]


def prompts_of(rows):
    return "".join(row["prompt"] for row in rows)


def test_a_problem_of_the_test_set_is_not_trained_on_and_none_is_there_twice():
    splits = held_out_splits(rows_of("abcdefgabxyz"), rows_of("bx"), rows_of("z"), seed=0, validation=3)
    assert sorted(prompts_of(splits.train) + prompts_of(splits.validation)) == list("acdefgy")
    assert len(splits.validation) == 3
    assert (prompts_of(splits.test), prompts_of(splits.ood)) == ("bx", "z")
    assert list(prompts_of(splits.train)) == sorted(prompts_of(splits.train))  # in their order


def test_a_validation_split_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="validation=3 leaves none of the 3 rows to train on"):
        held_out_splits(rows_of("abc"), rows_of("d"), [], seed=0, validation=3)


def test_a_task_goes_through_the_host_reward_as_it_is():
    """From rows to tokens to text to rewards, with the columns that the verifier wants."""
    tokenizer = testing.tiny_tokenizer()
    task = countdown.task(0, train=3, validation=0, test=0, ood=0)
    rows = [row | {"numbers": [2, 3], "target": 6} for row in task.splits.train]
    texts = ["<answer>2 * 3</answer>", "<answer>2 + 3</answer>", "2 * 3"]
    rollout = data.make_demonstrations([[5]] * 3, [tokenizer(text)["input_ids"] for text in texts])
    rollout = rollout._replace(prompts=data.make_prompts([[5]] * 3, [0, 1, 2]))
    scores, given = rewards.host([task.verifier], rows, tokenizer)(rollout)
    assert scores[:, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert given.all()
