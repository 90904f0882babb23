"""Sample, reward, score, advantage, loss and update, composed into one pure step.

    step = make_train_step(policy, optimizer, reward=..., loss=grpo(), group_size=8, ...)
    state, metrics = jax.jit(step)(state, prompts)

A step is `collect`, which samples, and `learn`, which trains. With rewards computed
on the host, a loop calls the two and puts the rewards into the experience between.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from grpo_jax import losses, types
from grpo_jax.advantages import Advantage, from_rewards
from grpo_jax.losses import Loss, Terms
from grpo_jax.policies import Policy
from grpo_jax.preparation import Hook
from grpo_jax.sampling import sample
from grpo_jax.schedules import Scheduled, at
from grpo_jax.scoring import score
from grpo_jax.types import Array, Experience, Max, Mean, Metrics, Packing, Params, PRNGKey, Prompts, Rollout, TrainState
from grpo_jax.updates import update

Reward = Callable[[Rollout], tuple[Array, Array]]  # rewards [B, G, R] float32, mask [B, G, R] bool
Collect = Callable[[TrainState, Prompts], Experience]
Learn = Callable[[TrainState, Experience], tuple[TrainState, Metrics]]
Step = Callable[[TrainState, Prompts], tuple[TrainState, Metrics]]
Sampler = Callable[..., Rollout]  # called as `sampling.sample` is
Number = float | Array
Tree = TypeVar("Tree")


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
    prepare: Sequence[Hook] = (),
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
    )
    learn = make_learn(
        policy,
        optimizer,
        loss=loss,
        advantage=from_rewards() if advantage is None else advantage,
        prepare=prepare,
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
) -> Collect:
    """The first half of a step, `(state, prompts) -> experience`.

    Args:
      policy: the network.
      group_size: `G`, completions of each prompt; at least 2, to have something to
        compare.
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
    """
    if group_size < 2:
        raise ValueError(f"a group needs at least 2 completions to compare, got group_size = {group_size}")

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
                old = score(policy, state.params, rollout, temperature=temperature_now)
            experience = experience._replace(old_log_probs=old.log_probs, old_entropy=old.entropy)
        return experience

    return collect


def make_learn(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss | Scheduled,
    advantage: Advantage | Scheduled | None = None,
    prepare: Sequence[Hook] = (),
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
      prepare: hooks `experience -> (experience, metrics)`, called in this order once
        before the split; see `preparation`.
      temperature: of the scores; the one that the rollout was sampled at, and so may be
        `Scheduled`.
      passes: how often the experience is gone through; each pass in an order of its own.
      minibatches: updates in a pass, each of `B / minibatches` prompts.
      micro_batches: parts of an update that are computed one after the other to save
        memory; the gradient is the whole minibatch's.
      max_grad_norm: see `updates.update`.

    Returns:
      A pure function. Its metrics are `Mean` and `Max` statistics and scalars;
      `types.summary` turns them into numbers.

    Raises:
      ValueError: when traced, if the batch does not divide, or if several updates find
        no `old_log_probs`.
    """
    if min(passes, minibatches, micro_batches) < 1:
        raise ValueError(
            f"passes, minibatches and micro_batches are at least 1, got {passes}, {minibatches} and {micro_batches}"
        )
    updates = passes * minibatches

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        experience = jax.tree.map(jnp.asarray, experience)  # rewards of the host are NumPy's
        experience, metrics = prepared(state, experience)
        if updates == 1:
            state, of_updates = learn_minibatch(state, experience)
        else:
            _, learn_key = step_keys(state)
            rows = jax.vmap(lambda p: _shuffled(learn_key, p, experience))(jnp.arange(passes))

            def learn_rows(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
                return learn_minibatch(state, jax.tree.map(lambda x: x[rows], experience))

            state, of_updates = jax.lax.scan(learn_rows, state, rows.reshape(updates, -1))
            of_updates = types.merge(of_updates)
        return state._replace(step=state.step + 1), metrics | of_updates

    def prepared(state: TrainState, experience: Experience) -> tuple[Experience, Metrics]:
        """Adds what is computed once, before the batch is split."""
        rollout, B = experience.rollout, experience.rollout.tokens.shape[0]
        if B % (minibatches * micro_batches):
            raise ValueError(
                f"{B} prompts do not divide into {minibatches} minibatches of {micro_batches} micro-batches; "
                f"use a batch of a multiple of {minibatches * micro_batches} prompts"
            )
        metrics = _rollout_metrics(rollout)
        if experience.reward_mask is not None:  # what nothing could score teaches nothing, and counts nowhere
            scored = jnp.any(experience.reward_mask, axis=-1, keepdims=True)
            experience = experience._replace(rollout=rollout._replace(mask=rollout.mask & scored))
        if state.ref_params is not None and experience.ref_log_probs is None:
            with jax.named_scope("score_reference"):
                ref_log_probs = score_reference(state, rollout, experience.packing)
            experience = experience._replace(ref_log_probs=ref_log_probs)
        if advantage is not None:
            advantages, of_rewards = at(advantage, state)(experience)
            experience, metrics = experience._replace(advantages=advantages), metrics | of_rewards
        for hook in prepare:
            experience, of_hook = hook(experience)
            metrics = metrics | of_hook
        if updates > 1 and experience.old_log_probs is None:
            raise ValueError(
                f"{passes} passes over {minibatches} minibatches need the old_log_probs of the policy that "
                "sampled: make_collect(..., score_old=True) adds them"
            )
        return experience, metrics

    def score_reference(state: TrainState, rollout: Rollout, packing: Packing | None) -> Array:
        def log_probs(part: tuple[Rollout, Packing | None]) -> Array:
            rollout, packing = part
            now = at(temperature, state)
            return score(policy, state.ref_params, rollout, packing=packing, temperature=now, entropy=False).log_probs

        parts, whole = minibatches * micro_batches, (rollout, packing)
        return log_probs(whole) if parts == 1 else _join(jax.lax.map(log_probs, _split(whole, parts)))

    def evaluate(params: Params, state: TrainState, experience: Experience) -> tuple[Terms, Metrics]:
        now = at(temperature, state)
        scores = score(policy, params, experience.rollout, packing=experience.packing, temperature=now)
        if experience.old_log_probs is None:
            experience = experience._replace(old_log_probs=jax.lax.stop_gradient(scores.log_probs))
        return at(loss, state)(scores, experience)

    def part_loss(
        params: Params, state: TrainState, part: Experience, counts: tuple[Array, ...] | None
    ) -> tuple[Array, tuple[Terms, Metrics]]:
        terms, metrics = evaluate(params, state, part)
        return losses.value(terms, counts), (terms, metrics)

    def gradient(state: TrainState, experience: Experience) -> tuple[Params, tuple[Terms, Metrics]]:
        if micro_batches == 1:
            return jax.grad(part_loss, has_aux=True)(state.params, state, experience, None)
        parts = _split(experience, micro_batches)
        # The divisors of the whole come first. They hang on masks alone, so XLA drops the network from this sweep.
        counts = jax.lax.map(lambda part: tuple(t.count for t in evaluate(state.params, state, part)[0]), parts)
        counts = tuple(jax.lax.stop_gradient(jnp.sum(count)) for count in counts)

        def add(total: Params, part: Experience) -> tuple[Params, tuple[Terms, Metrics]]:
            grads, aux = jax.grad(part_loss, has_aux=True)(state.params, state, part, counts)
            return jax.tree.map(lambda sum, g: sum + g.astype(sum.dtype), total, grads), aux

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), state.params)
        grads, aux = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params), types.merge(aux)

    def learn_minibatch(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        with jax.named_scope("gradient"):
            grads, (terms, metrics) = gradient(state, experience)
        total = losses.value(terms)
        counted = jnp.any(jnp.stack([term.count > 0 for term in terms])) & jnp.any(experience.rollout.mask)
        with jax.named_scope("update"):
            state, of_update = update(state, grads, optimizer, loss=total, counted=counted, max_grad_norm=max_grad_norm)
        return state, {"loss": Mean(total, jnp.ones((), jnp.int32))} | metrics | of_update

    return learn


def step_keys(state: TrainState) -> tuple[PRNGKey, PRNGKey]:
    """The keys of this step, of sampling and of learning: functions of the run's key and the step alone."""
    sample_key, learn_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    return sample_key, learn_key


def _shuffled(key: PRNGKey, number: Array, experience: Experience) -> Array:
    return jax.random.permutation(jax.random.fold_in(key, number), experience.rollout.tokens.shape[0])


def _split(tree: Tree, parts: int) -> Tree:
    """`[B, ...]` to `[parts, B / parts, ...]`; each part takes rows from everywhere, and so from every device."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def _join(tree: Tree) -> Tree:
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _rollout_metrics(rollout: Rollout) -> Metrics:
    lengths, completions = rollout.lengths, jnp.sum(rollout.lengths > 0)  # 0 where there is none
    return {
        "length": Mean(jnp.sum(lengths), completions),
        "length_max": Max(jnp.max(lengths)),
        "truncated": Mean(jnp.sum(rollout.truncated), completions),
    }
