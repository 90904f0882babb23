"""Adapters beside those of PEFT, in torch: what either writes, the other reads to the same logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import safetensors.numpy  # noqa: E402
import transformers  # noqa: E402

from grpo_jax.freezing import bind  # noqa: E402
from grpo_jax.models import hf, lora  # noqa: E402
from grpo_jax.models.families import FAMILIES  # noqa: E402
from grpo_jax.models.hf.layout import shapes_of  # noqa: E402
from grpo_jax.testing import tiny_checkpoint, tiny_hf_config, tiny_policy  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, 250, (2, 9))
RANKS = {"q_proj": 3, "o_proj": 8, "up_proj": 8, "down_proj": 8}

# PEFT asks torch for what torch calls old.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma2", "olmo2"])
def folder(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / request.param, request.param)


def in_torch(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_in_torch(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def logits(policy, params):
    """After each token but the first."""
    tokens = jnp.asarray(TOKENS, jnp.int32)
    cache = policy.prefill(params, tokens[:, :2], jnp.full(2, 2))
    positions = jnp.broadcast_to(jnp.arange(1, tokens.shape[1]), (2, 1, tokens.shape[1] - 1))
    hidden, _ = policy.extend(params, tokens[:, None, 1:], positions, cache)
    return policy.unembed(params, hidden)[:, 0]


def random_adapters(policy, params, **settings):
    adapters, base = lora.adapt(policy, params, key=jax.random.key(0), **settings)
    noise = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), adapters), base


@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": RANKS, "alpha": 7.0}, {"rank": 4, "rslora": True}], ids=str)
def test_peft_reads_what_is_written_here_to_the_same_logits(folder, tmp_path, settings):
    policy, params = hf.load_pretrained(folder)
    adapters, base = random_adapters(policy, params, **settings)
    hf.save_adapters(policy, adapters, base, tmp_path / "adapters", base_model=str(folder))
    model = peft.PeftModel.from_pretrained(in_torch(folder), tmp_path / "adapters")
    ours = logits(policy, bind(adapters, base))
    assert np.max(np.abs(ours - logits(policy, params))) > 0.1
    np.testing.assert_allclose(ours, logits_in_torch(model)[:, 1:], rtol=0, atol=2e-4)


def test_what_is_written_here_is_read_here_to_the_bit(folder, tmp_path):
    policy, params = hf.load_pretrained(folder)
    adapters, base = random_adapters(policy, params, rank=RANKS, alpha=7.0)
    hf.save_adapters(policy, adapters, base, tmp_path / "adapters", base_model=str(folder))
    read, base_of_read = hf.load_adapters(policy, params, tmp_path / "adapters")
    jax.tree.map(np.testing.assert_array_equal, (read, base_of_read), (adapters, base))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "target_modules": "all-linear", "lora_alpha": 8},
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_dropout": 0.1},
        {
            "r": 4,
            "target_modules": ["v_proj", "up_proj"],
            "rank_pattern": {"up_proj": 2, "layers.1.self_attn.v_proj": 6},
            "alpha_pattern": {"v_proj": 3, "^model.layers.0.mlp.up_proj": 5},
        },
    ],
    ids=["all", "rslora", "patterns"],
)
def test_what_peft_writes_is_read_here_to_the_same_logits(folder, tmp_path, settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = peft.get_peft_model(in_torch(folder), config).eval()
    model.save_pretrained(tmp_path)
    policy, params = hf.load_pretrained(folder)
    adapters, base = hf.load_adapters(policy, params, tmp_path)
    expected = logits_in_torch(model)[:, 1:]
    np.testing.assert_allclose(logits(policy, bind(adapters, base)), expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(logits(policy, lora.merge(adapters, base)), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj|.*layers\.0\.mlp\.up_proj"},
    ],
    ids=["by number", "by name"],
)
def test_adapters_of_some_layers_are_read_here_to_the_logits_of_peft(tmp_path, settings):
    folder = tiny_checkpoint(tmp_path / "base", "qwen3")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4, lora_alpha=8, **settings)
    model = peft.get_peft_model(in_torch(folder), config).eval()
    model.save_pretrained(tmp_path / "adapters")
    policy, params = hf.load_pretrained(folder)
    ours = logits(policy, bind(*hf.load_adapters(policy, params, tmp_path / "adapters")))
    assert np.max(np.abs(ours - logits(policy, params))) > 0.1
    np.testing.assert_allclose(ours, logits_in_torch(model)[:, 1:], rtol=0, atol=2e-4)


def test_transformers_reads_a_merged_model_to_the_same_logits(folder, tmp_path):
    policy, params = hf.load_pretrained(folder)
    adapters, base = random_adapters(policy, params, rank=4)
    hf.save_pretrained(policy, lora.merge(adapters, base), tmp_path / "merged")
    ours = logits(policy, bind(adapters, base))
    np.testing.assert_allclose(ours, logits_in_torch(in_torch(tmp_path / "merged"))[:, 1:], rtol=0, atol=2e-4)


FUSED = {
    "phi3": {"sliding_window": None, "tie_word_embeddings": False, "pad_token_id": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}
EXPERTS = {"q_proj": 3, "experts_gate": 2, "experts_up": 3, "experts_down": 4}
OF_FAMILY = {"phi3": {"q_proj": 2, "v_proj": 3, "o_proj": 4, "gate_proj": 2, "up_proj": 5}}
OF_PEFT = {"phi3": {"target_modules": ["qkv_proj", "gate_up_proj"]}}
OF_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
OF_DOWN = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "gpt_oss")]


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", *SLOW])
def test_adapters_of_what_peft_adapts_together_go_out_and_in_to_the_same_logits(family, tmp_path):
    """Phi's fused projections and stacks of experts: blocks of one adapter there, adapters of their own here."""
    base_folder = tiny_checkpoint(tmp_path / "base", family, **FUSED[family])
    policy, params = hf.load_pretrained(base_folder)
    adapters, base = random_adapters(policy, params, rank=OF_FAMILY.get(family, EXPERTS), alpha=7.0)
    hf.save_adapters(policy, adapters, base, tmp_path / "ours", base_model=str(base_folder))
    model = peft.PeftModel.from_pretrained(in_torch(base_folder), tmp_path / "ours")
    ours = logits(policy, bind(adapters, base))
    assert np.max(np.abs(ours - logits(policy, params))) > 0.1
    np.testing.assert_allclose(ours, logits_in_torch(model)[:, 1:], rtol=0, atol=2e-4)
    read, base_of_read = hf.load_adapters(policy, params, tmp_path / "ours")
    assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, adapters)
    np.testing.assert_allclose(logits(policy, bind(read, base_of_read)), ours, rtol=0, atol=1e-5)

    for number, settings in enumerate([OF_PEFT.get(family, OF_EXPERTS), *([] if family in OF_PEFT else [OF_DOWN])]):
        torch.manual_seed(number)
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2, lora_alpha=3, **settings)
        model = peft.get_peft_model(in_torch(base_folder), config).eval()
        model.save_pretrained(tmp_path / f"theirs{number}")
        read, base_of_read = hf.load_adapters(policy, params, tmp_path / f"theirs{number}")
        found = logits(policy, lora.merge(read, base_of_read))
        assert np.max(np.abs(found - logits(policy, params))) > 0.1
        np.testing.assert_allclose(found, logits_in_torch(model)[:, 1:], rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"phi3"}))
def test_adapters_of_every_family_are_written_under_the_names_and_shapes_of_its_modules(family, tmp_path):
    """All of the linear layers that adapters have by default; those of Phi, which PEFT adapts together, above."""
    policy = tiny_policy(family)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes_of(policy))
    hf.save_adapters(policy, *lora.adapt(policy, params, rank=2, key=jax.random.key(0)), tmp_path, base_model="base")
    with torch.device("meta"):
        modules = dict(transformers.AutoModelForCausalLM.from_config(tiny_hf_config(family)).named_modules())
    linear = {name: module.weight.shape for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    wanted = {
        f"base_model.model.{name}.lora_{part}.weight": shape
        for name, (out, into) in linear.items()
        if name.endswith("_proj")
        for part, shape in (("A", (2, into)), ("B", (out, 2)))
    }
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == wanted
