"""Zeros in the shape of rollouts, for programs that ask for the shapes of what the host samples."""

import dataclasses

import jax.numpy as jnp

from grpo_jax.policies import Policy
from grpo_jax.truncation import Truncation
from grpo_jax.types import Number, Params, PRNGKey, Prompts, Rollout, Turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankSampler:
    """Stands in for a sampler that goes through the host where only shapes are asked for, as `blank` of that one."""

    group_size: int
    max_tokens: int
    temperature: Number
    truncation: Truncation | None
    max_turns: int | None = None  # None where rollouts have no turns

    def __call__(self, policy: Policy, params: Params, prompts: Prompts, key: PRNGKey) -> Rollout:
        """A rollout without a token."""
        of_group = prompts.tokens.shape[0], self.group_size
        of_tokens = *of_group, self.max_tokens
        turns = None
        if self.max_turns is not None:
            of_turns = *of_group, self.max_turns
            turns = Turns(
                ends=jnp.zeros(of_turns, jnp.int32),
                rewards=jnp.zeros(of_turns, jnp.float32),
                mask=jnp.zeros(of_turns, bool),
                failed=jnp.zeros(of_group, bool),
            )
        return Rollout(
            prompts,
            tokens=jnp.zeros(of_tokens, jnp.int32),
            lengths=jnp.zeros(of_group, jnp.int32),
            mask=jnp.zeros(of_tokens, bool),
            log_probs=jnp.zeros(of_tokens, jnp.float32),
            truncated=jnp.zeros(of_group, bool),
            turns=turns,
        )
