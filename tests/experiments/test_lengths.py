"""What a reader of an experiment has to take in at once: its loop, and of `grpo.py` the whole file."""

import ast
import pathlib

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


def loops(path):
    """The lines of each loop over the steps of a run."""
    return [
        node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.For) and ast.unparse(node.iter) == "loop"
    ]


def test_no_loop_over_the_steps_of_a_run_is_longer_than_25_lines():
    lines = {path.stem: max(found) for path in EXPERIMENTS.rglob("*.py") if (found := loops(path))}
    assert {"grpo", "sft", "quickstart", "countdown", "gsm8k", "r1_pipeline", "distill", "smollm2"} <= lines.keys()
    assert {name: n for name, n in lines.items() if n > 25} == {}


def test_grpo_is_shorter_than_250_lines():
    assert len((EXPERIMENTS / "grpo.py").read_text().splitlines()) < 250
