"""The settings of scripts that say what is maximised: a loss, advantages and what comes between them.

```python
@dataclasses.dataclass(frozen=True)
class Config(ObjectiveSettings):
    model: str

loss = config.make_loss(max_tokens=512)
advantage, running = config.make_advantage(rows, names, weights=weights, group_size=8)
```
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import advantages, losses
from grpo_jax.protocols import Advantage, Loss
from grpo_jax.run import ranges
from grpo_jax.run.names import bound, make_with, required
from grpo_jax.schedules import Scheduled, running_advantages
from grpo_jax.schedules.running_advantages import RunningAdvantage


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """An objective by the names of its parts."""

    loss: str = "grpo"  # of grpo_jax.losses, such as "cispo(max_ratio=4)", or your own as module:function
    advantage: str = "group_advantages"  # of grpo_jax.advantages, such as "group_advantages(ddof=1)", or your own
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
        """The loss by its name, with the settings that were given; its own defaults for the rest.

        A function `(scores, experience)` is a loss itself, and any other one makes it.

        Raises:
          ValueError: for a setting that the loss does not have, or requires.
        """
        stated: dict[str, Any] = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}
        stated["penalty"] = losses.k3(self.beta) if self.beta else None
        make = bound(self.loss, "grpo_jax.losses")
        if required(make) == ["scores", "experience"]:
            if given := [name for name, setting in stated.items() if setting is not None]:
                flags = ", ".join("--beta" if name == "penalty" else f"--{name.replace('_', '-')}" for name in given)
                raise ValueError(f"{flags} has no effect: {self.loss} is a loss by itself, and no maker of one")
            loss = make
        else:
            loss = make_with(make, self.loss, stated, offered={"max_tokens": max_tokens})
        return losses.plus(loss, losses.load_balance(self.load_balance)) if self.load_balance else loss

    def tell_unclipped(self, *, updates: int, score_old: bool) -> None:
        """Prints a warning of bounds for a ratio that is 1: a loss of this package, and one update of each rollout.

        Args:
          updates: of a rollout.
          score_old: whether the old policy is another than the one that is trained, as of `make_train_step`.
        """
        if updates == 1 and not score_old and ":" not in self.loss:
            several = "several updates of a rollout: --iterations or --minibatches"
            ranges.tell_unused(self, ["epsilon", "epsilon_high"], without=several)

    def transforms(self) -> list[Any]:
        """The transforms by their names.

        Raises:
          ValueError: for a maker without its arguments.
        """
        return [_transform(name) for name in self.transform]

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
          ValueError: for settings of a baseline without one, a group of 1 that would be compared with itself, and what
            an estimator of this package refuses.
        """
        function = bound(self.advantage, "grpo_jax.advantages", "grpo_jax.schedules.running_advantages")
        settings: dict[str, Any] = {"weights": weights, "names": names}
        parameters = inspect.signature(function).parameters
        if "(" in self.advantage and not required(function) and "weights" not in parameters:
            function = function()  # what makes an estimator, such as pass_at_k(4)
            parameters = inspect.signature(function).parameters
        if "of_row" in parameters:
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
        if not {"rewards", "experience", "weights"} & parameters.keys() and len(required(function)) != 2:
            raise ValueError(
                f"{self.advantage} takes neither rewards and their mask nor an experience. A maker? Then write it with "
                f"its arguments, as in '{self.advantage.partition('(')[0]}(...)'"
            )
        _try(function, group_size)
        return advantages.from_function(function, **settings), None


def _try(function: Callable[..., Any], group_size: int) -> None:
    """Traces an estimator of this package, of which some settings are looked at when it is called."""
    module = getattr(function.func if isinstance(function, functools.partial) else function, "__module__", "")
    parameters = [*inspect.signature(function).parameters]
    if module.startswith("grpo_jax.") and parameters[:2] == ["rewards", "mask"] and "experience" not in parameters:
        shape = (2, group_size)
        jax.eval_shape(lambda rewards, mask: function(rewards, mask), jnp.zeros(shape), jnp.ones(shape, bool))


def _transform(name: str) -> Any:
    function = bound(name, "grpo_jax.transforms")
    plain, brackets, _ = name.partition("(")
    if brackets and not required(function):
        return function()
    first = [*inspect.signature(function).parameters][:1]
    if first != ["experience"] and (":" not in plain or len(required(function)) != 1):
        raise ValueError(
            f"--transform {name} takes no experience. A maker? Then write it with its arguments, as in "
            f"'{plain}({first[0] if first else ''}=...)'"
        )
    return function
