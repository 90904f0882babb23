"""Gradients to a new state: iterations, minibatches and micro-batches, and the guard against what is not finite."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from grpo_jax import losses, statistics
from grpo_jax.compiler_options import saving_memory
from grpo_jax.freezing import bind, is_trainable, named_leaves
from grpo_jax.programs import Program
from grpo_jax.protocols import Terms
from grpo_jax.schedules import Scheduled, at
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Metrics, Number, Params, PRNGKey, TrainState

Batch = Any  # a pytree of arrays with leading axis B
EvaluateLoss = Callable[[Params, TrainState, Batch], tuple[Terms, Metrics]]  # params with what is frozen
Learn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """How often and in how many parts a batch is learned from: `iterations * minibatches` updates.

    Attributes:
      iterations: times that the batch is gone through, each in an order of its own (the paper's mu).
      minibatches: updates per iteration, each of `B / minibatches` prompts.
      micro_batches: parts of an update that are computed one after the other to save memory; the gradient is the
        whole minibatch's, whatever their number.
      max_grad_norm: gradients of a larger global norm are scaled down to it (Pascanu et al. 2013, arXiv:1211.5063,
        algorithm 1); None does not clip.
      loss_scale: what the loss is multiplied by before its gradient is taken, and the gradient divided by after, so
        that in float16 it neither vanishes nor overflows; above 0, may be `Scheduled`: see `schedules.loss_scale`.

    Raises:
      ValueError: for a setting out of range.
    """

    iterations: int = 1
    minibatches: int = 1
    micro_batches: int = 1
    max_grad_norm: Number | None = None
    loss_scale: Number | Scheduled | None = None

    def __post_init__(self) -> None:
        if min(self.iterations, self.minibatches, self.micro_batches) < 1:
            raise ValueError(
                "iterations, minibatches and micro_batches are at least 1, got "
                f"{self.iterations}, {self.minibatches} and {self.micro_batches}"
            )
        _check_max_grad_norm(self.max_grad_norm)
        if isinstance(self.loss_scale, int | float) and not self.loss_scale > 0:
            raise ValueError(f"loss_scale is above 0, got {self.loss_scale}; None scales nothing")

    @property
    def count(self) -> int:
        """Updates made of a batch."""
        return self.iterations * self.minibatches

    @property
    def parts(self) -> int:
        """Parts of a batch that go through the network at a time."""
        return self.minibatches * self.micro_batches

    def check(self, prompts: int) -> None:
        """Refuses a batch of so many prompts that it does not divide.

        Raises:
          ValueError: with the numbers.
        """
        if prompts % self.parts:
            raise ValueError(
                f"{prompts} prompts do not divide into {self.minibatches} minibatches of {self.micro_batches} "
                f"micro-batches; use a batch of a multiple of {self.parts} prompts"
            )


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: PRNGKey,
    *,
    frozen: Params | None = None,
    reference: bool = False,
    extra: Any = (),
) -> TrainState:
    """The state of a run before its first step.

    Args:
      params: what is trained.
      optimizer: any optax optimiser.
      key: of the whole run; step `n` uses `fold_in(key, n)`.
      frozen: the rest of what the network reads, see `freezing`: the base of adapters, or what `freezing.partition`
        has taken out.
      reference: True keeps a copy of `params` as the reference policy, which a KL
        penalty needs. A copy, since a donated state may not hold an array twice. With what is frozen it is the
        policy that the run begins with, and costs no more than `params` do.
      extra: whatever else must survive a restart.

    Raises:
      ValueError: if a parameter is both trained and frozen; if one that is trained is of whole numbers or of 8 bits or
        fewer, such as the codes of a quantised base.
    """
    bind(params, frozen)
    if codes := [
        f"{path}, of {jnp.result_type(leaf)}" for path, leaf in named_leaves(params) if not is_trainable(leaf)
    ]:
        raise ValueError(
            f"{len(codes)} parameters cannot be trained, such as {codes[0]}: train adapters over a quantised base, "
            "adapters, base = lora.adapt(policy, params, ...) and init_state(adapters, optimizer, key, frozen=base)"
        )
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        ref_params=jax.tree.map(jnp.copy, params) if reference else None,
        frozen=frozen,
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
    max_grad_norm: Number | None = None,
) -> tuple[TrainState, Metrics]:
    """Applies one update, or none at all if the loss, the gradient or what the params would become is not finite.

    It is the norm of the gradient that is asked: one of numbers beyond 1e19, whose squares overflow here and in the
    second moments of Adam, is refused as well.
    Finite gradients make params that are not where a setting of the optimizer is NaN, such as its weight decay, or a
    step overflows. A refused update leaves params and optimiser state as they were, bit for bit, and
    adds 1 to `state.skipped`. (`optax.apply_if_finite` gives up after some refusals
    and applies the NaN; this never does.)

    Args:
      state: before the update; `step` is not touched.
      grads: like `state.params`.
      optimizer: the one that made `state.opt_state`.
      loss: `[]`, of these gradients.
      counted: `[]` bool; False, for a batch without a token that counts, leaves everything as
        it was too, momentum and weight decay included, and is not counted as skipped.
      max_grad_norm: as in `Updates`.

    Returns:
      The new state, and the metrics `grad_norm` (before clipping, of an update that was applied) and `skipped`.

    Raises:
      ValueError: for a `max_grad_norm` that is not above 0.
    """
    _check_max_grad_norm(max_grad_norm)
    # In 16 bits the squares of small numbers vanish and those of large ones overflow.
    grad_norm = optax.tree.norm(jax.tree.map(_widened, grads))

    def apply(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
        clipped = grads
        if max_grad_norm is not None:
            scale = jnp.minimum(1.0, max_grad_norm / jnp.maximum(grad_norm, 1e-12))
            clipped = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        changes, opt_state = optimizer.update(clipped, opt_state, params)
        return optax.apply_updates(params, changes), opt_state

    def keep(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
        return params, opt_state

    # Computed first for the answer alone, since there is no way back from params and optimiser's state that are written
    # over: no room where XLA fuses it with the reduction, a byte a number on CPUs.
    afterwards = _all_finite(apply(state.params, state.opt_state)[0])
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss) & (afterwards | ~jnp.asarray(counted))
    # Not a choice of each number: that makes XLA keep copies of the optimiser's state while it writes over it.
    applied = finite & counted
    params, opt_state = jax.lax.cond(applied, apply, keep, state.params, state.opt_state)
    metrics = {
        "grad_norm": Mean(jnp.where(applied, grad_norm, 0.0), applied.astype(jnp.int32)),
        "skipped": Mean((~finite).astype(jnp.int32), jnp.ones((), jnp.int32)),
    }
    return state._replace(params=params, opt_state=opt_state, skipped=state.skipped + ~finite), metrics


# --------------------------------------------------------------- the updates of a batch


def make_updates(
    evaluate: EvaluateLoss,
    optimizer: optax.GradientTransformation,
    updates: Updates,
    *,
    has_data: Callable[[Batch], Array] = lambda batch: jnp.array(True),
) -> Learn:
    """Makes the function that learns from one batch by `updates.count` updates, and counts one step.

    Args:
      evaluate: `(params, state, batch) -> (terms, metrics)` of a batch or a part of one,
        as a loss returns them; the counts of the terms may not depend on `params`. These are what the network reads:
        those of the state, with what is frozen.
      optimizer: any optax optimiser.
      updates: iterations, minibatches, micro-batches and the clipping of gradients.
      has_data: `batch -> [] bool`; False skips the update of a batch that has nothing to learn from, where the
        counts of the terms do not say so.

    Returns:
      `(state, batch) -> (state, metrics)`, for batches whose arrays have a leading axis `B`.

    Raises:
      ValueError: when traced, if the batch does not divide.
    """

    def learn(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        B = _size(batch)
        updates.check(B)
        if updates.count == 1:
            state, metrics = update_once(state, batch)
        else:
            _, learn_key = step_keys(state)
            keys = jax.vmap(lambda number: jax.random.fold_in(learn_key, number))(jnp.arange(updates.iterations))
            rows = jax.vmap(lambda key: jax.random.permutation(key, B))(keys)

            frozen = state.frozen  # read by the scan, not carried through it

            def update_rows(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
                part = jax.tree.map(lambda x: x[rows], batch)
                state, metrics = update_once(state._replace(frozen=frozen), part)
                return state._replace(frozen=None), metrics

            state, metrics = jax.lax.scan(update_rows, state._replace(frozen=None), rows.reshape(updates.count, -1))
            state, metrics = state._replace(frozen=frozen), statistics.merge(metrics)
        return state._replace(step=state.step + 1), metrics

    def update_once(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.named_scope("gradient"):
            grads, (terms, metrics) = gradient(state, batch)
            if updates.loss_scale is not None:
                scale = at(updates.loss_scale, state)
                # In float32: a scale beyond 65504 is infinite in the dtype of float16 params.
                grads = jax.tree.map(lambda g: (_widened(g) / scale).astype(g.dtype), grads)
                metrics = metrics | {"loss_scale": Mean(jnp.asarray(scale, jnp.float32), jnp.ones((), jnp.int32))}
        total = losses.value(terms)
        counted = jnp.any(jnp.stack([term.count > 0 for term in terms])) & has_data(batch)
        with jax.named_scope("update"):
            state, update_metrics = update(
                state, grads, optimizer, loss=total, counted=counted, max_grad_norm=updates.max_grad_norm
            )
        of_loss = Mean(jnp.where(counted, total, 0.0), counted.astype(jnp.int32))
        return state, {"loss": of_loss} | metrics | update_metrics

    def gradient(state: TrainState, batch: Batch) -> tuple[Params, tuple[Terms, Metrics]]:
        if updates.micro_batches == 1:
            return jax.grad(part_loss, has_aux=True)(state.params, state, batch, None)
        parts = _split(batch, updates.micro_batches)
        # The divisors of the whole come first. They hang on masks alone, so XLA drops the network from this sweep.
        whole = bind(state.params, state.frozen)
        counts = jax.lax.map(lambda part: tuple(t.count for t in evaluate(whole, state, part)[0]), parts)
        counts = tuple(jax.lax.stop_gradient(jnp.sum(count)) for count in counts)

        def add(total: Params, part: Batch) -> tuple[Params, tuple[Terms, Metrics]]:
            grads, aux = jax.grad(part_loss, has_aux=True)(state.params, state, part, counts)
            return jax.tree.map(lambda sum, g: sum + g.astype(sum.dtype), total, grads), aux

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), state.params)
        grads, aux = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params), statistics.merge(aux)

    def part_loss(
        params: Params, state: TrainState, part: Batch, counts: tuple[Array, ...] | None
    ) -> tuple[Array, tuple[Terms, Metrics]]:
        terms, metrics = evaluate(bind(params, state.frozen), state, part)
        scale = 1.0 if updates.loss_scale is None else at(updates.loss_scale, state)
        return scale * losses.value(terms, counts), (terms, metrics)

    return learn


@dataclasses.dataclass(frozen=True)
class JittedLearn:
    """A jitted `learn`; made by `jit_learn`, and called as one."""

    program: Program  # of the state without what is frozen, of that, and of the batch

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The next state, and metrics."""
        frozen = state.frozen
        state, metrics = self.program(state._replace(frozen=None), frozen, batch)
        return state._replace(frozen=frozen), metrics

    def ahead(self, state: TrainState, batches: Iterable[Batch]) -> int:
        """Compiles the programs for batches of other shapes in a thread; see `Program.ahead`."""
        return self.program.ahead((state._replace(frozen=None), state.frozen, batch) for batch in batches)


def jit_learn(learn: Learn, *, compiler_options: Mapping[str, str | bool] | None = None) -> JittedLearn:
    """`learn`, jitted, which donates the state that it is given, but not what is frozen: that stays where it is.

    What compiling it has freed goes back to the system; see `programs.Program`.

    Args:
      learn: `(state, batch) -> (state, metrics)`.
      compiler_options: of XLA; `compiler_options.saving_memory()` unless given, and `{}` for XLA's own. The result is
        not called within another jitted function, where XLA takes none: jit `learn` itself there.
    """

    def learn_apart(state: TrainState, frozen: Params | None, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = learn(state._replace(frozen=frozen), batch)
        return state._replace(frozen=None), metrics

    options = saving_memory() if compiler_options is None else dict(compiler_options)
    return JittedLearn(Program(jax.jit(learn_apart, donate_argnums=0, compiler_options=options or None)))


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
            f"{_size(batch)} prompts do not divide into {parts} parts, minibatches times micro_batches; use a batch "
            f"of a multiple of {parts} prompts"
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


def _widened(x: Array) -> Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _all_finite(tree: Params) -> Array:
    # Of bools, which take the least where XLA does not fuse a reduction with what it reduces, as on CPUs.
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _check_max_grad_norm(max_grad_norm: Number | None) -> None:
    if isinstance(max_grad_norm, int | float) and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is above 0, got {max_grad_norm}; None does not clip")
