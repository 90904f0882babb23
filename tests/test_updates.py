"""The update and its guard against what is not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.dtypes import issubdtype, prng_key

from grpo_jax import statistics, updates
from grpo_jax.run import memory
from grpo_jax.statistics import Mean
from grpo_jax.updates import Updates, init_state, jit_learn, make_updates, update

OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "schedule": optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1)),
    "masked": optax.masked(optax.adafactor(1e-2), {"layers": {"kernel": True, "bias": False}, "scale": True}),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    tree = {"layers": {"kernel": rng.normal(size=(2, 3, 4)), "bias": np.array([0.5, -0.0, 0.0])}, "scale": rng.normal()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def raw(tree):
    """The bytes of a tree: -0.0 is not 0.0, and NaN is NaN."""
    leaves = (
        jax.random.key_data(x) if issubdtype(x.dtype, prng_key) else x for x in map(jnp.asarray, jax.tree.leaves(tree))
    )
    return [np.asarray(x).tobytes() for x in leaves]


def spoilt(grads, place, number):
    return grads | {"layers": grads["layers"] | {place: grads["layers"][place].at[(0,)].set(number)}}


@every_optimizer
def test_an_update_is_that_of_the_optimizer(name):
    optimizer, params = OPTIMIZERS[name], params_of()
    state, opt_state = init_state(params, optimizer, jax.random.key(0)), optimizer.init(params)
    step = jax.jit(lambda state, grads: update(state, grads, optimizer))
    for seed in range(3):
        grads = params_of(10 + seed)
        state, metrics = step(state, grads)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, changes)
        chex.assert_trees_all_close(state.params, params, rtol=1e-6, atol=1e-7)
        norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(statistics.summary(metrics)["grad_norm"], norm, rtol=1e-6)
        assert statistics.summary(metrics)["skipped"] == 0
    assert state.skipped == 0
    assert state.step == 0  # the step's to count, for it may make several updates


@pytest.mark.parametrize("bound", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_longer_gradient_is_scaled_down_to_the_bound_and_a_shorter_one_left_alone(bound, transform):
    optimizer, params, grads = optax.sgd(1.0), params_of(), params_of(1)
    state = init_state(params, optimizer, jax.random.key(0))
    state, metrics = transform(lambda s, g, b: update(s, g, optimizer, max_grad_norm=b))(state, grads, bound)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
    scale = min(1.0, bound / norm)
    jax.tree.map(
        lambda new, p, g: np.testing.assert_allclose(new, p - scale * np.asarray(g, np.float64), rtol=1e-5, atol=1e-6),
        state.params,
        params,
        grads,
    )
    np.testing.assert_allclose(statistics.summary(metrics)["grad_norm"], norm, rtol=1e-6)  # as it was before


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_refuses_a_bound_that_would_undo_or_reverse_the_gradient(bound):
    optimizer = optax.sgd(1.0)
    state = init_state(params_of(), optimizer, jax.random.key(0))
    with pytest.raises(ValueError, match=f"max_grad_norm is above 0, got {bound}"):
        update(state, params_of(1), optimizer, max_grad_norm=bound)


def test_a_gradient_of_0_is_not_scaled_to_nan():
    optimizer, params = optax.sgd(1.0), params_of()
    state = init_state(params, optimizer, jax.random.key(0))
    state, metrics = update(state, jax.tree.map(jnp.zeros_like, params), optimizer, max_grad_norm=1.0)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert statistics.summary(metrics)["grad_norm"] == 0


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@every_optimizer
def test_an_update_that_is_not_finite_changes_no_bit_and_the_next_is_as_if_it_had_not_been(name, max_grad_norm):
    optimizer, grads = OPTIMIZERS[name], params_of(1)
    step = jax.jit(lambda state, grads, loss: update(state, grads, optimizer, loss=loss, max_grad_norm=max_grad_norm))
    before, _ = step(init_state(params_of(), optimizer, jax.random.key(0)), grads, 0.0)
    assert np.signbit(params_of()["layers"]["bias"][1])
    bad = [
        (spoilt(grads, "kernel", jnp.nan), 0.0),
        (spoilt(grads, "bias", jnp.inf), 0.0),
        (spoilt(grads, "bias", -jnp.inf), 0.0),
        (spoilt(grads, "kernel", 1e30), 0.0),  # the square overflows
        (grads, jnp.nan),
        (grads, jnp.inf),
        (grads, -jnp.inf),
    ]
    state = before
    for refused, (bad_grads, loss) in enumerate(bad * 3, start=1):
        state, metrics = step(state, bad_grads, loss)
        assert raw((state.params, state.opt_state)) == raw((before.params, before.opt_state))
        assert state.skipped == refused
        numbers = statistics.summary(metrics)
        assert numbers["skipped"] == 1
        assert metrics["grad_norm"] == (0, 0)  # a mean of nothing; a NaN would spoil that of the other updates

    recovered, metrics = step(state, grads, 0.0)
    expected, _ = step(before, grads, 0.0)
    assert raw((recovered.params, recovered.opt_state)) == raw((expected.params, expected.opt_state))
    assert raw(recovered.params) != raw(before.params)
    assert recovered.skipped == state.skipped
    assert statistics.summary(metrics)["skipped"] == 0


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw(1e-3, weight_decay=float("nan")), optax.sgd(float("inf")), optax.chain(optax.sgd(3e38), optax.sgd(9))],
    ids=["decay", "rate", "overflow"],
)
def test_finite_gradients_whose_update_is_not_finite_change_no_bit(optimizer, counted):
    before = init_state(params_of(), optimizer, jax.random.key(0))
    state, metrics = jax.jit(lambda s, g: update(s, g, optimizer, counted=counted))(before, params_of(1))
    assert raw((state.params, state.opt_state)) == raw((before.params, before.opt_state))
    assert statistics.summary(metrics)["skipped"] == state.skipped == int(counted)


def test_a_refused_update_keeps_the_sign_of_a_zero():
    """Adding an update of 0 would turn -0.0 into 0.0."""
    optimizer = optax.sgd(1.0)
    params = {"w": jnp.array([-0.0, 0.0, 1e-45, -1e-45])}
    state, _ = update(init_state(params, optimizer, jax.random.key(0)), {"w": jnp.full(4, jnp.nan)}, optimizer)
    assert raw(state.params) == raw(params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_params_keep_their_type(dtype):
    optimizer = optax.adamw(1e-2)
    params = jax.tree.map(lambda x: x.astype(dtype), params_of())
    state, _ = update(init_state(params, optimizer, jax.random.key(0)), params, optimizer, max_grad_norm=1.0)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    assert state.skipped.dtype == jnp.int32


@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_the_norm_of_gradients_in_16_bits_is_taken_in_float32(size):
    """In float16 the square of 1e-4 is 0 and that of 300 infinite."""
    grads = {"w": jnp.full(4, size, jnp.float16)}
    state = init_state({"w": jnp.zeros(4, jnp.float16)}, optax.sgd(1.0), jax.random.key(0))
    state, metrics = update(state, grads, optax.sgd(1.0), max_grad_norm=size)
    np.testing.assert_allclose(statistics.summary(metrics)["grad_norm"], 2 * size, rtol=1e-3)
    np.testing.assert_allclose(state.params["w"], -size / 2, rtol=2e-3)


def test_the_learning_rate_can_be_vmapped():
    params, grads = params_of(), params_of(1)

    def run(learning_rate):
        optimizer = optax.sgd(learning_rate)
        return update(init_state(params, optimizer, jax.random.key(0)), grads, optimizer)[0].params

    rates = jnp.array([0.0, 0.1, 1.0])
    together = jax.jit(jax.vmap(run))(rates)
    separately = jax.tree.map(lambda *x: jnp.stack(x), *map(run, rates))
    chex.assert_trees_all_close(together, separately, rtol=1e-6, atol=1e-7)


def test_the_reference_is_a_copy_that_updates_leave_alone_and_a_donated_state_holds_nothing_twice():
    optimizer, params = optax.adamw(1e-2), params_of()
    original = raw(params)
    state = init_state(params, optimizer, jax.random.key(0), reference=True, extra={"coefficient": jnp.float32(2.0)})
    arrays = [x for x in jax.tree.leaves(state) if not issubdtype(x.dtype, prng_key)]
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)
    step = jax.jit(lambda state, grads: update(state, grads, optimizer)[0], donate_argnums=0)
    for seed in range(3):
        state = step(state, params_of(seed))
    assert params["scale"].is_deleted()  # it was donated indeed
    assert raw(state.ref_params) == original
    assert raw(state.params) != original
    assert state.extra["coefficient"] == 2


def test_without_reference_there_is_none():
    state = init_state(params_of(), optax.sgd(0.1), jax.random.key(0))
    assert state.ref_params is None
    assert (state.step, state.skipped, state.extra) == (0, 0, ())


def test_a_donated_state_is_written_over_with_no_copy_of_it():
    params = {name: jax.ShapeDtypeStruct((256, 256), jnp.float32) for name in "abcdef"}
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(lambda params: init_state(params, optimizer, jax.random.key(0)), params)
    step = jax.jit(lambda state, grads: update(state, grads, optimizer, max_grad_norm=1.0), donate_argnums=0)
    # On CPUs a byte for each number, whether it will be finite, is held; a copy of any part would be four.
    assert memory.beside(step, state, params) < memory.size(params) / 3.9


def test_a_minibatch_without_a_token_that_counts_is_in_no_mean_of_metrics():
    def evaluate(params, state, batch):
        return (Mean(jnp.sum(params["w"] * batch), jnp.sum(batch > 0)),), {}

    optimizer = optax.sgd(0.0)
    state = init_state({"w": jnp.array(3.0)}, optimizer, jax.random.key(0))
    learn = jax.jit(make_updates(evaluate, optimizer, Updates(minibatches=2)))
    numbers = statistics.summary(learn(state, jnp.array([2.0, 0.0]))[1])
    assert (numbers["loss"], numbers["grad_norm"]) == (6.0, 2.0)


def test_learning_is_compiled_to_save_memory_unless_other_options_are_given(monkeypatch):
    monkeypatch.setattr(updates, "saving_memory", lambda: {"no_such_option": True})
    state = init_state({"w": jnp.zeros(2)}, optax.sgd(1.0), jax.random.key(0))
    with pytest.raises(Exception, match="no_such_option"):
        jit_learn(lambda state, batch: (state, {}))(state, ())
    jit_learn(lambda state, batch: (state, {}), compiler_options={})(state, ())
