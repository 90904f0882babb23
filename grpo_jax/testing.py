"""Tiny real models for tests, notebooks and smoke runs: CPU, seconds, no downloads."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers

from grpo_jax import models
from grpo_jax.policies import Policy
from grpo_jax.types import Prompts

_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def tiny_hf_config(family: str = "qwen3", **fields: Any) -> transformers.PretrainedConfig:
    """A Hugging Face config of two narrow layers; `fields` replace its fields."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # wide, so that random logits differ
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if family == "qwen2":
        del sizes["head_dim"]
    if family == "mistral":
        sizes["sliding_window"] = None
    return _CONFIGS[family](**(sizes | fields))


def tiny_policy(family: str = "qwen3", *, dtype: Any = jnp.float32, **fields: Any) -> Policy:
    """A policy of `tiny_hf_config`."""
    return models.decoder(models.from_hf_config(tiny_hf_config(family, **fields), dtype=dtype))


def random_prompts(seed: int, B: int, P: int, vocab_size: int = 61, *, ragged: bool = True) -> Prompts:
    """Prompts of random tokens and, if ragged, of random lengths from 1 to `P`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, P + 1, B) if ragged else np.full(B, P)
    tokens = np.where(np.arange(P) < lengths[:, None], rng.integers(2, vocab_size, (B, P)), 0)
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32))
