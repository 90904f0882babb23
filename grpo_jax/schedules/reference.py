"""Renewal of the reference policy during a run."""

import jax

from grpo_jax.types import TrainState


def sync_reference(state: TrainState, *, every: int, mixture: float | jax.Array = 1.0) -> TrainState:
    """Moves the reference policy towards the policy after every `every` steps; goes after the step.

        ref_params = mixture * params + (1 - mixture) * ref_params

    A mixture of 1 is R1-Zero's copy (DeepSeek-AI 2025, Nature 645, methods; every 400
    updates, which is every 25 steps of 16 minibatches), one of 0.6 every 512 steps the
    soft update of TR-DPO (Gorbatovski et al. 2024,
    arXiv:2404.09656, equation 6), TRL's `sync_ref_model`. The reference then belongs to
    what changes: save it by `checkpoint.save(..., initial=("frozen",))`.

    Args:
      state: after a step.
      every: steps between renewals, at least 1.
      mixture: share of the policy, above 0 and at most 1.

    Returns:
      The state with another reference where `step` is a multiple of `every`, and the same
      elsewhere. The copy is exact.

    Raises:
      ValueError: without a reference, or for a setting out of range.
    """
    if state.ref_params is None:
        raise ValueError("there is no reference to renew: init_state(..., reference=True) keeps one")
    if every < 1:
        raise ValueError(f"every is at least 1, got {every}")
    if isinstance(mixture, int | float) and not 0 < mixture <= 1:
        raise ValueError(f"mixture is above 0 and at most 1, got {mixture}")

    # Not optax's functions of it: periodic_update takes the mixture of every step, due or not, copies at step 0, and
    # incremental_update rounds the share of a bfloat16 reference before it is added.
    def renewed() -> jax.Array:
        # params + 0 * (ref - params) equals params, and is a new array: a donated state may not hold one twice.
        return jax.tree.map(
            lambda p, ref: (p + (1 - mixture) * (ref - p)).astype(ref.dtype), state.params, state.ref_params
        )

    due = (state.step > 0) & (state.step % every == 0)
    return state._replace(ref_params=jax.lax.cond(due, renewed, lambda: state.ref_params))
