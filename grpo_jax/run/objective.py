"""The settings of scripts that say what is maximised: a loss, advantages and what comes between them.

@dataclasses.dataclass(frozen=True)
class Config(ObjectiveSettings):
    model: str

loss = config.make_loss(max_tokens=512)
advantage, running = config.make_advantage(rows, names, weights=weights, group_size=8)
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax import advantages, losses
from grpo_jax.protocols import Advantage, Loss
from grpo_jax.run.names import make_with, resolve
from grpo_jax.schedules import Scheduled, running_advantages
from grpo_jax.schedules.running_advantages import RunningAdvantage


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """An objective by the names of its parts."""

    loss: str = "grpo"  # of grpo_jax.losses, or your own as module:function
    advantage: str = "group_advantages"  # of grpo_jax.advantages, or your own as module:function; see from_function
    # or spo or rae, of schedules.running_advantages: a running baseline per prompt
    baseline_column: str | None = None  # of spo and rae: prompts of one value in it, such as a role, share a baseline
    baseline_decay: float | None = None  # of spo and rae: their own, if not given
    baseline_half_life: float | None = None  # of spo, in its place: nats per token that the policy moves meanwhile
    transform: tuple[str, ...] = ()  # of grpo_jax.transforms, such as "top_entropy(0.2)", in this order
    epsilon: float | None = None  # the loss's own, if not given
    epsilon_high: float | None = None
    beta: float = 0.0  # weight of the KL term (k3); above 0, the first policy is kept as the reference
    load_balance: float = 0.0  # weight of the balance of loads in a mixture of experts

    def make_loss(self, *, max_tokens: int) -> Loss:
        """The loss by its name, with the settings that were given; its own defaults for the rest."""
        stated: dict[str, Any] = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}
        stated["penalty"] = losses.k3(self.beta) if self.beta else None
        make = resolve(self.loss, "grpo_jax.losses")
        loss = make_with(make, self.loss, stated, offered={"max_tokens": max_tokens})
        return losses.plus(loss, losses.load_balance(self.load_balance)) if self.load_balance else loss

    def transforms(self) -> list[Any]:
        """The transforms by their names."""
        return [resolve(name, "grpo_jax.transforms") for name in self.transform]

    def make_advantage(
        self,
        rows: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        *,
        weights: Sequence[float] | None,
        group_size: int,
    ) -> tuple[Advantage | Scheduled, RunningAdvantage | None]:
        """The advantage by its name, and what it keeps in the state, if it is one of running baselines.

        Args:
          rows: of the prompts that are trained on.
          names: of the rewards.
          weights: of the rewards; 1 each if None.
          group_size: completions of a prompt.

        Raises:
          ValueError: for settings of a baseline without one, and a group of 1 that would be compared with itself.
        """
        function = resolve(self.advantage, "grpo_jax.advantages", "grpo_jax.schedules.running_advantages")
        settings: dict[str, Any] = {"weights": weights, "names": names}
        if "of_row" in (parameters := inspect.signature(function).parameters):
            if self.baseline_half_life is not None and (self.baseline_decay, "half_life" in parameters) != (None, True):
                raise ValueError(
                    f"--baseline-half-life {self.baseline_half_life} is of --advantage spo without --baseline-decay"
                )
            given = {"decay": self.baseline_decay, "half_life": self.baseline_half_life}
            settings |= {name: value for name, value in given.items() if value is not None}
            running = function(running_advantages.of_rows(rows, self.baseline_column), **settings)
            return Scheduled(lambda step, kept: running.advantage(kept["baselines"])), running
        for flag in ("baseline_column", "baseline_decay", "baseline_half_life"):
            if (value := getattr(self, flag)) is not None:
                named = f"--{flag.replace('_', '-')} {value}"
                raise ValueError(f"{named} is of --advantage spo and rae, not {self.advantage}")
        if group_size < 2:
            raise ValueError(f"a group needs at least 2 completions to compare, got --group-size {group_size}")
        return advantages.from_function(function, **settings), None
