"""PPO with a critic: a learned value of every token in the place of GRPO's group.

    params = {"policy": policy_params, "critic": heads.init_from(critic, policy_params)}
    state = init_state(params, optimizer, key)
    step = ppo.make_train_step(policy, critic, optimizer, reward=reward, max_tokens=256, eos_ids=eos_ids)
    state, metrics = jax.jit(step)(state, prompts)

The critic is a policy's network, as large or smaller, with a scalar head (`heads`). One optimiser
updates both; `optax.partition` gives them a learning rate each. As in GRPO a step is
`make_collect`, which samples, and `make_learn`, between which rewards of the host are put in.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from grpo_jax import train_step
from grpo_jax.advantages import Weights, batch_normalised_advantages, total_reward
from grpo_jax.baselines.heads import hidden_states, scalar
from grpo_jax.descent import in_parts, make_descent
from grpo_jax.losses import bnpo, entropy_bonus, kl_k1, plus, token_mean
from grpo_jax.losses.contract import check_not_negative, check_positive, masked_sum
from grpo_jax.policies import Policy
from grpo_jax.protocols import Terms
from grpo_jax.sampling import sample
from grpo_jax.schedules import Scheduled, at
from grpo_jax.scoring import score
from grpo_jax.train_step import Collect, Learn, Reward, Sampler, Step, rollout_metrics
from grpo_jax.types import Array, Experience, Mean, Metrics, Number, Params, Prompts, Rollout, TrainState


class Judged(NamedTuple):
    """An experience with what the critic said of it, before the updates."""

    experience: Experience  # with advantages [B, G, T]
    values: Array  # [B, G, T] float32
    returns: Array  # [B, G, T] float32, what the values are to become


# ------------------------------------------------------------------ rewards to advantages


def token_rewards(total: Array, mask: Array, cost: Array | None = None) -> Array:
    """The rewards of the tokens: the completion's at its last token, less what each token costs.

        r[t] = total * [t is the last token that counts] - cost[t]

    With the divergence from a reference as the cost this is the reward of InstructGPT
    (Ouyang et al. 2022, arXiv:2203.02155, equation 2), token by token.

    Args:
      total: `[B, G]` float, in reward units.
      mask: `[B, G, T]` bool.
      cost: `[B, G, T]` float; None for no cost.

    Returns:
      `[B, G, T]`, 0 where nothing counts.
    """
    chex.assert_shape(total, mask.shape[:2])
    to_come = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    rewards = jnp.where(to_come == 1, total[..., None], 0.0)
    return jnp.where(mask, rewards if cost is None else rewards - cost, 0.0)


def gae(
    rewards: Array, values: Array, mask: Array, *, discount: Number = 0.99, decay: Number = 0.95
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16).

        delta[t] = r[t] + discount * V[t + 1] - V[t]
        A[t]     = delta[t] + discount * decay * A[t + 1]
        R[t]     = A[t] + V[t]

    where `t + 1` is the next token that counts. A completion ends at the last one, cut
    off or not: the value after it is 0.

    Args:
      rewards: `[B, G, T]` float, given at the token that earned them.
      values: `[B, G, T]` float, of the state before the token, in reward units.
      mask: `[B, G, T]` bool.
      discount: of a token, from 0 to 1. Work on language models mostly takes 1.
      decay: the lambda of the paper, from 0, which trusts the critic, to 1, which trusts
        the rewards alone.

    Returns:
      Advantages and returns `[B, G, T]`, both in reward units and 0 where nothing counts.

    Raises:
      AssertionError: if the shapes differ or are not of rank 3.
      ValueError: for a discount or decay out of range.
    """
    chex.assert_rank([rewards, values, mask], 3)
    chex.assert_equal_shape([rewards, values, mask])
    _check_shares(discount=discount, decay=decay)

    def earlier(later: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (value_after, advantage_after), (reward, value, counted) = later, token
        advantage = reward + discount * value_after - value + discount * decay * advantage_after
        later = jnp.where(counted, value, value_after), jnp.where(counted, advantage, advantage_after)
        return later, jnp.where(counted, advantage, 0.0)

    by_token = jnp.moveaxis(rewards, -1, 0), jnp.moveaxis(values, -1, 0), jnp.moveaxis(mask, -1, 0)
    nothing = jnp.zeros(mask.shape[:2], jnp.result_type(rewards, values, float))
    _, advantages = jax.lax.scan(earlier, (nothing, nothing), by_token, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, jnp.where(mask, advantages + values, 0.0)


def whitened(advantages: Array, mask: Array) -> Array:
    """Advantages of mean 0 and deviation 1 over the tokens of the batch that count; 0 where they are all equal.

    Args:
      advantages: `[B, G, T]`.
      mask: `[B, G, T]` bool.
    """
    row = (1, -1)
    return batch_normalised_advantages(advantages.reshape(row), mask.reshape(row)).reshape(mask.shape)


# ---------------------------------------------------------------------------- the critic


@functools.partial(jax.jit, static_argnums=0)
def values(critic: Policy, params: Params, rollout: Rollout) -> Array:
    """`[B, G, T]` float32: what the critic expects before each token, from the state that predicts it; 0 on padding.

    Args:
      critic: the network, static.
      params: `{"network", "head"}`; see `heads`.
      rollout: the completions.
    """
    read = rollout.tokens[..., :-1]
    hidden = hidden_states(critic, params["network"], rollout.prompts, read, rollout.lengths)
    held = jnp.arange(rollout.tokens.shape[-1]) < rollout.lengths[..., None]
    return jnp.where(held, scalar(params["head"], hidden), 0.0)


def value_loss(values: Array, old_values: Array, returns: Array, *, epsilon: Number | None = 0.2) -> Array:
    """The squared error of the critic, clipped as the policy's ratio is.

        near = old + clip(V - old, -epsilon, epsilon)
        loss = max((V - R)^2, (near - R)^2) / 2

    A value that has moved further than `epsilon` towards its return gets no gradient.
    The clip is that of OpenAI's `ppo2`, not of the paper (arXiv:1707.06347, equation 9),
    whose squared error is `epsilon=None` without the half.

    Args:
      values: `[B, G, T]`, of the critic that learns.
      old_values: `[B, G, T]`, of the critic before the first update.
      returns: `[B, G, T]`.
      epsilon: in reward units, above 0; None does not clip.

    Returns:
      `[B, G, T]`, for an aggregate.

    Raises:
      ValueError: for an epsilon that is not above 0.
    """
    check_positive(epsilon=epsilon)
    error = (values - returns) ** 2
    if epsilon is not None:
        near = old_values + jnp.clip(values - old_values, -epsilon, epsilon)
        error = jnp.maximum(error, (near - returns) ** 2)
    return error / 2


# ------------------------------------------------------------------------------ the step


def make_train_step(
    policy: Policy,
    critic: Policy,
    optimizer: optax.GradientTransformation,
    *,
    reward: Reward,
    max_tokens: int,
    eos_ids: Sequence[int],
    group_size: int = 1,
    temperature: Number | Scheduled = 1.0,
    sampler: Sampler = sample,
    discount: Number = 0.99,
    decay: Number = 0.95,
    kl_weight: Number | None = None,
    whiten: bool = True,
    reward_weights: Weights | None = None,
    epsilon: Number = 0.2,
    value_epsilon: Number | None = 0.2,
    value_weight: Number = 0.5,
    entropy_weight: Number = 0.01,
    passes: int = 4,
    minibatches: int = 1,
    micro_batches: int = 1,
    max_grad_norm: Number | None = None,
) -> Step:
    """One step of PPO as a pure function `(state, prompts) -> (state, metrics)`.

    Settings are those of `make_collect` and `make_learn`; `reward` is traced.
    """
    collect = make_collect(
        policy,
        max_tokens=max_tokens,
        eos_ids=eos_ids,
        group_size=group_size,
        reward=reward,
        temperature=temperature,
        sampler=sampler,
        score_parts=minibatches * micro_batches,
    )
    learn = make_learn(
        policy,
        critic,
        optimizer,
        temperature=temperature,
        discount=discount,
        decay=decay,
        kl_weight=kl_weight,
        whiten=whiten,
        reward_weights=reward_weights,
        epsilon=epsilon,
        value_epsilon=value_epsilon,
        value_weight=value_weight,
        entropy_weight=entropy_weight,
        passes=passes,
        minibatches=minibatches,
        micro_batches=micro_batches,
        max_grad_norm=max_grad_norm,
    )

    def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics]:
        return learn(state, collect(state, prompts))

    return step


def make_collect(
    policy: Policy,
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    group_size: int = 1,
    reward: Reward | None = None,
    temperature: Number | Scheduled = 1.0,
    sampler: Sampler = sample,
    score_parts: int = 1,
) -> Collect:
    """The first half of a step, `(state, prompts) -> experience`, with the log-probs of the policy that sampled.

    Args:
      policy: the network; its params are `state.params["policy"]`.
      max_tokens: `T`, the longest completion.
      eos_ids: tokens that end a completion.
      group_size: `G`, completions of each prompt. One is enough, as nothing is compared.
      reward: as in `train_step.make_collect`.
      temperature: as in `train_step.make_collect`.
      sampler: as in `train_step.make_collect`; `functools.partial(sample, top_p=0.9)` for
        further settings.
      score_parts: as in `train_step.make_collect`.
    """
    of_policy = train_step.make_collect(
        policy,
        group_size=group_size,
        max_tokens=max_tokens,
        eos_ids=eos_ids,
        reward=reward,
        temperature=temperature,
        sampler=sampler,
        score_old=True,
        score_parts=score_parts,
    )

    def collect(state: TrainState, prompts: Prompts) -> Experience:
        return of_policy(state._replace(params=state.params["policy"]), prompts)

    return collect


def make_learn(
    policy: Policy,
    critic: Policy,
    optimizer: optax.GradientTransformation,
    *,
    temperature: Number | Scheduled = 1.0,
    discount: Number = 0.99,
    decay: Number = 0.95,
    kl_weight: Number | None = None,
    whiten: bool = True,
    reward_weights: Weights | None = None,
    epsilon: Number = 0.2,
    value_epsilon: Number | None = 0.2,
    value_weight: Number = 0.5,
    entropy_weight: Number = 0.01,
    passes: int = 4,
    minibatches: int = 1,
    micro_batches: int = 1,
    max_grad_norm: Number | None = None,
) -> Learn:
    """The second half of a step, `(state, experience) -> (state, metrics)`.

        loss = -clipped surrogate + value_weight * value_loss - entropy_weight * entropy

    (Schulman et al. 2017, arXiv:1707.06347, equation 9), each a mean over the tokens of
    the update. Values, returns and advantages are computed once, before the first.

    Args:
      policy: the network; its params are `state.params["policy"]`.
      critic: the critic's network, whose params with the head's are `state.params["critic"]`.
      optimizer: any optax optimiser, of both.
      temperature: of the scores; the one that the rollout was sampled at.
      discount: as in `gae`.
      decay: as in `gae`.
      kl_weight: what a token pays for each nat of `log p_old - log p_ref`, its estimate of
        the divergence from the reference; None for no cost. TRL pays 0.05.
      whiten: whether advantages are brought to mean 0 and deviation 1 over the batch, as
        TRL and OpenAI do; the returns are not.
      reward_weights: one a reward function; all 1 if None.
      epsilon: of the policy's clip, as in `losses.ppo_clip`.
      value_epsilon: of the critic's clip, as in `value_loss`.
      value_weight: of the critic's error; 0.1 in TRL.
      entropy_weight: of the entropy bonus; 0 in TRL.
      passes: as in `train_step.make_learn`.
      minibatches: as in `train_step.make_learn`.
      micro_batches: as in `train_step.make_learn`; the values and the reference's scores
        are computed in parts of this size, too.
      max_grad_norm: as in `updates.update`, of the gradients of both networks together.

    Returns:
      A pure function. Its metrics are those of `losses.bnpo`, and `reward`, `value_loss`
      (without its weight), `return`, `explained_variance` (of the returns by the values
      before the updates: 0 for a critic that knows nothing, 1 for a perfect one) and, with
      a `kl_weight`, `kl`.

    Raises:
      ValueError: for a setting out of range; when traced, if the batch does not divide, or
        if the old or the reference policy's log-probs are missing.
    """
    _check_shares(discount=discount, decay=decay)
    check_positive(value_epsilon=value_epsilon)
    check_not_negative(kl_weight=kl_weight, value_weight=value_weight)
    policy_loss = plus(bnpo(epsilon=epsilon), entropy_bonus(entropy_weight))

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        experience = jax.tree.map(jnp.asarray, experience)  # rewards of the host are NumPy's
        judged, metrics = judge(state, experience)
        state, of_updates = descend(state, judged)
        return state, metrics | of_updates

    def judge(state: TrainState, experience: Experience) -> tuple[Judged, Metrics]:
        """Adds what is computed once, before the batch is split."""
        if experience.old_log_probs is None:
            raise ValueError("PPO needs the old_log_probs of the policy that sampled; ppo.make_collect adds them")
        metrics, parts = rollout_metrics(experience.rollout), minibatches * micro_batches
        total, scored = total_reward(experience, reward_weights)
        mask = experience.rollout.mask & scored[..., None]  # what nothing could score teaches nothing
        rollout = experience.rollout._replace(mask=mask)
        cost = None
        if kl_weight is not None:
            ref_log_probs = experience.ref_log_probs
            if ref_log_probs is None:
                ref_log_probs = in_parts(reference_scores(state), rollout, parts)
            kl = jnp.where(mask, kl_k1(experience.old_log_probs, ref_log_probs), 0.0)
            cost, metrics["kl"] = kl_weight * kl, token_mean(kl, mask)
        old_values = in_parts(lambda part: values(critic, state.params["critic"], part), rollout, parts)
        rewards = token_rewards(total, mask, cost)
        advantages, returns = gae(rewards, old_values, mask, discount=discount, decay=decay)
        if whiten:
            advantages = whitened(advantages, mask)
        metrics |= {
            "reward": Mean(masked_sum(total, scored), jnp.sum(scored)),
            "return": token_mean(returns, mask),
            "explained_variance": _explained_variance(old_values, returns, mask),
        }
        return Judged(experience._replace(rollout=rollout, advantages=advantages), old_values, returns), metrics

    def reference_scores(state: TrainState) -> Callable[[Rollout], Array]:
        if state.ref_params is None:
            raise ValueError("a kl_weight needs a reference policy: init_state(..., reference=True)")
        ref_params, now = state.ref_params["policy"], at(temperature, state)
        return lambda part: score(policy, ref_params, part, temperature=now, entropy=False).log_probs

    def evaluate(params: Params, state: TrainState, judged: Judged) -> tuple[Terms, Metrics]:
        experience, old_values, returns = judged
        rollout = experience.rollout
        scores = score(
            policy, params["policy"], rollout, packing=experience.packing, temperature=at(temperature, state)
        )
        terms, metrics = policy_loss(scores, experience)
        new_values = values(critic, params["critic"], rollout)
        error = token_mean(value_loss(new_values, old_values, returns, epsilon=value_epsilon), rollout.mask)
        return (*terms, error._replace(sum=value_weight * error.sum)), metrics | {"value_loss": error}

    descend = make_descent(
        evaluate,
        optimizer,
        passes=passes,
        minibatches=minibatches,
        micro_batches=micro_batches,
        max_grad_norm=max_grad_norm,
    )
    return learn


def _check_shares(**settings: Number) -> None:
    for name, setting in settings.items():
        if isinstance(setting, int | float) and not 0 <= setting <= 1:
            raise ValueError(f"{name} is from 0 to 1, got {setting}")


def _explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """`1 - Var(returns - values) / Var(returns)`, 0 where the returns do not vary."""

    def deviation(x: Array) -> Array:
        return masked_sum((x - masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1)) ** 2, mask)

    whole = deviation(returns)
    return jnp.where(whole > 0, 1 - deviation(returns - values) / jnp.where(whole > 0, whole, 1.0), 0.0)
