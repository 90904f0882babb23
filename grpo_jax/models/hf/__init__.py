"""Hugging Face checkpoints in and out: safetensors <-> params, strict both ways.

Only safetensors is read: no pickle is opened and no code of a repository is run.

    reading      load_pretrained, load_reward_model
    adapters     load_adapters, save_adapters, adapter_ends: PEFT's folders
    writing      save_pretrained, into a folder that takes an earlier one's place whole (`replacing`)
    gguf         convert_gguf, a file of llama.cpp as such a folder
    tokenizers   load_tokenizer; eos_ids, completion_end: what ends a completion
    finite       what is refused before it is written
    layout       which tensors a parameter is made of
    shards       a safetensors file, written a tensor at a time
"""

from grpo_jax.models.hf.adapters import adapter_ends, load_adapters, save_adapters
from grpo_jax.models.hf.gguf import convert_gguf
from grpo_jax.models.hf.reading import load_pretrained, load_reward_model
from grpo_jax.models.hf.tokenizers import completion_end, eos_ids, load_tokenizer
from grpo_jax.models.hf.writing import save_pretrained

__all__ = [
    "adapter_ends",
    "completion_end",
    "convert_gguf",
    "eos_ids",
    "load_adapters",
    "load_pretrained",
    "load_reward_model",
    "load_tokenizer",
    "save_adapters",
    "save_pretrained",
]
