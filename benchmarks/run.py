"""Everything that is measured on a CPU, by one command: `python -m benchmarks.run`.

For each cell every system gets a process of its own. TRL's micro-batch is chosen
first, by a step in each; then the systems take turns, a step each, so that a change
of the machine's mood meets all of them. Growth and whole runs follow. Each
measurement is a line of JSON, written as it is made; `report` makes the table and
the plot from the lines.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import cells, report, worker
from benchmarks.cells import Cell
from benchmarks.worker import Line, Worker

MICRO_BATCHES = (8, 16, 64)  # of TRL, completions
TUNIX_MICRO_BATCH = 16
TUNIX_ROUNDS = 2  # it is slow; the others go on
LONG = 15.0  # seconds; a longer first step is taken as TRL's calibration, a shorter one is a warm-up
WARM_UP = {"ours": 2, "tunix": 1, "floor": 1}  # steps that are not counted; TRL's is its calibration
PACKAGES = ("grpo-jax", "jax", "flax", "optax", "torch", "transformers", "trl", "google-tunix")

System = Literal["ours", "trl", "tunix", "floor"]
Record = Callable[[Line], None]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    cells: tuple[Literal["W1", "W2", "W3", "gemma3", "mixture", "small"], ...] = (
        "W1", "W2", "W3", "gemma3", "mixture", "small",
    )  # fmt: skip
    repeats: int = 4  # counted steps of each system on each cell
    systems: tuple[System, ...] = ("ours", "trl", "tunix", "floor")
    output: Path = Path("benchmarks/results/cpu.jsonl")  # overwritten; .md and .png are written beside it
    tunix_python: str | None = os.environ.get("TUNIX_PYTHON")  # of an environment with google-tunix; None: this one
    scaling: bool = True  # growth over G, P, T, V and model size
    whole_run: bool = True  # 8 seeds in one program
    startup: bool = True  # of the quickstart


def main(config: Config) -> Path:
    """Measures and reports; returns the path of the report."""
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with config.output.open("w") as file, tempfile.TemporaryDirectory() as scratch:

        def record(line: Line) -> None:
            print(json.dumps(line), file=file, flush=True)
            shown = {
                k: round(v, 3) if isinstance(v, float) else v for k, v in line.items() if k not in ("lengths", "flops")
            }
            print(*(f"{k}={v}" for k, v in shown.items()), flush=True)

        record({"kind": "machine"} | machine(config.tunix_python))
        for name in config.cells:
            measure_cell(cells.CELLS[name], config, Path(scratch), record)
        for module in ("scaling", "whole_run", "startup"):
            if getattr(config, module):
                drain(module, Path(scratch), record)
    return report.write(config.output)


def measure_cell(cell: Cell, config: Config, scratch: Path, record: Record) -> None:
    """Calibrates, warms up and interleaves the systems on one cell."""
    checkpoint = scratch / cell.name
    cells.write_checkpoint(cell.model, checkpoint)
    running: dict[str, tuple[Worker, Line]] = {}  # a system's worker and its setting

    def begin(system: str, setting: Line) -> Worker:
        python = (config.tunix_python if system == "tunix" else None) or sys.executable
        module = system if system in ("ours", "floor") else f"{system}_peer"
        arguments = {"cell": cells.to_json(cell), "checkpoint": str(checkpoint)} | setting
        if system == "ours":
            arguments["programs"] = str(scratch / f"{cell.name}-programs")
        log = scratch / "logs" / f"{cell.name}-{system}.log"
        started = worker.start(python, module, arguments, log, torch=system == "trl")
        try:
            worker.receive(started)
        except RuntimeError:
            worker.stop(started)
            raise
        return started

    def leave_out(system: str, why: str) -> None:
        if system in running:
            worker.stop(running.pop(system)[0])
        print(why, file=sys.stderr)
        record({"kind": "left_out", "what": f"{system} on {cell.name}", "why": why.strip().splitlines()[-1]})

    def request(n: int) -> Line:
        return {} if cell.mean_length is None else {"lengths": cells.draw_lengths(cell, n)}

    # Ours first: where lengths differ it draws those that the others are told.
    for system in sorted(config.systems, key=lambda system: system != "ours"):
        if system == "tunix" and cell.mean_length is not None:
            leave_out(system, "lengths cannot be forced on its sampler")
            continue
        if system == "tunix" and cell.model.family != "qwen2":
            leave_out(system, f"its model is made for Qwen 2, and this is {cell.model.family}")
            continue
        try:
            if system == "trl":
                running[system] = calibrate(cell, begin, request, record)
                continue
            if system == "ours":
                record({"kind": "cold", "cell": cell.name} | cold(begin, request))
            setting = {"micro_batch": max(TUNIX_MICRO_BATCH, cell.group)} if system == "tunix" else {}
            running[system] = begin(system, setting), setting
            for n in range(WARM_UP[system]):
                worker.ask(running[system][0], request(n))
        except RuntimeError as error:
            leave_out(system, str(error))

    for n in range(config.repeats):
        lengths = request(n)
        for name, (process, setting) in list(running.items()):
            if name == "tunix" and n >= TUNIX_ROUNDS:
                continue
            try:
                step = worker.ask(process, lengths)
            except RuntimeError as error:
                leave_out(name, str(error))
                continue
            if name == "ours" and cell.mean_length is not None:
                lengths = {"lengths": step["lengths"]}  # the same for those that follow
            record({"kind": "step", "cell": cell.name, "system": name, "round": n, **setting, **step})
    if "ours" in running and cell.name in ("W1", "small"):
        record({"kind": "agreement", "cell": cell.name} | worker.ask(running["ours"][0], {"agreement": True}))
    for process, _ in running.values():
        worker.stop(process)


def cold(begin: Callable[[str, Line], Worker], request: Callable[[int], Line]) -> Line:
    """The peak of our first process, which compiles the programs that the measured one then finds."""
    process = begin("ours", {})
    try:
        peaks = [worker.ask(process, request(n))["peak_mib"] for n in range(WARM_UP["ours"])]
    finally:
        worker.stop(process)
    return {"peak_mib": peaks[-1]}


def calibrate(
    cell: Cell, begin: Callable[[str, Line], Worker], request: Callable[[int], Line], record: Record
) -> tuple[Worker, Line]:
    """TRL with the micro-batch in which a step is fastest, still running."""
    best: tuple[Worker, Line] | None = None
    tried: list[Line] = []
    for size in (size for size in MICRO_BATCHES if cell.rows % size == 0):
        process = None
        try:
            process = begin("trl", {"micro_batch": size})
            step = worker.ask(process, request(0))
            if step["whole"] < LONG:
                step = worker.ask(process, request(1))
        except RuntimeError as error:  # out of memory, say; the other sizes are still to be tried
            if process is not None:
                worker.stop(process)
            what = f"trl on {cell.name} in micro-batches of {size}"
            record({"kind": "left_out", "what": what, "why": str(error).strip().splitlines()[-1]})
            continue
        fastest = all(step["whole"] < line["whole"] for line in tried)
        tried.append({"micro_batch": size, "whole": step["whole"], "peak_mib": step["peak_mib"]})
        if not fastest:
            worker.stop(process)
            continue
        if best is not None:
            worker.stop(best[0])
        best = process, {"micro_batch": size}
    if best is None:
        raise RuntimeError(f"no step in micro-batches of {MICRO_BATCHES} for {cell.rows} completions")
    for line in tried:
        kept = line["micro_batch"] == best[1]["micro_batch"]
        record({"kind": "calibration", "cell": cell.name, **line, "kept": kept})
    return best


def drain(module: str, scratch: Path, record: Record) -> None:
    """Records all lines of a module that asks for nothing."""
    process = worker.start(sys.executable, module, {}, scratch / "logs" / f"{module}.log")
    try:
        while True:
            record({"kind": module} | worker.receive(process))
    except RuntimeError as ended:
        if process.process.returncode:
            record({"kind": "left_out", "what": module, "why": str(ended).strip().splitlines()[-1]})
    finally:
        worker.stop(process)


def machine(tunix_python: str | None = None) -> Line:
    """The machine and the versions that a run was made with."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=worker.ROOT, capture_output=True, text=True)
    versions = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    if tunix_python is not None:
        code = "import importlib.metadata as m; print(m.version('google-tunix'), 'on jax', m.version('jax'))"
        asked = subprocess.run([tunix_python, "-c", code], capture_output=True, text=True)
        versions["google-tunix"] = asked.stdout.strip() or "not there"
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        **first_core(Path("/sys/devices/system/cpu/cpu0")),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
        "commit": commit.stdout.strip(),
    }


def first_core(folder: Path) -> dict[str, int | str]:
    """Threads and caches of a core, as Linux tells them in its folder; nothing where it does not."""

    def told(path: Path) -> str:
        return path.read_text().strip().lower()

    siblings, caches = folder / "topology/thread_siblings", sorted((folder / "cache").glob("index*"))
    if not siblings.exists() or not caches:
        return {}
    return {
        "threads_a_core": int(told(siblings).replace(",", ""), 16).bit_count(),
        "caches": ", ".join(f"L{told(x / 'level')} {told(x / 'type')} {told(x / 'size').upper()}" for x in caches),
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(main(tyro.cli(Config, description=__doc__)))
