"""Sample, reward, score, advantage, loss and update, composed into one pure step.

    step = make_train_step(policy, optimizer, reward=..., loss=grpo(), group_size=8, ...)
    state, metrics = jax.jit(step)(state, prompts)

A step is `collect`, which samples, and `learn`, which trains. With rewards computed
on the host, a loop calls the two and puts the rewards into the experience between.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from grpo_jax.advantages import from_rewards
from grpo_jax.descent import in_parts, make_descent
from grpo_jax.policies import Policy
from grpo_jax.protocols import Advantage, ExperienceTransform, Loss, Terms
from grpo_jax.sampling import sample
from grpo_jax.schedules import Scheduled, at
from grpo_jax.scoring import score
from grpo_jax.types import Array, Experience, Max, Mean, Metrics, Packing, Params, Prompts, Rollout, TrainState
from grpo_jax.updates import step_keys

Reward = Callable[[Rollout], tuple[Array, Array]]  # rewards [B, G, R] float32, mask [B, G, R] bool
Collect = Callable[[TrainState, Prompts], Experience]
Learn = Callable[[TrainState, Experience], tuple[TrainState, Metrics]]
Step = Callable[[TrainState, Prompts], tuple[TrainState, Metrics]]
Sampler = Callable[..., Rollout]  # called as `sampling.sample` is
Number = float | Array


def make_train_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    reward: Reward,
    loss: Loss | Scheduled,
    group_size: int,
    max_tokens: int,
    eos_ids: Sequence[int],
    advantage: Advantage | Scheduled | None = None,
    transforms: Sequence[ExperienceTransform] = (),
    temperature: Number | Scheduled = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    sampler: Sampler = sample,
    score_old: bool = False,
    passes: int = 1,
    minibatches: int = 1,
    micro_batches: int = 1,
    max_grad_norm: Number | None = None,
) -> Step:
    """One step of GRPO as a pure function `(state, prompts) -> (state, metrics)`.

    It can be jitted whole, scanned, and vmapped over states and over any setting that
    is a number. Settings are those of `make_collect` and `make_learn`; `reward` is
    traced (`rewards.callback` makes a traced reward of a host one); `advantage` is
    `from_rewards()` unless given, and the old policy is scored wherever several updates
    need it.
    """
    collect = make_collect(
        policy,
        group_size=group_size,
        max_tokens=max_tokens,
        eos_ids=eos_ids,
        reward=reward,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        sampler=sampler,
        score_old=score_old or passes * minibatches > 1,
        score_parts=minibatches * micro_batches,
    )
    learn = make_learn(
        policy,
        optimizer,
        loss=loss,
        advantage=from_rewards() if advantage is None else advantage,
        transforms=transforms,
        temperature=temperature,
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
    group_size: int,
    max_tokens: int,
    eos_ids: Sequence[int],
    reward: Reward | None = None,
    temperature: Number | Scheduled = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    sampler: Sampler = sample,
    score_old: bool = False,
    score_parts: int = 1,
) -> Collect:
    """The first half of a step, `(state, prompts) -> experience`.

    Args:
      policy: the network.
      group_size: `G`, completions of each prompt; estimators that compare them want 2 or more.
      max_tokens: `T`, the longest completion.
      eos_ids: tokens that end a completion.
      reward: `rollout -> (rewards [B, G, R], mask [B, G, R])`, traced; None leaves the
        rewards to the caller.
      temperature: of sampling, and of the scores; may be `Scheduled`.
      top_k: as in `sampling.sample`.
      top_p: as in `sampling.sample`.
      min_p: as in `sampling.sample`.
      sampler: `sampling.sample`, or one that takes the same arguments, such as
        `functools.partial(refill.sample_in_slots, slots=64)`.
      score_old: True fills `old_log_probs` and `old_entropy`, which `learn` needs if it
        makes several updates of one experience, if the params change before it, or if a
        hook asks for them.
      score_parts: parts of the batch for which that is done, one after the other to save memory; a
        divisor of `B`. `learn` scores the reference in `minibatches * micro_batches`.
    """

    def collect(state: TrainState, prompts: Prompts) -> Experience:
        sample_key, _ = step_keys(state)
        temperature_now = at(temperature, state)
        with jax.named_scope("sample"):
            rollout = sampler(
                policy,
                state.params,
                prompts,
                sample_key,
                group_size=group_size,
                max_tokens=max_tokens,
                eos_ids=eos_ids,
                temperature=temperature_now,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
            )
        experience = Experience(rollout)
        if reward is not None:
            with jax.named_scope("reward"):
                rewards, given = reward(rollout)
            experience = experience._replace(rewards=rewards, reward_mask=given)
        if score_old:
            with jax.named_scope("score_old"):
                old = in_parts(
                    lambda rollout: score(policy, state.params, rollout, temperature=temperature_now),
                    rollout,
                    score_parts,
                )
            experience = experience._replace(old_log_probs=old.log_probs, old_entropy=old.entropy)
        return experience

    return collect


def make_learn(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss | Scheduled,
    advantage: Advantage | Scheduled | None = None,
    transforms: Sequence[ExperienceTransform] = (),
    temperature: Number | Scheduled = 1.0,
    passes: int = 1,
    minibatches: int = 1,
    micro_batches: int = 1,
    max_grad_norm: Number | None = None,
) -> Learn:
    """The second half of a step, `(state, experience) -> (state, metrics)`.

    Adds the reference's log-probs, if the state has a reference, and the advantages,
    calls the hooks, then makes `passes * minibatches` updates.

    Args:
      policy: the network.
      optimizer: any optax optimiser.
      loss: `(scores, experience) -> (terms, metrics)`; may be `Scheduled`.
      advantage: `experience -> (advantages, metrics)`, may be `Scheduled`; None for a
        loss that asks for none, such as `losses.sft()`, and for an experience that comes
        with its own.
      transforms: functions `experience -> (experience, metrics)`, called in this order once
        before the split; see `preparation`.
      temperature: of the scores; the one that the rollout was sampled at, and so may be
        `Scheduled`.
      passes: as in `descent.make_descent`.
      minibatches: as in `descent.make_descent`.
      micro_batches: as in `descent.make_descent`.
      max_grad_norm: as in `updates.update`.

    Returns:
      A pure function. Its metrics are `Mean` and `Max` statistics and scalars;
      `types.summary` turns them into numbers.

    Raises:
      ValueError: when traced, if the batch does not divide, or if a loss needs
        `old_log_probs` for several updates and finds none.
    """

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        experience = jax.tree.map(jnp.asarray, experience)  # rewards of the host are NumPy's
        experience, metrics = prepared(state, experience)
        state, of_updates = descend(state, experience)
        return state, metrics | of_updates

    def prepared(state: TrainState, experience: Experience) -> tuple[Experience, Metrics]:
        """Adds what is computed once, before the batch is split."""
        rollout = experience.rollout
        metrics = rollout_metrics(rollout)
        if experience.reward_mask is not None:  # what nothing could score teaches nothing, and counts nowhere
            scored = jnp.any(experience.reward_mask, axis=-1, keepdims=True)
            experience = experience._replace(rollout=rollout._replace(mask=rollout.mask & scored))
        if state.ref_params is not None and experience.ref_log_probs is None:
            with jax.named_scope("score_reference"):
                parts = minibatches * micro_batches
                ref_log_probs = in_parts(reference_scores(state), (rollout, experience.packing), parts)
            experience = experience._replace(ref_log_probs=ref_log_probs)
        if advantage is not None:
            advantages, of_rewards = at(advantage, state)(experience)
            experience, metrics = experience._replace(advantages=advantages), metrics | of_rewards
        for transform in transforms:
            experience, of_transform = transform(experience)
            metrics = metrics | of_transform
        return experience, metrics

    def reference_scores(state: TrainState) -> Callable[[tuple[Rollout, Packing | None]], Array]:
        def log_probs(part: tuple[Rollout, Packing | None]) -> Array:
            rollout, packing = part
            now = at(temperature, state)
            return score(policy, state.ref_params, rollout, packing=packing, temperature=now, entropy=False).log_probs

        return log_probs

    def evaluate(params: Params, state: TrainState, experience: Experience) -> tuple[Terms, Metrics]:
        now = at(temperature, state)
        scores = score(policy, params, experience.rollout, packing=experience.packing, temperature=now)
        if experience.old_log_probs is None and passes * minibatches == 1:  # else it is for the loss to refuse
            experience = experience._replace(old_log_probs=jax.lax.stop_gradient(scores.log_probs))
        return at(loss, state)(scores, experience)

    descend = make_descent(
        evaluate,
        optimizer,
        passes=passes,
        minibatches=minibatches,
        micro_batches=micro_batches,
        max_grad_norm=max_grad_norm,
        anything=lambda experience: jnp.any(experience.rollout.mask),
    )
    return learn


def rollout_metrics(rollout: Rollout) -> Metrics:
    """How long the completions are, and how many were cut off."""
    lengths, completions = rollout.lengths, jnp.sum(rollout.lengths > 0)  # 0 where there is none
    return {
        "length": Mean(jnp.sum(lengths), completions),
        "length_max": Max(jnp.max(lengths)),
        "truncated": Mean(jnp.sum(rollout.truncated), completions),
    }
