"""Whole runs as functions, against Python loops over the same steps. The policy is a table of bigrams."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import sampling, statistics
from grpo_jax.losses import grpo, k3
from grpo_jax.policies import from_logits_fn
from grpo_jax.study.runs import make_run, prompt_key, shuffled_rows
from grpo_jax.tasks import modular_sums
from grpo_jax.train_step import make_train_step, step_keys
from grpo_jax.types import TrainState
from grpo_jax.updates import Updates, init_state

V, STEPS, EVERY = modular_sums.VOCABULARY, 6, 2
POLICY = from_logits_fn(
    lambda params, tokens, mask: params["table"][tokens], init=lambda key: {"table": jax.random.normal(key, (V, V))}
)


def even_tokens(rollout):
    """Rewards the share of even tokens: random policies differ in it."""
    even = jnp.sum(rollout.mask & (rollout.tokens % 2 == 0), axis=-1) / jnp.maximum(rollout.lengths, 1)
    return even[..., None], jnp.ones((*even.shape, 1), bool)


def init(key, hyper):
    return init_state(POLICY.init(key), optax.sgd(hyper["learning_rate"]), key, reference=True)


def step(hyper):
    return make_train_step(
        POLICY,
        optax.sgd(hyper["learning_rate"]),
        sampling.sampler(temperature=hyper["temperature"], group_size=4, max_tokens=5, eos_ids=(modular_sums.EOS,)),
        reward=even_tokens,
        loss=grpo(epsilon=hyper["epsilon"], penalty=k3(hyper["beta"])),
        updates=Updates(minibatches=2),
    )


def prompts(key, n, hyper):
    return modular_sums.problems(jax.random.fold_in(key, n), 4, terms=3)


def evaluate(params, hyper):
    return {"norm": jnp.sum(params["table"] ** 2), "rate": hyper["learning_rate"]}


RUN = make_run(init, step, prompts, num_steps=STEPS, evaluate=evaluate, evaluate_every=EVERY)
DEFAULTS = {"learning_rate": 1.0, "beta": 0.3, "epsilon": 0.05, "temperature": 0.9}
# The first is the default; then each number is changed alone, and then the seed.
GRID = [{}, {"learning_rate": 0.1}, {"beta": 0.0}, {"epsilon": 0.4}, {"temperature": 0.5}, {"seed": 1}]
SEEDS = [changed.get("seed", 0) for changed in GRID]
HYPERS = [{name: (DEFAULTS | changed)[name] for name in DEFAULTS} for changed in GRID]


def data(tree):
    """On the host, with keys as the numbers they are made of."""

    def numbers(leaf):
        return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.device_get(jax.tree.map(numbers, tree))


@functools.cache
def separate_runs():
    """`(state, history)` of each run of the grid, one after the other, in a program that is traced once."""
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(lambda key, hyper: RUN(key, hyper), n=1))
    return [data(run(jax.random.key(seed), hyper)) for seed, hyper in zip(SEEDS, HYPERS, strict=True)]


@functools.cache
def looped_run():
    """The first run of the grid as a loop, of steps that are made with Python numbers."""
    hyper, key = HYPERS[0], jax.random.key(SEEDS[0])
    train_step = jax.jit(step(hyper))
    state = init(key, hyper)
    params, numbers = [state.params], []
    for n in range(STEPS):
        assert state.step == n
        state, metrics = train_step(state, prompts(prompt_key(key), n, hyper))
        params.append(state.params)
        numbers.append(statistics.summary(metrics))
    return data((state, params, jax.tree.map(lambda *x: jnp.stack(x), *numbers)))


# ------------------------------------------------------------------------------ one program


def test_a_run_is_the_loop_over_its_steps():
    state, history = separate_runs()[0]
    expected, _, numbers = looped_run()
    chex.assert_trees_all_close(state, expected, rtol=1e-5, atol=1e-6)
    assert history.steps.keys() == numbers.keys() > {"loss", "reward", "kl", "length"}
    chex.assert_trees_all_close(history.steps, numbers, rtol=1e-4, atol=1e-6)
    assert state.step == STEPS
    assert state.skipped == 0


def test_evaluations_are_of_the_start_and_of_the_state_after_each_chunk():
    _, params, _ = looped_run()
    norms = [np.sum(params[n]["table"].astype(np.float64) ** 2) for n in range(0, STEPS + 1, EVERY)]
    assert np.all(np.abs(np.diff(norms)) > 1e-3)  # so that they can be told apart
    _, history = separate_runs()[0]
    np.testing.assert_allclose(history.evaluations["norm"], norms, rtol=1e-6)
    np.testing.assert_array_equal(history.evaluations["rate"], np.ones(1 + STEPS // EVERY, np.float32))
    assert {x.shape for x in history.steps.values()} == {(STEPS,)}


def test_mapped_over_seeds_and_numbers_a_run_is_the_separate_runs():
    """The separate ones are one program, too: `separate_runs` counts its traces."""
    keys = jax.vmap(jax.random.key)(jnp.array(SEEDS))
    hypers = jax.tree.map(lambda *x: jnp.array(x), *HYPERS)
    together = data(jax.jit(jax.vmap(RUN))(keys, hypers))
    for n, alone in enumerate(separate_runs()):
        this = jax.tree.map(operator.itemgetter(n), together)
        chex.assert_trees_all_close(this, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", range(1, len(GRID)), ids=lambda n: next(iter(GRID[n])))
def test_every_number_and_the_seed_have_an_effect(n):
    table, changed = (separate_runs()[i][0].params["table"] for i in (0, n))
    assert np.abs(table - changed).max() > 1e-3


def test_in_chunks_a_run_is_the_same_to_the_bit():
    start, advance = jax.jit(RUN.start), jax.jit(RUN.advance)
    assert (RUN.chunks, RUN.chunk_steps) == (STEPS // EVERY, EVERY)
    hyper = HYPERS[0]
    state, evaluation = start(jax.random.key(SEEDS[0]), hyper)
    evaluations, steps = [evaluation], []
    for chunk in range(RUN.chunks):
        assert state.step == chunk * EVERY
        state, of_chunk, evaluation = advance(state, hyper)
        steps.append(of_chunk)
        evaluations.append(evaluation)
    whole, history = separate_runs()[0]
    chex.assert_trees_all_equal(data(state), whole)
    chex.assert_trees_all_equal(data(jax.tree.map(lambda *x: jnp.concatenate(x), *steps)), history.steps)
    chex.assert_trees_all_equal(data(jax.tree.map(lambda *x: jnp.stack(x), *evaluations)), history.evaluations)


# ------------------------------------------------------------------- of any step and prompts


def toy_run(prompts, *, num_steps, **settings):
    """A run whose step measures what it is given and changes nothing but the number of the step."""
    zero = jnp.zeros((), jnp.int32)
    return make_run(
        lambda key, hyper: TrainState({}, (), key, zero, zero),
        lambda hyper: lambda state, prompts: (state._replace(step=state.step + 1), {"prompts": prompts}),
        prompts,
        num_steps=num_steps,
        **settings,
    )


def test_prompts_may_be_rows_of_a_data_set_that_is_an_argument():
    def rows(key, n, hyper):
        return hyper["rows"][shuffled_rows(key, n, 6, 2)]

    run = jax.jit(toy_run(rows, num_steps=6, evaluate_every=2))
    key = jax.random.key(3)
    _, history = run(key, {"rows": 10 * jnp.arange(6)})
    assert history.evaluations == {}
    seen = history.steps["prompts"]
    assert seen.shape == (6, 2)
    for epoch in seen.reshape(2, 6).tolist():
        assert sorted(epoch) == [0, 10, 20, 30, 40, 50]
    expected = [10 * shuffled_rows(prompt_key(key), n, 6, 2) for n in range(6)]
    np.testing.assert_array_equal(seen, expected)
    _, of_another = run(jax.random.key(4), {"rows": 10 * jnp.arange(6)})
    assert np.any(of_another.steps["prompts"] != seen)


def test_without_a_number_of_its_own_there_is_one_evaluation_at_the_end():
    run = toy_run(lambda key, n, hyper: n, num_steps=4, evaluate=lambda params, hyper: {"x": hyper})
    assert (run.chunks, run.chunk_steps) == (1, 4)
    _, history = run(jax.random.key(0), jnp.float32(0.5))
    assert history.evaluations["x"].tolist() == [0.5, 0.5]
    assert history.steps["prompts"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("num_steps", "every"), [(10, 4), (10, 20), (0, None), (10, 0), (10, -5)])
def test_a_run_that_is_not_made_of_whole_chunks_is_refused(num_steps, every):
    found = f"{num_steps} steps are no multiple of {num_steps if every is None else every}$"
    with pytest.raises(ValueError, match=found):
        toy_run(None, num_steps=num_steps, evaluate_every=every)


# ------------------------------------------------------------------------------------- keys


def test_prompts_are_made_of_keys_that_no_step_uses():
    def keys(step):
        key = jax.random.key(0)
        state = TrainState({}, (), key, step, step)
        of_prompts = prompt_key(key)
        used = [of_prompts, jax.random.fold_in(of_prompts, step), jax.random.fold_in(key, step), *step_keys(state)]
        return jnp.stack([jax.random.key_data(key) for key in used])

    found = np.asarray(jax.jit(jax.vmap(keys))(jnp.arange(1000)))
    assert len(np.unique(found[:, 0], axis=0)) == 1  # the same at every step of a run
    assert len(np.unique(found.reshape(-1, 2), axis=0)) == 1 + 4 * 1000
    assert np.any(data(prompt_key(jax.random.key(1))) != found[0, 0])


def rows_of(size, batch, steps, seed=0):
    key = jax.random.key(seed)
    return np.asarray(jax.jit(jax.vmap(lambda n: shuffled_rows(key, n, size, batch)))(jnp.arange(steps)))


def test_a_row_comes_at_most_once_an_epoch_and_what_is_left_over_comes_in_another():
    rows = rows_of(10, 3, 60)
    assert rows.shape == (60, 3)
    epochs = rows.reshape(20, 9)  # of 3 steps, which leave one row over
    left_over = [set(range(10)) - set(epoch) for epoch in epochs.tolist()]
    assert {len(left) for left in left_over} == {1}
    assert len(set.union(*left_over)) > 5
    assert len({epoch.tobytes() for epoch in epochs}) == 20


def test_rows_are_a_function_of_the_key_and_the_step():
    rows = rows_of(10, 3, 60)
    key = jax.random.key(0)
    for n in (0, 2, 3, 59):
        np.testing.assert_array_equal(shuffled_rows(key, n, 10, 3), rows[n])
    assert np.any(rows_of(10, 3, 60, seed=1) != rows)


@pytest.mark.parametrize("batch", [0, 11])
def test_a_batch_that_the_data_set_cannot_fill_is_refused(batch):
    with pytest.raises(ValueError, match=f"the data set's 10 rows, got {batch}$"):
        shuffled_rows(jax.random.key(0), 0, 10, batch)


# ------------------------------------------------------------------------- a shared base

OVER_A_BASE = from_logits_fn(lambda params, tokens, mask: (params["table"] + params["base"])[tokens])


def over_a_base():
    """Runs that train a table over a base, which `hyper` holds."""
    sampler = sampling.sampler(group_size=4, max_tokens=5, eos_ids=(modular_sums.EOS,))
    return make_run(
        lambda key, hyper: init_state({"table": jnp.zeros((V, V))}, optax.sgd(hyper["learning_rate"]), key),
        lambda hyper: make_train_step(
            OVER_A_BASE, optax.sgd(hyper["learning_rate"]), sampler, reward=even_tokens, loss=grpo()
        ),
        prompts,
        num_steps=STEPS,
        evaluate=lambda params, hyper: {"of the base": params["base"].sum(), "moved": jnp.abs(params["table"]).sum()},
        evaluate_every=EVERY,
        frozen=lambda hyper: {"base": hyper["base"]},
    )


@pytest.mark.slow
def test_runs_that_are_mapped_over_share_one_base_and_are_the_separate_runs():
    run, rates = over_a_base(), jnp.array([1.0, 0.3])
    base = jax.random.normal(jax.random.key(5), (V, V))
    keys = jax.random.split(jax.random.key(0), 2)
    mapped = jax.vmap(run, (0, {"learning_rate": 0, "base": None}))
    states, histories = jax.jit(mapped)(keys, {"learning_rate": rates, "base": base})
    assert states.frozen is None
    assert np.all(histories.evaluations["moved"][:, -1] > 0)
    np.testing.assert_allclose(histories.evaluations["of the base"], np.full((2, 4), base.sum()), rtol=1e-5)
    for i, rate in enumerate(rates):
        state, history = jax.jit(run)(keys[i], {"learning_rate": rate, "base": base})
        np.testing.assert_allclose(states.params["table"][i], state.params["table"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(histories.steps["reward"][i], history.steps["reward"], rtol=1e-5)
