"""PPO with a learned per-token value function as the baseline, instead of GRPO's group mean.

    params = {"policy": policy_params, "critic": heads.init_from(critic, policy_params)}
    state = init_state(params, optimizer, key)
    step = ppo.make_train_step(policy, critic, optimizer, sampler, reward=reward)
    state, metrics = jax.jit(step)(state, prompts)

The critic is a policy's network, as large or smaller, with a scalar head (`heads`). One optimiser updates both;
`optax.partition` gives them a learning rate each. As in GRPO the step has two halves, `collect` and `learn`, between
which rewards of the host are put in.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.advantages import Weights, total_reward
from grpo_jax.baselines.critic import explained_variance, gae, token_rewards, value_loss, values, whitened
from grpo_jax.freezing import bind
from grpo_jax.losses import bnpo, entropy_bonus, kl_k1, plus, token_mean
from grpo_jax.losses.contract import check_not_negative, check_positive, check_shares, masked_sum, weighted
from grpo_jax.policies import Policy, within
from grpo_jax.protocols import Reward, Sampler, Terms
from grpo_jax.schedules import Scheduled, at
from grpo_jax.scoring import score
from grpo_jax.statistics import Mean
from grpo_jax.train_step import (
    Step,
    add_reference,
    make_collect,
    mask_unscored,
    rollout_metrics,
    temperature_of,
    truncation_of,
)
from grpo_jax.types import Array, Experience, Metrics, Number, Params, Scores, TrainState
from grpo_jax.updates import Updates, in_parts, make_updates


class ValuedExperience(NamedTuple):
    """An experience with the critic's values, before the updates."""

    experience: Experience  # with advantages [B, G, T]
    values: Array  # [B, G, T] float32
    returns: Array  # [B, G, T] float32, the targets of the values


CriticAdvantage = Callable[[Experience, Array], tuple[ValuedExperience, Metrics]]  # (experience, values [B, G, T])
CriticLoss = Callable[[Scores, Array, ValuedExperience], tuple[Terms, Metrics]]  # (scores, new values, before)


def gae_advantages(
    *,
    gamma: Number = 0.99,
    gae_lambda: Number = 0.95,
    kl_weight: Number | None = None,
    whiten: bool = True,
    weights: Weights | None = None,
) -> CriticAdvantage:
    """Advantages and returns of the rewards and the critic's values; see `critic.gae`.

    Args:
      gamma: as in `gae`.
      gae_lambda: as in `gae`.
      kl_weight: the cost of a token per nat of `log p_old - log p_ref`, its estimate of the divergence from the
        reference; None for no cost. 0.05 in TRL.
      whiten: whether advantages are normalised to mean 0 and deviation 1 over the batch, as TRL and OpenAI do; the
        returns are not.
      weights: one per reward function; all 1 if None.

    Returns:
      `(experience, values [B, G, T]) -> (valued experience, metrics)`. Metrics: `reward`, `return`,
      `explained_variance` (of the returns by the values before the updates: 0 for a critic that knows nothing, 1 for
      a perfect one) and, with a `kl_weight`, `kl`.

    Raises:
      ValueError: for a setting out of range; when traced, for a `kl_weight` without a reference.
    """
    check_shares(gamma=gamma, gae_lambda=gae_lambda)
    check_not_negative(kl_weight=kl_weight)

    def advantage(experience: Experience, old_values: Array) -> tuple[ValuedExperience, Metrics]:
        mask, old_log_probs, cost = experience.rollout.mask, experience.old_log_probs, None
        metrics: Metrics = {}
        total, scored = total_reward(experience, weights)
        if kl_weight is not None:
            if old_log_probs is None or experience.ref_log_probs is None:
                raise ValueError("a kl_weight needs a reference policy: init_state(..., reference=True)")
            kl = jnp.where(mask, kl_k1(old_log_probs, experience.ref_log_probs), 0.0)
            cost, metrics["kl"] = weighted(kl_weight, kl), token_mean(kl, mask)
        rewards = token_rewards(total, mask, cost)
        advantages, returns = gae(rewards, old_values, mask, gamma=gamma, gae_lambda=gae_lambda)
        if whiten:
            advantages = whitened(advantages, mask)
        metrics |= {
            "reward": Mean(masked_sum(total, scored), jnp.sum(scored)),
            "return": token_mean(returns, mask),
            "explained_variance": explained_variance(old_values, returns, mask),
        }
        return ValuedExperience(experience._replace(advantages=advantages), old_values, returns), metrics

    return advantage


def ppo_loss(
    *,
    epsilon: Number = 0.2,
    value_epsilon: Number | None = 0.2,
    value_weight: Number = 0.5,
    entropy_weight: Number = 0.01,
) -> CriticLoss:
    """The loss of policy and critic (Schulman et al. 2017, arXiv:1707.06347, equation 9).

        loss = -clipped surrogate + value_weight * value_loss - entropy_weight * entropy

    each a mean over the tokens of the update.

    Args:
      epsilon: of the policy's clip, as in `losses.ppo_clip`.
      value_epsilon: of the critic's clip, as in `critic.value_loss`.
      value_weight: of the critic's error; 0.1 in TRL.
      entropy_weight: of the entropy bonus; 0 in TRL.

    Returns:
      `(scores, new values [B, G, T], valued experience) -> (terms, metrics)`. Metrics are those of `losses.bnpo` and
      `value_loss`, without its weight.

    Raises:
      ValueError: for a setting out of range.
    """
    check_positive(value_epsilon=value_epsilon)
    check_not_negative(value_weight=value_weight)
    policy_loss = plus(bnpo(epsilon=epsilon), entropy_bonus(entropy_weight))

    def total(scores: Scores, new_values: Array, valued: ValuedExperience) -> tuple[Terms, Metrics]:
        terms, metrics = policy_loss(scores, valued.experience)
        errors = value_loss(new_values, valued.values, valued.returns, epsilon=value_epsilon)
        error = token_mean(errors, valued.experience.rollout.mask)
        return (*terms, error._replace(sum=value_weight * error.sum)), metrics | {"value_loss": error}

    return total


def make_train_step(
    policy: Policy,
    critic: Policy,
    optimizer: optax.GradientTransformation,
    sampler: Sampler | Scheduled,
    *,
    reward: Reward | None = None,
    advantage: CriticAdvantage | None = None,
    loss: CriticLoss | None = None,
    updates: Updates = Updates(iterations=4),
) -> Step:
    """One step of PPO; as that of `train_step.make_train_step`.

    The values, the returns and the advantages are computed once, before the first update.

    Args:
      policy: the network, whose params are `state.params["policy"]`, with those of `state.frozen["policy"]` if any.
      critic: the critic's network, whose params with the head's are `state.params["critic"]`, likewise.
      optimizer: any optax optimiser, of both.
      sampler: as in `train_step.make_train_step`. A group of one is enough, as nothing is compared.
      reward: as in `train_step.make_train_step`.
      advantage: of the rewards and the critic's values; `gae_advantages()` unless given.
      loss: of policy and critic; `ppo_loss()` unless given.
      updates: as in `train_step.make_train_step`; gradients are clipped by the norm of both networks together.
    """
    advantage = gae_advantages() if advantage is None else advantage
    total_loss = ppo_loss() if loss is None else loss
    policy, temperature = within(policy, "policy"), temperature_of(sampler)
    truncation = truncation_of(sampler)

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        experience = mask_unscored(jax.tree.map(jnp.asarray, experience))  # rewards of the host are NumPy's
        if experience.old_log_probs is None:
            raise ValueError("PPO needs the old_log_probs of the policy that sampled; its own `collect` adds them")
        if state.ref_params is not None:
            reference, now = bind(state.ref_params, state.frozen), at(temperature, state)
            experience = add_reference(
                policy, reference, experience, now, updates.parts, truncation=at(truncation, state)
            )
        rollout, whole = experience.rollout, bind(state.params, state.frozen)
        old_values = in_parts(lambda part: values(critic, whole["critic"], part), rollout, updates.parts)
        valued, metrics = advantage(experience, old_values)
        state, update_metrics = learn_from(state, valued)
        return state, rollout_metrics(rollout) | metrics | update_metrics

    def evaluate(params: Params, state: TrainState, valued: ValuedExperience) -> tuple[Terms, Metrics]:
        rollout, packing = valued.experience.rollout, valued.experience.packing
        scores = score(
            policy,
            params,
            rollout,
            packing=packing,
            temperature=at(temperature, state),
            truncation=at(truncation, state),
        )
        return total_loss(scores, values(critic, params["critic"], rollout), valued)

    learn_from = make_updates(evaluate, optimizer, updates)
    collect = make_collect(policy, sampler, reward=reward, score_old=True, score_parts=updates.parts)
    return Step(collect, learn, on_host=getattr(sampler, "on_host", False))
