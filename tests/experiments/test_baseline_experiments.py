"""PPO, DPO and the others against GRPO: their samples are equal, memory on paper is that by hand, and both run."""

import csv
import importlib.util
import pathlib
import sys

import jax
import pytest

from grpo_jax.sampling import PolicySampler
from grpo_jax.study import footprints, results
from grpo_jax.train_step import Step
from grpo_jax.types import TrainState

ROOT = pathlib.Path(__file__).parents[2] / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT))  # as for a script there
ppo_memory, ppo_vs_grpo, dpo_vs_grpo = load("ppo_memory"), load("ppo_vs_grpo"), load("dpo_vs_grpo")
sys.path.remove(str(ROOT))
setting = ppo_vs_grpo.setting


# ------------------------------------------------------------------------ equal samples


class Sampled(Exception):
    """Prompts and completions of each; tracing need not go on."""


def tell(sampler, policy, params, prompts, key):
    """In the place of sampling: raises what would be sampled."""
    raise Sampled(prompts.tokens.shape[0], sampler.group_size)


@pytest.mark.parametrize("module", [ppo_vs_grpo, dpo_vs_grpo], ids=lambda module: module.NAME)
def test_every_condition_samples_64_completions_a_step(monkeypatch, module):
    monkeypatch.setattr(PolicySampler, "__call__", tell)
    monkeypatch.setattr(setting, "evaluate", lambda params, config, terms=0: {})
    config = setting.Config(steps=10)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(setting.policy.init, key)
    for condition in {condition.run: condition for condition in module.conditions(config)}.values():
        with pytest.raises(Sampled) as sampled:
            jax.eval_shape(condition.run, key, {**condition.hyper, "params": params})
        assert sampled.value.args == ((64, 1) if "64 x 1" in condition.name else (8, 8)), condition.name


def test_offline_the_start_samples_and_the_policy_learns(monkeypatch):
    told = Step(lambda state, prompts: state.params, lambda *given: given)
    monkeypatch.setattr(dpo_vs_grpo, "make_train_step", lambda *given, **settings: told)
    step = dpo_vs_grpo.sampled_by_the_start()
    state = TrainState("policy", (), None, 0, 0, ref_params="start")
    assert step(state, None) == (state, "start")


def test_the_best_rate_of_a_method_is_that_of_the_highest_mean_over_the_run():
    ends = {("A", 1e-4): (0.2, 0.4), ("A", 3e-4): (0.5, 0.3), ("A", 0.001): (0.4, 0.4), ("B", 1e-4): (0.0, 0.0)}
    rows = [
        {"condition": dpo_vs_grpo.condition_name(method, rate), "seed": seed, "step": step, "greedy": greedy}
        for (method, rate), values in ends.items()
        for seed, end in enumerate(values)
        for step, greedy in ((0, 0.1), (10, end), (20, 0.9))
    ]
    assert dpo_vs_grpo.best_rates(rows) == {"A": 3e-4, "B": 1e-4}


def test_every_method_has_a_run_of_each_rate_and_they_share_a_program():
    found = dpo_vs_grpo.conditions(setting.Config())
    assert len(found) == 9 * len(dpo_vs_grpo.LEARNING_RATES)
    assert len({condition.name for condition in found}) == len(found)
    assert len({condition.run for condition in found}) == 7


# --------------------------------------------------------------------- memory on paper


def by_name():
    return (
        {size.name: size for size in ppo_memory.sizes(smoke=False)},
        {method.name: method for method in ppo_memory.methods(smoke=False)},
    )


def on_paper(size, method):
    init, _ = ppo_memory.programs(size, method)
    return footprints.on_paper(init)


def weights(width, layers, kv_width, inner, words, *, head):
    """Numbers in a Qwen2.5 by hand: queries, keys, values with biases, output, three matrices, and norms."""
    attention = 2 * width * width + 2 * width * kv_width + width + 2 * kv_width
    layer = attention + 3 * width * inner + 2 * width
    return words * width * (2 if head else 1) + layers * layer + width


HALF_B = 494_032_768  # as on the model's card on the Hugging Face hub
SEVEN_B = 7_615_616_512


def test_on_paper_a_critic_as_large_doubles_what_a_step_keeps():
    sizes, methods = by_name()
    assert weights(896, 24, 128, 4864, 151936, head=False) == HALF_B
    found = {name: on_paper(sizes["Qwen2.5-0.5B"], method) for name, method in methods.items()}
    value_head = 896 + 1
    small = weights(448, 12, 64, 2432, 151936, head=False) + 448 + 1
    expected = {  # trained numbers, those of the reference
        "GRPO": (HALF_B, 0),
        "GRPO, reference": (HALF_B, HALF_B),
        "PPO, small critic": (HALF_B + small, 0),
        "PPO, small critic, reference": (HALF_B + small, HALF_B),
        "PPO, large critic": (2 * HALF_B + value_head, 0),
        "PPO, large critic, reference": (2 * HALF_B + value_head, HALF_B),
    }
    assert found.keys() == expected.keys()
    for name, (trained, kept) in expected.items():
        line = found[name]
        assert line["parameters"] == line["gradients"] == 4 * trained, name
        assert line["optimizer"] == 2 * 4 * trained + 4, name  # and the count of its steps
        assert line["reference"] == 4 * kept, name


def test_the_critic_of_a_model_with_a_head_of_its_own_has_none():
    sizes, methods = by_name()
    assert weights(3584, 28, 512, 18944, 152064, head=True) == SEVEN_B
    line = on_paper(sizes["Qwen2.5-7B"], methods["PPO, large critic"])
    assert line["parameters"] == 4 * (2 * SEVEN_B - 152064 * 3584 + 3584 + 1)


def test_shares_are_of_ppo_at_the_same_size():
    names = [*ppo_memory.KEPT, *ppo_memory.HELD]
    lines = [
        {"size": size, "method": method, **dict.fromkeys(names, 2**30), "on paper": paper, "compiled": compiled}
        for size, method, paper, compiled in (
            ("a", "GRPO", 3 * 2**30, 2**30),
            ("a", "PPO, large critic", 6 * 2**30, 4 * 2**30),
            ("b", "GRPO", 2**30, 2**30),
        )
    ]
    header, _, *cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in ppo_memory.table(lines).splitlines()
    ]
    of_ppo = [i for i, name in enumerate(header) if name == "of PPO"]
    assert [[line[i] for i in of_ppo] for line in cells] == [["0.50", "0.25", ""], ["1.00", "1.00", ""], ["", "", ""]]
    assert [line[header.index("on paper")] for line in cells] == ["3", "6", "1"]


def test_by_the_second_a_method_of_half_the_speed_has_made_half_the_steps():
    rows = [
        {"condition": condition, "seed": 0, "step": step, "greedy": step / 100}
        for condition in (ppo_vs_grpo.GRPO, "other")
        for step in (0, 10, 20)
    ]
    *_, first, second = ppo_vs_grpo.seconds_table(rows, {ppo_vs_grpo.GRPO: 0.5, "other": 1.0}).splitlines()
    assert first.split(" | ")[1:] == ["0.5000", "1.00", "0.2 [0.2, 0.2] |"]
    assert second.split(" | ")[1:] == ["1.0000", "2.00", "0.1 [0.1, 0.1] |"]


# -------------------------------------------------------------------------------- smoke


@pytest.mark.smoke
@pytest.mark.parametrize("module", [ppo_vs_grpo, dpo_vs_grpo], ids=lambda module: module.NAME)
def test_a_smoke_run_leaves_results_table_and_figures_in_the_run_folder(tmp_path, module):
    module.experiment(setting.configured(setting.Config(run_dir=tmp_path, smoke=True)))
    folder = tmp_path / "results"
    written = {f"{module.NAME}{end}" for end in (".csv", ".md", ".png")}
    if module is ppo_vs_grpo:
        written |= {f"{module.NAME}_by_second.png"}
    assert {path.name for path in folder.iterdir()} == written
    rows = results.read(folder / f"{module.NAME}.csv")
    assert {row["seed"] for row in rows} == {0, 1}
    assert max(row["step"] for row in rows) == 4


@pytest.mark.smoke
def test_a_smoke_run_of_memory_writes_a_line_and_its_table(tmp_path):
    ppo_memory.experiment(ppo_memory.Config(results=tmp_path, smoke=True))
    with (tmp_path / "ppo_memory.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert int(line["compiled"]) > int(line["parameters"]) + int(line["optimizer"])
    assert 0 < int(line["activations"]) < int(line["learning"])
    assert float(line["seconds of learning"]) > 0
    assert (tmp_path / "ppo_memory.md").read_text().count("\n") == 3
