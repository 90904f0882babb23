"""Small Llamas to be trained from nothing, for experiments on a CPU."""

from typing import Any

import transformers

from grpo_jax.models.config import from_hf_config
from grpo_jax.models.decoder import decoder
from grpo_jax.policies import Policy


def small_llama(vocab_size: int, *, width: int, eos_id: int | None = None, **fields: Any) -> Policy:
    """A Llama of two layers with an MLP of three times its width: 0.1 M parameters at a width of 64, 0.4 M at 128.

    Args:
      vocab_size: `V`.
      width: `D`, a multiple of 4 heads.
      eos_id: the end-of-sequence token, which an export names; the sampler is told by itself.
      fields: of `transformers.LlamaConfig`, in place of these.
    """
    sizes = {
        "intermediate_size": 3 * width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": None,
    }  # fmt: skip
    config = transformers.LlamaConfig(vocab_size=vocab_size, hidden_size=width, eos_token_id=eos_id, **(sizes | fields))
    return decoder(from_hf_config(config))
