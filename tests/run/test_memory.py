"""The plan of a step's memory, against arrays that exist."""

import dataclasses
import functools
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from grpo_jax import losses, models, sampling, testing
from grpo_jax.models import lora, quantized, sharding
from grpo_jax.models.settings import WeightSettings
from grpo_jax.run import memory
from grpo_jax.scoring import Teacher
from grpo_jax.updates import Updates, init_state

POLICY = testing.tiny_policy("qwen2", dtype=jnp.bfloat16)
OPTIMIZER = optax.adamw(1e-3)
SAMPLER = sampling.sampler(group_size=2, max_tokens=16, eos_ids=(0,))
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
SIZES = {"prompts": 4, "prompt_tokens": 9}


def plan(policy=POLICY, **changes):
    settings = SIZES | {"loss": losses.grpo(penalty=losses.k3(0.04)), "reference": True} | changes
    return memory.plan(policy, OPTIMIZER, SAMPLER, **settings)


@pytest.fixture(scope="module")
def planned():
    return plan()


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_what_is_kept_has_the_size_of_the_arrays(planned):
    params = jax.jit(POLICY.init)(jax.random.key(0))
    state = init_state(params, OPTIMIZER, jax.random.key(0), reference=True)
    prompts = testing.random_prompts(0, 4, 9)
    assert planned.parameters == nbytes(state.params)
    assert planned.optimizer == nbytes(state.opt_state)
    assert planned.reference == nbytes(state.ref_params)
    cast = jax.tree.leaves(jax.jit(POLICY.cast)(params))
    assert planned.cast == nbytes([x for x in cast if x.dtype == jnp.bfloat16]) < planned.parameters
    assert planned.weights == nbytes(cast) - nbytes(params["embed_tokens"]) // 2 > planned.cast
    assert planned.prompt_cache == nbytes(jax.jit(POLICY.prefill)(params, prompts.tokens, prompts.lengths))
    assert planned.completion_cache == nbytes(POLICY.init_cache(4, 2, 16))
    assert planned.logits == 2 * 4 * 2 * 16 * POLICY.config.vocab_size * 4
    kept = planned.parameters + planned.optimizer + planned.reference
    assert planned.peak == kept + max(planned.sampling, planned.learning)
    assert planned.sampling > planned.prompt_cache + planned.completion_cache + planned.cast
    assert planned.learning >= planned.gradients + planned.logits


@pytest.mark.slow
def test_with_slots_the_completions_in_them_have_a_cache_and_no_other(planned):
    settings = SIZES | {"loss": losses.grpo(penalty=losses.k3(0.04)), "reference": True}
    found = memory.plan(POLICY, OPTIMIZER, dataclasses.replace(SAMPLER, slots=3), **settings)
    assert found.completion_cache == nbytes(POLICY.init_cache(3, 1, 16)) < planned.completion_cache
    assert found.learning == planned.learning
    with pytest.raises(ValueError, match="--slots 3 take depends on lengths"):
        memory.main(memory.Config("model", slots=3, topology="v5e:1x1"))


@pytest.mark.slow
def test_a_teacher_is_kept_in_the_place_of_the_reference_and_scored_in_learning():
    network = testing.tiny_policy("qwen2", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, hidden_size=64)
    settings = {"loss": losses.distill(), "reference": False, "teacher": Teacher(network, losses.reverse_kl)}
    params = jax.eval_shape(network.init, jax.random.key(0))
    few = jax.eval_shape(lambda: quantized.quantize(network.init(jax.random.key(0)), "int8"))
    whole, quantised = plan(**settings), plan(**settings, teacher_params=few)
    assert whole.reference == memory.size(params)
    assert quantised.reference == memory.size(few) < whole.reference
    without = plan(loss=losses.grpo(), reference=False)
    assert whole.sampling == without.sampling
    assert whole.learning > without.learning
    assert whole.peak == whole.parameters + whole.optimizer + whole.reference + max(whole.sampling, whole.learning)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_adapters_have_moments_gradients_and_reference_of_their_own_size_alone(kind, planned):
    weights = WeightSettings(lora_rank=2, quantize=kind)
    policy = testing.tiny_policy("qwen2", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params, frozen = weights.shapes(policy)
    found = plan(policy, params=params, frozen=frozen)
    adapters = 4 * sum(2 * sum(x["kernel"].shape[1:]) * 2 for _, x in lora.linear_layers(policy, frozen))  # two layers
    assert found.parameters == found.gradients == found.reference == adapters
    assert found.optimizer == 2 * adapters + 4  # and the count
    sizes = [x.size * (0.5 if x.dtype == jnp.uint4 else x.dtype.itemsize) for x in jax.tree.leaves(frozen)]
    assert found.frozen == sum(sizes)
    assert found.peak == found.frozen + 2 * adapters + found.optimizer + max(found.sampling, found.learning)
    assert found.peak < planned.peak
    assert found.weights > found.frozen - memory.size(frozen["embed_tokens"])  # what has no copy is read


def test_the_old_policy_is_scored_in_the_parts_of_the_updates(monkeypatch):
    widths = []

    def prefill(params, tokens, lengths):
        widths.append(len(tokens))
        return POLICY.prefill(params, tokens, lengths)

    class Traced(Exception): ...

    def compiled(*arguments, mesh, compiler_options):
        memory.traced(*arguments, mesh=mesh)
        raise Traced  # what was compiled would tell nothing more

    monkeypatch.setattr(memory, "compiled", compiled)
    watched = POLICY._replace(prefill=prefill, forward=None)
    with pytest.raises(Traced):
        plan(watched, reference=False, loss=losses.grpo(), updates=Updates(minibatches=4))
    assert set(widths) == {4, 1}  # all by the sampler, one by one elsewhere


@pytest.mark.slow
def test_micro_batches_and_no_reference_take_less(planned):
    less = plan(reference=False, loss=losses.grpo(), updates=Updates(micro_batches=4))
    assert less.learning < planned.learning
    assert less.reference == 0


@pytest.mark.slow
def test_keeping_activations_takes_more(planned):
    kept = models.decoder(dataclasses.replace(POLICY.config, remat=False))
    assert plan(kept).activations > planned.activations


def test_the_fewest_micro_batches_and_the_most_prompts_that_fit():
    def bytes_of(parts):
        return 100 + 960 // parts

    assert memory.fewest_micro_batches(bytes_of, 12, 2000) == 1
    assert memory.fewest_micro_batches(bytes_of, 12, 400) == 4  # 3 takes 420
    assert memory.fewest_micro_batches(bytes_of, 12, 180) == 12
    with pytest.raises(ValueError, match=r"one prompt at a time takes 0.0 MiB"):
        memory.fewest_micro_batches(bytes_of, 12, 150)
    for fits in (0, 1, 5, 8, 37, 100):
        assert memory.largest_batch(lambda prompts: 10 * prompts, 10 * fits + 9, limit=64) == min(fits, 64)


def test_over_a_mesh_micro_batches_leave_no_device_to_compute_what_others_do():
    mesh, taken = jax.sharding.AbstractMesh((1, 4, 1), sharding.AXES), []

    def fewest(prompts, group_size, budget):
        taken.clear()

        def bytes_of(parts):
            taken.append(parts)
            return prompts // parts

        return memory.fewest_micro_batches(bytes_of, prompts, budget, mesh=mesh, group_size=group_size)

    assert fewest(12, 3, 5) == 3  # 3, 2 and 1 prompts of 3 completions do not divide over 4
    assert taken == [1, 3]
    assert fewest(12, 8, 5) == 3
    assert taken == [1, 2, 3]
    with pytest.raises(ValueError, match=r"4 prompts at a time, one a device, take 0.0 MiB"):
        fewest(12, 3, 3)
    with pytest.raises(ValueError, match=r"6 prompts at a time x 3 completions do not divide over data=1, fsdp=4"):
        fewest(6, 3, 100)


def test_over_a_mesh_packed_groups_divide_by_prompts_alone(monkeypatch):
    mesh = jax.sharding.AbstractMesh((1, 4, 1), sharding.AXES)
    policy = types.SimpleNamespace(config=types.SimpleNamespace(mesh=mesh))

    def plan_of(*arguments, updates, **settings):
        return types.SimpleNamespace(peak=8 // updates.micro_batches)

    monkeypatch.setattr(memory, "plan", plan_of)
    fit = functools.partial(memory.fit, Updates(), policy, None, types.SimpleNamespace(group_size=4), prompts=8)
    assert fit(budget=2).micro_batches == 4
    assert fit(budget=4, packed=True).micro_batches == 2
    with pytest.raises(ValueError, match="4 prompts at a time, one a device, take"):
        fit(budget=2, packed=True)


def test_the_most_prompts_over_a_mesh_are_those_that_divide(monkeypatch, capsys):
    monkeypatch.setattr(memory, "mesh_of", lambda config: jax.sharding.AbstractMesh((1, 4, 1), sharding.AXES))
    sizes = dict.fromkeys(memory.Plan._fields, 0)

    def of_config(config):
        held = 2**30 * config.prompts_per_step // config.micro_batches
        return memory.Planned(memory.Plan(**sizes | {"learning": held}), None)

    monkeypatch.setattr(memory, "of_config", of_config)
    memory.main(memory.Config(model="none", prompts_per_step=32, group_size=3, device_gib=11.5))
    printed = capsys.readouterr().out
    assert "fit into 11.50 GiB in one piece: 8\n" in printed
    assert "micro-batches in which 32 prompts fit: 4\n" in printed


def test_the_command_plans_the_adapters_and_the_codes_that_it_is_told(tmp_path, monkeypatch):
    testing.tiny_hf_config("qwen3").save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "planned", lambda *_, **settings: settings)
    config = memory.Config(model=str(tmp_path), lora_rank=3, lora_targets=("q_proj",), quantize="nf4")
    found = memory.of_config(config)
    assert jax.tree.map(jnp.shape, found["params"]) == {
        "layers": {"self_attn": {"q_proj": {"lora_a": (2, 32, 3), "lora_b": (2, 3, 32)}}}
    }
    kernel = found["frozen"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert (kernel.qvalue.dtype, kernel.qvalue.shape) == (jnp.uint4, (2, 32, 48))


@pytest.mark.slow
def test_the_command_prints_the_plan_of_a_model_whose_weights_it_does_not_read(tmp_path, capsys):
    testing.tiny_hf_config("qwen3").save_pretrained(tmp_path)
    config = memory.Config(
        model=str(tmp_path), prompts_per_step=2, group_size=2, max_prompt_tokens=8, max_tokens=8, beta=0.1,
        device_gib=1e-4,
    )  # fmt: skip
    found = memory.main(config)
    printed = capsys.readouterr().out
    assert "2 prompts x 2, 8 + 8 tokens, bfloat16, on cpu" in printed
    assert f"parameters{memory.gib(found.parameters):>22}" in printed
    assert f"peak of a step{memory.gib(found.peak):>18}" in printed
    assert "prompts that fit into 0.1 MiB in one piece: 0" in printed
    assert "2 prompts do not fit: one prompt at a time takes" in printed


def test_rows_that_leave_chips_idle_are_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(memory, "mesh_of", lambda config: jax.sharding.AbstractMesh((1, 4, 1), sharding.AXES))
    with pytest.raises(ValueError, match=r"3 prompts at a time x 3 completions do not divide over data=1, fsdp=4"):
        memory.main(memory.Config(model="none", prompts_per_step=6, group_size=3, micro_batches=2))


@pytest.mark.parametrize(("name", "layers"), [("google/gemma-3-4b-it", 34), ("openai/gpt-oss-20b", 24)])
def test_what_can_be_loaded_can_be_planned_though_its_config_is_of_more_or_of_codes(
    name, layers, tmp_path, monkeypatch
):
    (tmp_path / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    monkeypatch.setattr(memory, "planned", lambda policy, *_, **settings: policy)
    with warnings.catch_warnings(action="ignore"):  # of images that nothing here sees
        assert memory.of_config(memory.Config(model=str(tmp_path))).config.num_layers == layers
