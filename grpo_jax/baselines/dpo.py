"""DPO: a policy trained on preferences, without a reward model and without sampling.

Offline, on pairs that were given:

    experience = preferences.from_demonstrations(chosen, rejected)
    state = init_state(params, optimizer, key, reference=True)
    state, metrics = make_learn(policy, optimizer, loss=dpo.dpo(beta=0.1))(state, experience)

Online, on pairs of what the policy has just sampled:

    state, metrics = learn(state, preferences.pairs(collect(state, prompts)))
"""

import jax.numpy as jnp

from grpo_jax.baselines.preferences import bradley_terry, check_label_smoothing, whole_pairs
from grpo_jax.losses.contract import check_positive, difference
from grpo_jax.protocols import Loss, Terms
from grpo_jax.statistics import Mean
from grpo_jax.types import Experience, Metrics, Number, Scores


def dpo(*, beta: Number = 0.1, label_smoothing: Number = 0.0) -> Loss:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7), on groups of `[chosen, rejected]`.

        h[b, g] = beta * sum_t (log_probs[b, g, t] - ref_log_probs[b, g, t])
        loss = -mean_b log sigmoid(h[b, 0] - h[b, 1])

    `h` is the reward that the policy implies (equation 5, up to a constant of the prompt).

    Args:
      beta: above 0; 0.1 in the paper's experiments.
      label_smoothing: as in `preferences.bradley_terry`; above 0 it is conservative DPO.

    Returns:
      A loss that counts whole pairs, with the metrics `accuracy` and `margin` of
      `bradley_terry`, and `chosen_reward` and `rejected_reward`, the means of `h`: both
      may fall while the margin rises.

    Raises:
      ValueError: for a setting out of range; when called, without `ref_log_probs`, or for
        groups that are not pairs.
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        if experience.ref_log_probs is None:
            raise ValueError("DPO needs a reference policy: init_state(..., reference=True)")
        counted = whole_pairs(experience)
        mask = experience.rollout.mask & counted[:, None, None]
        implied = beta * jnp.sum(difference(scores.log_probs, experience.ref_log_probs, mask), axis=-1)
        chosen, rejected = implied[:, 0], implied[:, 1]
        term, metrics = bradley_terry(chosen - rejected, counted, label_smoothing=label_smoothing)
        return (term,), metrics | {
            "chosen_reward": Mean(jnp.sum(chosen), term.count),
            "rejected_reward": Mean(jnp.sum(rejected), term.count),
        }

    return loss
