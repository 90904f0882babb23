"""Numbers out of range are refused under the name that they have on the command line."""

import dataclasses
import importlib
import importlib.util
import math
import pathlib
import sys

import numpy as np
import pytest

from grpo_jax.run import ranges

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@dataclasses.dataclass(frozen=True)
class Config:
    run_dir: pathlib.Path = pathlib.Path("runs")
    save_every: int = 50
    export_every: int | None = None
    steps: int = 0
    seed: int = 0
    learning_rate: float | None = 1e-6
    weight_decay: float = 0.0
    temperature: float = 1.0
    reward_timeout: float = 300.0
    max_grad_norm: float = 1.0
    reward_weights: tuple[float, ...] | None = None
    group_size: int = 2
    anything: float = -1.0
    flag: bool = False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_every": 0}, "--save-every is at least 1, got 0"),
        ({"export_every": -1}, "--export-every is at least 1, got -1"),
        ({"steps": -1}, "--steps is at least 0, got -1"),
        ({"seed": -1}, "--seed is at least 0, got -1"),
        ({"learning_rate": -1e-6}, "--learning-rate is at least 0, got -1e-06"),
        ({"learning_rate": math.inf}, "--learning-rate is a number, got inf"),
        ({"temperature": 0}, "--temperature is above 0, got 0"),
        ({"temperature": math.nan}, "--temperature is a number, got nan"),
        ({"reward_weights": (1.0, math.nan)}, "--reward-weights is a number, got nan"),
        ({"anything": math.nan}, "--anything is a number, got nan"),
        ({"group_size": 0}, "--group-size is at least 1, got 0"),
        ({"seed": 2**32}, "--seed is at most 4294967295, got 4294967296"),  # a key would be that of the seed 0
        ({"steps": 2**31}, "--steps is at most 2147483647, got 2147483648"),
        ({"temperature": 1e-45}, "--temperature is computed with in float32, .* has no 1e-45"),  # 0 on the device
        ({"learning_rate": 1e-50}, "--learning-rate is computed with in float32, .* has no 1e-50"),
        ({"anything": -1e39}, "--anything is computed with in float32, .* has no -1e\\+39"),
        ({"reward_timeout": 1e10}, "--reward-timeout is at most 9223372036.0, got 10000000000.0"),  # no timer takes it
        ({"weight_decay": 1e10}, "--weight-decay 10000000000.0 takes 1e\\+04 of each weight away in an update"),
        ({"run_dir": pathlib.Path("gs://bucket/run")}, "--run-dir is a path, got gs:/bucket/run: mount the bucket"),
    ],
)
def test_a_number_out_of_range_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        ranges.check(dataclasses.replace(Config(), **changes))


def test_settings_that_have_no_effect_are_told(capsys):
    ranges.tell_unused(Config(flag=True, save_every=50, steps=7), ["flag", "save_every", "steps"], without="--that")
    assert capsys.readouterr().out.splitlines() == [
        "warning: --flag has no effect without --that", "warning: --steps 7 has no effect without --that"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["calculator", "guess_the_number"])
def test_scripts_that_save_nothing_look_at_their_numbers_too(name, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = importlib.import_module(name)
    with pytest.raises(ValueError, match="--seeds is at least 1, got 0"):
        module.experiment(module.Config(results=tmp_path, seeds=0))


def test_a_learning_rate_whose_updates_are_lost_is_told(capsys):
    """Of weights of 0.02, an update of 1e-12 changes none, and the metrics look as they always do."""
    assert np.float32(0.02) - np.float32(ranges.LEAST_RATE / 2) == np.float32(0.02)
    ranges.check(Config(learning_rate=1e-12))
    assert "warning: --learning-rate 1e-12 is about what an update of Adam moves a weight by" in capsys.readouterr().out
    ranges.check(Config(learning_rate=1e-7))
    assert capsys.readouterr().out == ""


def test_what_is_in_range_passes():
    ranges.check(Config(max_grad_norm=math.inf, learning_rate=None))
    ranges.check(Config(weight_decay=100.0))
    ranges.check(Config(seed=2**32 - 1, steps=2**31 - 1, learning_rate=1e-30, reward_timeout=9e9))
    ranges.check(Config(group_size=0), group_size=0)


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted(EXPERIMENTS.glob("*.py")) if "save_every" in path.read_text()]
)
def test_every_script_that_saves_looks_at_its_numbers_first(name, monkeypatch):
    """Before it reads or makes anything: none of the files that the settings name are there."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location(f"ranged_{name}", EXPERIMENTS / f"{name}.py")
    sys.modules[f"ranged_{name}"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fields = dataclasses.fields(module.Config)
    required = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    given = {name: ("a:b",) if name == "reward" else "nowhere" for name in required}
    with pytest.raises(ValueError, match="--save-every is at least 1, got 0"):
        module.train(module.Config(**given, save_every=0))


@dataclasses.dataclass(frozen=True)
class Followed:
    tensorboard: bool = False
    wandb: str | None = None


@pytest.mark.parametrize(
    ("module", "changes", "extra"),
    [("tensorboardX", {"tensorboard": True}, "tensorboard"), ("wandb", {"wandb": "project"}, "wandb")],
    ids=["tensorboard", "wandb"],
)
def test_what_a_run_is_followed_by_is_looked_for_before_a_model_is_read(monkeypatch, module, changes, extra):
    ranges.check(Followed())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs an extra: pip install 'grpo-jax\[{extra}\]'"):
        ranges.check(Followed(**changes))
    monkeypatch.setitem(sys.modules, module, sys)
    ranges.check(Followed(**changes))
