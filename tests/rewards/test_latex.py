"""The reading of answers in LaTeX, before a parser sees them."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards.latex import final_answer, gold_answer, read

READINGS = {  # LaTeX -> for the parser, unit
    r"\frac12": (r"\frac{1}{2}", ""),
    r"\frac{\sqrt3}2": (r"\frac{\sqrt{3}}{2}", ""),
    r"\sqrt[3]2": (r"\sqrt[3]{2}", ""),
    r"1\,234{,}567": ("1234567", ""),
    "12\u202f345": ("12345", ""),
    r"5\text{ million}": ("5000000", ""),
    r"2.5\text{ million dollars}": ("2500000", "dollar"),
    r"5\text{ hundred thousand}": ("500000", ""),
    r"\$36.": ("36", "dollar"),
    r"5\text{ cm}^2": ("5", "centimeter^2"),
    "5 miles per hour": ("5", "mile hour"),
    r"$-\frac{1}{2}$": (r"-\frac{1}{2}", ""),
    "−5": ("-5", ""),
    r"-1\frac12": (r"-(1+\frac{1}{2})", ""),
    "4e-7": (r"4 \times 10^{-7}", ""),
    r"0.1\overline{6}": (r"\frac{1}{6}", ""),
    r"5\text{5}": ("55", ""),
    "2516_8": ("1358", ""),
    "3xyz": ("3xyz", ""),
}


@pytest.mark.parametrize("latex", READINGS)
def test_the_reading_of_an_answer(latex):
    reading = read(latex)
    assert (reading.latex, reading.unit) == READINGS[latex]


@pytest.mark.parametrize(
    "latex", ["", " ", r"5\text{ or more}", r"5\text{ or 6}", r"\frac1x\text{ million}", r"5\text{k}"]
)
def test_what_cannot_be_read(latex):
    assert read(latex) is None


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        (r"\boxed{4}. \boxed{5}", "5"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"x = -\boxed{5}", "-5"),
        ("so\n- \\boxed{5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 5", "5"),
        (r"\fbox{5}", "5"),
    ],
)
def test_the_last_box_is_the_final_answer(text, latex):
    assert final_answer(text).latex == latex


@pytest.mark.parametrize(
    "text", [r"\boxed{5} \boxed{6", "5", "", r"not \boxed{5}", "the answer is not $5$", r"\boxed{}"]
)
def test_a_text_without_a_final_answer(text):
    assert final_answer(text) is None


STANDS = r"""
so~- \boxed{5}
**\boxed{5}**
**Answer:** \boxed{5}
Answer - \boxed{5}
\boxed{5} cm
$x=\boxed{5}$.
\boxed{5}!
$\boxed{5}$!
\[\boxed{5}\]
\[~\boxed{5}~\]
\boxed{5} is never negative
\boxed{5} is not hard to find
\boxed{5} was too easy
\boxed{5} is not reducible
\boxed{5}^\circ
$\boxed{5}^{\circ}$
$38 \equiv \boxed{5} \pmod{11}$
\boxed{5} times a day
the total is \boxed{5} - which is right
$\text{Answer: }\boxed{5}$
\begin{align}x&=\boxed{5}\end{align}
{\boxed{5}}
$\textbf{\boxed{5}}$
$\color{red}\boxed{5}$
a total of \boxed{5} apples
\boxed{5} I hope it is
the area of \boxed{5}
(a) \boxed{5}
Step 2: \boxed{5}
\boxed{5}~~2. Next
\boxed{5}, since $2+3=5$
$x = \boxed{5}, y=2$
$\boxed{5}\text{ cm}^2$
= \$\boxed{5}
$\$\boxed{5}$
\boxed{5} (approximately)
$\frac{10}{2} = \boxed{5}$
$\boxed{5} = \frac{10}{2}$
$\frac{10}{2} \Rightarrow \boxed{5}$
\boxed{5}/hour
\boxed{5} per hour
\boxed{5} months
\boxed{5} to the nearest meter
it is thus\boxed{5}
we need at least \boxed{5}
__\boxed{5}__
\boxed{5}~- a list~- 3 more
\boxed{5}~* a list
$$x=2+3=\boxed{5}$$
$\dfrac{10}{2}$ is \boxed{5}
\boxed{5}-th
$5 = 2+3$, \boxed{5}
The fifth is \boxed{5}
not 3 but \boxed{5}
$x$ is \boxed{5}
where $y=2$ \boxed{5}
So x = 2.~~\boxed{5}
Answer:~~$\boxed{5}$~~Note $x$
\boxed{5} $x$ is it
`\boxed{5}`
"\boxed{5}"
<answer>\boxed{5}</answer>
\boxed{5}</answer>
x = 2~\boxed{5}
| \boxed{5} |
\boxed{5}\\
\boxed{5}\quad\blacksquare
\(\boxed{5}\) is right
$$~\boxed{5}~$$~A nice one
\boxed{5}_
_\boxed{5}_
Final Answer: The final answer is $\boxed{5}$. I hope it is correct.
The answer is $5$
So the final answer is $5$. I hope it is correct.
The answer is: $5$
**Answer:** $5$
Answer: \(5\)
the answer is therefore $5$
The answer is $x = 5$
The answer is x = $5$
the answer to the problem is $5$
Since it is not 4, the answer is $5$
The answer equals $5$
The answer is:~$$5$$
The answer is $5$ apples
the correct answer is **$5$**
The answer is thus $5$, since $x$ is not zero
"""  # with ~ for a new line; of each the answer is 5
CHANGED = r"""
$\boxed{5} \times 10^3$
$x=\boxed{5}^2$
$\boxed{5}!$
$\boxed{5}x$
$\boxed{5}+1$
$\boxed{5}/2$
$\sqrt{\boxed{5}}$
$\frac{\boxed{5}}{2}$
$\frac{1}{\boxed{5}}$
\boxed{5} squared
minus \boxed{5}
negative \boxed{5}
$\boxed{5}_2$
$2\boxed{5}$
$2\cdot\boxed{5}$
$2 \times \boxed{5}$
$x\boxed{5}$
$2^{\boxed{5}}$
$2^\boxed{5}$
$\sin\boxed{5}$
$\sin(\boxed{5})$
$3-\boxed{5}$
$3+\boxed{5}$
$3 * \boxed{5}$
$\boxed{5} * 3$
$\boxed{5}\pi$
$\boxed{5} \cdot 2$
$\boxed{5}(x+1)$
$\boxed{5}\sqrt{2}$
$\boxed{5} - 2$
$\boxed{5}-x$
$\boxed{5}$ squared
half of \boxed{5}
twice $\boxed{5}$
the square root of \boxed{5}
\boxed{5} or more
\boxed{5} plus 2
$\boxed{5}2$
$\boxed{5} 2$
$\boxed{5}$ $\times 3$
\boxed{5} is wrong
\boxed{5} isn't right
\boxed{5} is not the answer
\boxed{5} cannot be right
\boxed{5} is too small
$\boxed{5}$ is not correct
\boxed{5} factorial
$5/\boxed{5}$
$\log_2 \boxed{5}$
$\pm\boxed{5}$
$|\boxed{5}|^2$
$\frac12\boxed{5}$
$\frac{1}{2}\boxed{5}$
$\boxed{5}\%^2$
$\overline{\boxed{5}}$
$(\boxed{5})^2$
$(\boxed{5}+1)$
$(x+1)\boxed{5}$
$\boxed{5}\text{ squared}$
$\text{minus }\boxed{5}$
\boxed{5} hundredths
\boxed{5} divided by 2
\boxed{5} times 3
\boxed{5} is not.
The answer is -$5$
The answer is minus $5$
The answer is negative $5$
The answer is at least $5$
The answer is more than $5$
The answer is less than $5$
The answer is $5$ or more
The answer is $5$ squared
The answer is half of $5$
The answer is twice $5$
The answer is the square root of $5$
The answer $5$ is wrong.
It is false that the answer is $5$
I do not know the answer: $5$
The answer is anything but $5$
I doubt the answer is $5$
If the answer is $5$, fine
The answer is $5$ + 1
The answer is 2 $5$
The answer is $5$ tenths
The answer is far from $5$
The answer is $5$, which is wrong
"""


@pytest.mark.parametrize("text", STANDS.strip().splitlines())
def test_prose_layout_and_relations_beside_an_answer_leave_it(text):
    reading = final_answer(text.replace("~", "\n"))
    assert reading is not None
    assert reading.text in ("5", "x=5", r"5^\circ", r"5^{\circ}", "5cm^2")


@pytest.mark.parametrize("text", CHANGED.strip().splitlines())
def test_arithmetic_and_words_that_change_or_deny_an_answer_leave_none(text):
    reading = final_answer(text)
    assert reading is None or reading.text != "5"


PIECES = [
    "\\boxed{",
    "{",
    "}",
    "$",
    "\\(",
    "\\)",
    "\\text{",
    "\\frac",
    "\\sqrt",
    "1",
    "1,",
    " ",
    "a",
    "answer",
    "-",
    "_",
    ".",
    "/",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES) | st.characters(), max_size=30).map("".join))
def test_any_text_is_read_or_not(text):
    for reading in (final_answer(text), gold_answer(text), read(text), final_answer(rf"\boxed{{{text}}}")):
        assert reading is None or (reading.latex and reading.text is not None)


@pytest.mark.parametrize(
    "piece", [*PIECES, "\\boxed{1}", "\\boxed{1},", "answer $1$ ", "1 ", "1 a", "a ", "$1$ and ", "\\boxed 1"]
)
def test_reading_takes_time_that_grows_with_the_length(piece):
    text = piece * (10_000 // len(piece))
    began = time.process_time()
    for wrapped in (text, rf"\boxed{{{text}}}", f"the answer is ${text}$"):
        final_answer(wrapped)
        gold_answer(wrapped)
    assert time.process_time() - began < 2
