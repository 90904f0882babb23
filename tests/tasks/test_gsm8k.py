"""GSM8K from files in its format: the gold number, the prompt, the verifier."""

import json

import pytest

from grpo_jax import data
from grpo_jax.tasks import gsm8k

# In the data set's format, with calculator annotations.
ROWS = [
    {"question": "Ann has 3 apples and buys 4. How many?", "answer": "She has 3 + 4 = <<3+4=7>>7.\n#### 7"},
    {"question": "A car costs $1,000 and a bike half. Sum?", "answer": "1000 / 2 = <<1000/2=500>>500\nSo.\n#### 1,500"},
    {"question": "It was 3 degrees and fell by 8.", "answer": "3 - 8 = -5\n#### -5"},
    {"question": "Half of 5?", "answer": "5 / 2 = 2.5\n#### 2.5"},
    {"question": "A hard one", "answer": "One\nTwo\nThree\nFour\nFive\n#### 5"},
    {"question": "A heading", "answer": "#### Step\nIt is 9.\n#### 9"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_in_the_data_sets_format_become_a_task(tmp_path):
    train = data.read_rows(write(tmp_path / "train.jsonl", ROWS[:4]), gsm8k.FIELDS)
    test = data.read_rows(write(tmp_path / "test.jsonl", ROWS[4:]), gsm8k.FIELDS)
    task = gsm8k.task(0, train=train, test=test, validation=1)
    assert sorted(row["answer"] for row in [*task.splits.train, *task.splits.validation]) == ["-5", "1500", "2.5", "7"]
    assert [row["answer"] for row in task.splits.test] == ["5", "9"]
    row = task.splits.test[1]
    assert row["prompt"].startswith("A heading\n")
    assert row["solution"] == "#### Step\nIt is 9."


def test_the_shifted_split_is_what_is_given_or_what_takes_many_steps():
    parts = {"train": ROWS[:4], "test": ROWS[4:], "validation": 1}
    assert [row["prompt"][:10] for row in gsm8k.splits(0, **parts).ood] == ["A hard one"]
    given = gsm8k.splits(0, **parts, ood=[{"question": "Else", "answer": "#### 1"}])
    assert [row["answer"] for row in given.ood] == ["1"]
    assert len(given.test) == 2


@pytest.mark.parametrize("answer", ["It is 7.", "####", "#### seven", "#### 7 apples", "#### 7\n8", "#### ７"])
def test_a_row_without_a_number_is_refused_with_its_split_and_number(answer):
    with pytest.raises(ValueError, match=r"test: row 2: an answer ends in #### and a number, got '"):
        gsm8k.splits(0, train=ROWS, test=[ROWS[0], {"question": "?", "answer": answer}])


def test_the_rows_of_the_hub_are_the_default(monkeypatch):
    """Its names and splits are asked for; the rows are ours, there being no network in a test."""
    asked = []

    def read_rows(source, columns, *, split, subset):
        asked.append((source, subset, split))
        return {"openai/gsm8k": ROWS[:4] if split == "train" else ROWS[4:], "apple/GSM-Symbolic": ROWS[:1]}[source]

    monkeypatch.setattr(data, "read_rows", read_rows)
    splits = gsm8k.task(0, validation=1).splits
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("apple/GSM-Symbolic", "p2", "test"),
    ]
    assert [row["answer"] for row in splits.ood] == ["7"]
    assert "7" not in [row["answer"] for row in [*splits.train, *splits.validation]]  # it is in ood


@pytest.mark.parametrize("parts", [{"train": ROWS}, {"test": ROWS}, {"ood": ROWS}], ids=["train", "test", "ood"])
def test_rows_to_train_on_without_rows_to_test_are_refused(parts):
    with pytest.raises(ValueError, match="rows of your own are both train and test"):
        gsm8k.task(0, **parts)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>500 + 1000</think><answer>1500</answer>", 1.0),
        ("<answer>$1,500.00</answer>", 1.0),
        ("500 + 1000 is it.\n#### 1500", 1.0),
        ("<answer>15000</answer>", 0.0),
        ("<answer>1500 or 500</answer>", 0.0),
        ("<answer>1000 + 500</answer>", 0.0),
        ("<think>1500</think>", 0.0),
    ],
    ids=["right", "dollars", "GSM8K's form", "a zero more", "two numbers", "not worked out", "no answer"],
)
def test_the_answer_must_be_the_number(completion, reward):
    assert gsm8k.correct(["?"], [completion], answer=["1500"]) == [reward]
    chat = [[{"role": "assistant", "content": completion}]]
    assert gsm8k.correct([data.chat("?")], chat, answer=["1500"]) == [reward]
