"""Functions by their names: modules of the working directory, makers with literal arguments, errors of one line."""

import dataclasses
import math
import re
import sys

import pytest

from grpo_jax.advantages import group_advantages
from grpo_jax.run.names import named_in, resolve

MODULE = """
class Of:
    @staticmethod
    def method():
        return "method"

def scaled(by=1.0, *, names=()):
    def reward(completions):
        return [by * len(completion) for completion in completions]
    reward.names = names
    return reward

def nothing():
    return None

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "named_functions.py").write_text(MODULE)
    (tmp_path / "needs_absent.py").write_text("import absent_dependency\n")
    (tmp_path / "fails.py").write_text("raise RuntimeError('in the module')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_function_by_its_module_or_of_the_package(folder):
    assert resolve("math:sqrt") is math.sqrt
    assert resolve("group_advantages", "grpo_jax.advantages") is group_advantages
    assert resolve("math:sqrt", "grpo_jax.advantages") is math.sqrt
    assert resolve("named_functions:Of.method")() == "method"


def test_a_maker_is_called_with_its_literals(folder):
    assert resolve("named_functions:scaled()")(["ab"]) == [2.0]
    assert resolve("named_functions:scaled(0.5)")(["ab"]) == [1.0]
    reward = resolve("named_functions:scaled(by=-2, names=['a(b', 'c:d'])")
    assert (reward(["ab"]), reward.names) == ([-4], ["a(b", "c:d"])
    assert resolve("scaled(3)", "named_functions")(["a"]) == [3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("even", "a function is named module:function, or module:maker(arguments), got 'even'"),
        ("math:", "a function is named module:function"),
        (":sqrt", "a function is named module:function"),
        ("my rewards:even", "a function is named module:function"),
        ("named_functions:absent", "named_functions has no function 'absent'"),
        ("named_functions:Of.absent", "named_functions has no function 'Of.absent'"),
        ("named_functions:number", "named_functions has no function 'number'"),
        ("named_functions:nothing()", "'named_functions:nothing()' returns a NoneType and not a function"),
        ("no_such_module:f", "names a module no_such_module, which is neither in "),
        ("grpo_jax.no_such_module:f", "names a module grpo_jax.no_such_module, which is neither in "),
        ("named_functions:scaled(number)", "the arguments of a maker are literals"),
        ("named_functions:scaled(__import__('os'))", "the arguments of a maker are literals"),
        ("named_functions:scaled(**{'by': 2})", "the arguments of a maker are literals"),
        ("named_functions:scaled(*[2])", "the arguments of a maker are literals"),
        ("named_functions:scaled(2", "the arguments of a maker are literals"),
        ("named_functions:scaled(2)(3)", "the arguments of a maker are literals"),
        ("named_functions:scaled() + 1", "the arguments of a maker are literals"),
        ("named_functions:scaled({[]: 1})", "the arguments of a maker are literals"),
    ],
)
def test_what_is_wrong_with_a_name_is_one_line(folder, name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_the_modules_that_settings_name(folder):
    @dataclasses.dataclass
    class Config:
        loss: str = "named_functions:scaled(by=2)"
        reward: tuple[str, ...] = ("math:sqrt", "named_functions:Of.method")
        advantage: str = "group_advantages"
        server: str | None = "http://localhost"  # no function of the module http
        coordinator: str = "host:1234"
        environment: str | None = None
        steps: int = 3

    named = resolve(Config.loss).__module__
    assert named_in(Config()) == [sys.modules[named], math]


def test_what_a_module_or_a_maker_raises_passes_through(folder):
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        resolve("needs_absent:f")
    with pytest.raises(RuntimeError, match="in the module"):
        resolve("fails:f")
    with pytest.raises(TypeError, match="unexpected keyword"):
        resolve("named_functions:scaled(upto=3)")


def test_an_attribute_that_a_module_misses_while_it_is_imported_is_not_taken_for_the_function(folder):
    (folder / "misses.py").write_text("import math\nmath.absent\ndef f(): ...\n")
    with pytest.raises(AttributeError, match="absent"):
        resolve("misses:f")
