"""A reward model: a network with a scalar head, trained on preferences.

    state = init_state(heads.init_from(policy, params), optimizer, key)
    learn = jax.jit(reward_model.make_learn(policy, optimizer))
    state, metrics = learn(state, pairs)                                    # groups of [chosen, rejected]

It rewards inside the program that samples, as `rewards.traced(lambda rollout: score(network, params, rollout))`;
params that are closed over become constants of that program, so that a large model had better
stand between `collect` and `learn`, with its params as an argument:

    scores = score(network, params, experience.rollout)[..., None]
    experience = experience._replace(rewards=scores, reward_mask=jnp.ones(scores.shape, bool))

`rewards.reward_model` reads a finished one from a checkpoint and scores text with its own tokenizer.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from grpo_jax.baselines.heads import hidden_states, scalar
from grpo_jax.baselines.preferences import bradley_terry, check_label_smoothing, whole_pairs
from grpo_jax.policies import Policy
from grpo_jax.protocols import Terms
from grpo_jax.types import Array, Experience, Metrics, Number, Params, Rollout, TrainState
from grpo_jax.updates import Learn, Updates, make_updates


@functools.partial(jax.jit, static_argnums=0)
def score(network: Policy, params: Params, rollout: Rollout) -> Array:
    """`[B, G]` float32: the scalar head on the hidden state at the last token of prompt and completion.

    Args:
      network: static.
      params: `{"network", "head"}`; see `heads`.
      rollout: the completions, of which the mask is not looked at.
    """
    hidden = hidden_states(network, params["network"], rollout.prompts, rollout.tokens, rollout.lengths)
    last = jnp.take_along_axis(hidden, rollout.lengths[..., None, None], axis=2)[:, :, 0]
    return scalar(params["head"], last)


def make_learn(
    network: Policy,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: Number = 0.0,
    updates: Updates = Updates(),
) -> Learn:
    """A step of a reward model, `(state, experience) -> (state, metrics)` on groups of `[chosen, rejected]`.

        loss = -mean_b log sigmoid(score[b, 0] - score[b, 1])

    Ouyang et al. 2022, arXiv:2203.02155, equation 1, with one pair a prompt. Only
    differences are learned: a constant may be added to all scores.

    Args:
      network: with `state.params` as `heads.init` makes them, or a part of them and the rest in `state.frozen`.
      optimizer: any optax optimiser.
      label_smoothing: as in `preferences.bradley_terry`.
      updates: as in `train_step.make_learn`.

    Returns:
      A pure function with the metrics `loss`, `accuracy` and `margin`. A pair of which a
      completion has an empty mask counts nowhere.

    Raises:
      ValueError: for a setting out of range; when traced, if the batch does not divide or
        the groups are not pairs.
    """
    check_label_smoothing(label_smoothing)

    def evaluate(params: Params, state: TrainState, experience: Experience) -> tuple[Terms, Metrics]:
        scores = score(network, params, experience.rollout)
        counted = whole_pairs(experience)
        term, metrics = bradley_terry(scores[:, 0] - scores[:, 1], counted, label_smoothing=label_smoothing)
        return (term,), metrics

    return make_updates(evaluate, optimizer, updates)
