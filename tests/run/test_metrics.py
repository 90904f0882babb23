import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import statistics
from grpo_jax.run import metrics


def text(run_dir, name=metrics.METRICS_FILE) -> str:
    return (run_dir / name).read_text()


def write_steps(run_dir, steps) -> None:
    for step in steps:
        metrics.append(run_dir, step, {"loss": 1.0 / (step + 1)}, {"seconds": 0.5})


# The lines


def test_a_line_holds_the_step_and_the_numbers_in_the_order_of_their_names(tmp_path):
    measured = {
        "reward": jnp.float32(0.1),
        "count": jnp.int32(3),
        "finite": np.True_,
        "bf16": jnp.bfloat16(0.3),
        "x": 2,
    }
    metrics.append(tmp_path / "new" / "run", 0, measured)
    assert text(tmp_path / "new" / "run") == (
        '{"step": 0, "bf16": 0.30078125, "count": 3, "finite": true, "reward": 0.10000000149011612, "x": 2}\n'
    )
    assert not (tmp_path / "new" / "run" / metrics.TIMING_FILE).exists()


def test_a_float32_comes_back_to_the_bit(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**32, 200, np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    for step, value in enumerate(values):
        metrics.append(tmp_path, step, {"x": value})
    back = np.array([line["x"] for line in metrics.read(tmp_path)], np.float32)
    assert back.tobytes() == values.tobytes()


def test_statistics_are_written_through_their_summary(tmp_path):
    measured = {
        "reward": statistics.Mean(jnp.float32(3.0), jnp.float32(4.0)),
        "norm": statistics.Max(jnp.float32(2.0)),
    }
    metrics.append(tmp_path, 0, statistics.summary(measured))
    assert metrics.read(tmp_path) == [{"step": 0, "norm": 2.0, "reward": 0.75}]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, jnp.float32(np.nan), None])
def test_what_is_not_finite_is_null(tmp_path, value):
    metrics.append(tmp_path, 0, {"loss": value})
    assert text(tmp_path) == '{"step": 0, "loss": null}\n'


def test_text_cannot_break_a_line_or_reach_the_terminal(tmp_path):
    note = 'first\nsecond "quoted" \x1b[31m\u2028 \x00 é'
    metrics.append(tmp_path, 0, {"note": note})
    assert text(tmp_path).count("\n") == 1
    assert text(tmp_path)[:-1].isprintable()
    assert metrics.read(tmp_path)[0]["note"] == note


def test_timing_has_a_file_of_its_own(tmp_path):
    metrics.append(tmp_path, 0, {"loss": 1.0}, {"seconds": jnp.float32(0.25)})
    assert metrics.read(tmp_path) == [{"step": 0, "loss": 1.0}]
    assert metrics.read(tmp_path, metrics.TIMING_FILE) == [{"step": 0, "seconds": 0.25}]


@pytest.mark.parametrize(
    "value",
    [jnp.ones(2), statistics.Mean(jnp.float32(1), jnp.float32(1)), {"a": 1.0}, [1.0], 1j, object()],
    ids=lambda v: type(v).__name__,
)
def test_what_is_no_single_number_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"metric 'loss' must be one number \(see statistics.summary\)"):
        metrics.append(tmp_path, 0, {"loss": value})
    assert not (tmp_path / metrics.METRICS_FILE).exists()


def test_a_metric_cannot_take_the_name_of_the_step(tmp_path):
    with pytest.raises(ValueError, match="must not be named 'step'"):
        metrics.append(tmp_path, 0, {"step": 3})


def test_numbers_come_from_the_device_in_one_transfer(monkeypatch):
    transfers = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: transfers.append(tree) or device_get(tree))
    assert metrics.plain({"a": jnp.float32(1), "b": jnp.float32(2)}) == {"a": 1.0, "b": 2.0}
    assert len(transfers) == 1


# Resuming


def test_truncating_drops_the_steps_to_be_repeated_from_both_files(tmp_path):
    write_steps(tmp_path, range(5))
    metrics.truncate(tmp_path, 3)
    for name in (metrics.METRICS_FILE, metrics.TIMING_FILE):
        assert [line["step"] for line in metrics.read(tmp_path, name)] == [0, 1, 2]


@pytest.mark.parametrize("torn", [1, 10, -1])
def test_a_run_that_was_torn_in_a_line_is_whole_after_it_resumes(tmp_path, torn):
    write_steps(tmp_path / "whole", range(5))
    write_steps(tmp_path / "torn", range(4))
    path = tmp_path / "torn" / metrics.METRICS_FILE
    last = len(text(tmp_path / "torn").splitlines(keepends=True)[-1])
    path.write_bytes(path.read_bytes()[: -last + torn if torn > 0 else torn])
    metrics.truncate(tmp_path / "torn", 3)
    write_steps(tmp_path / "torn", range(3, 5))
    assert text(tmp_path / "torn") == text(tmp_path / "whole")


def test_a_fresh_start_in_an_old_folder_begins_with_an_empty_file(tmp_path):
    write_steps(tmp_path, range(2))
    metrics.truncate(tmp_path, 0)
    assert text(tmp_path) == text(tmp_path, metrics.TIMING_FILE) == ""


def test_there_is_nothing_to_truncate_in_a_new_folder(tmp_path):
    metrics.truncate(tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()


def test_reading_a_live_run_leaves_out_the_line_that_is_being_written(tmp_path):
    write_steps(tmp_path, range(2))
    with (tmp_path / metrics.METRICS_FILE).open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    write_steps(tmp_path, range(3))
    path = tmp_path / metrics.METRICS_FILE
    path.write_text(text(tmp_path).replace('{"step": 1', '{"step" 1'))
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a line of JSON"):
        metrics.read(tmp_path)


def test_a_broken_line_after_the_step_that_is_resumed_is_dropped(tmp_path):
    write_steps(tmp_path, range(3))
    path = tmp_path / metrics.METRICS_FILE
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write('oops\n{"step": 4, "loss": 1.0}\n')
    metrics.truncate(tmp_path, 3)
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'{"step": 1', b'{"step" 1'))
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a line of JSON"):
        metrics.truncate(tmp_path, 3)
    metrics.truncate(tmp_path, 1)
    assert [line["step"] for line in metrics.read(tmp_path)] == [0]


def test_steps_without_a_line_are_told(tmp_path):
    write_steps(tmp_path, [0, 1, 4])
    assert metrics.missing(tmp_path, 5) == [2, 3]
    assert metrics.missing(tmp_path, 2) == []
    assert metrics.missing(tmp_path / "new", 2) == [0, 1]


def test_lines_are_on_disk_after_sync(tmp_path, monkeypatch):
    write_steps(tmp_path, range(2))
    synced = []
    monkeypatch.setattr(
        metrics.os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    metrics.sync(tmp_path)
    assert [pathlib.Path(path).name for path in synced] == [metrics.METRICS_FILE, metrics.TIMING_FILE]


def test_completions_are_lines_that_are_truncated_as_the_metrics_are(tmp_path):
    for step in range(3):
        metrics.append_completions(tmp_path, step, [{"completion": "a\nb"}, {"completion": None}])
    metrics.truncate(tmp_path, 2)
    lines = metrics.read(tmp_path, metrics.COMPLETIONS_FILE)
    assert [(line["step"], line["completion"]) for line in lines] == [(0, "a\nb"), (0, None), (1, "a\nb"), (1, None)]


def test_what_reward_functions_log_is_averaged_over_a_step():
    logged = metrics.Logged()
    for name, value in (("judge/faults", 1), ("judge/faults", 2), ("other", 3)):
        logged(name, value)
    assert logged.take() == {"judge/faults": 1.5, "other": 3.0}
    assert logged.take() == {}


def test_lines_are_json_of_the_standard(tmp_path):
    metrics.append(tmp_path, 0, {"a": 1e300, "b": -0.0, "c": 5e-324})

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text(tmp_path), parse_constant=refuse) == {"step": 0, "a": 1e300, "b": -0.0, "c": 5e-324}


def test_what_rewards_log_takes_the_place_of_nothing_that_a_step_has_measured():
    measured = {"reward": 0.5, "skipped": 0.0}
    assert metrics.beside(measured, {"skipped": 1.0, "mine": 2.0}) == measured | {"logged/skipped": 1.0, "mine": 2.0}
    with pytest.raises(ValueError, match="named 'step', which each line has already"):
        metrics.Logged()("step", 3.0)
