"""Top-k, top-p and min-p, replayed where tokens are scored: the sampler and the scorer speak of one distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling, statistics
from grpo_jax.policies import from_logits_fn
from grpo_jax.schedules import Scheduled
from grpo_jax.scoring import Teacher, score
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.train_step import make_train_step, truncation_of
from grpo_jax.truncation import Truncation
from grpo_jax.updates import Updates, init_state

B, G, P, T, V = 2, 5, 13, 7, 61
# Nothing but an embedding and a head: its gradient is known.
HEAD = from_logits_fn(lambda params, tokens, mask: params["embed"][tokens])._replace(
    unembed=lambda params, hidden: hidden @ params["head"]
)
HEAD_PARAMS = {
    "embed": jax.random.normal(jax.random.key(2), (V, 32)),
    "head": 0.3 * jax.random.normal(jax.random.key(3), (32, V)),
}
SETTINGS = [
    {"top_k": 9, "top_p": 1.0, "min_p": 1e-6},
    {"top_k": 9, "top_p": 0.7, "min_p": 1e-6},
    {"top_k": 9, "top_p": 1.0, "min_p": 0.3},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.1},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
prompts = random_prompts(0, B, P)


@functools.cache
def decoder():
    policy = tiny_policy("qwen3")
    return policy, jax.jit(policy.init)(jax.random.key(0))


def sampler(**settings):
    return sampling.sampler(group_size=G, max_tokens=T, eos_ids=(1, 5, 9), temperature=0.8, **settings)


def kept_by_definition(probs, drawn, top_k, top_p, min_p):
    """Which tokens of one float64 distribution are kept, told one token after the other; the drawn one always."""
    order, kept, total = np.argsort(-probs)[:top_k], [], 0.0
    within = probs[order].sum()
    for token in order:
        if kept and total / within >= top_p:
            break
        kept.append(token)
        total += probs[token]
    kept = [token for token in kept if probs[token] >= min_p * probs[order[0]]]
    return sorted({*kept, drawn}), drawn not in kept


@every_setting
def test_the_scorer_gives_the_log_probs_that_the_sampler_drew_with(settings):
    policy, params = decoder()
    draw = sampler(**settings)
    rollout = draw(policy, params, prompts, jax.random.key(1))
    scores = score(policy, params, rollout, temperature=0.8, truncation=draw.truncation)
    np.testing.assert_allclose(scores.log_probs, rollout.log_probs, rtol=1e-5, atol=1e-5)
    assert not np.any(scores.outside)
    whole = score(policy, params, rollout, temperature=0.8)
    assert whole.outside is None
    assert np.max(rollout.log_probs - whole.log_probs) > 0.01  # what is left when it is not replayed


@every_setting
def test_scores_and_gradients_under_other_parameters_are_those_of_the_kept_tokens_and_the_one_drawn(settings):
    truncation = Truncation(**settings)
    rollout = sampler()(HEAD, HEAD_PARAMS, prompts, jax.random.key(1))  # of all tokens, so that some fall outside
    params = HEAD_PARAMS | {"head": HEAD_PARAMS["head"] + 0.2 * jax.random.normal(jax.random.key(4), (32, V))}
    last = np.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
    read = np.concatenate([np.broadcast_to(last[:, None], (B, G, 1)), rollout.tokens[..., :-1]], axis=-1)
    logits = np.asarray(params["embed"], np.float64)[read] @ np.asarray(params["head"], np.float64) / 0.8
    expected, of_logits = np.zeros((4, B, G, T)), np.zeros(logits.shape)
    for b, g, t in np.argwhere(np.asarray(rollout.mask)):
        drawn = int(rollout.tokens[b, g, t])
        probs = np.exp(logits[b, g, t])
        kept, outside = kept_by_definition(probs / probs.sum(), drawn, **settings)
        p = probs[kept] / probs[kept].sum()
        expected[:, b, g, t] = np.log(p[kept.index(drawn)]), -p @ np.log(p), p @ p, outside
        of_logits[b, g, t, drawn] = 1
        of_logits[b, g, t, kept] -= p

    (_, scores), gradient = _likelihood(params, truncation, rollout)
    assert 0 < expected[3].sum() < rollout.mask.sum()
    for field, values in zip(("log_probs", "entropy", "collision", "outside"), expected, strict=True):
        np.testing.assert_allclose(getattr(scores, field), values, atol=1e-5, err_msg=field)
    head = np.einsum("bgtd,bgtv->dv", np.asarray(params["embed"], np.float64)[read], of_logits) / 0.8
    np.testing.assert_allclose(gradient["head"], head, atol=2e-4)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def _likelihood(params, truncation, rollout):
    scores = score(HEAD, params, rollout, temperature=0.8, truncation=truncation, chunk_tokens=3 * B * G)
    return jnp.sum(scores.log_probs), scores


def test_a_divergence_and_a_teachers_likeliest_tokens_are_of_whole_distributions():
    rollout = sampler()(HEAD, HEAD_PARAMS, prompts, jax.random.key(1))
    settings = {
        "teacher": Teacher(HEAD, losses.forward_kl),
        "teacher_params": HEAD_PARAMS | {"head": -HEAD_PARAMS["head"]},
        "top_tokens": jnp.broadcast_to(jnp.arange(3), (B, G, T, 3)),
    }
    cut = score(HEAD, HEAD_PARAMS, rollout, truncation=Truncation(top_k=2), **settings)
    whole = score(HEAD, HEAD_PARAMS, rollout, **settings)
    for field in ("divergence", "top_log_probs"):
        np.testing.assert_array_equal(getattr(cut, field), getattr(whole, field))


@pytest.mark.slow
def test_a_step_replays_the_truncation_of_its_sampler_for_policy_and_reference():
    optimizer = optax.sgd(0.0)
    state = init_state(HEAD_PARAMS, optimizer, jax.random.key(0), reference=True)

    def measured(draw, **settings):
        loss = losses.grpo(weight=losses.truncated_importance(10.0), penalty=losses.k3(0.1))
        step = make_train_step(
            HEAD, optimizer, draw, loss=loss, updates=Updates(iterations=2), score_old=True,
            reward=lambda rollout: (rollout.tokens[..., :1].astype(jnp.float32), jnp.ones((B, G, 1), bool)), **settings
        )  # fmt: skip
        experience = jax.jit(step.collect)(state, prompts)
        gap = np.abs(experience.old_log_probs - experience.rollout.log_probs).max()
        return gap, statistics.summary(jax.jit(step.learn)(state, experience)[1])

    cut = sampler(top_p=0.6)
    gap, metrics = measured(Scheduled(lambda step, extra: cut))
    assert gap < 1e-5
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["outside_truncation"] == 0
    gap, metrics = measured(cut, replay_truncation=False)
    assert gap > 0.1
    assert "outside_truncation" not in metrics
    assert truncation_of(cut) == Truncation(top_p=0.6)
    assert truncation_of(sampler()) is None


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}], ids=str)
def test_a_truncation_out_of_range_is_refused(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name} is .*, got {value}; None keeps every token"):
        Truncation(**settings)
