"""Warnings in plain words when a run goes wrong, computed from what it has measured.

    history = metrics.read(run_dir)
    for step in ...:
        ...
        metrics.append(run_dir, step, measured)
        history.append({"step": step, **metrics.plain(measured)})
        for warning in monitoring.warnings(history):
            print("warning:", warning)

A check is `history -> what was seen and what people do about it, or None`; the history is
one dict of metrics a step, as `metrics.read` gives it, where None stands for a number that was not finite.
Thresholds are keywords: `functools.partial(mostly_truncated, threshold=0.8)` is another check. Their defaults are
rules of thumb, no paper's. A check whose metrics were not measured says nothing.

"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MetricLines = Sequence[Mapping[str, Any]]
Check = Callable[[MetricLines], str | None]

ACCURACY = ("reward/accuracy", "reward/correct", "reward/exact_answer", "reward/python_tests")


class RunWentWrong(RuntimeError):
    """A check that the caller asked to stop on has found something."""


# ------------------------------------------------------------------------------- checks


def mostly_truncated(history: MetricLines, *, window: int = 5, threshold: float = 0.5) -> str | None:
    """Over the last `window` steps more than `threshold` of the completions were cut at the limit."""
    share = _mean(_last(history, "truncated", window))
    if share is None or share <= threshold:
        return None
    return (
        f"{share:.0%} of the completions of the last {window} steps were cut at the token limit (`truncated`). A "
        "completion that is cut gives no answer, so its reward says little about its reasoning. Raise max_tokens, ask "
        "for shorter answers in the prompt, reward shortness (rewards.soft_overlong), or leave cut completions out of "
        "the loss (transforms.mask_truncated). If completions never end, look whether eos_ids has the token that "
        "ends a turn in this model's chat template"
    )


def mostly_zero_variance(history: MetricLines, *, window: int = 5, threshold: float = 0.5) -> str | None:
    """Over the last `window` steps more than `threshold` of the groups had equal rewards throughout."""
    share = _mean(_last(history, "zero_variance_groups", window))
    if share is None or share <= threshold:
        return None
    rewards = _last(history, "reward", window)
    level = f", at a mean reward of {_mean(rewards):.3g}" if rewards else ""
    return (
        f"in {share:.0%} of the groups of the last {window} steps every completion had the same reward "
        f"(`zero_variance_groups`){level}. Such a group has advantages of 0 and contributes no gradient. Where the "
        "reward is low the task is too hard: take easier prompts, larger groups or a graded reward, or begin with "
        "supervised learning. Where it is high the task is solved: take harder prompts. Filter prompts by pass rate "
        "(items.between), or sample until groups differ (dynamic_sampling)"
    )


def reward_jumped(
    history: MetricLines, *, window: int = 3, before: int = 10, spreads: float = 1.0, deviations: float = 3.0
) -> str | None:
    """The mean reward of the last `window` steps is far above that of the `before` steps before them.

    Far: more than `spreads` times the spread between completions (the largest
    `reward_std` of these steps) and than `deviations` times the deviation between the
    earlier steps.
    """
    rewards = _last(history, "reward", before + window)
    if not rewards:
        return None
    then, now = statistics.fmean(rewards[:before]), statistics.fmean(rewards[before:])
    spread = max(_finite(history, "reward_std", before + window), default=0.0)
    if not _exceeds(now - then, spreads * spread, deviations * statistics.pstdev(rewards[:before]), scale=now):
        return None
    return (
        f"the mean reward jumped from {then:.3g} to {now:.3g} within {window} steps (`reward`). Quick learning looks "
        "like this, and so does a shortcut in the reward function. Read some completions of the last steps "
        "(completions.jsonl in the run's folder) and compare with the evaluation (eval/reward): if they solve the "
        "task, all is well; if not, make the reward refuse what they do"
    )


def reward_collapsed(
    history: MetricLines, *, window: int = 10, spreads: float = 0.5, deviations: float = 3.0
) -> str | None:
    """The mean reward of the last `window` steps is far below the best mean of as many steps in a row.

    Far: more than `spreads` times the spread between completions (the largest
    `reward_std` of the two windows) and than `deviations` times the deviation between
    the steps of a window.
    """
    lines = [line for line in history if _is_number(line.get("reward"))]
    rewards = [line["reward"] for line in lines]
    if len(rewards) < 2 * window:
        return None
    sums = list(itertools.accumulate(rewards, initial=0.0))
    starts = range(len(rewards) - 2 * window + 1)
    start = max(starts, key=lambda i: sums[i + window] - sums[i])
    best, now = rewards[start : start + window], rewards[-window:]
    fall = statistics.fmean(best) - statistics.fmean(now)
    spread = max(_finite([*lines[start : start + window], *lines[-window:]], "reward_std"), default=0.0)
    noise = max(statistics.pstdev(best), statistics.pstdev(now))
    if not _exceeds(fall, spreads * spread, deviations * noise, scale=statistics.fmean(best)):
        return None
    return (
        f"the mean reward fell to {statistics.fmean(now):.3g}, from {statistics.fmean(best):.3g} at its best (over "
        f"{window} steps from step {lines[start].get('step', start)} on). Go back to a checkpoint from before, lower "
        "the learning rate or the iterations over a rollout, clip gradients (max_grad_norm), or hold the policy "
        "near the reference by a KL term (penalty=losses.k3(beta)). See whether truncated, entropy or kl moved first"
    )


def kl_exploded(
    history: MetricLines, *, limit: float = 1.0, growth: float = 10.0, least: float = 0.1, before: int = 20
) -> str | None:
    """The KL divergence from the reference is above `limit` nats per token, has grown `growth`-fold, or is no number.

    Of the last three steps the middle value counts, so that one outlier does not. Growth
    is against the mean of the `before` steps before them and counts above `least`.
    """
    if _not_finite(history, "kl"):
        return _no_number("the KL divergence (`kl`)")
    recent, earlier = _last(history, "kl", 3), _last(history, "kl", 3 + before)[:before]
    if not recent:
        return None
    now = statistics.median(recent)
    grown = bool(earlier) and now > least and now > growth * statistics.fmean(earlier)
    if now <= limit and not grown:
        return None
    was = f", {now / statistics.fmean(earlier):.0f} times the mean of the {before} steps before" if grown else ""
    return (
        f"the KL divergence from the reference is {now:.3g} nats per token{was} (`kl`). The policy runs away from the "
        "model it began as, and its text often goes with it. Lower the learning rate, raise beta, clip gradients "
        "(max_grad_norm), make fewer iterations over a rollout, or go back to a checkpoint from before"
    )


def ratio_exploded(history: MetricLines, *, limit: float = 10.0) -> str | None:
    """The largest importance ratio is above `limit`, by the middle value of the last three steps, or no number."""
    if _not_finite(history, "ratio_max"):
        return _no_number("the largest importance ratio (`ratio_max`)")
    if (ratio := _middle(history, "ratio_max")) <= limit:
        return None
    return (
        f"the largest importance ratio is {ratio:.3g} (`ratio_max`): the policy that is trained is "
        "far from the one that sampled. Make fewer passes or minibatches over a rollout, lower the learning rate, "
        "sample anew more often, or bound the ratio (delta of losses.ppo_clip, losses.truncated_importance). With one "
        "update a rollout the ratio is 1: if it is not, temperature, top_k or top_p differ between sampler and scorer"
    )


def sampler_disagrees(history: MetricLines, *, limit: float = 0.1) -> str | None:
    """The mean gap of sampler and scorer is above `limit` nats, by the middle value of the last three steps."""
    if _not_finite(history, "sampler_gap"):
        return _no_number("the mean gap between sampler and scorer (`sampler_gap`)")
    if (gap := _middle(history, "sampler_gap")) <= limit:
        return None
    return (
        f"sampler and scorer differ by {gap:.3g} nats per token for the same weights "
        "(`sampler_gap`; by the place in the completion `sampler_gap/0` and on). Look whether the engine has the "
        "weights of this step, and whether temperature, top_k and top_p are those of the scorer. What a lower "
        "precision leaves is corrected by losses.truncated_importance, or by ratios to the sampler (losses.dppo)"
    )


def entropy_collapsed(history: MetricLines, *, window: int = 5, share: float = 0.2, least: float = 0.01) -> str | None:
    """The entropy of the last `window` steps is below `share` of that of the first `window`, or below `least` nats."""
    entropies = _finite(history, "entropy")
    if len(entropies) < window:
        return None
    start, now = statistics.fmean(entropies[:window]), statistics.fmean(entropies[-window:])
    if now >= least and now >= share * start:
        return None
    return (
        f"the policy's entropy is {now:.3g} nats per token, {start:.3g} at the start (`entropy`). Completions of a "
        "group become alike, and what is not tried is not learned. Raise epsilon_high (DAPO takes 0.28), add an "
        "entropy bonus (losses.entropy_bonus, entropy_control), sample at a higher temperature, lower the "
        "learning rate, or renew the prompts"
    )


def reward_hacked(
    history: MetricLines,
    *,
    accuracy: Sequence[str] = ACCURACY,
    others: Sequence[str] | None = None,
    window: int = 20,
    spreads: float = 0.1,
    deviations: float = 3.0,
) -> str | None:
    """Another reward rises while accuracy falls, from one `window` of steps to the next.

    A change counts if it is more than `spreads` times the spread between completions
    (`<name>_std`) and than `deviations` times its own standard error. `accuracy` names the
    rewards that say what is right; `others` are all other `reward/<name>` unless given: a
    format, a length, tags.
    """
    if others is None:
        named = (name for line in history[-1:] for name in line if name.startswith("reward/"))
        others = [name for name in named if name not in accuracy and not name.endswith("_std")]
    changes = {name: _change(history, name, window, spreads, deviations) for name in [*accuracy, *others]}
    fell = {name: moved for name in accuracy if (moved := changes[name]) is not None and moved[1] < moved[0]}
    rose = {name: moved for name in others if (moved := changes[name]) is not None and moved[1] > moved[0]}
    if not fell or not rose:
        return None

    def told(moved: Mapping[str, tuple[float, float]], verb: str) -> str:
        return " and ".join(f"{name} {verb} from {then:.3g} to {now:.3g}" for name, (then, now) in moved.items())

    return (
        f"{told(rose, 'rose')}, while {told(fell, 'fell')} (the last {window} steps against the {window} before). The "
        "policy learns what is easy to please instead of the task. Read completions; weigh accuracy higher, give "
        f"{' and '.join(rose)} only where the answer is right, or drop it once it is learned"
    )


def held_out_disagrees(
    history: MetricLines, *, window: int = 5, spreads: float = 0.1, deviations: float = 3.0
) -> str | None:
    """The reward that is trained on rises while a verifier that is not, `held_out/<name>`, falls.

    From one `window` to the next of the steps at which the verifier was asked (`rewards.held_out_metrics`); a change
    counts as in `reward_hacked`.
    """
    named = {name for line in history for name in line if name.startswith("held_out/")}
    # What a verifier logs itself, such as held_out/<name>/timeouts, is no verdict: that it falls is well.
    for name in sorted(name for name in named if name.count("/") == 1 and not name.endswith(("_std", "_agreement"))):
        asked = [line for line in history if _is_number(line.get(name)) and _is_number(line.get("reward"))]
        held = _change(asked, name, window, spreads, deviations)
        trained = _change(asked, "reward", window, spreads, deviations)
        if held is None or trained is None or not (held[1] < held[0] and trained[1] > trained[0]):
            continue
        agreement = _finite(asked, f"{name}_agreement", window)
        told = f", and their correlation is {statistics.fmean(agreement):.2g} (`{name}_agreement`)" if agreement else ""
        return (
            f"the reward rose from {trained[0]:.3g} to {trained[1]:.3g}, while {name}, which is not trained on, fell "
            f"from {held[0]:.3g} to {held[1]:.3g}{told}. The policy learns to please the reward instead of the task. "
            "Read completions that the two disagree on; mend the reward, add a KL term, or go back to a checkpoint "
            "from before"
        )
    return None


def repeating(history: MetricLines, *, window: int = 5, threshold: float = 0.5) -> str | None:
    """Over the last `window` steps more than `threshold` of the n-grams had been there before in their completion."""
    share = _mean(_last(history, "repetition", window))
    if share is None or share <= threshold:
        return None
    return (
        f"{share:.0%} of what the completions of the last {window} steps say they have said before (`repetition`). "
        "Read some: loops are a sign of collapse, or pay under a reward for length. Add a penalty "
        "(rewards.repetition_penalty), leave cut completions out of the loss (transforms.mask_truncated), lower the "
        "learning rate, or go back to a checkpoint from before"
    )


def reward_failing(history: MetricLines, *, window: int = 10, share: float = 0.1, steps: float = 0.5) -> str | None:
    """A reward could often not be given.

    That is more than `share` of the completions of the last `window` steps by
    `unscored/<name>` (of `unscored`) or `<name>/failed`, or at least one fault or
    timeout in more than `steps` of these steps by `<name>/faults` or `<name>/timeouts`,
    which count and are what verifiers log by TRL's `log_metric`.
    """
    seen = []
    for name in dict.fromkeys(name for line in history[-window:] for name in line):
        if name.startswith("unscored/") or name.endswith("/failed"):
            failed = _mean(_last(history, name, window))
            if failed is not None and failed > share:
                seen.append(f"{failed:.0%} of the completions of the last {window} steps (`{name}`)")
        elif name.endswith(("/faults", "/timeouts")):
            counts = _last(history, name, window)
            if counts and sum(count > 0 for count in counts) > steps * window:
                with_some = sum(count > 0 for count in counts)
                seen.append(f"{sum(counts):.0f} times in {with_some} of the last {window} steps (`{name}`)")
    if not seen:
        return None
    return (
        f"a reward function failed on {' and on '.join(seen)}. What could not be scored is not trained on, and what "
        "timed out counts as wrong, right or not. See the first message of the verifier; raise its time limit or "
        "its number of workers, check the service behind it, and take rows out whose answer it cannot read"
    )


def environment_failing(history: MetricLines, *, window: int = 10, share: float = 0.1) -> str | None:
    """The environment failed in more than `share` of the conversations of the last `window` steps."""
    failed = _mean(_last(history, "environment_failed", window))
    if failed is None or failed <= share:
        return None
    return (
        f"the environment failed in {failed:.0%} of the conversations of the last {window} steps "
        "(`environment_failed`), which are masked and contribute nothing; the warnings of these steps say why. Mend "
        "it, or give it more time (--answer-timeout) or tokens (--max-answer-tokens)"
    )


def updates_skipped(history: MetricLines) -> str | None:
    """At the last step an update was not finite and was not applied."""
    skipped = _mean(_last(history[-1:], "skipped", 1))
    if not skipped:
        return None
    return (
        f"{skipped:.0%} of the updates of step {history[-1].get('step', len(history) - 1)} were not finite and not "
        "applied (`skipped`). Once is no harm. If it goes on, lower the learning rate, clip gradients (max_grad_norm), "
        "and look for what is extreme in this step: ratio_max, kl, a reward far from the others"
    )


def nothing_learned(history: MetricLines, *, window: int = 5) -> str | None:
    """At the last step the learning rate was 0, or the update changed no parameter (`unchanged`).

    Or the gradient was 0 over the last `window` steps, though rewards differed and no update was refused.
    """
    line = history[-1] if history else {}
    if line.get("learning_rate") == 0:
        return (
            "the learning rate is 0 (`learning_rate`), so this step trains nothing. Look at the schedule: a warm-up "
            "should begin above 0, and a decay should not end before the run does"
        )
    if line.get("unchanged") and not line.get("skipped"):
        return (
            "the update changed no parameter (`unchanged`), though `grad_norm` is above 0. Look at the learning rate, "
            "at parameters in bfloat16, which drop small changes, and at what is frozen"
        )
    refused, alike = (_last(history, name, window) for name in ("skipped", "zero_variance_groups"))
    told_otherwise = any(refused) or _mean(alike) == 1
    if (norms := _last(history, "grad_norm", window)) and not any(norms) and not told_otherwise:
        return (
            f"the gradient was 0 in each of the last {window} steps (`grad_norm`), so that nothing is trained, though "
            "rewards may differ. Look at the weights of the rewards, at transforms that mask every token, at whether "
            "the loss depends on the policy at all, and at the temperature"
        )
    return None


DEFAULT: tuple[Check, ...] = (
    mostly_truncated,
    mostly_zero_variance,
    reward_jumped,
    reward_collapsed,
    kl_exploded,
    ratio_exploded,
    sampler_disagrees,
    entropy_collapsed,
    reward_hacked,
    held_out_disagrees,
    repeating,
    reward_failing,
    environment_failing,
    updates_skipped,
    nothing_learned,
)


def warnings(
    history: MetricLines, checks: Sequence[Check] = DEFAULT, *, stop_on: Sequence[Check] = (), quiet: int = 20
) -> list[str]:
    """What went wrong at the last step and was not wrong before.

    A check speaks where it finds something at the last step and found nothing at any of
    the `quiet` steps before. That is a function of the history alone, so a resumed run
    says what the uninterrupted one says, once.

    Args:
      history: of all steps so far, this one included.
      checks: what to look for.
      stop_on: checks that end the run; none does unless it is named here. Save the state
        before the call. A run that is resumed goes on until the next onset.
      quiet: steps.

    Returns:
      A text for each check that speaks, in the order of the checks.

    Raises:
      RunWentWrong: if a check of `stop_on` speaks, with all that was found.
    """
    found, stopping = [], False
    for check in dict.fromkeys([*checks, *stop_on]):
        text = check(history)
        if text is not None and not any(check(history[:-n]) for n in range(1, min(quiet, len(history) - 1) + 1)):
            found.append(text)
            stopping = stopping or check in stop_on
    if stopping:
        raise RunWentWrong("the run was to stop on this: " + "; ".join(found))
    return found


# --------------------------------------------------------------------- of a history


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(history: MetricLines, name: str, count: int | None = None) -> list[float]:
    """The numbers of a metric, in order; only the last `count` of them, if given."""
    found = (line[name] for line in reversed(history) if _is_number(line.get(name)))
    return list(itertools.islice(found, count))[::-1]


def _last(history: MetricLines, name: str, count: int) -> list[float]:
    """The last `count` numbers of a metric, none if there are fewer."""
    found = _finite(history, name, count)
    return found if len(found) == count else []


def _middle(history: MetricLines, name: str) -> float:
    """The middle one of a metric's last three numbers, 0 if there are fewer."""
    return statistics.median(_last(history, name, 3) or [0.0])


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _not_finite(history: MetricLines, name: str) -> bool:
    """Whether the metric was measured at the last step and is no number."""
    return bool(history) and name in history[-1] and not _is_number(history[-1][name])


def _no_number(what: str) -> str:
    return (
        f"{what} is not a finite number. Lower the learning rate, clip gradients (max_grad_norm), and see at which "
        "step it began to grow: a checkpoint from before that is the place to go on from"
    )


def _exceeds(change: float, *least: float, scale: float) -> bool:
    """Whether a change is above each of these, and more than rounding."""
    return change > max(*least, 1e-4 * abs(scale))


def _change(
    history: MetricLines, name: str, window: int, spreads: float, deviations: float
) -> tuple[float, float] | None:
    """The means of a metric over the last two windows of steps, if they differ by more than noise."""
    values = _last(history, name, 2 * window)
    if not values:
        return None
    then, now = statistics.fmean(values[:window]), statistics.fmean(values[window:])
    error = math.sqrt((statistics.pvariance(values[:window]) + statistics.pvariance(values[window:])) / window)
    spread = max(_finite(history, f"{name}_std", 2 * window), default=0.0)
    return (then, now) if _exceeds(abs(now - then), spreads * spread, deviations * error, scale=then) else None
