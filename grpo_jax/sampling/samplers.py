"""Samplers as values: a function `(policy, params, prompts, key) -> rollout` that carries its settings."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from grpo_jax.policies import Policy
from grpo_jax.sampling.batch import decode_together
from grpo_jax.sampling.slots import decode_in_slots
from grpo_jax.sampling.stopping import StopStrings
from grpo_jax.truncation import Truncation
from grpo_jax.types import Number, Params, PRNGKey, Prompts, Rollout


def _static(**default: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **default)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySampler:
    """Draws completions by decoding the policy; made by `sampler`, `continuous` and `greedy`.

    A pytree whose leaves are the numbers and the tables of `stop`, so that it may hold traced ones.
    `dataclasses.replace(sampler, top_p=0.9)` makes another.

    Raises:
      ValueError: for a setting out of range; traced ones cannot be checked and pass.
    """

    group_size: int = _static()
    max_tokens: int = _static()
    eos_ids: tuple[int, ...] = _static()
    temperature: Number = 1.0
    top_k: int | None = _static(default=None)
    top_p: Number | None = None
    min_p: Number | None = None
    stop: StopStrings | None = None
    greedy: bool = _static(default=False)
    record_experts: bool = _static(default=False)  # of a policy that has some, for router replay
    slots: int | None = _static(default=None)  # completions decoded at a time; None decodes all of them together

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.max_tokens < 1:
            raise ValueError(f"group_size and max_tokens are at least 1, got {self.group_size} and {self.max_tokens}")
        if isinstance(self.temperature, int | float) and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is above 0, got {self.temperature}; for the likeliest token: greedy=True")
        _ = self.truncation  # refuses what is out of range
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots is at least 1, got {self.slots}")
        if isinstance(self.stop, str | tuple | list) and not isinstance(self.stop, StopStrings):
            raise ValueError(f"stop is what stop_strings(tokenizer, {self.stop!r}) makes: a table of the tokenizer's")

    @property
    def truncation(self) -> Truncation | None:
        """Which tokens are kept; None where all are, as in the greedy sampler's log-probs."""
        if self.greedy or all(x is None for x in (self.top_k, self.top_p, self.min_p)):
            return None
        return Truncation(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    def __call__(self, policy: Policy, params: Params, prompts: Prompts, key: PRNGKey) -> Rollout:
        """Draws `group_size` completions for each prompt.

        Args:
          policy: the network, static.
          params: its parameters; cast once to the dtypes that the network computes in.
          prompts: `B` prompts.
          key: the noise; the same key gives the same completions.
        """
        decode = decode_together if self.slots is None else decode_in_slots
        return decode(policy, self, params, prompts, key)


def sampler(
    *,
    group_size: int,
    max_tokens: int,
    eos_ids: Sequence[int],
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    stop: StopStrings | None = None,
    record_experts: bool = False,
) -> PolicySampler:
    """A sampler that decodes all completions of a batch together, until every one of them has ended.

        token[t] ~ truncate(softmax(logits[t] / temperature))

    Each prompt is computed once and its cache is shared by its group. The noise of a token depends on the key, the
    prompt's place in the batch, the completion's place in the group and `t`, and on nothing else: neither the group's
    size nor the batch's changes it.

    Args:
      group_size: `G`, completions per prompt; estimators that compare them need at least 2.
      max_tokens: `T`, the longest completion, its end-of-sequence token included.
      eos_ids: tokens that end a completion; all of them, where a model has several.
      temperature: divides the logits, here and where the step scores the completions; above 0.
      top_k: keep the `top_k` most likely tokens (Fan et al. 2018, arXiv:1805.04833).
      top_p: keep the most likely tokens that together reach `top_p` (Holtzman et al. 2019, arXiv:1904.09751), always
        at least one.
      min_p: keep tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
      stop: `stop_strings(tokenizer, ("</answer>",))`: strings that end a completion, with the token in which one of
        them is completed; such a completion is not truncated.
      record_experts: of a mixture of experts, put those that predicted each token into `rollout.experts`, so that the
        scorer sends it to the same ones. `2 L k` bytes per token.

    Returns:
      A sampler. Its rollout's log-probs are those of the distribution that was drawn from, the truncated one under
      `top_k`, `top_p` or `min_p`, renormalised; a step scores the completions under the same truncation.

    Raises:
      ValueError: for a setting out of range.
    """
    return PolicySampler(
        group_size=group_size,
        max_tokens=max_tokens,
        eos_ids=tuple(eos_ids),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=stop,
        record_experts=record_experts,
    )


def continuous(*, slots: int, **settings: Any) -> PolicySampler:
    """Continuous batching: draws what `sampler` draws, `slots` completions at a time.

    When an eighth of the slots are free they are refilled from the queue of completions; once the queue is empty, the
    batch is halved as completions end. The noise of a token belongs to its completion, so that the number of slots
    changes neither tokens nor, except for rounding, log-probs.

    Faster where lengths differ much and the batch is larger than what the device decodes at once. Each slot holds a
    copy of its prompt's keys and values, which `sampler` stores once per group.

    Args:
      slots: completions decoded at a time.
      settings: as in `sampler`.

    Raises:
      ValueError: for a setting out of range.
    """
    return dataclasses.replace(sampler(**settings), slots=slots)


def greedy(*, max_tokens: int, eos_ids: Sequence[int], stop: StopStrings | None = None) -> PolicySampler:
    """A sampler of the one likeliest completion per prompt.

    Its own log-probs would all be 0; the rollout's are those of the distribution passed over, `softmax(logits)`.

    Args:
      max_tokens: `T`, the longest completion.
      eos_ids: tokens that end a completion.
      stop: as in `sampler`.

    Raises:
      ValueError: for a setting out of range.
    """
    return PolicySampler(group_size=1, max_tokens=max_tokens, eos_ids=tuple(eos_ids), stop=stop, greedy=True)
