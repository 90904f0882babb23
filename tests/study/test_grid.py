"""Grids of runs. The runs are a random walk of one number, which NumPy walks as well.

As a program, `python test_grid.py FOLDER STRIDE`, it is killed in the middle of its grid again and again.
"""

import csv
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import traceback
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.run import checkpoint
from grpo_jax.statistics import Mean
from grpo_jax.study import grid as grids
from grpo_jax.study import results
from grpo_jax.study.grid import Condition, run_grid
from grpo_jax.study.runs import make_run, prompt_key
from grpo_jax.types import TrainState

SEEDS = [3, 0, 7]
STARTS = np.array([0.5, 1.0, -2.0], np.float32)
TRACES = []  # the names of runs, whenever one's step is traced


def walk(name, *, num_steps, evaluate_every):
    """`w += rate * noise`; its root is not a number where it is below 0."""

    def init(key, hyper):
        return TrainState({"w": hyper["start"]}, (), key, jnp.int32(0), jnp.int32(0))

    def step(hyper):
        TRACES.append(name)

        def one(state, noise):
            w = state.params["w"] + hyper["rate"] * noise
            return state._replace(params={"w": w}, step=state.step + 1), {"w": Mean(3 * w, 3), "noise": noise}

        return one

    return make_run(
        init,
        step,
        lambda key, n, hyper: jax.random.normal(jax.random.fold_in(key, n)),
        num_steps=num_steps,
        evaluate=lambda params, hyper: {"score": params["w"], "root": jnp.sqrt(params["w"])},
        evaluate_every=evaluate_every,
    )


LONG, SHORT = walk("long", num_steps=6, evaluate_every=2), walk("short", num_steps=3, evaluate_every=3)
# Those of one program are not beside each other.
CONDITIONS = [
    Condition("slow", LONG, {"rate": 0.1}),
    Condition("short", SHORT, {"rate": 0.5}),
    Condition("fast", LONG, {"rate": 1.0}),
]
CHUNKS = 3 + 1 + 3  # of blocks that are a condition each


def grid(folder, **settings):
    defaults = {"seeds": SEEDS, "per_seed": {"start": STARTS}, "show": ("score", "root")}
    return run_grid(folder, CONDITIONS, **(defaults | settings))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The path of the results, and the steps that were traced meanwhile."""
    TRACES.clear()
    return grid(tmp_path_factory.mktemp("undisturbed") / "grid"), tuple(TRACES)


# ------------------------------------------------------------------------------------ run


def expected_rows():
    """The cells of the results, each walk made by NumPy."""

    @jax.jit
    @jax.vmap
    def noise_of(seed):
        key = prompt_key(jax.random.key(seed))
        return jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n)))(jnp.arange(6))

    noises = np.asarray(noise_of(np.array(SEEDS, np.uint32)), np.float64)
    for condition in CONDITIONS:
        for seed, start, noise in zip(SEEDS, STARTS, noises, strict=True):
            every, chunks = condition.run.chunk_steps, condition.run.chunks
            w = start + condition.hyper["rate"] * np.cumsum(noise)
            for chunk in range(chunks + 1):
                part = slice((chunk - 1) * every, chunk * every)
                now = w[chunk * every - 1] if chunk else start
                row = {"condition": condition.name, "seed": seed, "step": chunk * every, "score": now}
                row["root"] = now**0.5 if now >= 0 else np.nan
                yield row | ({"w": w[part].mean(), "noise": noise[part].mean()} if chunk else {})


def test_the_rows_are_the_runs_chunks_in_the_order_of_conditions_and_seeds(undisturbed):
    found, expected = results.read(undisturbed[0]), list(expected_rows())
    identity = ("condition", "seed", "step")
    assert [[row[name] for name in identity] for row in found] == [[row[name] for name in identity] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        numbers = [name for name in wanted if name not in identity]
        np.testing.assert_allclose([row[n] for n in numbers], [wanted[n] for n in numbers], rtol=2e-5, atol=2e-6)


def test_what_is_no_number_is_told_from_what_was_not_measured(undisturbed):
    with undisturbed[0].open(newline="") as file:
        cells = [(row["root"], row["w"], float(row["score"]) < 0, row["step"]) for row in csv.DictReader(file)]
    assert {root == "nan" for root, _, below, _ in cells if below} == {True}
    assert {root == "nan" for root, _, below, _ in cells if not below} == {False}
    assert {step for _, w, _, step in cells if w == ""} == {"0"}
    rows = results.read(undisturbed[0])
    assert [np.isnan(row["root"]) for row in rows] == [below for _, _, below, _ in cells]
    assert any(np.isnan(x).any() for x in results.per_seed(rows, "root").values())  # and no last good value
    kinds = {name: type(value) for row in rows for name, value in row.items()}
    assert kinds == {"condition": str, "seed": int, "step": int} | dict.fromkeys(["score", "root", "w", "noise"], float)


def test_conditions_of_one_run_share_its_program(undisturbed):
    assert sorted(undisturbed[1]) == ["long", "short"]


def test_the_seconds_of_each_chunk_are_beside_the_results(undisturbed):
    with (undisturbed[0].parent / "timing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    blocks = {"slow": 3, "fast": 3, "short": 1}
    assert [(row["condition"], int(row["chunk"])) for row in rows] == [
        (name, chunk) for name, chunks in blocks.items() for chunk in range(1, chunks + 1)
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert not [path.name for path in undisturbed[0].parent.iterdir() if path.is_dir()]  # checkpoints of done blocks


@pytest.mark.parametrize("at_once", [2, 5], ids="{} at once".format)
def test_however_many_runs_a_block_has_the_rows_are_the_same(undisturbed, tmp_path, at_once):
    """2 do not divide the 3 runs of one program; 5 are more than those, and do not divide the 6 of the other."""
    TRACES.clear()
    assert grid(tmp_path, at_once=at_once).read_bytes() == undisturbed[0].read_bytes()
    assert sorted(TRACES) == ["long", "short"]


def refused(match, conditions=CONDITIONS, **settings):
    settings = {"seeds": SEEDS, "per_seed": {"start": STARTS}} | settings
    with pytest.raises(ValueError, match=match):
        run_grid("nowhere", conditions, **settings)
    assert not pathlib.Path("nowhere").exists()


def test_a_grid_that_makes_no_sense_is_refused_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(r"different names, got \['slow', 'short', 'slow'\]", [*CONDITIONS[:2], CONDITIONS[0]])
    refused(r"seeds that differ, got .* and \[1, 1, 2\]", seeds=[1, 1, 2])
    refused(r"got .* and \[\]", seeds=[])
    refused(r"got \[\]", [])
    refused(r"per_seed\['start'\] has a leading axis of 3 seeds, got shape \(2,\)", per_seed={"start": STARTS[:2]})
    refused(r"per_seed\['start'\] .* got shape \(\)", per_seed={"start": np.float32(1.0)})
    refused(
        r"\['rate'\] are numbers of the condition 'slow' and in per_seed", per_seed={"start": STARTS, "rate": STARTS}
    )
    other = Condition("other", LONG, {"rate": 0.1, "more": 1.0})
    refused(
        r"'other' has the numbers \['more', 'rate'\], and of the same run 'slow' has \['rate'\]", [CONDITIONS[0], other]
    )


# --------------------------------------------------------------------------- kill and resume


class KilledError(BaseException):
    """In the place of a signal."""


@pytest.fixture
def killed_at(monkeypatch):
    """Begins a grid and kills it at the nth call of a function, or after it."""

    def begin(folder, module, name, n, *, after=False):
        calls, real = itertools.count(1), getattr(module, name)

        def dying(*arguments, **settings):
            if (last := next(calls) == n) and not after:
                raise KilledError
            result = real(*arguments, **settings)
            if last:
                raise KilledError
            return result

        with monkeypatch.context() as patched:
            patched.setattr(module, name, dying)
            with pytest.raises(KilledError):
                grid(folder)

    return begin


@pytest.fixture
def saves(monkeypatch):
    """The states that are saved in a test, one a chunk."""
    saved, real = [], checkpoint.save

    def save(*arguments, **settings):
        real(*arguments, **settings)
        saved.append(arguments[1])

    monkeypatch.setattr(checkpoint, "save", save)
    return saved


KILLS = {  # where, and the chunks that are saved by then
    "before the first chunk is saved": ("save", 1, False, 0),
    "in the middle of the second block": ("save", 5, True, 5),
    "after its last chunk": ("save", 6, True, 6),
    "when it is written and its checkpoints are not gone": ("rmtree", 2, False, 6),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_grid_goes_on_from_the_chunk_where_it_was_and_ends_the_same(
    kill, killed_at, saves, undisturbed, tmp_path, monkeypatch
):
    name, n, after, done = KILLS[kill]
    monkeypatch.setattr(grids, "shutil", types.SimpleNamespace(rmtree=shutil.rmtree))  # Orbax calls the other
    killed_at(tmp_path, checkpoint if name == "save" else grids.shutil, name, n, after=after)
    assert not (tmp_path / "results.csv").exists()
    assert len(saves) == done
    TRACES.clear()
    assert grid(tmp_path).read_bytes() == undisturbed[0].read_bytes()
    assert len(saves) == CHUNKS  # no chunk twice
    assert len(TRACES) == len(set(TRACES))


def test_a_grid_that_is_done_is_not_run_again(undisturbed, saves):
    before = {path.name: path.read_bytes() for path in undisturbed[0].parent.glob("*.csv")}
    TRACES.clear()
    path = grid(undisturbed[0].parent)
    assert {path.name: path.read_bytes() for path in path.parent.glob("*.csv")} == before
    assert not saves
    assert not TRACES


@pytest.mark.parametrize("begun", ["done", "killed"])
def test_a_folder_that_was_begun_with_other_settings_is_refused_with_both(begun, killed_at, undisturbed, tmp_path):
    if begun == "done":
        folder = shutil.copytree(undisturbed[0].parent, tmp_path / "copy")
    else:
        killed_at(folder := tmp_path, checkpoint, "save", 2, after=True)
    other = [CONDITIONS[0]._replace(hyper={"rate": 0.2}), *CONDITIONS[1:]]
    start = {"per_seed": {"start": STARTS}}
    with pytest.raises(ValueError, match=r"numbers: .*'rate': 0\.1.* -> .*'rate': 0\.2"):
        run_grid(folder, other, seeds=SEEDS, **start)
    with pytest.raises(ValueError, match=r"labels: .*'seed': 0.* -> .*'seed': 1"):
        run_grid(folder, CONDITIONS, seeds=[3, 1, 7], **start)
    longer = walk("longer", num_steps=8, evaluate_every=2)
    with pytest.raises(ValueError, match=r"chunks: 3 -> 4$"):
        run_grid(folder, [CONDITIONS[0]._replace(run=longer)], seeds=SEEDS, **start)


@pytest.mark.slow
def test_killed_for_real_at_any_file_and_resumed_a_grid_ends_the_same(undisturbed, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, __file__, tmp_path / "grid", os.environ.get("GRPO_KILL_STRIDE", "60")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    *killed, last = done.stdout.split()[-1].split(",")
    assert last == "0", done.stderr
    assert set(killed) == {"-9"}
    assert len(killed) >= 2
    assert (tmp_path / "grid" / "results.csv").read_bytes() == undisturbed[0].read_bytes()


def be_killed_again_and_again(folder, stride):
    """Each process dies at a later file event below the folder; they are forked before JAX starts."""

    def run(kill_at):
        events = itertools.count()
        watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

        def on_event(event, arguments):
            if event in watched and folder in str(arguments[0]) and next(events) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(on_event)
        grid(folder)

    statuses = []
    for kill_at in itertools.count(30, stride):
        if (process := os.fork()) == 0:
            try:
                run(kill_at)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        if statuses[-1] != -signal.SIGKILL:
            break
    print(*statuses, sep=",")


if __name__ == "__main__":
    be_killed_again_and_again(sys.argv[1], int(sys.argv[2]))
