"""The means of a reward over held-out prompts, for rewards of rollouts, traced or on the host."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.policies import Policy
from grpo_jax.protocols import Reward
from grpo_jax.sampling import PolicySampler
from grpo_jax.types import Params, Prompts


def make_rollout_means(
    policy: Policy,
    samplers: Mapping[str, PolicySampler],
    batches: Sequence[Any],
    prompts: Callable[[Any], Prompts],
    reward: Reward,
    names: Sequence[str],
) -> Callable[[Params], dict[str, float]]:
    """Makes `params -> {"<sampler>/<name>": mean, "<sampler>/length": mean}`.

    A mean is over the completions that have the reward. Batch `n` is drawn with the key `n`, always the same.

    Args:
      policy: the network.
      samplers: by name, such as a greedy one and one at temperature 1.
      batches: what `prompts` makes the prompts of a batch of, such as rows.
      prompts: `batch -> Prompts`.
      reward: of `R` functions.
      names: theirs.
    """
    draws = {name: jax.jit(functools.partial(sampler, policy)) for name, sampler in samplers.items()}

    def evaluate(params: Params) -> dict[str, float]:
        measured: dict[str, float] = {}
        for name, draw in draws.items():
            total, count, tokens, completions = np.zeros(len(names)), np.zeros(len(names)), 0, 0
            for n, batch in enumerate(batches):
                rollout = draw(params, prompts(batch), jax.random.key(n))
                given, mask = map(np.asarray, reward(rollout))
                total += np.sum(np.where(mask, given, 0.0), axis=(0, 1), dtype=np.float64)
                count += np.sum(mask, axis=(0, 1))
                tokens, completions = tokens + int(np.sum(rollout.lengths)), completions + rollout.lengths.size
            means = (total / np.maximum(count, 1)).tolist()
            measured |= {f"{name}/{each}": mean for each, mean in zip(names, means, strict=True)}
            measured[f"{name}/length"] = tokens / completions
        return measured

    return evaluate
