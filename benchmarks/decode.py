"""Where a decode step's time goes: `python -m benchmarks.decode`.

First, exact and the same on a busy machine: the operations that XLA has compiled into the body of the decoding loop of
a cell, by kind, and the MiB that they write a token, with the layers in a loop and one after the other
(`DecoderConfig.layers_apart`). Then the seconds of a rollout with parts left out, the variants taking turns, the
fastest of each: the difference is what the part takes. About three minutes on 2 cores; `--repeats 0` only counts.
"""

import collections
import dataclasses
import re
import time
from typing import Any, Literal

import jax
import tyro

from benchmarks import cells, floor, report
from benchmarks.ours import prompts_of
from grpo_jax import models, sampling
from grpo_jax.types import Array

BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1}
NOTHING = ("parameter", "constant", "get-tuple-element", "bitcast", "tuple")  # which takes no time
MOVES = {"copy", "dynamic-slice", "slice", "transpose"}
ADDRESSES = {"add", "broadcast", "compare", "iota", "reshape", "select"}  # what the place of a slice is computed by


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    cell: Literal["W1", "W2", "small"] = "W1"
    repeats: int = 12


def main(config: Config) -> str:
    """Counts and measures, and returns the tables."""
    cell = cells.CELLS[config.cell]
    programs = {name: rollout_of(cell, **settings) for name, settings in VARIANTS.items()}
    counted = {name: operations(program.as_text() or "") for name, (program, _) in list(programs.items())[:2]}
    if not config.repeats:
        return of_operations(counted)
    return f"{of_operations(counted)}\n\n{of_seconds(cell, programs, config.repeats)}"


def without_attention(query: Array, *_: Any, **options: Any) -> Array:
    """In place of an attention: what it is asked."""
    return query


VARIANTS: dict[str, dict[str, Any]] = {
    "layers in a loop": {"layers_apart": False},
    "one after the other": {"layers_apart": True},
    "without attention": {"layers_apart": True, "attention": without_attention},
    "without norms": {"layers_apart": True, "pre_norm": False},
    "without draws, by greedy": {"layers_apart": True, "greedy": True},
}


def rollout_of(cell: cells.Cell, *, greedy: bool = False, **settings: Any) -> tuple[jax.stages.Compiled, Any]:
    """The compiled sampler of a cell, and what it is called with."""
    config = dataclasses.replace(models.from_hf_config(cells.hf_config(cell.model)), **settings)
    policy = models.decoder(config)
    sampler = sampling.sampler(group_size=cell.group, max_tokens=cell.completion_tokens, eos_ids=())
    sampler = dataclasses.replace(sampler, greedy=greedy)
    params = jax.jit(policy.init)(jax.random.key(0))
    given = params, prompts_of(cell, 0), jax.random.key(1)
    return jax.jit(lambda *given: sampler(policy, *given)).lower(*given).compile(), given


def of_operations(counted: dict[str, dict[str, tuple[int, int]]]) -> str:
    """The table of kinds, those that write most first."""
    kinds = sorted({kind for found in counted.values() for kind in found}, key=lambda kind: -_most(counted, kind))
    rows = []
    for kind in [*kinds, "all"]:
        row = [kind]
        for found in counted.values():
            these = list(found.values()) if kind == "all" else [found.get(kind, (0, 0))]
            row += [str(sum(number for number, _ in these)), f"{sum(size for _, size in these) / 2**20:.2f}"]
        rows.append(row)
    head = ["an operation a token", *(x for name in counted for x in (name, "MiB written"))]
    return report.table(head, rows)


def _most(counted: dict[str, dict[str, tuple[int, int]]], kind: str) -> int:
    return max(found.get(kind, (0, 0))[1] for found in counted.values())


def of_seconds(cell: cells.Cell, programs: dict[str, tuple[jax.stages.Compiled, Any]], repeats: int) -> str:
    """The table of the fastest rollouts, and the floor's products of the same tokens."""
    seconds: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    answer = floor.make_step(cell)
    for _ in range(repeats + 1):
        for name, (program, given) in programs.items():
            cpu, began = time.process_time(), time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds[name].append((time.perf_counter() - began, time.process_time() - cpu))
    least = min(answer({})["generate"] for _ in range(max(3, repeats // 3)))
    rows = []
    for name, found in seconds.items():
        whole, cpu = (min(x) for x in zip(*found[1:], strict=True))
        rows.append((name, f"{whole:.3f}", f"{cpu:.3f}", f"{whole / least:.2f}"))
    rows.append(("the floor", f"{least:.3f}", "", "1"))
    return report.table(("a rollout", "s", "CPU s", "against the floor"), rows)


# ------------------------------------------------------------------ what XLA has compiled


Operation = tuple[str, str, str, str]  # its name, form, kind and the rest of its line


def operations(text: str) -> dict[str, tuple[int, int]]:
    """How often an operation of each kind is run in the longest loop of a program, a turn, and what that writes."""
    computations: dict[str, list[Operation]] = {}
    inside: list[Operation] = []
    entry = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            inside.append((found[1], found[2], found[3], found[4]))
    forms = {name: form for body in computations.values() for name, form, _, _ in body}
    bodies = [_named(rest, "body") for _, _, kind, rest in computations[entry] if kind == "while"]
    counts: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))

    def count(body: str, times: int) -> None:
        for operation in computations[body]:
            _, form, kind, rest = operation
            if kind == "while":
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
                count(_named(rest, "body"), times * (int(turns[1]) if turns else 1))
            elif kind not in NOTHING:
                of_fusion = computations[_named(rest, "calls")] if kind == "fusion" else []
                name, size = _kind(operation, of_fusion), _size(form)
                if name == "writing into the cache and records":  # in place: what is new, not what is there
                    new = [re.findall(r"%([\w.\-]+)", x[3])[1] for x in of_fusion if x[2] == "dynamic-update-slice"]
                    size = sum(_size(forms[x]) for x in new)
                number, written = counts[name]
                counts[name] = number + times, written + times * size

    count(max(bodies, key=lambda body: len(computations[body])), 1)
    return counts


def _named(rest: str, what: str) -> str:
    found = re.search(rf"{what}=%?([\w.\-]+)", rest)
    assert found is not None, rest
    return found[1]


def _kind(operation: Operation, of_fusion: list[Operation]) -> str:
    kinds = {kind for _, _, kind, _ in of_fusion} - set(NOTHING) or {operation[2]}
    if "dot" in kinds:
        return "matrix products"
    if "dynamic-update-slice" in kinds:
        return "writing into the cache and records"
    if kinds & MOVES and kinds <= MOVES | ADDRESSES and _size(operation[1]) >= 2**12:
        return "copies of weights, keys and values"
    if kinds == {"copy"}:
        return "copies of numbers"
    return "all else"


def _size(form: str) -> int:
    """Bytes of arrays such as `f32[4,8]`."""
    total = 0
    for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", form):
        count = BYTES.get(dtype, 0)
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count
    return total


if __name__ == "__main__":
    print(main(tyro.cli(Config, description=__doc__)))
