"""The experiments on tasks, as far as a tiny random model goes: what they do, and nothing about what they reach."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import optax
import pytest
import safetensors.numpy

from grpo_jax import rewards, testing, train_step
from grpo_jax.models import hf
from grpo_jax.run import metrics
from grpo_jax.study import task_runs
from grpo_jax.updates import init_state

ROOT = pathlib.Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.slow
countdown, gsm8k = load("countdown"), load("gsm8k")


def test_countdown_trains_evaluates_exports_and_goes_on(tmp_path, capsys, monkeypatch):
    config = countdown.smoke(countdown.Config(run_dir=tmp_path / "run"))
    results = countdown.train(config)
    lines = metrics.read(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(5))
    assert {"reward/correct", "reward/strict_format", "kl", "repetition", "unscored/correct"} <= set(lines[3])
    assert ["validation/accuracy" in line for line in lines] == [True, False, True, False, True]
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"test/pass@1", "test/pass@2", "ood/pass@2"} <= set(results)
    assert len((tmp_path / "run" / "ood.jsonl").read_text().splitlines()) == 8
    hf.load_pretrained(tmp_path / "run" / "model")
    assert countdown.train(config) == results  # nothing is left to train, and the evaluation repeats itself
    assert "resumed at step 4 of 4" in capsys.readouterr().out
    monkeypatch.setattr(hf, "load_pretrained", lambda *args, **settings: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"beta: 0\.001 -> 0\.5"):
        countdown.train(dataclasses.replace(config, beta=0.5))


def test_a_run_on_a_task_is_not_resumed_on_other_weights(tmp_path):
    config = countdown.smoke(countdown.Config(run_dir=tmp_path / "run"))
    countdown.train(config)
    file = tmp_path / "run" / "tiny" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: 2 * tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(ValueError, match="not what the run began with: the weights of the model"):
        countdown.train(config)


NAMES = {countdown: ("correct", "judge"), gsm8k: ("0", "1")}  # of rewards in the metrics


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_the_format_has_its_weight_and_what_a_reward_logs_is_among_the_metrics(tmp_path, monkeypatch, module):
    def strict_format():
        def judge(completions, log_metric):
            log_metric("judge/faults", 3.0)
            return [float(i % 3) for i in range(len(completions))]

        return judge

    monkeypatch.setattr(rewards, "strict_format", strict_format)
    monkeypatch.setattr(task_runs.TaskRun, "evaluate", lambda *arguments, **settings: {})
    module.train(module.smoke(module.Config(run_dir=tmp_path / "run", format_weight=0.5)))
    for line in metrics.read(tmp_path / "run"):
        correct, formed = (line[f"reward/{name}"] for name in NAMES[module])
        assert line["judge/faults"] == 3.0
        assert formed > 0
        assert line["reward"] == pytest.approx(correct + 0.5 * formed)


def test_gsm8k_trains_under_a_recipe_whose_reference_is_renewed_and_goes_on(tmp_path, capsys):
    config = gsm8k.smoke(gsm8k.Config(run_dir=tmp_path / "run", recipe="r1"))
    results = gsm8k.train(config)
    lines = metrics.read(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(4))
    rate = gsm8k.make_recipe(config).rate
    assert [line["learning_rate"] for line in lines[:3]] == [pytest.approx(float(rate(2 * n))) for n in range(3)]
    assert {"greedy/test/accuracy", "test/pass@2"} <= set(results)
    said = capsys.readouterr().out
    assert "finite" not in said
    assert "DeepSeek-R1 leaves to you:" in said
    assert "@article{guo2025deepseekr1," in said
    assert gsm8k.train(config) == results
    assert "resumed at step 3 of 3" in capsys.readouterr().out


def test_gsm8k_trains_adapters_at_ten_times_the_rate_of_the_recipe(tmp_path):
    config = gsm8k.smoke(gsm8k.Config(run_dir=tmp_path / "run", lora_rank=2, export="adapters"))
    assert gsm8k.make_recipe(gsm8k.Config(lora_rank=2)).learning_rate == pytest.approx(1e-5)
    gsm8k.train(config)
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()


def test_gsm8k_scores_the_old_policy_in_as_many_parts_as_it_learns_in(monkeypatch):
    """In one piece, it would take the memory that micro-batches are there to save."""
    config = gsm8k.Config(recipe="dapo", prompts=8, group_size=2, max_tokens=4, minibatches=2, micro_batches=2)
    rows = []
    score = train_step.score

    def noted(policy, params, rollout, **settings):
        rows.append(rollout.tokens.shape[0])
        return score(policy, params, rollout, **settings)

    monkeypatch.setattr(train_step, "score", noted)
    policy = testing.tiny_policy("qwen3")
    step = gsm8k.make_step(gsm8k.make_recipe(config), config, policy, (0,))
    state = jax.eval_shape(
        lambda key: init_state(policy.init(key), optax.sgd(1.0), key), jax.eval_shape(lambda: jax.random.key(0))
    )
    jax.eval_shape(step.collect, state, testing.random_prompts(0, 8, 4))
    assert rows == [2]


def test_gsm8k_is_run_under_the_recipes_settings_but_for_those_given():
    recipe = gsm8k.make_recipe(gsm8k.Config(group_size=8, learning_rate=3e-6))
    assert (recipe.prompts, recipe.group_size, recipe.max_tokens, recipe.learning_rate) == (16, 8, 1024, 3e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "citation"}, "'citation' is no recipe; there are deepseekmath, "),
        ({"recipe": "nothing"}, "'nothing' is no recipe"),
        ({"recipe": "dapo", "prompts": 64}, "64 prompts do not divide into 16 minibatches of 16 micro-batches"),
        ({"recipe": "gmpo", "micro_batches": 1}, "states no learning rate"),
        ({"recipe": "gspo"}, "GSPO leaves open, and so asks for: prompts, group_size, max_tokens"),
    ],
    ids=["no_recipe", "unknown", "divide", "rate", "open"],
)
def test_gsm8k_refuses_what_is_no_recipe_or_leaves_sizes_open(settings, message):
    with pytest.raises(ValueError, match=message):
        gsm8k.make_recipe(gsm8k.Config(**settings))
