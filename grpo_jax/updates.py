"""Gradients to a new state, unless they are not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.types import Array, Mean, Metrics, Params, PRNGKey, TrainState


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: PRNGKey,
    *,
    reference: bool = False,
    extra: Any = (),
) -> TrainState:
    """The state of a run that has not begun.

    Args:
      params: what is trained.
      optimizer: any optax optimiser.
      key: of the whole run; step `n` uses `fold_in(key, n)`.
      reference: True keeps a copy of `params` as the reference policy, which a KL
        penalty needs. A copy, since a donated state may not hold an array twice.
      extra: whatever else must survive a restart.
    """
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        ref_params=jax.tree.map(jnp.copy, params) if reference else None,
        extra=extra,
    )


def step_keys(state: TrainState) -> tuple[PRNGKey, PRNGKey]:
    """The keys of this step, of sampling and of learning: functions of the run's key and the step alone."""
    sample_key, learn_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    return sample_key, learn_key


def update(
    state: TrainState,
    grads: Params,
    optimizer: optax.GradientTransformation,
    *,
    loss: Array | float = 0.0,
    counted: Array | bool = True,
    max_grad_norm: float | Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Applies one update, or none at all if the loss or the gradient is not finite.

    A refused update leaves params and optimiser state as they were, bit for bit, and
    adds 1 to `state.skipped`. (`optax.apply_if_finite` gives up after some refusals
    and applies the NaN; this never does.)

    Args:
      state: before the update; `step` is not touched.
      grads: like `state.params`.
      optimizer: the one that made `state.opt_state`.
      loss: `[]`, of these gradients.
      counted: `[]` bool; False, where no token of the batch counted, leaves everything as
        it was too, momentum and weight decay included, and is no refusal.
      max_grad_norm: gradients of a larger global norm are scaled down to it (Pascanu
        et al. 2013, arXiv:1211.5063, algorithm 1).

    Returns:
      The new state, and the metrics `grad_norm` (before clipping) and `skipped`.

    Raises:
      ValueError: for a `max_grad_norm` that is not above 0.
    """
    if isinstance(max_grad_norm, int | float) and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is above 0, got {max_grad_norm}; None does not clip")
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)

    def apply(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
        clipped = grads
        if max_grad_norm is not None:
            scale = jnp.minimum(1.0, max_grad_norm / jnp.maximum(grad_norm, 1e-12))
            clipped = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        changes, opt_state = optimizer.update(clipped, opt_state, params)
        return optax.apply_updates(params, changes), opt_state

    def keep(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
        return params, opt_state

    # Not a choice of each number: that makes XLA keep copies of the optimiser's state while it writes over it.
    params, opt_state = jax.lax.cond(finite & counted, apply, keep, state.params, state.opt_state)
    metrics = {
        "grad_norm": Mean(jnp.where(finite, grad_norm, 0.0), finite.astype(jnp.int32)),
        "skipped": Mean((~finite).astype(jnp.int32), jnp.ones((), jnp.int32)),
    }
    return state._replace(params=params, opt_state=opt_state, skipped=state.skipped + ~finite), metrics
