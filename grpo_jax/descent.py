"""Passes, minibatches and micro-batches: the updates that a batch is learned by, whatever it is evaluated with."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from grpo_jax import losses, types
from grpo_jax.protocols import Terms
from grpo_jax.types import Array, Mean, Metrics, Params, TrainState
from grpo_jax.updates import step_keys, update

Batch = Any  # a pytree of arrays with leading axis B
Evaluate = Callable[[Params, TrainState, Batch], tuple[Terms, Metrics]]
Descent = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Tree = TypeVar("Tree")


def make_descent(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    *,
    passes: int = 1,
    minibatches: int = 1,
    micro_batches: int = 1,
    max_grad_norm: float | Array | None = None,
    anything: Callable[[Batch], Array] = lambda batch: jnp.array(True),
) -> Descent:
    """Makes `passes * minibatches` updates of one batch, and counts one step.

    Args:
      evaluate: `(params, state, batch) -> (terms, metrics)` of a batch or a part of one,
        as a loss gives them; the counts of the terms may not depend on `params`.
      optimizer: any optax optimiser.
      passes: how often the batch is gone through; each pass in an order of its own.
      minibatches: updates in a pass, each of `B / minibatches` prompts.
      micro_batches: parts of an update that are computed one after the other to save
        memory; the gradient is the whole minibatch's.
      max_grad_norm: as in `updates.update`.
      anything: whether there is anything in a batch to learn from, where the counts of the
        terms do not tell; if not, the update is left out.

    Returns:
      `(state, batch) -> (state, metrics)`, of batches whose arrays have a leading axis `B`.

    Raises:
      ValueError: for a setting below 1; when traced, if the batch does not divide.
    """
    if min(passes, minibatches, micro_batches) < 1:
        raise ValueError(
            f"passes, minibatches and micro_batches are at least 1, got {passes}, {minibatches} and {micro_batches}"
        )

    def descend(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        B = _size(batch)
        if B % (minibatches * micro_batches):
            raise ValueError(
                f"{B} prompts do not divide into {minibatches} minibatches of {micro_batches} micro-batches; "
                f"use a batch of a multiple of {minibatches * micro_batches} prompts"
            )
        if passes * minibatches == 1:
            state, metrics = descend_once(state, batch)
        else:
            _, learn_key = step_keys(state)
            keys = jax.vmap(lambda number: jax.random.fold_in(learn_key, number))(jnp.arange(passes))
            rows = jax.vmap(lambda key: jax.random.permutation(key, B))(keys)

            def descend_rows(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
                return descend_once(state, jax.tree.map(lambda x: x[rows], batch))

            state, metrics = jax.lax.scan(descend_rows, state, rows.reshape(passes * minibatches, -1))
            metrics = types.merge(metrics)
        return state._replace(step=state.step + 1), metrics

    def descend_once(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.named_scope("gradient"):
            grads, (terms, metrics) = gradient(state, batch)
        total = losses.value(terms)
        counted = jnp.any(jnp.stack([term.count > 0 for term in terms])) & anything(batch)
        with jax.named_scope("update"):
            state, of_update = update(state, grads, optimizer, loss=total, counted=counted, max_grad_norm=max_grad_norm)
        return state, {"loss": Mean(total, jnp.ones((), jnp.int32))} | metrics | of_update

    def gradient(state: TrainState, batch: Batch) -> tuple[Params, tuple[Terms, Metrics]]:
        if micro_batches == 1:
            return jax.grad(part_loss, has_aux=True)(state.params, state, batch, None)
        parts = _split(batch, micro_batches)
        # The divisors of the whole come first. They hang on masks alone, so XLA drops the network from this sweep.
        counts = jax.lax.map(lambda part: tuple(t.count for t in evaluate(state.params, state, part)[0]), parts)
        counts = tuple(jax.lax.stop_gradient(jnp.sum(count)) for count in counts)

        def add(total: Params, part: Batch) -> tuple[Params, tuple[Terms, Metrics]]:
            grads, aux = jax.grad(part_loss, has_aux=True)(state.params, state, part, counts)
            return jax.tree.map(lambda sum, g: sum + g.astype(sum.dtype), total, grads), aux

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), state.params)
        grads, aux = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params), types.merge(aux)

    def part_loss(
        params: Params, state: TrainState, part: Batch, counts: tuple[Array, ...] | None
    ) -> tuple[Array, tuple[Terms, Metrics]]:
        terms, metrics = evaluate(params, state, part)
        return losses.value(terms, counts), (terms, metrics)

    return descend


def in_parts(f: Callable[[Batch], Tree], batch: Batch, parts: int) -> Tree:
    """`f(batch)`, computed one part after the other to save memory.

    Args:
      f: of a batch, with a result of the same leading axis `B`, row by row.
      batch: of leading axis `B`.
      parts: a divisor of `B`.

    Raises:
      ValueError: if the batch does not divide.
    """
    if _size(batch) % parts:
        raise ValueError(
            f"{_size(batch)} prompts do not divide into {parts} parts, which is score_parts or minibatches times "
            f"micro_batches; use a batch of a multiple of {parts} prompts"
        )
    return f(batch) if parts == 1 else _join(jax.lax.map(f, _split(batch, parts)))


def _size(batch: Batch) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _split(tree: Tree, parts: int) -> Tree:
    """`[B, ...]` to `[parts, B / parts, ...]`; each part takes rows from everywhere, and so from every device."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def _join(tree: Tree) -> Tree:
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)
