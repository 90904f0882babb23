"""Reasoning-gym's data sets and scorers, in a file by itself: worker processes load it without JAX and this package."""

import ast
import builtins
import functools
import json
import keyword
import re
import sys
from collections.abc import Mapping
from typing import Any

import reasoning_gym
import sympy
from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import create_curriculum
from sympy.parsing import sympy_parser

Difficulty = int | Mapping[str, Any]  # a level of the data set's curriculum, or the settings of `create_dataset`


def dataset(name: str, difficulty: Difficulty, seed: int, size: int) -> Any:
    """The data set at a level, without the levels below it, or with settings of its own."""
    if not isinstance(difficulty, int):
        settings = dict(difficulty)
        if name == "composite":  # several data sets in one, each as a dict, since settings travel as JSON
            settings["datasets"] = [DatasetSpec(**spec) for spec in settings.get("datasets", ())]
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    levels = create_curriculum(name)
    levels.set_global_level(difficulty)
    context = DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
    configuration = levels.generate_configuration({"seed": seed, "size": size}, context)
    return reasoning_gym.create_dataset(name, **vars(configuration))


def score(completion: str, name: str, difficulty: Difficulty, entry: str) -> float:
    """The score of an answer, from 0 to 1; 0 for one over which the scorer fails.

    Unless it fails over the right answer too: then the fault is not the completion's. For worker processes alone: the
    library's scorers evaluate no code here from the first call on (`disarm`).
    """
    disarm()
    judge, item = _judge(name, json.dumps(difficulty)), ast.literal_eval(entry)
    try:
        return float(judge.score_answer(completion, item))
    except (Exception, SystemExit):
        judge.score_answer(item["answer"], item)
        return 0.0


@functools.lru_cache(maxsize=8)
def _judge(name: str, difficulty: str) -> Any:
    return dataset(name, json.loads(difficulty), seed=0, size=1)


# ------------------------------------------------------------------------- answers are data, not code

FUNCTIONS = {"sqrt", "cbrt", "root", "exp", "log", "ln", "Abs", "factorial", "binomial", "pi", "E", "I", "C", "N", "S"}
FUNCTIONS |= {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "erf", "erfi", "Ei", "Si", "Ci"}
FUNCTIONS |= {"asin", "acos", "atan", "acot", "asec", "acsc", "asinh", "acosh", "atanh", "atan2", "Integer", "Rational"}
FUNCTIONS |= {"Integral", "Derivative", "li", "Li", "Shi", "Chi", "gamma", "uppergamma", "lowergamma", "LambertW"}
ARITHMETIC = re.compile(r"[\w\s.,+\-*/^()!%]*", re.ASCII)
NAME = re.compile(r"[^\W\d]\w*", re.ASCII)
ATTRIBUTE = re.compile(r"\.(?!\d)((?<!\d\.)|\s*[^\W\d])", re.ASCII)  # a point that is not a number's
LITERAL = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.BinOp, ast.UnaryOp, ast.Load)


@functools.cache
def disarm() -> None:
    """Makes the library's scorers read answers as data: this process writes verdicts, and evaluates no code for them.

    `eval` reads literals and arithmetic, and SymPy's `parse_expr` formulas: of numbers, variables, and the functions of
    `FUNCTIONS`. Whatever else is in a text raises ValueError, which a scorer calls a wrong answer.
    """
    parse = sympy_parser.parse_expr

    def formula(text: str, *arguments: Any, **settings: Any) -> Any:
        known = {name for name in NAME.findall(text) if hasattr(sympy, name) or hasattr(builtins, name)}
        words = {name for name in NAME.findall(text) if keyword.iskeyword(name) or name.startswith("_")}
        if not ARITHMETIC.fullmatch(text) or known - FUNCTIONS or words or ATTRIBUTE.search(text):
            raise ValueError(f"not a formula: {text[:200]!r}")
        return parse(text, *arguments, **settings)

    def literal(text: str, *scopes: Any) -> Any:
        tree = ast.parse(text.strip(), mode="eval")
        if not all(isinstance(node, (*LITERAL, ast.operator, ast.unaryop)) for node in ast.walk(tree)):
            raise ValueError(f"not a literal: {text[:200]!r}")
        return eval(compile(tree, "answer", "eval"), {"__builtins__": {}})

    def nothing(*arguments: Any) -> None:
        raise ValueError("a scorer would execute code")

    sympy.parse_expr = sympy_parser.parse_expr = formula
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "reasoning_gym"]:
        vars(module).update(eval=literal, exec=nothing)
        if vars(module).get("parse_expr") is parse:
            vars(module)["parse_expr"] = formula
