"""Conversations as messages, and the reward that an environment gave for them."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Read = Callable[[str], Mapping[str, str]]  # the text between two turns of the policy -> the environment's message


def conversation_messages(
    rollout: Rollout, tokenizer: "PreTrainedTokenizerBase", eos_ids: Collection[int], read: Read | None = None
) -> list[list[list[dict[str, str]]]]:
    """The messages of each conversation after its prompt, `[B][G]`: the policy's are the assistant's.

    Args:
      rollout: with `turns`.
      tokenizer: of the policy.
      eos_ids: tokens that end a turn, which are left out of its text.
      read: `data.read_between(tokenizer)`, for prompts that are chat messages; None takes what stands
        between the policy's turns as it is, as a user's.
    """
    made = []
    for b, g in np.ndindex(rollout.lengths.shape):
        messages = []
        for tokens, wrote in written_in_turn(rollout, b, g):
            if wrote:
                tokens = [token for token in tokens if token not in eos_ids]
            text = str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            if wrote:
                messages.append({"role": "assistant", "content": text})
            else:
                messages.append({"role": "user", "content": text} if read is None else dict(read(text)))
        made.append(messages)
    G = rollout.lengths.shape[1]
    return [made[start : start + G] for start in range(0, len(made), G)]


def written_in_turn(rollout: Rollout, b: int, g: int) -> list[tuple[list[int], bool]]:
    """The tokens of one conversation, cut where another begins to write; True for those of the policy."""
    length = int(np.asarray(rollout.lengths)[b, g])
    tokens = np.asarray(rollout.tokens)[b, g, :length]
    # A failed conversation is masked whole; the environment's tokens have no log-probs, nor has what is certain. But up
    # to the end of a turn all is the policy's, once it has begun to write.
    wrote = np.asarray(rollout.mask)[b, g, :length] | (np.asarray(rollout.log_probs)[b, g, :length] < 0)
    wrote[:1] = True
    if rollout.turns is not None:
        ends = np.asarray(rollout.turns.ends)[b, g]
        for start, end in itertools.pairwise([0, *ends[ends > 0].tolist()]):
            wrote[start:end] = np.logical_or.accumulate(wrote[start:end])
    borders = [0, *(np.flatnonzero(np.diff(wrote)) + 1).tolist(), length]
    return [
        (tokens[start:end].tolist(), bool(wrote[start])) for start, end in itertools.pairwise(borders) if end > start
    ]


def given_rewards(rollout: Rollout) -> list[list[float | None]]:
    """The rewards that the environment gave in each conversation, one per turn of the policy; None for none."""
    assert rollout.turns is not None
    K = rollout.turns.ends.shape[-1]
    ends, rewards, mask = (np.asarray(x).reshape(-1, K) for x in rollout.turns[:3])
    return [
        [float(rewards[i, k]) if mask[i, k] else None for k in range(K) if ends[i, k] > 0] for i in range(len(ends))
    ]


def environment(
    completions: Sequence[Any], turn_rewards: Sequence[Sequence[float | None]] | None = None, **columns: Any
) -> list[float | None]:
    """The environment's own reward: the sum over a conversation's turns, None where it gave none.

    Raises:
      ValueError: for completions that no environment has answered.
    """
    if turn_rewards is None:
        raise ValueError("the reward `environment` is of conversations: sample with an environment, or leave it out")
    sums = [[reward for reward in rewards if reward is not None] for rewards in turn_rewards]
    return [sum(rewards) if rewards else None for rewards in sums]
