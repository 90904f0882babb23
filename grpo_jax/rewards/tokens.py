"""Verifiers on tokens: traced, so that a whole step, or a whole run, is one program."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from grpo_jax.types import Array, Rollout

TokenReward = Callable[[Rollout], Array]  # [B, G] float32


def traced(*rewards: TokenReward) -> Callable[[Rollout], tuple[Array, Array]]:
    """The reward of a train step made of verifiers `rollout -> [B, G]`, each of which can always judge."""

    def reward(rollout: Rollout) -> tuple[Array, Array]:
        given = jnp.stack([f(rollout).astype(jnp.float32) for f in rewards], axis=-1)
        return given, jnp.ones(given.shape, bool)

    return reward


def exact_answer(start: int, end: int) -> TokenReward:
    """1 where the tokens between the first `start` and the `end` after it are the answer, else 0.

    The answer is `prompts.info["answer"] [B, K]`, right-padded, of
    `prompts.info["answer_length"] [B]` tokens. Only the first `start` counts: a second
    answer is no second chance.
    """

    def reward(rollout: Rollout) -> Array:
        answer, length = rollout.prompts.info["answer"], rollout.prompts.info["answer_length"]
        B, K = answer.shape
        wanted = jnp.where(jnp.arange(K) < length[:, None], answer, -1)
        wanted = jnp.concatenate([wanted, jnp.full((B, 1), -1)], axis=1).at[jnp.arange(B), length].set(end)
        tokens = _visible(rollout)
        first = jnp.argmax(tokens == start, axis=-1)[..., None]  # 0 where there is none: checked below
        places = first + 1 + jnp.arange(K + 1)
        written = jnp.take_along_axis(tokens, jnp.minimum(places, tokens.shape[-1] - 1), axis=-1)
        same = (written == wanted[:, None]) & (places < tokens.shape[-1])
        right = jnp.all(same | (wanted[:, None] == -1), axis=-1)
        return (right & jnp.any(tokens == start, axis=-1)).astype(jnp.float32)

    return reward


def tag_format(tags: Sequence[int], eos_ids: Sequence[int]) -> TokenReward:
    """1 where the completion is `<think>...</think><answer>...</answer>` and an end token, else 0.

    Args:
      tags: the four tags' tokens in that order, each of which is to occur exactly once:
        the first at the very start, the third straight after the second, the fourth
        straight before the end token.
      eos_ids: tokens that end a completion.
    """
    if len(tags) != 4:
        raise ValueError(f"the format has 4 tags, got {len(tags)}: {tags}")

    def reward(rollout: Rollout) -> Array:
        tokens = _visible(rollout)
        once = jnp.stack([jnp.sum(tokens == tag, axis=-1) == 1 for tag in tags]).all(axis=0)
        opened, thought, asked, answered = (jnp.argmax(tokens == tag, axis=-1) for tag in tags)
        last = jnp.take_along_axis(tokens, rollout.lengths[..., None] - 1, axis=-1)[..., 0]
        in_order = (opened == 0) & (asked == thought + 1) & (asked < answered) & (answered == rollout.lengths - 2)
        return (once & in_order & jnp.isin(last, jnp.array(eos_ids, jnp.int32))).astype(jnp.float32)

    return reward


def _visible(rollout: Rollout) -> Array:
    """The tokens, with -1 where there is only padding."""
    return jnp.where(jnp.arange(rollout.tokens.shape[-1]) < rollout.lengths[..., None], rollout.tokens, -1)
