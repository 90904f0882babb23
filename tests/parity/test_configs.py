"""Configurations of published checkpoints, shrunk, computed beside transformers; see tests/models/test_configs.py."""

import functools
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from grpo_jax.models import hf

torch = pytest.importorskip("torch")

FOUND = runpy.run_path(str(Path(__file__).parents[1] / "models" / "test_configs.py"), run_name="configs")
P, T = 9, 8
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shrunk(fields):
    """The same network with small sizes: patterns of layers, rotations, multipliers and switches are kept."""
    heads, layers = 4, min(fields["num_hidden_layers"], 7 if "gemma3" in fields["model_type"] else 4)
    ratio = fields["num_attention_heads"] // fields["num_key_value_heads"]
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // ratio),
    }
    smaller = {
        "head_dim": 12,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "max_window_layers": layers,
    }
    sizes |= {name: size for name, size in smaller.items() if name in fields}
    sizes |= {name: fields[name][:layers] for name in ("layer_types", "no_rope_layers") if name in fields}
    if fields.get("sliding_window"):
        sizes["sliding_window"] = 5
    scaling = fields.get("rope_scaling") or {}
    if "long_factor" in scaling:  # a factor for each pair that is rotated, of a head 8 wide
        pairs = int(8 * fields.get("partial_rotary_factor", 1)) // 2
        every = {name: scaling[name][:: len(scaling[name]) // pairs] for name in ("short_factor", "long_factor")}
        sizes["rope_scaling"] = scaling | every
    fields = {name: value for name, value in fields.items() if name != "quantization_config"}  # of the files
    return fields | sizes | {"torch_dtype": "float32", "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}


def one_of_equals():
    """Checkpoints whose shrunk configurations differ: sizes of one family are often one network."""
    fields_of = {
        name: json.loads((FOUND["FOLDER"] / f"{name}.json").read_text())
        for name in FOUND["READ"]
        if name not in FOUND["SEE_IMAGES"]
    }
    return sorted({json.dumps(shrunk(fields), sort_keys=True): name for name, fields in fields_of.items()}.values())


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)[None].long()).logits[0].numpy()


@pytest.mark.parametrize("name", one_of_equals())
def test_a_published_configuration_computes_what_transformers_does_and_is_exported(name, tmp_path):
    fields = shrunk(json.loads((FOUND["FOLDER"] / f"{name}.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.15
            parameter.copy_(noise + 1 if "norm" in parameter_name else noise)
    model.save_pretrained(tmp_path / "random")
    (tmp_path / "random" / "config.json").write_text(json.dumps(fields))  # as it is published
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "random", **settings).eval()
    policy, params = hf.load_pretrained(tmp_path / "random", remat=False)
    rng = np.random.default_rng(0)
    prompt, completion = rng.integers(2, 61, (1, P)), rng.integers(2, 61, (1, 1, T))
    tokens = np.concatenate([prompt[0], completion[0, 0]])

    @jit
    def forward(params):
        prompt_cache = policy.prefill(params, jnp.asarray(prompt), jnp.array([P]))
        read = jnp.concatenate([prompt[:, None, -1:], completion[..., :-1]], -1)
        hidden, _ = policy.extend(params, read, P - 1 + jnp.arange(T)[None, None], prompt_cache)
        return policy.unembed(params, hidden)[0, 0]

    expected = logits_of(model, tokens)[P - 1 : -1]
    difference = np.max(np.abs(forward(params) - expected))
    print(f"{name}: {difference:.1e} of {np.max(np.abs(expected)):.1f}")
    assert difference < 5e-5

    hf.save_pretrained(policy, params, tmp_path / "exported")
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", output_loading_info=True, **settings
    )
    assert not any(info.values()), info
    np.testing.assert_array_equal(logits_of(exported.eval(), tokens), logits_of(model, tokens))
