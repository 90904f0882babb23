"""Distillation: a teacher's distribution in place of a reward, on completions from anywhere.

The teacher is the reference policy: `TrainState.ref_params` holds its params, and `make_train_step(..., teacher=)` says
which network reads them; without `teacher` it is the policy's own. Where something is frozen, params like the trained
ones, such as adapters, are read with it, and those of a whole network alone. Completions that the policy sampled make
it on-policy distillation, demonstrations in the place of rollouts off-policy.

Two kinds of signal:

    sampled   the teacher's log-prob of the token drawn, `ref_log_probs`, as an advantage of each token:
              `advantages.distillation_advantages()`, or `sampled_reverse_kl()` beside another loss
    whole     a divergence over the vocabulary at every token, `Scores.divergence`, which `scoring.score` computes a
              chunk at a time and never holds for all: `distill()` with `Teacher(policy, reverse_kl)`

A divergence is `(log_p [N, V], log_q [N, V]) -> [N]` nats, of the policy `p` and the teacher `q`.
"""

import jax
import jax.numpy as jnp

from grpo_jax.losses.aggregates import token_mean
from grpo_jax.losses.contract import check_not_negative, difference, weighted, widened
from grpo_jax.losses.objectives import reinforce
from grpo_jax.protocols import Aggregate, Loss, Terms, VocabularyDivergence
from grpo_jax.types import Array, Experience, Metrics, Number, Scores


def forward_kl(log_p: Array, log_q: Array) -> Array:
    """`KL(q || p) = sum_v q (log q - log p)`: the policy covers all that the teacher may say (Hinton et al. 2015)."""
    return _expectation(log_q, log_q, log_p)


def reverse_kl(log_p: Array, log_q: Array) -> Array:
    """`KL(p || q) = sum_v p (log p - log q)`: the policy stays where the teacher is (MiniLLM, arXiv:2306.08543)."""
    return _expectation(log_p, log_p, log_q)


def generalised_jsd(beta: float) -> VocabularyDivergence:
    """Jensen-Shannon divergence with a weight (GKD, Agarwal et al. 2024, arXiv:2306.13649).

        m   = beta * q + (1 - beta) * p
        JSD = beta * KL(q || m) + (1 - beta) * KL(p || m)

    `beta` weighs the teacher, as in the paper and in TRL. It is 0 at either end: divided by `beta` it tends to
    `forward_kl` at 0, and by `1 - beta` to `reverse_kl` at 1. TRL's `beta=0` and `beta=1` are those two themselves.

    Args:
      beta: between 0 and 1; 0.5 is symmetric.

    Raises:
      ValueError: at or beyond the ends.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is between 0 and 1, got {beta}; the ends are forward_kl and reverse_kl")

    def divergence(log_p: Array, log_q: Array) -> Array:
        neither = (log_p == -jnp.inf) & (log_q == -jnp.inf)  # whose sum of exponentials has no slope
        of_q, of_p = (jnp.where(neither, 0.0, x) for x in (log_q, log_p))
        log_m = jnp.where(neither, -jnp.inf, jnp.logaddexp(jnp.log(beta) + of_q, jnp.log1p(-beta) + of_p))
        return beta * _expectation(log_q, log_q, log_m) + (1 - beta) * _expectation(log_p, log_p, log_m)

    return divergence


def of_top_k(divergence: VocabularyDivergence, k: int) -> VocabularyDivergence:
    """A divergence of the teacher's `k` likeliest tokens, and of any other as one more outcome.

    A lower bound of the whole one, and 0 only where the teacher's top agrees. (TRL takes the policy's own top k for
    self-distillation, renormalised and without the rest.)

    Args:
      divergence: such as `reverse_kl`.
      k: at least 1 and below the vocabulary's size.

    Raises:
      ValueError: for a `k` out of range.
    """
    if k < 1:
        raise ValueError(f"k is at least 1, got {k}")

    def of_top(log_p: Array, log_q: Array) -> Array:
        if k >= log_q.shape[-1]:
            raise ValueError(f"k is below the {log_q.shape[-1]} tokens of the vocabulary, got {k}")
        top_q, tokens = jax.lax.top_k(log_q, k)
        top_p = jnp.take_along_axis(log_p, tokens, axis=-1)
        return divergence(_with_rest(top_p), _with_rest(top_q))

    return of_top


def distill(coefficient: Number = 1.0, *, aggregate: Aggregate = token_mean) -> Loss:
    """The divergence from the teacher that was scored, alone or beside any objective by `plus`.

        loss = coefficient * aggregate(divergence)

    The gradient is through the distribution at each token that was drawn and not through which are drawn, as in GKD.

    Args:
      coefficient: at least 0.
      aggregate: how tokens count.

    Returns:
      A loss with the metric `divergence`, nats per token; it needs `make_train_step(..., teacher=Teacher(...))`.

    Raises:
      ValueError: for a coefficient below 0; when called, without a divergence.
    """
    check_not_negative(coefficient=coefficient)

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        if scores.divergence is None:
            raise ValueError("distill needs make_train_step(..., teacher=Teacher(policy, reverse_kl))")
        mask = experience.rollout.mask
        cost = aggregate(scores.divergence, mask)
        return (cost._replace(sum=weighted(coefficient, cost.sum)),), {
            "divergence": token_mean(scores.divergence, mask)
        }

    return loss


def distill_top(
    divergence: VocabularyDivergence, coefficient: Number = 1.0, *, aggregate: Aggregate = token_mean
) -> Loss:
    """`distill` of `of_top_k`, for a teacher whose likeliest tokens were computed before: no teacher in memory.

    Args:
      divergence: of the teacher's likeliest tokens, and any other as one more outcome.
      coefficient: at least 0.
      aggregate: how tokens count.

    Returns:
      A loss with the metric `divergence`; it needs `experience.teacher_top`, as `scoring.likeliest` makes it.

    Raises:
      ValueError: for a coefficient below 0; when called, without `teacher_top`.
    """
    check_not_negative(coefficient=coefficient)

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        if experience.teacher_top is None or scores.top_log_probs is None:
            raise ValueError("distill_top needs the experience's teacher_top: scoring.likeliest makes it")
        mask = experience.rollout.mask
        # Padding holds zeros, whose sum is no probability.
        ours, theirs = (
            jnp.where(mask[..., None], x, -10.0) for x in (scores.top_log_probs, experience.teacher_top.log_probs)
        )
        distance = divergence(_with_rest(ours), _with_rest(theirs))
        cost = aggregate(distance, mask)
        return (cost._replace(sum=weighted(coefficient, cost.sum)),), {"divergence": token_mean(distance, mask)}

    return loss


def sampled_reverse_kl(coefficient: Number = 1.0, *, aggregate: Aggregate = token_mean) -> Loss:
    """The teacher's log-prob less the policy's as the advantage of each token, beside any objective by `plus`.

        loss = coefficient * aggregate(-sg(log q - log p) * log p)

    Its expected gradient on-policy is that of `reverse_kl` (Thinking Machines, "On-Policy Distillation", 2025); its
    value is no divergence. The advantage is of the policy that learns, so that the pull ends where the teacher is met,
    as in prime-rl; `advantages.distillation_advantages` has that of the policy that sampled.

    Args:
      coefficient: at least 0.
      aggregate: how tokens count.

    Returns:
      A loss with the metric `reverse_kl`, the mean of `log p - log q`: an estimate of the divergence in nats per token.

    Raises:
      ValueError: for a coefficient below 0; when called, without `ref_log_probs`.
    """
    check_not_negative(coefficient=coefficient)
    score_function = reinforce(aggregate=aggregate)

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        if experience.ref_log_probs is None:
            raise ValueError("sampled_reverse_kl needs a teacher's ref_log_probs: put its params into state.ref_params")
        mask = experience.rollout.mask
        ahead = jax.lax.stop_gradient(difference(experience.ref_log_probs, scores.log_probs, mask))
        (term,), _ = score_function(scores, experience._replace(advantages=weighted(coefficient, ahead), weights=None))
        return (term,), {"reverse_kl": token_mean(-ahead, mask)}

    return loss


def _expectation(log_weight: Array, log_a: Array, log_b: Array) -> Array:
    """`sum_v weight (log a - log b)`; a token of weight 0 adds nothing, whatever its log-probs.

    Infinite, without a gradient, where `b` is 0 and the weight is not.
    """
    weight = jnp.exp(log_weight)
    absent = weight == 0
    ahead = jnp.where(absent, 0.0, log_a) - jnp.where(absent, 0.0, log_b)
    infinite = jnp.isinf(ahead)
    finite = jnp.sum(weight * jnp.where(infinite, 0.0, ahead), axis=-1)
    return jnp.where(jnp.any(infinite, axis=-1), jnp.inf, finite)


def _with_rest(log_probs: Array) -> Array:
    """`[N, k]` to `[N, k + 1]`: the last is the log-prob of any other token, at least log(1e-8)."""
    log_probs = widened(log_probs)  # in float16 there is no 1e-8
    rest = jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True), 1e-8))
    return jnp.concatenate([log_probs, rest], axis=-1)
