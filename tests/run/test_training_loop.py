"""`run.loop` around a tiny step: it resumes to the same bits, saves first, and says what is wrong."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import processes, run
from grpo_jax.run import checkpoint, compilation, completions, digests, metrics, preemption, writers
from grpo_jax.statistics import Mean
from grpo_jax.types import Experience, Prompts, Rollout, TrainState, Turns

OPTIMIZER = optax.sgd(0.1)


@dataclasses.dataclass(frozen=True)
class Config:
    run_dir: pathlib.Path
    steps: int = 6
    save_every: int = 2
    seed: int = 0


def initial(seed=0):
    params = {"w": jnp.linspace(-1.0, 1.0, 3)}
    return TrainState(params, OPTIMIZER.init(params), jax.random.key(seed), jnp.int32(0), jnp.int32(0))


def learn(state, skipped=0):
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (3,))
    loss = jnp.sum((state.params["w"] - noise) ** 2)
    params = jax.tree.map(lambda w: w - 0.1 * (w - noise), state.params)
    statistics = {"loss": Mean(loss, jnp.float32(1)), "length": Mean(jnp.float32(12), jnp.float32(3))}
    return state._replace(params=params, step=state.step + 1), statistics | {"skipped": float(skipped)}


def train_by(body, config, **settings):
    """A run whose body does everything."""
    with run.loop(config, initial(), **{"steps": config.steps, "save_every": config.save_every} | settings) as loop:
        for n in loop:
            body(loop, n)


def evaluate(state):
    return {"eval/reward": float(jnp.sum(state.params["w"]))}


def train(config, body=lambda loop, n: None, after=lambda loop: None, **settings):
    """A run whose body may do something before each step."""
    settings = {"steps": config.steps, "save_every": config.save_every} | settings
    with run.loop(config, initial(config.seed), **settings) as loop:
        for n in loop:
            body(loop, n)
            loop.state, measured = learn(loop.state)
            loop.log(measured)
        after(loop)
    return loop.state.params["w"]


def text(run_dir, name=metrics.METRICS_FILE):
    return (run_dir / name).read_text()


def checkpoints(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


# ------------------------------------------------------------------ what a run leaves


def test_a_run_writes_metrics_timing_checkpoints_and_a_plot(tmp_path, capsys):
    train(Config(tmp_path))
    lines = metrics.read(tmp_path)
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[0].keys() == {"step", "length", "loss", "skipped"}
    timing = metrics.read(tmp_path, metrics.TIMING_FILE)
    assert all({"seconds", "tokens_per_second", "programs", "host"} <= line.keys() for line in timing)
    assert timing[0]["tokens_per_second"] == pytest.approx(12 / timing[0]["seconds"])
    assert checkpoints(tmp_path) == [2, 4, 6]
    assert (tmp_path / "metrics.png").exists()
    assert "step 6/6" in capsys.readouterr().out


@pytest.mark.parametrize("compilation_cache", [True, False])
def test_programs_are_kept_unless_told_otherwise_and_freed_memory_goes_back_while_the_run_goes(
    tmp_path, monkeypatch, compilation_cache
):
    called = []
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: called.append("kept"))
    monkeypatch.setattr(compilation, "trim_malloc", lambda: called.append("begun") or (lambda: called.append("ended")))
    train(Config(tmp_path, steps=1), lambda loop, n: called.append("step"), compilation_cache=compilation_cache)
    assert called == ["kept"] * compilation_cache + ["begun", "step", "ended"]


def test_a_run_that_is_started_again_goes_on_and_ends_in_the_same_bits(tmp_path):
    def killed(loop, n):
        if n == 3:
            raise KeyboardInterrupt

    expected = train(Config(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(Config(tmp_path / "killed"), killed)
    assert checkpoints(tmp_path / "killed") == [2]
    np.testing.assert_array_equal(train(Config(tmp_path / "killed")), expected)
    assert text(tmp_path / "killed") == text(tmp_path / "whole")


def test_a_finished_run_has_nothing_to_do_and_draws_its_plot_again(tmp_path, capsys):
    train(Config(tmp_path))
    before = text(tmp_path)
    (tmp_path / "metrics.png").write_bytes(b"")
    train(Config(tmp_path), lambda loop, n: pytest.fail("a step was made"))
    assert text(tmp_path) == before
    assert (tmp_path / "metrics.png").stat().st_size > 0
    train(Config(tmp_path, steps=4), lambda loop, n: pytest.fail("a step was made"), allow=("steps",))
    said = capsys.readouterr().out
    assert "resumed at step 6 of 6: nothing to do" in said
    assert "resumed at step 6 of 4: nothing to do" in said


def test_an_evaluation_at_the_head_of_a_step_and_after_the_last_one_is_in_the_metrics(tmp_path):
    def body(loop, n):
        if n % 3 == 0:
            loop.log(evaluate(loop.state))

    for run_dir in (tmp_path / "whole", tmp_path / "again"):
        train(Config(run_dir), body, lambda loop: loop.log(evaluate(loop.state)))
    train(Config(tmp_path / "again"), body, lambda loop: loop.log(evaluate(loop.state)))
    lines = metrics.read(tmp_path / "whole")
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 3, 6]
    assert lines[0]["eval/reward"] == pytest.approx(0.0)
    assert lines[6].keys() == {"step", "eval/reward"}
    assert text(tmp_path / "again") == text(tmp_path / "whole")
    longer = train(Config(tmp_path / "again", steps=8), body, allow=("steps",))
    np.testing.assert_array_equal(longer, train(Config(tmp_path / "longer", steps=8), body))
    assert text(tmp_path / "again") == text(tmp_path / "longer")


def test_the_first_value_of_a_metric_is_the_bar_for_its_best(tmp_path):
    values, best = [0.5, 0.4, None, 0.5, 0.7, 0.6], []

    def body(loop, n):
        loop.log({"eval/reward": values[n]})
        best.append(loop.improved("eval/reward"))

    train(Config(tmp_path), body)
    assert best == [False, False, False, False, True, False]


def test_completions_are_shown_and_written(tmp_path, capsys):
    def body(loop, n):
        if n % 2 == 0:
            loop.show([{"prompt": "1+1=", "completion": f"[bold]{n}", "right": 1.0, "format": None}])

    train(Config(tmp_path), body)
    lines = metrics.read(tmp_path, metrics.COMPLETIONS_FILE)
    assert [(line["step"], line["completion"]) for line in lines] == [(0, "[bold]0"), (2, "[bold]2"), (4, "[bold]4")]
    assert "[bold]4" in capsys.readouterr().out


def test_completions_are_read_off_an_experience(capsys):
    rollout = Rollout(
        Prompts(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32), {"row": jnp.array([1, 0])}),
        jnp.arange(12).reshape(2, 2, 3),
        jnp.array([[3, 1], [2, 0]]), jnp.ones((2, 2, 3), bool), jnp.zeros((2, 2, 3)), jnp.zeros((2, 2), bool),
    )  # fmt: skip
    rewards = jnp.arange(8.0).reshape(2, 2, 2)
    experience, rows = Experience(rollout, rewards, rewards != 3), [{"prompt": "b"}, {"prompt": "a"}]

    class Tokenizer:
        def decode(self, ids):
            return " ".join(map(str, np.asarray(ids).tolist()))

    assert completions.lines(experience, Tokenizer(), rows, ["right", "format"], count=3) == [
        {"prompt": "a", "completion": "0 1 2", "right": 0.0, "format": 1.0},
        {"prompt": "a", "completion": "3", "right": 2.0, "format": None},
        {"prompt": "b", "completion": "6 7", "right": 4.0, "format": 5.0},
    ]

    mask = jnp.array([True, False, True])
    turns = Turns(*[jnp.zeros((2, 2, 2), jnp.int32)] * 3, jnp.zeros((2, 2), bool))
    experience = experience._replace(rollout=rollout._replace(mask=jnp.broadcast_to(mask, (2, 2, 3)), turns=turns))
    line, *_ = completions.lines(experience, Tokenizer(), rows, ["right"], count=1)
    policy, environment = {"by": "policy", "text": "0"}, {"by": "environment", "text": "1"}
    assert line["turns"] == [policy, environment, {"by": "policy", "text": "2"}]
    completions.print_table(0, [line])
    assert "environment> 1" in capsys.readouterr().out


# ------------------------------------------------------------------ what goes wrong


def test_an_exception_saves_the_state_of_the_steps_that_are_whole(tmp_path, capsys):
    def fails(loop, n):
        if n == 3:
            raise LookupError("the verifier is down")

    with pytest.raises(LookupError, match="the verifier is down"):
        train(Config(tmp_path), fails)
    assert checkpoints(tmp_path) == [2, 3]
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1, 2]
    assert "LookupError; the state of step 3 is saved" in capsys.readouterr().out
    np.testing.assert_array_equal(train(Config(tmp_path)), train(Config(tmp_path / "whole")))
    assert text(tmp_path) == text(tmp_path / "whole")


@pytest.mark.parametrize("error", [SystemExit(3), BaseException("a timeout")])
def test_what_is_no_exception_saves_the_state_too(tmp_path, error):
    def fails(loop, n):
        if n == 3:
            raise error

    with pytest.raises(type(error)):
        train(Config(tmp_path), fails)
    assert checkpoints(tmp_path) == [2, 3]


def test_a_state_that_is_saved_is_not_called_lost_since_that_could_not_be_printed(tmp_path, monkeypatch):
    def fails(loop, n):
        if n == 3:
            monkeypatch.setattr("builtins.print", lambda *text: (_ for _ in ()).throw(BrokenPipeError))
            raise LookupError("nobody reads")

    with pytest.raises(LookupError) as raised:
        train(Config(tmp_path), fails)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == [2, 3]
    assert not hasattr(raised.value, "__notes__")


def test_a_run_stays_in_its_folder_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def leaves(loop, n):
        if n == 3:
            monkeypatch.chdir(tmp_path / "elsewhere")

    def export(loop):
        with loop.exporting("model") as folder:
            folder.mkdir()

    train(Config(pathlib.Path("run")), leaves, export)
    assert not any((tmp_path / "elsewhere").iterdir())
    assert len(metrics.read(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "model").is_dir()


def test_curves_that_cannot_be_drawn_do_not_keep_what_follows_the_run_from_it(tmp_path, capsys):
    """A script exports its model after the loop, and would fail there again whenever it is started."""
    train(Config(tmp_path), curves=["never measured"])
    assert "could not draw the curves: ValueError: cannot draw ['never measured']" in capsys.readouterr().out


def test_an_exception_after_the_update_repeats_the_step(tmp_path):
    def body(loop, n):
        loop.state, measured = learn(loop.state)
        if n == 2:
            raise LookupError
        loop.log(measured)

    with pytest.raises(LookupError):
        train_by(body, Config(tmp_path))
    assert checkpoints(tmp_path) == [2]
    np.testing.assert_array_equal(train(Config(tmp_path)), train(Config(tmp_path / "whole")))


def test_a_state_that_a_failed_program_has_taken_is_not_saved(tmp_path):
    def fails(loop, n):
        if n == 3:
            jax.tree.map(lambda x: x.delete(), loop.state.params)
            raise LookupError("lost")

    with pytest.raises(LookupError, match="lost"):
        train(Config(tmp_path), fails)
    assert checkpoints(tmp_path) == [2]


def test_an_export_that_fails_is_told_and_the_run_goes_on_and_resumes(tmp_path, capsys):
    def export(loop, n=None):
        if n in (3, None):
            with loop.exporting("model") as folder:
                assert folder == tmp_path / "model"
                assert loop.step in checkpoints(tmp_path)
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space left") as raised:
        train(Config(tmp_path), export, export)
    assert "step 3: could not export" in capsys.readouterr().out
    assert "the state of step 6 is saved" in raised.value.__notes__[0]
    assert checkpoints(tmp_path) == [3, 4, 6]
    assert len(metrics.read(tmp_path)) == 6
    train(Config(tmp_path), lambda loop, n: pytest.fail("a step was made again"))


def test_of_several_processes_none_goes_on_after_an_export_that_failed(tmp_path, monkeypatch):
    def body(loop, n):
        loop.save()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            patch.setattr(processes, "exchange", lambda name, value: [value, None])
            with pytest.raises(OSError, match="no space left"), loop.exporting("model"):
                raise OSError("no space left")
        loop.state, measured = learn(loop.state)
        loop.log(measured)

    train_by(body, Config(tmp_path, steps=1))


def test_exporting_at_a_step_changes_nothing_of_the_run(tmp_path):
    def export(loop, n):
        with loop.exporting(f"step_{n}") as folder:
            folder.mkdir(exist_ok=True)

    np.testing.assert_array_equal(train(Config(tmp_path / "a"), export), train(Config(tmp_path / "b")))


def test_lines_are_on_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    events = []
    sync, save = metrics.sync, checkpoint.save
    monkeypatch.setattr(metrics, "sync", lambda folder: (events.append(len(metrics.read(folder))), sync(folder)))
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda c, state, *a, **k: (events.append(f"save {int(state.step)}"), save(c, state, *a, **k)),
    )
    train(Config(tmp_path, steps=4))
    assert events[:4] == [2, "save 2", 4, "save 4"]


def test_updates_that_are_not_finite_end_the_run_with_its_state_saved(tmp_path):
    def body(loop, n):
        loop.state, measured = learn(loop.state, skipped=n >= 2)
        loop.log(measured)

    with pytest.raises(FloatingPointError, match="the last 3 updates were not finite"):
        train_by(body, Config(tmp_path, steps=9, save_every=50), stop_after_skipped=3)
    assert len(metrics.read(tmp_path)) == 5
    assert checkpoints(tmp_path) == [5]


def test_updates_by_which_a_scale_of_the_loss_comes_down_do_not_end_the_run(tmp_path):
    def body(loop, n):
        loop.state, measured = learn(loop.state, skipped=1)
        loop.log(measured | {"loss_scale": 2.0 ** (6 - n)})

    with pytest.raises(FloatingPointError, match="the last 3 updates were not finite"):
        train_by(body, Config(tmp_path, steps=20, save_every=50), stop_after_skipped=3)
    assert [line["loss_scale"] for line in metrics.read(tmp_path)] == [64, 32, 16, 8, 4, 2, 1, 0.5, 0.25]


def test_asked_to_stop_a_run_saves_and_ends_with_its_own_status(tmp_path, capsys):
    def stops(loop, n):
        if n == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as raised:
        train(Config(tmp_path), stops)
    assert raised.value.code == preemption.STOPPED == 143
    assert checkpoints(tmp_path) == [2, 3]
    assert "stopped after step 3 of 6; the same command goes on" in capsys.readouterr().out
    np.testing.assert_array_equal(train(Config(tmp_path)), train(Config(tmp_path / "whole")))


@pytest.mark.parametrize("code", [0, None])
def test_a_run_that_ends_before_its_last_step_does_not_end_with_0(tmp_path, code):
    def leaves(loop, n):
        if n == 3:
            sys.exit(code)

    with pytest.raises(RuntimeError, match="something raised SystemExit in step 3 of 6"):
        train(Config(tmp_path), leaves)
    assert checkpoints(tmp_path) == [2, 3]


def test_a_step_that_does_not_advance_the_state_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"step 0 ended with a state of step 0: assign to loop\.state"):
        train_by(lambda loop, n: loop.log({"loss": 1.0}), Config(tmp_path))

    def saves_too_late(loop, n):
        loop.state, _ = learn(loop.state)
        loop.save()

    with pytest.raises(RuntimeError, match="step 0 has changed the state already"):
        train_by(saves_too_late, Config(tmp_path))


def test_warnings_are_printed_with_their_step(tmp_path, capsys):
    train(Config(tmp_path), lambda loop, n: loop.log({"learning_rate": 0.0}))
    assert capsys.readouterr().out.count("step 1: the learning rate is 0") == 1


@pytest.mark.parametrize(("dtype", "step", "lost"), [(jnp.bfloat16, 1e-4, True), (jnp.float32, 1e-4, False)])
def test_an_update_that_the_dtype_drops_whole_is_told(tmp_path, capsys, dtype, step, lost):
    def add(loop, n):
        moved = {"w": loop.state.params["w"] + jnp.asarray(step, dtype)}
        loop.state = loop.state._replace(params=moved, step=loop.state.step + 1)
        loop.log({"grad_norm": 1.0, "skipped": 0.0})

    state = initial()._replace(params={"w": jnp.ones(8, dtype)})
    with run.loop(Config(tmp_path), state, steps=2, save_every=2) as loop:
        for n in loop:
            add(loop, n)
    assert ("step 1: the update changed no parameter" in capsys.readouterr().out) == lost
    assert all(("unchanged" in line) == lost for line in metrics.read(tmp_path))


# ------------------------------------------------------------------ what it resumes on


def test_other_settings_are_refused_with_both_values(tmp_path):
    train(Config(tmp_path))
    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        train(Config(tmp_path, seed=1))
    with pytest.raises(ValueError, match=r"steps: 6 -> 8"):
        train(Config(tmp_path, steps=8))
    train(Config(tmp_path, steps=8), allow=("steps",))


def test_other_inputs_are_refused_by_name(tmp_path):
    inputs = {"prompts": digests.of_json([[1, 2], [3]]), "weights": digests.of_arrays({"w": jnp.ones(3)})}
    train(Config(tmp_path), digests=inputs)
    train(Config(tmp_path), digests=inputs)
    changed = inputs | {"prompts": digests.of_json([[3], [1, 2]])}
    with pytest.raises(ValueError, match=r"not what the run began with: prompts\."):
        train(Config(tmp_path), digests=changed)
    changed = changed | {"weights": digests.of_arrays({"w": jnp.zeros(3)})}
    with pytest.raises(ValueError, match=r"began with: prompts, weights\."):
        train(Config(tmp_path), digests=changed)


@pytest.mark.parametrize("save_every", [2, 50])  # the last step is saved in any case
def test_metrics_whose_checkpoints_were_deleted_are_not_dropped(tmp_path, save_every):
    train(Config(tmp_path, save_every=save_every))
    before = text(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"has the metrics of 6 steps, but no checkpoint: put .*checkpoints back"):
        train(Config(tmp_path, save_every=save_every))
    assert text(tmp_path) == before
    (tmp_path / metrics.METRICS_FILE).unlink()
    train(Config(tmp_path, save_every=save_every))
    assert text(tmp_path) == before


def test_other_code_is_told_and_not_refused(tmp_path, capsys):
    """A reward may be mended and the run go on; that it is another run from there on is said."""
    for steps, code in ((2, "a"), (3, "a"), (4, "b")):
        inputs = {"the data": "1", f"{digests.CODE}mine.py": code}
        train(Config(tmp_path, steps=steps), allow=("steps",), digests=inputs)
        told = "the code of mine.py is not what it was at step 3" in capsys.readouterr().out
        assert told == (code == "b")


def test_the_best_value_outlives_the_lines_that_held_it(tmp_path):
    best = []

    def evaluate(loop, n):
        if n % 2 == 0:
            loop.log({"eval": {0: 0.1, 2: 0.9, 4: 0.2, 6: 0.3, 8: 1.0}[n]})
            if loop.improved("eval"):
                best.append(n)

    train(Config(tmp_path, steps=4), evaluate)
    (tmp_path / metrics.METRICS_FILE).unlink()
    train(Config(tmp_path, steps=10), evaluate, allow=("steps",))
    assert best == [2, 8]


def test_a_run_of_which_nothing_was_trained_says_so(tmp_path):
    def skip(loop, n):
        loop.state, measured = learn(loop.state, skipped=True)
        loop.log(measured)

    with pytest.raises(FloatingPointError, match="none of the run's updates was finite"):
        train_by(skip, Config(tmp_path, steps=2))
    assert checkpoints(tmp_path) == [2]


@pytest.mark.parametrize("changed", [{"steps": -1}, {"save_every": 0}])
def test_numbers_out_of_range_are_refused(tmp_path, changed):
    with pytest.raises(ValueError, match="steps are at least 0, save_every and stop_after_skipped at least 1; got"):
        train(Config(tmp_path, **changed))


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_anew(tmp_path, capsys):
    def killed(loop, n):
        if n == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Config(tmp_path), killed)
    train(Config(tmp_path))
    assert "begins anew: the run was killed in step 1, before its first checkpoint" in capsys.readouterr().out
    assert [line["step"] for line in metrics.read(tmp_path)] == list(range(6))


def test_a_hole_in_the_metrics_is_told(tmp_path, capsys):
    train(Config(tmp_path, steps=4))
    lines = text(tmp_path).splitlines(keepends=True)
    (tmp_path / metrics.METRICS_FILE).write_text(lines[0] + lines[3])
    train(Config(tmp_path), allow=("steps",))
    assert "lacks 2 of the steps before (within 1 to 2)" in capsys.readouterr().out
    (tmp_path / metrics.METRICS_FILE).unlink()
    train(Config(tmp_path, steps=8), allow=("steps",))
    assert "lacks 6 of the steps before (within 0 to 5)" in capsys.readouterr().out


def test_what_a_killed_process_left_is_removed_or_put_back(tmp_path):
    train(Config(tmp_path))
    name = "0123456789abcdef" * 2
    for folder in (f".step_4.{name}", f".best.{name}", f".best.{name}.replaced", "checkpoints/3", ".mine"):
        (tmp_path / folder).mkdir()
        if not folder.startswith("checkpoints"):
            (tmp_path / folder / "of").write_text(folder)
    (tmp_path / ".metrics.png.partial").touch()
    train(Config(tmp_path, steps=7), allow=("steps",))
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == {".mine"}
    assert (tmp_path / "best" / "of").read_text() == f".best.{name}.replaced"
    assert checkpoints(tmp_path) == [4, 6, 7]


def test_a_folder_that_another_process_holds_is_refused(tmp_path):
    code = f"""
import runpy  # the file alone, as importing the package takes seconds
with runpy.run_path({preemption.__file__!r})["lock"]({str(tmp_path)!r}):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=f"in use by process {holder.pid} on"):
            train(Config(tmp_path))
        holder.communicate("\n")


# ------------------------------------------------------------------ where it is followed


def test_metrics_and_completions_go_to_the_writers(tmp_path, monkeypatch):
    seen = []
    board = writers.Writer(
        lambda step, line: seen.append((step, dict(line))), lambda step, lines: seen.append((step, lines))
    )
    monkeypatch.setattr(
        run.training_loop.writers, "tensorboard", lambda folder, purge_step: seen.append(purge_step) or board
    )
    train(Config(tmp_path, steps=2), lambda loop, n: loop.show([{"completion": "x"}]), tensorboard=True)
    assert seen[0] == 0
    assert seen[1] == (0, [{"completion": "x"}])
    assert (seen[2][0], seen[2][1]["skipped"]) == (0, 0.0)
    train(Config(tmp_path, steps=3), allow=("steps",), tensorboard=True)
    assert 2 in seen


def test_what_follows_a_run_and_fails_loses_no_step_of_it(tmp_path, monkeypatch):
    def fails(step, line):
        if step == 2:
            raise ConnectionError("the service is down")

    board = writers.Writer(fails, lambda step, lines: None)
    monkeypatch.setattr(run.training_loop.writers, "tensorboard", lambda folder, purge_step: board)
    with pytest.raises(ConnectionError):
        train(Config(tmp_path), tensorboard=True, save_every=50)
    assert checkpoints(tmp_path) == [3]
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1, 2]
    np.testing.assert_array_equal(train(Config(tmp_path)), train(Config(tmp_path / "whole")))
    assert text(tmp_path) == text(tmp_path / "whole")


def test_a_profile_is_of_three_steps_after_the_first(tmp_path):
    train(Config(tmp_path), profile=True)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_laps_are_in_the_timing(tmp_path):
    train(Config(tmp_path, steps=2), lambda loop, n: loop.lap("sample"))
    assert all("sample" in line for line in metrics.read(tmp_path, metrics.TIMING_FILE))


def test_settings_are_kept_as_json(tmp_path):
    train(Config(tmp_path, steps=2))
    step, meta = checkpoint.read_meta(tmp_path / "checkpoints")
    assert meta["config"] == json.loads(json.dumps(dataclasses.asdict(Config(tmp_path, steps=2)), default=str))
    assert step == 2
