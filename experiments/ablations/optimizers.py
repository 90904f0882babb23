"""AdamW and Muon, each at its own best learning rate.

python experiments/ablations/optimizers.py               # --estimate tells the time before
python experiments/ablations/optimizers.py --no-rank     # both at one rate, with curves

Muon is that of `grpo_jax.optimizers`: the layers' matrices by orthogonalised momentum, whose updates have the size of
Adam's, and embedding, head and norms by Adam at the same rate. What came of it: `docs/pages/results/ablations.md`.
"""

import optax
import setting
from setting import Condition, Config, Number

from grpo_jax import optimizers

DECAY = 0.01  # of the weights, times the learning rate, under both


def experiment(config: Config) -> None:
    """Two optimisers of the same task, starts and problems."""
    conditions = [
        Condition(name, setting.make(config, optimizer=optimizer))
        for name, optimizer in {"AdamW": adamw, "Muon": muon}.items()
    ]
    names = ("greedy", "sampled", "entropy")
    setting.run("optimizers", config, conditions, metrics=names, curves=names, against="AdamW")


def adamw(hyper: setting.Hyper, rate: Number) -> optax.GradientTransformation:
    """The standard run's Adam, with decay."""
    del hyper
    return optax.adamw(rate, b2=0.99, weight_decay=DECAY)


def muon(hyper: setting.Hyper, rate: Number) -> optax.GradientTransformation:
    """Muon, with the same decay, and the same Adam for what is no matrix of a layer."""
    return optimizers.muon(hyper["params"], rate, adam_b2=0.99, weight_decay=DECAY, adam_weight_decay=DECAY)


if __name__ == "__main__":
    setting.main(experiment, __doc__, default=Config(rank=True))
