"""Sampling and learning on a CUDA GPU: `python -m benchmarks.gpu`.

Three shapes of Qwen2.5 with random weights, computing in bfloat16. Each runs in a
process of its own, so that its peak memory is its own. Reported are

- decode tokens/s, and the share of the measured copy bandwidth that reading weights
  and caches once for each decoded token takes;
- learning tokens/s, of completions, and model FLOPs utilisation: three times the
  forward pass of a shared prompt and its completions, against the measured bf16
  matrix rate; what is recomputed is not counted;
- peak device memory in GiB, after sampling and after learning, and what `grpo_jax.run.memory` plans for it;
- on the first cell, a step of TRL with transformers' generation, in micro-batches of two sizes.

Each form of attention has a process of its own. Learning is a whole update without a
reference policy: AdamW for the smaller two, plain SGD for the 7B, whose float32 weights
and gradients alone are 61 GB.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import cells, floor, report, worker
from benchmarks.cells import Cell, Model
from benchmarks.ours import prompts_of
from grpo_jax import losses, models, sampling
from grpo_jax.models import attention
from grpo_jax.run import memory
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Rollout
from grpo_jax.updates import Updates, init_state


class GpuCell(NamedTuple):
    """A cell, the parts that learning is cut into, and whether it has room for Adam."""

    cell: Cell
    micro_batches: int
    adam: bool


HALF_B = Model(hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocabulary=151936, tied=True)
ONE_B = Model(hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocabulary=151936, tied=True)
SEVEN_B = Model(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vocabulary=152064)

GPU_CELLS = {
    found.cell.name: found
    for found in (
        GpuCell(Cell("0.5B", HALF_B, prompts=32, group=16, prompt_tokens=256, completion_tokens=1024), 16, True),
        GpuCell(Cell("1.5B", ONE_B, prompts=16, group=16, prompt_tokens=512, completion_tokens=1024), 16, True),
        GpuCell(Cell("7B", SEVEN_B, prompts=8, group=8, prompt_tokens=1024, completion_tokens=512), 8, False),
    )
}

TRL_MICRO_BATCHES = (8, 32)  # completions


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    cells: tuple[Literal["0.5B", "1.5B", "7B"], ...] = ("0.5B", "1.5B", "7B")
    attentions: tuple[Literal["reference", "cudnn"], ...] = ("reference", "cudnn")
    repeats: int = 3
    trl: bool = True  # if it is installed with a torch that sees the GPU
    output: Path = Path("benchmarks/results/gpu.jsonl")  # overwritten; .md is written beside it


def decode_bytes(cell: Cell, itemsize: int = 2) -> float:
    """Bytes that decoding must read: for each token the weights, each prompt's cache once, and the rows' own caches."""
    m, T = cell.model, cell.completion_tokens
    read_weights = m.layers * m.layer_weights * itemsize + m.hidden * m.vocabulary * 4  # the head computes in float32
    token_cache = 2 * m.layers * m.kv_heads * m.head_dim * itemsize
    cached_tokens = cell.prompts * cell.prompt_tokens + cell.rows * (T + 1) / 2
    return T * (read_weights + cached_tokens * token_cache)


def learn_flops(cell: Cell) -> float:
    """FLOPs of forward and backward over completions of full length, without what is recomputed."""
    return floor.phase_flops(cell, [cell.completion_tokens] * cell.rows)["train"]


def copy_bandwidth(mib: int = 2048, repeats: int = 10) -> float:
    """Bytes/s of copying a large array on the device, read and write counted."""
    x = jnp.zeros(mib * 2**18, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    return 2 * x.nbytes / min(floor.seconds_of(lambda: copy(x)) for _ in range(repeats))


def peak_gib() -> float:
    """The most device memory this process has had in use; NaN where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", float("nan")) / 2**30


def measure(
    found: GpuCell, repeats: int, attends: attention.Attention, *, bandwidth_mib: int = 2048, side: int = 8192
) -> worker.Line:
    """All numbers of one cell."""
    cell = found.cell
    config = models.from_hf_config(cells.hf_config(cell.model), dtype=jnp.bfloat16, attention=attends)
    policy = models.decoder(config)
    params = jax.jit(policy.init)(jax.random.key(0))
    bandwidth = copy_bandwidth(bandwidth_mib)
    rate = floor.matrix_rate(side, jnp.bfloat16, repeats=10)

    optimizer = optax.adamw(cells.LEARNING_RATE, weight_decay=0.0) if found.adam else optax.sgd(cells.LEARNING_RATE)
    state = init_state(params, optimizer, jax.random.key(0))
    del params
    sampler = sampling.sampler(group_size=cell.group, max_tokens=cell.completion_tokens, eos_ids=())
    loss, updates = losses.grpo(), Updates(micro_batches=found.micro_batches, max_grad_norm=1.0)
    step = make_train_step(policy, optimizer, sampler, loss=loss, updates=updates).jit()
    prompts = prompts_of(cell, 0)
    sample_seconds, experience = repeated(lambda: step.collect(state, prompts), repeats)
    sample_peak = peak_gib()

    rewards = np.random.default_rng(0).random((cell.prompts, cell.group, 1), np.float32)
    experience = experience._replace(rewards=rewards, reward_mask=np.ones(rewards.shape, bool))

    def update() -> Any:
        nonlocal state
        state, metrics = step.learn(state, experience)
        return state, metrics

    learn_seconds, _ = repeated(update, repeats)
    learn_peak = peak_gib()
    planned = memory.plan(
        policy,
        optimizer,
        sampler,
        loss=loss,
        prompts=cell.prompts,
        prompt_tokens=cell.prompt_tokens,
        reference=False,
        updates=updates,
    )
    tokens = tokens_of(experience.rollout)
    return {
        "cell": cell.name,
        "sample_seconds": sample_seconds,
        "learn_seconds": learn_seconds,
        "decode_tokens_per_second": tokens / sample_seconds,
        "copy_bytes_per_second": bandwidth,
        "bandwidth_share": decode_bytes(cell) / sample_seconds / bandwidth,
        "learn_tokens_per_second": tokens / learn_seconds,
        "matrix_flops_per_second": rate,
        "flops_utilisation": learn_flops(cell) / learn_seconds / rate,
        "sample_peak_gib": sample_peak,
        "learn_peak_gib": learn_peak,
        "planned_peak_gib": planned.peak / 2**30,
        "micro_batches": found.micro_batches,
    }


def repeated(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The median seconds of a call after one that compiles, and its last result."""
    result, seconds = jax.block_until_ready(run()), []
    for _ in range(repeats):
        del result  # the device need not hold two
        started = time.perf_counter()
        result = jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def tokens_of(rollout: Rollout) -> int:
    return int(np.sum(rollout.lengths))


def gpu() -> jax.Device | None:
    """The first GPU, or None."""
    device = jax.devices()[0]
    return device if device.platform == "gpu" else None


def main(config: Config) -> Path:
    """Measures each cell in a process of its own; returns the path of the report."""
    # Asked in a process of its own: this one must not hold the memory of the device.
    with tempfile.TemporaryDirectory() as scratch:
        asked = start({"ask": True}, Path(scratch) / "ask.log")
        device = worker.receive(asked)
        worker.stop(asked)
        if device["device"] is None:
            raise SystemExit(
                f"no GPU: jax {jax.__version__} sees only {device['sees']}. For CUDA: pip install grpo-jax[cuda]"
            )
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with config.output.open("w") as file:

            def record(line: worker.Line) -> None:
                print(json.dumps(line), file=file, flush=True)
                print(line, flush=True)

            record({"kind": "machine", **device, "jax": jax.__version__})
            for name in config.cells:
                for attends in config.attentions:
                    arguments = {"cell": name, "repeats": config.repeats, "attention": attends}
                    process = start(arguments, Path(scratch) / f"{name}-{attends}.log")
                    try:
                        record({"kind": "gpu", "attention": attends} | worker.receive(process))
                    except RuntimeError as error:
                        what = f"{name} with {attends}"
                        record({"kind": "left_out", "what": what, "why": str(error).strip().splitlines()[-1]})
                    finally:
                        worker.stop(process)
            if config.trl:
                measure_trl(config.cells[0], config.repeats, Path(scratch), record)
    return report.write(config.output)


def measure_trl(name: str, repeats: int, scratch: Path, record: Callable[[worker.Line], None]) -> None:
    """TRL's step on a cell, without a reference policy, in each of its micro-batches."""
    cell, checkpoint = GPU_CELLS[name].cell, scratch / "checkpoint"
    # By a process on the CPU: this one must not hold the memory of the device.
    writer = worker.start(sys.executable, "gpu", {"cell": name, "write": str(checkpoint)}, scratch / "write.log")
    worker.receive(writer)
    worker.stop(writer)
    for micro_batch in (size for size in TRL_MICRO_BATCHES if cell.rows % size == 0):
        arguments = {"cell": cells.to_json(cell), "checkpoint": str(checkpoint), "micro_batch": micro_batch}
        log = scratch / f"trl-{micro_batch}.log"
        process = worker.start(sys.executable, "trl_peer", arguments | {"beta": 0.0, "cuda": True}, log, torch=True)
        try:
            worker.receive(process)
            worker.ask(process, {})  # a warm-up
            steps = [worker.ask(process, {}) for _ in range(repeats)]
            phases = {name: statistics.median(step[name] for step in steps) for name in ("whole", "generate", "train")}
            peak = max(step["peak_mib"] for step in steps) / 1024
            record({"kind": "gpu_trl", "cell": cell.name, "micro_batch": micro_batch, **phases, "peak_gib": peak})
        except RuntimeError as error:
            what = f"trl on {cell.name} in micro-batches of {micro_batch}"
            record({"kind": "left_out", "what": what, "why": str(error).strip().splitlines()[-1]})
        finally:
            worker.stop(process)


def start(arguments: worker.Line, log: Path) -> worker.Worker:
    """A process of this module, on whatever device jax finds."""
    return worker.start(sys.executable, "gpu", arguments, log, environment={"JAX_PLATFORMS": ""})


def work(arguments: worker.Line) -> None:
    """What a process of `main` does."""
    _, send = worker.open_channel()
    if arguments.get("ask"):
        found = gpu()
        send({"device": found and found.device_kind, "sees": str(jax.devices())})
    elif "write" in arguments:
        cells.write_checkpoint(GPU_CELLS[arguments["cell"]].cell.model, Path(arguments["write"]))
        send({"written": True})
    else:
        attends = getattr(attention, arguments["attention"])
        send(measure(GPU_CELLS[arguments["cell"]], arguments["repeats"], attends))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        work(json.loads(sys.argv[1]))
    else:
        print(main(tyro.cli(Config, description=__doc__)))
