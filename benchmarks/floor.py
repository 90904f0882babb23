"""The floor: the time of a step's matrix products alone, phase by phase.

Counted are the products that the step cannot do without: each prompt is read once
for its group, the head is applied to completion tokens only, nothing is recomputed.
Products with weights are run at the shapes at which they occur, with the weights of
each layer in their own place in memory, and those of experts with as many rows for
each; attention's products, which no library runs at full speed at these shapes, are
charged at the best rate measured on this machine, for the pairs that windows let see.
A router's products are left out.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cells, worker
from benchmarks.cells import Cell, Model
from grpo_jax.types import Array

Weights = dict[str, Array]
SQUARE = 2048  # side of the product that the best rate is measured with


class Sweep(NamedTuple):
    """A pass through the network, `times` times."""

    rows: int  # tokens through the layers
    head_rows: int  # tokens through the head
    pairs: float  # (query, key) pairs that attention sees
    times: int = 1


def causal_pairs(cell: Cell, lengths: list[int]) -> tuple[float, float]:
    """Pairs of (query, key) within the prompts, and of the completions with prompt and past; the mean of the layers."""
    P, windows = cell.prompt_tokens, cell.model.windows
    seen = np.arange(1, P + max(lengths) + 1)  # by the token at each position, the own included
    seen = np.mean([seen if window is None else np.minimum(seen, window) for window in windows], axis=0)
    return float(cell.prompts * seen[:P].sum()), float(sum(seen[P : P + n].sum() for n in lengths))


def phases(cell: Cell, lengths: list[int]) -> dict[str, list[Sweep]]:
    """The sweeps of `generate` and `score`; `train` is three times `score` (forward, and backward to both operands).

    Where lengths differ, decoding is charged as `max(lengths)` steps of the mean number of unfinished rows.
    """
    within, across = causal_pairs(cell, lengths)
    tokens, steps = sum(lengths), max(lengths)
    alive = max(1, round(tokens / steps))
    prompt_rows = cell.prompts * cell.prompt_tokens
    read = Sweep(prompt_rows, 0, within)
    return {
        "generate": [read, Sweep(alive, alive, across / steps, steps)],
        "score": [Sweep(prompt_rows + tokens, tokens, within + across)],
    }


def product_flops(model: Model, sweep: Sweep) -> float:
    """FLOPs of a sweep's products with weights."""
    return (
        2.0
        * sweep.times
        * (sweep.rows * model.layers * model.read_weights + sweep.head_rows * model.hidden * model.vocabulary)
    )


def attention_flops(model: Model, sweep: Sweep) -> float:
    """FLOPs of a sweep's products of queries with keys and of weights with values."""
    return 4.0 * sweep.times * model.layers * model.heads * model.head_dim * sweep.pairs


def phase_flops(cell: Cell, lengths: list[int]) -> dict[str, float]:
    """FLOPs of each phase."""
    found = {
        name: sum(product_flops(cell.model, s) + attention_flops(cell.model, s) for s in sweeps)
        for name, sweeps in phases(cell, lengths).items()
    }
    return found | {"train": 3 * found["score"]}


def random_weights(model: Model, dtype: jnp.dtype = jnp.float32) -> Weights:
    """The matrices of all layers, stacked, and the head."""
    m, kv = model, model.kv_heads * model.head_dim
    mlps = (m.layers,) if m.experts is None else (m.layers, m.experts)
    shapes = {
        "q": (m.layers, m.hidden, m.hidden),
        "k": (m.layers, m.hidden, kv),
        "v": (m.layers, m.hidden, kv),
        "o": (m.layers, m.hidden, m.hidden),
        "gate": (*mlps, m.hidden, m.intermediate),
        "up": (*mlps, m.hidden, m.intermediate),
        "down": (*mlps, m.intermediate, m.hidden),
        "head": (m.hidden, m.vocabulary),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: jax.random.normal(key, shape, dtype) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _product(x: Array, w: Array, backward: bool) -> tuple[Array, ...]:
    """`x w`; backward also the two products of the gradient, with an array of the result's shape in its place."""
    y = x @ w
    return (y, y @ w.mT, x.mT @ y) if backward else (y,)


def random_inputs(model: Model, rows: int, dtype: jnp.dtype = jnp.float32) -> tuple[Array, Array, Array]:
    """What the attention's products are taken of, those of gate and up, and that of down, `[(E,) rows, ...]`."""
    of_expert = max(1, round(rows * model.per_token / (model.experts or 1)))
    of_mlp = (rows,) if model.experts is None else (model.experts, of_expert)
    shapes = (rows, model.hidden), (*of_mlp, model.hidden), (*of_mlp, model.intermediate)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    attention, narrow, wide = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return attention, narrow, wide


@functools.partial(jax.jit, static_argnames=("head_rows", "times", "backward"))
def run_products(
    weights: Weights, inputs: tuple[Array, Array, Array], *, head_rows: int, times: int, backward: bool
) -> tuple[tuple[Array, ...], ...]:
    """The products with weights of `times` sweeps, one after the other."""
    layers = {name: w for name, w in weights.items() if name != "head"}

    def layer(inputs: tuple[Array, Array, Array], w: Weights) -> tuple[Array, ...]:
        of_each = (("q", "k", "v", "o"), ("gate", "up"), ("down",))
        products = [_product(x, w[name], backward) for x, names in zip(inputs, of_each, strict=True) for name in names]
        return tuple(y for ys in products for y in ys)

    def sweep(n: Array, last: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
        # Inputs differ from sweep to sweep, so that no compiler computes the same product once for all.
        given = jax.tree.map(lambda x: x + n.astype(x.dtype), inputs)
        products, _ = jax.lax.scan(lambda _, w: (layer(given, w), None), last[0], layers)
        return products, _product(given[0][:head_rows], weights["head"], backward) if head_rows else ()

    first = jax.tree.map(lambda w: w[0], layers)
    shapes = jax.eval_shape(lambda: (layer(inputs, first), _product(inputs[0][:head_rows], weights["head"], backward)))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes if head_rows else (shapes[0], ()))
    return jax.lax.fori_loop(0, times, sweep, start)


def matrix_rate(side: int = SQUARE, dtype: jnp.dtype = jnp.float32, repeats: int = 3) -> float:
    """The best rate of one large matrix product, in FLOP/s."""
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    return 2.0 * side**3 / min(seconds_of(lambda: product(x, x)) for _ in range(repeats))


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds until the result of a call is there."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def make_step(cell: Cell) -> Callable[[worker.Line], worker.Line]:
    """`request -> seconds`, as the workers of the systems."""
    weights = random_weights(cell.model)

    def run(sweep: Sweep, backward: bool, rate: float) -> float:
        settings = {"head_rows": sweep.head_rows, "times": sweep.times, "backward": backward}
        inputs = jax.block_until_ready(random_inputs(cell.model, sweep.rows))
        jax.block_until_ready(run_products(weights, inputs, **settings))  # compiles where lengths are new
        spent = seconds_of(lambda: run_products(weights, inputs, **settings))
        return spent + (3 if backward else 1) * attention_flops(cell.model, sweep) / rate

    def step(request: worker.Line) -> worker.Line:
        rate = matrix_rate()
        drawn = request.get("lengths") or [cell.completion_tokens] * cell.rows
        lengths = [min(n, cell.completion_tokens) for n in drawn]
        sweeps = phases(cell, lengths)
        seconds = {name: sum(run(s, False, rate) for s in parts) for name, parts in sweeps.items()}
        seconds["train"] = sum(run(s, True, rate) for s in sweeps["score"])
        return {"whole": sum(seconds.values()), **seconds, "rate": rate, "flops": phase_flops(cell, lengths)}

    return step


if __name__ == "__main__":
    worker.serve(make_step(cells.from_json(json.loads(sys.argv[1])["cell"])))
