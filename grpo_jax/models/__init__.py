"""The decoder behind the policy contract."""

from grpo_jax.models.config import DecoderConfig, from_hf_config
from grpo_jax.models.decoder import decoder
from grpo_jax.models.small import small_llama

__all__ = ["DecoderConfig", "decoder", "from_hf_config", "small_llama"]
