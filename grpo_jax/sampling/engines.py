"""Rollouts from elsewhere: the tokens and log-probs that an inference engine returns, as a `Rollout`.

With vLLM, for `G` completions of each prompt:

    engine = vllm.LLM(folder, logprobs_mode="processed_logprobs")      # after temperature and truncation
    settings = vllm.SamplingParams(n=G, temperature=1.0, max_tokens=T, logprobs=0)   # 0: of the drawn token alone
    outputs = engine.generate([{"prompt_token_ids": tokens} for tokens in prompt_tokens], settings)
    rollout = from_engine(
        data.make_prompts(prompt_tokens, rows),
        [[c.token_ids for c in output.outputs] for output in outputs],
        [[[d[t].logprob for t, d in zip(c.token_ids, c.logprobs)] for c in output.outputs] for output in outputs],
        truncated=[[c.finish_reason == "length" for c in output.outputs] for output in outputs],
        eos_ids=eos_ids,
        max_tokens=T,
    )

SGLang returns the same as `output_ids` and as `meta_info["output_token_logprobs"]`, triples whose
first is the log-prob. The engine's log-probs differ from the trainer's, by its kernels, its dtype, and its
weights if they are older. Score the rollout with the params that the engine has, and correct for the rest:

    old = score(policy, engine_params, rollout, temperature=1.0)       # and truncation=Truncation(top_p=...) under one
    experience = Experience(rollout, rewards, mask, old_log_probs=old.log_probs, old_entropy=old.entropy)
    learn = make_learn(policy, optimizer, loss=losses.grpo(weight=losses.truncated_importance(2.0)), ...)
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from grpo_jax.sampling.stopping import StopStrings, first_stop
from grpo_jax.types import Prompts, Rollout


def from_engine(
    prompts: Prompts,
    completions: Sequence[Sequence[Sequence[int]]],
    log_probs: Sequence[Sequence[Sequence[float]]],
    *,
    eos_ids: Sequence[int],
    max_tokens: int,
    truncated: Sequence[Sequence[bool]] | None = None,
    masks: Sequence[Sequence[Sequence[bool]]] | None = None,
    stop: StopStrings | None = None,
) -> Rollout:
    """Pads what an engine returned for `B` prompts with `G` completions each.

    Args:
      prompts: the prompts, in the order of the completions.
      completions: tokens of each completion, its end-of-sequence token included where one came.
      log_probs: a log-prob for each token, of the distribution that was drawn from.
      eos_ids: tokens that end a completion.
      max_tokens: `T`, the width of the result.
      truncated: whether each completion was cut at its limit; if not given, those are
        cut that end neither in one of `eos_ids` nor with a string of `stop`.
      masks: for conversations of several turns, which tokens the policy wrote: those of tools and templates have
        False, count nowhere, and may have any log-prob. An end token or a stop string then ends a turn.
      stop: the strings that the engine stops at (vLLM's `stop`, which it takes as text), as `stop_strings` makes them.

    Raises:
      ValueError: if counts do not fit, or for a completion that is empty, too long,
        goes on after its end or a stop string, or has a log-prob that is not finite or above 0, or ids that are no
        whole numbers from 0 on. It names the prompt and the completion.
    """
    B, G = prompts.tokens.shape[0], len(completions[0]) if completions else 0
    given = (
        {"completions": completions, "log_probs": log_probs}
        | ({} if truncated is None else {"truncated": truncated})
        | ({} if masks is None else {"masks": masks})
    )
    for name, groups in given.items():
        sizes = [len(group) for group in groups]
        if len(sizes) != B or set(sizes) != {G} or not G:
            raise ValueError(f"{B} prompts need as many groups of one size in {name}, got groups of {sizes}")
    tokens, values = np.zeros((B, G, max_tokens), np.int32), np.zeros((B, G, max_tokens), np.float32)
    lengths, cut = np.zeros((B, G), np.int32), np.zeros((B, G), bool)
    mask = np.zeros((B, G, max_tokens), bool)
    for b, g in np.ndindex(B, G):
        ids, of_ids = np.asarray(completions[b][g]), np.asarray(log_probs[b][g], np.float32)
        where = f"completion {g} of prompt {b}"
        if ids.shape != of_ids.shape or not 1 <= len(ids) <= max_tokens:
            raise ValueError(
                f"{where} has {len(ids)} tokens and {len(of_ids)} log-probs; as many of both are needed, from 1 to "
                f"max_tokens = {max_tokens}"
            )
        if ids.dtype.kind not in "iu" or not np.all((ids >= 0) & (ids < 2**31)):
            raise ValueError(f"{where} has token ids that are no whole numbers from 0 on: {ids[:8].tolist()}")
        wrote = np.ones(len(ids), bool) if masks is None else np.asarray(masks[b][g], bool)
        if wrote.shape != ids.shape or not wrote.any():
            raise ValueError(
                f"{where} has {len(ids)} tokens and {len(wrote)} entries in its mask, {wrote.sum()} of them True; "
                "one is needed for each token, and the policy wrote at least one"
            )
        ended = False
        for start, stop_place in _runs(wrote):
            turn = ids[start:stop_place]
            ends = check_turn(turn, eos_ids=eos_ids, where=where, start=start)
            stopped = first_stop(stop, turn)
            if stopped is not None and stopped < len(turn) - 1:
                raise ValueError(
                    f"{where} goes on after the stop string that its token at place {start + stopped} completes"
                )
            ended = stop_place == len(ids) and (ends or stopped is not None)
        of_ids = np.where(wrote, of_ids, 0.0)
        check_log_probs(of_ids, where=where)
        tokens[b, g, : len(ids)], values[b, g, : len(ids)], lengths[b, g] = ids, of_ids, len(ids)
        mask[b, g, : len(ids)] = wrote
        cut[b, g] = not ended if truncated is None else truncated[b][g]
    return Rollout(
        prompts, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(mask), jnp.asarray(values), jnp.asarray(cut)
    )


def check_turn(tokens: Sequence[int] | np.ndarray, *, eos_ids: Sequence[int], where: str, start: int = 0) -> bool:
    """Whether a turn of the policy ends with an end token.

    Raises:
      ValueError: where it goes on after one; `where` it is, and `start`, the turn's place there, are told.
    """
    ends = np.flatnonzero(np.isin(np.asarray(tokens, np.int64), np.asarray(eos_ids, np.int64)))
    if len(ends) and ends[0] < len(tokens) - 1:
        raise ValueError(
            f"{where} goes on after its end-of-sequence token {tokens[ends[0]]} at place {start + ends[0]}"
        )
    return len(ends) > 0


def check_log_probs(log_probs: np.ndarray, *, where: str) -> None:
    """Refuses what no log-prob can be.

    Raises:
      ValueError: for one that is not finite or above 0; `where` it is is told.
    """
    fits = np.isfinite(log_probs) & (log_probs <= 1e-4)  # an engine's rounding may pass 0
    if not np.all(fits):
        raise ValueError(f"{where} has the log-prob {log_probs[~fits][0]}; log-probs are finite and at most 0")


def _runs(wrote: np.ndarray) -> list[tuple[int, int]]:
    """Where the policy's turns begin and end in a mask of its tokens."""
    borders = np.flatnonzero(np.diff(np.r_[False, wrote, False]))
    return list(zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True))
