"""Each ablation runs, in a few steps of two conditions, and what its other conditions compose can be traced."""

import importlib.util
import pathlib
import sys

import jax
import pytest

from grpo_jax.study import results

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "ablations"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("setting", "rank_all"))


@pytest.fixture
def load(monkeypatch):
    """Imports a file of the ablations as its command does, with `setting` beside it."""
    monkeypatch.syspath_prepend(FOLDER)

    def load_one(name):
        spec = importlib.util.spec_from_file_location(f"ablation_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load_one
    sys.modules.pop("setting", None)


def test_there_are_thirteen():
    assert len(NAMES) == 13


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_leaves_a_table_a_figure_and_tidy_rows(name, load, tmp_path):
    module = load(name)
    config = module.setting.configured(module.setting.Config(run_dir=tmp_path, smoke=True))
    module.experiment(config)
    written = sorted(path.stem for path in config.results.glob("*.csv"))
    assert written
    for stem in written:
        rows = results.read(config.results / f"{stem}.csv")
        assert {row["seed"] for row in rows} == {0, 1}
        assert {row["step"] for row in rows} == {0, 2, 4}
        assert len({row["condition"] for row in rows}) == 2
        assert (config.results / f"{stem}.md").read_text().count("\n") == 4
        assert (config.results / f"{stem}.png").stat().st_size > 10_000


@pytest.mark.smoke
def test_conditions_are_ranked_at_their_best_rates_on_seeds_of_their_own(load, tmp_path, capsys):
    module = load("clipping")
    setting, config = module.setting, module.setting.Config(run_dir=tmp_path, smoke=True, rank=True)
    run = module.make(config := setting.configured(config), 1)
    bounds = {"0.1": 0.1, "0.2": 0.2}
    conditions = [setting.Condition(name, run, {"low": x, "high": x, "delta": 2.0}) for name, x in bounds.items()]

    def ranked(**changes):
        changed = setting.dataclasses.replace(config, **changes)
        setting.run("clipping", changed, conditions, against="0.2")

    ranked(estimate=True)
    assert "2 conditions, 1 programs, 16 runs of 4 steps: about" in capsys.readouterr().out
    ranked()
    rates, rows = (results.read(config.results / f"clipping_{name}.csv") for name in ("rates", "ranked"))
    assert {row["condition"] for row in rates} == {f"{x} @ {rate:g}" for x in ("0.1", "0.2") for rate in config.rates}
    assert {row["seed"] for row in rates} == {0, 1}
    assert {row["seed"] for row in rows} == {2, 3, 4, 5}
    assert (config.results / "clipping_ranked.md").read_text().count("\n") == 4
    for figure in ("rates", "ranked"):
        assert (config.results / f"clipping_{figure}.png").stat().st_size > 5_000


def test_a_grid_of_one_rate_is_refused_before_models_are_warmed_up(load):
    setting = load("temperature").setting
    with pytest.raises(ValueError, match="at least 2 learning rates"):
        setting.configured(setting.Config(rank=True, rates=(1e-4,)))
    setting.configured(setting.Config(rates=(1e-4,)))  # nothing is ranked


@pytest.mark.slow
def test_runs_at_once_take_memory_in_proportion(load):
    setting = load("temperature").setting
    run = setting.make(setting.Config(steps=10))

    def one(key):
        return run(key, {"params": setting.policy.init(key)})

    def held(runs):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), runs))
        found = jax.jit(jax.vmap(one)).lower(keys).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes

    assert 6 < held(8) / held(1) < 8.5
