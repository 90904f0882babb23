r"""MATH from files in its format: what is in the box, the levels, the verifier."""

import json

import pytest

from grpo_jax import data
from grpo_jax.tasks import competition_math

# In the data set's format.
ROWS = [
    {"problem": "1/2?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac{1}{2}}$."},
    {"problem": "2?", "level": "Level 3", "type": "Algebra", "solution": r"First \boxed{1}, then $\boxed{2}.$"},
    {"problem": "x?", "level": "Level 5", "type": "Algebra", "solution": r"$\boxed{\sqrt{x^{2}+1}}$ it is"},
    {"problem": "5?", "level": "Level ?", "type": "Geometry", "solution": r"So $\boxed 5$ is the answer."},
    {"problem": "S?", "level": "Level 5", "type": "Geometry", "solution": r"\[\boxed{\{1, 2\}}\]"},
]
BOXED = {
    "a fraction": (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    "deep braces": (r"\boxed{\frac{\sqrt{2}}{\frac{1}{x^{2}}}}", r"\frac{\sqrt{2}}{\frac{1}{x^{2}}}"),
    "a set": (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    "an escaped brace alone": (r"\boxed{x \in \{}", r"x \in \{"),
    "a matrix": (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    "an escaped backslash before a brace": (r"\boxed{a\\}", r"a\\"),
    "the last": (r"\boxed{1} and \boxed{2}", "2"),
    "the inner": (r"\boxed{x = \boxed{3}}", "3"),
    "fbox": (r"\fbox{7}", "7"),
    "without braces": (r"$\boxed 5$", "5"),
    "without braces or blank": (r"$\boxed5$.", "5"),
    "a blank before": (r"\boxed {5}", "5"),
    "blanks inside": (r"\boxed{ 5 }", "5"),
    "a line break inside": ("\\boxed{5\n+ x}", "5\n+ x"),
    "text": (r"\boxed{\text{Monday}}", r"\text{Monday}"),
    "nothing": ("no box", None),
    "another command": (r"\boxedtwo{5}", None),
    "no end": (r"\boxed{\frac{1}{2}", None),
    "the end of the text": (r"\boxed", None),
}


@pytest.mark.parametrize(("text", "answer"), BOXED.values(), ids=BOXED)
def test_what_is_in_the_last_box(text, answer):
    assert competition_math.boxed(f"A {text}"[2:] if text.startswith("no") else f"It is {text}") == answer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_in_the_data_sets_format_become_a_task(tmp_path):
    train = data.read_rows(write(tmp_path / "train.jsonl", ROWS[:3]), competition_math.FIELDS)
    test = data.read_rows(write(tmp_path / "test.jsonl", ROWS[3:]), competition_math.FIELDS)
    splits = competition_math.splits(0, train=train, test=test, validation=1)
    found = {(row["answer"], row["level"]) for row in [*splits.train, *splits.validation]}
    assert found == {(r"\frac{1}{2}", 1), ("2", 3), (r"\sqrt{x^{2}+1}", 5)}
    assert [(row["answer"], row["gold"], row["level"]) for row in splits.test] == [
        ("5", r"\boxed{5}", None),
        (r"\{1, 2\}", r"\boxed{\{1, 2\}}", 5),
    ]
    assert splits.test[0]["prompt"].startswith("5?\n")


def test_the_shifted_split_is_what_is_given_or_the_hardest_level():
    parts = {"train": ROWS[:2], "test": ROWS[2:], "validation": 0}
    assert [row["prompt"][:2] for row in competition_math.splits(0, **parts).ood] == ["x?", "S?"]
    given = competition_math.splits(0, **parts, ood=[{"problem": "?", "solution": r"\boxed{1}"}])
    assert [row["answer"] for row in given.ood] == ["1"]


def test_levels_choose_what_is_trained_on_and_not_what_is_tested():
    rows = [row | {"problem": f"{row['problem']} {n}"} for n in range(2) for row in ROWS]
    splits = competition_math.splits(0, train=rows, test=ROWS, levels=(1, 3), validation=1)
    assert {row["level"] for row in [*splits.train, *splits.validation]} == {1, 3}
    assert len(splits.train) == 3
    assert [row["level"] for row in splits.test] == [1, 3, 5, None, 5]


def test_a_level_may_be_a_number():
    """As in MATH-500."""
    row = {"problem": "?", "solution": r"\boxed{1}", "level": 4}
    assert competition_math.rows([row], "test")[0]["level"] == 4


def test_a_solution_without_a_box_is_refused_with_its_split_and_number():
    with pytest.raises(ValueError, match=r"train: row 2: no \\boxed\{\} in the solution, which ends 'It is 5.'"):
        competition_math.splits(0, train=[ROWS[0], {"problem": "?", "solution": "It is 5."}], test=ROWS)


def test_the_rows_of_the_hub_are_the_default(monkeypatch):
    """Its names and splits are asked for; the rows are ours, there being no network in a test."""
    asked = []

    def read_rows(source, columns, *, split, subset):
        asked.append((source, subset, split))
        return [{"problem": f"{subset} {split}", "solution": r"\boxed{1}"}]

    monkeypatch.setattr(data, "read_rows", read_rows)
    splits = competition_math.task(0, validation=2, verifier=len).splits
    subjects = competition_math.SUBJECTS
    assert len(subjects) == 7
    wanted = [("EleutherAI/hendrycks_math", subject, split) for split in ("train", "test") for subject in subjects]
    assert asked == wanted
    assert list(map(len, splits)) == [5, 2, 7, 0]


@pytest.mark.parametrize("parts", [{"train": ROWS}, {"test": ROWS}, {"ood": ROWS}], ids=["train", "test", "ood"])
def test_rows_to_train_on_without_rows_to_test_are_refused(parts):
    with pytest.raises(ValueError, match="rows of your own are both train and test"):
        competition_math.task(0, **parts, verifier=len)


def test_the_verifier_takes_equal_mathematics_for_equal():
    """Every gold answer of the rows above can be told from another one."""
    pytest.importorskip("math_verify")
    other = {"problem": "1?", "solution": r"\boxed{1}"}
    task = competition_math.task(0, train=[other], test=ROWS, validation=0)
    rows = task.splits.test
    right = [r"\frac{2}{4}", "2.0", r"\sqrt{1+x^2}", "5", r"\{2, 1\}"]
    wrong = [r"\frac{2}{5}", "1", r"\sqrt{x+1}", "-5", r"\{2, 3\}"]
    for answers, reward in ((right, 1.0), (wrong, 0.0)):
        completions = [rf"<think>hm</think><answer>\boxed{{{answer}}}</answer>" for answer in answers]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        assert task.verifier([row["prompt"] for row in rows], completions, **columns) == [reward] * 5
