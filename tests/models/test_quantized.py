"""Quantised kernels: their numbers by the tables in plain NumPy, and training over them."""

import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy

from grpo_jax import losses, models
from grpo_jax.freezing import named_leaves, partition
from grpo_jax.models import hf, lora, quantized
from grpo_jax.models.families import FAMILIES
from grpo_jax.run import checkpoint, memory
from grpo_jax.scoring import score
from grpo_jax.testing import random_prompts, tiny_checkpoint, tiny_hf_config, tiny_policy
from grpo_jax.train_step import make_learn
from grpo_jax.types import Experience, Rollout
from grpo_jax.updates import init_state

KINDS = ("nf4", "int4", "int8", "fp8")
OPTIMIZER = optax.sgd(0.1)
# The quantiles of a normal distribution of QLoRA (arXiv:2305.14314, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def kernel_of(inputs=128, outputs=6, seed=0):
    return np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)


def in_numpy(kernel, kind):
    """What the kernel becomes, by the definition: the nearest of the codes' values times the largest of the tile."""
    if kind == "fp8":
        scale = np.abs(kernel).max(0) / 448
        return (kernel / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    if kind == "int8":
        scale = np.abs(kernel).max(0) / 127.5  # of the 255 steps
        return np.clip(np.round(kernel / scale), -128, 127) * scale
    tiles = kernel.reshape(-1, 64, kernel.shape[1])
    largest = np.abs(tiles).max(1, keepdims=True)
    if kind == "int4":
        scale = largest / 7.5
        return (np.clip(np.round(tiles / scale), -8, 7) * scale).reshape(kernel.shape)
    table = np.array(NF4, np.float32)
    codes = np.argmin(np.abs(tiles[..., None] / largest[..., None] - table), axis=-1)
    return (table[codes] * largest).reshape(kernel.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_becomes_what_the_definition_says(kind):
    kernel = kernel_of()
    found = quantized.dequantize(quantized.quantize_kernel(jnp.asarray(kernel), kind))
    assert found.dtype == jnp.float32
    # Of whole numbers, the negative largest lies halfway between two codes, and rounding decides.
    largest = np.abs(kernel.reshape(-1, 64 if kind == "int4" else 128, 6)).max(1)
    halfway = kernel == -np.repeat(largest, len(kernel) // len(largest), axis=0) if "int" in kind else np.zeros(1, bool)
    np.testing.assert_allclose(np.where(halfway, 0, found), np.where(halfway, 0, in_numpy(kernel, kind)), rtol=1e-3)
    assert (
        np.max(np.abs(found - kernel)) < {"nf4": 0.16, "int4": 0.08, "int8": 0.005, "fp8": 0.04}[kind] * largest.max()
    )


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.09), ("int4", 0.10), ("int8", 0.01), ("fp8", 0.03)])
def test_the_error_of_gaussian_weights_is_that_of_the_table(kind, error):
    kernel = kernel_of(1024, 64)
    found = quantized.dequantize(quantized.quantize_kernel(jnp.asarray(kernel), kind))
    measured = np.sqrt(np.mean((found - kernel) ** 2))
    print(f"{kind}: {measured:.4f}")
    assert measured == pytest.approx(error, rel=0.3)


def test_a_width_that_64_does_not_divide_is_cut_into_the_largest_tiles_that_do():
    held = quantized.quantize_kernel(jnp.asarray(kernel_of(96)), "nf4")
    assert held.scale.shape == (2, 6)


# -------------------------------------------------------------------------------- training


def rollout_of(B=2, G=2, T=6):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    tokens = np.where(mask, rng.integers(2, 61, (B, G, T)), 0)
    rollout = Rollout(random_prompts(0, B, 5), tokens, lengths, mask, np.zeros((B, G, T)), lengths == T)
    return jax.tree.map(jnp.asarray, rollout)


def as_floats(params):
    return jax.tree.map(
        lambda x: jax.vmap(quantized.dequantize)(x) if quantized.is_quantized(x) else x,
        params,
        is_leaf=quantized.is_quantized,
    )


@functools.cache
def learner(remat):
    """A policy, its params, and the compiled learning of a state over codes or floats."""
    policy = models.decoder(models.from_hf_config(tiny_hf_config(), remat=remat))
    return policy, jax.jit(policy.init)(jax.random.key(0)), jax.jit(make_learn(policy, OPTIMIZER, loss=losses.sft()))


@pytest.mark.parametrize(
    ("kind", "remat"),
    [("nf4", True), ("int8", True), ("int4", True), ("fp8", True), ("nf4", False)],
)
@pytest.mark.slow
def test_adapters_over_codes_learn_as_over_the_floats_that_the_codes_stand_for(kind, remat):
    policy, params, learn = learner(remat)
    plain, _, learn_floats = learner(True)
    adapters, base = lora.adapt(policy, quantized.quantize(params, kind), rank=4, key=jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    state, floats = (init_state(adapters, OPTIMIZER, jax.random.key(2), frozen=x) for x in (base, as_floats(base)))
    experience = Experience(rollout_of())
    (ours, measured), (dense, expected) = learn(state, experience), learn_floats(floats, experience)
    np.testing.assert_allclose(measured["loss"].sum, expected["loss"].sum, rtol=1e-5)
    chex.assert_trees_all_close(ours.params, dense.params, rtol=1e-4, atol=1e-6)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(adapters), strict=True))
    _, after = learn(ours, experience)
    merged = score(plain, lora.merge(ours.params, ours.frozen), experience.rollout).log_probs
    np.testing.assert_allclose(after["loss"].sum, -jnp.mean(merged, where=experience.rollout.mask), rtol=1e-5)
    assert abs(after["loss"].sum - measured["loss"].sum) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_samplers_copy_leaves_codes_and_scales_alone(kind):
    policy = tiny_policy(dtype=jnp.bfloat16)
    params = quantized.quantize(jax.jit(policy.init)(jax.random.key(0)), kind)
    cast = policy.cast(params)
    kernels = [tree["layers"]["mlp"]["up_proj"]["kernel"] for tree in (cast, params)]
    chex.assert_trees_all_equal(*kernels)
    assert cast["layers"]["input_layernorm"]["scale"].dtype == jnp.bfloat16


def test_what_is_to_be_installed_is_said(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'grpo-jax\[quantize\]'"):
        quantized.check("nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_over_codes_is_saved_and_restored_to_the_bit(kind, tmp_path):
    policy = tiny_policy()
    params = quantized.quantize(jax.jit(policy.init)(jax.random.key(0)), kind)
    state = init_state(*over(policy, params), jax.random.key(0), frozen=params)._replace(step=jnp.int32(1))
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {}, initial=())
        restored, _ = checkpoint.restore(checkpoints, jax.eval_shape(lambda: state))
    for a, b in zip(jax.tree.leaves(restored.frozen), jax.tree.leaves(state.frozen), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())


def over(policy, params):
    adapters, _ = lora.adapt(policy, params, rank=2, key=jax.random.key(1))
    return adapters, optax.sgd(0.1)


# --------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny-qwen3", num_hidden_layers=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_quantised_while_it_is_read(folder, kind):
    _, params = hf.load_pretrained(folder, quantize=kind)
    expected = quantized.quantize(hf.load_pretrained(folder)[1], kind)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())
    assert memory.size(params["layers"]) < 0.6 * memory.size(
        hf.load_pretrained(folder, dtype=jnp.bfloat16)[1]["layers"]
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_kernels_of_every_familys_layers_and_nothing_else_become_codes_that_the_decoder_takes(family):
    policy = tiny_policy(family)
    tokens = jnp.ones((1, 1, 4), jnp.int32)

    def forward(key):
        whole = policy.init(key)
        codes = quantized.quantize(whole, "nf4")
        prompt_cache = policy.prefill(codes, tokens[:, 0], jnp.full(1, 4))
        hidden, _ = policy.extend(codes, tokens, 3 + jnp.arange(4)[None, None], prompt_cache)
        return whole, codes, policy.unembed(codes, hidden)

    whole, codes, logits = jax.eval_shape(forward, jax.random.key(0))
    assert logits.shape == (1, 1, 4, 61)
    kernels = {path for path, _ in named_leaves(whole) if path.endswith("/kernel")}
    coded = {path for path, _ in named_leaves(codes)} - {path for path, _ in named_leaves(whole)}
    assert coded == {f"{path}/{part}" for path in kernels for part in ("qvalue", "scale")}
    assert all(path.startswith("layers/") for path in kernels)


def test_while_a_checkpoint_is_read_no_more_than_one_layer_is_held_as_floats(folder, monkeypatch):
    largest = []
    fill = hf.reading._fill

    def watched(leaf, *arguments):
        largest.append((leaf.is_kernel and leaf.stacked, leaf.shape))
        return fill(leaf, *arguments)

    monkeypatch.setattr(hf.reading, "_fill", watched)
    hf.load_pretrained(folder, quantize="nf4")
    assert not [shape for is_stack, shape in largest if is_stack]
    assert (32, 48) in [shape for _, shape in largest]  # up_proj's, one layer after the other


def test_codes_without_adapters_are_refused_before_training(folder):
    _, params = hf.load_pretrained(folder, quantize="nf4")
    with pytest.raises(
        ValueError, match=r"cannot be trained, such as layers/mlp/down_proj/kernel/qvalue, of uint4: train"
    ):
        init_state(params, optax.sgd(0.1), jax.random.key(0))
    trained, frozen = partition(params, "kernel")  # norms and embeddings may be trained
    init_state(trained, optax.sgd(0.1), jax.random.key(0), frozen=frozen)


def test_an_unknown_kind_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="'q4_k' is no way to quantise; there are nf4, int4, int8, fp8"):
        hf.load_pretrained("nowhere", quantize="q4_k")


def test_codes_are_not_exported_without_being_merged(folder, tmp_path):
    policy, params = hf.load_pretrained(folder, quantize="int8")
    with pytest.raises(ValueError, match=r"no place for, such as layers/.*qvalue: pass lora\.merge"):
        hf.save_pretrained(policy, params, tmp_path / "out")


@pytest.mark.parametrize(
    ("suffix", "method", "named"),
    [
        ("-bnb-4bit", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, True),
        ("-unsloth-bnb-4bit", {"quant_method": "bitsandbytes", "load_in_4bit": True}, True),
        ("-GPTQ-Int4", {"quant_method": "gptq", "bits": 4}, True),
        ("-AWQ", {"quant_method": "awq", "bits": 4}, True),
        ("-quantized.w8a8", {"quant_method": "compressed-tensors"}, True),
        ("-FP8-block", {"quant_method": "fp8", "weight_block_size": [128, 128]}, True),
        ("", {"quant_method": "awq", "bits": 4}, False),
    ],
)
def test_a_checkpoint_that_is_quantised_already_is_refused_with_the_name_of_what_to_load(
    folder, tmp_path, suffix, method, named
):
    other = tmp_path / "in_int8_and_others" / f"Tiny-7B{suffix}"
    other.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": method}
    (other / "config.json").write_text(json.dumps(config))
    of_name = r" \(by its name, .*/in_int8_and_others/Tiny-7B\)" if named else ""
    with pytest.raises(
        ValueError, match=f"quantised already, by {method['quant_method']}.*made of{of_name}, with quant"
    ):
        hf.load_pretrained(other)


@pytest.mark.parametrize("code", ["qweight", "weight_packed", "weight_scale_inv", "SCB"])
def test_codes_of_which_no_config_tells_are_refused_as_those_of_which_one_does(folder, tmp_path, code):
    """Older tools note the method in a file of their own, such as quantize_config.json."""
    other = shutil.copytree(folder, tmp_path / "Tiny-7B-GPTQ")
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors |= {f"model.layers.0.mlp.up_proj.{code}": np.zeros(4, np.int32)}
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    with pytest.raises(ValueError, match=rf"quantised already, by what made .*up_proj\.{code}, .*name, .*/Tiny-7B\)"):
        hf.load_pretrained(other)
