"""Checkpoints that are laid out in another way, beside what transformers makes of them, in torch."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import safetensors.numpy  # noqa: E402
import transformers  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

from grpo_jax.freezing import bind  # noqa: E402
from grpo_jax.models import hf, lora, sharding  # noqa: E402
from grpo_jax.models.hf import views  # noqa: E402
from grpo_jax.testing import tiny_checkpoint  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, 60, (1, 9))


def packed(rng, *shape):
    """Random bytes of weights `[.., in, out]`, whose sizes are moderate."""
    *stack, inputs, outputs = shape
    blocks = rng.integers(0, 256, (*stack, outputs, inputs // 32, 16), np.uint8)
    return blocks, rng.integers(118, 124, (*stack, outputs, inputs // 32), np.uint8)


def in_transformers(blocks, scales):
    return convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()


def logits(policy, params):
    """After each token but the first."""
    tokens = jnp.asarray(TOKENS, jnp.int32)
    cache = policy.prefill(params, tokens[:, :2], jnp.full(1, 2))
    positions = jnp.arange(1, tokens.shape[1])[None, None]
    hidden, _ = policy.extend(params, tokens[:, None, 1:], positions, cache)
    return policy.unembed(params, hidden)[0, 0]


def test_codes_of_mxfp4_stand_for_what_transformers_makes_of_them():
    blocks, scales = packed(np.random.default_rng(0), 3, 96, 5)
    scales[0, 0] = [10, 127, 240]  # small, 1, and large
    found = views.unpack(blocks, scales)
    assert found.shape == (3, 96, 5)
    assert len(np.unique(np.abs(found[1:] / np.exp2(np.floor(np.log2(np.abs(found[1:]) + 1e-30)))))) > 2
    np.testing.assert_array_equal(found, in_transformers(blocks, scales))


@pytest.fixture
def gpt_oss(tmp_path):
    """A folder laid out as the published one, with codes for experts, and the experts in floats."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "intermediate_size": 64}
    folder = tiny_checkpoint(tmp_path / "base", "gpt_oss", **sizes)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    rng, floats = np.random.default_rng(1), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = packed(rng, *tensors.pop(name).shape)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = in_transformers(blocks, scales)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, floats


def test_mxfp4_checkpoints_of_gpt_oss_are_read_and_exported_as_floats(gpt_oss, tmp_path):
    folder, floats = gpt_oss
    policy, params = hf.load_pretrained(folder)
    whole = np.stack([floats[f"model.layers.{i}.mlp.experts.gate_up_proj"] for i in range(2)])
    for turn, name in enumerate(("experts_gate", "experts_up")):
        np.testing.assert_array_equal(params["layers"]["mlp"][name]["kernel"], whole[..., turn::2])
    on_one = hf.load_pretrained(folder, mesh=sharding.mesh(devices=jax.devices()[:1]))[1]
    jax.tree.map(np.testing.assert_array_equal, on_one, params)
    hf.save_pretrained(policy, params, tmp_path / "exported")
    assert "quantization_config" not in json.loads((tmp_path / "exported" / "config.json").read_text())
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", **settings).eval()
    held = dict(model.named_parameters())
    for name, tensor in floats.items():
        np.testing.assert_array_equal(held[name].detach().numpy(), tensor)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits[0, 1:].numpy()
    np.testing.assert_allclose(logits(policy, params), expected, rtol=0, atol=2e-4)


def test_blocks_without_their_scales_are_named(gpt_oss):
    folder, _ = gpt_oss
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :-1]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: dtype of blocks and scales \['U8'\] instead of F32"):
        hf.load_pretrained(folder)
    del tensors[f"{name}_scales"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: missing"):
        hf.load_pretrained(folder)


def renamed_by(name, pairs):
    """With the first prefix that it has replaced."""
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)


@pytest.fixture(scope="module")
def gemma_3():
    text = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "initializer_range": 0.2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def logits_in_torch(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits[0, 1:].numpy()


def test_the_language_model_of_a_gemma_3_with_images_is_read_and_exported(gemma_3, tmp_path):
    """Whether tensors are named as by transformers 4, as the published ones are, or 5."""
    gemma_3.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    parts = [("language_model.model.", "model.language_model.")]
    parts += [(f"{name}.", f"model.{name}.") for name in ("vision_tower", "multi_modal_projector")]
    found = []
    for new in (False, True):
        pairs = [pair if new else pair[::-1] for pair in parts]
        renamed = {renamed_by(name, pairs): tensor for name, tensor in tensors.items()}
        assert any(name.startswith("model.language_model.layers") for name in renamed) == new
        safetensors.numpy.save_file(renamed, file, {"format": "pt"})
        with pytest.warns(UserWarning, match="only its language model is read"):
            found.append(hf.load_pretrained(tmp_path / "model"))
    (policy, params), (_, again) = found
    jax.tree.map(np.testing.assert_array_equal, params, again)
    np.testing.assert_allclose(logits(policy, params), logits_in_torch(gemma_3), rtol=0, atol=5e-5)
    hf.save_pretrained(policy, params, tmp_path / "exported")
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", output_loading_info=True, dtype=torch.float32
    )
    assert type(exported).__name__ == "Gemma3ForCausalLM"
    assert not any(info.values()), info


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # PEFT's, of torch
def test_adapters_of_a_gemma_3_with_images_are_its_language_models_for_peft_too(gemma_3, tmp_path):
    peft = pytest.importorskip("peft")
    gemma_3.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="only its language model is read"):
        policy, params = hf.load_pretrained(tmp_path / "model")
    adapters, base = lora.adapt(policy, params, rank={"q_proj": 2, "down_proj": 3}, alpha=7.0, key=jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    hf.save_adapters(policy, adapters, base, tmp_path / "ours", base_model=str(tmp_path / "model"))
    model = peft.PeftModel.from_pretrained(copy.deepcopy(gemma_3), tmp_path / "ours").eval()
    ours = logits(policy, bind(adapters, base))
    assert np.max(np.abs(ours - logits(policy, params))) > 0.01
    np.testing.assert_allclose(ours, logits_in_torch(model), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, hf.load_adapters(policy, params, tmp_path / "theirs"), (adapters, base))
    hf.save_pretrained(policy, params, tmp_path / "exported")
    assert "_beside_images" not in (tmp_path / "exported" / "config.json").read_text()
