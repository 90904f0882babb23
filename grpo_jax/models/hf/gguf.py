"""GGUF, the file of llama.cpp, to a Hugging Face folder: weights, config, tokenizer and chat template.

Quantised weights become the floating-point numbers that they stand for. Whatever in the file is not known here is
refused by name: a layer or a rule of the tokenizer that is passed over gives a model that works, a little worse.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from jax.typing import DTypeLike

from grpo_jax.models.hf.folders import short, write_json
from grpo_jax.models.hf.replacing import replacing
from grpo_jax.models.hf.shards import Tensor, write_shard

_ARCHITECTURE = "llama"
# What llama.cpp calls the modules of a layer.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SIZES = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}
_NUMBERS = {"attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"}
_TOKENIZER = {
    *("model", "pre", "tokens", "token_type", "merges", "add_space_prefix", "add_bos_token", "add_eos_token"),
    *("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"),
}
_PRE_TOKENIZER = {"model": "gpt2", "pre": "smollm"}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of tokens


def convert_gguf(file: str | os.PathLike[str], path: str | os.PathLike[str], *, dtype: DTypeLike = np.float32) -> Path:
    """Writes a GGUF file as a folder that `load_pretrained` and transformers read.

    The folder appears whole or not at all, and one tensor at a time is in memory. Any quantisation that the package
    `gguf` reads will do: the weights are what it makes of them. Architectures: `llama`. Tokenizers: byte-level BPE
    with the rules of SmolLM, which takes each digit by itself.

    Args:
      file: the GGUF file.
      path: a new or empty folder, or one that `convert_gguf` or `save_pretrained` wrote.
      dtype: of the tensors that are written.

    Returns:
      The folder.

    Raises:
      ImportError: without the extra `gguf`.
      FileExistsError: if `path` holds what no export wrote.
      ValueError: for a file that is no GGUF or is cut short, and for what is not known here, by its name.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF needs the package gguf: pip install 'grpo-jax[gguf]'") from error
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is no whole GGUF file; was its download cut short? {error}") from error
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(facts, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    config.dtype = np.dtype(dtype).name
    counts = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    heads = {module: facts[f"{_ARCHITECTURE}.attention.{name}"] for module, name in counts.items()}

    def read(tensor: Any) -> np.ndarray:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        module = tensor.name.split(".")[-2]
        return (_pair_halves(array, heads[module]) if module in heads else array).astype(dtype)

    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    tensors = {
        _tensor_name(tensor.name): Tensor(shapes[tensor.name], np.dtype(dtype), functools.partial(read, tensor))
        for tensor in reader.tensors
    }
    tokenizer = _tokenizer(facts)
    path = Path(path).expanduser().resolve()
    with replacing(path) as folder:
        write_json(folder / "config.json", config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"]})
        write_shard(folder / "model.safetensors", tensors)
        tokenizer.save_pretrained(folder)
    return path


def _config(facts: Mapping[str, Any], tied: bool) -> transformers.LlamaConfig:
    """The config that the file's facts are; those that nothing is known of are refused."""
    if facts.get("general.architecture") != _ARCHITECTURE:
        raise ValueError(f"the architecture {facts.get('general.architecture')!r} is not known, only {_ARCHITECTURE!r}")
    prefix = f"{_ARCHITECTURE}."
    own = {name.removeprefix(prefix): value for name, value in facts.items() if name.startswith(prefix)}
    if unknown := sorted(own.keys() - _SIZES.keys() - _NUMBERS):
        named = ", ".join(f"{prefix}{name} = {short(own[name], 80)}" for name in unknown)
        raise ValueError(f"nothing is known here of {named}")
    if missing := sorted((_SIZES.keys() | _NUMBERS) - own.keys()):
        raise ValueError(f"the file does not say {', '.join(prefix + name for name in missing)}")
    fields: dict[str, Any] = {field: own[name] for name, field in _SIZES.items()}
    fields |= {f"{name}_token_id": facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config = transformers.LlamaConfig(
        **fields,
        # Written as float32: 1e-5 is 0.00000999999974 there.
        rms_norm_eps=float(str(np.float32(own["attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": float(own["rope.freq_base"])},
        tie_word_embeddings=tied,
        pad_token_id=facts.get("tokenizer.ggml.padding_token_id"),
    )
    if own["rope.dimension_count"] != config.head_dim:
        raise ValueError(
            f"{own['rope.dimension_count']} of the {config.head_dim} numbers of a head are rotated, not all"
        )
    return config


def _tensor_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    other = re.fullmatch(r"(\w+)\.weight", name)
    if layer and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.weight"
    if other and other[1] in _OTHER:
        return f"{_OTHER[other[1]]}.weight"
    raise ValueError(f"nothing is known here of the tensor {short(name)}")


def _pair_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection `[heads * head_dim, D]` in the order of transformers.

    llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + head_dim / 2.
    """
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(facts: Mapping[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer and its chat template."""
    prefix = "tokenizer.ggml."
    own = {name.removeprefix(prefix): value for name, value in facts.items() if name.startswith(prefix)}
    unknown = {name: own[name] for name in own.keys() - _TOKENIZER}
    unknown |= {name: own.get(name) for name in ("add_space_prefix", "add_bos_token", "add_eos_token") if own.get(name)}
    unknown |= {name: own.get(name) for name, value in _PRE_TOKENIZER.items() if own.get(name) != value}
    if unknown:
        met = ", ".join(f"{prefix}{name} = {short(value, 80)}" for name, value in sorted(unknown.items()))
        raise ValueError(f"nothing is known here of {met}, only of a tokenizer with {_PRE_TOKENIZER}")
    tokens, kinds = own["tokens"], own["token_type"]
    if strange := sorted({*kinds} - {_NORMAL, _CONTROL, _USER_DEFINED}):
        raise ValueError(f"nothing is known here of tokens of the kinds {strange}")
    merges = [(left, right) for left, right in (merge.split(" ") for merge in own["merges"])]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    added = [
        tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind != _NORMAL
    ]
    bpe.add_tokens(added)
    named = {name: own.get(f"{kind}_token_id") for name, kind in _SPECIAL.items()}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        clean_up_tokenization_spaces=False,
        model_max_length=facts[f"{_ARCHITECTURE}.context_length"],
        **{name: tokens[i] for name, i in named.items() if i is not None},
    )
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    return tokenizer
