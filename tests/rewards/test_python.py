"""The python_tests reward: what counts as code, as a test, and as whose fault. Attacks are in tests/faults."""

import subprocess
import sys
import threading
import time

import pytest

from grpo_jax.rewards import harness
from grpo_jax.rewards.python import code_of, python_tests

ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def reward():
    # In a sandbox where there can be one; what is tested here, harmless code does.
    return python_tests(timeout=5.0, accept_unsandboxed_execution=True)


@pytest.fixture(scope="module")
def shared():
    return python_tests(share=True, timeout=5.0, accept_unsandboxed_execution=True)


# ---------------------------------------------------------------------------- the code of a completion

BLOCKS = {
    "all of it": (ADD, ADD),
    "a block": (f"Here:\n```python\n{ADD}```\nDone.", ADD.rstrip()),
    "the last block": ("```python\nx = 1\n```\nNo:\n```python\nx = 2\n```", "x = 2"),
    "py": ("```py\nx = 1\n```", "x = 1"),
    "Python": ("``` Python\nx = 1\n```", "x = 1"),
    "a block without a mark": ("```\nx = 1\n```", "x = 1"),
    "not the output that follows": ("```python\nx = 1\n```\nIt prints\n```\n5\n```", "x = 1"),
    "not another language": ("```bash\nls\n```\n```python\nx = 1\n```\n```text\n5\n```", "x = 1"),
    "only another language": ("```bash\nls\n```", ""),
    "not closed": ("```python\nx = 1\n", ""),
    "the last closed": ("```python\nx = 1\n```\n```python\nx = 2\n", "x = 1"),
    "indented": ("1. So:\n   ```python\nx = 1\n   ```", "x = 1"),
    "indented, with its code": ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
    "indented code alone": ("```python\n    if x:\n        y\n```", "if x:\n    y"),
    "python3": ("```python3\nx = 1\n```\n```\n5\n```", "x = 1"),
    "attributes": ("```{.python .numberLines}\nx = 1\n```\n```\n5\n```", "x = 1"),
    "a title": ('```py title="a.py"\nx = 1\n```\n```\n5\n```', "x = 1"),
    "tildes": ("~~~python\nx = 1\n~~~", "x = 1"),
    "a longer fence": ("````python\nx = 1\n```\n````", "x = 1\n```"),
    "the first thing of an item": ("- ```python\n  x = 1\n  y = 2\n  ```", "x = 1\ny = 2"),
    "the first thing of a numbered item": ("1. ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
    "quoted": ("> ```python\n> if x:\n>     y\n>\n> z\n> ```", "if x:\n    y\n\nz"),
    "quoted, in a list": ("> - ```python\n>   x = 1\n>   ```", "x = 1"),
    "a list within code": ('```python\nx = """\n- ```\n"""\n```', 'x = """\n- ```\n"""'),
    "thoughts": ("<think>\n```python\nx = 1\n```\n</think>\n```python\nx = 2\n```", "x = 2"),
    "thoughts with a block that stays open": ("<think>\n```python\nx = 1\n</think>\n```python\nx = 2\n```", "x = 2"),
    "thoughts alone": ("<think>maybe\n```python\nx = 1\n```\nor not?", ""),
    "thoughts again": ("```python\nx = 1\n```\n<think>no", ""),
    "all of it after thoughts": ("<think>so</think>x = 1", "x = 1"),
    "a console is no code": ("```pycon\n>>> x\n```", ""),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_the_code_of_a_completion(case):
    completion, code = BLOCKS[case]
    assert code_of(completion) == code


def test_a_block_that_shows_the_use_is_not_the_code(reward):
    usage = "```python\nprint(add(1, 2))\n```"
    completion = f"```python\n{ADD}```\nUsage:\n{usage}"
    assert code_of(completion, {"add"}) == ADD.rstrip()
    assert code_of(f"```python\nadd = max\n```\n{completion}", {"add"}) == ADD.rstrip()
    assert code_of(completion, {"other"}) == code_of(completion) == "print(add(1, 2))"
    tests = ["assert add(1, 2) == 3", "from solution import add\nassert add(1, 2) == 3"]
    assert reward(["?"] * 2, [completion] * 2, tests=tests) == [1.0, 1.0]


def test_thoughts_that_the_prompt_opens_hold_no_code():
    seen = []
    reward = python_tests(executor=lambda code, tests: seen.append(code) or [True], workers=1)
    block = f"```python\n{ADD}```"
    tails = ["assistant\n<think>\n", "assistant\n<think>\n", "assistant\n"]
    reward(["?"] * 3, [block, f"so</think>{block}", block], tests=["t"] * 3, prompt_tail=tails)
    assert seen == ["", ADD.rstrip(), ADD.rstrip()]


@pytest.mark.parametrize(
    "text",
    ["- " * 9 + "\n", "> - ", "> ```python\n", "```python\n", "```\n", "`", "```python\nx\n```\n", "\n"],
    ids=repr,
)
def test_finding_the_code_takes_linear_time(text):
    began = time.monotonic()
    code_of(text * (1_000_000 // len(text)))
    assert time.monotonic() - began < 3


# ---------------------------------------------------------------------------- tests

GCD = """
from collections import Counter, deque, namedtuple
Point = namedtuple("Point", "x y")
LIMIT = 10
def gcd(a, b):
    if a < 0: raise ValueError("negative")
    while b: a, b = b, a % b
    return a
def echo(x, *rest, key=None): return x if key is None else key
def count(text): return Counter(text)
def point(): return Point(1, 2)
def evens():
    n = 0
    while True:
        yield n
        n += 2
def upto(n): yield from range(n)
def adder(n): return lambda x: x + n
def boom(): raise LookupError("here")
def own():
    class Own(Exception): pass
    raise Own("mine")
def sub():
    class Low(ValueError): pass
    raise Low("low")
class Stack:
    size = 0
    def __init__(self, items=()): self.items = list(items)
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
def top(stack): return stack[-1]
def mixed(): return [Stack([1]), {"a": (Stack([2]), 3)}]
async def later(x): return x
class TooBig(ValueError):
    def __init__(self, size): super().__init__(f"{size} is too big"); self.size = size
def fit(size): raise TooBig(size)
class Vector:
    def __init__(self, *xs): self.xs, self.open = xs, False
    def __eq__(self, other): return isinstance(other, Vector) and self.xs == other.xs
    def __hash__(self): return hash(self.xs)
    def __add__(self, other): return Vector(*map(sum, zip(self.xs, other.xs)))
    def __lt__(self, other): return self.xs < other.xs
    def __str__(self): return f"<{self.xs}>"
    def __enter__(self): self.open = True; return self
    def __exit__(self, *error): self.open = False; return True
    def __setitem__(self, i, x): self.xs = self.xs[:i] + (x,) + self.xs[i + 1 :]
    def __iter__(self): return iter(self.xs)
def kept(view): return view
def caught(f, kind):
    try: f(1)
    except kind: return True
class Liar:
    xs = ()
    def __eq__(self, other): return True
    __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __eq__
    def __sub__(self, other): return 0
    __rsub__ = __sub__
    def __iter__(self): return iter(())
    def __enter__(self): return self
    def __exit__(self, *error): return True
def lie(*_): return Liar()
def kind(*_): return ValueError
def big(): return 7**5000
def main(): print("not part of the verdict")
main()
if __name__ == "__main__": raise SystemExit("only as a program")
"""

PASS = {
    "equal": "assert gcd(12, 18) == 6",
    "several": "assert gcd(12, 18) == 6\nassert gcd(7, 5) == 1",
    "a list of strings": ["import math", "assert gcd(12, 18) == math.gcd(12, 18)"],
    "preparation": "cases = [(12, 18, 6), (7, 5, 1)]\nassert all(gcd(a, b) == c for a, b, c in cases)",
    "a function that checks": "def check(candidate):\n    assert candidate(12, 18) == 6\n\ncheck(gcd)",
    "a function whose argument has the name": "def check(gcd):\n    assert gcd(12, 18) == 6\n\ncheck(gcd)",
    "names of comprehensions": "assert [gcd(n, 4) for n in (2, 4)] == [2, 4] and {n: n for n in (1,)} == {1: 1}",
    "a name within a function alone": "def test():\n    n = 12\n    assert gcd(n, 18) == 6",
    "pytest's functions": "from solution import gcd\n\ndef test_gcd():\n    assert gcd(12, 18) == 6",
    "import as": "import solution as s\nassert s.gcd(12, 18) == 6",
    "a value": "assert LIMIT == 10",
    "an exception": "try:\n    gcd(-1, 2)\nexcept ValueError as e:\n    caught = str(e)\nassert caught == 'negative'",
    "other exceptions": "def kind(f):\n    try: f()\n    except Exception as e: return type(e).__name__\n"
    "assert kind(boom) == 'LookupError' and kind(own) == 'Own'",
    "a subclass of an exception": "try: sub()\nexcept ValueError as e: caught = str(e)\nassert caught == 'low'",
    "everything from solution": "from solution import *\nassert gcd(12, 18) == 6\nassert LIMIT == 10",
    "unittest": "import unittest\nfrom solution import gcd\nclass T(unittest.TestCase):\n"
    "    def setUp(self): self.n = 12\n    def test_gcd(self): self.assertEqual(gcd(self.n, 18), 6)\n"
    "    def test_raises(self):\n        with self.assertRaises(ValueError): gcd(-1, 2)\nunittest.main()",
    "unittest's main behind a guard": "from unittest import TestCase, main\nclass T(TestCase):\n"
    "    def test_gcd(self): self.assertEqual(gcd(12, 18), 6)\nif __name__ == '__main__':\n    main()",
    "tolerance": "assert abs(echo(0.1) * 3 - 0.3) < 1e-9",
    "keyword": "assert echo(1, 2, 3, key=4) == 4",
    "subclasses of plain types": "assert count('aab') == {'a': 2, 'b': 1} and point() == (1, 2)",
    "a generator": "assert list(upto(3)) == [0, 1, 2] and sorted(upto(2)) == [0, 1]",
    "a function": "assert adder(3)(4) == 7",
    "an object": "s = Stack().push(1).push(2)\nassert len(s) == 2 and s[0] == 1 and list(s) == [1, 2] and s.size == 0",
    "an object as argument": "assert top(Stack([1, 2])) == 2",
    "objects within data": "a, b = mixed()\nassert a[0] == 1 and b['a'][0][0] == 2 and b['a'][1] == 3",
    "a long number": "assert big() == 7**5000 and big() % 1000 == pow(7, 5000, 1000)",
    "truth": "assert Stack([1])\nassert not Stack()",
    "a test with a default": "def test_gcd(n=12):\n    assert gcd(n, 18) == 6",
    "a loop of asserts": "for n in (12, 18):\n    assert gcd(n, 6) == 6",
    "an assert within an exception": "try:\n    gcd(-1, 2)\n    assert False\nexcept ValueError:\n    pass",
    "asserts behind a guard": "if __name__ == '__main__':\n    assert gcd(12, 18) == 6",
    "pytest's classes": "class TestGcd:\n    def setup_method(self, method): self.n = 12\n"
    "    def test_gcd(self): assert gcd(self.n, 18) == 6\n    async def test_other(self): assert gcd(4, 6) == 2",
    "async tests, and code": "import asyncio\nasync def test_later():\n    assert await later(3) == 3\n"
    "assert asyncio.run(later(4)) == 4",
    "unittest's async tests": "import unittest\nclass T(unittest.TestCase):\n"
    "    async def test_gcd(self): self.assertEqual(gcd(12, 18), 6)\n",
    "two objects": "assert Vector(1, 2) + Vector(3, 4) == Vector(4, 6) != Vector(4, 7)\n"
    "assert Vector(1) < Vector(2) and Vector(1) in {Vector(1)} and Vector(1) in [Vector(1)] and Vector(1) != (1,)\n"
    "assert str(Vector(1)) == f'{Vector(1)}' == '<(1,)>'\n"
    "assert isinstance(Vector(1), Vector) and not isinstance(1, Vector)",
    "objects that are changed": "v = Vector(1, 2)\nv[0] = 3\nassert v == Vector(3, 2)\nv.xs = (5,)\nassert 5 in v",
    "a with block": "with Vector(1) as v: assert v.open\nassert not v.open",
    "an iterator's next": "e = evens()\nassert [next(e), next(e)] == [0, 2]\nassert next(upto(0), 7) == 7",
    "an exception of its own": "import unittest\ntry: fit(3)\nexcept TooBig as e: caught_it = str(e), e.size\n"
    "assert caught_it == ('3 is too big', 3) and issubclass(TooBig, ValueError)\nclass T(unittest.TestCase):\n"
    "    def test_fit(self):\n        with self.assertRaises(TooBig): fit(1)\n",
    "exceptions as arguments": "assert caught(fit, ValueError) and caught(fit, TooBig) and kept(kind()) is ValueError",
    "a named tuple's fields": "p = point()\nassert p.x == 1 and p._asdict() == {'x': 1, 'y': 2} and kept(p).y == 2",
    "one that prints": "assert gcd(12, 18) == 6; print('passed 0')",
}
DATA = [
    "None", "True", "-3", "2**70", "1.5", "float('inf')", "'é\\n\\x00'", "b'\\xff'", "1j", "[]", "[1, [2, ()]]", "(1,)",
    "{1: 'a', (2, 3): [4]}", "{1, 2}", "set()", "frozenset({1})", "{'tuple': [1]}", "{'a': None}", "'\\ud800'",
    "[Fraction(1, 3), Decimal('1.10'), range(1, 9, 2), collections.deque([1, 2], 3)]", "{1: 2}.keys()",
    "[dt.date(2024, 2, 29), dt.datetime(2024, 2, 29, 1, 2, 3), dt.time(1), dt.timedelta(1, 2)]", "{1: 2}.items()",
    "dt.datetime(2024, 1, 1, tzinfo=dt.UTC)",
]  # fmt: skip


def test_plain_data_pass_between_tests_and_code(shared):
    imports = "import collections, datetime as dt\nfrom fractions import Fraction\nfrom decimal import Decimal\n"
    equal = "def same(x): y = echo(x); assert y == x and type(y) is type(x) and repr(y) == repr(x), x\n"
    tests = imports + equal + "\n".join(f"same({data})" for data in DATA)
    assert shared(["?"], [GCD], tests=[tests]) == [1.0]


@pytest.mark.parametrize("case", PASS)
def test_tests_that_the_code_passes(reward, case):
    assert reward(["?"], [GCD], tests=[PASS[case]]) == [1.0]


FAIL = {
    "unequal": "assert gcd(12, 18) == 5",
    "one of two": "assert gcd(12, 18) == 6\nassert gcd(12, 18) == 5",
    "type": "assert echo((1, 2)) == [1, 2]",
    "a name of a function's own": "def f():\n    LIMIT = 1\n    return LIMIT\nassert f() == 1\nassert LIMIT == 11",
    "what is not there": "assert lcm(2, 3) == 6",
    "what cannot be imported": "from solution import lcm\nassert lcm(2, 3) == 6",
    "an attribute that is not there": "import solution\nassert solution.lcm(2, 3) == 6",
    "an exception that is not caught": "assert gcd(-1, 2) == 1",
    "preparation with what is not there": "x = lcm(2, 3)\nassert gcd(12, 18) == 6",
    "preparation that the code spoils": "x = gcd(-1, 2)\nassert gcd(12, 18) == 6",
    "a function that checks": "def check(candidate):\n    assert candidate(12, 18) == 5\n\ncheck(gcd)",
    "pytest's functions": "from solution import gcd\ndef test_gcd():\n    assert gcd(12, 18) == 5",
    "an object is no plain data": "assert Stack([1]) == [1]",
    "data as a function": "assert LIMIT(3) == 3",
    "data as a function, in preparation": "x = LIMIT(3)\nassert gcd(12, 18) == 6",
    "imported data as a function, in preparation": "from solution import *\nx = LIMIT(3)\nassert gcd(12, 18) == 6",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n"
    "    def test_gcd(self): self.assertEqual(gcd(12, 18), 5)\nunittest.main()",
    "unittest that skips": "import unittest\nclass T(unittest.TestCase):\n"
    "    def test_gcd(self):\n        if gcd(12, 18): self.skipTest('')\n",
    "without end": "assert list(evens()) == 3",
    "a test with a default": "assert gcd(1, 2) == 1\ndef test_gcd(n=12):\n    assert gcd(n, 18) == 5",
    "pytest's classes": "assert gcd(1, 2) == 1\nclass TestGcd:\n    def test_gcd(self): assert gcd(12, 18) == 5",
    "async tests": "assert gcd(1, 2) == 1\nasync def test_gcd(): assert gcd(12, 18) == 5",
    "unittest's async tests": "import unittest\nclass T(unittest.TestCase):\n"
    "    async def test_gcd(self): self.assertEqual(gcd(12, 18), 5)\n",
    "a loop of asserts": "assert gcd(1, 2) == 1\nfor n in (12, 18):\n    assert gcd(n, 6) == 5",
    "asserts behind a guard": "assert gcd(1, 2) == 1\nif __name__ == '__main__':\n    assert gcd(12, 18) == 5",
    "a loop of checks": "def check(n): assert gcd(n, 6) == n\nassert gcd(1, 2) == 1\nfor n in (6, 7): check(n)",
    "a liar's equality": "assert lie(1) == 1",
    "a liar's order": "assert lie(1) > 0",
    "a liar's difference": "assert abs(lie(2) - 1.4) < 0.1",
    "a liar's items": "assert 3 in lie(1)",
    "a liar's with block": "with lie(1) as x: assert x == 3",
    "odd objects as arguments": "assert gcd(lie(), 3) == 1",
    "a class as argument": "assert gcd(kind(), 3) == 1",
    "a coroutine as argument": "assert gcd(later(1), 3) == 1",
    "an exception as argument": "try: boom()\nexcept Exception as e: assert gcd(e, 3) == 1",
    "leaving": "import sys\nassert gcd(12, 18) == 6\nsys.exit(0)",
}


@pytest.mark.parametrize("case", FAIL)
def test_tests_that_the_code_fails(reward, case):
    assert reward(["?"], [GCD], tests=[FAIL[case]]) == [0.0]


def test_a_result_above_a_mebibyte_is_refused_with_a_reason(shared):
    tests = "assert len(big()) > 0\nassert small() == 1"
    code = "def big(): return 'x' * 2_000_000\ndef small(): return 1"
    with pytest.warns(RuntimeWarning, match=r"completion 0: a result of 20000\d\d bytes is above the limit of 1048576"):
        assert shared(["?"], [code], tests=[tests]) == [0.5]


@pytest.mark.parametrize(
    "code",
    ["", "no Python at all", "def add(a, b) return a", "raise ValueError", "import numpy", "1\n" * 40_000, "pass\x00"],
    ids=["nothing", "text", "syntax", "raises", "packages", "too long", "null"],
)
def test_code_that_does_not_run_is_wrong(reward, code):
    assert reward(["?"], [code], tests=["assert add(1, 2) == 3"]) == [0.0]
    assert reward(["?"], [code], tests=[[["", "3"]]]) == [0.0]


def test_a_builtins_name_is_the_codes_only_where_nothing_else_is_tested(reward):
    code = "def sum(a, b): return a * b\ndef abs(x): return 0\ndef f(x): return 5\n"
    assert reward(["?"] * 2, [code] * 2, tests=["assert sum(3, 4) == 12", "assert abs(f(1) - 3) < 1e-6"]) == [1.0, 0.0]


def test_the_share_of_tests_passed(shared, reward):
    tests = "assert add(1, 2) == 3\nassert add(1, 2) == 4\nx = 1\nassert add(x, 2) == 3\nassert add(0, 0) == 1"
    pairs = [["1 2", "3"], ["1 2", "4"], ["0 0", "0"]]
    program = "a, b = map(int, input().split())\nprint(a + b)"
    assert shared(["?"] * 2, [ADD, program], tests=[tests, pairs]) == pytest.approx([2 / 4, 2 / 3])
    assert reward(["?"] * 2, [ADD, program], tests=[tests, pairs]) == [0.0, 0.0]


PROGRAMS = {
    "a line": ("print(input()[::-1])", "abc\n", "cba\n", 1.0),
    "spaces at ends of lines": ("print('a  ')\nprint('b')\nprint()", "", "a\nb", 1.0),
    "spaces within": ("print('a  b')", "", "a b", 0.0),
    "an empty line within": ("print('a')\nprint()\nprint('b')", "", "a\nb", 0.0),
    "spaces at a line's start": ("print(' a')", "", "a", 0.0),
    "the main program": ("if __name__ == '__main__':\n    print(1)", "", "1", 1.0),
    "letters": ("import sys; print(sys.stdin.read().upper())", "é\nß", "É\nSS", 1.0),
    "leaving early": ("try:\n print(input()); exit()\nexcept Exception as e: print(e)", "7", "7", 1.0),
    "much input": ("import sys; print(len(sys.stdin.read()))", "x" * 300_000, "300000", 1.0),
    "errors are no output": ("import sys; print(2, file=sys.stderr); print(1)", "", "1", 1.0),
    "nothing": ("pass", "", "1", 0.0),
    "more": ("print(1)\nprint(2)", "", "1", 0.0),
    "an exception after the output": ("print(1)\n1 / 0", "", "1", 0.0),
    "a status after the output": ("print(1)\nraise SystemExit(3)", "", "1", 0.0),
    "a signal after the output": ("import os\nprint(1, flush=True)\nos.abort()", "", "1", 0.0),
    "status 0": ("print(1)\nraise SystemExit", "", "1", 1.0),
    "a class": ("class A:\n    def f(self, n): return n and n + A().f(n - 1)\nprint(A().f(10))", "", "55", 1.0),
    "dataclasses": ("import dataclasses as d\n@d.dataclass\nclass A:\n    x: int\nprint(A(1))", "", "A(x=1)", 1.0),
    "a function of itself": ("def f(n): return n and f(n - 1)\nprint(f(5))", "", "0", 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", PROGRAMS)
def test_programs(reward, case):
    code, given, wanted, expected = PROGRAMS[case]
    assert reward(["?"], [code], tests=[[[given, wanted]]]) == [expected]
    assert reward(["?"], [code], tests=[[(given, wanted), (given, wanted)]]) == [expected]


def test_a_mapping_is_a_test_and_not_its_keys(reward):
    right, keys = "print(int(input()) + 1)", "print('output')"
    tests = [[{"input": "1", "output": "2"}]] * 2
    assert reward(["?"] * 2, [right, keys], tests=tests) == [1.0, 0.0]


# ---------------------------------------------------------------------------- faults

UNUSABLE = {
    "no Python": "assert add(1, 2 ==",
    "no test": "import math",
    "a comment": '"""add"""',
    "no tests": [],
    "None": None,
    "a number": 3,
    "triples": [["1", "2", "3"]],
    "a mapping": {"f": 1, "g": 2},
    "nothing of the code": "assert 1 == 1",
    "a package that is not there": "import numpy as np\nassert add(np.int64(1), 2) == 3",
    "preparation that fails by itself": "x = 1 / 0\nassert add(1, 2) == 3",
    "a function as argument": "assert add(lambda: 1, 2) == 3",
    "a test with an argument": "assert add(1, 2) == 3\ndef test_a(n): assert add(n, 2) == 3",
    "a test that yields": "assert add(1, 2) == 3\ndef test_a():\n    yield\n    assert add(1, 2) == 3",
    "a class of tests by no rule": "assert add(1, 2) == 3\nclass Sums:\n    def test_a(self): assert add(1, 2) == 3",
}


@pytest.mark.parametrize(
    ("case", "code"),
    # A test with a function as its argument is not reached where the code has ended: that is wrong without it.
    [(case, ADD) for case in UNUSABLE]
    + [(case, "raise ValueError") for case in ("no Python", "no test", "a package that is not there")],
)
def test_tests_that_cannot_be_run_mask(case, code):
    reward = python_tests(timeout=5.0, accept_unsandboxed_execution=True)
    metrics = {}
    with pytest.warns(RuntimeWarning, match="python_tests could not score 1 of 1"):
        rewards = reward(["?"], [code], tests=[UNUSABLE[case]], log_metric=metrics.__setitem__)
    assert rewards == [None]
    assert metrics == {"python_tests/timeouts": 0, "python_tests/faults": 1}


@pytest.mark.parametrize("tests", ["assert f() == 1", [["", "1"]]], ids=["asserts", "program"])
def test_what_takes_too_long_is_wrong_whatever_passed_before(tests):
    reward = python_tests(timeout=0.5, share=True, accept_unsandboxed_execution=True)
    code = (
        "import time\ndef f(): return 1\ndef g(): time.sleep(60)\nif __name__ == '__main__': print(1, flush=True); g()"
    )
    tests = f"{tests}\nassert g()" if isinstance(tests, str) else tests
    began = time.monotonic()
    metrics = {}
    assert reward(["?"], [code], tests=[tests], log_metric=metrics.__setitem__) == [0.0]
    assert time.monotonic() - began < 5
    assert metrics == {"python_tests/timeouts": 1, "python_tests/faults": 0}


def test_the_limit_is_for_all_tests_of_a_completion():
    reward = python_tests(timeout=1.0, share=True, accept_unsandboxed_execution=True)
    code = "import time; time.sleep(0.4); print(1)"
    began = time.monotonic()
    assert reward(["?"], [code], tests=[[["", "1"]] * 50]) == [0.0]
    assert time.monotonic() - began < 8
    assert reward(["?"], [code], tests=[[["", "1"]] * 2]) == [1.0]


def test_completions_are_tested_at_the_same_time_and_in_order():
    reward = python_tests(workers=4, timeout=10.0, accept_unsandboxed_execution=True)
    code = "import time; time.sleep(1); print(1)"
    began = time.monotonic()
    assert reward(["?"] * 4, [code] * 4, tests=[[["", n]] for n in "1011"]) == [1.0, 0.0, 1.0, 1.0]
    assert time.monotonic() - began < 3.5


def test_off_the_main_thread_and_with_chat_messages(reward):
    results = []
    completions = [[{"role": "assistant", "content": f"```python\n{code}```"}] for code in (ADD, "x = 1\n")]
    arguments = {"prompts": [[], []], "completions": completions, "tests": ["assert add(1, 2) == 3"] * 2}
    thread = threading.Thread(target=lambda: results.append(reward(**arguments, level=[1, 2])))
    thread.start()
    thread.join(30)
    assert results == [[1.0, 0.0]]


def test_a_data_set_without_tests(reward):
    with pytest.raises(ValueError, match="a column tests"):
        reward(["?"], [ADD], answer=["3"])


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"memory": 1000}, {"output": 0}, {"workers": 0}], ids=str)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        python_tests(**settings, accept_unsandboxed_execution=True)


# ---------------------------------------------------------------------------- where there is no sandbox


def test_without_bubblewrap_it_refuses_unless_the_risk_is_accepted(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)apt install bubblewrap.*executor=.*accept_unsandboxed_execution=True"):
        python_tests()
    reward = python_tests(accept_unsandboxed_execution=True)
    assert reward(["?"] * 2, [ADD, "def add(a, b): return 3"], tests=["assert add(2, 2) == 4"] * 2) == [1.0, 0.0]


def test_a_bubblewrap_that_does_not_work_is_reported(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ValueError, match=r"user namespaces.*No permissions to create new namespace"):
        python_tests()


@pytest.mark.parametrize("tests", ["assert add(1, 2) == 3", [["", "3"]]], ids=["asserts", "program"])
def test_a_sandbox_that_breaks_later_masks(monkeypatch, tmp_path, tests):
    flag = tmp_path / "broken"
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\n[ -e {flag} ] && echo 'bwrap: no more' >&2 && exit 1\nexit 0\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    reward = python_tests()
    flag.touch()
    with pytest.warns(RuntimeWarning, match=r"the sandbox did not start: (?s:.*)bwrap: no more"):
        assert reward(["?"], [ADD], tests=[tests]) == [None]


def test_a_callers_own_executor(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no bubblewrap
    seen = []

    def executor(code, tests):
        seen.append((code, tests))
        if code == "slow":
            raise TimeoutError
        if code == "unreachable":
            raise ConnectionError("no sandbox to be had")
        return [True, code == "right"]

    metrics = {}
    columns = {"tests": ["t1", "t2", "t3", "t4"], "log_metric": metrics.__setitem__}
    for share, half in ((False, 0.0), (True, 0.5)):
        reward = python_tests(executor=executor, workers=1, share=share)
        with pytest.warns(RuntimeWarning, match="ConnectionError: no sandbox to be had"):
            rewards = reward(["?"] * 4, ["```python\nright\n```", "wrong", "slow", "unreachable"], **columns)
        assert rewards == [1.0, half, 0.0, None]
        assert metrics == {"python_tests/timeouts": 1, "python_tests/faults": 1}
    assert seen[:2] == [("right", "t1"), ("wrong", "t2")]


NUMBERS = """
import os, sys
from grpo_jax.rewards.python import make_python_output, python_tests
reward, output, held = python_tests(workers=4), make_python_output(), []
for extra in range(7):
    assert reward(["?"], ["def f(): return 1"], tests=["assert f() == 1"]) == [1.0], (extra, "tests")
    held.append(os.open(os.devnull, os.O_RDONLY))
assert output("print(3)") == "3"
for number in held[:4]:
    os.close(number)
assert reward(["?"] * 4, ["def f(): return 1"] * 4, tests=["assert f() == 1"] * 4) == [1.0] * 4
"""


def test_a_sandbox_starts_whatever_files_are_open():
    """In a process of its own, whose numbers are known: 3 is the first that is free."""
    try:
        python_tests()
    except ValueError as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, "-W", "error", "-c", NUMBERS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------- the harness's parts


def test_the_filter_of_system_calls_is_that_of_the_kernels_tables():
    # Linux 6.1's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h, which aarch64 uses.
    assert harness.CLONE == (56, 220)
    assert harness.CLONE3 == 435
    assert [harness.DENIED[name] for name in ("fork", "vfork", "ptrace")] == [(57, -1), (58, -1), (101, 117)]
    for machine in harness.MACHINES:
        assert len(harness.seccomp_filter(machine)) % 8 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
@pytest.mark.parametrize("machine", sorted(harness.MACHINES))
def test_jumps_of_the_filter(machine):
    """Runs the program as the kernel would, in Python."""
    import struct

    column, architecture = harness.MACHINES[machine]
    program = list(struct.iter_unpack("HBBI", harness.seccomp_filter(machine)))

    def verdict(number, flags=0, arch=architecture):
        memory, accumulator, at = {0: number, 4: arch, 16: flags}, 0, 0
        while True:
            code, yes, no, k = program[at]
            at += 1
            if code == 0x06:
                return {0x7FFF0000: "allow", 0x50001: "EPERM", 0x50026: "ENOSYS", 0x80000000: "kill"}[k]
            if code == 0x20:
                accumulator = memory[k]
            else:
                holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
                at += yes if holds else no

    thread = 0x10000
    assert [verdict(numbers[column]) for numbers in harness.DENIED.values() if numbers[column] >= 0].count(
        "EPERM"
    ) == sum(numbers[column] >= 0 for numbers in harness.DENIED.values())
    assert verdict(harness.CLONE[column], 17) == "EPERM"
    assert verdict(harness.CLONE[column], thread | 0x100) == "allow"
    assert verdict(harness.CLONE3) == "ENOSYS"
    assert verdict(0) == verdict(1) == verdict(63) == "allow"
    assert verdict(0x40000000 + 57) == "EPERM"
    assert verdict(0, arch=0x40000003) == "kill"
