"""Clipping: bounds of the ratio, with 1, 2 and 4 iterations over a rollout, where clipping acts.

python experiments/ablations/clipping.py
python experiments/ablations/clipping.py --rank   # each at its best rate; --estimate tells the time before

Two CPU cores take a few minutes for the first. What came of it: `experiments/README.md`.
"""

import dataclasses

import setting
from setting import Condition, Config

from grpo_jax import losses

UNCLIPPED = 1e6
BOUNDS = {
    "0.1": (0.1, 0.1),
    "0.2": (0.2, 0.2),
    "0.3": (0.3, 0.3),
    "0.2, 0.28 (clip-higher)": (0.2, 0.28),
    "none": (UNCLIPPED, UNCLIPPED),
}


def experiment(config: Config) -> None:
    """Bounds x iterations."""
    conditions = []
    for iterations in (1, 2, 4):
        clipped, dual = make(config, iterations, dual=False), make(config, iterations, dual=True)
        conditions += [
            Condition(f"iterations {iterations}, epsilon {name}", clipped, {"low": low, "high": high})
            for name, (low, high) in BOUNDS.items()
        ]
        bounds = {"low": 0.2, "high": 0.2, "delta": 2.0}
        conditions.append(Condition(f"iterations {iterations}, epsilon 0.2, dual clip 2", dual, bounds))
    setting.run(
        "clipping",
        config,
        conditions,
        metrics=("greedy", "sampled", "clip_low", "clip_high", "ratio_max", "entropy"),
        curves=("greedy", "sampled", "entropy"),
        against="iterations 1, epsilon 0.2",
    )


def make(config: Config, iterations: int, *, dual: bool) -> setting.Run:
    """A run with its bounds from the condition's numbers."""

    def change(hyper: setting.Hyper) -> setting.Settings:
        delta = hyper["delta"] if dual else None
        loss = losses.grpo(epsilon=hyper["low"], epsilon_high=hyper["high"], delta=delta)
        return {"loss": loss, "updates": dataclasses.replace(setting.UPDATES, iterations=iterations)}

    return setting.make(config, change)


if __name__ == "__main__":
    setting.main(experiment, __doc__)
