"""Prompts to rollouts.

samplers.py  sampler, continuous, greedy: made values, called `(policy, params, prompts, key) -> rollout`
batch.py     all completions of a batch decoded together
slots.py     continuous batching: slots that are refilled
drawing.py   logits to tokens
engines.py   rollouts of an inference engine
"""

from grpo_jax.sampling.engines import from_engine
from grpo_jax.sampling.samplers import PolicySampler, continuous, greedy, sampler

__all__ = ["PolicySampler", "continuous", "from_engine", "greedy", "sampler"]
