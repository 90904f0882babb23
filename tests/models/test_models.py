"""The decoder computes what transformers computes.

tests/golden/models holds small checkpoints with the logits of transformers in torch, made by its make.py.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from grpo_jax import models, policies
from grpo_jax.models import attention, hf, rope
from grpo_jax.models.decoder import RMSNorm
from grpo_jax.models.experts import Experts
from grpo_jax.testing import tiny_hf_config, tiny_policy
from grpo_jax.types import Prompts

FOLDER = Path(__file__).parents[1] / "golden" / "models"
CASES = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())
TOLERANCE = 5e-5  # the largest difference met is 2.7e-5, of phi3; else 1.1e-5, of logits up to 6

# Most of the time here goes into compiling; without optimisation that takes a sixth of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Reference(NamedTuple):
    """See tests/golden/models/make.py."""

    prompts: np.ndarray  # [B, P]
    lengths: np.ndarray  # [B]
    completions: np.ndarray  # [B, G, T]
    logits: np.ndarray  # [B, G, T, V]


@functools.cache
def load(name):
    """Policy, params and reference; forward passes only, which need no rematerialisation."""
    reference = Reference(**safetensors.numpy.load_file(FOLDER / name / "reference.safetensors"))
    return *hf.load_pretrained(FOLDER / name, remat=False), reference


def read_tokens(prompts, lengths, completions):
    """The last prompt token and the completion without its last, and their positions `[B, G, T]`."""
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    tokens = jnp.concatenate(
        [jnp.broadcast_to(last[..., None], (*completions.shape[:2], 1)), completions[..., :-1]], -1
    )
    return tokens, jnp.broadcast_to(lengths[:, None, None] - 1 + jnp.arange(tokens.shape[-1]), tokens.shape)


@functools.partial(jit, static_argnums=0)
def at_once(policy, params, prompts, lengths, completions):
    """Logits `[B, G, T, V]` of all tokens, prompts and completions together, as in training."""
    read = read_tokens(prompts, lengths, completions)
    return policy.unembed(params, policies.forward(policy, params, Prompts(prompts, lengths), *read)[0])


@functools.partial(jit, static_argnums=0)
def token_by_token(policy, params, prompts, lengths, completions):
    """The same by prefill and one extend with the cache for each token, as in sampling."""
    B, G, T = completions.shape
    prompt_cache = policy.prefill(params, prompts, lengths)

    def step(cache, read):
        tokens, positions = read
        hidden, cache = policy.extend(params, tokens[..., None], positions[..., None], prompt_cache, cache)
        return cache, policy.unembed(params, hidden[:, :, 0])

    reads = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), read_tokens(prompts, lengths, completions))
    _, logits = jax.lax.scan(step, policy.init_cache(B, G, T), reads)
    return jnp.moveaxis(logits, 0, 2)


# They differ from others of their family in what is done to a token by itself, for which a cache makes no difference.
BY_ITSELF = {
    *("gemma2_bias", "gemma3_text_bfloat16", "llama_attention_bias", "llama_float16", "llama_linear", "llama_llama3"),
    *("llama_mlp_bias", "llama_tied", "mistral", "olmo2_bias", "qwen2_bfloat16", "qwen2_tied_window"),
    *("qwen2_yarn_mscale", "qwen3_bias", "qwen3_yarn", "qwen3_yarn_attention_factor"),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    check_logits(at_once, name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in BY_ITSELF else []) for name in CASES]
)
def test_logits_of_one_token_after_the_other_are_those_of_transformers(name):
    check_logits(token_by_token, name)


def check_logits(forward, name):
    policy, params, reference = load(name)
    actual = forward(policy, params, reference.prompts, reference.lengths, reference.completions)
    assert actual.dtype == jnp.float32
    print(f"{name}: largest difference {np.max(np.abs(actual - reference.logits)):.1e}")  # shown by pytest -rP
    np.testing.assert_allclose(actual, reference.logits, rtol=0, atol=TOLERANCE)


def without(module, name):
    """Params with a leaf of the attention or the MLP set to 0."""

    def edit(path, leaf):
        keys = [key.key for key in path]
        return jnp.zeros_like(leaf) if keys[-2:] == [module, name] else leaf

    return lambda params: jax.tree_util.tree_map_with_path(edit, params)


# option: (case, change of the config, change of the params)
OPTIONS = {
    "query bias": ("qwen2", {}, without("q_proj", "bias")),
    "value bias": ("qwen2", {}, without("v_proj", "bias")),
    "output bias": ("qwen3_bias", {}, without("o_proj", "bias")),
    "gate bias": ("llama_mlp_bias", {}, without("gate_proj", "bias")),
    "down bias": ("llama_mlp_bias", {}, without("down_proj", "bias")),
    "query norm": ("qwen3", {"qk_norm": None}, None),
    "epsilon of the norms": ("qwen3_bias", {"rms_norm_eps": 1e-6}, None),
    "window": ("mistral_window", {"windows": None}, None),
    "width of the window": ("qwen2_tied_window", {"windows": (5, 5)}, None),
    "layers with a window": ("qwen2_window_above", {"windows": (5, 5, 5)}, None),
    "order of layer types": ("qwen3_layer_types", {"windows": (None, 3)}, None),
    **{
        f"rotation of {case}": (case, {"rope": rope.from_parameters({"rope_theta": 100.0}, 8, 64)}, None)
        for case in ("llama_linear", "llama_llama3", "qwen3_yarn", "qwen3_yarn_attention_factor", "qwen2_yarn_mscale")
    },
    "norms after attention and MLP": ("olmo2", {"post_norm": False}, None),
    "norms after, beside those before": ("gemma2", {"post_norm": False}, None),
    "norms before, beside those after": ("gemma2", {"pre_norm": False}, None),
    "norm of the whole width": ("olmo2", {"qk_norm": None}, None),
    "output bias of OLMo 2": ("olmo2_bias", {}, without("o_proj", "bias")),
    "windows of OLMo 3": ("olmo3", {"windows": None}, None),
    "norms after, of OLMo 3": ("olmo3", {"post_norm": False}, None),
    "norm of the whole width, of OLMo 3": ("olmo3", {"qk_norm": None}, None),
    "YaRN of OLMo 3": ("olmo3_yarn", {"rope": rope.from_parameters({"rope_theta": 100.0}, 8, 64)}, None),
    "no YaRN in windows": ("olmo3_yarn", {"local_rope": None}, None),
    "1 + w": ("gemma2", {"norm_offset": 0.0}, None),
    "gelu": ("gemma2", {"activation": jax.nn.silu}, None),
    "embedding scale": ("gemma2", {"embedding_scale": 1.0}, None),
    "query scale": ("gemma2", {"query_scale": None}, None),
    "soft cap of the attention": ("gemma2", {"attention_soft_cap": None}, None),
    "soft cap of the logits": ("gemma2", {"logits_soft_cap": None}, None),
    "windows of Gemma 2": ("gemma2", {"windows": (None, 4)}, None),
    "bias of Gemma 2": ("gemma2_bias", {}, without("k_proj", "bias")),
    "query norm of Gemma 3": ("gemma3_text", {"qk_norm": None}, None),
    "local rotation": ("gemma3_text", {"local_rope": None}, None),
    "global rotation": ("gemma3_text", {"rope": rope.from_parameters({"rope_theta": 300.0}, 6, 64)}, None),
    "windows of Gemma 3": ("gemma3_text", {"windows": (4, 4, None)}, None),
    "soft cap of Gemma 3": ("gemma3_text", {"logits_soft_cap": None}, None),
    "norms after, of Gemma 3": ("gemma3_text", {"post_norm": False}, None),
    "norms before, of Gemma 3": ("gemma3_text", {"pre_norm": False}, None),
    "1 + w of Gemma 3": ("gemma3_text", {"norm_offset": 0.0}, None),
    "gelu of Gemma 3": ("gemma3_text", {"activation": jax.nn.silu}, None),
    "embedding scale of Gemma 3": ("gemma3_text", {"embedding_scale": 1.0}, None),
    "query scale of Gemma 3": ("gemma3_text", {"query_scale": None}, None),
    "layers of EXAONE 4 that do not rotate": ("exaone4", {"rotated": None}, None),
    "windows of EXAONE 4": ("exaone4", {"windows": None}, None),
    "query norm of EXAONE 4": ("exaone4", {"qk_norm": None}, None),
    "norms after, of EXAONE 4": ("exaone4", {"post_norm": False}, None),
    "rotation of EXAONE 4": ("exaone4", {"rope": rope.from_parameters({"rope_theta": 100.0}, 6, 64)}, None),
    "layers that do not rotate": ("smollm3", {"rotated": None}, None),
    "which layers rotate": ("smollm3_window", {"rotated": (True, False)}, None),
    "windows of SmolLM 3": ("smollm3_window", {"windows": None}, None),
    "embedding multiplier": ("granite", {"embedding_scale": 1.0}, None),
    "residual multiplier": ("granite", {"residual_scale": 1.0}, None),
    "attention multiplier": ("granite", {"query_scale": None}, None),
    "divisor of the logits": ("granite", {"logits_divisor": 1.0}, None),
    "window of Phi 3": ("phi3", {"windows": None}, None),
    "part of a head rotated": ("phi3_longrope", {"rope": rope.from_parameters({"rope_theta": 100.0}, 8, 64)}, None),
    "normalised weights of experts": ("qwen3_moe", {"experts": Experts(5, 2, 12, normalised=False)}, None),
    "shares of all experts": ("qwen3_moe_shares", {"experts": Experts(4, 3, 12, normalised=True)}, None),
    "normalised weights of Mixtral": ("mixtral", {"experts": Experts(4, 2, 24, normalised=False)}, None),
    "experts per token": ("mixtral", {"experts": Experts(4, 1, 24, normalised=True)}, None),
    "windows of experts' layers": ("qwen3_moe_shares", {"windows": None}, None),
    "query norm beside experts": ("qwen3_moe", {"qk_norm": None}, None),
    "window of Mixtral": ("mixtral", {"windows": None}, None),
    "clipped gate": ("gpt_oss", {"experts": Experts(4, 2, 24, normalised=True, bias=True)}, None),
    "normalised weights of gpt-oss": (
        "gpt_oss",
        {"experts": Experts(4, 2, 24, normalised=False, bias=True, clip=(1.3, 0.7))},
        None,
    ),
    "limit of the gate": ("gpt_oss", {"experts": Experts(4, 2, 24, normalised=True, bias=True, clip=(1.3, 7.0))}, None),
    "slope of the gate": ("gpt_oss", {"experts": Experts(4, 2, 24, normalised=True, bias=True, clip=(1.7, 0.7))}, None),
    "biases of experts": ("gpt_oss", {"experts": Experts(4, 2, 24, normalised=True, clip=(1.3, 0.7))}, None),
    "bias of the router": ("gpt_oss", {}, without("mlp", "router_bias")),
    "sinks": ("gpt_oss", {"attention_sinks": False}, None),
    "windows of gpt-oss": ("gpt_oss", {"windows": (None, 4)}, None),
    "rotation of gpt-oss": ("gpt_oss", {"rope": rope.from_parameters({"rope_theta": 100.0}, 8, 64)}, None),
    **{
        f"bias of {module} of {case}": (case, {}, without(module, "bias"))
        for case, modules in {
            "llama_attention_bias": ("q_proj", "o_proj"),
            "smollm3": ("v_proj", "o_proj", "gate_proj", "down_proj"),
            "granite": ("q_proj", "o_proj", "up_proj", "down_proj"),
            "olmo3_yarn": ("v_proj", "o_proj"),
            "gemma3_text_bfloat16": ("q_proj", "o_proj"),
            "qwen3_moe_shares": ("v_proj", "o_proj"),
            "gpt_oss": ("q_proj", "o_proj"),
        }.items()
        for module in modules
    },
    "LongRoPE": ("phi3_longrope", {"rope": rope.from_parameters({"rope_theta": 100.0}, 6, 64)}, None),
}


@pytest.mark.parametrize(
    ("name", "config", "edit"),
    [
        pytest.param(*option, id=name, marks=[pytest.mark.slow] if option[1] else [])  # a program of its own
        for name, option in OPTIONS.items()
    ],
)
def test_the_frozen_logits_depend_on_the_option(name, config, edit):
    """Without the option they are missed by far, so that the test above would see it missing.

    That is so as long as the files of logits stay, and need not be tried with each change of the decoder.
    """
    policy, params, reference = load(name)
    policy = models.decoder(dataclasses.replace(policy.config, **config))
    params = edit(params) if edit else params
    actual = at_once(policy, params, reference.prompts, reference.lengths, reference.completions)
    assert np.max(np.abs(actual - reference.logits)) > 400 * TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "gemma2"])
def test_norms_in_bfloat16_are_rounded_before_their_weights_or_after_them_as_the_family_does(name):
    policy, params, _ = load(name)
    c = dataclasses.replace(policy.config, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (7, c.hidden_size), jnp.bfloat16)
    x32, w = np.asarray(x, np.float32), np.asarray(params["norm"]["scale"])
    normed = (x32 / np.sqrt((x32 * x32).mean(-1, keepdims=True) + c.rms_norm_eps)).astype(np.float32)

    def half(x):
        return x.astype(jnp.bfloat16).astype(np.float32)

    expected = {"qwen3": half(w) * half(normed), "olmo2": w * normed, "gemma2": (1 + w) * normed}
    (actual,) = RMSNorm(c).apply({"params": params["norm"]}, (x,))
    assert actual.dtype == jnp.bfloat16
    for family, values in expected.items():
        same = np.mean(half(values) == np.asarray(actual, np.float32))
        assert (same > 0.98) == (family == name), (family, same)  # an inverse root may differ in its last bit


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "gemma2", "granite", "qwen3_moe", "gpt_oss"])
def test_weights_cast_for_sampling_compute_in_bfloat16_what_those_in_float32_do(name):
    policy, params = hf.load_pretrained(FOLDER / name, compute_dtype=jnp.bfloat16, remat=False)
    reference = load(name)[2]
    whole = at_once(policy, params, reference.prompts, reference.lengths, reference.completions)
    cast = at_once(policy, policy.cast(params), reference.prompts, reference.lengths, reference.completions)
    np.testing.assert_array_equal(cast, whole)


def test_rows_beyond_what_the_rotation_is_of_are_refused():
    """LongRoPE: transformers takes other frequencies for all of a batch's tokens once there are 41."""
    policy, params, _ = load("phi3_longrope")
    lengths = jnp.array([20])

    def forward(P, T):
        return at_once(policy, params, jnp.ones((1, P), jnp.int32), lengths, jnp.ones((1, 1, T), jnp.int32))

    assert forward(20, 20).shape == (1, 1, 20, 31)
    with pytest.raises(ValueError, match=r"41 positions of prompt and completion, .* beyond 40"):
        forward(20, 21)
    with pytest.raises(ValueError, match="42 positions"):
        forward(41, 1)
    with pytest.raises(ValueError, match="41 positions"):
        policy.prefill(params, jnp.ones((1, 41), jnp.int32), lengths)


@pytest.mark.parametrize("form", [attention.blockwise, attention.cudnn, attention.splash])
@pytest.mark.parametrize(
    ("name", "option"),
    [("gemma2", r"soft cap .* which this model has \(1.5\)"), ("gpt_oss", "sinks .* which this model has")],
)
def test_an_attention_without_soft_caps_or_sinks_says_what_to_take(name, option, form):
    policy, params, reference = load(name)
    policy = models.decoder(dataclasses.replace(policy.config, attention=form))
    with pytest.raises(ValueError, match=f"has no {option}: take attention=attention.auto"):
        policy.prefill(params, reference.prompts, reference.lengths)


def test_deepseeks_attn_factor_is_passed_over_with_a_warning():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    with pytest.warns(UserWarning, match="attn_factor is passed over"):
        config = models.from_hf_config(tiny_hf_config("llama", rope_parameters=yarn | {"attn_factor": 0.5}))
    assert config.rope == models.from_hf_config(tiny_hf_config("llama", rope_parameters=yarn)).rope


def test_a_prompt_of_one_token_has_an_empty_cache():
    policy, params, reference = load("qwen3")
    assert reference.lengths[0] == 1
    prompts, lengths = reference.prompts[:1, :1], reference.lengths[:1]
    assert policy.prefill(params, prompts, lengths).layers.keys.shape[2] == 0
    for forward in (at_once, token_by_token):
        actual = forward(policy, params, prompts, lengths, reference.completions[:1])
        np.testing.assert_allclose(actual, reference.logits[:1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("qwen2_bfloat16", jnp.bfloat16), ("llama_float16", jnp.float16), ("qwen3", jnp.bfloat16)],
    ids=["bfloat16", "float16", "float32 read as bfloat16"],
)
def test_checkpoints_run_in_half_precision(name, dtype):
    policy, params = hf.load_pretrained(FOLDER / name, dtype=dtype, remat=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    reference = load(name)[2]
    actual = at_once(policy, params, reference.prompts, reference.lengths, reference.completions)
    np.testing.assert_allclose(actual, reference.logits, rtol=0, atol=0.3 if dtype == jnp.bfloat16 else 0.04)


@pytest.mark.parametrize("window", [1, 4])
def test_a_window_hides_what_is_farther_away_also_across_the_end_of_the_prompt(window):
    """In one layer, token at position p sees positions p - window + 1 to p."""
    policy = tiny_policy("mistral", sliding_window=window, num_hidden_layers=1)
    params = jit(policy.init)(jax.random.key(0))
    P, T = 7, 5
    tokens = jax.random.randint(jax.random.key(1), (P + T,), 2, 61)
    lengths = jnp.array([P])

    def forward(tokens):
        return at_once(policy, params, tokens[None, :P], lengths, tokens[None, None, P:])[0, 0]

    before = forward(tokens)
    for changed in range(P + T - 1):  # logits[t] is of the token read at position P - 1 + t
        sees = np.any(forward(tokens.at[changed].set(0)) != before, axis=-1)
        distance = np.arange(P - 1, P + T - 1) - changed
        np.testing.assert_array_equal(sees, (distance >= 0) & (distance < window))


def test_completions_packed_in_a_row_are_computed_as_in_rows_of_their_own():
    policy, params, reference = load("qwen3_layer_types")
    prompts, lengths = reference.prompts[2:], reference.lengths[2:]
    tokens, positions = read_tokens(prompts, lengths, reference.completions[2:])
    T = tokens.shape[-1]
    segments = jnp.repeat(jnp.arange(2), T)[None, None]
    pack = lambda x: x.reshape(1, 1, 2 * T)  # noqa: E731

    @jit
    def forward(params, tokens, positions):
        prompt_cache = policy.prefill(params, prompts, lengths)
        return policy.unembed(params, policy.extend(params, tokens, positions, prompt_cache, segments=segments)[0])

    actual = forward(params, pack(tokens), pack(positions)).reshape(reference.logits[2:].shape)
    np.testing.assert_allclose(actual, reference.logits[2:], rtol=0, atol=TOLERANCE)


def test_the_gradient_through_the_shared_prompt_is_that_of_repeated_prompts():
    """With windows; without them: tests/test_scoring.py."""
    policy, params, reference = load("qwen2_window_above")
    policy = models.decoder(dataclasses.replace(policy.config, remat=True))
    weights = jax.random.normal(jax.random.key(0), reference.logits.shape)

    @jit
    def gradients(weights, *batch):
        return jax.grad(lambda params: jnp.mean(weights * at_once.__wrapped__(policy, params, *batch)))(params)

    prompts, lengths, completions = reference[:3]
    G = completions.shape[1]
    rows = lambda x: x.reshape(-1, 1, *x.shape[2:])  # noqa: E731
    shared = gradients(weights, prompts, lengths, completions)
    repeated = gradients(rows(weights), np.repeat(prompts, G, 0), np.repeat(lengths, G), rows(completions))
    assert all(np.max(np.abs(leaf)) > 1e-4 for leaf in jax.tree.leaves(shared))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), shared, repeated)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "olmo2"])
def test_prompts_and_completions_that_share_a_pass_are_as_in_passes_of_their_own(name):
    policy, params, reference = load(name)
    policy = models.decoder(dataclasses.replace(policy.config, remat=True))
    weights = jax.random.normal(jax.random.key(0), reference.logits.shape)

    @functools.partial(jit, static_argnums=0)
    def gradient(policy, params):
        def value(params):
            logits = at_once.__wrapped__(policy, params, *reference[:3])
            return jnp.mean(weights * logits), logits

        return jax.grad(value, has_aux=True)(params)

    shared, apart = gradient(policy, params), gradient(policy._replace(forward=None), params)
    for a, b in zip(*map(jax.tree.leaves, (shared, apart)), strict=True):
        assert np.max(np.abs(a)) > 1e-5
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.max(np.abs(b))))


# A field and value that the decoder must refuse: family, fields, and what the message holds.
REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ("llama", {"is_causal": False}, "is_causal = False"),
    ("llama", {"sliding_window": 16}, "sliding_window = 16"),
    ("llama", {"layer_types": ["full_attention"] * 2}, "layer_types = ['full_attention', 'full_attention']"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    ("llama", {"per_layer_config": {0: {"intermediate_size": 24}}}, "per_layer_config = {"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
    ("llama", {"chunk_size_feed_forward": 2}, "chunk_size_feed_forward = 2"),
    ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers = [1, 0]"),
    ("llama", {"embedding_multiplier": 12.0, "residual_multiplier": 0.2}, "embedding_multiplier = 12.0, residual_mul"),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads = 3"),
    ("llama", {"head_dim": 3}, "head_dim = 3"),
    ("mistral", {"attention_bias": True}, "attention_bias = True"),
    ("mistral", {"mlp_bias": True}, "mlp_bias = True"),
    ("mistral", {"sliding_window": 0}, "sliding_window = 0"),
    ("qwen2", {"attention_bias": True}, "attention_bias = True"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias = True"),
    ("qwen2", {"use_mrope": True}, "use_mrope = True"),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window = None"),
    ("qwen2", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias = True"),
    ("qwen3", {"num_experts": 8}, "num_experts = 8"),
    ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            }
        },
        "'longrope'",
    ),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("qwen2", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 2]}}, "mrope_section = [2, 2]"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "attention_factor": 2.0}},
        "attention_factor = 2.0",
    ),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3_text", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "has {'rope_type': 'linear', 'fac"),
    ("olmo3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "has {'rope_type': 'default', 'rop"),
    ("olmo2", {"sliding_window": 16}, "sliding_window = 16"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("granite", {"sliding_window": 16}, "sliding_window = 16"),
    ("exaone4", {"attention_bias": True}, "attention_bias = True"),
    ("smollm3", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 16}, "shared_expert_intermediate_size = 16"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
    ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1"),
    ("phi3", {"full_attn_mod": 2}, "full_attn_mod = 2"),
]


@pytest.mark.parametrize(("family", "fields", "named"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_the_decoder_does_not_do_is_refused_with_field_and_value(family, fields, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        models.from_hf_config(tiny_hf_config(family, **fields))


def test_no_rope_layers_may_be_of_more_layers_than_there_are():
    """As those of a model whose last layers were taken off; transformers reads the first."""
    assert models.from_hf_config(tiny_hf_config("smollm3", no_rope_layers=[0, 1, 0])).rotated == (False, True)


@pytest.mark.parametrize("config", [transformers.GemmaConfig, transformers.PhiConfig, transformers.Lfm2Config])
def test_other_families_are_refused_by_name(config):
    with pytest.raises(ValueError, match=f"model_type = '{config.model_type}' is not supported"):
        models.from_hf_config(config())


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"pretraining_tp": 2, "rope_interleaved": False, "is_llama_config": True}),  # Llama 2, SmolLM2
        ("llama", {"rope_scaling": None, "rope_theta": 1e5, "max_length": 4096, "temperature": 0.6, "top_p": 0.9}),
        ("qwen2", {"use_mrope": False, "sliding_window": 4096, "max_window_layers": 21, "torch_dtype": "bfloat16"}),
        ("qwen3", {"use_cache": False, "output_hidden_states": True, "id2label": {0: "a"}, "label2id": {"a": 0}}),
        ("mistral", {"auto_map": {"AutoModelForCausalLM": "x.y"}, "unsloth_version": "2026.1", "is_causal": True}),
    ],
    ids=str,
)
def test_fields_that_say_nothing_of_the_arithmetic_change_nothing(family, fields):
    def arithmetic(config):
        return dataclasses.replace(models.from_hf_config(config), hf_config="")

    theta = {"rope_parameters": {"rope_theta": fields["rope_theta"]}} if "rope_theta" in fields else {}
    assert arithmetic(tiny_hf_config(family, **fields)) == arithmetic(tiny_hf_config(family, **theta))


def test_settings_reach_the_config_and_an_equal_config_gives_the_same_policy():
    config = models.from_hf_config(tiny_hf_config(), dtype=jnp.bfloat16, param_dtype=jnp.float16, remat=False)
    assert (config.dtype, config.param_dtype, config.remat) == (jnp.bfloat16, jnp.float16, False)
    assert hash(config) == hash(dataclasses.replace(config))
    assert models.decoder(config) is models.decoder(dataclasses.replace(config))
