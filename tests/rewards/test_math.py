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


# What a person reads: completion, gold answer and reward.
READ = {
    "boxes and announcements": [
        (r"\boxed{4}. \boxed{5}", "5", 1.0),
        (r"\boxed{4}. \boxed{5}", "4", 0.0),
        (r"\boxed{1} and \boxed{2}", r"\{1,2\}", 1.0),
        (r"\boxed{1} and \boxed{2}", r"$\{1, 2\}$", 1.0),
        (r"\boxed{1}, \boxed{2}", "1,2", 1.0),
        ("not $5$. So the answer is not $5$", "5", 0.0),
        ("The answer is not $5$", "5", 0.0),
        ("The final answer is $5$", "5", 1.0),
        (r"\boxed{\boxed{5}}", "5", 1.0),
        (r"\boxed{5} no wait, it may be 6", "5", 1.0),
        (r"\boxed 5", "5", 1.0),
        (r"\fbox{5}", "5", 1.0),
        (r"\boxed{5", "5", 0.0),
        (r"\boxed{x=\boxed{5}}", "5", 1.0),
        (r"\boxed{5+\boxed{3}}", "3", 0.0),
        (r"\boxed{5+\boxed{3}}", "8", 1.0),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1,2,3", 1.0),
        (r"\boxed{1} and \boxed{2}", "2", 0.0),
        (r"\boxed{4}, so \boxed{5}", "5", 1.0),
        (r"\boxed{4} or \boxed{5}", "5", 0.0),
        (r"$\boxed{1}$ and $\boxed{2}$", r"\{1,2\}", 1.0),
        (r"\boxed{5}\n\nI checked: \boxed{5}", "5", 1.0),
        (r"it is not \boxed{5}", "5", 0.0),
        (r"it isn't $\boxed{5}$", "5", 0.0),
        (r"x \ne \boxed{5}", "5", 0.0),
        (r"not only that, it is \boxed{5}", "5", 1.0),
        (r"\boxed{5} million", "5", 0.0),
        (r"$\boxed{5}$ million", "5000000", 1.0),
        (r"\boxed{50}\%", "0.5", 1.0),
        ("The answer is $5$ or $6$.", "5", 0.0),
        ("The answer is $5$ million", "5", 0.0),
        ("Is the answer $5$? No.", "5", 0.0),
        ("The answer is $5$. Then $6$", "5", 1.0),
        ("The answer is not $5$ but $6$", "5", 0.0),
        (r"\boxed{5} is wrong", "5", 0.0),
        (r"$\boxed{5}$ isn't right", "5", 0.0),
        (r"\boxed{5} was wrong, so \boxed{6}", "6", 1.0),
        (r"\boxed{5} is the answer", "5", 1.0),
        (r"\boxed{5^\circ C}", "5", 1.0),
        (r"\boxed{5°C}", r"5^{\circ}\text{C}", 1.0),
        (r"\boxed{5^\circ\text{C}}", r"5^\circ F", 0.0),
        (r"\boxed{１２}", "12", 1.0),
        (r"Answer: \(5\)", "5", 1.0),
        (r"the answer: \[5\]", "5", 1.0),
        ("The answer is $$5$$", "5", 1.0),
        (r"The final answer is \( \frac12 \).", "0.5", 1.0),
    ],
    "matrices": [
        (boxed(r"\begin{pmatrix}1\\2\end{pmatrix}"), r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
        (boxed(r"\begin{pmatrix}1\\3\end{pmatrix}"), r"\begin{pmatrix}1\\2\end{pmatrix}", 0.0),
        (boxed("2"), r"\begin{pmatrix}1\\2\end{pmatrix}", 0.0),
        (boxed(r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"), r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 1.0),
        (boxed(r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"), r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 0.0),
        (boxed(r"\begin{pmatrix}\frac12\\2\end{pmatrix}"), r"\begin{pmatrix}1/2\\2\end{pmatrix}", 1.0),
        (boxed(r"\begin{pmatrix}1\\2\end{pmatrix}"), r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1.0),
    ],
    "other answers": [
        (boxed("3xyz"), "3xyz", 1.0),
        (boxed("3"), "3xyz", 0.0),
        (boxed("50"), "0.5", 0.0),
        (boxed("−5"), "-5", 1.0),
        (boxed("−5"), "5", 0.0),
        (boxed(r"90^\circ"), "90", 1.0),
        (boxed("x=5"), "5", 1.0),
        (boxed("5"), "x=5", 1.0),
        (boxed("y=5"), "x=5", 0.0),
        (boxed("A"), "A", 1.0),
        (boxed("B"), "A", 0.0),
        (boxed(r"5 \pm 1"), "5", 0.0),
        (boxed(r"\approx 5"), "5", 1.0),
        (boxed(r"\ne 5"), "5", 0.0),
        (boxed("5!"), "5", 0.0),
        (boxed("5!"), "120", 1.0),
        (boxed("10^{3}"), "1000", 1.0),
        (boxed("1000"), "10^3", 1.0),
        (boxed("3:4"), "3:4", 1.0),
        (boxed("3:4"), "4:3", 0.0),
        (boxed("11:30"), "11:30", 1.0),
        (boxed("11"), "11:30", 0.0),
        (boxed("3 + 4i"), "3+4i", 1.0),
        (boxed("3-4i"), "3+4i", 0.0),
        (boxed(r"\pi"), r"\pi", 1.0),
        (boxed("3.14"), r"\pi", 0.0),
        (boxed(r"2\pi r"), r"2\pi r", 1.0),
        (boxed(r"\mathbf{5}"), "5", 1.0),
        (boxed(r"5 \quad 6"), "5", 0.0),
        (boxed("5 6"), "30", 0.0),
        (boxed("5 6"), "5", 0.0),
        (boxed("yes"), "Yes", 1.0),
        (boxed("Monday"), "Monday", 1.0),
        (boxed("x_1"), "x_1", 1.0),
        (boxed("x_1"), "x_2", 0.0),
        (boxed("2^{10}"), "1024", 1.0),
        (boxed(r"\log_2 8"), "3", 1.0),
        (boxed(r"\binom{5}{2}"), "10", 1.0),
        (boxed("x^{12}"), "x^{1}2", 0.0),
        (boxed("500"), "5", 0.0),
        (boxed(r"90^{\circ}"), "90", 1.0),
        (boxed("90°"), "90", 1.0),
        (boxed("90°"), "91", 0.0),
        (boxed(r"\approx 3.14"), "3.14", 1.0),
        (boxed(r"x \approx 3.14"), "3.14", 1.0),
        (boxed("about 5"), "5", 0.0),
        (boxed(r"5\pm1"), r"5\pm1", 1.0),
        (boxed("half"), "0.5", 0.0),
        (boxed("3e"), "3e", 1.0),
        (boxed("2 sin x"), "2", 0.0),
        (boxed(r"2\sin x"), r"2\sin x", 1.0),
        (boxed(r"2\sin x"), "2", 0.0),
        (boxed("i"), "i", 1.0),
        (boxed("-i"), "i", 0.0),
        (boxed("y=2x+1"), "y=2x+1", 1.0),
        (boxed("y=2x+1"), "y=2x+2", 0.0),
        (boxed("2x+1"), "y=2x+1", 1.0),
        (boxed("y=1+2x"), "y=2x+1", 1.0),
        (boxed(r"\emptyset"), r"\emptyset", 1.0),
        (boxed("5"), 5, 1.0),
        (boxed("5.0"), 5.0, 1.0),
        (boxed("5"), 5.0, 1.0),
        (boxed("five"), "5", 0.0),
        (boxed("5"), "", None),
        (boxed("5"), " ", None),
        (boxed(""), "5", 0.0),
        (boxed(" "), "5", 0.0),
        (boxed("True"), True, 1.0),
    ],
    "currencies": [
        (boxed("36"), r"\$36", 1.0),
        (boxed(r"\$36"), r"\$36", 1.0),
        (boxed("36"), "$36", 1.0),
        (boxed(r"\$36"), "$36", 1.0),
        (boxed("35"), r"\$36", 0.0),
        (boxed("$5$"), "5", 1.0),
        (boxed("5"), "We find $5$.", 1.0),
        (boxed("5"), "We find $5$ and $6$.", 0.0),
        (boxed("x"), "Answer: $x$.", 1.0),
        (boxed("5,6"), "$5$ and $6$", 1.0),
        (boxed("$1,234$"), "1234", 1.0),
        (boxed("€5"), "5", 1.0),
        (boxed(r"US\$5"), "5", 1.0),
        (boxed("5€"), "5", 1.0),
        (boxed("-$5"), "-5", 1.0),
        (boxed(r"-\$5"), "-5", 1.0),
        (boxed(r"\$5"), "-5", 0.0),
        (boxed(r"\$1.50"), "1.5", 1.0),
    ],
    "short forms": [
        (boxed(r"\frac12"), r"\frac{1}{2}", 1.0),
        (boxed(r"\frac{1}{2}"), r"\frac12", 1.0),
        (boxed("12"), r"\frac12", 0.0),
        (boxed(r"\frac1{2}"), "0.5", 1.0),
        (boxed(r"\frac123"), r"\frac{1}{2}3", 1.0),
        (boxed(r"2\sqrt2"), r"2\sqrt{2}", 1.0),
        (boxed(r"2\sqrt2"), r"\sqrt8", 1.0),
        (boxed(r"\sqrt23"), r"\sqrt{23}", 0.0),
        (boxed(r"-\frac12"), "-0.5", 1.0),
        (boxed(r"1\frac12"), "1.5", 1.0),
        (boxed(r"1\frac{1}{2}"), "1.5", 1.0),
        (boxed("1 1/2"), "1.5", 1.0),
        (boxed(r"1\frac12"), "0.5", 0.0),
        (boxed("1/3"), r"\frac{1}{3}", 1.0),
        (boxed(r"\dfrac{1}{3}"), "1/3", 1.0),
        (boxed("-1 1/2"), "-1.5", 1.0),
        (boxed(r"-1\frac12"), "-1.5", 1.0),
        (boxed(r"-1\frac12"), "-0.5", 0.0),
        (boxed("½"), "0.5", 1.0),
        (boxed("√23"), r"\sqrt{23}", 1.0),
        (boxed("x²"), "x^2", 1.0),
        (boxed(r"\frac{\sqrt3}2"), r"\frac{\sqrt{3}}{2}", 1.0),
        (boxed(r"\frac{\sqrt3}{2}"), r"\frac{\sqrt{3}}{2}", 1.0),
        (boxed(r"\frac{1}{23}"), r"\frac{12}{3}", 0.0),
        (boxed(r"\frac\pi2"), r"\frac{\pi}{2}", 1.0),
        (boxed(r"\tfrac12"), "0.5", 1.0),
        (boxed(r"0.\overline{3}"), r"\frac13", 1.0),
    ],
    "separators and punctuation": [
        (boxed(r"1\,234"), "1234", 1.0),
        (boxed("1{,}234"), "1234", 1.0),
        (boxed(r"1\;234"), "1234", 1.0),
        (boxed("1 234"), "1234", 1.0),
        (boxed("1\u202f234"), "1234", 1.0),
        (boxed(r"12\,345"), "12", 0.0),
        (boxed("5."), "5", 1.0),
        (boxed("5,"), "5", 1.0),
        (boxed("5, 6"), "5", 0.0),
        (boxed("1,2,3"), "3,2,1", 1.0),
        (boxed("1,000"), "1", 0.0),
        (boxed("1,000"), "1,000", 1.0),
        (boxed("1,234.5"), "1234.5", 1.0),
    ],
    "rounding": [
        (boxed("12,345,678"), "12345678", 1.0),
        (boxed("1e-7"), "4e-7", 0.0),
        (boxed("4e-7"), "4e-7", 1.0),
        (boxed("0.0000001"), "0.0000004", 0.0),
        (boxed(r"4\times10^{-7}"), "4e-7", 1.0),
        (boxed("0.333333"), r"\frac13", 1.0),
        (boxed("0.3333"), r"\frac13", 0.0),
        (boxed("6.02e23"), "6.02e23", 1.0),
        (boxed(r"4\times10^{-20}"), r"1\times10^{-20}", 0.0),
        (boxed(r"1\times10^{-20}"), r"1\times10^{-20}", 1.0),
        (boxed("1234567.1"), "1234567.2", 0.0),
        (boxed("0.00000012345678"), "0.00000012345678", 1.0),
        (boxed("0.142857"), r"\frac17", 1.0),
        (boxed("2.236068"), r"\sqrt5", 1.0),
        (boxed("0"), "0.0000001", 0.0),
        (boxed("0.0000001"), "0", 0.0),
        (boxed("0.333..."), "0.333", 0.0),
        (boxed("1e5"), "100000", 1.0),
        (boxed("1.5e-3"), "0.0015", 1.0),
        (boxed("1E5"), "100000", 1.0),
    ],
    "scale words": [
        (boxed(r"5\text{ million}"), "5", 0.0),
        (boxed(r"5\text{ million}"), "5000000", 1.0),
        (boxed(r"5\text{ thousand}"), "5", 0.0),
        (boxed(r"2.5\text{ billion}"), "2500000000", 1.0),
        (boxed("5 million"), "5000000", 1.0),
        (boxed("5 million"), "5", 0.0),
        (boxed(r"5\text{k}"), "5", 0.0),
        (boxed("5k"), "5", 0.0),
        (boxed(r"5\text{ dozen}"), "60", 1.0),
        (boxed(r"\frac12\text{ million}"), "0.5", 0.0),
        (boxed("2 million dollars"), "2000000", 1.0),
        (boxed(r"\$2\text{ million}"), "2000000", 1.0),
        (boxed(r"\$2\text{ million}"), r"\$2", 0.0),
    ],
    "bases": [
        (boxed("2516_7"), "2516_8", 0.0),
        (boxed("2516_8"), "2516_8", 1.0),
        (boxed("2516"), "2516_8", 1.0),
        (boxed("2516_{8}"), "2516_8", 1.0),
        (boxed("66_7"), "48", 1.0),
        (boxed("66_7"), "66", 0.0),
        (boxed("66_{7}"), "66_7", 1.0),
        (boxed(r"66_{\text{seven}}"), "66_7", 1.0),
        (boxed("A1_{16}"), "a1_{16}", 1.0),
        (boxed("101_2"), "101_2", 1.0),
        (boxed("101_2"), "5", 1.0),
        (boxed("a_{10}"), "a_{10}", 1.0),
        (boxed("66 base 7"), "66_7", 1.0),
    ],
    "text beside numbers": [
        (boxed(r"5\text{5}"), "5", 0.0),
        (boxed(r"\text{A}"), "A", 1.0),
        (boxed(r"10\text{ cm}^2"), "10", 1.0),
        (boxed(r"\text{no}"), "0", 0.0),
        (boxed("5 apples"), "5", 1.0),
        (boxed("5 or 6"), "5", 0.0),
        (boxed("5 or 6"), "6", 0.0),
        (boxed(r"\text{not } 5"), "5", 0.0),
        (boxed(r"5\text{ or }6"), "5", 0.0),
        (boxed(r"\text{11:30 AM}"), "11:30 AM", 1.0),
        (boxed("the answer is unknown"), "5", 0.0),
        (boxed(r"\textbf{5}"), "5", 1.0),
        (boxed(r"\text{Evelyn}"), r"\text{Evelyn}", 1.0),
        (boxed("Evelyn"), r"\text{Evelyn}", 1.0),
        (boxed(r"\text{5}"), "5", 1.0),
        (boxed(r"5 \text{ (or } 6)"), "5", 0.0),
        (boxed("2"), "2d", 0.0),
        (boxed("2d"), "2", 0.0),
        (boxed("3t"), "3t", 1.0),
        (boxed("3"), "3t", 0.0),
        (boxed("5m"), "5", 0.0),
        (boxed(r"5\text{ m}"), "5", 1.0),
        (boxed(r"5\text{ m}"), r"5\text{ cm}", 0.0),
        (boxed(r"5\text{ cm}"), r"5\text{ centimeters}", 1.0),
        (boxed("5 miles per hour"), "5", 1.0),
        (boxed("5 mph"), "5", 1.0),
        (boxed(r"5\text{ or more}"), "5", 0.0),
        (boxed("5 or more"), "5", 0.0),
        (boxed("3 or more"), "3 or more", 1.0),
        (boxed("3"), "3 or more", 0.0),
        (boxed("5"), "The answer is 5", 1.0),
        (boxed("5"), "not 5", None),
        (boxed("5"), "The answer is not 5", None),
        (boxed("3"), "3 apples and 4 pears", None),
        (boxed("3"), "3 apples", 1.0),
        (boxed(r"\text{cat}"), "act", 0.0),
        (boxed("cat"), r"\text{cat}", 1.0),
        (boxed(r"\text{Yes}"), "Yes", 1.0),
        (boxed(r"\text{No}"), "Yes", 0.0),
        (boxed(r"\text{even function}"), "even", 0.0),
        (boxed(r"\textbf{(A)}"), "A", 1.0),
        (boxed(r"\textbf{(B)}"), "A", 0.0),
        (boxed(r"90\text{ degrees}"), r"90^\circ", 1.0),
        (boxed(r"5 \text{ (approximately)}"), "5", 1.0),
        (boxed(r"\text{undefined}"), r"\text{undefined}", 1.0),
        (boxed("0"), r"\text{undefined}", 0.0),
        (boxed("DNE"), r"\text{DNE}", 1.0),
    ],
    "percent": [
        (boxed("50%"), "50", 1.0),
        (boxed(r"50\%"), "50", 1.0),
        (boxed(r"50\%"), r"50\%", 1.0),
        (boxed("0.5"), r"50\%", 1.0),
        (boxed("50"), r"50\%", 1.0),
        (boxed(r"50\text{ percent}"), "0.5", 1.0),
        (boxed("50 percent"), "50", 1.0),
        (boxed("50 percent"), "0.5", 1.0),
        (boxed("5%"), "0.5", 0.0),
        (boxed("0.5%"), "50%", 0.0),
        (boxed("5%"), "5", 1.0),
    ],
    "sets and intervals": [
        (boxed("[1,2)"), "[1,2)", 1.0),
        (boxed("[1,2]"), "[1,2)", 0.0),
        (boxed(r"(-\infty,2)"), r"(-\infty, 2)", 1.0),
        (boxed("(1,2)"), "(1,2)", 1.0),
        (boxed("(2,1)"), "(1,2)", 0.0),
        (boxed(r"\{2,1\}"), r"\{1,2\}", 1.0),
        (boxed("(A)"), "A", 1.0),
        (boxed("> 5"), "5", 0.0),
        (boxed("(5)"), "5", 1.0),
        (boxed(r"x\in[1,2)"), "[1,2)", 1.0),
        (boxed(r"x \in (1,2)\cup(3,4)"), r"(1,2)\cup(3,4)", 1.0),
        (boxed(r"(1,2) \cup (3,5)"), r"(1,2)\cup(3,4)", 0.0),
        (boxed(r"\left[1,2\right)"), "[1,2)", 1.0),
        (boxed(r"\{-1, 2\}"), r"\{2,-1\}", 1.0),
        (boxed(r"\{1\}"), "-1", 0.0),
        (boxed(r"\{1, -2\}"), r"\{1,2\}", 0.0),
        (boxed(r"\sqrt[3]2"), r"\sqrt[3]{2}", 1.0),
        (boxed("(3,-2)"), "(3,-2)", 1.0),
        (boxed("(3,2)"), "(3,-2)", 0.0),
        (boxed(r"\infty"), r"\infty", 1.0),
        (boxed(r"-\infty"), r"\infty", 0.0),
    ],
}


@pytest.mark.parametrize("group", READ)
def test_answers_are_read_as_a_person_reads_them(pool, group):
    completions, golds, _ = zip(*READ[group], strict=True)
    given = accuracy(pool=pool)(["?"] * len(golds), list(completions), solution=list(golds))
    assert list(zip(completions, golds, given, strict=True)) == READ[group]


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
