"""A plain script's first steps, every second counted: `python -m benchmarks.first_steps`.

For each cell: `plain` with nothing kept, `plain` again with the programs of the first, TRL in the micro-batches given,
and the floor, in turn. The table has the mean of all steps, compiling included, the median of the last half, and the
peak; the first lines say what machine it was. Fifty steps of all cells take an hour and a half on 2 cores, and mean
something on a quiet machine only: `--steps 3 --cells W3` shows that it runs.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import cells, report, run, worker
from benchmarks.worker import Line, Worker

ORDER = ("plain", "plain, programs kept", "trl", "floor")  # ours first: where lengths differ it draws them


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    cells: tuple[Literal["W1", "W2", "W3", "small", "long"], ...] = ("W1", "W2", "W3", "small")
    steps: int = 50
    trl: bool = True
    trl_micro_batch: int = 8  # completions; the fastest of those that `benchmarks.run` has tried
    floor_steps: int = 3  # it does not change from step to step
    output: Path = Path("first_steps.jsonl")  # the lines; the table is printed


def main(config: Config) -> str:
    """Measures, and returns the table."""
    lines: list[Line] = [{"kind": "machine"} | run.machine() | processor()]
    with config.output.open("w") as file, tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(lines[0]), file=file, flush=True)
        for name in config.cells:
            for line in measure(cells.CELLS[name], config, Path(scratch)):
                print(json.dumps(line), file=file, flush=True)
                lines.append(line)
    about = "\n".join(f"- {name}: {value}" for name, value in lines[0].items() if name != "kind")
    return f"{about}\n\n{table(lines)}"


def measure(cell: cells.Cell, config: Config, scratch: Path) -> list[Line]:
    """The steps of all systems on a cell, each system in a process of its own that ends before the next begins."""
    checkpoint = cells.write_checkpoint(cell.model, scratch / cell.name)
    shared = {"cell": cells.to_json(cell), "checkpoint": str(checkpoint)}
    kept = {"programs": str(scratch / f"{cell.name}-programs")}
    systems: dict[str, tuple[str, Line, int]] = {
        "plain": ("plain", {}, config.steps),
        "to keep programs": ("plain", kept, config.steps),
        "plain, programs kept": ("plain", kept, config.steps),
        "trl": ("trl_peer", {"micro_batch": config.trl_micro_batch}, config.steps if config.trl else 0),
        "floor": ("floor", {}, config.floor_steps),
    }
    drawn: list[Line] = []  # the lengths of each step
    lines = []
    for system, (module, setting, steps) in systems.items():
        if not steps:
            continue
        log = scratch / f"{cell.name}-{system}.log"
        started = worker.start(sys.executable, module, shared | setting, log, torch=system == "trl")
        try:
            found = answers(started, drawn, steps)
        except RuntimeError as error:
            if system != "trl":
                raise
            print(f"TRL is left out of {cell.name}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            continue
        for line in found:
            if system == "plain" and cell.mean_length is not None:
                drawn.append({"lengths": line["lengths"]})
            if system in ORDER:
                lines.append({"kind": "first_steps", "cell": cell.name, "system": system, **line})
    return lines


def answers(started: Worker, requests: list[Line], steps: int) -> list[Line]:
    """What a worker answers to so many requests; of no lengths, where none are given."""
    try:
        worker.receive(started)
        asked = [requests[n] if n < len(requests) else {} for n in range(steps)]
        return [worker.ask(started, request) for request in asked]
    finally:
        worker.stop(started)


def table(lines: list[Line]) -> str:
    """Seconds a step of each system on each cell, against TRL's and the floor's, and the peaks."""
    rows = []
    for cell in dict.fromkeys(line["cell"] for line in report.of_kind(lines, "first_steps")):
        steps = {system: report.of_kind(lines, "first_steps", cell=cell, system=system) for system in ORDER}
        mean = {system: statistics.fmean(x["whole"] for x in found) for system, found in steps.items() if found}
        steady = {
            system: statistics.median(x["whole"] for x in found[len(found) // 2 :])
            for system, found in steps.items()
            if found
        }
        for system in mean:
            last = steps[system][-1]
            rows.append(
                (
                    cell,
                    system,
                    str(len(steps[system])),
                    f"{mean[system]:.2f}",
                    f"{steady[system]:.2f}",
                    f"{mean['trl'] / mean[system]:.2f}x" if "trl" in mean else "",
                    f"{steady['trl'] / steady[system]:.2f}x" if "trl" in mean else "",
                    f"{steady[system] / steady['floor']:.1f}" if "floor" in mean else "",
                    f"{last['peak_mib']:.0f}" if "peak_mib" in last else "",
                    str(last.get("programs", "")),
                )
            )
    head = (
        *("cell", "system", "steps", "mean of all, s", "median of the last half, s", "mean against TRL"),
        *("median against TRL", "median / floor", "peak MiB", "programs"),
    )
    return report.table(head, rows)


def processor() -> Line:
    """What `lscpu` says of the processor: its model, caches and the threads of a core; nothing where there is none."""
    try:
        told = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    fields = [(field["field"].rstrip(":"), field["data"]) for field in _flat(json.loads(told)["lscpu"])]
    wanted = ("Model name", "Thread(s) per core", "L1d", "L2", "L3", "Hypervisor vendor")
    return {name: data for name, data in fields if name.startswith(wanted)} | {"load_1_5_15": str(os.getloadavg())}


def _flat(fields: list[Line]) -> list[Line]:
    """The fields and those below them."""
    return [inner for field in fields for inner in (field, *_flat(field.get("children", [])))]


if __name__ == "__main__":
    print(main(tyro.cli(Config, description=__doc__)))
