"""A learned reward: a sequence-classification checkpoint, run in JAX."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from grpo_jax.types import Array, Params, Prompts


def reward_model(
    path_or_repo: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    max_tokens: int = 2048,
    multiple: int = 64,
    compute_dtype: DTypeLike | None = None,
    revision: str | None = None,
) -> Callable[..., list[float]]:
    """The score that a reward model gives to prompt and completion together.

    As in TRL: the two are joined as text, or as messages by the model's own chat
    template, and tokenised by the model's own tokenizer, without special tokens; the reward is the one logit of
    the last token.

    Args:
      path_or_repo: a checkpoint with one label, read by `hf.load_reward_model`.
      batch_size: texts that are scored at a time.
      max_tokens: of prompt and completion together. Of a longer text the last
        `max_tokens` are scored.
      multiple: widths are rounded up to a multiple of it, so that few programs compile.
      compute_dtype: of the layers' arithmetic; None for float32.
      revision: a branch, tag or commit of the repository.

    Returns:
      A reward function `f(prompts, completions, **columns) -> list[float]`, in logits.
    """
    from grpo_jax import data
    from grpo_jax.models import hf

    tokenizer = hf.load_tokenizer(path_or_repo, revision=revision)
    policy, params, head = hf.load_reward_model(path_or_repo, compute_dtype=compute_dtype, revision=revision)

    @jax.jit
    def score(params: Params, head: Array, texts: Prompts) -> Array:
        last = jnp.take_along_axis(texts.tokens, texts.lengths[:, None] - 1, axis=1)
        positions = (texts.lengths - 1)[:, None, None]
        hidden, _ = policy.extend(params, last[:, None], positions, policy.prefill(params, texts.tokens, texts.lengths))
        return (hidden[:, 0, 0].astype(jnp.float32) @ head.astype(jnp.float32))[:, 0]

    def encode(prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            if not isinstance(completion, str):  # a conversation after a prompt that is text: what stands there
                completion = "".join(message["content"] for message in completion)
            return tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        closed = {"add_generation_prompt": False, "continue_final_message": False}  # the completion's turn has ended
        return data.encode_prompt(tokenizer, [*prompt, *completion], **closed)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [encode(*pair)[-max_tokens:] for pair in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            filled = [part[i % len(part)] for i in range(batch_size)]  # the last batch repeats, for the same program
            scores += np.asarray(score(params, head, data.make_prompts(filled, multiple=multiple)))[
                : len(part)
            ].tolist()
        return scores

    reward.__name__ = "reward_model"
    return reward
