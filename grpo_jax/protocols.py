"""The functions that stages take and return: their arguments, shapes and results.

Any function of the same arguments is one; nothing is inherited and nothing is registered. Arguments are passed by
position, so their names are free, except where a class says otherwise.

Axes: `B` prompts, `G` completions in a group, `R` reward functions, `T` completion tokens.
"""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Experience, Metrics, Params, PRNGKey, Prompts, Rollout, Scores

if TYPE_CHECKING:
    from grpo_jax.policies import Policy

Terms = tuple[Mean, ...]  # of a loss: its value is the sum over terms of sum / count
PerToken = tuple[Array, dict[str, Array]]  # [B, G, T], and metrics [B, G, T] to be averaged over the tokens that count

# ------------------------------------------------------------------------------- the step


class Sampler(Protocol):
    """Draws a group of completions for each prompt; see `sampling`.

    One that goes through the host, as conversations do, has `on_host = True`, and no program calls it.
    One that does not draw from all tokens also has a `truncation`, which the scorer reads, too.
    """

    @property
    def temperature(self) -> Any:
        """The temperature that logits are divided by: a number or a traced scalar. The scorer reads it."""

    def __call__(self, policy: "Policy", params: Params, prompts: Prompts, key: PRNGKey, /) -> Rollout:
        """Samples.

        Args:
          policy: the network, static.
          params: its parameters.
          prompts: `B` prompts.
          key: of this rollout.

        Returns:
          A rollout of `[B, G, T]` tokens, with the log-probs of the distribution that they were drawn from.
        """


class Reward(Protocol):
    """Scores a rollout by `R` reward functions; see `rewards`. Traced, or on the host between the step's two halves."""

    def __call__(self, rollout: Rollout, /) -> tuple[Array | np.ndarray, Array | np.ndarray]:
        """Scores.

        Returns:
          Rewards `[B, G, R]` float32, and `reward_mask [B, G, R]` bool, False where a reward could not be given.
        """


class ExperienceTransform(Protocol):
    """Changes an experience before it is split into updates; see `transforms`."""

    def __call__(self, experience: Experience, /) -> tuple[Experience, Metrics]:
        """Transforms.

        Args:
          experience: with advantages, and reference log-probs where there is a reference.

        Returns:
          The changed experience, and metrics, a `Mean`, a `Max` or a scalar each.
        """


# ------------------------------------------------------------------------------ advantages


class Advantage(Protocol):
    """Makes the advantages of an experience; see `advantages.from_rewards` and `from_experience`."""

    def __call__(self, experience: Experience, /) -> tuple[Array, Metrics]:
        """Compares completions.

        Args:
          experience: with rewards, and what `collect` has scored.

        Returns:
          Advantages `[B, G]`, one per completion, or `[B, G, T]`, one per token; and metrics.
        """


class Estimator(Protocol):
    """Turns the total rewards of completions into advantages, such as `advantages.group_advantages`."""

    def __call__(self, rewards: Array, mask: Array | None, /) -> Array:
        """Estimates.

        Args:
          rewards: `[B, G]` float, one per completion.
          mask: `[B, G]` bool, False where no reward could be given; None where all were given.

        Returns:
          Advantages `[B, G]`, 0 where `mask` is False.
        """


class ExperienceEstimator(Protocol):
    """An estimator that also sees lengths, entropy or log-probs; see `advantages.from_experience`."""

    def __call__(self, rewards: Array, mask: Array, experience: Experience, /) -> Array:
        """Estimates.

        Args:
          rewards: `[B, G]`, the total reward of each completion.
          mask: `[B, G]` bool, False where no reward could be given.
          experience: with all that `collect` has scored.

        Returns:
          Advantages `[B, G]` or `[B, G, T]`.
        """


class Cost(Protocol):
    """A cost that is subtracted from the reward, such as `advantages.kl_cost(beta)`."""

    def __call__(self, experience: Experience, /) -> Array:
        """Computes the cost `[B, G]`, in reward units."""


# ---------------------------------------------------------------------------------- losses


class Loss(Protocol):
    """An objective, to be minimised; see `losses`."""

    def __call__(self, scores: Scores, experience: Experience, /) -> tuple[Terms, Metrics]:
        """Evaluates a batch or a part of one.

        Args:
          scores: log-probs and entropy `[B, G, T]` under the current policy; what is differentiated.
          experience: the rollout with old and reference log-probs and advantages.

        Returns:
          Terms, a `Mean(sum, count)` each, whose parts add up over micro-batches; and metrics, `Mean`s and `Max`es.
        """


class Anchor(Protocol):
    """The log-probs that a ratio is taken against, such as `losses.old_policy` and `losses.sampler`."""

    def __call__(self, scores: Scores, experience: Experience, /) -> Array:
        """Picks or computes log-probs `[B, G, T]`; anything where the mask is False."""


class Ratio(Protocol):
    """The level at which the policy is compared with the old policy, such as `losses.sequence_ratio`."""

    def __call__(self, log_ratio: Array, mask: Array, /) -> Array:
        """Maps log-ratios to log-ratios.

        Args:
          log_ratio: `[B, G, T]`, `log_probs - old_log_probs`, 0 where `mask` is False.
          mask: `[B, G, T]` bool.

        Returns:
          The log-ratio `[B, G, T]` of each token, token-level or of the whole completion.
        """


class Surrogate(Protocol):
    """A surrogate objective per token, to be maximised, such as `losses.ppo_clip(epsilon)`."""

    def __call__(self, log_ratio: Array, advantages: Array, log_probs: Array, /) -> PerToken:
        """Evaluates the objective.

        Args:
          log_ratio: `[B, G, T]`, as the ratio returned it; 0 where a token does not count.
          advantages: `[B, G, T]`, 0 where a token does not count or has a weight of 0.
          log_probs: `[B, G, T]`, 0 where a token does not count.

        Returns:
          The objective `[B, G, T]`, and metrics `[B, G, T]`, averaged over tokens that count and have a weight.
        """


class Weight(Protocol):
    """Multiplies each token's surrogate objective, undifferentiated, such as `losses.off_policy_mask()`."""

    def __call__(self, scores: Scores, experience: Experience, /) -> PerToken:
        """Computes weights `[B, G, T]`, and metrics `[B, G, T]`, averaged over the tokens that count."""


class Penalty(Protocol):
    """A cost per token in the loss, to be minimised, such as `losses.k3(beta)`."""

    def __call__(self, scores: Scores, experience: Experience, /) -> PerToken:
        """Computes costs `[B, G, T]`, and metrics `[B, G, T]`, averaged over the tokens that count."""


class KLEstimate(Protocol):
    """Estimates a divergence from the log-probs of the tokens drawn, such as `losses.kl_k1`."""

    def __call__(self, log_probs: Array, ref_log_probs: Array, /) -> Array:
        """Estimates the KL divergence at each token, `[B, G, T]` nats."""


class Divergence(Protocol):
    """How far the probability of the token drawn has moved, such as `losses.total_variation`."""

    def __call__(self, log_probs: Array, old_log_probs: Array, /) -> Array:
        """Measures the distance `[B, G, T]` of two policies by the log-probs of the token that was drawn."""


class VocabularyDivergence(Protocol):
    """How far the policy is from a teacher over the vocabulary, such as `losses.reverse_kl`."""

    def __call__(self, log_p: Array, log_q: Array, /) -> Array:
        """Maps the log-probs of the policy and the teacher, `[N, V]` each, to `[N]` nats."""


class Aggregate(Protocol):
    """How tokens count in a loss, such as `losses.token_mean`."""

    def __call__(self, per_token: Array, mask: Array, /) -> Mean:
        """Reduces tokens to a term.

        Args:
          per_token: `[B, G, T]` float; anything where `mask` is False.
          mask: `[B, G, T]` bool, True for the tokens that count.

        Returns:
          `Mean(sum [], count [])`, kept apart so that the parts of a batch add up.
        """
