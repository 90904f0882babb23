"""How a step grows from 4 to 4096 chips, on paper: `python -m benchmarks.growth`.

From the lines of `results/tpu.jsonl` for a v5p of 64 chips, of what the compiled programs ask of each chip, follows
what they ask where the same mesh has other sizes of `data`, or of `fsdp` where it has no `data` and over fewer chips
than its `fsdp`, with as many prompts for each chip (weak scaling):

    products, and memory that is read for them      as they are
    gathered and scattered over n parts             (n - 1) / n of the whole
    gradients summed over `data` of m               (m - 1) / m of the n-th part, twice
    summed over `tensor`                            as it is
    state                                           1 / n
    latency                                         a collective goes over half of a ring in each direction of a torus

and, where the prompts of all chips together stay as many (strong scaling), products and caches divided, too. Fewer
chips then have more prompts each, which they learn from in so many micro-batches: each gathers the weights and sums its
gradients, and what learning holds stays.
In the time that is written down nothing overlaps but what is read from memory and what is computed from it. The
compiler overlaps what is sent as well, where it can.

Writes `results/growth.md` and `results/growth.png`.
"""

import math
from pathlib import Path
from typing import NamedTuple

from benchmarks import report, worker
from benchmarks.tpu import GROUP, MAX_TOKENS, parts
from benchmarks.worker import Line
from grpo_jax.run import chips as kinds

RESULTS = worker.ROOT / "benchmarks/results"
CHIPS = tuple(4**k for k in range(1, 7))
TOPOLOGY = "v5p:4x4x4"
GROWN = {"Qwen2.5-7B": "data=4,fsdp=16", "Llama-3.1-70B": "fsdp=16,tensor=4"}  # the meshes of the rows
LIMIT = kinds.CHIPS["v5p"].memory
HOP = 1e-6  # seconds of a small message from a chip to the next ("How to scale your model", jax-ml.github.io, 2025)


class Grown(NamedTuple):
    """A step over some chips: seconds by phase, and bytes of a chip at the worst moment."""

    decode: float  # `collect`, its products or what it reads
    gather: float  # of the weights for sampling, and whatever else `collect` sends
    compute: float  # `learn`, its products or what it reads
    exchange: float  # what `learn` sends: weights, gradients, activations over `tensor`
    latency: float  # of the collectives of both
    memory: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.decode + self.gather + self.compute + self.exchange + self.latency


def grown(row: Line, chips: int, *, prompts: int | None = None) -> Grown:
    """The step of a row over other chips.

    Args:
      row: of `tpu.jsonl`, over a mesh of `fsdp` and one of `data` and `tensor`.
      chips: a multiple of its `tensor`.
      prompts: of all chips together; None for as many for each as in the row.
    """
    chip = kinds.CHIPS[row["topology"].partition(":")[0]]
    data, before, tensor = parts(row)
    after = chips // tensor if data == 1 else min(before, chips // tensor)
    copies = chips // (after * tensor)
    share = 1.0 if prompts is None else prompts / (copies * after) / (row["prompts"] / (data * before))  # of a chip's
    turns = max(1.0, share)  # micro-batches
    wholes = (after - 1) / after / ((before - 1) / before)
    if tensor > 1:  # activations are summed, whose size stays
        summed, together = share, tensor
    elif data > 1:  # parts of gradients
        summed, together = (copies - 1) / copies / ((data - 1) / data) * before / after, copies
    else:
        summed, together = wholes, after
    memory = row["memory"]
    state = memory["parameters"] + memory["frozen"] + memory["optimizer"] + memory["reference"]
    # In sampling caches are the rows' own, and in learning the state is read and written, of which each has its part.
    caches = row["collect"]["memory"] - MAX_TOKENS * memory["weights"]
    updated = 2 * (memory["parameters"] + memory["optimizer"] + memory["gradients"])
    read = {
        "collect": row["collect"]["memory"] + (share - 1) * caches,
        "learn": row["learn"]["memory"] + (before / after - 1) * updated + (turns - 1) * 3 * memory["weights"],
    }
    work, exchange, latency = {}, {}, 0.0
    for name in ("collect", "learn"):
        times = turns if name == "learn" else 1.0
        sent = {kind: (times * count, times * size) for kind, (count, size) in row[name]["sent"].items()}
        received = sum(size * (summed if kind == "all-reduce" else wholes) for kind, (_, size) in sent.items())
        work[name] = max(share * row[name]["flops"] / chip.flops, read[name] / chip.bandwidth)
        exchange[name] = received / chip.links
        for kind, (count, _) in sent.items():
            latency += HOP * count * _hops(kind, together if kind == "all-reduce" else after)
    learning = memory["learning"] + memory["gradients"] * (before / after - 1)
    if turns > 1:  # the sum beside those of a micro-batch
        learning += memory["gradients"] * before / after
    sampling = memory["sampling"] + (turns - 1) * (memory["prompt_cache"] + memory["completion_cache"])
    return Grown(
        work["collect"], exchange["collect"], work["learn"], exchange["learn"], latency,
        memory=state * before / after + max(sampling, learning),
    )  # fmt: skip


def _hops(kind: str, chips: int) -> float:
    """Of a collective over a cube of chips: half of a ring along each of its axes; a sum goes twice."""
    return 1.5 * chips ** (1 / 3) * (2 if kind == "all-reduce" else 1)


# ------------------------------------------------------------------------------ the report


def markdown(rows: list[Line]) -> str:
    """The tables."""
    text = [
        "# Growth, on paper",
        f"Written by `benchmarks/growth.py` from `tpu.jsonl`: what the programs compiled for {TOPOLOGY} ask of a chip, "
        "followed to other numbers of v5p chips. Seconds, if nothing that is sent overlaps with anything.",
    ]
    for row in rows:
        tensor = parts(row)[2]
        weak = [(n, grown(row, n)) for n in CHIPS if n > tensor]
        fitting = [(n, step) for n, step in weak if step.memory <= LIMIT]
        prompts = row["prompts"]
        strong = [(n, grown(row, n, prompts=prompts)) for n, _ in weak if n // tensor <= prompts * GROUP]
        strong = [(n, step) for n, step in strong if step.memory <= LIMIT]
        each = "chip" if tensor == 1 else f"{tensor} chips"
        text += [
            f"## {row['model']}, a prompt of {GROUP} completions for each {each}",
            _table(weak, fitting[0][1].seconds if fitting else math.inf),
            f"## {row['model']}, {prompts} prompts over all chips",
            _table(strong, strong[0][1].seconds * strong[0][0] if strong else math.inf, divided=True),
        ]
    return "\n\n".join(text) + "\n"


def _table(steps: list[tuple[int, Grown]], first: float, *, divided: bool = False) -> str:
    head = ("chips", *PHASES.values(), "step", "efficiency", "GB a chip")
    rows = []
    for n, step in steps:
        efficiency = first / (step.seconds * (n if divided else 1))
        fits = step.memory <= LIMIT
        numbers = (*step[:5], step.seconds)
        rows.append(
            [str(n), *(f"{x:.3g}" for x in numbers), f"{efficiency:.2f}" if fits else "does not fit",
             f"{step.memory / 1e9:.0f}"]
        )  # fmt: skip
    return report.table(head, rows)


def plot(rows: list[Line], path: Path) -> None:
    """The seconds of a step by phase, each over its number of chips."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rows), figsize=(5 * len(rows), 3.4), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        tensor = parts(row)[2]
        for style, prompts in (("-", None), ("--", row["prompts"])):
            shown = [n for n in CHIPS if n > tensor and (prompts is None or n // tensor <= prompts * GROUP)]
            steps = [grown(row, n, prompts=prompts) for n in shown]
            for color, (name, label) in enumerate(PHASES.items()):
                label = label if prompts is None else "_"
                axis.plot(shown, [getattr(step, name) for step in steps], style, color=f"C{color}", label=label)
        axis.set(xscale="log", yscale="log", xlabel="chips of a v5p", ylabel="seconds of a step", title=row["model"])
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


PHASES = {
    "decode": "decoding",
    "gather": "gathering for it",
    "compute": "learning",
    "exchange": "its exchange",
    "latency": "latency",
}


def main() -> Path:
    """Writes both files; returns the path of the tables."""
    lines = report.of_kind(report.read(RESULTS / "tpu.jsonl"), "tpu", topology=TOPOLOGY)
    rows = [line for of_row in GROWN.items() for line in lines if (line["model"], line["mesh"]) == of_row]
    path = RESULTS / "growth.md"
    path.write_text(markdown(rows))
    plot(rows, path.with_suffix(".png"))
    return path


if __name__ == "__main__":
    print(main())
