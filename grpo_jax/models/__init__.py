"""The decoder behind the policy contract."""

from grpo_jax.models.config import DecoderConfig, from_hf_config
from grpo_jax.models.decoder import decoder

__all__ = ["DecoderConfig", "decoder", "from_hf_config"]
