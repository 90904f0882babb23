"""What a step of distillation costs beside one of GRPO, with a teacher of the policy's size.

    python -m benchmarks.distillation

A row for each way to be compared with the teacher, on W1 and small of the benchmarks: seconds of `collect` and `learn`,
and the step as a multiple of GRPO's, whose reference is scored as the teacher is. The ways take turns, so that what
else the machine does falls on all of them. MiB are those of the plan of a step's memory, which is read from the very
programs that run: at the worst moment of learning beside the state, and the peak of all. All ways are held at once,
which is 8 GB on small.
"""

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cells, report
from benchmarks.cells import Cell
from benchmarks.ours import MICRO_BATCHES, prompts_of, rewarded
from grpo_jax import losses, models, sampling
from grpo_jax.protocols import Loss
from grpo_jax.run import memory
from grpo_jax.scoring import Teacher
from grpo_jax.study.footprints import timed
from grpo_jax.updates import Updates, init_state


class Way(NamedTuple):
    """A loss, and what of a teacher it reads: the log-probs of the tokens drawn, or a divergence."""

    loss: Loss
    divergence: Any = None


WAYS = {
    "GRPO, k3 of a reference": Way(losses.grpo(penalty=losses.k3(cells.BETA))),
    "reverse KL of the token drawn": Way(losses.sampled_reverse_kl()),
    "reverse KL, the teacher's top 64": Way(losses.distill(), losses.of_top_k(losses.reverse_kl, 64)),
    "reverse KL": Way(losses.distill(), losses.reverse_kl),
    "JSD, beta 0.5": Way(losses.distill(), losses.generalised_jsd(0.5)),
    "GRPO + 0.1 x reverse KL": Way(losses.plus(losses.grpo(), losses.distill(0.1)), losses.reverse_kl),
}


def steps(cell: Cell, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """A line for each of `WAYS`, in float32 and as many micro-batches as the step of the report has."""
    policy = models.decoder(models.from_hf_config(cells.hf_config(cell.model)))
    params, teacher = (jax.jit(policy.init)(jax.random.key(seed)) for seed in (0, 1))
    optimizer = optax.adamw(cells.LEARNING_RATE, weight_decay=0.0)
    prompts, rng = prompts_of(cell, 0), np.random.default_rng(0)
    planned, states = {}, {}
    for name, way in WAYS.items():
        planned[name] = memory.planned(
            policy,
            optimizer,
            sampling.sampler(group_size=cell.group, max_tokens=cell.completion_tokens, eos_ids=()),
            loss=way.loss,
            prompts=cell.prompts,
            prompt_tokens=cell.prompt_tokens,
            reference=True,
            updates=Updates(max_grad_norm=1.0, micro_batches=min(MICRO_BATCHES, cell.prompts)),
            teacher=None if way.divergence is None else Teacher(policy, way.divergence),
        )
        state = init_state(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))
        states[name] = state._replace(ref_params=jax.tree.map(jnp.copy, teacher))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(repeats + 1):
        for name, (_, programs) in planned.items():
            sampling_took, experience = timed(programs.collect, states[name], prompts)
            learning_took, (states[name], _) = timed(programs.learn, states[name], rewarded(experience, rng))
            seconds[name].append((sampling_took, learning_took))
    of_grpo = statistics.median(map(sum, seconds[next(iter(WAYS))][1:]))
    for name, times in seconds.items():
        sampled, learned = (statistics.median(phase) for phase in zip(*times[1:], strict=True))
        plan = planned[name].plan
        yield {
            "cell": cell.name,
            "learned from": name,
            "collect s": round(sampled, 3),
            "learn s": round(learned, 3),
            "a step of GRPO": round(statistics.median(map(sum, times[1:])) / of_grpo, 2),
            "learning MiB": round(plan.learning / 2**20),
            "peak MiB": round(plan.peak / 2**20),
        }


def main() -> None:
    """Prints a table of each cell."""
    for name in ("W1", "small"):
        rows = [*steps(cells.CELLS[name])]
        print(report.table([*rows[0]], ([*map(str, row.values())] for row in rows)), flush=True)


if __name__ == "__main__":
    main()
