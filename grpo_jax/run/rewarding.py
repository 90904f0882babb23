"""The settings of scripts that say what completions are rewarded for.

```python
@dataclasses.dataclass(frozen=True)
class Config(RewardSettings):
    model: str

reward = config.make_reward(rows, tokenizer, eos_ids=eos_ids)
given, mask, measured = reward(rollout, rewards.TrainerState(n, steps))

advantage = config.with_steps(advantage)
of_steps = config.make_step_rewards(rows, tokenizer, eos_ids=eos_ids)
experience = experience._replace(rewards=given, reward_mask=mask, **of_steps(rollout, rewards.TrainerState(n, steps)))
```
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax import advantages, rewards
from grpo_jax.protocols import Advantage
from grpo_jax.rewards.conversations import Read
from grpo_jax.run import inputs, metrics, ranges
from grpo_jax.run.names import resolve
from grpo_jax.schedules import Scheduled
from grpo_jax.types import Metrics, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StepRewarded = Callable[..., dict[str, np.ndarray]]  # (rollout, trainer_state=None) -> fields of an experience
Rewarded = Callable[[Rollout, rewards.TrainerState], tuple[np.ndarray, np.ndarray, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Reward functions by their names, and what is done about those that fail."""

    reward: tuple[str, ...]  # as module:function, of this folder or installed
    reward_weights: tuple[float, ...] | None = None  # one per function; 1 each if not given
    step_reward: str | None = None  # a function of the steps of the reasoning, as --reward; see rewards.steps
    step_weight: float | None = None  # of the steps beside the whole completion; 1 if not given
    step_split: str | None = None  # of grpo_jax.rewards.process, or module:function; paragraphs if not given
    held_out: tuple[str, ...] = ()  # verifiers that nothing is learned from, as --reward: held_out/<name> tells hacking
    held_out_every: int = 10  # steps between the batches that they are asked about
    reward_timeout: float = 300.0  # seconds after which a reward function that has not returned is reported
    stop_after_failed: int = 3  # batches in a row that a reward function raised on; 1 stops at once

    @functools.cached_property
    def reward_functions(self) -> list[Any]:
        """What is learned from."""
        return [resolve(name) for name in self.reward]

    @functools.cached_property
    def verifiers(self) -> list[Any]:
        """What is not."""
        return [resolve(name) for name in self.held_out]

    @property
    def reward_names(self) -> list[str]:
        """Of the rewards, as in the metrics."""
        return [rewards.name_of(function) for function in self.reward_functions]

    def make_reward(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        eos_ids: Sequence[int],
        prompt_column: str = "prompt",
        read: Read | None = None,
    ) -> Rewarded:
        """Makes `(rollout, trainer_state) -> (rewards [B, G, R], mask, metrics)`; see `rewards.host`.

        Of a batch that one function raised on, nothing is learned from the others alone: all of it is masked. A
        held-out verifier that raised is logged as `held_out/<name>/failed` and ends the run as late as a reward.

        Raises:
          ValueError: for `held_out_every` below 1; for two functions of one name, held out or not, since one would
            overwrite the other's metrics.
        """
        if self.held_out_every < 1:
            raise ValueError(f"--held-out-every is at least 1, got {self.held_out_every}")
        inputs.check_rewards([*self.reward_functions, *self.verifiers])
        if not self.verifiers:
            ranges.tell_unused(self, ["held_out_every"], without="--held-out")
        settings: dict[str, Any] = {
            "prompt_column": prompt_column, "eos_ids": eos_ids, "report_after": self.reward_timeout, "read": read
        }  # fmt: skip
        logged, names = metrics.Logged(), self.reward_names

        def skip_failed(functions: Sequence[Any]) -> list[Any]:
            return [rewards.skip_failed_batches(f, batches=self.stop_after_failed) for f in functions]

        def log_held_out(name: str, value: float) -> None:
            logged(f"held_out/{name}", value)

        reward = rewards.host(skip_failed(self.reward_functions), rows, tokenizer, log_metric=logged, **settings)
        verify = None
        if self.verifiers:
            verify = rewards.host(skip_failed(self.verifiers), rows, tokenizer, log_metric=log_held_out, **settings)
        of_verifiers = [rewards.name_of(verifier) for verifier in self.verifiers]

        def rewarded(rollout: Rollout, trainer_state: rewards.TrainerState) -> tuple[np.ndarray, np.ndarray, Metrics]:
            given, mask = reward(rollout, trainer_state)
            if any(logged.last(f"{name}/failed") for name in names):
                mask = np.zeros_like(mask)
            measured: Metrics = {}
            if verify is not None and trainer_state.global_step % self.held_out_every == 0:
                found = verify(rollout, trainer_state)
                measured = rewards.held_out_metrics(of_verifiers, found, (given, mask), weights=self.reward_weights)
            return given, mask, measured | logged.take()

        return rewarded

    def with_steps(self, advantage: Advantage | Scheduled) -> Advantage | Scheduled:
        """The advantage with `--step-weight` times that of the steps, by token; itself, if steps are not rewarded.

        Raises:
          ValueError: for settings of steps without `--step-reward`.
        """
        if self.step_reward is None:
            for name in ("step_weight", "step_split"):
                if (value := getattr(self, name)) is not None:
                    flag = f"--{name.replace('_', '-')} {value}"
                    raise ValueError(f"{flag} is of --step-reward: say who grades the steps")
            return advantage
        weight = 1.0 if self.step_weight is None else self.step_weight
        if isinstance(advantage, Scheduled):
            make = advantage.make
            return Scheduled(lambda step, extra: advantages.from_steps(weight=weight, outcome=make(step, extra)))
        return advantages.from_steps(weight=weight, outcome=advantage)

    def make_step_rewards(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        eos_ids: Sequence[int],
        prompt_column: str = "prompt",
    ) -> StepRewarded:
        """Makes `(rollout, trainer_state=None) -> fields` of an experience, none if steps are not rewarded.

        See `rewards.steps`.

        A function of steps that raises ends the run: nothing stands in for its grades.
        """
        if self.step_reward is None:
            return lambda rollout, trainer_state=None: {}
        split = resolve(self.step_split or "paragraphs", "grpo_jax.rewards.process")
        steps = rewards.steps(
            resolve(self.step_reward), rows, tokenizer, split=split, prompt_column=prompt_column, eos_ids=eos_ids,
            report_after=self.reward_timeout,
        )  # fmt: skip

        def rewarded(rollout: Rollout, trainer_state: rewards.TrainerState | None = None) -> dict[str, np.ndarray]:
            given, mask = steps(rollout, trainer_state)
            return {"step_rewards": given, "step_mask": mask}

        return rewarded
