"""Clipping: bounds of the ratio, with 1, 2 and 4 iterations over a rollout, where clipping acts.

python experiments/ablations/clipping.py
python experiments/ablations/clipping.py --rank --rates 3e-5 1e-4 3e-4 1e-3   # each at its best rate; --estimate
                                                                              # tells the time before

Two CPU cores take a few minutes for the first. What came of it: `docs/pages/results/ablations.md`.
"""

import dataclasses

import setting
from setting import Condition, Config

from grpo_jax import losses

NEVER = 1e6  # a bound that is never met
BOUNDS = {  # of the ratio below and above, and of the ratio where A < 0 (dual clip)
    "0.1": (0.1, 0.1, NEVER),
    "0.2": (0.2, 0.2, NEVER),
    "0.3": (0.3, 0.3, NEVER),
    "0.2, 0.28 (clip-higher)": (0.2, 0.28, NEVER),
    "none": (NEVER, NEVER, NEVER),
    "0.2, dual clip 2": (0.2, 0.2, 2.0),
}
NUMBERS = ("low", "high", "delta")


def experiment(config: Config) -> None:
    """Bounds x iterations; ranked are those with effect."""
    conditions = []
    for iterations in (1, 2, 4):
        run = make(config, iterations)
        some = ["0.2"] if config.rank and iterations == 1 else BOUNDS  # with one iteration they are all the same
        conditions += [
            Condition(f"iterations {iterations}, epsilon {name}", run, dict(zip(NUMBERS, BOUNDS[name], strict=True)))
            for name in some
        ]
    setting.run(
        "clipping",
        config,
        conditions,
        metrics=("greedy", "sampled", "clip_low", "clip_high", "ratio_max", "entropy"),
        curves=("greedy", "sampled", "entropy"),
        against="iterations 1, epsilon 0.2",
    )


def make(config: Config, iterations: int) -> setting.Run:
    """A run with its bounds from the condition's numbers."""

    def change(hyper: setting.Hyper) -> setting.Settings:
        loss = losses.grpo(epsilon=hyper["low"], epsilon_high=hyper["high"], delta=hyper["delta"])
        return {"loss": loss, "updates": dataclasses.replace(setting.UPDATES, iterations=iterations)}

    return setting.make(config, change)


if __name__ == "__main__":
    setting.main(experiment, __doc__)
