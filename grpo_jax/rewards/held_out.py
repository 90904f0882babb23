"""A verifier that is not trained on: what it says of the completions that the rewards say something else of."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.types import Metrics


def held_out_metrics(
    names: Sequence[str],
    values: tuple[np.ndarray, np.ndarray],
    trained: tuple[np.ndarray, np.ndarray],
    *,
    weights: Sequence[float] | None = None,
) -> Metrics:
    """What verifiers that nothing is learned from say of a batch, beside the reward that is learned from.

        held_out/<name>              the mean
        held_out/<name>_std          the deviation over completions
        held_out/<name>_agreement    the correlation with the trained reward over completions

    Where a policy learns to please its reward instead of the task, the reward rises, the verifier does not, and the
    agreement falls; `monitoring.held_out_disagrees` warns. A verifier that is asked every tenth step is enough.

    Args:
      names: of the verifiers, `R`.
      values: `(rewards [B, G, R], mask)` of them, as `rewards.host` gives them.
      trained: `(rewards [B, G, R'], mask)` that the policy learns from.
      weights: of these, 1 each unless given.

    Returns:
      Metrics; the agreement is left out where either is the same for all completions.
    """
    rewards, given = trained
    total = (np.where(given, rewards, 0.0) * (1.0 if weights is None else np.asarray(weights))).sum(-1)
    metrics: Metrics = {}
    for r, name in enumerate(names):
        there = values[1][..., r] & given.any(-1)
        held = values[0][..., r][there].astype(np.float64)
        if not held.size:
            continue
        metrics[f"held_out/{name}"] = held.mean()
        metrics[f"held_out/{name}_std"] = held.std()
        if held.std() > 0 and total[there].std() > 0:
            metrics[f"held_out/{name}_agreement"] = np.corrcoef(held, total[there])[0, 1]
    return metrics
