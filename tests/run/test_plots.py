import numpy as np
import pytest
from matplotlib.image import imread

from grpo_jax.run import metrics, plots


def test_a_plot_has_a_panel_for_each_metric(tmp_path):
    for step in range(8):
        numbers = {f"{i}/$\\frac$": i * step for i in range(4)}
        metrics.append(tmp_path, step, numbers | {"note": "text", "never": np.nan})
    assert plots.plot(tmp_path) == tmp_path / "metrics.png"
    height, width, _ = imread(tmp_path / "metrics.png").shape
    one = imread(plots.plot(tmp_path, tmp_path / "one.png", keys=[next(iter(numbers))])).shape
    assert (height, width) == (one[0], 4 * one[1])
    five = imread(plots.plot(tmp_path, tmp_path / "five.png", keys=[*numbers, *numbers][:5])).shape
    assert (five[0], five[1]) == (2 * height, width)


def test_a_plot_leaves_a_gap_where_a_metric_was_not_finite_and_bridges_where_it_was_not_measured(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or path.touch())
    for step, line in enumerate([{"x": 1.0}, {"x": np.nan}, {}, {"x": 4.0}]):
        metrics.append(tmp_path, step, line)
    plots.plot(tmp_path)
    (axes,) = drawn[0].axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 1], [1, np.nan], [3, 4]])


@pytest.mark.parametrize("keys", [["loss", "nothing"], []])
def test_a_plot_of_what_was_never_measured_is_refused(tmp_path, keys):
    for step in range(2):
        metrics.append(tmp_path, step, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"cannot draw .* which measured \['loss'\]"):
        plots.plot(tmp_path, keys=keys)


def test_a_plot_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    metrics.append(tmp_path, 0, {"loss": 1.0})
    before = plots.plot(tmp_path).read_bytes()

    def killed(figure, path, **settings):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(plots.Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        plots.plot(tmp_path)
    assert (tmp_path / "metrics.png").read_bytes() == before
