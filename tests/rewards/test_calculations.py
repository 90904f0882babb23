"""The calculations in a text."""

import inspect
import operator
import sys
from fractions import Fraction

import pytest
from calls import score
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import rewards

AMOUNTS = (
    "K,M,B, G,pi, pi,π, π,xy, xy, i, factorial, hundreds, dozens, tenths, quadrillion, twelfths, gross, squared, tau"
)
SIGNS = ["•", ":", ">>", "<<", "@", "#", "&", "^^", "|", "~", "§", "//", "\\"]
STEPS = {  # text -> whether each calculation in it is right
    "3+4=7": [True],
    "3+4=8": [False],
    "7+8+0=15,3+5+1=09": [True, True],  # as the arithmetic task writes them
    "7+8+0=15,3+5+0=09": [True, False],
    "3+4*2=11": [True],
    "3+4*2=14": [False],
    "(3+4)*2=14": [True],
    "((1+2)*(3+4))/7=3": [True],
    "10-2-3=5": [True],
    "24/4/2=3": [True],
    "24/4*2=12": [True],
    "3 + 4 = 7.": [True],
    "0.1+0.2=0.3": [True],
    "0.1+0.2=0.30000000000000004": [False],
    ".5+.5=1": [True],
    "1,200+1=1,201": [True],
    "1,200+1=1201": [True],
    "1,20+1=21": [True],  # no thousands: a list
    "1,2345+1=2346": [True],
    "12 = 3 × 4": [True],
    "12 = 3 ÷ 4": [False],
    "6÷4=1.5": [True],
    "2x3=6": [True],
    "2 x 3 = 6": [True],
    "2·3=6": [True],
    r"2 \times 3 = 6, 2\times3=7, 6 \div 3 = 2, 2\cdot 4=8": [True, False, True, True],
    "5−3=2, 5–3=3": [True, False],
    "$5*3=$15": [True],
    r"\$5 * 3 = \$15": [True],
    "3+4*2=3+8=11": [True, True],
    "3+4*2=3+8=12": [True, False],
    "3 + 4 = 7 = 8": [True, False],
    "3 + 4 = 8 = 7": [False, True],
    "10/3 = 3.333 = 3.33": [True, True],
    "10/3 = 3.33 = 3.34": [True, False],
    "3+4=7, 8=8": [True],
    "3+4=7=5+3=8": [True, False, True],
    "3+4=7*2=14": [False, True],
    "5*3=<<5*3=15>>15": [True],  # GSM8K's annotations
    "-5+3=-2": [True],
    "5*-3=-15": [True],
    "a = - 5 + 3 = -2": [True],
    "-(2+3)=-5": [True],
    "3+4=7 3+5=9": [True, False],
    "3+4=7 (which is right)": [True],
    "3+4=7 - which is right": [True],
    "(3+4=7)": [True],
    "3+4=7kg": [True],
    "1. 3+4=7": [True],
    "Step 2: 3+4=7": [True],
    "- 3+4=7\n* 3+4=8\n  + 3+4=7": [True, False, True],
    "所以3+4=7，3+5=8": [True, True],
    "3+4=\n7": [],
    # a division may be rounded to the decimals that are written
    "10/3=3.33": [True],
    "10/3=3.3": [True],
    "20/3=6.67": [True],
    "20/3=6.66": [False],
    "10/3=3": [False],
    "7/2=4": [False],
    "7/2 = 3 R1": [],  # with a remainder
    "0.1+0.25=0.4": [False],
    "1/8=0.13": [True],
    "3.33=10/3": [False],
    "10/3=6.66/2": [False],
    "10/3=1+2.33": [False],
    # dividing by zero
    "1/0=5": [False],
    "5=1/0": [False],
    "1/0=1/0": [False],
    "1/(2-2)*0=0": [False],
    "0/0+1=1": [False],
    "1/0+=5": [],
    # passed over
    "5=5": [],
    "-2=-2": [],
    "x = 7": [],
    "2x=8": [],
    "3x + 2 = 11": [],
    "3x-2=10": [],
    "3x -2=10": [],
    "x + 2 + 4 = 11": [],
    "x - 5 + 3 = 2": [],
    "y -5+3=2": [],
    "y + 3 = 4 + 5 = 9": [True],
    "x2+3=5": [],
    "2^3+1=9": [],
    "2 ^ 3 + 1 = 9": [],
    "2**3=8": [],
    "2**3+1=9": [],
    "4²+3=19": [],
    "20+5=5²": [],
    "1+1=2^1": [],
    "5/20=25%": [],
    "50% + 3 = 3": [],
    "√16+3=7": [],
    "f(2)+3=5": [],
    "g(y)+3=5": [],
    "2(3+4)=14": [],
    "2 (3+4)=14": [],
    r"\frac{1}{2}+1=1.5": [],
    r"3 + 4 = \boxed{8}": [],
    "total - 3+4=7": [],
    "/ 3+4=7": [],
    "3+4=7*y": [],
    "1+" * 150 + "1=151": [],
    "151=" + "1+" * 150 + "1": [],
    "151= " + "1+" * 150 + "1": [],
    "a " * 200 + "3+4=7" + " a" * 200: [True],
    "3+4=y": [],
    "3+4==8": [],
    "3+4>=8": [],
    "3 apples + 4 apples = 8 apples": [],
    "5⋅3=15, 2 ⋅ 4 = 9": [True, False],
    # operators that are not known, and what belongs to a number beside the calculation
    "5∗3+4=7": [],
    "5 ∗ 3+4=7": [],
    "5 ⊕ 3+4=7": [],
    "7 mod 3+4=7": [],
    "3+4=2 (mod 5)": [],
    "3*4=12 mod 5": [],
    r"3*4=12 \bmod 5": [],
    "√ 16+3=19": [],
    r"\sqrt 16+3=19": [],
    "sqrt 16+3=19": [],
    "3+4=7√2": [],
    "3+4=7e3": [],
    "3+4=7 E3": [True],
    "3+4=7x": [],
    "3+4=7 x": [],
    "3+4=7!": [],
    "3+4=7 million": [],
    "3+4=7 ± 1": [],
    "3+4=7:2": [],
    "20% of 50+3=53": [],
    "5除以3+4=7": [],
    "2 1/2+1=1.5": [],
    "5/2+5=7 1/2": [],
    "1 000+500=500": [],
    "500+500=1 000": [],
    "y 3+4=7": [],
    "3+4=7 → 7+1=8": [True, True],
    r"3+4=7 \quad 3+5=9": [True, False],
    **{f"3+4=7{word}": [] for word in AMOUNTS.split(",")},
    **{f"8 {sign} 1+1=2": [] for sign in [*SIGNS, "xor", "nand"]},
    **{f"3+4=7 {sign} 1": [] for sign in SIGNS},
    "12:00 + 3 = 15": [],
    "3+4=7apples": [],
    "3+4=7万": [],
    "3+4=7 apples": [True],
    "3+4=7 in all": [True],
    "3+4=7 so 7+2=8": [True, False],
    "3+4=7, and 7+2=8": [True, False],
    "3+4=7 m, 3+4=8 degrees": [True, False],
    "1: 3+4=7": [True],
    "• 3+4=7": [True],
    "(3+4=8": [False],
    "((3+4)=8": [False],
    "3+4)=8": [],
    "3+=4": [],
    "=": [],
    "a": [],
    "": [],
}


@pytest.mark.parametrize("written", STEPS, ids=lambda written: ascii(written[:40]))
def test_the_calculations_that_a_text_writes_are_checked(written):
    steps = STEPS[written]
    expected = sum(steps) / len(steps) if steps else 0.0
    assert score(rewards.worked_steps(), written) == expected
    # A right and a wrong one more tell a wrong step from none, and that these do not touch their neighbours.
    beside = [*steps, True, False]
    assert score(rewards.worked_steps(), f"1+1=2\n{written}\n1+1=3") == pytest.approx(sum(beside) / len(beside))


NUMBER = st.integers(0, 20).map(str) | st.decimals(0, 9, places=1).map(str)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@st.composite
def expressions(draw, depth=3):
    """Text, fully in parentheses, beside its value by the standard library's arithmetic; None by zero."""
    if depth == 0 or draw(st.booleans()):
        number = draw(NUMBER)
        return number, Fraction(number)
    (left, a), sign, (right, b) = (
        draw(expressions(depth - 1)),
        draw(st.sampled_from("+-*/")),
        draw(expressions(depth - 1)),
    )
    undefined = a is None or b is None or (sign == "/" and b == 0)
    return f"({left} {sign} {right})", None if undefined else OPERATORS[sign](a, b)


@settings(deadline=None)
@given(expressions(), expressions(), st.integers(0, 3))
def test_calculations_in_parentheses_have_the_value_of_exact_arithmetic(left, right, off):
    (a, value), (b, other) = left, right
    written = f"{a} = {b} - {b} + {a} + {off}"
    if "(" in a:
        assert score(rewards.worked_steps(), written) == float(None not in (value, other) and off == 0)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=7), st.data())
def test_precedence_is_that_of_python(numbers, data):
    signs = data.draw(st.lists(st.sampled_from("+-*/"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    written = "".join(f"{n}{sign}" for n, sign in zip(numbers, [*signs, ""], strict=True))
    exact = eval("".join(f"Fraction({n}){sign}" for n, sign in zip(numbers, [*signs, ""], strict=True)))
    steps = f"{written}={exact.numerator}/{exact.denominator}"
    assert score(rewards.worked_steps(), steps) == 1.0
    assert score(rewards.worked_steps(), f"{steps}+1") == 0.0


def test_a_calculation_is_read_on_a_deep_stack():
    """As in a framework that calls rewards from far within."""
    written = "(" * 90 + "1+1" + ")" * 90 + "=2"

    def deep(levels):
        return deep(levels - 1) if levels else score(rewards.worked_steps(), written)

    left = sys.getrecursionlimit() - len(inspect.stack()) - 60
    assert deep(left) == 1.0
