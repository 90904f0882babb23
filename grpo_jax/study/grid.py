"""Grids of runs: every condition for every seed, vmapped in one program where only numbers differ.

    conditions = [Condition(f"beta={beta}", run, {"beta": beta}) for beta in (0.0, 0.001, 0.04)]
    path = run_grid("runs/kl", conditions, seeds=range(8), per_seed={"params": params})
    rows = results.read(path)                           # tidy: condition, seed, step, metrics
    summary = results.summarise(rows, ["accuracy"], against="beta=0.0")
    rich.print(tables.terminal(*tables.cells(summary)))
    figures.curves(rows, ["accuracy"], "kl.png")

Conditions that share a `Run` share its program: it is compiled once, whatever their numbers. A
grid that was killed resumes from its newest chunk, with bitwise the same results.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.run import checkpoint, display, metrics, preemption
from grpo_jax.study import results
from grpo_jax.study.results import Record
from grpo_jax.study.runs import Run
from grpo_jax.types import Array, TrainState

RESULTS = "results.csv"
TIMING = "timing.csv"


class Condition(NamedTuple):
    """One configuration of a grid, which every seed runs."""

    name: str
    run: Run  # from `make_run`; the same object where only numbers differ
    hyper: Mapping[str, float] = {}  # the numbers by name, as the run reads them


def run_grid(
    folder: str | os.PathLike[str],
    conditions: Sequence[Condition],
    *,
    seeds: Sequence[int],
    per_seed: Mapping[str, Any],
    at_once: int | None = None,
    show: Sequence[str] = (),
) -> pathlib.Path:
    """Runs every condition for every seed, and writes tidy results.

    The runs of one program are cut into blocks of `at_once`, and each block is vmapped. Its
    states and measurements are saved after each chunk (`Run.chunk_steps`).

    Args:
      folder: of this grid. One with the same conditions and seeds is resumed, and finished blocks are not run
        again. The code is not compared: use another folder after a change.
      conditions: with different names.
      seeds: a run of seed `s` has the key `jax.random.key(s)`, under every condition.
      per_seed: inputs that differ between seeds, stacked on axis 0, such as the parameters to start from. The
        `hyper` of a run is these and its condition's numbers in one dict.
      at_once: runs of a block; the number of seeds unless given. More fill an accelerator, and take
        memory in proportion.
      show: metrics that the progress shows, as means over the block.

    Returns:
      The path of `results.csv`: a row per condition, seed and chunk, with the mean of each metric over the
      chunk and the evaluation after it; step 0 has an evaluation only. Beside it is `timing.csv`, with the
      seconds of each chunk of each block; the first chunk of a program compiles.

    Raises:
      ValueError: if two conditions share a name, or a run but not the names of its numbers, a name is both a
        condition's and in `per_seed`, or the folder was begun with other settings.
    """
    folder = pathlib.Path(folder)
    _check(conditions, seeds, per_seed)
    at_once = len(seeds) if at_once is None else at_once
    if at_once < 1:
        raise ValueError(f"at_once is at least 1 run, got {at_once}")
    blocks: list[list[tuple[Condition, int]]] = []
    for program in dict.fromkeys(condition.run for condition in conditions):
        runs = list(itertools.product((c for c in conditions if c.run == program), range(len(seeds))))
        blocks += [runs[i : i + at_once] for i in range(0, len(runs), at_once)]
    jitted: dict[Callable[..., Any], Callable[..., Any]] = {}  # of each function once, so that it is compiled once
    for (condition, _), *_ in blocks:
        for function in (condition.run.start, condition.run.advance):
            jitted.setdefault(function, jax.jit(jax.vmap(function)))
    outcomes, done = [], 0
    with (
        preemption.lock(folder),
        display.progress(sum(block[0][0].run.chunks for block in blocks), keys=("condition", *show)) as progress,
    ):
        for number, block in enumerate(blocks):
            run = block[0][0].run
            names = ", ".join(dict.fromkeys(condition.name for condition, _ in block))
            padded = block + [block[-1]] * (at_once - len(block))  # so that all blocks have one shape
            for chunk, result in _run_block(
                folder / f"block_{number:03d}",
                dataclasses.replace(run, start=jitted[run.start], advance=jitted[run.advance]),
                keys=jax.vmap(jax.random.key)(np.array([seeds[i] for _, i in padded], np.uint32)),
                hyper=_hyper(padded, per_seed),
                labels=[{"condition": condition.name, "seed": seeds[i]} for condition, i in block],
                settings=[{name: float(x) for name, x in condition.hyper.items()} for condition, _ in block],
            ):
                newest = [row for row in result["rows"] if row["step"] == chunk * run.chunk_steps]
                progress(done + chunk - 1, {"condition": names} | _means(newest, show))
            outcomes.append(result)
            done += run.chunks
        order = {condition.name: place for place, condition in enumerate(conditions)}
        rows = [row for result in outcomes for row in result["rows"]]
        rows.sort(key=lambda row: (order[row["condition"]], seeds.index(row["seed"]), row["step"]))
        results.write(folder / RESULTS, rows)
        results.write(folder / TIMING, [row for result in outcomes for row in result["seconds"]])
    return folder / RESULTS


def _check(conditions: Sequence[Condition], seeds: Sequence[int], per_seed: Mapping[str, Any]) -> None:
    names = [condition.name for condition in conditions]
    if len(set(names)) < len(names):
        raise ValueError(f"conditions have different names, got {names}")
    if not names or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"a grid has conditions, and seeds that differ, got {names} and {list(seeds)}")
    for condition in conditions:
        if both := sorted(condition.hyper.keys() & per_seed.keys()):
            raise ValueError(f"{both} are numbers of the condition {condition.name!r} and in per_seed, too")
        first = next(other for other in conditions if other.run == condition.run)
        if (mine := sorted(condition.hyper)) != (firsts := sorted(first.hyper)):
            raise ValueError(
                f"{condition.name!r} has the numbers {mine}, and of the same run {first.name!r} has {firsts}"
            )
    for name, tree in per_seed.items():
        for leaf in jax.tree.leaves(tree):
            if np.shape(leaf)[:1] != (len(seeds),):
                shape = np.shape(leaf)
                raise ValueError(f"per_seed[{name!r}] has a leading axis of {len(seeds)} seeds, got shape {shape}")


def _hyper(runs: Sequence[tuple[Condition, int]], per_seed: Mapping[str, Any]) -> dict[str, Any]:
    """The `hyper` of the runs of a block, stacked."""
    names = runs[0][0].hyper
    numbers = {name: jnp.array([condition.hyper[name] for condition, _ in runs], jnp.float32) for name in names}
    places = np.array([i for _, i in runs])
    return numbers | jax.tree.map(lambda x: jnp.asarray(x)[places], dict(per_seed))


def _run_block(
    folder: pathlib.Path,
    run: Run,
    *,
    keys: Array,
    hyper: Mapping[str, Any],
    labels: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, float]],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs a block from its newest checkpoint; yields the number of each chunk and the results so far."""
    config = {
        "labels": list(labels),
        "numbers": list(settings),
        "chunks": run.chunks,
        "chunk_steps": run.chunk_steps,
    }
    path = folder.with_suffix(".json")
    if path.exists():
        result = json.loads(path.read_text())
        checkpoint.check_config(result["config"], config)
        yield run.chunks, result
        return

    def rows_at(step: int, measured: Mapping[str, Array]) -> list[Record]:
        columns = jax.device_get(dict(measured))
        return [
            {**label, "step": step} | metrics.plain({name: x[i] for name, x in columns.items()})
            for i, label in enumerate(labels)
        ]

    with checkpoint.manager(folder, max_to_keep=1) as checkpoints:
        like, _ = jax.eval_shape(run.start, keys, hyper)
        newest = checkpoint.restore(checkpoints, _as_one(like, like.step))
        if newest is None:
            state, evaluation = run.start(keys, hyper)
            result = {"config": config, "rows": rows_at(0, evaluation), "seconds": []}
        else:
            saved, result = newest
            checkpoint.check_config(result["config"], config)
            state = saved._replace(step=jnp.full(len(keys), saved.step))
            yield int(saved.step) // run.chunk_steps, result  # which may be the last chunk
        for chunk in range(int(state.step[0]) // run.chunk_steps + 1, run.chunks + 1):
            started = time.perf_counter()
            state, steps, evaluation = jax.block_until_ready(run.advance(state, hyper))
            seconds = time.perf_counter() - started
            means = {name: jnp.mean(x, axis=1) for name, x in steps.items()}
            result["rows"] += rows_at(chunk * run.chunk_steps, means | evaluation)
            result["seconds"].append({"condition": labels[0]["condition"], "chunk": chunk, "seconds": seconds})
            checkpoint.save(checkpoints, _as_one(state, state.step[0]), result, initial=())
            yield chunk, result
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(result))
    written.replace(path)
    shutil.rmtree(folder)


def _as_one(states: TrainState, step: Any) -> TrainState:
    """States at the same step with one step between them, by which `checkpoint` numbers them."""
    if isinstance(step, jax.ShapeDtypeStruct):
        step = jax.ShapeDtypeStruct((), step.dtype)
    return states._replace(step=step)


def _means(rows: Sequence[Record], names: Sequence[str]) -> dict[str, float]:
    measured = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: float(np.mean(values)) for name, values in measured.items() if values}
