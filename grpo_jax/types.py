"""The pytrees that the stages hand to each other.

Axes: `B` prompts, `G` completions in a group, `R` reward functions, `P` prompt
tokens, `T` completion tokens. Everything is right-padded; padding is indicated by
lengths and masks, never by comparing tokens with a pad id.
"""

from typing import Any, NamedTuple

import jax

Array = jax.Array
PRNGKey = jax.Array  # a typed key, as `jax.random.key` makes
Params = Any  # a pytree of arrays
Number = float | Array  # a setting: a Python number, or a traced scalar
Metrics = dict[str, Any]  # name -> Mean, Max, or a scalar once `summary` has been taken


class Prompts(NamedTuple):
    """A batch of prompts."""

    tokens: Array  # [B, P] int32, right-padded
    lengths: Array  # [B] int32, at least 1
    info: Any = ()  # pytree of arrays with leading axis B: answers as tokens, data-set rows


class Turns(NamedTuple):
    """The turns of conversations; `K` is the most that one may have."""

    ends: Array  # [B, G, K] int32, the place after the last token that the policy wrote in a turn; 0 for no such turn
    rewards: Array  # [B, G, K] float32, for each turn; 0 where there is none
    mask: Array  # [B, G, K] bool, True where the environment gave a reward
    failed: Array  # [B, G] bool, True where the environment failed; nothing of the conversation counts


class Rollout(NamedTuple):
    """Prompts with a group of sampled completions each."""

    prompts: Prompts
    tokens: Array  # [B, G, T] int32, right-padded
    lengths: Array  # [B, G] int32, the end-of-sequence token included
    mask: Array  # [B, G, T] bool, what the loss counts; the end-of-sequence token does
    log_probs: Array  # [B, G, T] float32, of the distribution that was drawn from; 0 on padding
    truncated: Array  # [B, G] bool, True where neither an end-of-sequence token nor a stop string came
    turns: Turns | None = None  # of conversations; what the policy did not write has mask False and log-prob 0
    experts: Array | None = None  # [B, G, T, L, k] int16, those of each layer by which the token was predicted


class Routers(NamedTuple):
    """What the routers of a mixture of experts did with the tokens of a rollout's completions."""

    probabilities: Array  # [B, L, E] float32, of each expert, summed over the tokens of a prompt's group
    choices: Array  # [B, L, E] float32, how many of these tokens chose it


class Scores(NamedTuple):
    """What the policy says of the tokens of a rollout."""

    log_probs: Array  # [B, G, T] float32, 0 on padding
    entropy: Array | None = None  # [B, G, T] float32 nats, of the distribution that the token was drawn from
    collision: Array | None = None  # [B, G, T] float32, sum_v p_v^2 of that distribution
    divergence: Array | None = None  # [B, G, T] float32 nats, from the teacher's distribution
    outside: Array | None = None  # [B, G, T] float32, 1 where a truncation would not keep the token, else 0
    top_log_probs: Array | None = None  # [B, G, T, K] float32, of the tokens that a teacher thought likeliest
    routers: Routers | None = None  # of a policy with experts


class Likeliest(NamedTuple):
    """The `K` likeliest tokens at each place of a rollout, such as a teacher's, computed once and kept on disk."""

    tokens: Array  # [B, G, T, K] int32, the likeliest first
    log_probs: Array  # [B, G, T, K] float32, 0 on padding


class Packing(NamedTuple):
    """Where the completions of a group lie in rows that hold several of them; see `packing.pack`, `packing.tree`."""

    tokens: Array  # [B, R, W] int32, which of the group's G * T tokens stands at a place; any where none does
    places: Array  # [B, G, T] int32, at which of the R * W places a token stands; any behind a completion's end
    segments: Array  # [B, R, W] int32, whose place it is, -1 where it is nobody's
    descendants: Array | None = None  # [B, R, W] int32, of a tree: the last segment that goes on after the token


class Experience(NamedTuple):
    """A rollout with all that a loss may ask about it."""

    rollout: Rollout
    rewards: Array | None = None  # [B, G, R] float32
    reward_mask: Array | None = None  # [B, G, R] bool, False where this reward could not be given
    old_log_probs: Array | None = None  # [B, G, T] float32, of the policy that sampled
    ref_log_probs: Array | None = None  # [B, G, T] float32, of the reference policy
    advantages: Array | None = None  # [B, G] or [B, G, T] float32
    step_rewards: Array | None = None  # [B, G, T] float32, at the tokens that end a step: `advantages.from_steps`
    step_mask: Array | None = None  # [B, G, T] bool, True at these tokens
    old_entropy: Array | None = None  # [B, G, T] float32 nats, of the policy that sampled
    old_collision: Array | None = None  # [B, G, T] float32, sum_v p_v^2 of the policy that sampled
    weights: Array | None = None  # [B, G, T] float32, what the surrogate objective of each token is multiplied by
    token_share: Array | None = None  # [B] float32, tokens of the rollout that count over prompts
    high_covariance: Array | None = None  # [B, G, T] bool, tokens that the entropy falls by: `losses.covariant_kl`
    environment_mask: Array | None = None  # [B, G, T] bool, tokens that the policy did not write: `losses.echo`
    teacher_top: Likeliest | None = None  # what a teacher thought likeliest: `losses.distill_top`
    teacher_prompts: Prompts | None = None  # what the teacher reads before the completions; the same, if None
    packing: Packing | None = None  # how to lay out the completions for the network; a row each, if None


class TrainState(NamedTuple):
    """All that a run must carry from one step to the next."""

    params: Params  # what is trained: differentiated, and known to the optimiser
    opt_state: Any
    key: PRNGKey  # of the run; step n uses fold_in(key, n)
    step: Array  # [] int32
    skipped: Array  # [] int32, updates that the non-finite guard refused
    ref_params: Params | None = None  # the reference policy; None without a KL term
    frozen: Params | None = None  # the rest of what the network reads, which nothing changes; see `freezing.bind`
    extra: Any = ()  # whatever else must survive a restart
