"""The published objectives, each a composition of parts.

A loss is `f(scores, experience) -> (terms, metrics)`. A term is a `Mean`, the sum and
what it is to be divided by; the loss is the sum over terms of `sum / count`.
"""

from typing import Unpack

from grpo_jax.losses.aggregates import (
    completion_mean,
    completion_sum,
    constant_length,
    token_mean,
)
from grpo_jax.losses.anchors import old_policy, sampler
from grpo_jax.losses.composition import Parts, compose, policy_loss
from grpo_jax.losses.contract import check_positive
from grpo_jax.losses.penalties import covariant_kl
from grpo_jax.losses.ratios import product_ratio, sequence_ratio, sequence_token_ratio
from grpo_jax.losses.surrogates import (
    clipped_importance,
    gamma_weight,
    importance,
    pessimistic_clip,
    policy_gradient,
    ppo_clip,
    smoothed_importance,
    soft_gate,
    squared_policy_gradient,
)
from grpo_jax.losses.trust_regions import divergence_mask, quadratic_shift, total_variation
from grpo_jax.protocols import Divergence, Loss, PerToken, Terms
from grpo_jax.types import Array, Experience, Metrics, Number, Scores

# ------------------------------------------------------------- clipped token ratios


def grpo(
    *,
    epsilon: Number = 0.2,
    epsilon_high: Number | None = None,
    delta: Number | None = None,
    **parts: Unpack[Parts],
) -> Loss:
    """GRPO (Shao et al. 2024, arXiv:2402.03300, equation 3): clipped token ratios, mean over completions.

    The paper's own penalty is `k3(0.04)`; pass it, and a state with a reference.

    Args:
      epsilon: as in `ppo_clip`.
      epsilon_high: as in `ppo_clip`.
      delta: as in `ppo_clip`.
      **parts: replace `ratio`, `aggregate`, `weight`, `penalty` or `anchor`; see `policy_loss`.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high, delta), **Parts(aggregate=completion_mean) | parts)


def bnpo(
    *,
    epsilon: Number = 0.2,
    epsilon_high: Number | None = None,
    delta: Number | None = None,
    **parts: Unpack[Parts],
) -> Loss:
    """The loss that TRL calls `bnpo`: clipped token ratios, mean over the tokens of the update.

    TRL averages over the tokens of a micro-batch, and so depends on the split; here it
    is those of the whole update. (The name is that of Xiao et al. 2025,
    arXiv:2506.02864, whose subject is another: a Beta distribution of rewards.)
    Arguments as in `grpo`.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high, delta), **Parts(aggregate=token_mean) | parts)


def dr_grpo(
    max_tokens: int,
    *,
    epsilon: Number = 0.2,
    epsilon_high: Number | None = None,
    delta: Number | None = None,
    **parts: Unpack[Parts],
) -> Loss:
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): constant length; goes with `centered_advantages`.

    Args:
      max_tokens: the limit that completions were sampled under.
      epsilon: as in `ppo_clip`.
      epsilon_high: as in `ppo_clip`.
      delta: as in `ppo_clip`.
      **parts: as in `grpo`.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high, delta), **Parts(aggregate=constant_length(max_tokens)) | parts)


def dapo(
    *,
    epsilon: Number = 0.2,
    epsilon_high: Number = 0.28,
    delta: Number | None = None,
    **parts: Unpack[Parts],
) -> Loss:
    """The loss of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 8): clip-higher and the mean over tokens.

    The mean is over the tokens of the update, as in the paper. TRL divides by the
    average over the updates of a rollout: `normalize_by_rollout_tokens`. Arguments as in `grpo`.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high, delta), **Parts(aggregate=token_mean) | parts)


# ------------------------------------------------------------------ whole completions


def gspo(*, epsilon: Number = 3e-4, epsilon_high: Number = 4e-4, **parts: Unpack[Parts]) -> Loss:
    """GSPO (Zheng et al. 2025, arXiv:2507.18071, equation 5): the clipped ratio of the whole completion.

    Arguments as in `grpo`.
    """
    return policy_loss(
        ppo_clip(epsilon, epsilon_high), **Parts(aggregate=completion_mean, ratio=sequence_ratio) | parts
    )


def gspo_token(*, epsilon: Number = 3e-4, epsilon_high: Number = 4e-4, **parts: Unpack[Parts]) -> Loss:
    """GSPO-token (arXiv:2507.18071, equation 13): `gspo` for advantages that differ from token to token.

    Arguments as in `grpo`.
    """
    return gspo(epsilon=epsilon, epsilon_high=epsilon_high, **Parts(ratio=sequence_token_ratio) | parts)


def luspo(*, epsilon: Number = 2e-3, epsilon_high: Number = 2.5e-3, **parts: Unpack[Parts]) -> Loss:
    """LUSPO (2026, arXiv:2602.05261): `gspo` with each completion's loss times its length, so that tokens weigh alike.

    Arguments as in `grpo`.
    """
    return gspo(epsilon=epsilon, epsilon_high=epsilon_high, **Parts(aggregate=completion_sum) | parts)


def gmpo(*, epsilon: Number = 0.4, epsilon_high: Number | None = None, **parts: Unpack[Parts]) -> Loss:
    """GMPO (Zhao et al. 2025, arXiv:2507.20673, equation 4): the geometric mean of ratios that are clipped before it.

        objective = exp(mean_t clipped(log_ratio[t])) * A

    where a log-ratio is clipped above `epsilon_high` where `A > 0` and below
    `-epsilon` where `A < 0`: the bounds are on the log-ratio, not on the ratio. The mean
    is over the tokens that count, whatever their weights. A mean above 20 counts as 20.

    Args:
      epsilon: lower distance from 0 of a log-ratio; 0.4 in the paper.
      epsilon_high: upper distance; `epsilon` if None.
      **parts: replace `aggregate`, `weight` or `penalty`, or the level `ratio` that
        the clipped log-ratios are brought to.
    """
    check_positive(epsilon=epsilon, epsilon_high=epsilon_high)
    high = epsilon if epsilon_high is None else epsilon_high
    parts = Parts(aggregate=completion_mean, ratio=sequence_ratio) | parts
    ratio = parts["ratio"]

    def level(log_ratio: Array, mask: Array, advantages: Array) -> PerToken:
        clipped = {
            "clip_low": (advantages < 0) & (log_ratio < -epsilon),
            "clip_high": (advantages > 0) & (log_ratio > high),
        }
        return ratio(pessimistic_clip(log_ratio, advantages, -epsilon, high), mask), clipped

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        return importance()(log_ratio, advantages, log_probs)

    return compose(
        level,
        surrogate,
        parts["aggregate"],
        parts.get("weight"),
        parts.get("penalty"),
        parts.get("anchor", old_policy),
    )


# ---------------------------------------------------------------------- no hard clip


def reinforce(**parts: Unpack[Parts]) -> Loss:
    """REINFORCE (Williams 1992): the advantage times the log-prob of the completion, and no ratio.

    With `leave_one_out_advantages` it is RLOO (Ahmadian et al. 2024, arXiv:2402.14740,
    equation 7), with `batch_normalised_advantages` REINFORCE++ without its clip (Hu et
    al. 2025, arXiv:2501.03262; with the clip: `dapo(epsilon_high=0.2)`). Right for one
    update a rollout; TRL's RLOO has the clipped ratio of whole completions instead,
    which is `grpo(ratio=product_ratio)`.

    Args:
      **parts: replace `aggregate`, `weight` or `penalty`.

    Raises:
      ValueError: for a `ratio` or an `anchor`, which there is none of.
    """
    if "ratio" in parts or "anchor" in parts:
        raise ValueError("reinforce has no ratio, so none to replace; grpo(ratio=..., anchor=...) has one")
    return policy_loss(policy_gradient(), **Parts(aggregate=completion_sum) | parts)


def cispo(*, max_ratio: Number = 5.0, min_ratio: Number = 0.0, **parts: Unpack[Parts]) -> Loss:
    """CISPO (MiniMax-M1, 2025, arXiv:2506.13585, equation 4): a clipped importance weight, mean over tokens.

    The default cap of 5 is ScaleRL's (Khatri et al. 2025, arXiv:2510.13786); TRL's
    `epsilon_high` is the cap itself, while the paper's is `1 + epsilon_high`.

    Args:
      max_ratio: as in `clipped_importance`.
      min_ratio: as in `clipped_importance`.
      **parts: as in `grpo`.
    """
    return policy_loss(clipped_importance(max_ratio, min_ratio), **Parts(aggregate=token_mean) | parts)


def sapo(*, tau_pos: Number = 1.0, tau_neg: Number = 1.05, **parts: Unpack[Parts]) -> Loss:
    """SAPO (Gao et al. 2025, arXiv:2511.20347, equation 5): a soft gate, mean over completions.

    Args:
      tau_pos: as in `soft_gate`.
      tau_neg: as in `soft_gate`.
      **parts: as in `grpo`.
    """
    return policy_loss(soft_gate(tau_pos, tau_neg), **Parts(aggregate=completion_mean) | parts)


def vespo(
    *,
    k_pos: Number = 2.0,
    lambda_pos: Number = 3.0,
    k_neg: Number = 3.0,
    lambda_neg: Number = 2.0,
    **parts: Unpack[Parts],
) -> Loss:
    """VESPO (2026, arXiv:2602.10693): a gamma-shaped weight of the whole completion's ratio, mean over tokens.

    TRL adds the logarithm of the truncated weight between trainer and sampler to the
    ratio: `anchor=corrected(truncated_importance(3.0))`; `anchor=sampler` takes the ratio
    against the sampler itself.

    Args:
      k_pos: as in `gamma_weight`.
      lambda_pos: as in `gamma_weight`.
      k_neg: as in `gamma_weight`.
      lambda_neg: as in `gamma_weight`.
      **parts: as in `grpo`.
    """
    surrogate = gamma_weight(k_pos, lambda_pos, k_neg, lambda_neg)
    return policy_loss(surrogate, **Parts(aggregate=token_mean, ratio=product_ratio) | parts)


# --------------------------------------------- trust regions other than a band of the ratio


def dppo(
    *,
    low: Number = 0.2,
    high: Number | None = None,
    divergence: Divergence = total_variation,
    max_ratio: Number = 20.0,
    **parts: Unpack[Parts],
) -> Loss:
    """DPPO (Qi et al. 2026, arXiv:2602.04879): the score function inside a trust region of the token's probability.

    The ratio and the region are taken against the sampler, as in the paper; `anchor=old_policy` takes them against
    the trainer's own log-probs. prime-rl's default is `dppo(penalty=squared_log_ratio(1e-3))` with
    `centered_advantages`.

    Args:
      low: as in `divergence_mask`.
      high: as in `divergence_mask`.
      divergence: as in `divergence_mask`; `binary_kl` needs smaller bounds.
      max_ratio: as in `divergence_mask`.
      **parts: replace `aggregate`, `weight`, `penalty` or `anchor`.

    Raises:
      ValueError: for a `ratio`: the region is that of single tokens.
    """
    _refuse_ratio("dppo", parts)
    surrogate = divergence_mask(low, high, divergence=divergence, max_ratio=max_ratio)
    return policy_loss(surrogate, **Parts(aggregate=token_mean, anchor=sampler) | parts)


def drpo(*, delta: Number = 0.2, **parts: Unpack[Parts]) -> Loss:
    """DRPO (Yao et al. 2026, arXiv:2606.09821): DPPO's region as a smooth penalty, against the sampler.

    Args:
      delta: as in `quadratic_shift`.
      **parts: as in `dppo`.

    Raises:
      ValueError: for a `ratio`: the shift is that of single tokens.
    """
    _refuse_ratio("drpo", parts)
    return policy_loss(quadratic_shift(delta), **Parts(aggregate=token_mean, anchor=sampler) | parts)


def dro(*, beta: Number = 0.05, **parts: Unpack[Parts]) -> Loss:
    """DRO as verl has it: the score function less a square of the log-ratio, mean over tokens.

    Args:
      beta: as in `squared_policy_gradient`.
      **parts: as in `grpo`.
    """
    return policy_loss(squared_policy_gradient(beta), **Parts(aggregate=token_mean) | parts)


def pspo(*, alpha: Number = 0.1, **parts: Unpack[Parts]) -> Loss:
    """GR-PSPO (Dwyer et al. 2025, arXiv:2509.21282): the ratio of a smoothed policy and no clip, mean over completions.

    Args:
      alpha: as in `smoothed_importance`.
      **parts: as in `grpo`.
    """
    return policy_loss(smoothed_importance(alpha), **Parts(aggregate=completion_mean) | parts)


def m2po(**parts: Unpack[Parts]) -> Loss:
    """M2PO (Zheng et al. 2025, arXiv:2510.01161): the ratio to the sampler without a clip, mean over tokens.

    Its trust region is `transforms.second_moment(0.04)`, which goes into the step with it.

    Args:
      **parts: as in `grpo`.
    """
    return policy_loss(importance(), **Parts(aggregate=token_mean, anchor=sampler) | parts)


def kl_cov(*, coefficient: Number = 1.0, **parts: Unpack[Parts]) -> Loss:
    """KL-Cov (Cui et al. 2025, arXiv:2505.22617): no clip, and a pull on the tokens of highest covariance.

    Goes with `transforms.high_covariance(2e-3)`, which marks them. Clip-Cov of the same paper is a transform in
    front of a clipped loss: `bnpo()` with `transforms.clip_cov()`.

    Args:
      coefficient: as in `covariant_kl`.
      **parts: replace `ratio`, `aggregate`, `weight` or `anchor`; a penalty joins by `plus` and `penalty_loss`.

    Raises:
      ValueError: for a `penalty`, which would replace its own.
    """
    if "penalty" in parts:
        raise ValueError("kl_cov has a penalty of its own; plus(kl_cov(), penalty_loss(...)) adds another")
    return policy_loss(importance(), **Parts(aggregate=token_mean, penalty=covariant_kl(coefficient)) | parts)


def _refuse_ratio(name: str, given: Parts) -> None:
    if "ratio" in given:
        raise ValueError(f"{name} looks at the probability of single tokens and has no ratio to replace")


# ------------------------------------------------------------------- beside the policy


def sft() -> Loss:
    """Supervised learning of the completions: the mean over tokens of the negative log-likelihood, in nats.

    Every token of the mask counts alike; `experience.weights` are not looked at.
    """

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        return (token_mean(-scores.log_probs, experience.rollout.mask),), {}

    return loss
