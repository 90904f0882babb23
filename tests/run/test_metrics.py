import io
import json
import re
import struct
import sys
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import tensorboardX
from matplotlib.image import imread
from tensorboardX.proto.event_pb2 import Event

from grpo_jax import types
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
    statistics = {"reward": types.Mean(jnp.float32(3.0), jnp.float32(4.0)), "norm": types.Max(jnp.float32(2.0))}
    metrics.append(tmp_path, 0, types.summary(statistics))
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
    [jnp.ones(2), types.Mean(jnp.float32(1), jnp.float32(1)), {"a": 1.0}, [1.0], 1j, object()],
    ids=lambda v: type(v).__name__,
)
def test_what_is_no_single_number_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"metric 'loss' must be one number \(see types.summary\)"):
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


# Adapters


def test_tensorboard_gets_every_finite_number(tmp_path, monkeypatch):
    writers = []
    make = tensorboardX.SummaryWriter
    monkeypatch.setattr(tensorboardX, "SummaryWriter", lambda *a, **k: writers.append(make(*a, **k)) or writers[0])
    write = metrics.tensorboard(tmp_path / "board", purge_step=3)
    write(3, {"loss": jnp.float32(0.5), "kl": jnp.nan, "note": "text", "done": True})
    write(4, {"loss": 0.25})
    writers[0].close()  # as at the end of the process
    (file,) = (tmp_path / "board").iterdir()
    data, events = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value] == [
        (3, "done", 1.0),
        (3, "loss", 0.5),
        (4, "loss", 0.25),
    ]


def test_wandb_gets_plain_numbers_with_their_step(monkeypatch):
    logged = []
    run = python_types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    client = python_types.SimpleNamespace(init=lambda **init: logged.append(init) or run)
    monkeypatch.setitem(sys.modules, "wandb", client)
    write = metrics.wandb(project="grpo", mode="offline")
    write(7, {"loss": jnp.float32(0.5)})
    assert logged == [{"project": "grpo", "mode": "offline"}, (7, {"loss": 0.5})]
    assert type(logged[1][1]["loss"]) is float


@pytest.mark.parametrize(
    ("module", "adapter", "extra"),
    [("tensorboardX", lambda: metrics.tensorboard("nowhere"), "tensorboard"), ("wandb", metrics.wandb, "wandb")],
    ids=["tensorboard", "wandb"],
)
def test_an_adapter_that_is_not_installed_says_which_extra_to_install(monkeypatch, module, adapter, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'grpo-jax[{extra}]'")):
        adapter()


# Progress


def shown(*, terminal: bool, steps, total: int = 30, **settings) -> str:
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=terminal, width=100)
    with metrics.progress(total, console=console, **settings) as show:
        for step in steps:
            show(step, {"reward": jnp.float32(step / 100), "kl": 1e-6, "unasked": 5.0, "length": 12}, 12345.6)
    return out.getvalue()


def test_without_a_terminal_a_line_is_printed_every_few_steps_and_for_the_first_and_last():
    lines = shown(terminal=False, steps=range(3, 28), start=3, total=28).splitlines()
    assert [line.split()[1] for line in lines] == ["4/28", "10/28", "20/28", "28/28"]
    assert re.fullmatch(r"step 10/28  reward 0.09  kl 1e-06  length 12  tokens/s 12,346  left \d+:\d\d:\d\d", lines[1])
    assert not any("\x1b" in line for line in lines)


def test_on_a_terminal_each_step_is_drawn_over_the_last():
    drawn = shown(terminal=True, steps=range(30))
    assert "\x1b[1A" in drawn
    for name in ("step", "reward", "kl", "length", "tokens/s", "left", "30/30", "12,346"):
        assert name in drawn
    for name in ("unasked", "accuracy", "entropy"):  # not asked for, or not measured
        assert name not in drawn


def test_the_remaining_time_is_that_of_the_steps_after_the_first(monkeypatch):
    seconds = iter([100.0, 102.0, 104.0])  # however long the first took to compile
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(seconds))
    lines = shown(terminal=False, steps=[0, 1, 2], total=103, every=1).splitlines()
    assert [line.partition("  left ")[2] for line in lines] == ["", "0:03:22", "0:03:20"]


# Plots


def test_a_plot_has_a_panel_for_each_metric(tmp_path):
    for step in range(8):
        numbers = {f"{i}/$\\frac$": i * step for i in range(4)}
        metrics.append(tmp_path, step, numbers | {"note": "text", "never": np.nan})
    assert metrics.plot(tmp_path) == tmp_path / "metrics.png"
    height, width, _ = imread(tmp_path / "metrics.png").shape
    one = imread(metrics.plot(tmp_path, tmp_path / "one.png", keys=[next(iter(numbers))])).shape
    assert (height, width) == (one[0], 4 * one[1])
    five = imread(metrics.plot(tmp_path, tmp_path / "five.png", keys=[*numbers, *numbers][:5])).shape
    assert (five[0], five[1]) == (2 * height, width)


def test_a_plot_leaves_a_gap_where_a_metric_was_not_finite_and_bridges_where_it_was_not_measured(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(metrics.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for step, line in enumerate([{"x": 1.0}, {"x": np.nan}, {}, {"x": 4.0}]):
        metrics.append(tmp_path, step, line)
    metrics.plot(tmp_path)
    (axes,) = drawn[0].axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 1], [1, np.nan], [3, 4]])


@pytest.mark.parametrize("keys", [["loss", "nothing"], []])
def test_a_plot_of_what_was_never_measured_is_refused(tmp_path, keys):
    write_steps(tmp_path, range(2))
    with pytest.raises(ValueError, match=r"cannot draw .* which measured \['loss'\]"):
        metrics.plot(tmp_path, keys=keys)


def test_lines_are_json_of_the_standard(tmp_path):
    metrics.append(tmp_path, 0, {"a": 1e300, "b": -0.0, "c": 5e-324})

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text(tmp_path), parse_constant=refuse) == {"step": 0, "a": 1e300, "b": -0.0, "c": 5e-324}
