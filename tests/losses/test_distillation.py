"""Distillation: divergences and their gradients in NumPy float64, and a teacher behind `score` and the step."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import advantages, losses, sampling
from grpo_jax.losses import (
    distill,
    distill_top,
    forward_kl,
    generalised_jsd,
    of_top_k,
    plus,
    reinforce,
    reverse_kl,
    sampled_reverse_kl,
    token_mean,
)
from grpo_jax.policies import from_logits_fn
from grpo_jax.scoring import Teacher, likeliest, score
from grpo_jax.statistics import Mean, summary
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Experience, Rollout, Scores
from grpo_jax.updates import Updates, init_state

V, B, G, P, T = 11, 4, 2, 4, 5
K = 4


def bigram(params, tokens, mask):
    return params["table"][tokens]


def trigram(params, tokens, mask):
    before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    return params["first"][tokens] + params["second"][before]


STUDENT = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})
TEACHER = from_logits_fn(trigram)
TEACHER_V = TEACHER._replace(unembed=lambda params, hidden: hidden[..., :V])  # without the rows of padding
PARAMS = {"table": jax.random.normal(jax.random.key(0), (V, V))}
# Two rows more than the policy has tokens, as some checkpoints are padded.
TEACHER_PARAMS = {
    "first": 1.5 * jax.random.normal(jax.random.key(1), (V, V + 2)),
    "second": jax.random.normal(jax.random.key(2), (V, V + 2)),
}


# ------------------------------------------------------------- the divergences in NumPy, and their slopes


def kl(a, b):
    return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def jsd(beta):
    def divergence(p, q):
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)

    return divergence


def of_top(divergence, k):
    def of(p, q):
        top = np.argsort(-q)[:k]
        with_rest = [np.append(x[top], 1 - x[top].sum()) for x in (p, q)]
        return divergence(*with_rest)

    return of


DIVERGENCES = {
    "forward_kl": (forward_kl, lambda p, q: kl(q, p)),
    "reverse_kl": (reverse_kl, kl),
    "jsd_half": (generalised_jsd(0.5), jsd(0.5)),
    "jsd_0_1": (generalised_jsd(0.1), jsd(0.1)),
    "jsd_0_9": (generalised_jsd(0.9), jsd(0.9)),
    "forward_kl_of_top": (of_top_k(forward_kl, K), of_top(lambda p, q: kl(q, p), K)),
    "reverse_kl_of_top": (of_top_k(reverse_kl, K), of_top(kl, K)),
    "jsd_of_top": (of_top_k(generalised_jsd(0.3), K), of_top(jsd(0.3), K)),
}
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@every_divergence
def test_value_and_gradient_by_the_logits_match_numpy(name):
    """The gradient as the slope of the NumPy formula, logit by logit."""
    ours, formula = DIVERGENCES[name]
    rng = np.random.default_rng(0)
    logits, theirs = 2 * rng.normal(size=(3, V)), 2 * rng.normal(size=(3, V))
    with jax.enable_x64(True):
        value, pull = jax.vjp(
            lambda x: ours(jax.nn.log_softmax(x), jax.nn.log_softmax(jnp.asarray(theirs))), jnp.asarray(logits)
        )
        (gradient,) = pull(jnp.ones(3))
    for n in range(3):
        q = softmax(theirs[n])
        np.testing.assert_allclose(value[n], formula(softmax(logits[n]), q), rtol=1e-10)
        for v in range(V):
            step = 1e-6 * np.eye(V)[v]
            slope = (formula(softmax(logits[n] + step), q) - formula(softmax(logits[n] - step), q)) / 2e-6
            np.testing.assert_allclose(gradient[n, v], slope, atol=1e-8)


@every_divergence
def test_a_divergence_is_0_at_the_teacher_positive_elsewhere_and_finite_where_tokens_are_ruled_out(name):
    divergence, _ = DIVERGENCES[name]
    rng = np.random.default_rng(1)
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(5, V)), jnp.float32)) for _ in range(2))
    np.testing.assert_allclose(divergence(log_q, log_q), 0.0, atol=2e-6)
    assert np.all(divergence(log_p, log_q) > 0)
    ruled_out = jnp.asarray(rng.normal(size=(5, V)), jnp.float32).at[:, 3].set(-jnp.inf)
    of_both = jax.value_and_grad(lambda x: jnp.sum(divergence(jax.nn.log_softmax(x), jax.nn.log_softmax(ruled_out))))
    value, gradient = of_both(ruled_out + jnp.arange(V))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_the_weighted_divergence_tends_to_the_two_kls_at_its_ends():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        log_p, log_q = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(5, V)))) for _ in range(2))
        np.testing.assert_allclose(generalised_jsd(1e-6)(log_p, log_q) / 1e-6, forward_kl(log_p, log_q), rtol=1e-4)
        near_1 = generalised_jsd(1 - 1e-6)(log_p, log_q)
        np.testing.assert_allclose(near_1 / 1e-6, reverse_kl(log_p, log_q), rtol=1e-4)


def test_the_top_k_is_a_lower_bound_that_rises_with_k():
    rng = np.random.default_rng(3)
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(20, V)), jnp.float32)) for _ in range(2))
    values = [np.asarray(of_top_k(reverse_kl, k)(log_p, log_q)) for k in (1, 3, 6, V - 1)]
    for less, more in zip(values, [*values[1:], np.asarray(reverse_kl(log_p, log_q))], strict=True):
        assert np.all(less <= more + 1e-5)


@pytest.mark.parametrize("beta", [0, 1, -0.5, 2])
def test_refuses_a_beta_at_or_beyond_the_ends(beta):
    with pytest.raises(ValueError, match=f"beta is between 0 and 1, got {beta}"):
        generalised_jsd(beta)


def test_refuses_a_k_out_of_range():
    with pytest.raises(ValueError, match="k is at least 1, got 0"):
        of_top_k(reverse_kl, 0)
    with pytest.raises(ValueError, match=f"k is below the {V} tokens of the vocabulary, got {V}"):
        of_top_k(reverse_kl, V)(jnp.zeros((1, V)), jnp.zeros((1, V)))


# ---------------------------------------------------------------------------------- score


@functools.cache
def rolled_out():
    return sampling.sampler(group_size=G, max_tokens=T, eos_ids=(1,))(
        STUDENT, PARAMS, random_prompts(0, B, P, V), jax.random.key(3)
    )


def numpy_logits(rollout, prompts):
    """Of the student and the teacher for each token of each completion, `[B, G, T, V]`, row by row."""
    ours, theirs = np.zeros((B, G, T, V)), np.zeros((B, G, T, V))
    first, second, table = (np.asarray(x, np.float64) for x in (*TEACHER_PARAMS.values(), PARAMS["table"]))
    for b, g in np.ndindex(B, G):
        own = np.asarray(rollout.prompts.tokens)[b, : rollout.prompts.lengths[b]]
        read = np.asarray(prompts.tokens)[b, : prompts.lengths[b]]
        completion = np.asarray(rollout.tokens)[b, g]
        for t in range(int(rollout.lengths[b, g])):
            before = [*own, *completion[:t]]
            ours[b, g, t] = table[before[-1]]
            of_teacher = [0, *read, *completion[:t]]
            theirs[b, g, t] = (first[of_teacher[-1]] + second[of_teacher[-2]])[:V]
    return ours, theirs


@pytest.mark.parametrize("chunk_tokens", [1, 24, 1000])
@pytest.mark.parametrize("privileged", [False, True])
def test_score_fills_the_divergence_from_the_teacher_of_every_token(chunk_tokens, privileged):
    rollout = rolled_out()
    prompts = random_prompts(7, B, P + 3, V) if privileged else rollout.prompts
    scores = score(
        STUDENT, PARAMS, rollout, temperature=0.8, chunk_tokens=chunk_tokens, teacher=Teacher(TEACHER, reverse_kl),
        teacher_params=TEACHER_PARAMS, teacher_prompts=prompts if privileged else None,
    )  # fmt: skip
    ours, theirs = numpy_logits(rollout, prompts)
    held = np.arange(T) < np.asarray(rollout.lengths)[..., None]
    expected = np.zeros((B, G, T))
    for place in np.argwhere(held):
        expected[tuple(place)] = kl(softmax(ours[tuple(place)] / 0.8), softmax(theirs[tuple(place)] / 0.8))
    np.testing.assert_allclose(scores.divergence, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(scores.log_probs, score(STUDENT, PARAMS, rollout, temperature=0.8).log_probs)


def test_the_gradient_is_through_the_policy_and_not_the_teacher():
    rollout = rolled_out()

    def total(params, teacher_params):
        scores = score(STUDENT, params, rollout, teacher=Teacher(TEACHER, forward_kl), teacher_params=teacher_params)
        return losses.value(distill(0.5)(scores, Experience(rollout))[0])

    ours, theirs = jax.grad(total, (0, 1))(PARAMS, TEACHER_PARAMS)
    assert all(np.all(x == 0) for x in jax.tree.leaves(theirs))
    logits, of_teacher = numpy_logits(rollout, rollout.prompts)
    expected, count = np.zeros((V, V)), int(np.sum(rollout.lengths))
    for b, g in np.ndindex(B, G):
        before = int(rollout.prompts.tokens[b, rollout.prompts.lengths[b] - 1])
        for t in range(int(rollout.lengths[b, g])):
            expected[before] += 0.5 * (softmax(logits[b, g, t]) - softmax(of_teacher[b, g, t])) / count
            before = int(rollout.tokens[b, g, t])
    np.testing.assert_allclose(ours["table"], expected, atol=1e-6)


# ---------------------------------------------------------------------------------- losses


def test_the_sampled_form_has_the_reverse_kl_as_its_expected_gradient():
    """Over every token that may be drawn: the score function times `log q - log p` is minus the slope of KL(p || q)."""
    rng = np.random.default_rng(5)
    logits, log_q = rng.normal(size=V), np.log(softmax(rng.normal(size=V)))
    rollout = rolled_out()._replace(
        tokens=jnp.zeros((1, V, 1), jnp.int32), lengths=jnp.ones((1, V), jnp.int32), mask=jnp.ones((1, V, 1), bool)
    )
    experience = Experience(rollout, ref_log_probs=jnp.asarray(log_q)[None, :, None])

    def loss(logits):
        log_p = jax.nn.log_softmax(logits)
        with_each = experience._replace(old_log_probs=jax.lax.stop_gradient(log_p)[None, :, None])
        probability = jax.lax.stop_gradient(jnp.exp(log_p))

        def weighted(x, mask):
            return token_mean(x * V * probability[None, :, None], mask)

        terms, metrics = sampled_reverse_kl(aggregate=weighted)(Scores(log_p[None, :, None]), with_each)
        return losses.value(terms), metrics

    gradient, metrics = jax.grad(loss, has_aux=True)(jnp.asarray(logits, jnp.float32))
    slope = jax.grad(lambda x: reverse_kl(jax.nn.log_softmax(x), jnp.asarray(log_q, jnp.float32)))(
        jnp.asarray(logits, jnp.float32)
    )
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    np.testing.assert_allclose(summary(metrics)["reverse_kl"], np.mean(np.log(softmax(logits)) - log_q), rtol=1e-4)


def test_refuses_a_coefficient_below_0_and_scores_without_what_is_needed():
    with pytest.raises(ValueError, match="coefficient is at least 0, got -1"):
        distill(-1)
    with pytest.raises(ValueError, match="coefficient is at least 0, got -2"):
        sampled_reverse_kl(-2)
    rollout = rolled_out()
    scores = score(STUDENT, PARAMS, rollout)
    with pytest.raises(ValueError, match="teacher=Teacher"):
        distill()(scores, Experience(rollout))
    with pytest.raises(ValueError, match="ref_log_probs"):
        sampled_reverse_kl()(scores, Experience(rollout))


# ---------------------------------------------------------------------------------- the step


def reward(rollout):
    share = jnp.sum((rollout.tokens == 2) & rollout.mask, axis=-1) / rollout.lengths
    return share[..., None], jnp.ones((*share.shape, 1), bool)


FORMS = {  # loss, divergence, advantage
    "whole": (distill(), reverse_kl, None),
    "forward_of_top": (distill(), of_top_k(forward_kl, K), None),
    "jsd": (distill(4.0), generalised_jsd(0.5), None),
    "sampled": (reinforce(aggregate=token_mean), None, advantages.distillation_advantages()),
    "beside_a_reward": (plus(losses.grpo(), sampled_reverse_kl()), None, advantages.from_rewards()),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_policy_comes_nearer_to_its_teacher(name):
    """On its own samples, in one jitted program a step, with minibatches and micro-batches."""
    loss, divergence, advantage = FORMS[name]
    optimizer = optax.adam(0.1)
    teacher = {"table": 2.0 * jax.random.normal(jax.random.key(9), (V, V))}
    step = make_train_step(
        STUDENT, optimizer, sampling.sampler(group_size=G, max_tokens=T, eos_ids=(1,)), reward=reward, loss=loss,
        advantage=advantage, updates=Updates(minibatches=2, micro_batches=2), teacher=Teacher(STUDENT, divergence),
    )  # fmt: skip
    state = init_state(PARAMS, optimizer, jax.random.key(4))._replace(ref_params=teacher)
    run = jax.jit(step)

    def distance(params):
        return float(jnp.mean(reverse_kl(jax.nn.log_softmax(params["table"]), jax.nn.log_softmax(teacher["table"]))))

    for n in range(30):
        state, metrics = run(state, random_prompts(n, B, P, V))
    assert distance(state.params) < 0.7 * distance(PARAMS)
    assert ("divergence" in metrics) == (divergence is not None)
    np.testing.assert_array_equal(state.ref_params["table"], teacher["table"])


def test_a_teacher_without_params_is_refused():
    learn = make_learn(STUDENT, optax.sgd(1.0), loss=distill(), teacher=Teacher(TEACHER, reverse_kl))
    with pytest.raises(ValueError, match="a teacher's params are the state's ref_params"):
        learn(init_state(PARAMS, optax.sgd(1.0), jax.random.key(0)), Experience(rolled_out()))


def test_a_whole_teacher_of_the_same_network_is_read_without_what_the_policy_has_frozen():
    """Such as that of a policy that trains adapters or a part of its params."""
    policy = from_logits_fn(lambda params, tokens, mask: params["table"][tokens] + params["bias"])
    keys = jax.random.split(jax.random.key(8), 3)
    bias, *teacher = (jax.random.normal(key, shape) for key, shape in zip(keys, [(V,), (V, V), (V,)], strict=True))
    whole = dict(zip(("table", "bias"), teacher, strict=True))
    learn = jax.jit(make_learn(policy, optax.sgd(1.0), loss=distill(), teacher=Teacher(policy, reverse_kl)))
    seen = []
    for params, frozen in ((PARAMS | {"bias": bias}, None), (PARAMS, {"bias": bias})):
        state = init_state(params, optax.sgd(1.0), jax.random.key(0), frozen=frozen)._replace(ref_params=whole)
        seen.append(summary(learn(state, Experience(rolled_out()))[1])["divergence"])
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-6)


def test_the_teacher_reads_its_own_prompts_where_the_experience_has_some():
    """Both for the sampled token and for the whole divergence; the policy's own log-probs stay what they are."""
    rollout = rolled_out()

    def look(scores, experience):
        terms, _ = distill()(scores, experience)
        sums = {"ref": experience.ref_log_probs, "own": scores.log_probs, "divergence": scores.divergence}
        return terms, {name: Mean(jnp.sum(x), jnp.ones(())) for name, x in sums.items()}

    learn = make_learn(STUDENT, optax.sgd(1.0), loss=look, teacher=Teacher(TEACHER, reverse_kl))
    state = init_state(PARAMS, optax.sgd(1.0), jax.random.key(0))._replace(ref_params=TEACHER_PARAMS)
    prompts = random_prompts(8, B, P + 2, V)
    _, metrics = learn(state, Experience(rollout, teacher_prompts=prompts))
    seen = summary(metrics)
    moved = score(TEACHER, TEACHER_PARAMS, rollout._replace(prompts=prompts)).log_probs
    np.testing.assert_allclose(seen["ref"], np.sum(moved), rtol=1e-5)
    own = score(STUDENT, PARAMS, rollout, teacher=Teacher(TEACHER, reverse_kl), teacher_params=TEACHER_PARAMS)
    np.testing.assert_allclose(seen["own"], np.sum(own.log_probs), rtol=1e-5)
    assert abs(seen["divergence"] - np.sum(own.divergence)) > 0.1


@pytest.mark.parametrize("chunk_tokens", [8, 1000])
def test_a_top_that_was_computed_before_is_that_of_the_teacher_in_memory(chunk_tokens):
    """Value and gradient, on the mask that a transform leaves."""
    rollout = rolled_out()
    rollout = rollout._replace(mask=rollout.mask.at[0, 0].set(False))
    top = likeliest(TEACHER_V, TEACHER_PARAMS, rollout, K, temperature=0.8, chunk_tokens=chunk_tokens)
    held = np.arange(T) < np.asarray(rollout.lengths)[..., None]
    _, theirs = numpy_logits(rollout, rollout.prompts)
    for place in map(tuple, np.argwhere(held)):
        order = np.argsort(-theirs[place])[:K]
        np.testing.assert_array_equal(top.tokens[place], order)
        np.testing.assert_allclose(top.log_probs[place], np.log(softmax(theirs[place] / 0.8))[order], rtol=1e-4)

    def before(params):
        scores = score(STUDENT, params, rollout, temperature=0.8, chunk_tokens=chunk_tokens, top_tokens=top.tokens)
        return losses.value(distill_top(reverse_kl, 0.5)(scores, Experience(rollout, teacher_top=top))[0])

    def in_memory(params):
        teacher = Teacher(TEACHER_V, of_top_k(reverse_kl, K))
        scores = score(STUDENT, params, rollout, temperature=0.8, teacher=teacher, teacher_params=TEACHER_PARAMS)
        return losses.value(distill(0.5)(scores, Experience(rollout))[0])

    (a, of_a), (b, of_b) = (jax.value_and_grad(f)(PARAMS) for f in (before, in_memory))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(of_a["table"], of_b["table"], atol=1e-6)


def test_the_step_scores_the_tokens_of_a_top_that_the_experience_brings():
    rollout = rolled_out()
    top = likeliest(TEACHER_V, TEACHER_PARAMS, rollout, K)
    learn = make_learn(STUDENT, optax.sgd(0.5), loss=distill_top(forward_kl), updates=Updates(micro_batches=2))
    state = init_state(PARAMS, optax.sgd(0.5), jax.random.key(0))
    first = None
    for _ in range(3):
        state, metrics = learn(state, Experience(rollout, teacher_top=top))
        first = summary(metrics)["divergence"] if first is None else first
    assert summary(metrics)["divergence"] < first
    with pytest.raises(ValueError, match="teacher_top"):
        learn(state, Experience(rollout))


# ------------------------------------------------------------------------------- TRL's numbers

with np.load(Path(__file__).parents[1] / "golden" / "trl_distillation" / "divergences.npz") as file:
    TRL = {name: file[name] for name in file.files}
TRL_CASES = sorted({tuple(name.split("/")[1:3]) for name in TRL if name.startswith("case/")})
HEAD = from_logits_fn(lambda params, tokens, mask: params["hidden"])._replace(
    extend=lambda params, tokens, positions, prompt_cache, cache=None, segments=None: (params["hidden"], None),
    unembed=lambda params, hidden: hidden @ params["head"].T,
)


@pytest.mark.parametrize(("beta", "temperature"), TRL_CASES)
def test_the_loss_and_its_gradients_are_those_of_trl(beta, temperature):
    """TRL computes in float32. Its ends are the two KLs themselves."""
    divergence = {"0.0": forward_kl, "1.0": reverse_kl}.get(beta) or generalised_jsd(float(beta))
    mask = jnp.asarray(TRL["mask"])[:, None]
    B, _, T = mask.shape
    prompts = random_prompts(0, B, P, V)
    tokens, lengths = jnp.zeros((B, 1, T), jnp.int32), jnp.full((B, 1), T)
    rollout = Rollout(prompts, tokens, lengths, mask, jnp.zeros(mask.shape), lengths == T)
    student, teacher = (
        {part: jnp.asarray(TRL[f"inputs/{who}_{part}"], jnp.float32) for part in ("hidden", "head")}
        for who in ("student", "teacher")
    )
    student["hidden"], teacher["hidden"] = student["hidden"][:, None], teacher["hidden"][:, None]

    def loss(params):
        scores = score(
            HEAD, params, rollout, temperature=float(temperature), chunk_tokens=4, teacher=Teacher(HEAD, divergence),
            teacher_params=teacher,
        )  # fmt: skip
        return losses.value(distill()(scores, Experience(rollout))[0])

    value, gradient = jax.value_and_grad(loss)(student)
    case = f"case/{beta}/{temperature}"
    np.testing.assert_allclose(value, TRL[f"{case}/loss"], rtol=2e-6)
    np.testing.assert_allclose(gradient["hidden"][:, 0], TRL[f"{case}/by_hidden"], atol=1e-6)
    np.testing.assert_allclose(gradient["head"], TRL[f"{case}/by_head"], atol=1e-6)


def test_every_case_of_trl_is_compared():
    assert len(TRL_CASES) == 10
