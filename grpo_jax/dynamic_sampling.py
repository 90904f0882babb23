"""Dynamic sampling: zero-variance groups are dropped, and sampling goes on until the batch is full.

DAPO (Yu et al. 2025, arXiv:2503.14476, section 3.2): a group whose rewards are all equal
has advantages of 0 and no gradient, so that the effective batch shrinks as the
policy gets better. Both functions here take `rounds` batches of prompts and return one
batch of groups that were worth keeping, in the order in which they were sampled:

    step = make_train_step(policy, optimizer, sampler, reward=..., loss=...)
    collect = dynamic_sampling(step.collect, rounds=3)
    experience, wasted = collect(state, prompts)                 # prompts of 3 batches
    state, metrics = step.learn(state, experience)
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from grpo_jax.advantages import has_variance, total_reward
from grpo_jax.statistics import Mean
from grpo_jax.train_step import Collect, Reward
from grpo_jax.types import Array, Experience, Metrics, Prompts, TrainState

Keep = Callable[[Experience], Array]  # [B] bool
CollectKept = Callable[[TrainState, Prompts], tuple[Experience, Metrics]]


def nonzero_variance(experience: Experience) -> Array:
    """Keeps groups whose total rewards are not all equal: DAPO's rule, on rewards instead of right answers.

    All rewards weigh 1 here; `nonzero_variance_of` takes the weights of `from_rewards`.
    """
    return has_variance(*total_reward(experience))


def nonzero_variance_of(weights: Sequence[float | Array]) -> Keep:
    """`nonzero_variance` of the rewards under these weights, one per reward function; 0 ignores one."""
    return lambda experience: has_variance(*total_reward(experience, weights))


def dynamic_sampling(collect: Collect, *, rounds: int, keep: Keep = nonzero_variance) -> CollectKept:
    """Repeats `collect` inside the program until the batch is full.

    Args:
      collect: `(state, prompts) -> experience` with rewards, for `B` prompts.
      rounds: the limit; from 1 on. Round `k` samples the prompts `k B` to `(k + 1) B`, and
        the first one draws what `collect` alone would.
      keep: `experience -> [B] bool`, which groups are kept.

    Returns:
      `(state, prompts) -> (experience, metrics)`, of `rounds * B` prompts and `B` groups.
      Where the limit came first, the places left over hold prompts without completions,
      which count nowhere but in aggregates that count every completion or prompt
      (`losses.completion_mean_of_all`, `losses.per_prompt_count`). Metrics: `groups_wasted`, the share of the
      sampled groups that are not used (dropped, or more than the batch holds),
      `groups_sampled` and `groups_missing`, the share of places left over.

    Raises:
      ValueError: for fewer than one round, or when traced, if the prompts do not divide.
    """
    _check(rounds)

    def collect_kept(state: TrainState, prompts: Prompts) -> tuple[Experience, Metrics]:
        batches = _batches(prompts, rounds)

        def sample(number: Array | int) -> tuple[Experience, Array]:
            part = jax.tree.map(lambda x: x[number], batches)
            experience = collect(_for_round(state, number), part)
            return experience, keep(experience)

        def go_on(carry: tuple[Array, Array, Experience]) -> Array:
            number, filled, kept = carry
            return (number < rounds) & (filled < kept.rollout.tokens.shape[0])

        def once_more(carry: tuple[Array, Array, Experience]) -> tuple[Array, Array, Experience]:
            number, filled, kept = carry
            return number + 1, *_put(kept, filled, *sample(number))

        zero, form = jnp.zeros((), jnp.int32), jax.eval_shape(sample, 0)[0]
        number, filled, kept = jax.lax.while_loop(go_on, once_more, (zero, zero, _nothing(form, batches)))
        return kept, _metrics(number, filled, kept.rollout.tokens.shape[0])

    return collect_kept


def host_dynamic_sampling(
    collect: Collect, reward: Reward, *, rounds: int, keep: Keep = nonzero_variance
) -> CollectKept:
    """`dynamic_sampling` for rewards that are computed on the host, between two programs.

    Args:
      collect: jitted, without a reward.
      reward: `rollout -> (rewards [B, G, R], mask [B, G, R])`, such as `rewards.host` makes.
      rounds: as in `dynamic_sampling`.
      keep: as in `dynamic_sampling`.

    Returns:
      As in `dynamic_sampling`; not to be jitted.
    """
    _check(rounds)

    def collect_kept(state: TrainState, prompts: Prompts) -> tuple[Experience, Metrics]:
        batches = _batches(prompts, rounds)

        def sample(number: int) -> tuple[Experience, Array]:
            experience = collect(_for_round(state, number), jax.tree.map(lambda x: x[number], batches))
            rewards, reward_mask = map(jnp.asarray, reward(experience.rollout))
            experience = experience._replace(rewards=rewards, reward_mask=reward_mask)
            return experience, keep(experience)

        experience, wanted = sample(0)
        filled, kept = _put(_nothing(experience, batches), jnp.zeros((), jnp.int32), experience, wanted)
        number = 1
        while number < rounds and filled < wanted.shape[0]:
            filled, kept = _put(kept, filled, *sample(number))
            number += 1
        return kept, _metrics(jnp.asarray(number), filled, wanted.shape[0])

    return collect_kept


def _check(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds is at least 1, got {rounds}")


def _batches(prompts: Prompts, rounds: int) -> Prompts:
    if prompts.tokens.shape[0] % rounds:
        raise ValueError(f"{prompts.tokens.shape[0]} prompts do not divide into {rounds} rounds")
    return jax.tree.map(lambda x: x.reshape(rounds, -1, *x.shape[1:]), prompts)


def _for_round(state: TrainState, number: Array | int) -> TrainState:
    """The state with the key of this round; the first has the run's own. No step reaches 2^31."""
    other = jax.random.fold_in(state.key, jnp.uint32(2**31) + jnp.asarray(number, jnp.uint32))
    return state._replace(key=jnp.where(jnp.asarray(number) == 0, state.key, other))


def _nothing(form: Experience, batches: Prompts) -> Experience:
    """An experience of this form without a completion: prompts of the first batch, zeros for the rest."""
    if form.reward_mask is None:
        raise ValueError("dynamic sampling reads rewards: pass make_train_step(..., reward=)")
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), form)
    prompts = jax.tree.map(lambda x: x[0], batches)
    return empty._replace(rollout=empty.rollout._replace(prompts=prompts))


@jax.jit
def _put(kept: Experience, filled: Array, experience: Experience, wanted: Array) -> tuple[Array, Experience]:
    """Puts the wanted groups into the places from `filled` on, as many as there are."""
    B = wanted.shape[0]
    places = jnp.where(wanted, filled + jnp.cumsum(wanted) - 1, B)
    kept = jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop"), kept, experience)
    return jnp.minimum(filled + jnp.sum(wanted), B), kept


def _metrics(rounds: Array, filled: Array, B: int) -> Metrics:
    return {
        "groups_sampled": rounds * B,
        "groups_wasted": Mean(rounds * B - filled, rounds * B),
        "groups_missing": Mean(B - filled, jnp.asarray(B)),
    }
