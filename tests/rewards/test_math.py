"""The accuracy reward: equality as mathematics, within limits."""

import sys
import time

import pytest

pytest.importorskip("math_verify", reason="the accuracy reward needs math-verify (pip install 'grpo-jax[math]')")

import grpo_jax.rewards
from grpo_jax.rewards.mathematics import accuracy
from grpo_jax.rewards.pool import WorkerPool


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(workers=2, timeout=2.0, memory=2 * 2**30) as workers:
        yield workers


def boxed(answer):
    return rf"Thus it is \boxed{{{answer}}}."


# Completion, gold answer and reward. The first five are from the documentation and the tests of TRL 1.16's
# accuracy_reward and of math-verify 0.9; the others are plain mathematics.
CASES = {
    "trl: a third": (r"My answer is \boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0),
    "trl: not a half": (r"My answer is \boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0),
    "trl: boxed formula": (r"\boxed{\frac{63}{400}}", r"\frac{63}{400}", 1.0),
    "trl: wrong formula": (r"\boxed{\frac{64}{400}}", r"\frac{63}{400}", 0.0),
    "math-verify: a set": (r"${1,3} \cup {2,4}$ so the answer is $\{1,2,3,4\}$", r"${1,2,3,4}$", 1.0),
    "integer": (boxed("42"), "42", 1.0),
    "fraction as decimal": (boxed("0.5"), r"\frac{1}{2}", 1.0),
    "fraction not reduced": (boxed(r"\frac{2}{4}"), r"\frac{1}{2}", 1.0),
    "dfrac": (boxed(r"\dfrac{3}{4}"), "0.75", 1.0),
    "thousands": (boxed("1,234"), "1234", 1.0),
    "dollars": (boxed(r"\$18"), "18", 1.0),
    "unit": (boxed(r"5 \text{ cm}"), "5", 1.0),
    "unit and fraction": (boxed(r"\frac{5}{2}\text{ meters}"), "2.5", 1.0),
    "bare root": (boxed(r"\sqrt{8}"), r"2\sqrt{2}", 1.0),
    "part of a bare root": (boxed("2"), r"2\sqrt{2}", 0.0),
    "bare formula": (boxed("(x+1)^2"), "x^2+2x+1", 1.0),
    "part of a bare formula": (boxed("1"), "x^2+2x+1", 0.0),
    "bare interval": (boxed("[1, 2)"), "[1,2)", 1.0),
    "bare unit": (boxed("5"), r"5 \text{ cm}", 1.0),
    "gold answer with a word": (boxed("3"), "3 apples", 1.0),
    "gold answer in a sentence": (boxed("3"), "The answer is 3", 1.0),
    "gold answer in LaTeX in a sentence": (boxed(r"\sqrt{8}"), r"We find $2\sqrt{2}$.", 1.0),
    "text": (boxed(r"\text{East}"), r"\text{east}", 1.0),
    "other text": (boxed(r"\text{west}"), r"\text{east}", 0.0),
    "root in dollars": (boxed(r"\sqrt{8}"), r"$2\sqrt{2}$", 1.0),
    "formula": (boxed(r"(x+1)^2"), r"$x^2+2x+1$", 1.0),
    "wrong formula": (boxed(r"(x+1)^2"), r"$x^2+1$", 0.0),
    "interval": (boxed(r"(1, 2]"), r"$(1,2]$", 1.0),
    "open interval": (boxed(r"(1, 2)"), r"$(1,2]$", 0.0),
    "equation": (boxed("x = 7"), "7", 1.0),
    "the last box counts": (boxed("3") + boxed("4"), "4", 1.0),
    "an earlier box does not": (boxed("4") + boxed("3"), "4", 0.0),
    "the box before other LaTeX": (r"\boxed{4}, since $2 + 3 = 5$", "4", 1.0),
    "after the answer is": ("So the final answer is $4$. I hope it is correct.", "4", 1.0),
    "gsm8k's gold answer": (boxed("72"), "48/2 = <<48/2=24>>24 clips in May.\n48+24 = 72 in all.\n#### 72", 1.0),
    "a number as gold answer": (boxed("72"), 72, 1.0),
    "no LaTeX": ("The answer is 4", "4", 0.0),
    "nothing": ("", "4", 0.0),
    "box of nothing": (boxed(""), "4", 0.0),
    "box not closed": (r"\boxed{", "4", 0.0),
    "LaTeX of nothing sensible": (boxed(r"\frac{}{\sqrt"), "4", 0.0),
    "a gold answer that cannot be parsed": (boxed("4"), "", None),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_as_mathematics(pool, case):
    completion, gold, expected = CASES[case]
    assert accuracy(pool=pool)(["?"], [completion], solution=[gold]) == [expected]


@pytest.mark.parametrize(
    ("columns", "column", "expected"),
    [
        ({"solution": ["4"], "answer": ["5"]}, None, 1.0),
        ({"answer": ["4"]}, None, 1.0),
        ({"solution": ["5"], "final": ["4"]}, "final", 1.0),
    ],
    ids=["solution first", "answer", "named"],
)
def test_the_column_of_gold_answers(pool, columns, column, expected):
    assert accuracy(pool=pool, column=column)(["?"], [boxed("4")], **columns) == [expected]


def test_a_data_set_without_gold_answers(pool):
    with pytest.raises(ValueError, match="solution or answer"):
        accuracy(pool=pool)(["?"], [boxed("4")], question=["?"])


def test_chat_messages(pool):
    completions = [[{"role": "assistant", "content": boxed(n)}] for n in ("4", "5")]
    assert accuracy(pool=pool)([[{}], [{}]], completions, solution=["4", "4"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "gold", "tolerance", "expected"),
    [
        ("3.14", "3.14159", 0.0, 0.0),
        ("3.14", "3.14159", 1e-2, 1.0),
        ("3.10", "3.14159", 1e-2, 0.0),
        ("98", "100", 0.02, 1.0),
        ("97.9", "100", 0.02, 0.0),
        ("-98", "-100", 0.02, 1.0),
        ("0.001", "0", 0.5, 0.0),
        (r"\frac{22}{7}", r"$\pi$", 1e-3, 1.0),
        ("x", "100", 0.5, 0.0),
        ("(99, 101)", "100", 0.5, 0.0),
    ],
    ids=lambda value: str(value),
)
def test_tolerance_is_a_share_of_the_gold_number(pool, answer, gold, tolerance, expected):
    assert accuracy(pool=pool, tolerance=tolerance)(["?"], [boxed(answer)], solution=[gold]) == [expected]


def test_decimals(pool):
    for decimals, expected in ((2, 1.0), (6, 0.0)):
        assert accuracy(pool=pool, decimals=decimals)(["?"], [boxed("0.333")], solution=["0.3333"]) == [expected]


def test_only_the_end_is_parsed(pool):
    completion = boxed("4") + "x" * 100
    assert accuracy(pool=pool)(["?"], [completion], solution=["4"]) == [1.0]
    assert accuracy(pool=pool, characters=100)(["?"], [completion], solution=["4"]) == [0.0]


HOSTILE = {
    "a power tower": boxed("9^{9^{9^{9^{9}}}}"),
    "a factorial": boxed("99999999!"),
    "a factorial of a factorial": boxed("((99!)!)!"),
    "a sum without end": boxed(r"\sum_{n=1}^{99999999999} \frac{1}{n^{n}}"),
    "an integral": boxed(r"\int_0^1 \frac{\sin(x^x)\ln(\cos x)}{e^{x^3}+\tan x} dx"),
    "many digits": boxed("9" * 9000),
    "many digits after the point": boxed("0." + "9" * 9000),
    "a large exponent": boxed("10^{999999999}"),
    "deep fractions": boxed(r"\frac{1}{" * 1500 + "1" + "}" * 1500),
    "deep parentheses": boxed("(" * 3000 + "1" + ")" * 3000),
    "boxes in boxes": r"\boxed{" * 1400 + "1" + "}" * 1400,
    "boxes not closed": r"\boxed{" * 5000,
    "dollars": "$" * 35_000,
    "answers": "the final answer is " * 1700,
    "answers without an end": r"answer \( " * 3500,
    "brackets": r" [ \[ \( $" * 3500,
    "code": boxed(r"__import__('os').system('touch /tmp/grpo_jax_was_here')"),
    "format characters": boxed("{}{0.__class__}%s%n\x00\x1b[31m"),
    "text": boxed(r"\text{" + "4" * 5000 + "}"),
    "matrix": boxed(r"\begin{pmatrix}" + r"1 & 2 \\" * 800 + r"\end{pmatrix}^{99999}"),
}


def test_no_hostile_completion_scores_or_hinders_the_others(tmp_path):
    """S2 and S3: a 32k-token completion has some 35,000 characters and more of such text."""
    reward = accuracy(workers=2, timeout=1.0)
    began = time.monotonic()
    completions = [text for attack in HOSTILE.values() for text in (attack, boxed("4"))]
    metrics = {}
    columns = {"solution": ["4"] * len(completions), "log_metric": metrics.__setitem__}
    rewards = reward(["?"] * len(completions), completions, **columns)
    assert time.monotonic() - began < 5 + 1.2 * len(HOSTILE)
    assert dict(zip(HOSTILE, rewards[::2], strict=True)) == dict.fromkeys(HOSTILE, 0.0)
    assert rewards[1::2] == [1.0] * len(HOSTILE)
    assert 0 < metrics["accuracy/timeouts"] < len(HOSTILE)
    assert metrics["accuracy/faults"] == 0


@pytest.mark.parametrize(
    "settings", [{"tolerance": -0.1}, {"tolerance": 1.0}, {"decimals": -1}, {"characters": 0}], ids=str
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        accuracy(**settings)


def test_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "grpo_jax.rewards.symbolic", None)
    monkeypatch.delattr(grpo_jax.rewards, "symbolic", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'grpo-jax\[math\]'"):
        accuracy()
