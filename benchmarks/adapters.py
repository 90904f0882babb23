"""What adapters and quantised bases save: seconds and bytes of a step, and which models fit which devices.

    python -m benchmarks.adapters steps          # whole weights, adapters, adapters over int8 and nf4, on W1 and small,
                                                 # beside TRL with whole weights and with peft's, where it is installed
    python -m benchmarks.adapters fits           # 0.5B to 7B: the peak of a step, and with which micro-batches it fits

`steps` runs the variants in turn, so that what else the machine does falls on all of them. Of TRL, which takes
micro-batches of 8 completions, `learn` is all that is not generation; its bytes are not counted. `fits` runs nothing:
the programs are compiled, for the backend that it runs on, from the sizes of Qwen2.5.
"""

import contextlib
import functools
import importlib.util
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cells, worker
from benchmarks.cells import Cell, Model
from benchmarks.ours import MICRO_BATCHES, prompts_of, rewarded
from grpo_jax import losses, models, sampling
from grpo_jax.models import quantized
from grpo_jax.models.settings import WeightSettings
from grpo_jax.run import memory
from grpo_jax.study.footprints import timed
from grpo_jax.train_step import make_train_step
from grpo_jax.updates import Updates, init_state

VARIANTS = {
    "whole weights": WeightSettings(),
    "LoRA, rank 16": WeightSettings(lora_rank=16),
    "LoRA, rank 16, int8": WeightSettings(lora_rank=16, quantize="int8"),
    "LoRA, rank 16, nf4": WeightSettings(lora_rank=16, quantize="nf4"),
}
TRL = {"TRL, whole weights": None, "TRL and peft, rank 16": 16}
QWEN = {  # Qwen2.5; tied is what it says of its embeddings
    "0.5B": Model(896, 24, 14, 2, 4864, 151936, tied=True),
    "1.5B": Model(1536, 28, 12, 2, 8960, 151936, tied=True),
    "3B": Model(2048, 36, 16, 2, 11008, 151936, tied=True),
    "7B": Model(3584, 28, 28, 4, 18944, 152064),
}
DEVICES = (16, 24, 80)  # GB
FITS = {"prompts": 8, "group": 8, "prompt_tokens": 512, "completion_tokens": 512}


def steps(cell: Cell, repeats: int = 4) -> Iterator[dict[str, Any]]:
    """Seconds of `collect` and `learn`, and bytes by the compiler, in float32 with a reference; a line a variant."""
    policy = models.decoder(models.from_hf_config(cells.hf_config(cell.model)))
    whole = jax.jit(policy.init)(jax.random.key(0))
    optimizer = optax.adamw(cells.LEARNING_RATE, weight_decay=0.0)
    step = make_train_step(
        policy,
        optimizer,
        sampling.sampler(group_size=cell.group, max_tokens=cell.completion_tokens, eos_ids=()),
        loss=losses.grpo(penalty=losses.k3(cells.BETA)),
        updates=Updates(max_grad_norm=1.0, micro_batches=min(MICRO_BATCHES, cell.prompts)),
    )
    jitted, states, prompts = step.jit(), {}, prompts_of(cell, 0)
    for name, weights in VARIANTS.items():
        params = whole if weights.quantize is None else quantized.quantize(whole, weights.quantize)
        trained, frozen = weights.divide(policy, jax.tree.map(jnp.copy, params), jax.random.key(1))
        states[name] = init_state(trained, optimizer, jax.random.key(0), frozen=frozen, reference=True)
    rng = np.random.default_rng(0)
    with peers(cell) as running:
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in (*states, *running)}
        for _ in range(repeats + 1):
            for name, state in states.items():
                sampling_took, experience = timed(jitted.collect, state, prompts)
                learning_took, (states[name], _) = timed(jitted.learn, state, rewarded(experience, rng))
                seconds[name].append((sampling_took, learning_took))
            for name, peer in running.items():
                took = worker.ask(peer, {})
                seconds[name].append((took["generate"], took["whole"] - took["generate"]))
    first = next(iter(states))
    whole_step = statistics.median(map(sum, seconds[first][1:]))
    for name, times in seconds.items():
        sampled, learned = (statistics.median(phase) for phase in zip(*times[1:], strict=True))
        of_a_step = statistics.median(map(sum, times[1:])) / whole_step
        line = {
            "cell": cell.name, "variant": name, "collect s": round(sampled, 3), "learn s": round(learned, 3),
            "a step of whole weights": round(of_a_step, 2),
        }  # fmt: skip
        counted = {"trained": 0, "frozen": 0, "collect": 0, "learn": 0}
        if name in states:
            state = states[name]
            kept = memory.size(state.params) + memory.size(state.opt_state) + memory.size(state.ref_params)
            of_sampling, of_learning = memory.programs(step, state, prompts)
            counted = {
                "trained": kept, "frozen": memory.size(state.frozen), "collect": of_sampling, "learn": of_learning
            }  # fmt: skip
        yield line | {f"{what} MiB": round(n / 2**20, 1) if name in states else "" for what, n in counted.items()}


@contextlib.contextmanager
def peers(cell: Cell) -> Iterator[dict[str, worker.Worker]]:
    """TRL's trainers on the same model and prompts, each in a process of its own; none where TRL is not installed."""
    running: dict[str, worker.Worker] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        try:
            if importlib.util.find_spec("trl") is not None:
                checkpoint = cells.write_checkpoint(cell.model, folder / "model")
                shared = {"cell": cells.to_json(cell), "checkpoint": str(checkpoint), "micro_batch": 8}
                for name, rank in TRL.items():
                    arguments = shared | {"lora_rank": rank}
                    log = folder / f"{rank}.log"
                    running[name] = worker.start(sys.executable, "trl_peer", arguments, log, torch=True)
                    worker.receive(running[name])
            yield running
        finally:
            for process in running.values():
                worker.stop(process)


def fits() -> Iterator[dict[str, Any]]:
    """GB of a step of 8 prompts x 8 completions, 512 + 512 tokens, in bfloat16, learned one prompt at a time.

    Beside it the fewest micro-batches with which it fits each device.
    """
    for size, model in QWEN.items():
        for name, weights in VARIANTS.items():
            if weights.quantize == "int8":
                continue
            plan = functools.cache(functools.partial(planned, model, weights))
            finest = plan(FITS["prompts"])
            kept = finest.parameters + finest.frozen + finest.optimizer
            yield {
                "model": size,
                "variant": name,
                "kept GB": round(kept / 1e9, 1),
                "collect GB": round(finest.sampling / 1e9, 1),
                "learn GB": round(finest.learning / 1e9, 1),
                "peak GB": round(finest.peak / 1e9, 1),
                **{f"{device} GB": fewest(plan, int(device * 1e9)) for device in DEVICES},
            }


def fewest(plan: Callable[[int], memory.Plan], budget: int) -> int | str:
    """The fewest micro-batches within a budget, by halves from one prompt at a time: fewer of them never take less."""
    parts = FITS["prompts"]
    if plan(parts).peak > budget:
        return "no"
    while parts > 1 and plan(parts // 2).peak <= budget:
        parts //= 2
    return parts


def planned(model: Model, weights: WeightSettings, parts: int) -> memory.Plan:
    """The plan of a step in so many micro-batches."""
    settings: Mapping[str, Any] = {
        "dtype": jnp.bfloat16, "param_dtype": weights.param_dtype(jnp.bfloat16),
        "layers_apart": False,  # which holds a copy of the layers, on CPUs
    }  # fmt: skip
    policy = models.decoder(models.from_hf_config(cells.hf_config(model), **settings))
    params, frozen = weights.shapes(policy)
    return memory.plan(
        policy,
        optax.adamw(1e-6),
        sampling.sampler(group_size=FITS["group"], max_tokens=FITS["completion_tokens"], eos_ids=()),
        loss=losses.grpo(),
        prompts=FITS["prompts"],
        prompt_tokens=FITS["prompt_tokens"],
        reference=False,
        params=params,
        frozen=frozen,
        updates=Updates(micro_batches=parts),
    )


def main(what: str) -> None:
    """Prints a table, a line as soon as it is there."""

    def of_cells() -> Iterator[dict[str, Any]]:
        for name in ("W1", "small"):
            yield from steps(cells.CELLS[name])

    rows = {"fits": fits, "steps": of_cells}[what]()
    for number, row in enumerate(rows):
        if number == 0:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
