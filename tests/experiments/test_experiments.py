"""The experiments on Hugging Face checkpoints, on a tiny one that the test makes."""

import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import sys
import types

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from inference_server import serving

from grpo_jax import testing
from grpo_jax.models import hf, lora, sharding
from grpo_jax.models.settings import WeightSettings
from grpo_jax.run import checkpoint, digests, metrics
from grpo_jax.train_step import Step

ROOT = pathlib.Path(__file__).parents[2]
WEIGHTS = "model/model.safetensors"

REWARDS = """
def contains_answer(prompts, completions, answer, **kwargs):
    rewards = []
    for completion, a in zip(completions, answer):
        right = str(a) in completion
        rewards.append(1.0 if right else (-0.1 if len(completion) > 200 else 0.0))
    return rewards

def brevity(completions):
    return [1.0 / (1 + len(c if isinstance(c, str) else c[0]["content"])) for c in completions]

def broken(prompts, completions, **kwargs):
    raise LookupError("the verifier is down")

calls = 0

def breaks_later(prompts, completions, **kwargs):
    global calls
    calls += 1
    if calls > 3:
        raise LookupError("the verifier is down")
    return [float(i) for i in range(len(completions))]

def make(scale=2.0):
    def made(completions, log_metric, **kwargs):
        log_metric("made/calls", 1.0)
        return [scale * (i % 3) for i in range(len(completions))]
    return made

def wants_more(completions, solution):
    return [0.0] * len(completions)

def compares(completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]

compares.group_size = 2

def asks_where(completions, trainer_state, log_metric):
    log_metric("place", trainer_state.global_step + 0.1 * trainer_state.max_steps)
    return [float(i % 2) for i in range(len(completions))]

def too_few(prompts, completions, **kwargs):
    return [1.0]

def equal(completions):
    return [1.0] * len(completions)

def by_words(prompts, steps, answer, **kwargs):
    return [[float(len(step.split())) for step in cut] for cut in steps]

def answer(row, messages):
    from grpo_jax.environments import Turn
    if "e" in messages[-1]["content"] and len(messages) > 2:
        raise LookupError("the game is broken")
    return Turn("go on", reward=0.25 * (1 + len(messages[-1]["content"]) % 2))

def counts_turns(completions, turn_rewards, **kwargs):
    assert all(m["role"] == ("user" if n % 2 else "assistant") for c in completions for n, m in enumerate(c))
    return [float(len(given) % 2) for given in turn_rewards]

def by_surprise(rewards, mask, experience):
    surprise = -experience.rollout.log_probs.mean(-1)
    return surprise - surprise.mean(-1, keepdims=True)
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where dataclasses looks annotations up
    spec.loader.exec_module(module)
    return module


grpo, sft = load("grpo"), load("sft")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint with a BPE tokenizer and chat template, data as GSM8K has it, and reward functions."""
    folder = tmp_path_factory.mktemp("files")
    testing.tiny_checkpoint(folder / "model")
    rows = [{"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
            for a in range(5) for b in range(4)]  # fmt: skip
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"prompt": [{"role": "user", "content": row["question"]}], "answer": 7} for row in rows]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    pairs = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def _working_folder(files, monkeypatch):
    monkeypatch.chdir(files)


def test_a_tokenizer_larger_than_the_model_is_refused_before_the_model_is_loaded(files, tmp_path, monkeypatch):
    model = shutil.copytree(files / "model", tmp_path / "model")
    fields = json.loads((model / "config.json").read_text()) | {"vocab_size": 8}
    (model / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(hf, "load_pretrained", lambda *arguments, **settings: pytest.fail("the model was loaded"))
    for run in (
        lambda: grpo.train(settings(files, tmp_path / "a", model=str(model))),
        lambda: sft.train(sft.Config(model=str(model), data=files / "pairs.jsonl", run_dir=tmp_path / "b")),
    ):
        with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and .* only 8"):
            run()


def settings(files, run_dir, **changes):
    return grpo.Config(**{
        "model": str(files / "model"),
        "data": files / "gsm8k.jsonl",
        "reward": ("my_rewards:contains_answer",),
        "run_dir": run_dir,
        "prompt_column": "question",
        "answer_after": "####",
        "compute_dtype": "float32",
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_tokens": 8,
        "bucket": 64,  # chats are as wide as prompts without a template, so that most runs are of the same programs
        "max_prompt_tokens": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "eval_batch": 4,
        "evaluate_every": 1,
    } | changes)  # fmt: skip


def train_in(folder, config):
    """The run of `config` from a folder, for fixtures of the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return grpo.train(config)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """Six steps with an evaluation split, two rewards, a KL term, a chat template, several updates per step."""
    run_dir = tmp_path_factory.mktemp("finished")
    config = settings(
        files, run_dir, steps=6, save_every=2, export_every=3, eval_rows=5, evaluate_every=3, chat=True,
        reward=("my_rewards:contains_answer", "my_rewards:brevity"), reward_weights=(1.0, 0.5), beta=0.01,
        iterations=2, minibatches=2,
    )  # fmt: skip
    train_in(files, config)
    return config


def test_a_run_measures_evaluates_and_exports(finished):
    lines = metrics.read(finished.run_dir)
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[6].keys() == {"step", "eval/reward", "eval/contains_answer", "eval/brevity"}
    shown = metrics.read(finished.run_dir, metrics.COMPLETIONS_FILE)
    assert [line["step"] for line in shown] == [0, 0, 0, 0]
    assert shown[0].keys() == {"step", "prompt", "completion", "contains_answer", "brevity"}
    lines, rates = lines[:6], [line["learning_rate"] for line in lines[:6]]
    np.testing.assert_allclose(rates, [0.5e-3, *[1e-3] * 5], rtol=1e-6)
    for name in ("reward", "reward/contains_answer", "reward/brevity", "kl", "entropy", "ratio_max", "grad_norm"):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert [("eval/reward" in line) for line in lines] == [True, False, False, True, False, False]
    assert lines[2]["reward"] == pytest.approx(lines[2]["reward/contains_answer"] + 0.5 * lines[2]["reward/brevity"])
    assert {"step_3", "step_6", "metrics.png"} <= {path.name for path in finished.run_dir.iterdir()}


def test_the_export_is_what_was_trained(finished, files):
    policy, exported = hf.load_pretrained(finished.run_dir / "step_6")
    _, before = hf.load_pretrained(files / "model")
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), exported, before)
    assert all(jax.tree.leaves(changed))
    assert hf.load_tokenizer(finished.run_dir / "step_6")("What")["input_ids"]
    assert policy.config.vocab_size == hf.load_pretrained(files / "model")[0].config.vocab_size


def test_a_run_that_an_exception_of_a_reward_stopped_ends_as_one_that_was_not(finished, tmp_path):
    class Stop(Exception):
        pass

    my_rewards = importlib.import_module("my_rewards")
    calls = 0

    def contains_answer(prompts, completions, answer, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:  # two of the evaluation before training, then the third step's
            raise Stop
        return my_rewards.contains_answer(prompts, completions, answer)

    stopping = types.SimpleNamespace(contains_answer=contains_answer, brevity=my_rewards.brevity)
    config = dataclasses.replace(finished, run_dir=tmp_path, stop_after_failed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "my_rewards", stopping)
        with pytest.raises(Stop) as raised:
            grpo.train(config)
    assert "contains_answer" in raised.value.__notes__[0]
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1]
    assert (tmp_path / "checkpoints" / "2").is_dir()
    grpo.train(config)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished.run_dir / "metrics.jsonl").read_bytes()
    files = [run_dir / "step_6" / "model.safetensors" for run_dir in (tmp_path, finished.run_dir)]
    chex.assert_trees_all_equal(*map(safetensors.numpy.load_file, files))


@pytest.fixture(scope="module")
def stopping(files, tmp_path_factory):
    """The folder of a run whose completions end at letters, and which is evaluated in groups."""
    run_dir = tmp_path_factory.mktemp("stopping")
    config = settings(
        files, run_dir, stop=LETTERS, reward=("my_rewards:asks_where", "my_rewards:compares"), eval_rows=4,
        eval_group_size=2,
    )  # fmt: skip
    train_in(files, config)
    return run_dir


LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def test_rewards_see_the_place_in_the_run_and_groups_are_evaluated_as_groups(stopping):
    lines = metrics.read(stopping)
    assert [line.get("place") for line in lines] == [pytest.approx(0.2), pytest.approx(1.2), None]
    assert [line["eval/compares"] for line in lines] == [0.5] * 3


def test_completions_end_at_stop_strings(stopping):
    line = metrics.read(stopping)[0]
    assert line["truncated"] < 0.5
    assert line["length"] < 6
    shown = [line["completion"] for line in metrics.read(stopping, metrics.COMPLETIONS_FILE)]
    assert any(set(LETTERS) & set(text) for text in shown)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the environment failed:RuntimeWarning")
def test_a_run_talks_with_an_environment_and_shows_who_wrote_what(files, tmp_path):
    config = settings(
        files, tmp_path, steps=1, chat=True, max_tokens=64, minibatches=2, max_turns=2, group_size=4,
        environment="my_rewards:answer", stop=tuple("abcdefghijklmnopqrstuvwxyz"),
        reward=("grpo_jax.rewards:environment", "my_rewards:counts_turns"),
    )  # fmt: skip
    grpo.train(config)
    line = metrics.read(tmp_path)[0]
    assert 1 < line["turns"] <= 2
    assert 0.25 < line["reward/environment"] < 1
    assert line["grad_norm"] > 0
    shown = [line["turns"] for line in metrics.read(tmp_path, metrics.COMPLETIONS_FILE)]
    assert all([turn["by"] for turn in turns] == ["policy", "environment", "policy"][: len(turns)] for turns in shown)
    (middle,) = {turns[1]["text"].removeprefix("<|im_end|>") for turns in shown if len(turns) > 1}
    assert middle == "\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"


def test_an_advantage_of_ones_own_may_see_log_probs(files, tmp_path):
    """All rewards are equal, so that without the log-probs nothing would be learned."""
    sys.modules.pop("my_rewards", None)
    equal = {"reward": ("my_rewards:equal",), "show_every": 0, "steps": 3}
    grpo.train(settings(files, tmp_path, advantage="my_rewards:by_surprise", **equal))
    lines = metrics.read(tmp_path)[:3]
    assert [line["reward"] for line in lines] == [1.0] * 3
    assert any(line["grad_norm"] > 0 for line in lines)
    assert not (tmp_path / metrics.COMPLETIONS_FILE).exists()


@pytest.fixture(scope="module")
def of_messages(files, tmp_path_factory):
    """A run without a warm-up, whose rate falls, on prompts that are messages."""
    config = settings(
        files, tmp_path_factory.mktemp("messages"), data=files / "chats.jsonl", prompt_column="prompt",
        answer_after=None, reward=("my_rewards:brevity",), warmup_steps=0, decay="linear", steps=4,
    )  # fmt: skip
    train_in(files, config)
    return config


def test_prompts_as_messages_give_completions_as_messages(of_messages):
    assert metrics.read(of_messages.run_dir)[-1]["reward/brevity"] > 0


def test_a_warm_up_of_0_trains_at_the_full_rate_from_the_first_update(of_messages):
    rates = [line["learning_rate"] for line in metrics.read(of_messages.run_dir)[:4]]
    np.testing.assert_allclose(rates, [1e-3, 7.5e-4, 5e-4, 2.5e-4], rtol=1e-6)
    with pytest.raises(ValueError, match="steps: 4 -> 5"):  # the decay would be another one
        grpo.train(dataclasses.replace(of_messages, steps=5))


def test_a_run_is_not_resumed_on_other_inputs_under_the_same_names(files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    shutil.copy(files / "gsm8k.jsonl", tmp_path / "rows.jsonl")
    config = settings(files, tmp_path / "run", model=str(tmp_path / "model"), data=tmp_path / "rows.jsonl", steps=1)
    grpo.train(config)
    rows, weights, template = (tmp_path / name for name in ("rows.jsonl", WEIGHTS, "model/chat_template.jinja"))
    heavier = {name: tensor * 1.5 for name, tensor in safetensors.numpy.load_file(weights).items()}
    for path, other, said in (
        (rows, b"".join(rows.read_bytes().splitlines(keepends=True)[::-1]), "the data to train on"),
        (weights, safetensors.numpy.save(heavier), "the weights of the model"),
        (template, template.read_bytes() + b"\n", "the tokenizer or its template"),
    ):
        kept = path.read_bytes()
        path.write_bytes(other)
        with pytest.raises(ValueError, match=f"not what the run began with: {said}"):
            grpo.train(config)
        path.write_bytes(kept)


@pytest.mark.parametrize(
    ("loss", "changes"),
    [("dr_grpo", {}), ("dapo", {"epsilon_high": 0.3}), ("gspo", {}), ("grpo_jax.losses:grpo", {"epsilon": 0.1})],
)
def test_any_loss_is_taken_by_name_with_the_settings_that_it_has(files, loss, changes):
    made = settings(files, files, loss=loss, **changes).make_loss(max_tokens=8)
    assert callable(made)


def test_a_loss_refuses_settings_that_it_does_not_have(files):
    with pytest.raises(ValueError, match=r"the loss grpo_jax.losses:sft has no setting epsilon"):
        settings(files, files, loss="grpo_jax.losses:sft", epsilon=0.1).make_loss(max_tokens=8)


def test_batches_that_a_reward_raises_on_are_masked_until_the_third_in_a_row(files, tmp_path):
    sys.modules.pop("my_rewards", None)
    with (
        pytest.raises(LookupError, match="the verifier is down"),
        pytest.warns(RuntimeWarning, match="breaks_later failed on a batch of 4 completions"),
    ):
        # Nothing is learned from the other reward alone.
        grpo.train(settings(files, tmp_path, steps=9, reward=("my_rewards:breaks_later", "my_rewards:brevity")))
    lines = metrics.read(tmp_path)
    assert [line["breaks_later/failed"] for line in lines] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert [line["unscored/breaks_later"] for line in lines] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert [line["grad_norm"] for line in lines][3:] == [0.0, 0.0]
    assert (tmp_path / "checkpoints" / "5").is_dir()


@pytest.mark.slow
def test_an_evaluation_that_a_reward_raises_on_is_not_the_best(files, tmp_path, monkeypatch):
    failing = types.SimpleNamespace(contains_answer=_fails_on_calls({8}, lambda completions: [1.0] * len(completions)))
    monkeypatch.setitem(sys.modules, "my_rewards", failing)
    config = settings(files, tmp_path, steps=2, save_every=1, eval_rows=4, eval_batch=2)
    with pytest.warns(RuntimeWarning, match="contains_answer failed"):
        grpo.train(config)  # calls 1, 2, 4, 5, 7 and 8 are of evaluations
    assert [line["eval/reward"] for line in metrics.read(tmp_path)] == [1.0, 1.0, None]
    assert not (tmp_path / "best").exists()


def _fails_on_calls(numbers, function):
    """A reward function that raises on some of its calls, counted from 1."""
    calls = 0

    def contains_answer(completions, **kwargs):
        nonlocal calls
        calls += 1
        if calls in numbers:
            raise LookupError("the verifier is down")
        return function(completions)

    return contains_answer


@pytest.mark.slow
def test_micro_batches_are_chosen_from_the_memory_of_the_device(files, tmp_path, monkeypatch, capsys):
    plan, make, peaks, used = grpo.memory.plan, grpo.make_train_step, {}, []

    def noted_plan(*arguments, updates, **settings):
        planned = plan(*arguments, updates=updates, **settings)
        peaks[updates.micro_batches] = planned.peak
        return planned

    def noted_step(*arguments, updates, **settings):
        used.append(updates.micro_batches)
        return make(*arguments, updates=updates, **settings)

    monkeypatch.setattr(grpo.memory, "plan", noted_plan)
    monkeypatch.setattr(grpo, "make_train_step", noted_step)
    wide = {"group_size": 16, "steps": 1}  # so that completions take more than weights
    with pytest.raises(ValueError, match="one prompt at a time takes"):
        grpo.train(settings(files, tmp_path / "none", memory_gib=1e-6, **wide))
    assert peaks[2] < peaks[1]
    grpo.train(settings(files, tmp_path / "two", memory_gib=(peaks[1] + peaks[2]) / 2 / 2**30, **wide))
    assert used == [2]
    assert "micro-batches with which a step fits" in capsys.readouterr().out


def test_a_run_whose_updates_are_not_finite_stops_with_its_state_saved(files, tmp_path):
    broken = {"learning_rate": 1e30, "warmup_steps": 20, "steps": 9, "stop_after_skipped": 2}
    broken["reward"] = ("my_rewards:brevity",)
    with pytest.raises(FloatingPointError, match="the last 2 updates were not finite"):
        grpo.train(settings(files, tmp_path, **broken))
    lines = metrics.read(tmp_path)
    skipped = np.array([line["skipped"] for line in lines])
    assert skipped[-2:].tolist() == [1.0, 1.0]
    made = np.arange(len(lines)) - (skipped.cumsum() - skipped)  # updates before each step: those left out do not count
    np.testing.assert_allclose([line["learning_rate"] for line in lines], 1e30 * (made + 1) / 21, rtol=1e-6)
    assert len(lines) < 9
    assert (tmp_path / "checkpoints" / str(len(lines))).is_dir()


def test_a_broken_reward_shows_before_the_first_step_where_there_is_an_evaluation(files, tmp_path):
    with pytest.raises(LookupError):
        grpo.train(settings(files, tmp_path, reward=("my_rewards:broken",), eval_rows=4, stop_after_failed=1))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_attention_that_was_asked_for_is_the_networks(files, tmp_path):
    with pytest.raises(ValueError, match="cuDNN's flash attention computes in bfloat16 or float16, not in float32"):
        grpo.train(settings(files, tmp_path, attention="cudnn", compute_dtype="float32"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": ("my_rewards:absent",)}, r"my_rewards has no function 'absent'"),
        ({"reward": ("contains_answer",)}, r"named module:function.* got 'contains_answer'"),
        ({"prompt_column": "text"}, r"gsm8k.jsonl.*1: no column text"),
        ({"max_prompt_tokens": 3}, r"gsm8k.jsonl:\d+: the prompt has \d+ tokens and the limit is 3"),
        ({"eval_rows": 20}, r"20 rows leaves none of the 20 rows"),
        ({"reward": ("my_rewards:wants_more",)}, r"wants_more requires solution, and the data has the columns"),
        ({"reward": ("my_rewards:compares",), "eval_rows": 4}, r"groups of 2 completions .* --eval-group-size 2"),
        ({"memory_gib": 1.0, "micro_batches": 2}, r"give no --micro-batches 2"),
        ({"group_size": 1}, r"at least 2 completions to compare, got --group-size 1"),
        ({"baseline_decay": 0.9}, r"--baseline-decay 0.9 is of --advantage spo and rae, not group_advantages"),
        ({"advantage": "rae", "baseline_half_life": 0.1}, r"--baseline-half-life 0.1 is of --advantage spo without"),
        ({"prompts_per_step": 3, "minibatches": 2}, r"3 prompts do not divide into 2 minibatches"),
        ({"reward_weights": (1.0, 2.0)}, r"2 weights for 1 reward functions"),
        ({"reward": ("my_rewards:brevity", "my_rewards:brevity")}, r"one name each, got brevity, brevity"),
        ({"overlap": -1}, r"--overlap is at least 0, got -1"),
        ({"server": "http://a", "sample_weights": "int8"}, r"--sample-weights and --memory-gib are about sampling in"),
        ({"stop_after_failed": 0}, r"--stop-after-failed is at least 1, got 0"),
        ({"evaluate_every": 0}, r"--evaluate-every is at least 1, got 0"),
        ({"weight_decay": float("nan")}, r"--weight-decay is a number, got nan"),
        ({"eval_data": pathlib.Path("gsm8k.jsonl"), "eval_rows": 2}, r"--eval-rows 2 are held out of --data"),
        ({"loss": "ppo"}, r"grpo_jax.losses has no function 'ppo'"),
        ({"attention": "flash"}, r"grpo_jax.models.attention has no function 'flash'"),
        ({"attention": "splash", "pack": True}, r"--attention splash .* leave out --pack"),
        (
            {"lora_rank": 4, "lora_targets": ("gate",)},
            r"'gate' is no linear layer of the decoder; near it are gate_proj",
        ),
        ({"lora_rank": 0}, r"the rank of q_proj is a whole number from 1 on, got 0"),
        ({"quantize": "nf4"}, r"--quantize nf4 is of adapters: give a --lora-rank, too"),
        ({"export": "adapters"}, r"--export adapters is of adapters"),
        ({"lora_alpha": 16.0}, r"--lora-alpha 16.0 is of adapters"),
        ({"model": "no/such folder"}, r"neither a folder nor the id of a repository"),
        ({"decay": "cosine", "warmup_steps": 99}, r"a decay after 99 steps of warm-up needs more steps than those"),
        ({"load_balance": 0.1, "record_experts": True}, r"no mixture of experts: leave out --record-experts and --lo"),
        ({"reward": ()}, r"there is no reward function"),
        ({"learning_rate": 0.0}, r"the learning rate is above 0, got 0.0"),
        ({"reward": ("grpo_jax.rewards:exact_answer(column='final')",)}, r"exact_answer requires final, and the data"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(files, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(hf, "load_pretrained", lambda *arguments, **settings: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        grpo.train(settings(files, tmp_path, **changes))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_clip_of_one_update_and_other_settings_without_effect_are_told(files, tmp_path, monkeypatch, capsys):
    """With one update of a rollout the ratio is 1, whatever it is clipped to."""

    class Loaded(Exception): ...

    def load(*arguments, **settings):
        raise Loaded

    monkeypatch.setattr(hf, "load_pretrained", load)
    for changes in ({"minibatches": 1}, {"minibatches": 2}, {"minibatches": 1, "overlap": 1}):
        with pytest.raises(Loaded):
            grpo.train(settings(files, tmp_path, epsilon=0.1, held_out_every=3, **changes))
        said = capsys.readouterr().out
        assert ("--epsilon 0.1 has no effect without several updates" in said) == (changes == {"minibatches": 1})
        assert "--held-out-every 3 has no effect without --held-out" in said


def test_a_mesh_is_asked_for_where_there_are_several_processes(files, tmp_path, monkeypatch):
    for name in ("process_count", "device_count"):
        monkeypatch.setattr(jax, name, lambda: 2)
    with pytest.raises(ValueError, match="how the 2 devices of the 2 processes share the work: --mesh fsdp=2"):
        grpo.check(settings(files, tmp_path))
    mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"))
    monkeypatch.setattr(sharding, "parse", lambda text: mesh)
    assert grpo.check(settings(files, tmp_path, mesh="fsdp=2", pack=True))[1] is mesh
    for changes, message in (
        ({"pack": True, "micro_batches": 2}, "prompts are divided, and 1 at a time do not divide over --mesh fsdp=2"),
        ({"slots": 3}, "3 slots do not divide over data=1, fsdp=2: take a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo.check(settings(files, tmp_path, mesh="fsdp=2", **changes))
    talking = {"mesh": "fsdp=2", "tools": ("my_tools:add",)}
    assert grpo.check(settings(files, tmp_path, **talking))[1] is mesh
    with pytest.raises(ValueError, match="of several processes are not held ahead: leave out --overlap 2"):
        grpo.check(settings(files, tmp_path, **talking, overlap=2))


def test_a_wrong_number_of_rewards_is_told(files, tmp_path):
    with pytest.raises(ValueError, match=r"too_few returned 1 values for 4 completions"):
        grpo.train(settings(files, tmp_path, reward=("my_rewards:too_few",), stop_after_failed=1))


def test_the_files_of_all_that_is_named_are_digested(files, tmp_path, monkeypatch):
    names = ("loss_of_mine", "advantage_of_mine", "transform_of_mine", "maker_of_mine", "steps_of_mine")
    for name in names:
        (tmp_path / f"{name}.py").write_text(
            "from grpo_jax.losses import grpo\nfrom grpo_jax.rewards import exact_answer\n"
            "def advantage(rewards, mask): return rewards\n"
            "def transform(experience): return experience, {}\n"
            "def grade(prompts, steps, **kwargs): return [[1.0 for step in cut] for cut in steps]\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))

    class Digested(Exception): ...

    def of_run(*arguments, code, **inputs):
        raise Digested(*digests.of_code(code))

    monkeypatch.setattr(grpo.digests, "of_run", of_run)
    named = {"loss": "loss_of_mine:grpo", "advantage": "advantage_of_mine:advantage"}
    named |= {"transform": ("transform_of_mine:transform",), "reward": ("maker_of_mine:exact_answer()",)}
    named |= {"step_reward": "steps_of_mine:grade"}
    with pytest.raises(Digested) as found:
        grpo.train(settings(files, tmp_path / "run", **named))
    assert {*found.value.args} == {f"the code of {name}.py" for name in names}


def test_a_malformed_line_is_refused_with_its_number(files, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": oops}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: not JSON"):
        grpo.train(settings(files, tmp_path / "run", data=tmp_path / "bad.jsonl"))


def test_a_finished_run_is_not_trained_on_under_other_settings(finished, monkeypatch):
    monkeypatch.setattr(hf, "load_pretrained", lambda *args, **settings: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.01"):
        grpo.train(dataclasses.replace(finished, learning_rate=0.01))


def test_objectives_advantages_and_transforms_of_2026_are_reached_by_their_names(files, tmp_path):
    config = settings(
        files, tmp_path, loss="dppo", advantage="pass_at_k(2)", transform=("second_moment(0.5)", "high_covariance()"),
        score_old=True, group_size=4, reward=("my_rewards:brevity",), top_p=0.8,
    )  # fmt: skip
    grpo.train(config)
    line = metrics.read(tmp_path)[0]
    assert line["outside_truncation"] == 0
    assert line["sampler_gap"] < 1e-3
    assert line["second_moment"] < 1e-5
    assert {"sampler_gap/3", "clip_low", "clip_high"} <= set(line)
    config = settings(files, tmp_path / "other", loss="kl_cov", advantage="optimal_token_advantages")
    with pytest.raises(ValueError, match="score_old=True"):
        grpo.train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0.01}, r"--epochs 0.01 of \d+ rows do not fill a batch of 4"),
        ({"warmup_fraction": 1.0}, r"a decay after \d+ steps of warm-up needs more steps than those"),
        ({"learning_rate": 0.0}, r"the learning rate is above 0, got 0.0"),
    ],
)
def test_supervised_learning_that_would_train_nothing_is_refused_before_the_model_is_loaded(
    files, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(hf, "load_pretrained", lambda *arguments, **settings: pytest.fail("the model was loaded"))
    about = {"max_prompt_tokens": 16, "max_tokens": 8, "bucket": 8, "batch_size": 4} | changes
    with pytest.raises(ValueError, match=message):
        sft.train(sft.Config(model=str(files / "model"), data=files / "pairs.jsonl", run_dir=tmp_path, **about))


def test_supervised_learning_lowers_the_loss_on_completions_and_exports(files, tmp_path):
    config = sft.Config(
        model=str(files / "model"), data=files / "pairs.jsonl", run_dir=tmp_path, epochs=20, batch_size=4,
        learning_rate=1e-2, bucket=8, max_prompt_tokens=16, max_tokens=8, eval_rows=4, compute_dtype="float32",
        micro_batches=2, save_every=40,
    )  # fmt: skip
    sft.train(config)
    losses = [line["loss"] for line in metrics.read(tmp_path)[:-1]]
    assert losses[-1] < 0.5 * losses[0]
    assert "eval/loss" in metrics.read(tmp_path)[-1]
    policy, params = hf.load_pretrained(tmp_path / "model")
    assert policy.config.hf_config
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = sft.train(config)  # is finished, and does nothing
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, again)))


@pytest.mark.slow
def test_supervised_learning_of_adapters_exports_the_merged_model(files, tmp_path):
    config = sft.Config(
        model=str(files / "model"), data=files / "pairs.jsonl", run_dir=tmp_path, epochs=8, batch_size=4, bucket=8,
        max_prompt_tokens=16, max_tokens=8, eval_rows=4, compute_dtype="float32", save_every=40, lora_rank=8,
        learning_rate=1e-2,
    )  # fmt: skip
    adapters = sft.train(config)
    losses = [line["eval/loss"] for line in metrics.read(tmp_path) if "eval/loss" in line]
    assert losses[-1] < losses[0]
    policy, base = hf.load_pretrained(files / "model")
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 2))
    _, frozen = config.divide(policy, base, key)
    chex.assert_trees_all_equal(hf.load_pretrained(tmp_path / "model")[1], lora.merge(adapters, frozen))


def test_adapters_take_ten_times_the_rate_unless_one_is_given():
    whole, adapters = WeightSettings(), WeightSettings(lora_rank=8)
    assert (whole.rate(None, 1e-6), adapters.rate(None, 1e-6), adapters.rate(3e-6, 1e-6)) == (1e-6, 10 * 1e-6, 3e-6)


def test_an_export_is_of_the_dtype_that_is_asked_for(files, tmp_path):
    policy, params = hf.load_pretrained(files / "model")
    state, about = types.SimpleNamespace(params=params, frozen=None), {"base_model": "unused"}
    WeightSettings(export_dtype="bfloat16").save(policy, state, tmp_path / "half", **about)
    WeightSettings().save(policy, state, tmp_path / "whole", **about)
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    chex.assert_trees_all_equal(hf.load_pretrained(tmp_path / "half")[1], rounded)
    chex.assert_trees_all_equal(hf.load_pretrained(tmp_path / "whole")[1], params)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    with pytest.raises(ValueError, match="--export-dtype bfloat16 is of whole models"):
        WeightSettings(lora_rank=2, export="adapters", export_dtype="bfloat16")


@pytest.mark.slow
def test_adapters_over_a_quantised_base_are_exported_and_a_run_goes_on_to_the_same_bits(files, tmp_path):
    settings_of = {
        "lora_rank": 2,
        "quantize": "nf4",
        "export": "adapters",
        "beta": 0.01,
        "eval_rows": 4,
        "save_every": 1,
    }
    whole = grpo.train(settings(files, tmp_path / "whole", **settings_of))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "2")  # as if it had been killed after its first step
    resumed = grpo.train(settings(files, tmp_path / "stopped", **settings_of))
    chex.assert_trees_all_equal(resumed, whole)
    assert metrics.read(tmp_path / "stopped") == metrics.read(tmp_path / "whole")
    assert "eval/reward" in metrics.read(tmp_path / "whole")[-1]
    policy, base = hf.load_pretrained(files / "model", quantize="nf4")
    read, _ = hf.load_adapters(policy, base, tmp_path / "whole" / "step_2")
    chex.assert_trees_all_equal(read, whole)
    with pytest.raises(ValueError, match=r"was trained on another base.*model'\. any_base=True"):
        hf.load_adapters(*hf.load_pretrained(files / "model"), tmp_path / "whole" / "step_2")
    hf.load_adapters(*hf.load_pretrained(files / "model"), tmp_path / "whole" / "step_2", any_base=True)


@pytest.fixture(scope="module")
def base(files):
    """A base model: its template ends turns with a token that nothing else names."""
    shutil.copytree(files / "model", files / "base")
    tokenizer = hf.load_tokenizer(files / "base")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(files / "base")
    (files / "base" / "generation_config.json").unlink()
    return (
        files / "base",
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )


def test_chats_of_a_base_model_end_with_the_templates_turn_however_they_are_asked_for(
    files, base, tmp_path, monkeypatch
):
    class Seen(Exception):
        pass

    def seen(config, tokenizer, eos_ids):
        raise Seen(eos_ids)

    monkeypatch.setattr(grpo.Config, "make_sampler", seen)
    model, text, turn = base
    chats = {"data": files / "chats.jsonl", "prompt_column": "prompt", "answer_column": "answer", "answer_after": None}
    for changes, ends in (
        ({"chat": False}, (text,)), ({"chat": True}, (text, turn)), ({"chat": False, "system": "S"}, (text, turn)),
        ({"chat": False} | chats, (text, turn)),
    ):  # fmt: skip
        with pytest.raises(Seen) as raised:
            grpo.train(settings(files, tmp_path, model=str(model), **changes))
        assert raised.value.args[0] == ends


def test_demonstrations_are_read_as_prompts_are(files, base, tmp_path):
    model, text, turn = base
    tokenizer = hf.load_tokenizer(model)

    def read(*rows, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = sft.Config(model=str(model), data=tmp_path / "rows.jsonl", **changes)
        _, pairs, eos_ids = sft.read(config, tokenizer)
        return [completion[-1] for _, completion in pairs], eos_ids

    plain, asked = {"prompt": "a", "completion": "b"}, {"role": "user", "content": "a"}
    assert read(plain) == ([text], [text])
    assert read(plain, chat=True) == read({"prompt": [asked], "completion": "b"}) == ([turn], [text, turn])
    assert read(plain, eos="<|im_start|>")[0] == [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    assert read({"a": {"p": "x"}, "completion": "b"}, prompt_column="a.p")[0] == [text]
    for bad, message in (
        ({"prompt": [asked]}, "2: prompt is messages, and text in the first row"),
        ({"prompt": [{"content": "a"}]}, "2: a message of prompt has a role and a content"),
        ({"prompt": 7}, "2: prompt is text or a list of chat messages, got 7"),
        ({"prompt": {"a": 1}}, "2: prompt is text or a list"),
        ({"prompt": ["a", "b"]}, "2: a message of prompt has a role"),
        ({"prompt": ""}, "2: prompt is empty: ''"),
        ({"completion": 7}, "2: completion is text or a list of one message, got 7"),
        ({"completion": {"a": 1}}, "2: completion is text or a list of one message"),
        ({"completion": None}, "2: no column completion"),
    ):
        with pytest.raises(ValueError, match=f"rows.jsonl:{message}"):
            read(plain, plain | bad)


def test_thinking_and_the_date_reach_the_template_in_both_scripts(files, base, tmp_path):
    model, _, _ = base
    tokenizer = hf.load_tokenizer(model)
    tokenizer.chat_template = "{{ date_string }} {{ enable_thinking }} " + tokenizer.chat_template
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    about = {"chat": True, "thinking": False, "date_string": "26 Jul 2024"}
    _, ((shown, _),), _ = sft.read(sft.Config(model=str(model), data=tmp_path / "rows.jsonl", **about), tokenizer)
    asked = settings(files, tmp_path, prompt_column="prompt", **about).encode(tokenizer, [row]).prompts[0]
    for ids in (shown, asked):
        assert tokenizer.decode(ids).startswith("26 Jul 2024 False ")


def test_supervised_learning_refuses_a_completion_that_does_not_fit(files, tmp_path):
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: the completion has 2 tokens and the limit is 1"):
        sft.train(sft.Config(model=str(files / "model"), data=files / "pairs.jsonl", run_dir=tmp_path, max_tokens=1))


# ------------------------------------------------------------- sampling ahead


def test_a_copy_of_8_bits_samples_and_learns_and_the_whole_policy_is_evaluated(files, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    given = {}

    def begin(policy, *arguments, **settings):
        given["evaluated"] = policy
        raise Enough

    def train_step(policy, *arguments, **settings):
        given["trained"] = policy
        return Step(lambda *_: None, lambda *_: None)

    monkeypatch.setattr(grpo, "make_mean_rewards", begin)
    monkeypatch.setattr(grpo, "make_train_step", train_step)
    monkeypatch.setattr(grpo.quantized, "sampled", lambda policy, kind: ("in 8 bits", policy))
    with pytest.raises(Enough):
        grpo.train(settings(files, tmp_path, sample_weights="int8"))
    assert given["trained"] == ("in 8 bits", given["evaluated"])


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [0, 1])
def test_running_baselines_and_the_loss_scale_go_on_where_they_were(files, tmp_path, overlap):
    """In float16, from a copy of 8 bits, one completion per prompt, whose steps are rewarded, too."""
    settings_of = {
        "advantage": "spo", "baseline_column": "answer", "compute_dtype": "float16", "sample_weights": "int8",
        "score_old": True, "group_size": 1, "save_every": 1, "overlap": overlap, "reward": ("my_rewards:make()",),
        "step_reward": "my_rewards:by_words", "step_split": "lines", "baseline_half_life": 0.05,
    }  # fmt: skip
    grpo.train(settings(files, tmp_path / "stopped", steps=2, **settings_of))
    resumed = grpo.train(settings(files, tmp_path / "stopped", steps=4, **settings_of))
    whole = grpo.train(settings(files, tmp_path / "whole", steps=4, **settings_of))
    chex.assert_trees_all_equal(resumed, whole)
    lines = metrics.read(tmp_path / "whole")
    assert metrics.read(tmp_path / "stopped") == lines
    assert all(line["loss_scale"] == 2.0**15 and line["skipped"] == 0 for line in lines)
    assert all(line["sampler_gap"] > 1e-4 and line["steps"] >= 1 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_a_server_samples_in_training_and_in_evaluations(files, tmp_path, adapters):
    policy, params = hf.load_pretrained(files / "model", compute_dtype="float32")
    with serving(policy, group_size=2, max_tokens=8, width=96) as server:
        server.base = server.weights[None] = params
        changes = {"lora_rank": 2, "learning_rate": 0.5} if adapters else {}
        config = settings(
            files, tmp_path / "run", server=server.url, chat=True, eval_rows=2, steps=3, reward=("my_rewards:make()",),
            **changes,
        )  # fmt: skip
        grpo.train(config)
        routes = [path for path, _ in server.asked]
        temperatures = [content["temperature"] for path, content in server.asked if path == "/v1/completions"]
    lines = metrics.read(config.run_dir)
    assert all(abs(line["sampler_kl"]) < 1e-4 for line in lines[:3])  # of the policy of the step
    assert all("eval/reward" in line for line in lines)
    assert routes.count("/v1/load_lora_adapter" if adapters else "/collective_rpc") == 4  # once for each policy
    assert (temperatures.count(0.0), temperatures.count(1.0)) == (4 * 2, 3 * 2)
    assert len(list((config.run_dir / "engine").iterdir())) == 1


def overlapping(files, run_dir, **changes):
    """A learning rate at which one update moves the policy visibly; checkpoints after steps 2, 4 and 6."""
    return settings(
        files,
        run_dir,
        steps=6,
        save_every=2,
        reward=("my_rewards:make()",),
        learning_rate=0.05,
        overlap=1,
        **changes,
    )


@pytest.fixture(scope="module")
def ahead(files, tmp_path_factory):
    """The metrics and the parameters of such a run."""
    config = overlapping(files, tmp_path_factory.mktemp("ahead"))
    params = train_in(files, config)
    return metrics.read(config.run_dir), params


@pytest.mark.slow
def test_sampled_ahead_the_ratio_is_to_the_policy_that_sampled(files, ahead, tmp_path):
    """All steps but the first learn from a batch of the policy before; a checkpoint changes nothing of that."""
    lines, _ = ahead
    assert lines[0]["ratio_max"] == pytest.approx(1.0, rel=1e-5)
    assert min(line["ratio_max"] for line in lines[1:]) > 1.01
    assert [line["made/calls"] for line in lines] == [1.0] * 6
    grpo.train(dataclasses.replace(overlapping(files, tmp_path / "plain"), overlap=0))
    np.testing.assert_allclose([line["ratio_max"] for line in metrics.read(tmp_path / "plain")], 1.0, rtol=1e-5)
    grpo.train(dataclasses.replace(overlapping(files, tmp_path / "other"), save_every=5))
    assert metrics.read(tmp_path / "other") == lines


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["by a kill", "by a signal", "by a reward"])
def test_a_run_that_ended_with_a_batch_in_flight_goes_on_to_the_same_bits(files, ahead, tmp_path, monkeypatch, ended):
    """It ends after step 3 of the 6, and again at step 4 before the next checkpoint is written."""
    config = overlapping(files, tmp_path / "ended", stop_after_failed=1)
    lines, expected = ahead
    with monkeypatch.context() as patch:
        if ended == "by a kill":
            patch.setattr(metrics, "append", _fails_at(3, metrics.append))
        elif ended == "by a signal":
            patch.setattr(metrics, "append", _signals_at(2, metrics.append))
        else:
            rewarded = importlib.import_module("my_rewards").make()
            failing = _fails_on_calls({4}, lambda completions: rewarded(completions, lambda name, value: None))
            failing.__name__ = "made"
            patch.setattr(importlib.import_module("my_rewards"), "make", lambda: failing)
        with pytest.raises((SystemExit, LookupError, KeyboardInterrupt)):
            grpo.train(config)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", _fails_at(3, metrics.append))
        with pytest.raises(KeyboardInterrupt):
            grpo.train(config)
    chex.assert_trees_all_equal(grpo.train(config), expected)
    if ended != "by a reward":  # the other's first lines have no made/calls
        assert metrics.read(config.run_dir) == lines


@pytest.mark.slow
def test_a_batch_in_flight_that_is_damaged_is_told_by_name(files, ahead, tmp_path, monkeypatch):
    """The run falls back on the checkpoint before, and ends in the same bits."""
    config = overlapping(files, tmp_path / "damaged")
    _, expected = ahead
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", _fails_at(4, metrics.append))
        with pytest.raises(KeyboardInterrupt):
            grpo.train(config)
    with monkeypatch.context() as patch:  # as if one bit of the tokens in flight had been flipped
        patch.setattr(checkpoint, "_read_arrays", _flipped("extra/queue/0/rollout/tokens", checkpoint._read_arrays))
        with pytest.warns(
            UserWarning, match=r"passed over: step 4 \(the digest of extra/queue/0/rollout/tokens differs"
        ):
            chex.assert_trees_all_equal(grpo.train(config), expected)


def _signals_at(step, function):
    """As if the process were asked to stop when it wrote the metrics of a step."""

    def append(run_dir, n, *arguments):
        if n == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(run_dir, n, *arguments)

    return append


def _fails_at(step, function):
    """As if the process had been killed when it wrote the metrics of a step."""

    def append(run_dir, n, *arguments):
        if n == step:
            raise KeyboardInterrupt
        return function(run_dir, n, *arguments)

    return append


def _flipped(path, read):
    """Reads the arrays of step 4 as if those at the path were other ones."""

    def read_arrays(checkpoints, step, leaves, facts):
        if step == 4:
            facts = facts | {path: facts[path] | {"sha256": "another"}}
        return read(checkpoints, step, leaves, facts)

    return read_arrays


@pytest.mark.slow
def test_packing_and_a_profile_change_nothing_of_a_run_but_what_lies_beside_it(files, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "jit", jax.jit.jit)  # programs that no other test has made: they are counted
    for name, changes in (("plain", {}), ("other", {"pack": True, "completion_bucket": 2, "profile": True})):
        # So hot that a tiny model ends its completions at different lengths.
        grpo.train(settings(files, tmp_path / name, steps=3, max_tokens=16, temperature=3.0, seed=1, **changes))
    plain, other = (metrics.read(tmp_path / name) for name in ("plain", "other"))
    assert plain[0].keys() == other[0].keys()
    for name, value in plain[0].items():
        assert other[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert not (tmp_path / "plain" / "trace").exists()
    assert list((tmp_path / "other" / "trace").rglob("*.xplane.pb"))
    timing = [json.loads(line) for line in (tmp_path / "other" / "timing.jsonl").read_text().splitlines()]
    assert all(line.keys() >= {"sample", "reward", "learn", "host", "programs"} for line in timing)
    assert timing[0]["programs"] > 0
