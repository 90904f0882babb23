"""grpo.py as two processes of one device each: the run of one process with two devices, and interchangeable with it."""

import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
from compiling import QUICKLY

from grpo_jax import testing

ROOT = pathlib.Path(__file__).parents[2]
REWARD = """
import jax
from grpo_jax.environments import Turn

def asked_for(step):
    pass

def brevity(completions, trainer_state):
    asked_for(trainer_state.global_step)
    if trainer_state.global_step == 1 and jax.process_index() == jax.process_count() - 1:
        raise KeyError("of one process")
    return [1.0 / (1 + len(completion)) for completion in completions]

def length(completions):
    return [1.0 * len(completion) for completion in completions]

def respond(row, messages):
    row["asked"] = row.get("asked", 0) + 1
    if row["prompt"] == "What is 3 + 1?" and row["asked"] > 1:
        raise KeyError("of one environment")
    said = messages[-1]["content"]
    return Turn(f"no, {len(said)}" if len(said) % 3 else None, row["asked"] + 0.1)

def size(text: str) -> str:
    \"""Letters of a text.

    Args:
        text: any.
    \"""
    return str(len(text))
"""
SETTINGS = {
    "model": "model", "data": "data.jsonl", "reward": "my_rewards:brevity", "compute-dtype": "float32",
    "attention": "reference", "mesh": "fsdp=2", "prompts-per-step": 4, "group-size": 2, "max-tokens": 12, "bucket": 32,
    "learning-rate": 1e-3, "warmup-steps": 1, "save-every": 1, "show-every": 1, "score-old": True, "steps": 3,
}  # fmt: skip
AHEAD = {"overlap": 1, "reward": "my_rewards:length", "pack": True, "completion-bucket": 12}
TALK = {"max-tokens": 60, "max-turns": 4, "max-answer-tokens": 20}
ENVIRONMENT = {
    "environment": "my_rewards:respond", "reward": "grpo_jax.rewards:environment", "environment-workers": 1,
    "eval-rows": 2, "evaluate-every": 2, "eval-batch": 2, "steps": 2,
}  # fmt: skip
TOOL = {"tools": "my_rewards:size", "reward": "my_rewards:length", "chat": True, "slots": 4, "steps": 1}


def talks(name):
    """Runs of conversations: with an environment that each process has a worker for, and in slots, with a tool."""
    return {"run-dir": f"{name}_talk", **TALK, **ENVIRONMENT}, {"run-dir": f"{name}_tool_in_slots", **TALK, **TOOL}


def run(folder, *runs, processes=1, killed=None):
    """Makes runs of grpo.py one after the other, in one process of two devices or in two of one; they have ended.

    Args:
      folder: they run in.
      runs: what each has in place of `SETTINGS`.
      processes: how many.
      killed: which of them dies in the last run, and when: a step, and seconds.
    """
    flags = f"--xla_force_host_platform_device_count={2 // processes} {QUICKLY}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "experiments"), str(folder)])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    environment["PYTHONUNBUFFERED"] = "1"  # what a killed process has printed is read
    place = {}
    if processes > 1:
        with socket.create_server(("", 0)) as server:
            place = {"coordinator": f"127.0.0.1:{server.getsockname()[1]}", "processes": processes}
    started = []
    for index in range(processes):
        given = [SETTINGS | changes | place | ({"process-id": index} if place else {}) for changes in runs]
        if killed is not None and killed[0] == index:
            given[-1]["killed"] = killed[1:]
        command = [sys.executable, str(pathlib.Path(__file__).with_name("runs_of_grpo.py")), json.dumps(given)]
        started.append(
            subprocess.Popen(
                command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return [subprocess.CompletedProcess(p.args, p.returncode, *out) for p in started for out in [p.communicate()]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All runs, and what was printed: of two processes, of which one is killed at last; of one; and of two again."""
    folder = tmp_path_factory.mktemp("runs")
    testing.tiny_checkpoint(folder / "model")
    ends = {"eos_token_id": [*range(0, 300, 3)]}  # a third of the tokens: completions are short, and can be packed
    (folder / "model/generation_config.json").write_text(json.dumps(ends))
    rows = [{"prompt": f"What is {a} + {b}?"} for a in range(4) for b in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARD)

    killed = random.randrange(2), random.randrange(1, 3), round(random.uniform(0, 0.4), 3)  # which, step, seconds
    runs = ({"run-dir": "two"}, {"run-dir": "ahead", **AHEAD, "steps": 1}, {"run-dir": "ahead", **AHEAD}, *talks("two"))
    fewer = {"run-dir": "elastic", "steps": 1}, {"run-dir": "elastic", "steps": 2}, {"run-dir": "elastic"}
    two = run(folder, *runs, fewer[0], {"run-dir": "killed"}, processes=2, killed=killed)
    assert two[killed[0]].returncode == -9, [process.stderr[-9000:] for process in two]
    shutil.copytree(folder / "killed", folder / "alone")
    runs = ({"run-dir": "one"}, {"run-dir": "one_ahead", **AHEAD}, {"run-dir": "alone"}, *talks("one"))
    (one,) = run(folder, *runs, fewer[1])
    resumed = run(folder, {"run-dir": "killed"}, fewer[2], processes=2)
    for process in (*resumed, one):
        assert process.returncode == 0, process.stderr[-3000:]
    return types.SimpleNamespace(folder=folder, killed=killed, two=two, resumed=resumed, one=one)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def completions(made, name):
    return [line.get("completion", line.get("turns")) for line in lines(made.folder / name / "completions.jsonl")]


def assert_equal_to_rounding(made, found, expected, steps=3):
    assert completions(made, found) == completions(made, expected)
    kept, other = (
        safetensors.numpy.load_file(made.folder / name / f"step_{steps}/model.safetensors")
        for name in (expected, found)
    )
    for name, tensor in kept.items():
        np.testing.assert_allclose(other[name], tensor, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_also_where_one_of_them_fails_to_reward(made):
    first, second = made.two
    assert "failed on a batch" in second.stderr
    assert "KeyError: 'of one process'" in first.stderr
    assert "step 3/3" in first.stdout
    assert "step" not in second.stdout
    assert [line.get("brevity/failed") for line in lines(made.folder / "two/metrics.jsonl")] == [0.0, 1.0, 0.0]
    assert_equal_to_rounding(made, "two", "one")


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_point_ends_the_other_and_both_go_on_to_the_same_bits(made):
    dead, *_ = made.killed
    assert re.search(rf"process {dead} \(.*has died", made.two[1 - dead].stderr), made.two[1 - dead].stderr[-3000:]
    assert "resumed at step" in made.resumed[0].stdout
    for file in ("metrics.jsonl", "completions.jsonl", "step_3/model.safetensors"):
        found, expected = ((made.folder / name / file).read_bytes() for name in ("killed", "two"))
        assert found == expected, (file, made.killed)


@pytest.mark.slow
def test_one_process_goes_on_with_the_run_of_two(made):
    assert re.search(r"resumed at step [12] of 3", made.one.stdout), made.one.stdout
    assert_equal_to_rounding(made, "alone", "one")


@pytest.mark.slow
def test_the_number_of_processes_may_change_again_and_again(made):
    """Two, then one, then two."""
    assert "resumed at step 1 of 2" in made.one.stdout, made.one.stdout
    assert "resumed at step 2 of 3" in made.resumed[0].stdout, made.resumed[0].stdout
    assert_equal_to_rounding(made, "elastic", "one")


@pytest.mark.slow
def test_two_processes_sample_ahead_and_go_on_with_the_batch_in_flight_and_pack_it_alike(made):
    assert "resumed at step 1 of 3" in made.two[0].stdout
    assert_equal_to_rounding(made, "ahead", "one_ahead")
    shapes = [re.findall(r"^packed as (.*)$", process.stderr, re.MULTILINE) for process in (*made.two, made.one)]
    assert shapes == [["(4, 1, 12)", "(4, 1, 12)", "None"]] * 3


@pytest.mark.slow
def test_two_processes_hold_the_conversations_of_one_also_where_an_environment_fails_in_one_of_them(made):
    for n in range(3):
        one, two = (np.load(made.folder / f"rollout_{n}_of_{processes}.npz") for processes in (1, 2))
        for name, array in one.items():  # tokens, masks, turns and rewards; and log-probs
            np.testing.assert_allclose(two[name], array, rtol=0, atol=1e-5 if array.dtype == np.float32 else 0)
    assert_equal_to_rounding(made, "two_talk", "one_talk", steps=2)
    assert_equal_to_rounding(made, "two_tool_in_slots", "one_tool_in_slots", steps=1)
    read = [turn["text"] for talk in completions(made, "two_tool_in_slots") for turn in talk if turn["by"] != "policy"]
    assert len([text for text in read if re.search(r"tool\W+\d", text)]) > 3, read
    one, two = (lines(made.folder / name / "metrics.jsonl") for name in ("one_talk", "two_talk"))
    assert [line.get("environment_failed") for line in two] == [0.0, 0.25, None]
    for name in ("reward", "turns", "eval/reward"):
        assert [line.get(name) for line in two] == pytest.approx([line.get(name) for line in one]), name
    assert max(line["turns"] for line in two[:2]) > 1.5
    failed = ["KeyError: 'of one environment'" in process.stderr for process in (*made.two, made.one)]
    assert (sum(failed[:2]), failed[2]) == (1, True), failed
