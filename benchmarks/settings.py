"""A step under other settings of the machine: `python -m benchmarks.settings`.

The plain script of `plain.py` on one cell, in a process for each setting, which take turns: one core in place of two,
XLA without its threads, other widths of vectors, other ways of the C library to hold memory, large pages. The table has
the fastest step, which is robust where other work goes on, the seconds of processors, and the pages that the kernel had
to give in a step, which are exact. Ten minutes with the default repeats on 2 cores.
"""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from benchmarks import cells, report, worker


class Setting(NamedTuple):
    """What a process is started with."""

    environment: dict[str, str] | None = None
    cores: int | None = None  # how many it may use; None: all


def flags(*given: str) -> Setting:
    """Of XLA."""
    return Setting({"XLA_FLAGS": " ".join(given)})


HOLD = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
SETTINGS = {
    "as it is": Setting(),
    "one core": Setting(cores=1),
    "without threads in products": flags("--xla_cpu_multi_thread_eigen=false"),
    "vectors of 128 bits": flags("--xla_cpu_prefer_vector_width=128"),
    "vectors of 512 bits": flags("--xla_cpu_prefer_vector_width=512"),
    "no AVX-512": flags("--xla_cpu_max_isa=AVX2"),
    "malloc holds what is freed": Setting(HOLD),
    "malloc asks for large pages": Setting({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    "both": Setting(HOLD | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    cell: Literal["W1", "W2", "W3", "small", "long"] = "W1"
    settings: tuple[str, ...] = tuple(SETTINGS)
    repeats: int = 9  # steps of each that count, after two that compile


def main(config: Config) -> str:
    """Measures, and returns the table."""
    lines: dict[str, list[worker.Line]] = {name: [] for name in config.settings}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        cell = cells.CELLS[config.cell]
        checkpoint = cells.write_checkpoint(cell.model, Path(scratch) / cell.name)
        started = {}
        for n, name in enumerate(config.settings):
            environment, cores = SETTINGS[name]
            arguments: dict[str, Any] = {"cell": cells.to_json(cell), "checkpoint": str(checkpoint), "cores": cores}
            log = Path(scratch) / f"{n}.log"
            started[name] = worker.start(sys.executable, "plain", arguments, log, environment=environment)
            stack.callback(worker.stop, started[name])
        for process in started.values():
            worker.receive(process)
        for n in range(-2, config.repeats):
            for name, process in started.items():
                line = worker.ask(process, {})
                if n >= 0:
                    lines[name].append(line)
    return table(lines)


def table(lines: dict[str, list[worker.Line]]) -> str:
    """The fastest step of each setting, against the first one's."""
    rows = []
    for name, found in lines.items():
        fastest = {field: min(line[field] for line in found) for field in ("whole", "collect", "learn", "cpu", "pages")}
        first = min(line["whole"] for line in next(iter(lines.values())))
        seconds = [f"{fastest[field]:.2f}" for field in ("whole", "collect", "learn", "cpu")]
        peak = f"{found[-1]['peak_mib']:.0f}"
        rows.append((name, *seconds, f"{fastest['whole'] / first:.2f}", f"{fastest['pages']:,}", peak))
    head = ("setting", "step, s", "collect, s", "learn, s", "CPU s", "against the first", "pages a step", "peak MiB")
    return report.table(head, rows)


if __name__ == "__main__":
    print(main(tyro.cli(Config, description=__doc__)))
