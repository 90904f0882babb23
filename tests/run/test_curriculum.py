"""Curricula: what is observed, what follows for the weights, what is drawn, and that all of it survives a restart."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.run import checkpoint, curriculum
from grpo_jax.updates import init_state

TRANSFORMS = pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])


def observed(rates, times=50):
    """A curriculum in which row n was solved at `rates[n]`, `times` times."""
    state = curriculum.init(len(rates))
    for _ in range(times):
        state = curriculum.observe(state, jnp.arange(len(rates)), jnp.array(rates, jnp.float32))
    return state


# ---------------------------------------------------------------------------- observed


@settings(deadline=None, max_examples=30)
@given(
    history=st.lists(
        st.lists(
            st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 1.0]), st.booleans()), min_size=3, max_size=3
        ),
        max_size=5,
    ),
    decay=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
def test_the_solve_rate_is_the_decayed_mean_of_what_was_seen_and_one_half(history, decay):
    """Written out for each row: its own observations, each discounted by how many of its later steps there were."""
    state = curriculum.init(5)
    for step in history:
        rows, rates, mask = zip(*step, strict=True)
        state = curriculum.observe(state, jnp.array(rows), jnp.array(rates), jnp.array(mask), decay=decay)
    expected = []
    for row in range(5):
        seen = [[rate for n, rate, known in step if n == row and known] for step in history]
        seen = [rates for rates in seen if rates][::-1]
        solved = sum(decay**age * sum(rates) for age, rates in enumerate(seen))
        count = sum(decay**age * len(rates) for age, rates in enumerate(seen))
        expected.append((solved + 0.5) / (count + 1))
    np.testing.assert_allclose(curriculum.solve_rates(state), expected, rtol=1e-5)


def test_a_rate_that_could_not_be_told_is_left_out_even_if_it_is_nan():
    before = observed([0.5, 0.5])
    after = curriculum.observe(before, jnp.array([0, 1]), jnp.array([jnp.nan, 1.0]), jnp.array([False, True]))
    assert (after.solved[0], after.seen[0]) == (before.solved[0], before.seen[0])
    assert curriculum.solve_rates(after)[1] > 0.55


def test_recent_observations_count_more():
    """A row that was learned is soon taken for learned."""
    state = observed([0.0])
    for _ in range(10):
        state = curriculum.observe(state, jnp.array([0]), jnp.array([1.0]))
    assert curriculum.solve_rates(state)[0] > 0.8


def test_a_larger_prior_keeps_a_row_in_doubt_for_longer():
    once = curriculum.observe(curriculum.init(1), jnp.array([0]), jnp.array([1.0]))
    np.testing.assert_allclose(curriculum.solve_rates(once, prior=1.0), [0.75])
    np.testing.assert_allclose(curriculum.solve_rates(once, prior=9.0), [0.55])


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay is from 0 to 1, got"):
        curriculum.observe(curriculum.init(2), jnp.array([0]), jnp.array([1.0]), decay=decay)


def test_observations_of_other_shapes_are_refused():
    with pytest.raises(AssertionError):
        curriculum.observe(curriculum.init(2), jnp.array([0, 1]), jnp.array([1.0]))
    with pytest.raises(AssertionError):
        curriculum.observe(curriculum.init(2), jnp.array([0, 1]), jnp.array([1.0, 0.0]), jnp.array([True]))


# ----------------------------------------------------------------------------- weights


@TRANSFORMS
def test_weights_are_the_variance_of_success_plus_the_floor(transform):
    rates = [0.0, 0.1, 0.5, 0.9, 1.0]
    state = observed(rates)
    smoothed = [(rate * float(state.seen[0]) + 0.5) / (float(state.seen[0]) + 1) for rate in rates]
    expected = np.array([p * (1 - p) + 0.02 for p in smoothed])
    np.testing.assert_allclose(transform(curriculum.weights)(state), expected / expected.sum(), rtol=1e-5)


def test_rows_that_are_always_or_never_solved_get_less_weight():
    never, seldom, half, often, always, unseen = curriculum.weights(
        curriculum.observe(observed([0, 0.2, 0.5, 0.8, 1, 0.5]), jnp.array([0]), jnp.array([0.0]))
    )
    assert never < seldom < half
    assert always < often < half
    np.testing.assert_allclose(half, unseen)
    assert half > 2.5 * max(never, always)
    assert min(never, always) > 0


def test_rows_that_were_never_seen_weigh_as_much_as_a_row_can():
    state = curriculum.observe(curriculum.init(3), jnp.array([0]), jnp.array([0.5]))
    np.testing.assert_allclose(curriculum.weights(state), np.full(3, 1 / 3), rtol=1e-6)


def test_a_higher_floor_evens_out_the_weights():
    state = observed([0.0, 0.5])
    low, high = (curriculum.weights(state, floor=floor)[0] for floor in (0.01, 1.0))
    assert low < 0.3 < high < 0.5


@pytest.mark.parametrize("floor", [0.0, -1.0])
def test_a_floor_that_would_retire_rows_for_good_is_refused(floor):
    with pytest.raises(ValueError, match="floor is above 0"):
        curriculum.weights(curriculum.init(2), floor=floor)


# ------------------------------------------------------------------------------- drawn


@TRANSFORMS
def test_the_rows_of_a_batch_are_different_and_follow_from_the_key(transform):
    draw = transform(lambda state, key: curriculum.rows(state, key, 6))
    state = observed([0.0, 0.5, 1.0] * 4)
    once, again, other = (draw(state, jax.random.key(seed)).tolist() for seed in (3, 3, 4))
    assert once == again
    assert once != other
    assert len(set(once)) == 6
    assert draw(state, jax.random.key(3)).dtype == jnp.int32


def test_rows_are_drawn_as_often_as_their_weights_say():
    state = observed([0.0, 0.3, 0.5, 1.0])
    draws = 20_000
    one = jax.jit(jax.vmap(lambda key: curriculum.rows(state, key, 1)[0]))
    drawn = one(jax.random.split(jax.random.key(0), draws))
    expected = np.asarray(curriculum.weights(state))
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(np.bincount(drawn, minlength=4) / draws - expected) < 4 * deviation).all()


def test_a_whole_data_set_can_be_a_batch_and_no_more():
    assert sorted(curriculum.rows(observed([0.0, 0.5, 1.0]), jax.random.key(0), 3).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="a batch of 4 different rows is more than the 3 there are"):
        curriculum.rows(curriculum.init(3), jax.random.key(0), 4)


def test_a_curriculum_finds_the_rows_that_can_be_learned():
    """Of 100 rows, ten are sometimes solved, the others always or never; a few passes over the rows tell which."""
    rates = jnp.where(jnp.arange(100) < 10, 0.5, jnp.arange(100) % 2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, key):
        first, second = jax.random.split(key)
        chosen = curriculum.rows(state, first, 8)
        solved = jax.random.binomial(second, 8, rates[chosen]) / 8
        return curriculum.observe(state, chosen, solved), chosen

    state, drawn = curriculum.init(100), []
    for n in range(150):
        state, chosen = step(state, jax.random.fold_in(jax.random.key(0), n))
        drawn.append(np.asarray(chosen))
    share = np.mean(np.stack(drawn[-50:]) < 10)
    assert share > 0.2, share  # 0.1 without a curriculum
    assert len(np.unique(np.stack(drawn))) == 100


# ------------------------------------------------------------------------------ resumed


def test_a_resumed_run_draws_the_rows_that_it_would_have_drawn(tmp_path):
    """Its state is part of the run's, through the checkpoints that runs are saved in."""

    def step(state):
        key = jax.random.fold_in(state.key, state.step)
        chosen = curriculum.rows(state.extra, key, 4)
        solved = (chosen % 3) / 2
        extra = curriculum.observe(state.extra, chosen, solved)
        return state._replace(step=state.step + 1, extra=extra), chosen.tolist()

    def fresh():
        state = init_state({"w": jnp.zeros(2)}, optax.sgd(0.1), jax.random.key(7))
        return state._replace(extra=curriculum.init(12))

    state, drawn = fresh(), []
    for n in range(8):
        if n == 4:
            with checkpoint.manager(tmp_path / "checkpoints") as checkpoints:
                checkpoint.save(checkpoints, state, {})
        state, chosen = step(state)
        drawn.append(chosen)

    with checkpoint.manager(tmp_path / "checkpoints") as checkpoints:
        resumed, _ = checkpoint.restore(checkpoints, fresh())
    assert isinstance(resumed.extra, curriculum.Curriculum)
    for n in range(4, 8):
        resumed, chosen = step(resumed)
        assert chosen == drawn[n]
    chex.assert_trees_all_equal(resumed.extra, state.extra)
