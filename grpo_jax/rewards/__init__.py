"""Verifiers: on tokens, inside the program (`traced`), and on text, on the host (`host`)."""

from grpo_jax.rewards.host import HostReward, callback, host, name_of
from grpo_jax.rewards.tokens import TokenReward, exact_answer, tag_format, traced

__all__ = ["HostReward", "TokenReward", "callback", "exact_answer", "host", "name_of", "tag_format", "traced"]
