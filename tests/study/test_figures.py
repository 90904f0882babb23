"""Figures of learning curves: what is drawn, in colours that differ, as files that are whole."""

import itertools

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure

from grpo_jax.study import figures
from grpo_jax.study.intervals import bootstrap


def rows_of(curves, metric="score"):
    """Rows of `{condition: {seed: curve}}`, ten steps apart."""
    return [
        {"condition": condition, "seed": seed, "step": 10 * n, metric: value}
        for condition, seeds in curves.items()
        for seed, curve in seeds.items()
        for n, value in enumerate(curve)
    ]


CURVES = {"a": {0: [0.0, 1.0, 5.0], 4: [0.0, 3.0, 6.0]}, "b": {0: [0.0, 1.0, 2.0], 4: [0.0, 0.0, 3.0]}}
MANY = {f"condition {n}": {0: [0.0, n], 1: [0.0, n + 1.0]} for n in range(13)}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and returns the figure."""
    kept = []

    def draw(data, names, kind=figures.curves, **settings):
        with monkeypatch.context() as patched:
            patched.setattr(figures, "save", lambda figure, path: kept.append(figure))
            kind(data, names, tmp_path / "x.png", **settings)
        return kept[-1]

    return draw


def test_a_figure_is_a_png_and_knows_what_there_is(tmp_path):
    rows = rows_of(CURVES)
    path = figures.curves(rows, ["score"], tmp_path / "all.png")
    assert path == tmp_path / "all.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    one = figures.curves(rows, ["score"], tmp_path / "one.png", conditions=["b"])
    assert one.read_bytes() != path.read_bytes()
    with pytest.raises(ValueError, match="no row has the metric 'loss'"):
        figures.curves(rows, ["score", "loss"], tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"conditions \['a', 'c'\] .* there are \['a', 'b'\]"):
        figures.curves(rows, ["score"], tmp_path / "none.png", conditions=["a", "c"])
    with pytest.raises(ValueError, match="against 'c'"):
        figures.curves(rows, ["score"], tmp_path / "none.png", against="c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "one.png"]


def test_a_figure_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    before = figures.curves(rows_of(CURVES), ["score"], tmp_path / "x.png").read_bytes()

    def killed(figure, path, **settings):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        figures.curves(rows_of(CURVES), ["score"], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == before


def test_a_line_is_the_mean_over_seeds_with_its_interval(drawn):
    figure = drawn(rows_of(CURVES), ["score"])
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 10, 20])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.0, 2.0, 5.5])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    interval = bootstrap([5.0, 6.0])
    assert {interval.low, interval.high} <= set(heights)
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]


def test_the_horizontal_axis_can_be_another_column(drawn):
    rows = [row | {"seconds": row["step"] * (0.5 if row["condition"] == "a" else 2.0)} for row in rows_of(CURVES)]
    (axes,) = drawn(rows, ["score"], x="seconds").axes
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 5, 10])
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [0, 20, 40])
    assert axes.get_xlabel() == "seconds"


def test_more_conditions_than_colours_have_a_panel_each_against_one_in_grey(drawn):
    figure = drawn(rows_of(MANY), ["score"], against="condition 3")
    assert [axes.get_title() for axes in figure.axes] == [name for name in MANY if name != "condition 3"]
    for axes in figure.axes:
        grey, colour = axes.lines
        np.testing.assert_allclose(grey.get_ydata(), [0.0, 3.5])
        np.testing.assert_allclose(colour.get_ydata(), [0.0, np.mean([MANY[axes.get_title()][s][1] for s in (0, 1)])])
        assert grey.get_color() == figures.GREY
        assert axes.get_ylim() == figure.axes[0].get_ylim()
    assert "condition 3" in figure.legends[0].texts[0].get_text()
    first = drawn(rows_of(MANY), ["score"])
    assert len(first.axes) == 12  # against the first, unless told otherwise


@pytest.mark.parametrize(("together", "panels"), [({}, 4), ({"together": 5}, 1)])
def test_more_than_four_conditions_share_a_panel_only_if_asked_to(drawn, together, panels):
    five = [f"condition {n}" for n in range(5)]
    assert len(drawn(rows_of(MANY), ["score"], conditions=five, **together).axes) == panels


def test_long_titles_of_panels_are_broken_into_lines(drawn):
    long = "iterations 1, epsilon 0.2, 0.28 (clip-higher)"
    titles = [axes.get_title() for axes in drawn(rows_of(MANY | {long: MANY["condition 1"]}), ["score"]).axes]
    assert titles[-1].split() == long.split()
    assert max(map(len, titles[-1].splitlines())) <= 28


def test_a_seed_that_diverged_leaves_a_gap(drawn):
    (axes,) = drawn(rows_of({"a": {0: [0.0, 1.0, 2.0], 1: [0.0, float("nan"), 2.0]}}), ["score"]).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0.0, np.nan, 2.0])


def dichromat(colour, kind):
    """Linear RGB as a dichromat sees it (Vienot, Brettel and Mollon 1999, equations 5 to 7)."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    return np.linalg.inv(to_lms) @ {"protan": protan, "deutan": deutan}[kind] @ to_lms @ linear


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_no_two_colours_look_the_same_to_a_dichromat(kind):
    seen = [dichromat(colour, kind) for colour in figures.PALETTE]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 0.08
    red, green = dichromat("#d62728", kind), dichromat("#8c564b", kind)
    assert np.linalg.norm(red - green) < 0.2  # two colours of Matplotlib's default are closer than most of these


def test_accuracy_over_rates_is_marked_at_the_rates_that_were_tried_and_nowhere_else(drawn):
    scores = {3e-4: np.array([0.5, 0.7]), 0.0015: np.array([0.1, 0.2])}
    of_rates = {"a": scores, "b": scores, "c": {7e-4: np.array([0.4, 0.4])}}
    figure = drawn(of_rates, "score", figures.rates, against="a")
    assert [axes.get_title() for axes in figure.axes] == ["b", "c"]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0.0003", "0.0007", "0.0015"]
        assert not len(axes.get_xticks(minor=True))
    grey, blue = figure.axes[1].lines
    np.testing.assert_allclose(grey.get_xdata(), [3e-4, 0.0015])
    np.testing.assert_allclose(grey.get_ydata(), [0.6, 0.15])
    np.testing.assert_allclose((blue.get_xdata(), blue.get_ydata()), [[7e-4], [0.4]])
    with pytest.raises(ValueError, match="no condition 'd'"):
        drawn(of_rates, "score", figures.rates, against="d")
