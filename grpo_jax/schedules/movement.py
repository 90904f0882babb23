"""How far the updates of a step have moved the policy, for what forgets as the policy moves."""

from collections.abc import Callable

import jax.numpy as jnp

from grpo_jax.freezing import bind
from grpo_jax.losses import kl_k3
from grpo_jax.policies import Policy
from grpo_jax.schedules.scheduled import Scheduled, at
from grpo_jax.scoring import score
from grpo_jax.truncation import Truncation
from grpo_jax.types import Array, Experience, Number, Packing, Rollout, TrainState
from grpo_jax.updates import in_parts


def make_movement(
    policy: Policy,
    *,
    temperature: Number | Scheduled = 1.0,
    truncation: Truncation | Scheduled | None = None,
    parts: int = 1,
) -> Callable[[TrainState, Experience], Array]:
    """The divergence of the policy after a step from the one that sampled, on the completions of the step.

        D = mean over tokens of r - 1 - log r,    r = p_after / p_sampled           KL(p_sampled, p_after) by k3

    It costs one more scoring of the batch. Goes after the step, as in `train_step.followed_by`.

    Args:
      policy: the network.
      temperature: of the scores, that of the sampler; may be `Scheduled`.
      truncation: of the sampler; may be `Scheduled`.
      parts: of the batch that are scored one after the other.

    Returns:
      `(state after the step, experience) -> D [] float32`, nats per token that counts. Of the policy that sampled
      `old_log_probs` are read, where they were scored, else the sampler's log-probs.
    """

    def movement(state: TrainState, experience: Experience) -> Array:
        params = bind(state.params, state.frozen)

        def log_probs(part: tuple[Rollout, Packing | None]) -> Array:
            rollout, packing = part
            settings = {"temperature": at(temperature, state), "truncation": at(truncation, state), "entropy": False}
            return score(policy, params, rollout, packing=packing, **settings).log_probs

        rollout = experience.rollout
        mask = rollout.mask
        before = rollout.log_probs if experience.old_log_probs is None else experience.old_log_probs
        after = in_parts(log_probs, (rollout, experience.packing), parts)
        kl = kl_k3(jnp.where(mask, before, 0.0), jnp.where(mask, after, 0.0))
        return jnp.sum(kl) / jnp.maximum(jnp.sum(mask), 1)

    return movement
