"""How the time and the memory of a step grow with G, P, T, V and the size of the model.

One number is varied at a time from `BASE`. Time is the median of whole steps in
seconds; memory is what the compiler sets aside for the larger of the two programs
(temporaries, without state and inputs), in MiB: it is exact, and the same in every
run on one version of jax.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks import cells, worker
from benchmarks.cells import Cell, Model
from benchmarks.ours import prompts_of
from grpo_jax import losses, models, sampling
from grpo_jax.train_step import make_train_step
from grpo_jax.updates import Updates, init_state

BASE = Cell("base", cells.TINY, prompts=4, group=8, prompt_tokens=64, completion_tokens=64)
REPEATS = 3


class Point(NamedTuple):
    """One measurement: `axis` has the value `x` in `cell`."""

    axis: str
    x: float
    cell: Cell


def points(base: Cell = BASE) -> list[Point]:
    """Four values on each axis, the base's own among them."""
    sizes = [(128, 2), (256, 4), (384, 6), (512, 8)]  # width, layers
    models_ = [base.model._replace(hidden=D, layers=L, intermediate=4 * D) for D, L in sizes]
    return [
        *(Point("G", G, base._replace(group=G)) for G in (4, 8, 16, 32)),
        *(Point("P", P, base._replace(prompt_tokens=P)) for P in (64, 128, 256, 512)),
        *(Point("T", T, base._replace(completion_tokens=T)) for T in (32, 64, 128, 256)),
        *(Point("V", V, base._replace(model=base.model._replace(vocabulary=V))) for V in (1024, 4096, 16384, 65536)),
        *(Point("model", weights(m), base._replace(model=m)) for m in models_),
    ]


def weights(model: Model) -> int:
    """Numbers in the matrices of all layers; embeddings and the head are V's."""
    return model.layers * model.layer_weights


def measure(cell: Cell, repeats: int = REPEATS) -> dict[str, Any]:
    """Seconds and MiB of the two programs of a step on random weights."""
    policy = models.decoder(models.from_hf_config(cells.hf_config(cell.model)))
    optimizer = optax.adamw(cells.LEARNING_RATE, weight_decay=0.0)
    params = jax.jit(policy.init)(jax.random.key(0))
    state = init_state(params, optimizer, jax.random.key(0), reference=True)
    del params
    prompts = prompts_of(cell, 0)
    sampler = sampling.sampler(group_size=cell.group, max_tokens=cell.completion_tokens, eos_ids=())
    loss, updates = losses.grpo(penalty=losses.k3(cells.BETA)), Updates(max_grad_norm=1.0)
    step = make_train_step(policy, optimizer, sampler, loss=loss, updates=updates)
    collecting = jax.jit(step.collect).lower(state, prompts).compile()
    rewards = np.random.default_rng(0).random((cell.prompts, cell.group, 1), np.float32)
    given = {"rewards": rewards, "reward_mask": np.ones(rewards.shape, bool)}
    experience = collecting(state, prompts)._replace(**given)
    learning = jax.jit(step.learn, donate_argnums=0).lower(state, experience).compile()
    generate, train = [], []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        experience = jax.block_until_ready(collecting(state, prompts))
        sampled = time.perf_counter()
        state, metrics = learning(state, experience._replace(**given))
        jax.block_until_ready((state, metrics))
        generate.append(sampled - started)
        train.append(time.perf_counter() - sampled)
    mib = [_temporaries(program) for program in (collecting, learning)]
    return {
        "seconds": statistics.median(g + t for g, t in list(zip(generate, train, strict=True))[1:]),
        "generate": statistics.median(generate[1:]),
        "learn": statistics.median(train[1:]),
        "mib": max(mib),
        "generate_mib": mib[0],
        "learn_mib": mib[1],
    }


def _temporaries(program: jax.stages.Compiled) -> float:
    """What the compiler sets aside for temporaries, in MiB; NaN where it does not say."""
    analysis = program.memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes / 2**20


def run(base: Cell = BASE) -> Iterator[worker.Line]:
    """A line for each point; the base is measured once."""
    known: dict[Cell, dict[str, Any]] = {}
    for point in points(base):
        if point.cell not in known:
            known[point.cell] = measure(point.cell)
            jax.clear_caches()
        yield {"axis": point.axis, "x": point.x, **known[point.cell]}


if __name__ == "__main__":
    _, send = worker.open_channel()
    for line in run():
        send(line)
