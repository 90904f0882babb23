"""Verifiers on tokens: traced, so that a whole step, or a whole run, is one program.

The rewards on text have the same names. The two agree where each tag is one token and
white space is none; docstrings say what only text can tell (numbers in another notation, `####`)
or only tokens (whether the end token came). A tag that the prompt ends with counts as
the completion's: it must not open it again.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from grpo_jax.rewards.consistency import has_majority
from grpo_jax.rewards.lengths import Formula, overlong_penalty
from grpo_jax.rewards.repetition import check_settings
from grpo_jax.types import Array, Rollout

TokenReward = Callable[[Rollout], Array]  # [B, G] float32


def traced(*rewards: TokenReward) -> Callable[[Rollout], tuple[Array, Array]]:
    """The reward of a train step made of verifiers `rollout -> [B, G]`, each of which can always judge."""

    def reward(rollout: Rollout) -> tuple[Array, Array]:
        values = jnp.stack([f(rollout).astype(jnp.float32) for f in rewards], axis=-1)
        return values, jnp.ones(values.shape, bool)

    return reward


def exact_answer(
    start: int, end: int, *, thought_start: int | None = None, thought_end: int | None = None
) -> TokenReward:
    """1 where the tokens between the first `start` and the `end` after it are the answer, else 0; empty is none.

    The answer is `prompts.info["answer"] [B, K]`, right-padded, of
    `prompts.info["answer_length"] [B]` tokens. Only the first `start` counts: a second
    answer is no second chance. `rewards.exact_answer` without settings, in a vocabulary
    without white space and `####`.

    Args:
      start: the token that opens the answer.
      end: the token that closes it.
      thought_start: the token that opens the reasoning; where it is not closed there is no answer, as on text.
      thought_end: the token that closes the reasoning, after the last of which the answer
        is looked for, as on text; None to look for it everywhere.
    """

    def reward(rollout: Rollout) -> Array:
        answer, length = rollout.prompts.info["answer"], rollout.prompts.info["answer_length"]
        B, K = answer.shape
        wanted = jnp.where(jnp.arange(K) < length[:, None], answer, -1)
        wanted = jnp.concatenate([wanted, jnp.full((B, 1), -1)], axis=1).at[jnp.arange(B), length].set(end)
        tokens = _after_thoughts(rollout, start, thought_start, thought_end)
        first = jnp.argmax(tokens == start, axis=-1)[..., None]  # 0 where there is none: checked below
        places = first + 1 + jnp.arange(K + 1)
        written = jnp.take_along_axis(tokens, jnp.minimum(places, tokens.shape[-1] - 1), axis=-1)
        same = (written == wanted[:, None]) & (places < tokens.shape[-1])
        right = jnp.all(same | (wanted[:, None] == -1), axis=-1)
        return (right & (length > 0)[:, None] & jnp.any(tokens == start, axis=-1)).astype(jnp.float32)

    return reward


def strict_format(tags: Sequence[int], eos_ids: Sequence[int]) -> TokenReward:
    """1 where the completion is `<think>...</think><answer>...</answer>` and an end token, else 0.

    `rewards.strict_format` is the counterpart on text, which cannot tell whether the end
    token came, and allows white space between the pairs and a newline at the end.

    Args:
      tags: the four tags' tokens in that order, each of which is to occur exactly once:
        the first at the very start, unless the prompt ends with it, the third straight
        after the second, the fourth straight before the end token.
      eos_ids: tokens that end a completion.
    """
    if len(tags) != 4:
        raise ValueError(f"the format has 4 tags, got {len(tags)}: {tags}")

    def reward(rollout: Rollout) -> Array:
        tokens = _continued(rollout, tags[:1])
        length = rollout.lengths + 1
        once = jnp.stack([jnp.sum(tokens == tag, axis=-1) == 1 for tag in tags]).all(axis=0)
        opened, thought, asked, answered = (jnp.argmax(tokens == tag, axis=-1) for tag in tags)
        last = jnp.take_along_axis(tokens, length[..., None] - 1, axis=-1)[..., 0]
        first = jnp.where(tokens[..., 0] == -1, 1, 0)  # with one from the prompt, `once` refuses another
        in_order = (opened == first) & (asked == thought + 1) & (asked < answered) & (answered == length - 2)
        return (once & in_order & jnp.isin(last, jnp.array(eos_ids, jnp.int32))).astype(jnp.float32)

    return reward


def soft_overlong(max_tokens: int, cache: int) -> TokenReward:
    """A penalty that grows over the last `cache` tokens: `rewards.soft_overlong`, by the same formula.

    Counted in tokens, the end token included. A completion without an end that was cut at
    `max_tokens` gets -1.
    """
    penalty = overlong_penalty(max_tokens, cache)
    return lambda rollout: penalty(rollout.lengths)


def soft_format(tags: Sequence[int]) -> TokenReward:
    """The share of tag pairs that are right: for `<think>...</think><answer>...</answer>` 1 for both, 0.5 for one.

    A pair is right where its two tags occur exactly once, the opening one first, and
    after the end of the right pair before it: `rewards.soft_format` on tokens.

    Args:
      tags: the tags' tokens, opening and closing in turn.

    Raises:
      ValueError: unless there are two tokens a pair, all different.
    """
    pairs = _pairs(tags)

    def reward(rollout: Rollout) -> Array:
        tokens = _continued(rollout, tags[::2])
        right, end = jnp.zeros(rollout.lengths.shape), jnp.full(rollout.lengths.shape, -1)
        for opening, closing in pairs:
            once = (jnp.sum(tokens == opening, axis=-1) == 1) & (jnp.sum(tokens == closing, axis=-1) == 1)
            start, stop = (jnp.argmax(tokens == tag, axis=-1) for tag in (opening, closing))
            good = once & (end < start) & (start < stop)
            right, end = right + good, jnp.where(good, stop, end)
        return right / len(pairs)

    return reward


def tag_count(tags: Sequence[int]) -> TokenReward:
    """The share of tags that occur exactly once, 0.25 for each of four: `rewards.tag_count` on tokens.

    Args:
      tags: the tags' tokens, opening and closing in turn.

    Raises:
      ValueError: unless there are two tokens a pair, all different.
    """
    _pairs(tags)

    def reward(rollout: Rollout) -> Array:
        counts = jnp.sum(_continued(rollout, tags[::2])[..., None] == jnp.array(tags, jnp.int32), axis=-2)
        return jnp.mean(counts == 1, axis=-1, dtype=jnp.float32)

    return reward


def reasoning_length(tags: Sequence[int], eos_ids: Sequence[int], *, per: int = 1000) -> TokenReward:
    """`min(length / per, 1)` where `strict_format` gives 1, else 0.

    The length is that of the reasoning between the first two tags, in tokens
    (`rewards.reasoning_length` counts characters).

    Args:
      tags: as of `strict_format`.
      eos_ids: tokens that end a completion.
      per: tokens for the full reward.

    Raises:
      ValueError: unless `per > 0` and there are 4 tags.
    """
    if not per > 0:
        raise ValueError(f"reasoning is measured per a number of tokens above 0, got {per}")
    formed = strict_format(tags, eos_ids)

    def reward(rollout: Rollout) -> Array:
        tokens = _continued(rollout, tags[:1])
        opened, thought = (jnp.argmax(tokens == tag, axis=-1) for tag in tags[:2])
        return formed(rollout) * jnp.minimum((thought - opened - 1) / per, 1.0)

    return reward


def cosine_length(correct: TokenReward, scale: Formula, *, threshold: float = 0.5) -> TokenReward:
    """A reward that depends on the length and on whether the completion is right: `rewards.cosine_length` on tokens.

    Args:
      correct: a completion is right where this gives more than the threshold.
      scale: of `rewards.cosine_scale`; the length counts the end token.
      threshold: in the units of `correct`.
    """
    return lambda rollout: scale(correct(rollout) > threshold, rollout.lengths)


def repetition_penalty(*, ngram: int = 3, max_penalty: float = -1.0) -> TokenReward:
    """`(1 - unique / total) * max_penalty` over the n-grams of the completion: `rewards.repetition_penalty`, traced.

    0 for a completion of fewer than `ngram` tokens, the end token counted. Unique n-grams
    are counted after sorting, in O(T log T). Arguments and errors are those of `rewards.repetition_penalty`.
    """
    check_settings(ngram, max_penalty)

    def reward(rollout: Rollout) -> Array:
        T = rollout.tokens.shape[-1]
        if ngram > T:
            return jnp.zeros(rollout.lengths.shape)
        tokens, places = _visible(rollout), T - ngram + 1
        # Those that end in padding are all different, those of nothing but padding start with -1: neither counts.
        grams = [tokens[..., start : start + places] for start in range(ngram)]
        ordered = jnp.stack(jax.lax.sort(grams, num_keys=ngram))  # [ngram, B, G, places]
        same = jnp.all(ordered[..., 1:] == ordered[..., :-1], axis=0)
        repeated = jnp.sum(same & (ordered[0, ..., 1:] >= 0), axis=-1)
        total = jnp.maximum(rollout.lengths - ngram + 1, 1)
        return jnp.where(repeated > 0, repeated / total * max_penalty, 0.0)

    return reward


def self_consistency(
    start: int,
    end: int,
    *,
    thought_start: int | None = None,
    thought_end: int | None = None,
    majority: float = 1.0,
    other: float = -0.1,
) -> TokenReward:
    """`majority` for the answer that most completions of the group give, `other` for the rest: no label is needed.

    `rewards.self_consistency` on tokens, with its rules: a completion without an answer has no
    vote, and where several answers have the most votes all get `other`. The answer stands
    between the first `start` and the first `end` after it, and is not empty; `thought_start` and `thought_end` are as
    of `exact_answer`.
    """

    def reward(rollout: Rollout) -> Array:
        tokens = _after_thoughts(rollout, start, thought_start, thought_end)
        T = tokens.shape[-1]
        place = jnp.arange(T)
        opened = jnp.argmax(tokens == start, axis=-1, keepdims=True)
        closes = (tokens == end) & (place > opened)
        closed = jnp.argmax(closes, axis=-1, keepdims=True)
        answered = jnp.any(tokens == start, axis=-1) & jnp.any(closes, axis=-1) & (closed > opened + 1)[..., 0]
        from_start = jnp.take_along_axis(tokens, jnp.minimum(opened + 1 + place, T - 1), axis=-1)
        answer = jnp.where(place < closed - opened - 1, from_start, -1)  # [B, G, T], left-aligned
        same = jnp.all(answer[:, :, None] == answer[:, None], axis=-1)
        return jnp.where(has_majority(same, answered), majority, other)

    return reward


def _pairs(tags: Sequence[int]) -> list[tuple[int, int]]:
    if not tags or len(tags) % 2 or len(set(tags)) != len(tags):
        raise ValueError(f"tags are different tokens, opening and closing in turn, got {tags}")
    return list(zip(tags[::2], tags[1::2], strict=True))


def _visible(rollout: Rollout) -> Array:
    """The tokens, with -1 where there is only padding."""
    return jnp.where(jnp.arange(rollout.tokens.shape[-1]) < rollout.lengths[..., None], rollout.tokens, -1)


def _continued(rollout: Rollout, opening: Sequence[int]) -> Array:
    """The visible tokens `[B, G, 1 + T]` after the prompt's last one if that opens a tag, else after -1."""
    prompts = rollout.prompts
    last = jnp.take_along_axis(jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)[:, None] - 1, axis=1)
    head = jnp.where(jnp.isin(last, jnp.array(opening, jnp.int32)), last, -1)[:, None]  # [B, 1, 1]
    tokens = _visible(rollout)
    return jnp.concatenate([jnp.broadcast_to(head, (*tokens.shape[:2], 1)).astype(tokens.dtype), tokens], axis=-1)


def _after_thoughts(rollout: Rollout, start: int, thought_start: int | None, thought_end: int | None) -> Array:
    """The tokens `[B, G, 1 + T]`, with -1 up to the last one that ends the thoughts, and for thoughts that go on."""
    tokens = _continued(rollout, [start] if thought_start is None else [start, thought_start])
    if thought_end is not None:
        later = jnp.flip(jnp.cumsum(jnp.flip(tokens == thought_end, axis=-1), axis=-1), axis=-1)
        tokens = jnp.where(later > 0, -1, tokens)
    if thought_start is None:
        return tokens
    return jnp.where(jnp.any(tokens == thought_start, axis=-1, keepdims=True), -1, tokens)
