"""Objectives written out token by token in NumPy float64, from their papers, with gradients worked out by hand.

An objective is a sum of terms. A term says how tokens count and what each of a completion's tokens costs:

    cost(row, held) -> cost [n], its slope by the log-probs [n, n], its slope by the entropies [n]

of the `n` tokens of one completion that count; row `t` of the slope belongs to the cost of token `t`. What is not
differentiated is computed from `held`, which equals `row`: held where it is while `row` moves, it makes the gradient
the slope of the value.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import losses, statistics
from grpo_jax.types import Experience, Prompts, Rollout, Scores

MAX_TOKENS = 11  # the limit of sampling; the batches here are narrower


class Case(NamedTuple):
    """What a loss sees, in float64; or one completion of it, its tokens that count."""

    log_probs: Any  # [B, G, T], and so old, ref, sampler and entropy
    old: Any
    ref: Any
    sampler: Any
    entropy: Any
    advantages: Any  # [B, G] or [B, G, T]
    mask: Any  # [B, G, T]
    token_share: Any  # [B]
    weights: Any = None  # [B, G, T]
    high_covariance: Any = None  # [B, G, T] bool


class Term(NamedTuple):
    """One term of an objective."""

    count: str | tuple[str, float]  # how tokens count, see `token_weights`
    cost: Callable[[Case, Case], tuple[Any, Any, Any]]
    of_policy: bool = True  # the term with the advantages


# ------------------------------------------------------------------------ how tokens count


def token_weights(count, case):
    """What each token's cost is multiplied by, `[B, G, T]`."""
    mask = case.mask
    B, G, _ = mask.shape
    lengths = mask.sum(-1)
    completions = sum(bool(mask[b, g].any()) for b, g in np.ndindex(B, G))
    prompts = sum(bool(mask[b].any()) for b in range(B))
    weight = np.zeros(mask.shape)
    for b, g, t in np.argwhere(mask):
        match count:
            case "completion":
                divisor = completions * lengths[b, g]
            case "completion_of_all":
                divisor = B * G * lengths[b, g]
            case "completion_sum":
                divisor = completions
            case "token":
                divisor = mask.sum()
            case "prompt":
                divisor = prompts * mask[b].sum()
            case "constant":
                divisor = MAX_TOKENS * completions
            case "rollout":  # tokens over prompts, times the update's prompts
                divisor = case.token_share.sum()
            case "per_prompt", number:
                divisor = number * B
        weight[b, g, t] = 1 / divisor
    return weight


# ------------------------------------------------------------- the ratio of one completion


def levels(level, log_ratio, held):
    """Of one completion: each token's ratio, the same held still, and the slope of each one's logarithm `[n, n]`."""
    n, ratios, held_ratios = len(log_ratio), np.exp(log_ratio), np.exp(held)
    match level:
        case "token":
            return ratios, held_ratios, np.eye(n)
        case "sequence":  # GSPO, equation 7
            geometric, held_geometric = np.prod(ratios) ** (1 / n), np.prod(held_ratios) ** (1 / n)
            return np.full(n, geometric), np.full(n, held_geometric), np.full((n, n), 1 / n)
        case "sequence_token":  # GSPO-token, equation 14: p / sg(p) moves, and is 1
            geometric = np.prod(held_ratios) ** (1 / n)
            return geometric * ratios / held_ratios, np.full(n, geometric), np.eye(n)
        case "product":  # the importance weight of the completion
            return np.full(n, np.prod(ratios)), np.full(n, np.prod(held_ratios)), np.ones((n, n))


# --------------------------------------------------------------------- gains of one token
# (ratio, held ratio, advantage, log-prob) -> gain, its slope by the log of the ratio, its slope by the log-prob


def clip(low, high, delta=np.inf):
    """PPO, equation 7, and for bad tokens the dual clip."""

    def gain(ratio, held, A, log_prob):
        plain, clipped = min(ratio, delta) * A, min(max(ratio, 1 - low), 1 + high) * A
        moves = plain <= clipped and ratio < delta  # in the band both are the same
        return min(plain, clipped), ratio * A if moves else 0.0, 0.0

    return gain


def score():
    """Williams 1992."""
    return lambda ratio, held, A, log_prob: (A * log_prob, 0.0, A)


def cispo_weight(cap, floor=0.0):
    """MiniMax-M1, equations 4 and 5."""

    def gain(ratio, held, A, log_prob):
        weight = floor if held < floor else cap if held > cap else held
        return weight * A * log_prob, 0.0, weight * A

    return gain


def soft(good=1.0, bad=1.05):
    """SAPO, equations 5 and 6; the slope is equation 8's `4 p (1 - p)` times the ratio."""

    def gain(ratio, held, A, log_prob):
        tau = good if A > 0 else bad
        p = 1 / (1 + np.exp(-tau * (ratio - 1)))
        return 4 / tau * p * A, 4 * p * (1 - p) * ratio * A, 0.0

    return gain


def gamma(k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0):
    """VESPO: `W^k exp(lambda (1 - W))`."""

    def gain(ratio, held, A, log_prob):
        k, rate = (k_pos, lambda_pos) if A >= 0 else (k_neg, lambda_neg)
        weight = held**k * np.exp(rate * (1 - held))
        return weight * A * log_prob, 0.0, weight * A

    return gain


def unclipped():
    """The importance weight."""
    return lambda ratio, held, A, log_prob: (ratio * A, ratio * A, 0.0)


def smoothed(alpha):
    """PSPO: the ratio of a policy mixed with the old one."""
    return lambda ratio, held, A, log_prob: (((1 - alpha) * ratio + alpha) * A, (1 - alpha) * ratio * A, 0.0)


def binary_divergence(kind, p, q):
    """Of the two distributions (p, 1 - p) and (q, 1 - q) over two outcomes, `q` the old one."""
    if kind == "total_variation":
        return (abs(p - q) + abs((1 - p) - (1 - q))) / 2
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


def region(low, high, kind="total_variation", cap=20.0):
    """DPPO, equations 11 and 12; `p_old` is the log-prob over the ratio, and both stay where they were."""

    def gain(ratio, held, A, log_prob):
        old = np.exp(log_prob) / ratio
        p = old * held
        outside = binary_divergence(kind, p, old) > (high if A > 0 else low)
        leaving = p > old if A > 0 else p < old
        weight = 0.0 if outside and leaving else min(held, cap)
        return weight * A * log_prob, 0.0, weight * A

    return gain


def shift(delta):
    """DRPO: `r A - |A| / (2 delta) p_old (r - 1)^2`."""

    def gain(ratio, held, A, log_prob):
        old = np.exp(log_prob) / ratio
        value = ratio * A - abs(A) / (2 * delta) * old * (ratio - 1) ** 2
        return value, ratio * A - abs(A) / delta * old * (ratio - 1) * ratio, 0.0

    return gain


# ---------------------------------------------- weights of one completion, row -> [n]


def importance(row, level):
    """Old policy over sampler."""
    gap = row.old - row.sampler
    return levels(level, gap, gap)[0]


def truncated(limit, low=0.0, level="token"):
    """Truncated importance sampling."""
    return lambda row: np.array([min(max(w, low), limit) for w in importance(row, level)])


def masked(low, high, level="token"):
    """Masked importance sampling."""
    return lambda row: np.array([w if low <= w <= high else 0.0 for w in importance(row, level)])


def near_policy(threshold):
    """DeepSeek-V3.2, section 3.1."""

    def weight(row):
        distance = sum(np.log(np.exp(row.sampler) / np.exp(row.log_probs))) / len(row.log_probs)
        return np.array([0.0 if A < 0 and distance > threshold else 1.0 for A in row.advantages])

    return weight


def all_of(*weights):
    """Their product."""
    return lambda row: np.prod([weight(row) for weight in weights], axis=0)


def weigh(row, correction):
    """What the gain of each token is multiplied by."""
    weight = np.ones(len(row.log_probs)) if row.weights is None else row.weights
    return weight if correction is None else weight * correction(row)


# ----------------------------------------------------------------- costs of one completion


def to_old(row):
    """The ratio is taken against the old policy."""
    return row.old


def to_sampler(row):
    """The ratio is taken against the sampler."""
    return row.sampler


def to_corrected(correction):
    """The ratio is multiplied by a weight."""
    return lambda row: row.old - np.log(np.maximum(correction(row), 1e-8))


def policy(gain, level="token", correction=None, anchor=to_old):
    """Of a gain of each token."""

    def cost(row, held):
        n, weight = len(row.log_probs), weigh(held, correction)
        ratios, held_ratios, slopes = levels(level, row.log_probs - anchor(row), held.log_probs - anchor(row))
        costs, by_log_probs = np.zeros(n), np.zeros((n, n))
        for t in range(n):
            value, by_log_ratio, by_log_prob = gain(ratios[t], held_ratios[t], row.advantages[t], row.log_probs[t])
            costs[t] = -weight[t] * value
            by_log_probs[t] = -weight[t] * by_log_ratio * slopes[t]
            by_log_probs[t, t] -= weight[t] * by_log_prob
        return costs, by_log_probs, np.zeros(n)

    return cost


def geometric(low=0.4, high=0.4, level="sequence", correction=None, anchor=to_old):
    """GMPO, equation 4: each ratio is clipped to (e^-low, e^high), and their geometric mean taken.

    The paper's `min(ratio * A, clip(ratio) * A)`, stripped of `A`. The paper has no weights: here the mean is over all
    tokens, whatever their weights.
    """

    def cost(row, held):
        n, weight = len(row.log_probs), weigh(held, correction)
        clipped, moves = np.ones(n), np.zeros(n)
        for t in range(n):
            ratio, A = np.exp(row.log_probs[t] - anchor(row)[t]), row.advantages[t]
            bounded = min(max(ratio, np.exp(-low)), np.exp(high))
            moves[t] = ratio * A <= bounded * A
            clipped[t] = ratio if moves[t] else bounded
        root = 1 / n if level == "sequence" else 1.0
        value = np.prod(clipped) ** root
        gain = -weight * row.advantages * value
        return gain, np.outer(gain, moves * root), np.zeros(n)

    return cost


def likelihood(row, held):
    """The negative log-likelihood of the completion."""
    n = len(row.log_probs)
    return -row.log_probs, -np.eye(n), np.zeros(n)


def square(tau, anchor=to_sampler, *, weighted=False):
    """A square of the log-ratio."""

    def cost(row, held):
        d = row.log_probs - anchor(row)
        weight = tau * (weigh(held, None) if weighted else np.ones(len(d)))
        return weight * d * d, np.diag(2 * weight * d), np.zeros(len(d))

    return cost


def distance_of_marked(coefficient):
    """KL-Cov: `|log p - log p_old|` on marked tokens."""

    def cost(row, held):
        d, weight = row.log_probs - row.old, coefficient * row.high_covariance
        return weight * abs(d), np.diag(weight * np.sign(d)), np.zeros(len(d))

    return cost


def bonus(coefficient):
    """A reward for entropy."""

    def cost(row, held):
        n = len(row.entropy)
        return -coefficient * row.entropy, np.zeros((n, n)), np.full(n, -coefficient)

    return cost


# name -> value and slope, with d = log p - log ref
KLS = {
    "k1": (lambda d: d, lambda d: 1.0),
    "k2": (lambda d: d * d / 2, lambda d: d),
    "k3": (lambda d: np.exp(-d) - 1 + d, lambda d: 1 - np.exp(-d)),
}


def kl(name, beta, correction=None):
    """A penalty, times the ratio at the level `correction`; both factors are differentiated."""
    estimate, derivative = KLS[name]

    def cost(row, held):
        n, d = len(row.log_probs), row.log_probs - row.ref
        ratios, slopes = np.ones(n), np.zeros((n, n))
        if correction is not None:
            log_ratio = row.log_probs - row.old
            ratios, _, slopes = levels(correction, log_ratio, log_ratio)
        costs, by_log_probs = np.zeros(n), np.zeros((n, n))
        for t in range(n):
            costs[t] = beta * ratios[t] * estimate(d[t])
            by_log_probs[t] = costs[t] * slopes[t]
            by_log_probs[t, t] += beta * ratios[t] * derivative(d[t])
        return costs, by_log_probs, np.zeros(n)

    return cost


# ------------------------------------------------------------------------- the objective


def row_of(case, b, g):
    """One completion's tokens that count."""
    kept = case.mask[b, g]
    advantages = case.advantages if case.advantages.ndim == 3 else np.repeat(case.advantages[..., None], kept.size, -1)
    per_token = case._replace(advantages=advantages, token_share=None)
    return Case(*(None if x is None else x[b, g][kept] for x in per_token))


def completion_losses(terms, case, held=None):
    """What each completion adds to the loss `[B, G]`, and the gradient `[B, G, T, 2]` by log-probs and entropies."""
    held = case if held is None else held
    value, gradient = np.zeros(case.mask.shape[:2]), np.zeros((*case.mask.shape, 2))
    for term in terms:
        weight = token_weights(term.count, case)
        for b, g in np.ndindex(value.shape):
            kept = np.flatnonzero(case.mask[b, g])
            if kept.size:
                costs, by_log_probs, by_entropies = term.cost(row_of(case, b, g), row_of(held, b, g))
                value[b, g] += sum(weight[b, g, kept] * costs)
                gradient[b, g, kept, 0] += weight[b, g, kept] @ by_log_probs
                gradient[b, g, kept, 1] += weight[b, g, kept] * by_entropies
    return value, gradient


def reference(terms, case):
    """The loss, and its gradient `[B, G, T, 2]` with respect to `log_probs` and `entropy`."""
    value, gradient = completion_losses(terms, case)
    return value.sum(), gradient


# ----------------------------------------------------------------------------- the cases

# One completion in four is almost on-policy, so that the narrow bounds of GSPO and LUSPO have an inside.
SPREADS = np.array([[0.6, 3e-4, 1.5, 0.4], [3e-4, 1.5, 0.4, 0.6], [1.5, 0.4, 0.6, 3e-4], [0.6, 0.6, 0.6, 0.6]])
SIGNS = np.array([[1, 1, 1, -1], [-1, -1, 1, -1], [-1, -1, 1, -1], [1, -1, 1, -1]])


def case_of(seed=69, *, full=False, precision=np.float64):
    """A random case of unequal lengths, with a hole, empty completions and an empty prompt.

    Args:
      seed: of the draw.
      full: with advantages that differ from token to token, and with weights of 0, 1 and between.
      precision: numbers are rounded to it, so that the reference starts from the very numbers that the code sees.
    """
    rng = np.random.default_rng(seed)
    B, G, T = 4, 4, 8
    lengths = rng.integers(2, T + 1, (B, G))
    lengths[0, 0], lengths[1, 1], lengths[B - 1] = T, 0, 0
    lengths[2, 0] = max(lengths[2, 0], 3)
    mask = np.arange(T) < lengths[..., None]
    mask[2, 0, 1] = False  # a token that the policy did not write
    old = -0.1 - rng.exponential(2.0, (B, G, T))
    log_ratio = SPREADS[..., None] * rng.normal(size=(B, G, T))
    for b, g in ((0, 2), (2, 0)):  # a good and a bad token beyond every cap
        old[b, g, 0], log_ratio[b, g, 0] = -2.5, 1.8
    log_probs = np.minimum(old + log_ratio, -1e-3)
    ref = np.minimum(old + 0.6 * rng.normal(size=(B, G, T)), -1e-3)
    sampler = np.minimum(old + 0.7 * rng.normal(size=(B, G, T)), -1e-3)
    entropy = rng.exponential(1.0, (B, G, T))
    advantages = SIGNS * (0.2 + rng.exponential(1.0, (B, G)))
    weights = None
    if full:
        advantages = advantages[..., None] + 1.5 * rng.normal(size=(B, G, T))
        weights = np.where(mask, rng.choice([0.0, 1.0, 0.25, 1.75], (B, G, T)), 0.0)
    token_share = rng.uniform(4.0, 20.0, B)
    numbers = [np.where(mask, x, 0.0) for x in (log_probs, old, ref, sampler, entropy)]
    high_covariance = mask & (rng.random((B, G, T)) < 0.3)
    case = Case(*numbers, advantages, mask, token_share, weights, high_covariance)
    return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(precision).astype(np.float64), case)


def experience_of(case):
    """As jax arrays, in float64 where that is enabled."""
    case = jax.tree.map(jnp.asarray, case)
    B, G, T = case.mask.shape
    prompts = Prompts(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
    tokens, lengths = jnp.zeros((B, G, T), jnp.int32), jnp.sum(case.mask, -1)
    return Experience(
        Rollout(prompts, tokens, lengths, case.mask, case.sampler, lengths == T),
        old_log_probs=case.old,
        ref_log_probs=case.ref,
        advantages=case.advantages,
        weights=case.weights,
        token_share=case.token_share,
        high_covariance=case.high_covariance,
    )


# --------------------------------------------------------------- what the code says of a case


def differentiated(loss):
    """`(log_probs, entropy, experience) -> ((value, (terms, metrics)), gradients)`."""

    def value(log_probs, entropy, experience):
        terms, metrics = loss(Scores(log_probs, entropy), experience)
        return losses.value(terms), (terms, metrics)

    return jax.value_and_grad(value, (0, 1), has_aux=True)


UNOPTIMISED = {"xla_backend_optimization_level": 0}


@functools.cache
def compiled(loss):
    """For a few calls each, so that optimising would take longer than it saves."""
    return jax.jit(differentiated(loss), compiler_options=UNOPTIMISED)


def run(loss, case, *, once=False):
    """Value, gradient `[B, G, T, 2]` by log-probs and entropies, metrics, and the terms; not compiled for `once`."""
    (value, (terms, metrics)), gradients = (differentiated if once else compiled)(loss)(
        jnp.asarray(case.log_probs), jnp.asarray(case.entropy), experience_of(case)
    )
    return np.asarray(value), np.stack(gradients, -1), metrics, terms


def evaluate(loss, case, *, once=False):
    """Value, gradient `[B, G, T, 2]` and metrics of a case."""
    value, gradient, metrics, _ = run(loss, case, once=once)
    return value, gradient, {name: np.asarray(x) for name, x in statistics.summary(metrics).items()}


def assert_close(actual, expected, tolerance, size=0.0):
    """Value and gradient agree to `tolerance` of the largest gradient (the value: or of itself, or of `size`)."""
    (loss, gradient), (expected_loss, expected_gradient) = actual, expected
    largest = np.abs(expected_gradient).max()
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=tolerance * max(largest, abs(expected_loss), size))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=tolerance * largest)
