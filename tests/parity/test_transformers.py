"""The decoder beside transformers itself, in torch: fresh random models of every family and option."""

import dataclasses
import functools
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
import transformers  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from grpo_jax import sampling  # noqa: E402
from grpo_jax.models import hf, rope  # noqa: E402
from grpo_jax.types import Prompts  # noqa: E402

MAKE = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "models" / "make.py"), run_name="make")
CASES = MAKE["CASES"]
ONE_OF_EACH = [
    "qwen3",
    "olmo2",
    "olmo3_yarn",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "granite",
    "phi3_longrope",
    "exaone4",
]
WITH_EXPERTS = ["qwen3_moe", "mixtral", "gpt_oss"]
# Larger than the frozen ones: the cases replace heads, windows and the like.
SIZES = MAKE["SIZES"] | {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
P, T, G = 21, 12, 2
# Compiling takes most of the time, and without optimisation a sixth of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LENGTHS = np.array([1, 2, 9, 21], np.int32)


def random_model(case, seed, folder, **settings):
    """A model of transformers with random parameters, norms and biases too, as it reads itself from `folder`."""
    family, fields = CASES[case]
    fields = SIZES | fields
    for name in {"layer_types", "no_rope_layers"} & fields.keys():
        fields[name] = [*fields[name], fields[name][0]]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).to(config.dtype or torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.15
            parameter.copy_(noise + 1 if "norm" in name else noise)
    model.save_pretrained(folder)
    settings = {"dtype": torch.float32, "attn_implementation": "eager"} | settings
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def random_batch(seed):
    rng = np.random.default_rng(seed)
    prompts = np.where(np.arange(P) < LENGTHS[:, None], rng.integers(2, 97, (len(LENGTHS), P)), 0).astype(np.int32)
    return prompts, rng.integers(2, 97, (len(LENGTHS), G, T)).astype(np.int32)


def logits_in_torch(model, prompts, completions):
    """Each row alone, at once and without a cache."""
    logits = np.zeros((*completions.shape, 97), np.float32)
    with torch.no_grad():
        for b, g in np.ndindex(*completions.shape[:2]):
            row = np.concatenate([prompts[b, : LENGTHS[b]], completions[b, g]])
            logits[b, g] = model(torch.tensor(row)[None].long()).logits[0, LENGTHS[b] - 1 : -1].float().numpy()
    return logits


def read_tokens(prompts, completions):
    last = np.broadcast_to(prompts[np.arange(len(LENGTHS)), LENGTHS - 1, None, None], (len(LENGTHS), G, 1))
    positions = np.broadcast_to(LENGTHS[:, None, None] - 1 + np.arange(T), completions.shape)
    return np.concatenate([last, completions[..., :-1]], axis=-1), positions


def logits_at_once(policy, params, prompts, completions):
    @jit
    def forward(params):
        prompt_cache = policy.prefill(params, prompts, jnp.asarray(LENGTHS))
        return policy.unembed(params, policy.extend(params, *read_tokens(prompts, completions), prompt_cache)[0])

    return forward(params)


def logits_token_by_token(policy, params, prompts, completions):
    tokens, positions = read_tokens(prompts, completions)
    prompt_cache = jit(policy.prefill)(params, prompts, jnp.asarray(LENGTHS))
    cache = policy.init_cache(len(LENGTHS), G, T)

    @jit
    def step(params, tokens, positions, cache):
        hidden, cache = policy.extend(params, tokens, positions, prompt_cache, cache)
        return policy.unembed(params, hidden), cache

    logits = []
    for t in range(T):
        logit, cache = step(params, tokens[..., t : t + 1], positions[..., t : t + 1], cache)
        logits.append(logit)
    return jnp.concatenate(logits, axis=2)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree(case, tmp_path):
    seed = 1000 + list(CASES).index(case)
    prompts, completions = random_batch(seed)
    expected = logits_in_torch(random_model(case, seed, tmp_path), prompts, completions)
    policy, params = hf.load_pretrained(tmp_path)
    for forward in (logits_at_once, logits_token_by_token):
        actual = forward(policy, params, prompts, completions)
        difference = np.max(np.abs(actual - expected))
        print(f"{case} {forward.__name__}: {difference:.1e} of {np.max(np.abs(expected)):.1f}")
        assert difference < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_an_export_to_the_same_bits_and_logits(case, tmp_path):
    config = json.loads((Path(MAKE["FOLDER"]) / case / "config.json").read_text())
    dtype = config.get("dtype") or config["torch_dtype"]
    model = random_model(case, 2000, tmp_path / "original", dtype=getattr(torch, dtype))
    policy, params = hf.load_pretrained(tmp_path / "original", dtype=dtype)
    hf.save_pretrained(policy, params, tmp_path / "exported", max_shard_bytes=50_000)
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(exported) is type(model)
    original, state = model.state_dict(), exported.state_dict()
    assert original.keys() == state.keys()
    for name, tensor in original.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    tokens = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, exported.eval()(tokens).logits)


@pytest.mark.parametrize("case", ["llama_tied", "mistral_window", "qwen2_window_above", *ONE_OF_EACH, *WITH_EXPERTS])
def test_greedy_completions_are_those_of_generate(case, tmp_path):
    model = random_model(case, 3000, tmp_path)
    prompts, _ = random_batch(3000)
    policy, params = hf.load_pretrained(tmp_path)
    ends = [1, *range(50, 70)]  # several, so that some completions end early
    rollout = dataclasses.replace(sampling.sampler(group_size=1, max_tokens=T, eos_ids=ends), greedy=True)(
        policy, params, Prompts(jnp.asarray(prompts), jnp.asarray(LENGTHS)), jax.random.key(0)
    )
    for b, length in enumerate(LENGTHS):
        prompt = torch.tensor(prompts[b, :length]).long()[None]
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=T,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )[0, length:]
        np.testing.assert_array_equal(rollout.tokens[b, 0, : rollout.lengths[b, 0]], expected.numpy())


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama_tied", "mistral_window", "qwen2_window_above", *ONE_OF_EACH])
def test_half_precision_is_as_near_to_float32_as_that_of_torch(case, half, tmp_path):
    prompts, completions = random_batch(4000)
    exact = logits_in_torch(random_model(case, 4000, tmp_path), prompts, completions)
    in_torch = logits_in_torch(random_model(case, 4000, tmp_path, dtype=getattr(torch, half)), prompts, completions)
    policy, params = hf.load_pretrained(tmp_path, dtype=half)
    actual = logits_at_once(policy, params, prompts, completions)
    ours, theirs = (float(np.sqrt(np.mean((x - exact) ** 2))) for x in (actual, in_torch))
    print(f"{case}: root mean square {ours:.1e}, of torch {theirs:.1e}")
    assert ours < 1.2 * theirs


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_experts_in_half_precision_are_typically_as_near_to_float32_as_those_of_torch(case, half, tmp_path):
    """The median: where a rounding turns the choice of an expert, the logits are others altogether."""
    prompts, completions = random_batch(4000)
    exact = logits_in_torch(random_model(case, 4000, tmp_path), prompts, completions)
    # One expert after the other: torch's grouped products take widths of 16 bytes alone.
    settings = {"dtype": getattr(torch, half), "experts_implementation": "eager"}
    in_torch = logits_in_torch(random_model(case, 4000, tmp_path, **settings), prompts, completions)
    actual = logits_at_once(*hf.load_pretrained(tmp_path, dtype=half), prompts, completions)
    ours, theirs = (float(np.median(np.abs(x - exact))) for x in (actual, in_torch))
    print(f"{case}: median {ours:.1e}, of torch {theirs:.1e}")
    assert ours < 1.3 * theirs


ROPES = {
    "Llama 2": ({"rope_type": "default", "rope_theta": 1e4}, 128, 4096),
    "Qwen 3": ({"rope_type": "default", "rope_theta": 1e6}, 128, 40960),
    "deepseek-coder-6.7b-instruct": ({"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}, 128, 16384),
    "Llama 3.1": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        128,
        131072,
    ),
    "Llama 3.2": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        64,
        131072,
    ),
    "Qwen 2.5 with YaRN": (
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        128,
        131072,
    ),
    "YaRN without a factor": (
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": None, "original_max_position_embeddings": 4096},
        64,
        32768,
    ),
    "YaRN of DeepSeek": (
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        64,
        163840,
    ),
    "YaRN not rounded to pairs": (
        {
            "rope_type": "yarn",
            "rope_theta": 1.5e5,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
            "attention_factor": 1.25,
        },
        64,
        131072,
    ),
    "YaRN within one pair": (
        {
            "rope_type": "yarn",
            "rope_theta": 10.0,
            "factor": 2.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
        },
        4,
        16,
    ),
}


@pytest.mark.parametrize(("parameters", "head_dim", "longest"), ROPES.values(), ids=ROPES)
def test_rotation_frequencies_agree(parameters, head_dim, longest):
    config = transformers.LlamaConfig(
        rope_parameters=dict(parameters), head_dim=head_dim, max_position_embeddings=longest
    )
    ours = rope.from_parameters(config.rope_parameters, head_dim, longest)
    kind = parameters["rope_type"]
    compute = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    frequencies, scale = compute(config)
    np.testing.assert_allclose(ours.frequencies, frequencies.numpy(), rtol=3e-7)
    assert ours.scale == pytest.approx(scale, rel=1e-12)
    # Near the end of the context a last bit of a frequency is a part in a thousand of a turn.
    positions = torch.tensor([[0, 1, longest // 2, longest - 1]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    for mine, theirs in zip(rope.angles(ours, jnp.asarray(positions.numpy())), (cos, sin), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy()[..., : head_dim // 2], rtol=0, atol=2e-7 * longest)


def test_transformers_passes_over_deepseeks_attn_factor_as_is_done_here():
    given = ROPES["YaRN of DeepSeek"][0] | {"attn_factor": 0.5}
    config = transformers.LlamaConfig(rope_parameters=given, head_dim=64, max_position_embeddings=163840)
    assert config.rope_parameters["attn_factor"] == 0.5
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    with pytest.warns(UserWarning, match="attn_factor is passed over"):
        ours = rope.from_parameters(config.rope_parameters, 64, 163840)
    np.testing.assert_allclose(ours.frequencies, frequencies.numpy(), rtol=3e-7)
    assert ours.scale == pytest.approx(scale, rel=1e-12)


def test_of_a_tied_head_that_differs_transformers_makes_an_untied_one(tmp_path):
    """Why such a checkpoint is refused: transformers uses the head that the config says is not there."""
    model = random_model("llama_tied", 5000, tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read.lm_head.weight, state["lm_head.weight"])
    assert not torch.equal(read.lm_head.weight, read.model.embed_tokens.weight)
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs"):
        hf.load_pretrained(tmp_path)
