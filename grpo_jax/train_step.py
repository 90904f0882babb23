"""Sample, reward, score, advantage, loss and update, composed into one pure step.

    sampler = sampling.sampler(group_size=8, max_tokens=256, eos_ids=(2,))
    step = make_train_step(policy, optimizer, sampler, reward=reward, loss=losses.grpo())
    state, metrics = jax.jit(step)(state, prompts)

A step has two halves: `collect` samples, and `learn` trains. With rewards computed on the host, a loop calls the two
and puts the rewards into the experience between them:

    step = make_train_step(policy, optimizer, sampler, loss=losses.grpo()).jit()
    experience = step.collect(state, prompts)
    rewards, reward_mask = reward(experience.rollout)
    state, metrics = step.learn(state, experience._replace(rewards=rewards, reward_mask=reward_mask))
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from grpo_jax.advantages import from_rewards
from grpo_jax.freezing import bind, named_leaves
from grpo_jax.losses.aggregates import token_mean
from grpo_jax.policies import Policy
from grpo_jax.programs import Program
from grpo_jax.protocols import Advantage, ExperienceTransform, Loss, Reward, Sampler, Terms
from grpo_jax.schedules import Scheduled, at
from grpo_jax.scoring import Teacher, score
from grpo_jax.statistics import Max, Mean
from grpo_jax.truncation import Truncation
from grpo_jax.types import Array, Experience, Metrics, Number, Packing, Params, Prompts, Rollout, Scores, TrainState
from grpo_jax.updates import Learn, Updates, in_parts, jit_learn, make_updates, step_keys

Collect = Callable[[TrainState, Prompts], Experience]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of training as a pure function `(state, prompts) -> (state, metrics)`, and its two halves.

    Attributes:
      collect: `(state, prompts) -> experience`.
      learn: `(state, experience) -> (state, metrics)`. Metrics are `Mean` and `Max` statistics and scalars;
        `statistics.summary` turns them into numbers.
      on_host: `collect` goes through the host, as conversations do, and is never a program.
      shaped: a `collect` of zeros in the same shapes, which can be traced, where that one cannot.
    """

    collect: Collect
    learn: Learn
    on_host: bool = False
    shaped: Collect | None = None

    def __call__(self, state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics]:
        """The whole step, for a reward that is traced."""
        return self.learn(state, self.collect(state, prompts))

    def jit(self, *, compiler_options: Mapping[str, str | bool] | None = None) -> "Step":
        """The same step with each half jitted; `learn` donates the state that it is given; see `updates.jit_learn`.

        A `collect` that goes through the host stays as it is: its parts are programs. What XLA's compiler has freed
        goes back to the system after each program; see `programs.Program`.

        Args:
          compiler_options: of XLA, for `learn`; `compiler_options.saving_memory()` unless given.
        """
        collect = self.collect if self.on_host else Program(jax.jit(self.collect))
        return dataclasses.replace(
            self, collect=collect, learn=jit_learn(self.learn, compiler_options=compiler_options)
        )


def make_train_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    sampler: Sampler | Scheduled,
    *,
    loss: Loss | Scheduled,
    reward: Reward | None = None,
    advantage: Advantage | Scheduled | None = None,
    transforms: Sequence[ExperienceTransform] = (),
    updates: Updates = Updates(),
    score_old: bool = False,
    teacher: Teacher | None = None,
    replay_truncation: bool = True,
) -> Step:
    """One step of GRPO.

    It can be jitted whole, scanned, and vmapped over states and over any setting that is a number. The sampler, the
    loss and the advantage may each be `Scheduled`. Completions are scored at the sampler's temperature and under its
    top-k, top-p and min-p, by the policy as by a reference. The policy that sampled is scored wherever several updates
    need it, in as many parts as the updates have.

    Args:
      policy: the network.
      optimizer: any optax optimiser.
      sampler: `(policy, params, prompts, key) -> rollout`; see `sampling`.
      loss: `(scores, experience) -> (terms, metrics)`; see `losses`.
      reward: `rollout -> (rewards [B, G, R], reward_mask [B, G, R])`, traced (`rewards.callback` makes one of a host
        reward); None leaves the rewards to the caller, between `collect` and `learn`.
      advantage: `experience -> (advantages, metrics)`; `advantages.from_rewards()` unless given.
      transforms: as in `make_learn`.
      updates: iterations, minibatches, micro-batches and the clipping of gradients.
      score_old: True scores the policy that sampled also for a single update: where the params change between
        `collect` and `learn`, or for what reads `old_log_probs`, `old_entropy` or `old_collision`.
      teacher: as in `make_learn`.
      replay_truncation: False scores the whole distribution whatever the sampler draws from, as TRL and verl do: the
        ratio to the sampler is then not 1 on the policy itself.
    """
    collecting = functools.partial(
        make_collect,
        policy,
        reward=reward,
        score_old=score_old or updates.count > 1,
        score_parts=updates.parts,
        replay_truncation=replay_truncation,
    )
    blank = getattr(sampler, "blank", None)
    return Step(
        collecting(sampler),
        make_learn(
            policy,
            optimizer,
            loss=loss,
            advantage=from_rewards() if advantage is None else advantage,
            transforms=transforms,
            temperature=temperature_of(sampler),
            truncation=truncation_of(sampler) if replay_truncation else None,
            updates=updates,
            teacher=teacher,
        ),
        on_host=getattr(sampler, "on_host", False),
        shaped=None if blank is None else collecting(blank),
    )


def followed_by(step: Step, after: Callable[[TrainState, Experience], TrainState]) -> Step:
    """The same step, whose `learn` then changes the state, such as what `extra` holds, in the same program.

    Args:
      step: not jitted yet.
      after: `(state after the updates, experience as learn was given it) -> state`.
    """

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        state, metrics = step.learn(state, experience)
        return after(state, experience), metrics

    return dataclasses.replace(step, learn=learn)


def make_collect(
    policy: Policy,
    sampler: Sampler | Scheduled,
    *,
    reward: Reward | None = None,
    score_old: bool = False,
    score_parts: int = 1,
    replay_truncation: bool = True,
) -> Collect:
    """The first half of a step alone, `(state, prompts) -> experience`; `make_train_step` derives its settings.

    Args:
      policy: as in `make_train_step`.
      sampler: as in `make_train_step`.
      reward: as in `make_train_step`.
      score_old: True fills `old_log_probs`, `old_entropy` and `old_collision`.
      score_parts: parts of the batch for which that is done, one after the other to save memory; a divisor of `B`.
      replay_truncation: as in `make_train_step`.
    """
    truncation = truncation_of(sampler) if replay_truncation else None

    @jax.jit  # for a sampler of the host, outside of any program
    def scored(params: Params, rollout: Rollout, temperature: Number, truncation: Truncation | None) -> Scores:
        settings = {"temperature": temperature, "truncation": truncation}
        return in_parts(lambda part: score(policy, params, part, **settings), rollout, score_parts)

    def collect(state: TrainState, prompts: Prompts) -> Experience:
        sample_key, _ = step_keys(state)
        draw, params = at(sampler, state), bind(state.params, state.frozen)
        with jax.named_scope("sample"):
            rollout = draw(policy, params, prompts, sample_key)
        experience = Experience(rollout)
        if reward is not None:
            with jax.named_scope("reward"):
                rewards, reward_mask = map(jnp.asarray, reward(rollout))
            experience = experience._replace(rewards=rewards, reward_mask=reward_mask)
        if score_old:
            with jax.named_scope("score_old"):
                old = scored(params, rollout, draw.temperature, at(truncation, state))
            experience = experience._replace(
                old_log_probs=old.log_probs, old_entropy=old.entropy, old_collision=old.collision
            )
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
    truncation: Truncation | Scheduled | None = None,
    updates: Updates = Updates(),
    teacher: Teacher | None = None,
) -> Learn:
    """The second half of a step alone, for demonstrations, preferences and rollouts from elsewhere.

    Adds the reference's log-probs, if the state has a reference, and the advantages,
    calls the transforms, then makes `updates.count` updates.

    Args:
      policy: the network.
      optimizer: any optax optimiser.
      loss: `(scores, experience) -> (terms, metrics)`; may be `Scheduled`.
      advantage: `experience -> (advantages, metrics)`, may be `Scheduled`; None for a
        loss that needs none, such as `losses.sft()`, and for an experience that brings
        its own.
      transforms: functions `experience -> (experience, metrics)`, called in this order once
        before the batch is split; see `grpo_jax.transforms`.
      temperature: of the scores; the one that the rollout was sampled at. May be `Scheduled`.
      truncation: under which the rollout was sampled, as in `scoring.score`; may be `Scheduled`. Adds the metric
        `outside_truncation`, the share of tokens that would not be kept now.
      updates: iterations, minibatches, micro-batches and the clipping of gradients.
      teacher: the network that reads `state.ref_params`, if it is not the policy's own, and the divergence from it
        that every update scores; see `losses.distillation`.

    Returns:
      `(state, experience) -> (state, metrics)`, pure.

    Raises:
      ValueError: when traced, if the batch does not divide, or if a loss needs
        `old_log_probs` for several updates and finds none.
    """

    def learn(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        experience = jax.tree.map(jnp.asarray, experience)  # rewards of the host are NumPy's
        experience, metrics = prepare(state, experience)
        state, update_metrics = learn_from(state, experience)
        return state, metrics | update_metrics

    def prepare(state: TrainState, experience: Experience) -> tuple[Experience, Metrics]:
        """Adds everything that is computed once, before the batch is split."""
        metrics = rollout_metrics(experience.rollout)
        experience = mask_unscored(experience)
        if state.ref_params is not None:
            scorer = policy if teacher is None else teacher.policy
            experience = add_reference(
                scorer,
                teacher_of(state),
                experience,
                at(temperature, state),
                updates.parts,
                truncation=at(truncation, state),
            )
        if advantage is not None:
            advantages, reward_metrics = at(advantage, state)(experience)
            experience, metrics = experience._replace(advantages=advantages), metrics | reward_metrics
        for transform in transforms:
            experience, transform_metrics = transform(experience)
            metrics = metrics | transform_metrics
        return experience, metrics

    def teacher_of(state: TrainState) -> Params:
        if state.ref_params is None:
            raise ValueError("a teacher's params are the state's ref_params: state._replace(ref_params=...)")
        # What is frozen belongs to a reference such as `init_state` keeps; a teacher of the same network may be whole.
        names, trained = ([path for path, _ in named_leaves(x)] for x in (state.ref_params, state.params))
        own = names == trained and (teacher is None or teacher.policy == policy)
        return bind(state.ref_params, state.frozen) if own else state.ref_params

    def evaluate(params: Params, state: TrainState, experience: Experience) -> tuple[Terms, Metrics]:
        scores = score(
            policy,
            params,
            experience.rollout,
            packing=experience.packing,
            temperature=at(temperature, state),
            truncation=at(truncation, state),
            teacher=teacher,
            teacher_params=None if teacher is None else teacher_of(state),
            teacher_prompts=experience.teacher_prompts,
            top_tokens=None if experience.teacher_top is None else experience.teacher_top.tokens,
        )
        if experience.old_log_probs is None and updates.count == 1:  # else the loss refuses
            experience = experience._replace(old_log_probs=jax.lax.stop_gradient(scores.log_probs))
        terms, metrics = at(loss, state)(scores, experience)
        if scores.outside is not None:
            metrics = metrics | {"outside_truncation": token_mean(scores.outside, experience.rollout.mask)}
        return terms, metrics

    learn_from = make_updates(evaluate, optimizer, updates, has_data=has_tokens)
    return learn


def has_tokens(experience: Experience) -> Array:
    """`[]` bool, whether a token counts: one that the policy wrote or, for `losses.echo`, one that it did not write."""
    written, others = jnp.any(experience.rollout.mask), experience.environment_mask
    return written if others is None else written | jnp.any(others)


def temperature_of(sampler: Sampler | Scheduled) -> Number | Scheduled:
    """The temperature at which a sampler's completions are scored: its own."""
    if isinstance(sampler, Scheduled):
        make = sampler.make
        return Scheduled(lambda step, extra: make(step, extra).temperature)
    return sampler.temperature


def truncation_of(sampler: Sampler | Scheduled) -> Truncation | Scheduled | None:
    """The truncation under which a sampler's completions are scored: its own, if it has one."""
    if isinstance(sampler, Scheduled):
        make = sampler.make
        return Scheduled(lambda step, extra: truncation_of(make(step, extra)))
    return getattr(sampler, "truncation", None)


def mask_unscored(experience: Experience) -> Experience:
    """Takes completions without any reward out of the mask, so that they count nowhere."""
    if experience.reward_mask is None:
        return experience
    scored = jnp.any(experience.reward_mask, axis=-1, keepdims=True)
    rollout = experience.rollout
    return experience._replace(rollout=rollout._replace(mask=rollout.mask & scored))


def add_reference(
    policy: Policy,
    ref_params: Params,
    experience: Experience,
    temperature: Number,
    parts: int,
    *,
    truncation: Truncation | None = None,
) -> Experience:
    """Adds the reference's log-probs, unless they are there, computed in `parts` to save memory.

    The reference reads `experience.teacher_prompts` in place of the rollout's prompts, where there are some.
    """
    if experience.ref_log_probs is not None:
        return experience

    def log_probs(part: tuple[Rollout, Packing | None]) -> Array:
        rollout, packing = part
        settings = {"temperature": temperature, "truncation": truncation, "entropy": False}
        return score(policy, ref_params, rollout, packing=packing, **settings).log_probs

    with jax.named_scope("score_reference"):
        rollout = experience.rollout._replace(experts=None)  # the reference chooses its own
        if experience.teacher_prompts is not None:
            rollout = rollout._replace(prompts=experience.teacher_prompts)
        return experience._replace(ref_log_probs=in_parts(log_probs, (rollout, experience.packing), parts))


def rollout_metrics(rollout: Rollout) -> Metrics:
    """How long the completions are, and how many were cut off; of conversations, their turns and failures as well."""
    lengths, completions = rollout.lengths, jnp.sum(rollout.lengths > 0)  # 0 where there is none
    metrics: Metrics = {
        "length": Mean(jnp.sum(lengths), completions),
        "length_max": Max(jnp.max(lengths)),
        "truncated": Mean(jnp.sum(rollout.truncated), completions),
    }
    if rollout.turns is not None:
        metrics["turns"] = Mean(jnp.sum(rollout.turns.ends > 0), completions)
        metrics["environment_failed"] = Mean(jnp.sum(rollout.turns.failed), completions)
    return metrics
