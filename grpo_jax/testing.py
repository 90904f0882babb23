"""Tiny real models for tests, notebooks and smoke runs: CPU, seconds, no downloads."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from grpo_jax import models
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.types import Prompts


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
    return transformers.AutoConfig.for_model(family, **(sizes | fields))


def tiny_policy(
    family: str = "qwen3", *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, **fields: Any
) -> Policy:
    """A policy of `tiny_hf_config`."""
    return models.decoder(models.from_hf_config(tiny_hf_config(family, **fields), dtype=dtype, param_dtype=param_dtype))


# What a tokenizer of a few hundred tokens is trained on: the words of small tasks.
_CORPUS = (
    "What is 12 + 34? The answer is 46. What is 7 * 8 - 5? The answer is 51.",
    "Count down from 9 to 1, then write the letters of the word in reverse order.",
    "Using the numbers 3, 4 and 6, make an equation that equals 24. Show the reasoning step by step.",
    "<think> </think> <answer> </answer> system user assistant",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(vocab_size: int = 384) -> transformers.PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab_size` tokens, at least 259, trained here, with a chat template.

    Any text in Unicode NFC comes back as it was. As in many chat models `<|im_end|>`,
    which ends a turn, is the tokenizer's end-of-sequence token, and `<|endoftext|>`,
    which is 0, that of the config.
    """
    # Qwen's way of cutting text: transformers forces it on a qwen2 folder whatever its tokenizer.json says.
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        _CORPUS, vocab_size, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_checkpoint(
    path: str | os.PathLike[str], family: str = "qwen3", *, seed: int = 0, dtype: Any = jnp.float32, **fields: Any
) -> Path:
    """Writes a whole Hugging Face folder: a random model of `tiny_hf_config` and its tokenizer.

    Args:
      path: a new folder.
      family: of the model.
      seed: of the weights.
      dtype: of the weights.
      fields: replace fields of the config.

    Returns:
      The path.
    """
    tokenizer = tiny_tokenizer()
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    policy = tiny_policy(family, **{"vocab_size": len(tokenizer), "eos_token_id": end_of_text, **fields})
    params = jax.jit(policy.init)(jax.random.key(seed))
    hf.save_pretrained(policy, params, path, tokenizer=tokenizer, dtype=dtype)
    return Path(path)


def random_prompts(seed: int, B: int, P: int, vocab_size: int = 61, *, ragged: bool = True) -> Prompts:
    """Prompts of random tokens and, if ragged, of random lengths from 1 to `P`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, P + 1, B) if ragged else np.full(B, P)
    tokens = np.where(np.arange(P) < lengths[:, None], rng.integers(2, vocab_size, (B, P)), 0)
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32))
