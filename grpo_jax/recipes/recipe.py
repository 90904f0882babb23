"""What a recipe is: the settings of a published run as a value, and what is made of them."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax import losses, statistics
from grpo_jax.advantages import from_rewards, group_advantages
from grpo_jax.protocols import Advantage, Aggregate, Cost, Estimator, ExperienceTransform, Loss, Penalty, Weight
from grpo_jax.schedules import Scheduled, entropy_control, learning_rates
from grpo_jax.schedules.reference import sync_reference
from grpo_jax.transforms import top_entropy
from grpo_jax.types import Array, Metrics, Number, TrainState
from grpo_jax.updates import Updates


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a published run.

    Raises:
      ValueError: when made or replaced, for a number that nothing in the recipe has a use
        for, or that is out of range.
    """

    name: str
    source: str  # where the numbers stand
    bibtex: str
    leaves: tuple[str, ...]  # what is left to the caller, a sentence each

    # The loss: what it is made of, and numbers, which are the arguments of these names of `objective` or `weight`.
    objective: Callable[..., Loss]
    weight: Callable[..., Weight] | None = None
    aggregate: Aggregate | None = None  # None for the objective's own
    epsilon: Number | None = None
    epsilon_high: Number | None = None
    delta: Number | None = None
    max_ratio: Number | None = None
    tau_pos: Number | None = None
    tau_neg: Number | None = None
    k_pos: Number | None = None
    lambda_pos: Number | None = None
    k_neg: Number | None = None
    lambda_neg: Number | None = None
    limit: Number | None = None
    low: Number | None = None
    high: Number | None = None
    threshold: Number | None = None

    # The reference policy: `cost(beta)` in the reward or, without a cost, `penalty(beta)` in the loss.
    beta: Number | None = None
    penalty: Callable[[Number], Penalty] = losses.k3
    cost: Callable[[Number], Cost] | None = None
    reference_updates: int | None = None  # from one renewal of the reference to the next

    # A bonus for entropy that follows a target.
    entropy_target: Number | None = None  # nats per token
    entropy_delta: Number | None = None

    # The advantages, and the transforms of the experience.
    to_advantages: Callable[..., Advantage] = from_rewards
    estimator: Estimator | None = group_advantages  # None where `to_advantages` takes none
    transforms: tuple[ExperienceTransform, ...] = ()
    entropy_share: Number | None = None  # fraction of tokens, those of highest entropy, to train on

    # The rollout.
    prompts: int | None = None  # the batch that a step is called with
    group_size: int | None = None
    max_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None

    # The updates, by AdamW.
    minibatches: int | None = None  # updates per iteration
    iterations: int | None = None
    learning_rate: Number | None = None  # constant after the warm-up
    warmup_rollouts: int | None = None  # linear; see `learning_rates.learning_rate`
    b1: Number | None = None
    b2: Number | None = None
    adam_eps: Number | None = None
    weight_decay: Number | None = None
    max_grad_norm: Number | None = None

    def __post_init__(self) -> None:
        parts = [self.objective] if self.weight is None else [self.objective, self.weight]
        for name in _OF_PARTS:
            if getattr(self, name) is not None and not any(name in _parameters(part) for part in parts):
                takers = " or ".join(getattr(part, "__name__", repr(part)) for part in parts)
                value = getattr(self, name)
                raise ValueError(f"{name} = {value} has no effect in {self.name}: it is no argument of {takers}")
        for name, needed in (("reference_updates", "beta"), ("entropy_delta", "entropy_target")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"{name} = {getattr(self, name)} has no effect in {self.name} without {needed}")
        if self.reference_updates is not None and self.reference_updates % self.updates.count:
            raise ValueError(
                f"reference_updates = {self.reference_updates} is no whole number of rollouts of {self.updates.count} "
                "updates"
            )
        _ = self.settings  # a number out of range is refused here rather than at the first step

    @property
    def updates(self) -> Updates:
        """Iterations, minibatches and the clipping of gradients."""
        names = ("iterations", "minibatches", "max_grad_norm")
        return Updates(**_stated({name: getattr(self, name) for name in names}))

    @property
    def loss(self) -> Loss | Scheduled:
        """The loss: a function, or scheduled where the entropy follows a target."""
        parts: dict[str, Any] = {"aggregate": self.aggregate}
        if self.weight is not None:
            parts["weight"] = self.weight(**self._arguments_of(self.weight))
        if self.beta is not None and self.cost is None:
            parts["penalty"] = self.penalty(self.beta)
        loss = self.objective(**self._arguments_of(self.objective), **_stated(parts))
        target = self.entropy_target
        if target is None:
            return loss

        def with_bonus(step: Array, control: entropy_control.EntropyControl) -> Loss:
            del step
            return losses.plus(loss, losses.entropy_bonus(entropy_control.bonus(control, target=target)))

        return Scheduled(with_bonus)

    @property
    def advantage(self) -> Advantage:
        """What makes advantages of an experience's rewards."""
        arguments = () if self.estimator is None else (self.estimator,)
        if self.beta is not None and self.cost is not None:
            return self.to_advantages(*arguments, cost=self.cost(self.beta))
        return self.to_advantages(*arguments)

    @property
    def rate(self) -> Callable[[Array | int], Array]:
        """The learning rate by the number of an update: constant after the warm-up, if there is one.

        Raises:
          ValueError: if the source states no learning rate.
        """
        if self.learning_rate is None:
            raise ValueError(f"{self.source} states no learning rate: dataclasses.replace(recipe, learning_rate=...)")
        return learning_rates.learning_rate(
            self.learning_rate, warmup_steps=self.warmup_rollouts or 0, updates_per_step=self.updates.count
        )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW at the learning rate of the source; what that does not state is optax's default.

        Raises:
          ValueError: if the source states no learning rate.
        """
        return optax.adamw(
            self.rate,
            **_stated({"b1": self.b1, "b2": self.b2, "eps": self.adam_eps, "weight_decay": self.weight_decay}),
        )

    @property
    def initial(self) -> dict[str, Any]:
        """Keyword arguments of `init_state`."""
        extra = {} if self.entropy_target is None else {"extra": entropy_control.init()}
        return {"reference": self.beta is not None} | extra

    @property
    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of `sampling.sampler`, but for `eos_ids`; none for what the source does not state."""
        names = ("group_size", "max_tokens", "temperature", "top_p", "top_k")
        return _stated({name: getattr(self, name) for name in names})

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `make_train_step`."""
        filters = () if self.entropy_share is None else (top_entropy(self.entropy_share),)
        return {
            "loss": self.loss,
            "advantage": self.advantage,
            "transforms": (*self.transforms, *filters),
            "updates": self.updates,
            "score_old": self.entropy_share is not None,
            "replay_truncation": False,  # the sources' frameworks score whole distributions
        }

    def after(self, state: TrainState, metrics: Metrics) -> TrainState:
        """What the recipe changes between steps: renews the reference, and moves the bonus for entropy.

        Args:
          state: after a step.
          metrics: of the step.

        Returns:
          The state to go on with; the same for most recipes.
        """
        if self.reference_updates is not None:
            state = sync_reference(state, every=self.reference_updates // self.updates.count)
        if self.entropy_target is not None:
            entropy, measured = statistics.summary(metrics)["entropy"], metrics["entropy"].count > 0
            settings = _stated({"target": self.entropy_target, "delta": self.entropy_delta})
            moved = entropy_control.follow(state.extra, entropy, **settings)
            # Where no token counted there is no entropy, not one of 0.
            extra = jax.tree.map(lambda new, old: jnp.where(measured, new, old), moved, state.extra)
            state = state._replace(extra=extra)
        return state

    def _arguments_of(self, part: Callable[..., Any]) -> dict[str, Any]:
        names = _parameters(part) & {*_OF_PARTS, "max_tokens"}
        return _stated({name: getattr(self, name) for name in sorted(names)})


_OF_PARTS = (
    *("epsilon", "epsilon_high", "delta", "max_ratio", "tau_pos", "tau_neg"),
    *("k_pos", "lambda_pos", "k_neg", "lambda_neg", "limit", "low", "high", "threshold"),
)


def _parameters(f: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(f).parameters)


def _stated(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def citation(recipe: Recipe) -> str:
    """The BibTeX entry of the work that the recipe is of."""
    return recipe.bibtex
