"""Loads of experts: a cost that keeps the routers of a mixture of experts from sending all tokens to a few."""

import jax
import jax.numpy as jnp

from grpo_jax.losses.contract import check_not_negative
from grpo_jax.protocols import Loss, Terms
from grpo_jax.statistics import Max, Mean
from grpo_jax.types import Experience, Metrics, Number, Scores


def load_balance(coefficient: Number = 0.001, *, by_layer: bool = False) -> Loss:
    """The auxiliary loss of mixtures of experts, as a loss of its own to be joined by `plus`.

        loss = coefficient * E * sum_e f_e P_e

    with `f_e` how many of its `k` experts a token has at `e`, on average, and `P_e` the mean probability that the
    router gives to `e`; `f` is not differentiated (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, where `k` is
    1). Even loads make it `k`, its least value where the most probable experts are those chosen.

    Means are over the tokens of the completions, as they were read, whatever the mask says, and over those of all
    layers together, as in transformers. Of several micro-batches each has its own `f`, and their costs are averaged by
    tokens: what it asks for is balance in each of them. Under router replay `f` is that of the sampler.

    Args:
      coefficient: 0.001 in the configs of Qwen 3 (`router_aux_loss_coef`), 0.02 in those of Mixtral.
      by_layer: True takes the sum in each layer and then the mean over layers, as Megatron does, so that one layer
        cannot make up for another.

    Raises:
      ValueError: for a coefficient below 0; when called, if the policy has no experts.
    """
    check_not_negative(coefficient=coefficient)

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        if scores.routers is None:
            raise ValueError("load_balance is for a mixture of experts, and the policy has none: leave it out")
        probabilities, choices = (jnp.sum(x, axis=0) for x in scores.routers)  # [L, E]
        L, E = choices.shape
        tokens = jnp.sum(experience.rollout.lengths).astype(jnp.float32)
        count = tokens * L
        chosen, rows = (choices, tokens) if by_layer else (jnp.sum(choices, axis=0, keepdims=True), count)
        share = jax.lax.stop_gradient(chosen) / jnp.maximum(rows, 1)
        cost = E * jnp.sum(share * probabilities)
        even = jnp.sum(choices, axis=1, keepdims=True) / E  # tokens of an expert, were all loads the same
        metrics: Metrics = {
            "load_balance": Mean(cost, count),
            "expert_load_max": Max(jnp.max(choices / jnp.maximum(even, 1 / E))),
            "experts_idle": Mean(jnp.sum(choices == 0).astype(jnp.float32), jnp.float32(L * E)),
        }
        return (Mean(coefficient * cost, count),), metrics

    return loss
