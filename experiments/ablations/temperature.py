"""Temperature of sampling, of the scores with it; evaluation stays at 1 and at greedy.

python experiments/ablations/temperature.py

Two CPU cores take a few minutes. What came of it, and of ranking the temperatures where exploration decides:
`docs/pages/results/ablations.md`.
"""

import setting
from setting import Condition, Config

TEMPERATURES = (0.6, 0.8, 1.0, 1.2, 1.5)


def experiment(config: Config) -> None:
    """One program for all temperatures."""
    run = setting.make(config, lambda hyper: {"sampler": setting.sampler(temperature=hyper["temperature"])})
    conditions = [Condition(f"temperature {t}", run, {"temperature": t}) for t in TEMPERATURES]
    names = ("greedy", "sampled", "entropy")
    setting.run("temperature", config, conditions, metrics=names, curves=names, against="temperature 1.0")


if __name__ == "__main__":
    setting.main(experiment, __doc__)
