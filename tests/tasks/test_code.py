"""Small functions: that the words say what the tests test, and that the tests tell right code from wrong."""

import collections
import itertools
import random
import re

import pytest

from grpo_jax.rewards.python import python_tests
from grpo_jax.tasks import code

SPLITS = code.splits(0, train=300, validation=20, test=40, ood=40)

# The families once more, written from their words as one would in answer to the prompt.
FROM_THE_WORDS = {
    "move the first": "for _ in range(min(K, len(x))):\n    x = x[1:] + x[:1]",
    "cut the list": "out = []\nwhile x:\n    out, x = out + [sum(x[:K])], x[K:]\nx = out",
    "leave out the multiples": "x = [v for v in x if v % K != 0]",
    "sort by the remainder": "x = sorted(sorted(x), key=lambda v: v % K)",
    "replace the list by": "x = [x[i] - x[i - K] for i in range(K, len(x))]",
    "keep only every": "x = [v for i, v in enumerate(x) if i % K == 0]",
    "add": "x = [x[i] + K * i for i in range(len(x))]",
    "give the sum": "x = sum(v ** 2 for v in x if not v % K)",
    "count the pairs": "x = sum(1 for a in range(len(x)) for b in range(a + 1, len(x)) if x[a] - x[b] in (K, -K))",
    "give the number": "x = sorted(set(x))\nx = x[-K] if len(x) >= K else 0",
    "replace each letter": "x = ''.join(chr((ord(c) - 97 + K) % 26 + 97) if 'a' <= c <= 'z' else c for c in x)",
    "replace each unbroken": "import re\n"
    "x = re.sub(r'(.)\\1*', lambda m: m[0] if len(m[0]) < K else m[1] + str(len(m[0])), x)",
    "cut the text": "out = ''\nwhile x:\n    out, x = out + ''.join(reversed(x[:K])), x[K:]\nx = out",
    "leave out every": "x = ''.join(x[i] for i in range(len(x)) if (i + 1) % K != 0)",
}


def solution(steps):
    """A function that does the steps, by the table above."""
    lines = []
    for step in steps:
        (body,) = [body for words, body in FROM_THE_WORDS.items() if step.startswith(words)]
        (k,) = [k for template in code.TEMPLATES for k in template.numbers if template.words.format(k=k) == step]
        lines += [f"K = {k}", *body.splitlines()]
    return "def f(x):\n" + "".join(f"    {line}\n" for line in [*lines, "return x"])


def passes(source, row):
    scope = {}
    exec(source, scope)
    try:
        for test in row["tests"]:
            exec(test, scope)
    except AssertionError:
        return False
    return True


def test_the_words_say_what_the_tests_test():
    """For every row, and so for every family with every number that occurs."""
    rows = [row for rows in SPLITS for row in rows]
    assert all(passes(solution(row["steps"]), row) for row in rows)
    used = collections.Counter(
        words for row in rows for step in row["steps"] for words in FROM_THE_WORDS if step.startswith(words)
    )
    assert len(code.TEMPLATES) == len(FROM_THE_WORDS) == len(used)


def test_the_examples_in_the_prompt_are_true_and_are_not_the_tests():
    for row in SPLITS.train:
        examples = re.findall(r"^    (f\(.*\) == .*)$", row["prompt"], re.MULTILINE)
        assert len(examples) == code.EXAMPLES
        assert passes(solution(row["steps"]), {"tests": [f"assert {example}" for example in examples]})
        assert not {f"assert {example}" for example in examples} & set(row["tests"])
        assert all(f". {step}\n" in row["prompt"] for step in row["steps"])


def test_the_tests_fail_a_function_that_does_something_else():
    """Another number in a step, a step left out, nothing done, or always one result. Some make no difference."""
    caught = collections.Counter()
    for row in SPLITS.train:
        source = solution(row["steps"])
        number = int(re.search("K = ([0-9]+)", source)[1])
        caught["another number"] += not passes(source.replace(f"K = {number}", f"K = {number + 1}", 1), row)
        caught["a step left out"] += not passes(solution(row["steps"][1:]), row)
        caught["nothing done"] += not passes("def f(x):\n    return x", row)
        result = row["tests"][2].partition(" == ")[2]
        caught["always one result"] += not passes(f"def f(x):\n    return {result}", row)
        caught["always an empty one"] += not passes("def f(x):\n    return []", row)
    assert all(count >= 0.9 * len(SPLITS.train) for count in caught.values()), caught


def test_the_tests_have_an_empty_input_and_four_results_or_more():
    for row in SPLITS.train:
        assert re.match(r"assert f\((\[\]|'')\) == ", row["tests"][0])
        assert len(row["tests"]) == code.TESTS
        assert len({test.partition(" == ")[2] for test in row["tests"]}) >= 4


def test_the_shifted_split_has_three_steps_and_the_others_one_or_two():
    assert {len(row["steps"]) for row in [*SPLITS.train, *SPLITS.validation, *SPLITS.test]} == {1, 2}
    assert {len(row["steps"]) for row in SPLITS.ood} == {3}


def test_problems_are_about_numbers_and_about_text():
    rows = itertools.islice(code.problems(random.Random(0), (1, 2)), 100)
    about = collections.Counter("f(values)" in row["prompt"] for row in rows)
    assert min(about[True], about[False]) > 20


@pytest.fixture(scope="module")
def verifier(sandbox):
    return python_tests()


def test_code_is_judged_by_running_it_in_the_sandbox(verifier):
    rows = [SPLITS.train[0], SPLITS.test[0], SPLITS.ood[0], SPLITS.ood[1]]
    answers = [solution(row["steps"]) for row in rows[:3]] + ["def f(x):\n    return x"]
    completions = [f"<think>so</think><answer>\n```python\n{answer}\n```\n</answer>" for answer in answers]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    assert verifier([row["prompt"] for row in rows], completions, **columns) == [1.0, 1.0, 1.0, 0.0]


def test_the_verifier_is_python_tests_unless_another_is_given(verifier):
    sizes = {"train": 1, "validation": 0, "test": 0, "ood": 0}
    assert code.task(0, **sizes).verifier.__name__ == "python_tests"
    assert code.task(0, **sizes, verifier=len).verifier is len
