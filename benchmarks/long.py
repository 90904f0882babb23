"""What long completions take of memory: `python -m benchmarks.long`.

The two programs of a step are compiled for 8 x 8 completions of 512, 2,048 and 8,192 tokens of the tiny model, in
micro-batches of a prompt, and nothing is run or allocated: what they hold at their worst is what the compiler sets
aside, exact and the same on a busy machine. Attention in blocks grows as `T`; attention with all logits at once, of
which those of a micro-batch are held, as its square. The logits of a single completion in one layer,
`N T (P + T)` numbers, stand beside them. A minute on a core.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import optax
import tyro

from benchmarks import cells, report
from grpo_jax import losses, models, sampling
from grpo_jax.models import attention
from grpo_jax.run import memory
from grpo_jax.updates import Updates

CELL = cells.CELLS["long"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    tokens: tuple[int, ...] = (512, 2048, 8192)
    tokens_of_reference: tuple[int, ...] = (512, 2048)  # for which all logits at once are compiled, too


class Sizes(NamedTuple):
    """What a step holds beside its state, in MiB."""

    attention: str
    T: int
    sample: float
    learn: float
    logits: float  # of attention, of one completion in one layer


def main(config: Config) -> str:
    """Compiles, and returns the table."""
    forms = {attention.auto: config.tokens, attention.reference: config.tokens_of_reference}
    return table([sizes(T, form) for form, lengths in forms.items() for T in lengths])


def sizes(T: int, form: attention.Attention, cell: cells.Cell = CELL) -> Sizes:
    """Of the programs of completions of `T` tokens."""
    policy = models.decoder(models.from_hf_config(cells.hf_config(cell.model), attention=form))
    plan = memory.plan(
        policy,
        optax.adamw(cells.LEARNING_RATE, weight_decay=0.0),
        sampling.sampler(group_size=cell.group, max_tokens=T, eos_ids=()),
        loss=losses.grpo(penalty=losses.k3(cells.BETA)),
        prompts=cell.prompts,
        prompt_tokens=cell.prompt_tokens,
        reference=True,
        updates=Updates(micro_batches=cell.prompts),
    )
    logits = 4 * cell.model.heads * T * (cell.prompt_tokens + T)
    return Sizes(form.__name__, T, *(n / 2**20 for n in (plan.sampling, plan.learning, logits)))


def table(lines: Sequence[Sizes]) -> str:
    """The sizes, and as which power of `T` each has grown since the line above."""
    rows = []
    for before, line in zip((None, *lines[:-1]), lines, strict=True):
        row = [line.attention, f"{line.T:,}"]
        for now, then in zip(line[2:], before[2:] if before else line[2:], strict=True):
            grown = before is not None and before.attention == line.attention
            power = f" (T^{math.log(now / then) / math.log(line.T / before.T):.2f})" if before and grown else ""
            row.append(f"{now:,.0f}{power}")
        rows.append(row)
    return report.table(("attention", "T", "sample, MiB", "learn, MiB", "logits of one completion, MiB"), rows)


if __name__ == "__main__":
    print(main(tyro.cli(Config, description=__doc__)))
