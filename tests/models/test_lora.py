"""Adapters against the dense model that they are merged into."""

import dataclasses
import functools
import json
import math
import operator
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from grpo_jax import losses, models, packing, processes, sampling, testing
from grpo_jax.freezing import bind
from grpo_jax.models import attention, hf, lora, quantized
from grpo_jax.models.config import from_hf_config
from grpo_jax.models.settings import WeightSettings
from grpo_jax.policies import from_logits_fn
from grpo_jax.run import memory
from grpo_jax.scoring import score
from grpo_jax.testing import random_prompts, tiny_hf_config, tiny_policy
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Experience, Rollout
from grpo_jax.updates import init_state

SGD = optax.sgd(0.1)


@functools.cache
def base(family="qwen3", dtype=jnp.float32, **changes):
    policy = tiny_policy(family, dtype=dtype, **changes)
    return policy, jax.jit(policy.init)(jax.random.key(0))


@jax.jit
def moved(adapters, key):
    noise = iter(jax.random.split(key, 99))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), adapters)


def random_adapters(policy, params, seed=1, **settings):
    """Adapters in the middle of a run: `lora_b` is not 0."""
    adapters, frozen = lora.adapt(policy, params, key=jax.random.key(seed), **{"rank": 4} | settings)
    return moved(adapters, jax.random.key(seed + 1)), frozen


def rollout_of(seed=0, B=2, G=3, T=6):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    tokens = np.where(mask, rng.integers(2, 61, (B, G, T)), 0)
    rollout = Rollout(random_prompts(seed, B, 5), tokens, lengths, mask, np.zeros((B, G, T)), lengths == T)
    return jax.tree.map(jnp.asarray, rollout)


def last_even(rollout):
    even = jnp.sum(rollout.mask & (rollout.tokens % 2 == 0), axis=-1) / jnp.maximum(rollout.lengths, 1)
    return even[..., None], jnp.ones((*even.shape, 1), bool)


# ------------------------------------------------------------------- what the network computes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_run_begins_with_the_outputs_of_the_base_bit_for_bit(dtype):
    policy, params = base("qwen2", dtype)  # with biases
    adapters, frozen = lora.adapt(policy, params, key=jax.random.key(1))
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    before, after = (score(policy, p, rollout_of()).log_probs for p in (params, bind(adapters, frozen)))
    chex.assert_trees_all_equal(before, after)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "qwen3"])
def test_log_probs_and_gradients_are_those_of_the_merged_model(family):
    """By the chain rule `dL/da = scale * dL/dW @ b.T` and `dL/db = scale * a.T @ dL/dW`, W the merged kernel."""
    policy, params = base(family, attention_bias=family == "qwen3")  # with norms and biases of heads, or without
    adapters, frozen = random_adapters(policy, params, alpha=6.0)
    merged = lora.merge(adapters, frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)

    def loss(params):
        return jnp.sum(score(policy, params, rollout_of()).log_probs)

    ours, expected = (jax.jit(jax.value_and_grad(f)) for f in (lambda x, y: loss(bind(x, y)), loss))
    value, grads = ours(adapters, frozen)
    of_merged, dense = expected(merged)
    np.testing.assert_allclose(value, of_merged, rtol=1e-5)
    for path, module in lora.linear_layers(policy, bind(adapters, frozen)):
        d_kernel, found = (functools.reduce(operator.getitem, path, tree) for tree in (dense, grads))
        a, b, dW = (np.asarray(x, np.float64) for x in (module[lora.A], module[lora.B], d_kernel["kernel"]))
        scale = 6.0 / 4
        np.testing.assert_allclose(found[lora.A], scale * dW @ b.swapaxes(1, 2), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found[lora.B], scale * a.swapaxes(1, 2) @ dW, rtol=1e-3, atol=1e-4)


def test_a_merged_kernel_is_the_sum_in_numpy():
    policy, params = base()
    adapters, frozen = random_adapters(policy, params, rank={"down_proj": 3}, alpha=12.0)
    module = adapters["layers"]["mlp"]["down_proj"]
    kernel = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"], np.float64)
    expected = kernel + 12.0 / 3 * np.asarray(module[lora.A], np.float64) @ np.asarray(module[lora.B], np.float64)
    merged = lora.merge(adapters, frozen)
    np.testing.assert_allclose(merged["layers"]["mlp"]["down_proj"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert merged["layers"]["mlp"]["up_proj"]["kernel"] is params["layers"]["mlp"]["up_proj"]["kernel"]


def test_an_export_is_merged_a_layer_at_a_time_and_codes_without_adapters_become_floats(tmp_path, monkeypatch):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    policy, params = hf.load_pretrained(testing.tiny_checkpoint(tmp_path / "base", "qwen3_moe", **experts))
    codes = quantized.quantize(params, "nf4")
    adapters, frozen = random_adapters(policy, codes, rank={"q_proj": 4, "experts_up": 2}, alpha=8.0)
    monkeypatch.setattr(lora, "_merged", lambda *_: pytest.fail("all layers were merged together"))
    hf.save_pretrained(policy, lora.merge_later(adapters, frozen), tmp_path / "merged")
    read = hf.load_pretrained(tmp_path / "merged")[1]["layers"]
    of_codes, trained = codes["layers"], adapters["layers"]
    for part, name, r in (("self_attn", "q_proj", 4), ("mlp", "experts_up", 2), ("mlp", "experts_down", None)):
        held = of_codes[part][name]["kernel"]
        expected = np.stack([quantized.dequantize(jax.tree.map(operator.itemgetter(i), held)) for i in range(2)])
        if r is not None:
            a, b = (np.asarray(trained[part][name][x], np.float64) for x in (lora.A, lora.B))
            expected = expected + 8 / r * a @ b
        np.testing.assert_allclose(read[part][name]["kernel"], expected, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, lora.merge(adapters, frozen)["layers"], read)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_what_rounding_takes_of_an_update_is_told(size):
    """Of weights that bfloat16 holds exactly, all of an update below half of their last bit."""
    policy, params = base(dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapters, frozen = random_adapters(policy, params, rank={"up_proj": 4}, alpha=4.0)
    adapters["layers"]["mlp"]["up_proj"][lora.B] *= size
    a, b = (np.asarray(adapters["layers"]["mlp"]["up_proj"][x], np.float64) for x in (lora.A, lora.B))
    whole = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float64) + a @ b
    lost = np.linalg.norm(whole.astype(jnp.bfloat16).astype(np.float64) - whole) / np.linalg.norm(a @ b)
    print(f"{size}: {lost:.3f}")
    assert lora.rounded_off(adapters, frozen) == pytest.approx(lost, rel=0.02)
    assert lora.rounded_off(adapters, frozen, dtype=jnp.float32) < 0.1


def test_merged_adapters_are_written_in_the_dtype_asked_for_and_what_rounding_takes_is_told(tmp_path):
    policy, params = base()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapters, frozen = random_adapters(policy, half, rank={"up_proj": 4})
    adapters["layers"]["mlp"]["up_proj"][lora.B] *= 1e-5
    state = init_state(adapters, SGD, jax.random.key(0), frozen=frozen)
    with pytest.warns(
        UserWarning, match=r"rounding takes \d+% in .*half: take --export-dtype float32, or --export ada"
    ):
        WeightSettings(lora_rank=4).save(policy, state, tmp_path / "half", base_model="base")
    WeightSettings(lora_rank=4, export_dtype="float32").save(policy, state, tmp_path / "whole", base_model="base")
    whole = hf.load_pretrained(tmp_path / "whole")[1]
    found = hf.load_pretrained(tmp_path / "half", dtype=jnp.bfloat16)[1]["layers"]["mlp"]["up_proj"]["kernel"]
    assert np.mean(found == half["layers"]["mlp"]["up_proj"]["kernel"]) > 0.9
    chex.assert_trees_all_equal(
        whole, jax.tree.map(lambda x: x.astype(jnp.float32), lora.merge(adapters, frozen, dtype=jnp.float32))
    )
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(ValueError, match="--export-dtype float16 is of whole models"):
        WeightSettings(lora_rank=4, export="adapters", export_dtype="float16")


@pytest.mark.parametrize("slots", [None, 3], ids=["together", "in slots"])
def test_sampled_log_probs_are_those_scored(slots):
    policy, params = base()
    whole = bind(*random_adapters(policy, params))
    sampler = sampling.sampler(group_size=4, max_tokens=12, eos_ids=(1,))
    sampler = dataclasses.replace(sampler, slots=slots)
    rollout = sampler(policy, whole, random_prompts(3, 3, 6), jax.random.key(5))
    scored = score(policy, whole, rollout).log_probs
    np.testing.assert_allclose(rollout.log_probs, scored, rtol=0, atol=1e-4)
    assert np.max(np.abs(scored - score(policy, params, rollout).log_probs)) > 0.1  # the adapters matter


@pytest.mark.parametrize("kernel", [attention.reference, attention.blockwise], ids=lambda f: f.__name__)
def test_packed_completions_under_each_attention_score_as_those_of_the_merged_model(kernel):
    policy = models.decoder(from_hf_config(tiny_hf_config("qwen3"), attention=kernel))
    adapters, frozen = random_adapters(policy, base()[1])
    rollout = rollout_of(T=8)
    packed = packing.pack(rollout, multiple=8)
    ours = score(policy, bind(adapters, frozen), rollout, packing=packed).log_probs
    np.testing.assert_allclose(ours, score(policy, lora.merge(adapters, frozen), rollout).log_probs, atol=1e-4)


def test_gradients_are_float32_under_bfloat16_arithmetic():
    policy, params = base("qwen3", jnp.bfloat16)
    adapters, frozen = random_adapters(policy, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    grads = jax.jit(jax.grad(lambda x, y: jnp.sum(score(policy, bind(x, y), rollout_of()).log_probs)))(adapters, frozen)
    chex.assert_trees_all_equal_dtypes(grads, adapters)
    assert all(np.any(x != 0) for x in jax.tree.leaves(grads))


# ------------------------------------------------------------------------------- settings


def test_each_target_has_its_rank_and_the_rest_no_adapter():
    policy, params = base()
    adapters, frozen = lora.adapt(policy, params, rank={"q_proj": 2, "down_proj": 5}, key=jax.random.key(0))
    assert jax.tree.map(jnp.shape, adapters) == {
        "layers": {
            "self_attn": {"q_proj": {"lora_a": (2, 32, 2), "lora_b": (2, 2, 32)}},
            "mlp": {"down_proj": {"lora_a": (2, 48, 5), "lora_b": (2, 5, 32)}},
        }
    }
    assert {path[-1] for path, module in lora.linear_layers(policy, frozen) if lora.SCALE in module} == {
        "q_proj", "down_proj"
    }  # fmt: skip


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 4), (True, 32 / 2)])
def test_all_linear_layers_have_adapters_of_the_scale(rslora, scale):
    policy, params = base()
    adapters, frozen = lora.adapt(policy, params, rank=4, alpha=32, rslora=rslora, key=jax.random.key(0))
    modules = lora.linear_layers(policy, bind(adapters, frozen))
    assert sorted(path[-1] for path, _ in modules) == sorted(lora.LAYERS)
    for _, module in modules:
        np.testing.assert_array_equal(module[lora.SCALE], np.full(2, scale, np.float32))
        bound = module["kernel"].shape[1] ** -0.5  # PEFT's: Kaiming's uniform with a = sqrt(5)
        assert 0.7 * bound < np.max(np.abs(module[lora.A])) <= bound


def test_the_adapters_of_a_layer_do_not_depend_on_the_other_targets():
    policy, params = base()
    alone, among = (
        lora.adapt(policy, params, targets=targets, key=jax.random.key(0))[0] for targets in (("up_proj",), None)
    )
    chex.assert_trees_all_equal(alone["layers"]["mlp"]["up_proj"], among["layers"]["mlp"]["up_proj"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_proj", "gate")}, "'gate' is no linear layer of the decoder; near it are gate_proj"),
        ({"targets": ("c_attn",)}, "'c_attn' is no linear layer of the decoder; there are .*q_proj"),
        ({"targets": ()}, "no targets: name some of"),
        ({"rank": 0}, "rank of .* from 1 on, got 0"),
        ({"rank": {"q_proj": 2}, "targets": ("k_proj",)}, "leave out targets"),
        ({"alpha": 0}, "alpha is above 0, got 0"),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lora.adapt(*base(), key=jax.random.key(0), **settings)


def test_a_rank_above_the_width_is_a_warning():
    with pytest.warns(UserWarning, match="rank 33 of q_proj is above the 32"):
        lora.adapt(*base(), rank=33, targets=("q_proj",), key=jax.random.key(0))


def test_adapters_are_refused_on_what_they_do_not_fit():
    policy, params = base()
    adapters, frozen = lora.adapt(policy, params, key=jax.random.key(0))
    with pytest.raises(ValueError, match="has adapters already"):
        lora.adapt(policy, bind(adapters, frozen), key=jax.random.key(0))
    with pytest.raises(ValueError, match="the params are not this policy's"):
        lora.adapt(tiny_policy(hidden_size=16), params, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"adapters are for models\.decoder"):
        lora.adapt(from_logits_fn(lambda params, tokens, mask: tokens), {}, key=jax.random.key(0))
    others = (params, jax.tree.map(lambda x: x + 1, params))
    with pytest.raises(ValueError, match="that are mapped over have one base"):
        lora.stack([lora.adapt(policy, x, rank=1, key=jax.random.key(0)) for x in others])
    with pytest.raises(ValueError, match="no adapters to be merged"):
        lora.merge(params)
    with pytest.raises(ValueError, match="adapters without their base: kernel, lora_scale is missing"):
        lora.merge(adapters)


def test_adapters_of_another_family_are_refused(tmp_path):
    policy, params = base("llama")
    hf.save_adapters(policy, *random_adapters(policy, params), tmp_path, base_model="a-llama")
    with pytest.raises(ValueError, match=r"trained on another base.*'a-llama'"):
        hf.load_adapters(*base("qwen3"), tmp_path)  # whose linear layers have the same names and shapes
    other = tiny_policy("phi3")
    with pytest.raises(
        ValueError, match=r"does not hold adapters of this base:\n  .*gate_proj\.lora_A\.weight: unexpected"
    ):
        hf.load_adapters(other, jax.eval_shape(other.init, jax.random.key(0)), tmp_path)


# -------------------------------------------------------------------------------- training


def grpo_step(policy, optimizer=SGD, **settings):
    sampler = sampling.sampler(group_size=4, max_tokens=6, eos_ids=(1,))
    return make_train_step(
        policy, optimizer, sampler, reward=last_even, loss=losses.grpo(penalty=losses.k3(0.1)), **settings
    )


@pytest.mark.slow
def test_a_step_measures_what_the_merged_model_does_and_keeps_a_reference_of_the_adapters_alone():
    policy, params = base()
    adapters, frozen = random_adapters(policy, params)
    state = init_state(adapters, SGD, jax.random.key(2), frozen=frozen, reference=True)
    assert memory.size(state.ref_params) == memory.size(adapters) < memory.size(params) / 2
    step = jax.jit(grpo_step(policy))
    whole = init_state(lora.merge(adapters, frozen), SGD, jax.random.key(2), reference=True)
    prompts = random_prompts(0, 4, 5)
    ours, measured = step(state, prompts)
    _, expected = step(whole, prompts)
    for name in ("reward", "kl", "loss", "entropy"):
        np.testing.assert_allclose(measured[name].sum, expected[name].sum, rtol=1e-3, atol=1e-4, err_msg=name)
    ours, measured = step(ours, prompts)
    assert measured["kl"].sum > 1e-3  # the reference stays behind
    chex.assert_trees_all_equal(ours.ref_params, adapters)
    chex.assert_trees_all_equal(ours.frozen, frozen)


def wide_policy():
    return tiny_policy(hidden_size=256, intermediate_size=384, num_hidden_layers=4, head_dim=64)


@pytest.mark.slow
def test_learning_takes_less_than_whole_training_by_gradients_and_moments_and_no_merged_stack_is_made():
    policy = wide_policy()
    params = jax.eval_shape(policy.init, jax.random.key(0))
    adapters, frozen = jax.eval_shape(lambda p: lora.adapt(policy, p, rank=4, key=jax.random.key(0)), params)
    adam, rollout = optax.adam(1e-3), rollout_of()
    learn = make_learn(policy, adam, loss=losses.sft())

    def program(params, frozen=None):
        init = functools.partial(init_state, optimizer=adam, key=jax.random.key(0))
        state = jax.eval_shape(lambda params, frozen: init(params, frozen=frozen), params, frozen)
        compiled = jax.jit(learn, donate_argnums=0).lower(state, Experience(rollout)).compile()
        found = compiled.memory_analysis()
        held = found.argument_size_in_bytes + found.temp_size_in_bytes
        return held + found.output_size_in_bytes - found.alias_size_in_bytes, compiled.as_text()

    (ours, text), (full, _) = program(adapters, frozen), program(params)
    saved = 3 * (memory.size(params) - memory.size(adapters))  # gradients and two moments
    assert ours < full - 0.95 * saved
    stacks = {",".join(map(str, x["kernel"].shape)) for _, x in lora.linear_layers(policy, frozen)}
    for shape in stacks:
        made = [
            line for line in text.splitlines() if re.search(rf"= f32\[{shape}\]\S* (dot|add|fusion|multiply)", line)
        ]
        assert not made, made


@pytest.mark.slow
def test_many_adapters_over_one_base_train_as_each_alone():
    policy, params = base()
    ranks = (1, 3)
    several = [random_adapters(policy, params, seed, rank=r, alpha=8.0) for seed, r in enumerate(ranks)]
    adapters, scales, shared = lora.stack(several)
    assert adapters["layers"]["mlp"]["up_proj"]["lora_a"].shape == (2, 2, 32, 3)

    rollouts = jax.tree.map(lambda *x: jnp.stack(x), *(rollout_of(seed) for seed in range(2)))

    def train(adapters, scales, shared, rate):
        optimizer = optax.sgd(rate)
        state = init_state(adapters, optimizer, jax.random.key(2), frozen=bind(scales, shared))
        learn = make_learn(policy, optimizer, loss=losses.sft())
        return jax.lax.scan(lambda state, rollout: learn(state, Experience(rollout)), state, rollouts)[0].params

    rates = jnp.array([0.1, 0.3])
    together = jax.jit(jax.vmap(train, (0, 0, None, 0)))(adapters, scales, shared, rates)
    for i, (alone, frozen) in enumerate(several):
        state = jax.jit(train)(alone, {}, frozen, rates[i])
        for path, module in lora.linear_layers(policy, bind(state, frozen)):
            found = functools.reduce(operator.getitem, path, together)
            r = ranks[i]
            np.testing.assert_allclose(found[lora.A][i][..., :r], module[lora.A], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found[lora.B][i][:, :r], module[lora.B], rtol=1e-4, atol=1e-5)
            assert not np.any(found[lora.A][i][..., r:])
            assert not np.any(found[lora.B][i][:, r:])


def test_what_is_trained_beside_adapters_is_not_left_out_of_their_folder_unsaid(tmp_path):
    policy, params = base()
    adapters, frozen = lora.adapt(policy, params, rank={"q_proj": 2}, key=jax.random.key(0))
    rest = {name: leaf for name, leaf in frozen.items() if name != "norm"}
    with pytest.raises(ValueError, match="no place for what else is trained, such as norm/"):
        hf.save_adapters(policy, adapters | {"norm": frozen["norm"]}, rest, tmp_path / "other", base_model="base")
    own = models.decoder(dataclasses.replace(policy.config, hf_config=""))
    with pytest.raises(ValueError, match="the policy has no Hugging Face config"):
        hf.save_adapters(own, adapters, frozen, tmp_path / "other", base_model="base")


def test_what_no_folder_of_adapters_holds_is_refused_by_name(tmp_path):
    policy, params = base()
    adapters, frozen = lora.adapt(policy, params, rank={"q_proj": 2}, key=jax.random.key(0))
    hf.save_adapters(policy, adapters, frozen, tmp_path, base_model="base")
    of_config, of_weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, weights = json.loads(of_config.read_text()), safetensors.numpy.load_file(of_weights)
    for change, message in (
        ({"lora_alpha": math.nan}, "lora_alpha of adapter_config.json is nan"),
        ({"lora_alpha": None}, "lora_alpha of adapter_config.json is None"),
        ({"alpha_pattern": {"q_proj": "8"}}, "q_proj of adapter_config.json is '8'"),
        ({"alpha_pattern": {"(": 8}}, r"has '\(', no regular expression"),
    ):
        of_config.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            hf.load_adapters(policy, params, tmp_path)
    of_config.write_text(json.dumps(config))
    for change, message in (
        (lambda name, x: x.astype(np.int64), "layers.0.self_attn.q_proj.lora_A.weight: I64"),
        (lambda name, x: x[:0] if "lora_A" in name else x[:, :0], "a rank of 0"),
    ):
        safetensors.numpy.save_file({name: change(name, x) for name, x in weights.items()}, of_weights)
        with pytest.raises(ValueError, match=message):
            hf.load_adapters(policy, params, tmp_path)


def test_layers_without_an_adapter_are_those_that_the_config_of_peft_leaves_out(tmp_path):
    policy, params = base()
    adapters, frozen = random_adapters(policy, params, rank={"q_proj": 2}, alpha=6.0)
    hf.save_adapters(policy, adapters, frozen, tmp_path, base_model="base")
    of_config, of_weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, weights = json.loads(of_config.read_text()), safetensors.numpy.load_file(of_weights)
    second = {name: x for name, x in weights.items() if ".layers.1." in name}
    by_regex = r"model\.layers\.1\.self_attn\.(q|k)_proj"
    for change, held, message in (
        ({"layers_to_transform": [1]}, second, None),
        ({"layers_to_transform": 1}, second, None),
        ({"target_modules": by_regex}, second, None),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, second, None),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, second, None),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, weights, None),
        ({}, second, r"layers\.0\.self_attn\.q_proj\.lora_A\.weight: missing"),
        ({"layers_to_transform": [0]}, weights, r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: unexpected"),
        ({"target_modules": "("}, second, r"has '\(', no regular expression"),
    ):
        of_config.write_text(json.dumps(config | change))
        safetensors.numpy.save_file(held, of_weights)
        if message is not None:
            with pytest.raises(ValueError, match=message):
                hf.load_adapters(policy, params, tmp_path)
            continue
        read, of_read = hf.load_adapters(policy, params, tmp_path)
        found, expected = (tree["layers"]["self_attn"]["q_proj"] for tree in (read, adapters))
        own = np.array([held is weights, True])
        for name in (lora.A, lora.B):
            np.testing.assert_array_equal(found[name], np.where(own[:, None, None], expected[name], 0))
        assert of_read["layers"]["self_attn"]["q_proj"][lora.SCALE][1] == 3


def test_a_base_is_digested_once_for_all_adapters_that_are_written_and_another_one_anew(tmp_path, monkeypatch):
    policy, params = base()
    params = jax.tree.map(jnp.copy, params)  # which no other test has written adapters of
    adapters, frozen = random_adapters(policy, params, rank={"q_proj": 2})
    digested, blocks = [], processes.blocks
    monkeypatch.setattr(processes, "blocks", lambda leaf: digested.append(leaf) or blocks(leaf))
    for n in range(3):
        hf.save_adapters(policy, adapters, frozen, tmp_path / str(n), base_model="base")
    assert len(digested) == len(jax.tree.leaves(params))
    other = params | {"lm_head": params["lm_head"] + 1}
    with pytest.raises(ValueError, match="was trained on another base, or on this one in another dtype or other codes"):
        hf.load_adapters(policy, other, tmp_path / "0")
    hf.load_adapters(policy, params, tmp_path / "2")


def test_kernels_that_share_a_tensor_are_quantised_one_by_one_and_have_adapters_of_their_own(tmp_path):
    folder = testing.tiny_checkpoint(tmp_path / "base", "phi3", sliding_window=None, tie_word_embeddings=False)
    policy, params = hf.load_pretrained(folder)
    _, codes = hf.load_pretrained(folder, quantize="int8")
    jax.tree.map(np.testing.assert_array_equal, codes, quantized.quantize(params, "int8"))
    adapters, base = lora.adapt(policy, params, rank=2, key=jax.random.key(0))
    assert sorted(adapters["layers"]["self_attn"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    hf.save_adapters(policy, adapters, base, tmp_path / "adapters", base_model="base")
    read = hf.load_adapters(policy, params, tmp_path / "adapters")
    jax.tree.map(np.testing.assert_array_equal, read, (adapters, base))
    adapters, base = lora.adapt(policy, params, rank=2, key=jax.random.key(0))
    hf.save_pretrained(policy, lora.merge(adapters, base), tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, hf.load_pretrained(tmp_path / "merged")[1], params)  # lora_b is 0
