"""The gap between sampler and scorer of a small mixture of experts in bfloat16, without and with router replay.

    python -m benchmarks.router_replay

Both run the same code, in other shapes: a token at a time, and whole completions. What differs is rounding, and a
rounding may choose another expert.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import models, sampling, testing
from grpo_jax.scoring import score

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 32,
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True,
    "max_position_embeddings": 256, "initializer_range": 0.08,
}  # fmt: skip


def gaps(seed: int = 0) -> dict[str, float]:
    """Mean and largest difference of log-probs, in nats."""
    config = models.from_hf_config(testing.tiny_hf_config("qwen3_moe", **SIZES), dtype=jnp.bfloat16)
    policy = models.decoder(config)
    params = jax.jit(policy.init)(jax.random.key(seed))
    sampler = sampling.sampler(group_size=8, max_tokens=128, eos_ids=(), record_experts=True)
    prompts = testing.random_prompts(seed, 4, 16, SIZES["vocab_size"])
    rollout = sampler(policy, params, prompts, jax.random.key(seed))
    found: dict[str, float] = {}
    for name, scored in (("without replay", rollout._replace(experts=None)), ("with replay", rollout)):
        gap = np.abs(score(policy, params, scored).log_probs - rollout.log_probs)[rollout.mask]
        found |= {f"{name}, mean": float(gap.mean()), f"{name}, largest": float(gap.max())}
    return found


if __name__ == "__main__":
    for name, gap in gaps().items():
        print(f"{name:24} {gap:.2e}")
