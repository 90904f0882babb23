"""The quickstart, a few steps of it: what it leaves behind, and that a kill changes none of it."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax.models import hf
from grpo_jax.run import checkpoint, metrics, preemption
from grpo_jax.updates import init_state

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "quickstart.py"
# Not `--smoke`: after its 4 steps of warm-up every reward is 0, nothing is learned, and a resumed run that had lost its
# optimiser's state would end as it should. After 60, completions differ in their format.
SETTINGS = {
    "warmup_steps": 60,
    "warmup_batch": 32,
    "steps": 6,
    "prompts_per_step": 8,
    "group_size": 4,
    "iterations": 2,
    "beta": 0.04,
    "evaluate_every": 3,
    "save_every": 4,
}
STEPS, WARMUP_STEPS = SETTINGS["steps"], SETTINGS["warmup_steps"]

pytestmark = pytest.mark.slow  # one whole run, which all of them look at


def load_script():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    sys.modules["quickstart"] = module = importlib.util.module_from_spec(spec)  # where dataclasses looks
    spec.loader.exec_module(module)
    return module


quickstart = load_script()


def make_config(run_dir):
    return quickstart.Config(run_dir=run_dir, **SETTINGS)


def command(run_dir):
    """The same, on the command line."""
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, str(SCRIPT), "--run-dir", str(run_dir), *flags]


# `python -c KILL_AT_LINE N SCRIPT ...` runs the script, and kills it when it is about to write its Nth line of metrics
# of GRPO: always in the same place, however fast the machine is.
KILL_AT_LINE = """
import itertools, os, pathlib, runpy, signal, sys

def kill(event, arguments):
    if event == "open" and arguments[2] & os.O_APPEND:
        path = pathlib.Path(str(arguments[0]))
        if path.name == "metrics.jsonl" and path.parent.name != "warmup" and next(lines) == at:
            os.kill(os.getpid(), signal.SIGKILL)

lines, at = itertools.count(1), int(sys.argv[1])
del sys.argv[:2]
sys.addaudithook(kill)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Compiled programs, kept for the other runs and processes of this file: compiling is most of their time."""
    folder = tmp_path_factory.mktemp("programs")
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed, and what it returned."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, quickstart.main(make_config(run_dir))


def files(run_dir):
    """Less those of the checkpoints, which Orbax gives random names."""
    paths = (path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file())
    return {str(path) for path in paths if "checkpoints" not in path.parts}


def exported(run_dir):
    """The bytes of each tensor; those of the file also have the order of the header, which is not the run's."""
    tensors = safetensors.numpy.load_file(run_dir / "model" / "model.safetensors")
    return {name: (tensor.dtype.name, tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}


def outcome(run_dir):
    """All that is a result of a run, and not of the hour or the machine."""
    texts = ["metrics.jsonl", "warmup/metrics.jsonl", "results.json", "model/config.json", "model/tokenizer.json"]
    return {name: (run_dir / name).read_bytes() for name in texts} | exported(run_dir)


def test_a_run_leaves_its_metrics_curves_results_checkpoints_and_model(finished):
    run_dir, results = finished
    found = files(run_dir)
    assert found >= {"metrics.jsonl", "timing.jsonl", "metrics.png", "results.json", "run.lock"}
    assert found >= {"warmup/metrics.jsonl", "warmup/timing.jsonl"}
    assert found >= {"model/model.safetensors", "model/config.json", "model/tokenizer.json"}
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"4", "6"}
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert results.keys() == {"greedy_before", "sampled_before", "greedy_after", "sampled_after"}
    assert all(0 <= share <= 1 for share in results.values())


def test_every_step_has_a_line_of_metrics(finished):
    run_dir, _ = finished
    warmup, grpo = metrics.read(run_dir / "warmup"), metrics.read(run_dir)
    assert [row["step"] for row in warmup] == list(range(WARMUP_STEPS))
    assert warmup[-1]["loss"] < warmup[0]["loss"]
    assert [row["step"] for row in grpo if "reward" in row] == list(range(STEPS))
    assert [row["step"] for row in grpo if "validation" in row] == [0, 3, STEPS]
    grpo = grpo[:STEPS]  # the last line is the last evaluation's
    shown = {"reward", "reward/accuracy", "reward/format", "kl", "entropy", "length", "truncated", "skipped"}
    assert all(shown <= row.keys() and None not in row.values() for row in grpo)
    assert all(row["grad_norm"] > 0 for row in grpo), "nothing was learned, and these tests show little"


def test_the_exported_model_is_the_trained_one_and_the_reference_the_warmed_up_one(finished):
    """`restore` verifies that the reference is what it was when GRPO began."""
    run_dir, _ = finished
    policy, params = hf.load_pretrained(run_dir / "model")
    schedule = optax.constant_schedule(0.0)

    def restored(folder, optimizer, reference):
        like = jax.eval_shape(lambda: init_state(policy.init(jax.random.key(0)), optimizer, jax.random.key(0)))
        with checkpoint.manager(folder / "checkpoints", read_only=True) as checkpoints:
            return checkpoint.restore(checkpoints, like._replace(ref_params=reference))[0]

    warmed_up = restored(run_dir / "warmup", optax.adamw(schedule), None)
    trained = restored(run_dir, optax.adam(schedule), warmed_up.params)
    assert (warmed_up.step, trained.step) == (WARMUP_STEPS, STEPS)
    jax.tree.map(np.testing.assert_array_equal, params, trained.params)


def test_a_finished_run_that_is_started_again_does_nothing_and_gives_the_same_results(finished, capsys):
    run_dir, results = finished
    before, written = outcome(run_dir), (run_dir / "checkpoints" / "6").stat().st_mtime_ns
    assert quickstart.main(make_config(run_dir)) == results
    assert outcome(run_dir) == before
    assert (run_dir / "checkpoints" / "6").stat().st_mtime_ns == written
    printed = capsys.readouterr().out
    assert f"resumed at step {WARMUP_STEPS} of {WARMUP_STEPS}" in printed
    assert f"resumed at step {STEPS} of {STEPS}" in printed


def test_a_folder_in_which_a_run_is_alive_is_refused(finished, programs):
    run_dir, _ = finished
    environment = os.environ | programs | {"PYTHONPATH": str(ROOT)}
    before = outcome(run_dir)
    with preemption.lock(run_dir):  # by this process, and not by the one that runs
        again = subprocess.run(command(run_dir), env=environment, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert f"is in use by process {os.getpid()}" in again.stderr
    assert outcome(run_dir) == before


def test_a_run_is_not_resumed_with_other_settings(finished):
    run_dir, _ = finished
    before = outcome(run_dir)
    with pytest.raises(ValueError, match=r"beta: 0\.04 -> 0\.1\n\s+seed: 0 -> 1"):
        quickstart.main(dataclasses.replace(make_config(run_dir), seed=1, beta=0.1))
    assert outcome(run_dir) == before


def test_a_run_that_is_killed_and_started_again_ends_as_one_that_was_not(finished, programs, tmp_path):
    """After five steps, of which the checkpoint has four; in other processes than the run that is compared with."""
    run_dir = tmp_path / "killed"
    environment = os.environ | programs | {"PYTHONPATH": str(ROOT)}
    flags = command(run_dir)[1:]
    killed = subprocess.run([sys.executable, "-c", KILL_AT_LINE, "6", *flags], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in metrics.read(run_dir)] == [0, 1, 2, 3, 4]

    again = subprocess.run(command(run_dir), env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {WARMUP_STEPS} of {WARMUP_STEPS}" in again.stdout
    assert f"resumed at step 4 of {STEPS}" in again.stdout
    assert outcome(run_dir) == outcome(finished[0])
    assert files(run_dir) == files(finished[0])


def test_a_smoke_run_is_a_few_steps_in_which_everything_happens(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "train", lambda config: config)
    config = quickstart.main(quickstart.Config(run_dir=tmp_path, smoke=True, beta=0.1))
    assert config.steps <= 10
    assert config.save_every < config.steps
    assert config.evaluate_every < config.steps
    assert (config.run_dir, config.beta) == (tmp_path, 0.1)
    assert quickstart.main(quickstart.Config()) == quickstart.Config()
