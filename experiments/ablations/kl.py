"""The KL term: its weight, its estimate, a schedule of the weight, and renewal of the reference.

python experiments/ablations/kl.py
python experiments/ablations/kl.py --rank   # each at its best rate; --estimate tells the time before

Two CPU cores take a few minutes for the first. What came of it: `docs/pages/results/ablations.md`.
"""

import functools
from typing import Any

import setting
from setting import Condition, Config

from grpo_jax import losses, schedules
from grpo_jax.schedules.reference import sync_reference

BETAS = (0.0, 0.0001, 0.0005, 0.001, 0.01, 0.04, 0.1)


def experiment(config: Config) -> None:
    """One grid; the reference is the start."""

    def make(penalty: Any, **settings: Any) -> setting.Run:
        def change(hyper: setting.Hyper) -> setting.Settings:
            return {"loss": losses.grpo(penalty=penalty(hyper["beta"]))}

        return setting.make(config, change, reference=True, **settings)

    k1, k2, k3 = (make(penalty) for penalty in (losses.k1, losses.k2, losses.k3))
    renewed = make(losses.k3, after=functools.partial(sync_reference, every=max(1, config.steps // 4)))  # 25 steps
    beta = schedules.cosine_with_hold(0.1, 0.04, config.steps)
    cosine = setting.make(
        config,
        lambda hyper: {"loss": schedules.Scheduled(lambda n, extra: losses.grpo(penalty=losses.k3(beta(n))))},
        reference=True,
    )
    conditions = [
        *(Condition(f"k3, beta {beta}", k3, {"beta": beta}) for beta in BETAS),
        Condition("k1, beta 0.1", k1, {"beta": 0.1}),
        Condition("k2, beta 0.1", k2, {"beta": 0.1}),
        Condition("k3, beta 0.1 to 0.04", cosine),
        Condition("k3, beta 0.1, reference renewed", renewed, {"beta": 0.1}),
    ]
    names = ("greedy", "sampled", "kl")
    setting.run("kl", config, conditions, metrics=names, curves=names, against="k3, beta 0.0")


if __name__ == "__main__":
    setting.main(experiment, __doc__)
