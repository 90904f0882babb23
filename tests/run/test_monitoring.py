"""Checks on made-up histories: each speaks where its fault is, once, and is silent on a run that goes well."""

import functools
import math

import numpy as np
import pytest

from grpo_jax.run import metrics, monitoring
from grpo_jax.run.monitoring import DEFAULT, RunWentWrong, warnings

STEPS = 60


def healthy(steps=STEPS, seed=0):
    """A run that learns: everything moves, with the noise of real steps."""
    rng = np.random.default_rng(seed)
    history = []
    for step in range(steps):
        accuracy = 0.1 + 0.6 * step / STEPS
        spread = math.sqrt(accuracy * (1 - accuracy))
        noise = rng.normal(size=8) * 0.03
        history.append({
            "step": step,
            "truncated": 0.2 + noise[0],
            "zero_variance_groups": 0.3 + noise[1],
            "reward": accuracy + 0.1 * (0.9 + noise[2]) + noise[3],
            "reward_std": spread,
            "reward/accuracy": accuracy + noise[3],
            "reward/accuracy_std": spread,
            "reward/format": 0.9 + noise[2],
            "reward/format_std": 0.3,
            "kl": 0.001 * step + abs(noise[4]) * 0.01,
            "ratio_max": 1.5 + abs(noise[5]),
            "sampler_gap": 0.03 + 0.1 * noise[5],
            "entropy": 0.5 - 0.3 * step / STEPS + noise[6] * 0.1,
            "length": 200 + step,
            "repetition": 0.1 + noise[7],
            "unscored/accuracy": 0.01,
            "accuracy/faults": float(step % 10 == 0),
            "accuracy/timeouts": float(step % 7 == 0),
            "judge/failed": 0.02,
            "skipped": 0.0,
            "grad_norm": 1.0,
            "learning_rate": 1e-6,
        })  # fmt: skip
    return history


def changed(start, **series):
    """The healthy run with metrics replaced from a step on, by a number or a function of the step."""
    history = healthy()
    for line in history[start:]:
        for name, value in series.items():
            name = name.replace("__", "/")
            line[name] = value(line["step"]) if callable(value) else value
    return history


def spoken(history, **settings):
    """`(step, text)` of all that a run says from its first step to its last."""
    return [(end - 1, text) for end in range(1, len(history) + 1) for text in warnings(history[:end], **settings)]


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_goes_well_hears_nothing(seed):
    assert spoken(healthy(seed=seed)) == []


# What goes wrong from step 40 on, the check that sees it, by when, and what it says of it and advises.
FAULTS = {
    "truncated": (changed(40, truncated=0.9), "mostly_truncated", 44, ["of the completions", "max_tokens"]),
    "no spread": (
        changed(40, zero_variance_groups=1.0), "mostly_zero_variance", 44,
        ["every completion had the same reward", "mean reward of", "dynamic_sampling"],
    ),
    "jump": (
        changed(40, reward=1.6, reward_std=0.1), "reward_jumped", 43,
        ["jumped from 0.5", "within 3 steps", "completions.jsonl"],
    ),
    "collapse": (
        changed(40, reward=lambda step: max(0.6 - 0.06 * (step - 40), 0.0), reward_std=0.2), "reward_collapsed", 54,
        ["the mean reward fell to", "at its best", "from step 3", "learning rate"],
    ),
    "kl above the limit": (changed(40, kl=1.2), "kl_exploded", 42, ["is 1.2 nats per token", "beta"]),
    "kl growing": (changed(40, kl=0.5), "kl_exploded", 42, ["is 0.5 nats", "times the mean of the 20 steps before"]),
    "kl not finite": (changed(40, kl=None), "kl_exploded", 40, ["`kl`", "not a finite number"]),
    "ratio": (changed(40, ratio_max=250.0), "ratio_exploded", 42, ["ratio is 250", "passes"]),
    "ratio not finite": (changed(40, ratio_max=math.inf), "ratio_exploded", 40, ["`ratio_max`", "not a finite"]),
    "sampler": (
        changed(40, sampler_gap=0.4), "sampler_disagrees", 42, ["differ by 0.4 nats", "`sampler_gap`", "temperature"],
    ),
    "sampler not finite": (changed(40, sampler_gap=None), "sampler_disagrees", 40, ["`sampler_gap`", "not a finite"]),
    "entropy": (
        changed(40, entropy=0.02), "entropy_collapsed", 44,
        ["entropy is 0.0", "nats per token, 0.49 at the start", "epsilon_high"],
    ),
    "hacking": (
        changed(
            40,
            reward__accuracy=lambda step: 0.5 - 0.02 * (step - 40),
            reward__format=lambda step: 0.9 + 0.01 * (step - 40),
        ), "reward_hacked", 59,
        ["reward/format rose from 0.8", "while reward/accuracy fell from 0.4", "Read completions"],
    ),
    "held out": (
        changed(
            40,
            held_out__exact=lambda step: 0.8 - 0.02 * (step - 40),
            reward=lambda step: 0.6 + 0.02 * (step - 40),
        ),
        "held_out_disagrees", 49, ["the reward rose from 0.6", "while held_out/exact", "fell from 0.7"],
    ),
    "repetition": (changed(40, repetition=0.8), "repeating", 44, ["say they have said before", "mask_truncated"]),
    "unscored": (changed(40, unscored__accuracy=0.5), "reward_failing", 49, ["`unscored/accuracy`", "verifier"]),
    "failed": (changed(40, judge__failed=0.5), "reward_failing", 49, ["`judge/failed`", "the service"]),
    "faults": (changed(40, accuracy__faults=3.0), "reward_failing", 49, ["`accuracy/faults`", "times in"]),
    "environment": (changed(40, environment_failed=0.5), "environment_failing", 49, ["`environment_failed`", "masked"]),
    "timeouts": (changed(40, accuracy__timeouts=3.0), "reward_failing", 49, ["`accuracy/timeouts`", "time limit"]),
    "no learning rate": (changed(40, learning_rate=0.0), "nothing_learned", 40, ["learning rate is 0", "schedule"]),
    "no change": (changed(40, unchanged=1.0), "nothing_learned", 40, ["changed no parameter", "bfloat16"]),
    "no gradient": (changed(40, grad_norm=0.0), "nothing_learned", 44, ["the gradient was 0", "mask every token"]),
    "skipped": (changed(40, skipped=1.0), "updates_skipped", 40, ["100% of the updates of step 40", "learning rate"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_told_once_in_plain_words_with_what_to_do(fault):
    history, name, by, words = FAULTS[fault]
    told = spoken(history)
    assert len(told) == 1, told
    step, text = told[0]
    assert 40 <= step <= by
    for word in words:
        assert word in text, text
    check = getattr(monitoring, name)
    assert [text] == warnings(history[: step + 1], [check])
    others = [other for other in DEFAULT if other is not check]
    assert spoken(history, checks=others) == []


def test_every_check_is_shown_to_speak():
    assert {getattr(monitoring, name) for _, name, *_ in FAULTS.values()} == set(DEFAULT)


def test_a_fault_that_comes_and_goes_is_told_again_only_after_a_quiet_time():
    flapping = changed(40, skipped=lambda step: float(step % 3 == 0))
    assert [step for step, _ in spoken(flapping)] == [42]
    assert [step for step, _ in spoken(flapping, quiet=1)] == [42, 45, 48, 51, 54, 57]
    twice = changed(10, skipped=lambda step: float(step in (20, 55)))
    assert [step for step, _ in spoken(twice)] == [20, 55]


def test_a_resumed_run_says_what_the_uninterrupted_one_says(tmp_path):
    """The history is read back from disk; what was not finite comes back as None."""
    history = changed(40, truncated=0.9, kl=math.nan)
    for line in history[:45]:
        metrics.append(tmp_path, line["step"], {name: value for name, value in line.items() if name != "step"})
    read = metrics.read(tmp_path)
    assert read[-1]["kl"] is None
    resumed = [(end - 1, text) for end in range(43, 46) for text in warnings(read[:end])]
    assert resumed == [(step, text) for step, text in spoken(history[:45]) if step >= 42]
    assert len(resumed) == 1


def test_nothing_stops_the_run_unless_it_is_asked_to():
    history = changed(40, truncated=0.9, skipped=1.0)
    assert len(spoken(history)) == 2
    with pytest.raises(RunWentWrong, match="were cut at the token limit"):
        spoken(history, stop_on=[monitoring.mostly_truncated])
    with pytest.raises(RunWentWrong, match="not finite"):  # also where it is not among the checks
        spoken(history, checks=[], stop_on=[monitoring.updates_skipped])
    assert len(spoken(history, stop_on=[monitoring.kl_exploded])) == 2
    assert spoken(history[:42] + history[42:], checks=[]) == []


def test_thresholds_are_keywords():
    history = changed(40, truncated=0.9)
    strict = functools.partial(monitoring.mostly_truncated, threshold=0.95)
    assert spoken(history, checks=[strict]) == []
    with pytest.raises(RunWentWrong):
        spoken(history, stop_on=[functools.partial(monitoring.mostly_truncated, threshold=0.8)])


@pytest.mark.parametrize("check", DEFAULT, ids=lambda check: check.__name__)
def test_a_check_says_nothing_of_what_was_not_measured(check):
    assert check([]) is None
    for length in (1, 2, 5, 60):
        assert check([{"step": step} for step in range(length)]) is None
        assert check([{"step": step, "loss": 1.0, "eval/reward": None} for step in range(length)]) is None
    # Only at some steps, as an evaluation is, or not finite for a while: no crash, and nothing to say.
    sparse = [{name: x for name, x in line.items() if name == "step" or line["step"] % 3 == 0} for line in healthy()]
    assert check(sparse) is None
    holes = [
        {name: None if line["step"] % 5 == 1 and name != "step" else x for name, x in line.items()}
        for line in healthy()
    ]
    assert check(holes) is None


@pytest.mark.parametrize(
    ("check", "series"),
    [
        (monitoring.kl_exploded, {"kl": lambda step: 30.0 if step == 50 else 0.05}),
        (monitoring.ratio_exploded, {"ratio_max": lambda step: 500.0 if step == 50 else 1.5}),
        (monitoring.mostly_truncated, {"truncated": lambda step: 1.0 if step == 50 else 0.2}),
        (monitoring.reward_jumped, {"reward": lambda step: 1.5 if step == 50 else 0.7}),
        (monitoring.reward_collapsed, {"reward": lambda step: 0.0 if step == 50 else 0.7}),
        (monitoring.entropy_collapsed, {"entropy": lambda step: 0.0 if step == 50 else 0.3}),
        (monitoring.reward_failing, {"accuracy__faults": lambda step: 50.0 if step == 50 else 0.0}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_outlier_is_no_fault(check, series):
    assert spoken(changed(40, **series), checks=[check]) == []


@pytest.mark.parametrize(
    "series",
    [
        {"reward__accuracy": lambda step: 0.5 - 0.02 * (step - 40)},
        {"reward__format": lambda step: 0.9 + 0.01 * (step - 40)},
        {
            "reward__accuracy": lambda step: 0.5 - 0.02 * (step - 40),
            "reward__format": lambda step: 0.9 - 0.01 * (step - 40),
        },
    ],
    ids=["accuracy falls alone", "format rises alone", "both fall"],
)  # fmt: skip
def test_it_takes_a_rise_and_a_fall_to_be_hacking(series):
    assert spoken(changed(40, **series), checks=[monitoring.reward_hacked]) == []


def test_what_counts_as_accuracy_can_be_named():
    history = changed(40, reward__mine=0.0, reward__format=lambda step: 0.9 + 0.01 * (step - 40))
    for line in history[:40]:
        line["reward/mine"] = 0.5
    assert spoken(history, checks=[monitoring.reward_hacked]) == []
    check = functools.partial(monitoring.reward_hacked, accuracy=("reward/mine",))
    assert len(spoken(history, checks=[check])) == 1
    only_length = functools.partial(check, others=("reward/length",))
    assert spoken(history, checks=[only_length]) == []


def test_a_reward_that_is_always_the_same_neither_jumps_nor_collapses():
    for constant in (0.0, 1.1, -3.7):
        for factor in (1 + 1e-6, 1 - 1e-6):  # another rounding from step 40 on
            rewards = [constant] * 40 + [constant * factor] * 20
            history = [{"step": step, "reward": reward, "reward_std": 0.0} for step, reward in enumerate(rewards)]
            assert spoken(history, checks=[monitoring.reward_jumped, monitoring.reward_collapsed]) == []


def test_a_divergence_that_grows_from_nothing_to_little_has_not_exploded():
    history = [{"step": step, "kl": 1e-6 if step < 40 else 0.05} for step in range(60)]
    assert spoken(history, checks=[monitoring.kl_exploded]) == []


def test_noise_of_small_batches_is_no_collapse():
    """Binary rewards of 4 prompts by 8 completions, each prompt of its own difficulty."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rewards = [rng.binomial(8, rng.beta(1, 1, 4)).mean() / 8 for _ in range(200)]
        history = [{"step": step, "reward": r, "reward_std": math.sqrt(r * (1 - r))} for step, r in enumerate(rewards)]
        checks = [monitoring.reward_jumped, monitoring.reward_collapsed]
        assert sum(len(check_said) > 0 for check_said in (spoken(history, checks=[check]) for check in checks)) == 0


def test_what_a_held_out_verifier_logs_itself_is_no_verdict_that_falls():
    """As its timeouts do, where answers get shorter."""
    history = changed(
        40,
        held_out__exact__timeouts=lambda step: 8 - 0.2 * (step - 40),
        reward=lambda step: 0.6 + 0.02 * (step - 40),
    )
    assert monitoring.held_out_disagrees(history[:50]) is None


def test_an_update_that_was_refused_is_not_told_as_one_that_changed_nothing():
    line = {"step": 3, "grad_norm": 1.0, "unchanged": 1.0}
    assert "changed no parameter" in monitoring.nothing_learned([line])
    assert monitoring.nothing_learned([line | {"skipped": 1.0}]) is None
