"""The experiments of several turns run, and what they write goes together."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from grpo_jax import data, tools
from grpo_jax.study import results

ROOT = pathlib.Path(__file__).parents[2] / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calculator, guess_the_number = load("calculator"), load("guess_the_number")


def test_the_teacher_of_the_calculator_calls_it_in_the_words_of_the_template():
    tokenizer, rng = calculator.make_tokenizer(), np.random.default_rng(0)
    rows = calculator.problems(0, 200)
    shown = [calculator.demonstrate(row, rng) for row in rows]
    called = [(row, turns) for row, turns in zip(rows, shown, strict=True) if len(turns) > 1]
    assert 45 < len(called) < 90
    for _, (call, result, answer) in called:
        (read,) = tools.hermes_calls(call)
        assert tools.calculator(**read.arguments) == result == answer
        assert tokenizer.decode(tokenizer(call)["input_ids"]) == call
        assert len(tokenizer(call)["input_ids"]) == 11  # the fixed words are one token each
    right = [turns[-1] == row["answer"] for row, turns in called]
    assert 0.6 < np.mean(right) < 0.85
    between = data.between_turns(tokenizer, role="tool")([{"role": "tool", "content": "12"}], tokenizer.eos_token_id)
    assert tokenizer.unk_token_id not in between


@pytest.mark.smoke
def test_the_calculator_runs(tmp_path):
    config = calculator.Config(
        results=tmp_path, seeds=1, demonstrations=64, warmup_steps=4, steps=2, evaluate_every=1, test=4
    )
    rows = calculator.experiment(config)
    written = results.read(tmp_path / "calculator.csv")
    assert [(row["condition"], row["step"]) for row in written] == [
        (condition, step) for condition in ("with the calculator", "it says 0") for step in range(3)
    ]
    assert len(rows) == len(written)
    assert (tmp_path / "calculator.png").exists()


@pytest.mark.smoke
def test_the_game_runs(tmp_path):
    config = guess_the_number.Config(results=tmp_path, seeds=2, steps=4, evaluate_every=2)
    guess_the_number.experiment(config)
    written = results.read(tmp_path / "guess_the_number.csv")
    assert {row["seed"] for row in written} == {0, 1}
    assert [row["step"] for row in written[:3]] == [0, 2, 4]
    assert (tmp_path / "guess_the_number.png").exists()


def test_the_committed_results_are_those_that_the_pages_tell():
    page = (ROOT.parent / "docs" / "pages" / "results" / "turns.md").read_text()
    found = results.read(ROOT / "results" / "guess_the_number.csv")
    numbers = results.per_seed(found, "found")["told higher or lower"]
    assert f"find {numbers.mean():.3f} [" in page
    count = {6: "twelve", 7: "four"}
    assert {n: int((numbers * 7).round().tolist().count(n)) for n in count} == {6: 12, 7: 4}
    assert "6 of 7 in twelve runs, all of them in four" in page
    last = {name: values.mean() for name, values in results.per_seed(found, "found").items()}
    assert last["told higher or lower"] > 0.8
    assert last["told nothing"] == pytest.approx(3 / 7, abs=1e-3)
    found = results.read(ROOT / "results" / "calculator.csv")
    greedy = results.per_seed(found, "greedy")
    first = [row["greedy"] for row in found if row["condition"] == "with the calculator" and row["step"] == 0]
    went = [*first, *greedy["with the calculator"]]
    assert "from {:.2f} and {:.2f} to {:.2f} and {:.2f}".format(*went) in " ".join(page.split())
    blank = [row.get("sampled", 0) for row in found if row["condition"] == "it says 0"]
    assert greedy["it says 0"].max() == max(blank) == 0
    called = results.per_seed(found, "turns")["it says 0"] - 1
    np.testing.assert_allclose(called, [1 / 3, 1 / 4], atol=0.02)
    assert {record["turns"] - 1 for record in found if record["condition"] == "it says 0"} == {*called}


def test_the_readme_tells_the_committed_results():
    readme = (ROOT.parent / "README.md").read_text()
    for name, condition, metric in (
        ("guess_the_number", "told higher or lower", "found"),
        ("calculator", "with the calculator", "greedy"),
    ):
        rows = [row for row in results.read(ROOT / "results" / f"{name}.csv") if row["condition"] == condition]
        first, last = ([row for row in rows if row["step"] == step] for step in (0, max(row["step"] for row in rows)))
        before, after = (float(np.mean([row[metric] for row in some])) for some in (first, last))
        sampled = float(np.mean([row["sampled"] for row in last]))
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| [`{name}.py`]")]
        assert line.endswith(f" | {before:.3f} | {after:.3f} | | {sampled:.3f} |")
        assert f"{len(last)} seeds" in line


def test_a_call_is_answered_within_the_tokens_of_a_conversation_whatever_calculator_there_is():
    tokenizer, config = calculator.make_tokenizer(), calculator.Config()
    text = f"{calculator.CALL}123 * 456{calculator.CLOSE}"
    between, end = data.between_turns(tokenizer, role="tool"), tokenizer.eos_token_id
    for tool, said in ((tools.calculator, "56088"), (calculator.says_nothing(), "0")):
        answer = tools.environment([tool], tools.hermes_calls)({}, [{"role": "assistant", "content": text}])
        assert answer.content == [{"role": "tool", "content": said}]
        answered = [*between(answer.content, end), *tokenizer("999999")["input_ids"], end]
        assert len(tokenizer(text)["input_ids"]) + 1 + len(answered) <= config.max_tokens
