"""Adapters: how much rank reinforcement learning needs, and at which learning rate, against full training.

python experiments/ablations/lora.py --seeds 16

All ranks and rates of all seeds are one program: adapters of rank 16 of which the columns from a run's rank on are
zeros, which stay zeros, and a scale of `32 / rank`.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import setting
from setting import Condition, Config

from grpo_jax.models import lora
from grpo_jax.types import Params, PRNGKey, TrainState
from grpo_jax.updates import init_state

RANKS = (1, 2, 4, 8, 16)
ALPHA = 32.0
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def experiment(config: Config) -> None:
    """Ranks and full training x learning rates."""
    full, adapters = setting.make(config), setting.make(config, initial=adapted)
    conditions = [Condition(f"full, rate {rate:g}", full, {"learning_rate": rate}) for rate in RATES]
    conditions += [
        Condition(f"rank {rank}, rate {rate:g}", adapters, {"learning_rate": rate, "rank": rank})
        for rank in RANKS
        for rate in RATES
    ]
    setting.run(
        "lora",
        config,
        conditions,
        metrics=("greedy", "sampled", "grad_norm"),
        curves=("greedy",),
        against="full, rate 0.0003",
    )


def adapted(key: PRNGKey, hyper: setting.Hyper, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of a run that trains adapters of `hyper["rank"]`."""
    adapters, base = lora.adapt(
        setting.policy, hyper["params"], rank=max(RANKS), alpha=max(RANKS), key=jax.random.fold_in(key, 2**31)
    )  # of scale 1
    cut = functools.partial(_cut, rank=hyper["rank"])
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * ALPHA / hyper["rank"] if path[-1].key == lora.SCALE else x, base
    )
    return init_state(jax.tree_util.tree_map_with_path(cut, adapters), optimizer, key, frozen=scaled)


def _cut(path: tuple, matrix: Params, rank: jax.Array) -> Params:
    """`lora_a [L, in, r]` with zeros from column `rank` on; `lora_b` is 0 and stays so there."""
    return jnp.where(jnp.arange(matrix.shape[-1]) < rank, matrix, 0.0) if path[-1].key == lora.A else matrix


if __name__ == "__main__":
    setting.main(experiment, __doc__)
