"""The balance of experts beside transformers' own loss and its gradient, in torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402

from grpo_jax import losses, packing  # noqa: E402
from grpo_jax.models import hf  # noqa: E402
from grpo_jax.run.objective import ObjectiveSettings  # noqa: E402
from grpo_jax.scoring import score  # noqa: E402
from grpo_jax.testing import tiny_checkpoint  # noqa: E402
from grpo_jax.types import Experience, Prompts, Rollout  # noqa: E402

LENGTHS = np.array([[7, 2, 3], [1, 4, 5]])
B, G, T = 2, 3, 7
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model of ours and of torch, and a rollout whose prompts are one token, which is read with the completion."""
    sizes = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None, "intermediate_size": 16}
    folder = tiny_checkpoint(tmp_path_factory.mktemp("base") / "mixtral", "mixtral", **sizes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rng = np.random.default_rng(0)
    mask = np.arange(T) < LENGTHS[..., None]
    tokens = np.where(mask, rng.integers(3, 250, (B, G, T)), 0)
    prompts = Prompts(jnp.asarray(rng.integers(3, 250, (B, 1)), jnp.int32), jnp.ones(B, jnp.int32))
    rollout = Rollout(prompts, tokens, LENGTHS, mask, np.zeros((B, G, T)), np.zeros((B, G), bool))
    return *hf.load_pretrained(folder), model, jax.tree.map(jnp.asarray, rollout)


def gate_logits(model, rollout):
    """Of each layer, of the tokens that were read: the prompt's and the completion's but the last."""
    first = np.broadcast_to(np.asarray(rollout.prompts.tokens)[:, None], (B, G, 1))
    read = np.concatenate([first, np.asarray(rollout.tokens)[..., :-1]], -1).reshape(B * G, T)
    out = model(torch.tensor(read).long(), attention_mask=torch.tensor(read) >= 0, output_router_logits=True)
    return out.router_logits, torch.tensor(np.asarray(rollout.mask).reshape(B * G, T)).float()


@pytest.mark.parametrize("by_layer", [False, True])
def test_its_value_and_its_gradient_are_those_of_transformers(both, by_layer):
    policy, params, model, rollout = both
    logits, mask = gate_logits(model, rollout)
    of = [logits] if not by_layer else [(of_layer,) for of_layer in logits]
    expected = sum(load_balancing_loss_func(x, 5, 2, mask) for x in of) / len(of)
    weight = model.model.layers[0].mlp.gate.weight
    (gradient,) = torch.autograd.grad(expected, weight)
    loss = losses.load_balance(0.3, by_layer=by_layer)

    def value(params):
        terms, metrics = loss(score(policy, params, rollout), Experience(rollout))
        return losses.value(terms), metrics

    (found, metrics), gradients = jit(jax.value_and_grad(value, has_aux=True))(params)
    assert float(expected.detach()) > 2.05  # an even load would make it 2
    np.testing.assert_allclose(found, 0.3 * expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(metrics["load_balance"].sum / metrics["load_balance"].count, found / 0.3, rtol=1e-6)
    ours = gradients["layers"]["mlp"]["router"][0].T
    assert np.max(np.abs(gradient.numpy())) > 1e-3
    np.testing.assert_allclose(ours, 0.3 * gradient.numpy(), rtol=1e-3, atol=1e-6)

    chosen = np.stack([x.detach().topk(2, dim=-1).indices.numpy()[mask.flatten() > 0] for x in logits])
    loads = np.stack([np.bincount(x.ravel(), minlength=5) for x in chosen])
    np.testing.assert_allclose(
        metrics["expert_load_max"].value, np.max(loads / loads.mean(1, keepdims=True)), rtol=1e-6
    )
    assert metrics["experts_idle"].sum == np.sum(loads == 0)


def test_packed_completions_have_the_same_loads(both):
    policy, params, _, rollout = both
    packed = packing.pack(rollout, multiple=2)
    whole, in_rows = (score(policy, params, rollout, packing=x).routers for x in (None, packed))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), in_rows, whole)
    assert np.sum(whole.choices) == 2 * 2 * LENGTHS.sum()


def test_beside_an_objective_it_is_one_more_term_with_its_metrics(both):
    policy, params, _, rollout = both
    scores, experience = score(policy, params, rollout), Experience(rollout)
    values = [losses.value(loss(scores, experience)[0]) for loss in (losses.sft(), losses.load_balance(0.3))]
    loss = ObjectiveSettings(loss="sft", load_balance=0.3).make_loss(max_tokens=T)  # grpo.py's, by `losses.plus`
    terms, metrics = loss(scores, experience)
    assert abs(values[1]) > 0.5
    np.testing.assert_allclose(losses.value(terms), sum(values), rtol=1e-6)
    assert metrics.keys() == {"load_balance", "expert_load_max", "experts_idle"}  # sft has none


def test_a_policy_without_experts_is_refused():
    from grpo_jax.types import Scores

    with pytest.raises(ValueError, match="load_balance is for a mixture of experts"):
        losses.load_balance()(Scores(jnp.zeros((1, 1, 1))), Experience(None))
