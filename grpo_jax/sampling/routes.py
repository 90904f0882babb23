"""What a sampler keeps of a mixture of experts: which of them predicted each token."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from grpo_jax.policies import Cache, Policy, PromptCache
from grpo_jax.types import Array, Params

if TYPE_CHECKING:
    from grpo_jax.sampling.samplers import PolicySampler


def extend(
    policy: Policy, sampler: "PolicySampler", params: Params, tokens: Array, positions: Array,
    prompt_cache: PromptCache, cache: Cache, **options: Any,
) -> tuple[Array, Cache, Array | None]:  # fmt: skip
    """`policy.extend`, and the experts `[B, G, S, L, k]` if the sampler records them."""
    if not sampler.record_experts:
        return *policy.extend(params, tokens, positions, prompt_cache, cache, **options), None
    if policy.extend_routed is None:
        raise ValueError("record_experts=True is for a mixture of experts, and this policy has none: leave it out")
    hidden, cache, routes = policy.extend_routed(params, tokens, positions, prompt_cache, cache, **options)
    return hidden, cache, routes.experts


def start(
    policy: Policy, sampler: "PolicySampler", params: Params, prompt_cache: PromptCache, B: int, shape: tuple[int, ...]
) -> Array | None:
    """An empty record `[*shape, L, k]` of completions of `B` prompts, or None."""
    if not sampler.record_experts:
        return None

    def of_one_token(params: Params, prompt_cache: PromptCache) -> Array | None:
        nothing = jnp.zeros((B, 1, 1), jnp.int32)
        return extend(policy, sampler, params, nothing, nothing, prompt_cache, policy.init_cache(B, 1, 1))[2]

    form = jax.eval_shape(of_one_token, params, prompt_cache)
    assert form is not None
    return jnp.zeros((*shape, *form.shape[3:]), form.dtype)
