"""What is rewarded: accuracy, format, length, agreement without labels, and verifiers that err.

python experiments/ablations/rewards.py

Two CPU cores take a few minutes. What came of it: `docs/pages/results/ablations.md`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import setting
from setting import Array, Condition, Config, Prompts, modular_sums

from grpo_jax import rewards
from grpo_jax.advantages import from_rewards
from grpo_jax.rewards.tokens import reasoning_length, self_consistency
from grpo_jax.types import Rollout

GROUP = 8


def experiment(config: Config) -> None:
    """Each with accuracy measured, whatever is rewarded."""
    accuracy, formed, T = (
        modular_sums.accuracy(),
        modular_sums.strict_format(),
        modular_sums.max_tokens(setting.STANDARD),
    )
    length = reasoning_length(modular_sums.TAGS, (modular_sums.EOS,), per=T)
    agreement = self_consistency(modular_sums.TAGS[2], modular_sums.TAGS[3])
    noisy = make(config, (erring,), (1.0,), problems=functools.partial(with_luck, setting.problems_of(config)))
    conditions = [
        Condition("accuracy", make(config, (accuracy,), (1.0,))),
        Condition("accuracy + 0.1 format", make(config, (accuracy, formed), (1.0, 0.1))),
        Condition("accuracy + 0.1 format + 0.1 length", make(config, (accuracy, formed, length), (1.0, 0.1, 0.1))),
        Condition("accuracy + 0.1 format + length", make(config, (accuracy, formed, length), (1.0, 0.1, 1.0))),
        Condition("format", make(config, (formed,), (1.0,))),
        Condition("agreement with the group", make(config, (agreement,), (1.0,))),
        *(Condition(f"accuracy, {share:.0%} flipped", noisy, {"flipped": share}) for share in (0.1, 0.2, 0.3, 0.4)),
    ]
    names = ("greedy", "sampled", "length")
    setting.run("rewards", config, conditions, metrics=names, curves=names, against="accuracy")


def make(
    config: Config, judged: Sequence[rewards.TokenReward], weights: Sequence[float], **settings: object
) -> setting.Run:
    """A run with these rewards."""

    def change(hyper: setting.Hyper) -> setting.Settings:
        of_share = [f(hyper["flipped"]) if f is erring else f for f in judged]
        return {"reward": rewards.traced(*of_share), "advantage": from_rewards(weights=weights)}

    return setting.make(config, change, **settings)


def with_luck(make_problems: Callable[..., Prompts], key: Array, count: int, *, terms: int) -> Prompts:
    """Problems with a number in [0, 1) for each completion, which decides whether its verdict is flipped."""
    problems = make_problems(key, count, terms=terms)
    luck = jax.random.uniform(jax.random.fold_in(key, 1), (count, GROUP))
    return problems._replace(info=problems.info | {"luck": luck})


def erring(share: Array) -> rewards.TokenReward:
    """Accuracy as told by a verifier that errs in this share of its verdicts, either way."""

    def reward(rollout: Rollout) -> Array:
        right = modular_sums.accuracy()(rollout)
        return jnp.where(rollout.prompts.info["luck"] < share, 1 - right, right)

    return reward


if __name__ == "__main__":
    setting.main(experiment, __doc__)
