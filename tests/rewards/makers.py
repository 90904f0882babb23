"""All rewards on text, for the tests of all of them."""

from grpo_jax import rewards

MAKERS = [
    rewards.exact_answer,
    rewards.soft_format,
    rewards.strict_format,
    rewards.tag_count,
    rewards.reasoning_length,
    rewards.worked_steps,
    rewards.language_consistency,
    rewards.repetition_penalty,
    lambda: rewards.soft_overlong(16, 4),
    lambda: rewards.self_consistency(group_size=2),
    lambda: rewards.cosine_length(rewards.exact_answer(), rewards.cosine_scale(10)),
]
NAMES = [
    "exact_answer",
    "soft_format",
    "strict_format",
    "tag_count",
    "reasoning_length",
    "worked_steps",
    "language_consistency",
    "repetition_penalty",
    "soft_overlong",
    "self_consistency",
    "cosine_length",
]
