"""Group size: G = 2 to 32 at equal completions per step, and at equal prompts.

python experiments/ablations/group_size.py

Two CPU cores take a few minutes. What came of it: `docs/pages/results/ablations.md`.
"""

import setting
from setting import Condition, Config

COMPLETIONS = 64
PROMPTS = 8


def experiment(config: Config) -> None:
    """Both ways, on the easy and the hard setting."""
    for name, terms in (("easy", setting.EASY), ("hard", setting.HARD)):
        conditions = [
            Condition(f"{prompts} x {G}", make(config, terms, prompts, G))
            for prompts, G in dict.fromkeys(
                [(COMPLETIONS // G, G) for G in sizes(config)] + [(PROMPTS, G) for G in sizes(config)]
            )
        ]
        setting.run(
            f"group_size_{name}",
            config,
            conditions,
            terms=terms,
            metrics=("greedy", "sampled", "advantage_variance", "zero_variance_groups"),
            against=f"{PROMPTS} x 8",
            seconds=True,
        )


def sizes(config: Config) -> tuple[int, ...]:
    """The group sizes."""
    return (2, 8) if config.smoke else (2, 4, 8, 16, 32)


def make(config: Config, terms: int, prompts: int, G: int) -> setting.Run:
    """The standard run with other sizes."""
    sampler = setting.sampler(terms, group_size=G)
    return setting.make(config, lambda hyper: {"sampler": sampler}, terms=terms, prompts=prompts)


if __name__ == "__main__":
    setting.main(experiment, __doc__)
