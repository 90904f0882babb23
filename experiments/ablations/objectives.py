"""Every objective of the table, at the same budget: 2 iterations over each rollout, so that ratios act.

python experiments/ablations/objectives.py
python experiments/ablations/objectives.py --rank              # with those of 2026; --estimate tells the time before

Two CPU cores take a few minutes for the first. What came of it: `docs/pages/results/ablations.md`.
"""

import dataclasses

import setting
from setting import Condition, Config

from grpo_jax import losses
from grpo_jax.advantages import (
    batch_normalised_advantages,
    centered_advantages,
    leave_one_out_advantages,
    max_rl_advantages,
    pass_at_k,
)
from grpo_jax.protocols import Advantage, Loss


def experiment(config: Config) -> None:
    """Each objective with its own defaults, and the advantages it was published with."""
    T = setting.modular_sums.max_tokens(setting.STANDARD)
    group, centered = setting.advantage(), setting.advantage(centered_advantages)
    others = setting.advantage(leave_one_out_advantages)
    batch = setting.advantage(batch_normalised_advantages)
    parts = {
        "grpo": (losses.grpo(), group),
        "bnpo": (losses.bnpo(), group),
        "dr_grpo": (losses.dr_grpo(T), centered),
        "dapo": (losses.dapo(), group),
        "gspo": (losses.gspo(), group),
        "gspo_token": (losses.gspo_token(), group),
        "luspo": (losses.luspo(), group),
        "gmpo": (losses.gmpo(), group),
        "cispo": (losses.cispo(), group),
        "sapo": (losses.sapo(), group),
        "vespo": (losses.vespo(), group),
        "rloo (reinforce)": (losses.reinforce(), others),
        "reinforce++": (losses.dapo(epsilon_high=0.2), batch),
    }
    if config.rank:
        parts |= {
            "dppo": (losses.dppo(), group),
            "drpo": (losses.drpo(), group),
            "dro": (losses.dro(), group),
            "pspo": (losses.pspo(), group),
            "squared log-ratio": (losses.grpo(penalty=losses.squared_log_ratio(1e-3)), group),
            "max_rl": (losses.grpo(), setting.advantage(max_rl_advantages)),
            "pass_at_k(2)": (losses.grpo(), setting.advantage(pass_at_k(2))),
        }
    conditions = [Condition(name, make(config, loss, advantage)) for name, (loss, advantage) in parts.items()]
    names = ("greedy", "sampled", "entropy", "length")
    setting.run("objectives", config, conditions, metrics=names, curves=names[:3], against="grpo")


def make(config: Config, loss: Loss, advantage: Advantage) -> setting.Run:
    """Two iterations with this objective."""
    updates = dataclasses.replace(setting.UPDATES, iterations=2)
    return setting.make(config, lambda hyper: {"loss": loss, "advantage": advantage, "updates": updates})


if __name__ == "__main__":
    setting.main(experiment, __doc__)
