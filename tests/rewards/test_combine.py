"""Several reward functions as one, asynchronous ones, and what TRL's functions expect to be passed."""

import asyncio
import inspect

import numpy as np
import pytest
from test_rewards import DATASET, a_rollout, letters

from grpo_jax import rewards


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def of_some(completions, **kwargs):
    return [None if c.startswith("a") else 2.0 for c in completions]


COMPLETIONS = ["a", "bb", "ccc"]
ROLLOUT = a_rollout([["a", "bb"], ["ccc", "d"], ["e", "ff"]])


def call(function, **columns):
    return function(prompts=["p"] * 3, completions=COMPLETIONS, **columns)


def test_combined_rewards_are_the_weighted_sum_of_what_could_be_given():
    assert call(rewards.combine([length, of_some])) == [1.0, 4.0, 5.0]
    assert call(rewards.combine([length, of_some], weights=[1.0, -0.5])) == [1.0, 1.0, 2.0]
    assert call(rewards.combine([of_some])) == [None, 2.0, 2.0]


def test_each_rewards_mean_and_deviation_is_a_metric():
    found = {}
    call(rewards.combine([length, of_some], weights=[0.1, 0.1]), log_metric=found.__setitem__)
    assert found == {
        "reward/length": 2.0,
        "reward/length_std": pytest.approx(np.std([1, 2, 3])),
        "reward/of_some": 2.0,
        "reward/of_some_std": 0.0,
    }


def test_combined_rewards_get_the_columns_that_they_name():
    def right(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    assert call(rewards.combine([right, length]), answer=["a", "x", "ccc"], other=[1, 2, 3]) == [2.0, 2.0, 4.0]


def test_asynchronous_rewards_wait_together_plain_or_combined():
    """Each waits for the other, so that neither could finish alone."""

    def pair():
        met = []

        async def meet(completions, **kwargs):
            met.append(1)
            for _ in range(1000):
                if len(met) == 2:
                    return [float(len(c)) for c in completions]
                await asyncio.sleep(0.001)
            raise TimeoutError("the other never came")

        return meet

    meet = pair()
    assert call(rewards.combine([meet, meet])) == [2.0, 4.0, 6.0]
    meet = pair()
    given, mask = rewards.host([meet, length, meet], DATASET, letters())(ROLLOUT)
    assert mask.all()
    np.testing.assert_array_equal(given[..., 0], given[..., 1])
    np.testing.assert_array_equal(given[..., 2], given[..., 1])


def test_asynchronous_rewards_run_inside_a_running_loop_too():
    async def notebook():
        return call(rewards.combine([waits]))

    async def waits(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    assert asyncio.run(notebook()) == [1.0] * 3


def test_an_exception_names_its_function_and_leaves_no_coroutine_behind():
    started = []

    async def waits(completions, **kwargs):
        started.append(1)
        return [1.0] * len(completions)

    def fails(completions, **kwargs):
        raise KeyError("gone")

    async def fails_later(completions, **kwargs):
        raise KeyError("gone, too")

    with pytest.raises(KeyError, match="gone") as caught:
        call(rewards.combine([waits, fails]))  # a coroutine that was never awaited would be a warning, and so an error
    assert caught.value.__notes__ == ["raised by the reward function fails over 3 completions"]
    assert not started
    with pytest.raises(KeyError, match="gone, too") as caught:
        call(rewards.combine([waits, fails_later]))
    assert caught.value.__notes__ == ["raised by the reward function fails_later over 3 completions"]


def test_functions_that_ask_for_trls_loggers_get_them():
    found = []

    def with_loggers(prompts, completions, log_metric, log_extra, **kwargs):
        log_metric("mean_length", 3.0)
        log_extra("extracted", completions)
        return [0.0] * len(completions)

    rewards.host([with_loggers], DATASET, letters(), log_metric=lambda *pair: found.append(pair))(ROLLOUT)
    rewards.host([with_loggers], DATASET, letters())(ROLLOUT)
    assert found == [("mean_length", 3.0)]


@pytest.mark.parametrize(("functions", "weights"), [([], None), ([length], [1.0, 2.0])], ids=["none", "weights"])
def test_refuses_no_function_or_another_number_of_weights(functions, weights):
    with pytest.raises(ValueError, match="combine takes at least one function and a weight for each"):
        rewards.combine(functions, weights=weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), np.float32("nan")], ids=str)
def test_refuses_weights_that_are_not_finite(weight):
    with pytest.raises(ValueError, match="weights are finite numbers, got"):
        rewards.combine([length, length], weights=[1.0, weight])


def test_a_combined_reward_takes_what_a_reward_function_takes():
    assert {"prompts", "completions"} <= set(inspect.signature(rewards.combine([length])).parameters)


# ------------------------------------------------------------- functions that fail now and then


def failing_at(*batches):
    calls = []

    def fragile(completions, **kwargs):
        calls.append(1)
        if len(calls) in batches:
            raise LookupError(f"down at call {len(calls)}")
        return [None, *[1.0] * (len(completions) - 1)]

    return fragile


def test_a_batch_that_a_tolerated_function_fails_on_is_masked_and_told():
    found = []
    reward = rewards.skip_failed_batches(failing_at(2))
    assert reward.__name__ == "fragile"
    log = lambda name, value: found.append((name, value))  # noqa: E731
    assert call(reward, log_metric=log) == [None, 1.0, 1.0]
    with pytest.warns(RuntimeWarning, match=r"fragile failed on a batch of 3 completions.*'p'(.|\n)*down at call 2"):
        assert call(reward, log_metric=log) == [None] * 3
    assert call(reward, log_metric=log) == [None, 1.0, 1.0]
    assert found == [("fragile/failed", 0.0), ("fragile/failed", 1.0), ("fragile/failed", 0.0)]


@pytest.mark.filterwarnings("ignore:fragile failed:RuntimeWarning")
def test_so_many_failures_in_a_row_pass_through_and_a_success_starts_the_count_again():
    reward = rewards.skip_failed_batches(failing_at(1, 2, 4, 5, 6), batches=3)
    for _ in range(5):
        call(reward)
    with pytest.raises(LookupError, match="down at call 6"):
        call(reward)
    with pytest.raises(LookupError):
        call(rewards.skip_failed_batches(failing_at(1), batches=1))
    with pytest.raises(ValueError, match="batches is at least 1, got 0"):
        rewards.skip_failed_batches(failing_at(1), batches=0)


@pytest.mark.filterwarnings("ignore:judge failed:RuntimeWarning")
def test_tolerated_functions_that_are_async_wait_together_and_are_masked_one_by_one():
    waiting, most = 0, 0

    def judge(fails):
        async def judge(completions, **kwargs):
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            await asyncio.sleep(0.05)
            waiting -= 1
            if fails:
                raise TimeoutError("no answer")
            return [0.5] * len(completions)

        return judge

    reward = rewards.host(
        [rewards.skip_failed_batches(judge(False)), rewards.skip_failed_batches(judge(True))], DATASET, letters()
    )
    values, given = reward(ROLLOUT)
    assert most == 2
    assert given[..., 0].all()
    assert not given[..., 1].any()
    assert (values[..., 0] == 0.5).all()
    reward(ROLLOUT)
    with pytest.raises(TimeoutError):
        reward(ROLLOUT)
