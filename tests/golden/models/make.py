"""Makes the frozen checkpoints and logits in this folder, by transformers in torch on CPU in float32.

    python tests/golden/models/make.py [case ...]       # needs the extra `parity`; a minute

Each case is a folder: a checkpoint (config.json, safetensors) as `save_pretrained` of
transformers writes it, and reference.safetensors with

    prompts [B, P] int32, right-padded with 0 · lengths [B] int32
    completions [B, G, T] int32 · logits [B, G, T, V] float32, of completion token t
    given the prompt and the tokens before it, each row run alone and without a cache

All parameters are random, also norms and biases, so that leaving one out shows.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

FOLDER = Path(__file__).parent
SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name: (family, fields of its config)
CASES = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_multi_head": ("llama", {"num_key_value_heads": 4}),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1}),
    "llama_head_dim": ("llama", {"head_dim": 6}),
    "llama_attention_bias": ("llama", {"attention_bias": True}),
    "llama_mlp_bias": ("llama", {"mlp_bias": True}),
    "llama_linear": (
        "llama",
        {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama_llama3": ("llama", {"head_dim": 8, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral_window": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied_window": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "qwen2_window_above": (
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
    "qwen3_bias": ("qwen3", {"head_dim": 4, "attention_bias": True, "rms_norm_eps": 1e-2}),
    "qwen3_layer_types": (
        "qwen3",
        {
            "head_dim": 4,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3_yarn": ("qwen3", {"head_dim": 8, "rope_parameters": YARN}),
    "qwen3_yarn_attention_factor": (
        "qwen3",
        {"head_dim": 8, "rope_parameters": YARN | {"attention_factor": 1.5, "beta_fast": 1.0, "beta_slow": 0.1}},
    ),
    "qwen2_yarn_mscale": (
        "qwen2",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            # Slow enough waves that the blend begins and ends between pairs.
            "rope_parameters": YARN
            | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 1.0, "beta_slow": 0.1},
        },
    ),
    "qwen2_bfloat16": ("qwen2", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    "llama_float16": ("llama", {"dtype": "float16"}),
    "olmo2": ("olmo2", {}),
    "olmo2_bias": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "olmo3": ("olmo3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
    "olmo3_yarn": (
        "olmo3",
        {
            "num_attention_heads": 2,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma2": (
        "gemma2",
        # Logits are a few, so that small caps act.
        {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 1.5}
        | {"final_logit_softcapping": 3.0, "rms_norm_eps": 1e-2},
    ),
    "gemma2_bias": ("gemma2", {"head_dim": 4, "attention_bias": True, "attn_logit_softcapping": None}),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "head_dim": 6,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 9,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}),
    "smollm3_window": (
        "smollm3",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": False},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.9,
            "logits_scaling": 2.5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text_bfloat16": (
        "gemma3_text",
        {"head_dim": 4, "sliding_window": 4, "attention_bias": True, "dtype": "bfloat16"},
    ),
    "phi3": ("phi3", {"sliding_window": 4}),
    "phi3_longrope": (
        "phi3",
        {
            "hidden_size": 32,
            "original_max_position_embeddings": 40,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 3.0],
                "long_factor": [2.0, 4.0, 8.0],
            },
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 6,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_shares": (
        "qwen3_moe",
        {
            **{"head_dim": 4, "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
            **{"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 4, "attention_bias": True},
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "gpt_oss": (
        "gpt_oss",
        {
            **{"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
            **{"swiglu_limit": 0.7, "swiglu_alpha": 1.3},
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 1.0, "beta_slow": 0.1},
        },
    ),
    "exaone4": (
        "exaone4",
        {"head_dim": 6, "sliding_window": 4, "sliding_window_pattern": 2, "rope_parameters": LLAMA3},
    ),
}


def make(name: str, family: str, fields: dict, seed: int) -> None:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **(SIZES | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).to(config.dtype or torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.3
            parameter.copy_(noise + 1 if "norm" in parameter_name else noise)
    model.save_pretrained(folder, max_shard_size="6KB" if name == "llama" else "50GB")
    (folder / "generation_config.json").unlink()
    if name == "llama_linear":  # spelled as on the Hub before transformers 5
        written = json.loads((folder / "config.json").read_text())
        rope = written.pop("rope_parameters")
        written |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "linear", "factor": rope["factor"]}}
        written["torch_dtype"] = written.pop("dtype")
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")

    # Read again: a model cast down and up has rounded its rotation too.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rng = np.random.default_rng(seed)
    lengths = np.array([1, 6, 13], np.int32)
    B, G, P, T, V = 3, 2, 13, 8, config.vocab_size
    prompts = np.where(np.arange(P) < lengths[:, None], rng.integers(2, V, (B, P)), 0).astype(np.int32)
    completions = rng.integers(2, V, (B, G, T)).astype(np.int32)
    logits = np.zeros((B, G, T, V), np.float32)
    with torch.no_grad():
        for b, g in np.ndindex(B, G):
            row = np.concatenate([prompts[b, : lengths[b]], completions[b, g]])
            logits[b, g] = model(torch.tensor(row)[None].long()).logits[0, lengths[b] - 1 : -1].numpy()
    safetensors.numpy.save_file(
        {"prompts": prompts, "lengths": lengths, "completions": completions, "logits": logits},
        folder / "reference.safetensors",
    )


if __name__ == "__main__":
    wanted = sys.argv[1:] or [*CASES]
    for seed, (name, (family, fields)) in enumerate(CASES.items()):
        if name in wanted:
            make(name, family, fields, seed)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    file = FOLDER / "versions.json"
    held = {} if wanted == [*CASES] else json.loads(file.read_text())
    file.write_text(json.dumps(held | dict.fromkeys(wanted, versions), indent=2, sort_keys=True) + "\n")
