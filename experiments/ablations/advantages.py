"""The scale of the advantages, and how tokens count: deviations, leave-one-out, and the length bias.

python experiments/ablations/advantages.py
python experiments/ablations/advantages.py --rank   # each at its best rate; --estimate tells the time before

Two CPU cores take a few minutes for the first. What came of it: `docs/pages/results/ablations.md`.
"""

import setting
from setting import Condition, Config

from grpo_jax import losses
from grpo_jax.advantages import (
    batch_normalised_advantages,
    batch_scaled_advantages,
    centered_advantages,
    group_advantages,
    leave_one_out_advantages,
)
from grpo_jax.protocols import Aggregate, Estimator


def experiment(config: Config) -> None:
    """Estimators under GRPO's aggregate, then aggregates under the estimator of Dr. GRPO; on the hard setting."""
    T = setting.modular_sums.max_tokens(setting.HARD)
    estimators = {
        "group deviation": group_advantages,
        "no deviation": centered_advantages,
        "batch deviation": batch_scaled_advantages,
        "batch mean and deviation": batch_normalised_advantages,
        "leave one out": leave_one_out_advantages,
    }
    aggregates = {
        "token_mean": losses.token_mean,
        "constant_length": losses.constant_length(T),
        "completion_sum": losses.completion_sum,
    }
    conditions = [
        *(Condition(name, make(config, estimator, losses.completion_mean)) for name, estimator in estimators.items()),
        *(Condition(f"no deviation, {name}", make(config, centered_advantages, f)) for name, f in aggregates.items()),
    ]
    setting.run(
        "advantages",
        config,
        conditions,
        terms=setting.HARD,
        metrics=("greedy", "sampled", "length_wrong", "length_right", "advantage_variance"),
        curves=("greedy", "sampled", "length_wrong"),
        against="group deviation",
    )


def make(config: Config, estimator: Estimator, aggregate: Aggregate) -> setting.Run:
    """The standard run on hard sums."""
    change = {"advantage": setting.advantage(estimator), "loss": losses.grpo(aggregate=aggregate)}
    return setting.make(config, lambda hyper: change, terms=setting.HARD)


if __name__ == "__main__":
    setting.main(experiment, __doc__)
