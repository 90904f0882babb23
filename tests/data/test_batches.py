"""Batches as they follow from (seed, step)."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.data import (
    batch_indices,
    batch_rows_by_length,
    bucket,
    make_demonstrations,
    make_prompts,
    pad,
    token_pairs,
)

# ------------------------------------------------------------------- order of the rows


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 12), batch_size=st.integers(1, 30))
def test_every_epoch_has_every_row_once_whatever_the_batches(seed, num_rows, batch_size):
    """Batches that straddle epochs, and batches of several epochs."""
    steps = -(-3 * num_rows // batch_size)
    stream = np.concatenate([batch_indices(seed, step, num_rows, batch_size) for step in range(steps)])
    assert len(stream) == steps * batch_size
    epochs = stream[: 3 * num_rows].reshape(3, num_rows)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_rows), (3, 1)))


@settings(deadline=None)
@given(steps=st.permutations(range(12)), num_rows=st.integers(1, 9))
def test_the_rows_of_a_step_do_not_depend_on_the_steps_before(steps, num_rows):
    in_order = [batch_indices(0, step, num_rows, 4).tolist() for step in range(12)]
    assert [batch_indices(0, step, num_rows, 4).tolist() for step in steps] == [in_order[step] for step in steps]


def test_the_rows_of_a_step_are_the_same_in_every_version():
    """Else a run that was killed goes on in another order after an upgrade. Made with NumPy 2.4.6."""
    assert batch_indices(3, 1, 5, 7).tolist() == [0, 2, 3, 4, 0, 1, 2]


def test_epochs_have_orders_of_their_own():
    first, second = (batch_indices(0, epoch, 50, 50) for epoch in (0, 1))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(50))


def test_seeds_have_orders_of_their_own():
    """Also where another seed is no other epoch."""
    orders = {tuple(batch_indices(seed, epoch, 50, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    window=st.integers(1, 5),
)
def test_batches_of_like_length_have_the_rows_that_batches_in_order_have(lengths, batch_size, window):
    """Over a window; so every row still comes once an epoch, however the windows and epochs lie."""
    for start in range(0, 4 * window, window):
        steps = range(start, start + window)
        sorted_ = [batch_rows_by_length(5, step, lengths, batch_size, window=window) for step in steps]
        plain = [batch_indices(5, step, len(lengths), batch_size) for step in steps]
        assert sorted(np.concatenate(sorted_).tolist()) == sorted(np.concatenate(plain).tolist())
        assert all(rows.shape == (batch_size,) for rows in sorted_)


def test_batches_of_like_length_have_less_padding_and_come_in_no_order_of_length():
    lengths = np.random.default_rng(0).integers(1, 1000, 640)

    def widest(rows):
        return np.array([lengths[batch].max() for batch in rows])

    plain = widest([batch_indices(0, step, 640, 8) for step in range(80)])
    alike = widest([batch_rows_by_length(0, step, lengths, 8, window=16) for step in range(80)])
    assert plain.sum() > 1.6 * alike.sum()  # the least there can be is the mean length, about half of the maximum
    for window in alike.reshape(5, 16):
        assert sorted(window) != window.tolist() != sorted(window)[::-1]
    assert len({tuple(np.argsort(window)) for window in alike.reshape(5, 16)}) == 5


def test_batches_of_like_length_follow_from_seed_and_step():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    batches = {step: batch_rows_by_length(2, step, lengths, 3, window=4).tolist() for step in range(12)}
    for step in (11, 0, 7, 3):
        assert batch_rows_by_length(2, step, lengths, 3, window=4).tolist() == batches[step]
    other = {step: batch_rows_by_length(3, step, lengths, 3, window=4).tolist() for step in range(12)}
    assert other != batches


def test_a_window_of_one_step_is_sorted_and_otherwise_as_it_was():
    assert sorted(batch_rows_by_length(0, 4, [1] * 9, 3, window=1)) == sorted(batch_indices(0, 4, 9, 3))
    with pytest.raises(ValueError, match="window is a number of steps, from 1 on, got 0"):
        batch_rows_by_length(0, 4, [1] * 9, 3, window=0)


# ------------------------------------------------------------------------- batches


def test_widths_are_rounded_up_to_a_multiple():
    assert [bucket(n, 16) for n in (1, 15, 16, 17, 32)] == [16, 16, 16, 32, 32]
    assert bucket(7, 1) == 7


def test_sequences_are_padded_on_the_right():
    padded = pad([[5, 6, 7], [], [8]], 4)
    assert padded.dtype == np.int32
    assert padded.tolist() == [[5, 6, 7, 0], [0, 0, 0, 0], [8, 0, 0, 0]]


def test_a_sequence_wider_than_the_batch_is_refused():
    with pytest.raises(ValueError, match="a sequence has 3 tokens, more than the width of 2"):
        pad([[1], [1, 2, 3]], 2)


@pytest.mark.parametrize(("multiple", "width"), [(1, 3), (4, 4), (16, 16)])
def test_a_batch_of_prompts_has_tokens_lengths_and_rows(multiple, width):
    prompts = make_prompts([[5, 6, 7], [8]], rows=[40, 7], multiple=multiple)
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), prompts) == (
        ((2, width), "int32"),
        ((2,), "int32"),
        {"row": ((2,), "int32")},
    )
    np.testing.assert_array_equal(prompts.tokens, pad([[5, 6, 7], [8]], width))
    assert prompts.lengths.tolist() == [3, 1]
    assert prompts.info["row"].tolist() == [40, 7]


def test_a_batch_without_rows_says_nothing_of_them():
    assert make_prompts([[1]]).info == {}


@pytest.mark.parametrize("prompts", [[], [[1], []]], ids=["no prompt", "an empty prompt"])
def test_a_batch_that_nothing_can_be_sampled_from_is_refused(prompts):
    with pytest.raises(ValueError, match="at least one prompt, and each at least one token"):
        make_prompts(prompts)


def test_rows_that_are_not_one_a_prompt_are_refused():
    with pytest.raises(ValueError, match="3 rows for 2 prompts"):
        make_prompts([[1], [2]], rows=[0, 1, 2])


def test_demonstrations_are_a_rollout_of_groups_of_one():
    rollout = make_demonstrations([[5, 6, 7], [8]], [[2, 1], [3, 4, 1]], multiple=4)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), rollout._replace(prompts=None))
    assert shapes == (
        None,
        ((2, 1, 4), "int32"),
        ((2, 1), "int32"),
        ((2, 1, 4), "bool"),
        ((2, 1, 4), "float32"),
        ((2, 1), "bool"),
        None,
        None,
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(rollout))
    assert rollout.prompts.tokens.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert rollout.tokens.tolist() == [[[2, 1, 0, 0]], [[3, 4, 1, 0]]]
    assert rollout.lengths.tolist() == [[2], [3]]
    assert rollout.mask.tolist() == [[[True, True, False, False]], [[True, True, True, False]]]
    assert not rollout.truncated.any()
    assert not rollout.log_probs.any()


def test_demonstrations_can_have_a_width_that_is_always_the_same():
    assert make_demonstrations([[5]], [[2, 1]], max_tokens=9).tokens.shape == (1, 1, 9)
    with pytest.raises(ValueError, match="a sequence has 3 tokens, more than the width of 2"):
        make_demonstrations([[5]], [[2, 3, 1]], max_tokens=2)


def test_demonstrations_need_a_completion_a_prompt():
    with pytest.raises(ValueError, match="1 completions for 2 prompts"):
        make_demonstrations([[5], [6]], [[2, 1]])


def test_token_pairs_are_what_demonstrations_were_made_of_and_cut_each_completion_of_a_group_at_its_length():
    prompts, completions = [[5, 6, 7], [8]], [[2, 1], [0, 4, 0]]
    made = make_demonstrations(prompts, completions, multiple=4)
    assert token_pairs(made) == [[(prompt, ids)] for prompt, ids in zip(prompts, completions, strict=True)]
    group = made._replace(tokens=np.array([[[2, 1, 9], [3, 1, 9]]] * 2), lengths=np.array([[2, 0], [3, 1]]))
    assert token_pairs(group) == [[([5, 6, 7], [2, 1]), ([5, 6, 7], [])], [([8], [2, 1, 9]), ([8], [3])]]
