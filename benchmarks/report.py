"""The table and the plot, made from the JSON lines of a run and from nothing else.

python -m benchmarks.report benchmarks/results/cpu.jsonl

writes `cpu.md` and `cpu.png` beside it.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import cells
from benchmarks.worker import Line

SYSTEMS = {"ours": "grpo_jax", "trl": "TRL", "tunix": "Tunix", "floor": "matrix products alone"}
PHASES = ("generate", "score", "train")


def read(path: Path) -> list[Line]:
    """The lines of a run."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def of_kind(lines: Iterable[Line], kind: str, **fields: object) -> list[Line]:
    """The lines of a kind whose fields have these values."""
    return [line for line in lines if line["kind"] == kind and all(line.get(k) == v for k, v in fields.items())]


# ------------------------------------------------------------------------- arithmetic


def medians(lines: list[Line], cell: str, system: str) -> dict[str, float] | None:
    """Medians over the steps of a system on a cell (seconds, and MiB at the peak); None if there are none."""
    steps = of_kind(lines, "step", cell=cell, system=system)
    if not steps:
        return None
    wholes = [step["whole"] for step in steps]
    found = {name: statistics.median(step[name] for step in steps) for name in ("whole", *PHASES)}
    found |= {"steps": len(steps), "least": min(wholes), "most": max(wholes)}
    if "peak_mib" in steps[0]:
        found["peak_mib"] = max(step["peak_mib"] for step in steps)
    return found


def targets(lines: list[Line]) -> list[tuple[str, str, str, str, bool]]:
    """`(cell, what, wanted, measured, reached)` of each target that was measured."""
    found = []
    for name, target in cells.TARGETS.items():
        ours, trl = medians(lines, name, "ours"), medians(lines, name, "trl")
        if ours is None or trl is None:
            continue
        for what, wanted in (("whole", target.whole), ("generate", target.generate)):
            if wanted is not None:
                faster = trl[what] / ours[what]
                label = "whole step" if what == "whole" else "generation alone"
                found.append((name, label, f"{wanted:g}x faster", f"{faster:.2f}x", faster >= wanted))
        share = ours["peak_mib"] / trl["peak_mib"]
        limit = f"at most {target.memory:g} of TRL's"
        found.append((name, "peak memory, warm", limit, f"{share:.2f}", share <= target.memory))
        products = medians(lines, name, "floor")
        if target.floor is not None and products is not None:
            ratio = ours["generate"] / products["generate"]
            limit = f"at most {target.floor:g} of its products"
            found.append((name, "generation alone", limit, f"{ratio:.2f}", ratio <= target.floor))
    for line in of_kind(lines, "agreement"):
        for dtype, most in cells.AGREEMENT.items():
            what = f"sampler against scorer, {dtype}"
            found.append((line["cell"], what, f"within {most:g}", f"{line[dtype]:.1e}", line[dtype] <= most))
    return found


def growth(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent `b` of `y = a x^b`, by least squares of the logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.covariance(u, v) / statistics.variance(u)


# ------------------------------------------------------------------------------ table


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def markdown(lines: list[Line], plot_name: str = "") -> str:
    """The whole report."""
    parts = ["# Measured", "Written by `benchmarks/report.py` from the JSON lines beside it.", _machine(lines)]
    if plot_name:
        parts.append(f"![]({plot_name})")
    if of_kind(lines, "step"):
        parts += ["## A step, against peers", _peers(lines)]
    if rows := targets(lines):
        shown = [(*row[:4], "yes" if row[4] else "**no**") for row in rows]
        parts += ["## What was to be reached", table(("cell", "what", "wanted", "measured", "reached"), shown)]
    if of_kind(lines, "step", system="floor"):
        parts += ["## Against the matrix products alone", _floor(lines)]
    if of_kind(lines, "calibration"):
        parts += ["## TRL's micro-batches", _calibration(lines)]
    if of_kind(lines, "scaling"):
        parts += ["## Growth", _scaling(lines)]
    if of_kind(lines, "whole_run"):
        parts += ["## Several seeds in one program", _whole_run(lines)]
    if of_kind(lines, "startup"):
        parts += ["## Start of the quickstart", _startup(lines)]
    if of_kind(lines, "gpu"):
        parts += ["## On a GPU", _gpu(lines)]
    if errors := of_kind(lines, "left_out"):
        parts += ["## Left out", "\n".join(f"- {line['what']}: {line['why']}" for line in errors)]
    return "\n\n".join(parts) + "\n"


def write(path: Path) -> Path:
    """Writes the report and its plot beside the JSON lines."""
    lines = read(path)
    image = path.with_suffix(".png")
    drawn = plot(lines, image)
    report = path.with_suffix(".md")
    report.write_text(markdown(lines, image.name if drawn else ""))
    return report


def _machine(lines: list[Line]) -> str:
    machine = next(iter(of_kind(lines, "machine")), {})
    return "\n".join(f"- {name}: {value}" for name, value in machine.items() if name != "kind")


def _peers(lines: list[Line]) -> str:
    rows = []
    for name in _cells(lines):
        trl = medians(lines, name, "trl")
        for system, label in SYSTEMS.items():
            found = medians(lines, name, system)
            if found is None or system == "floor":
                continue
            setting = of_kind(lines, "step", cell=name, system=system)[0].get("micro_batch")
            first = of_kind(lines, "cold", cell=name) if system == "ours" else []
            rows.append(
                [
                    name,
                    label + (f", micro-batches of {setting}" if setting else ""),
                    f"{found['whole']:.2f} ({found['least']:.2f}-{found['most']:.2f})",
                    *(f"{found[phase]:.2f}" for phase in PHASES),
                    f"{found['peak_mib']:.0f}",
                    f"{first[0]['peak_mib']:.0f}" if first else "",
                    f"{trl['whole'] / found['whole']:.2f}x" if trl else "",
                    f"{found['steps']:.0f}",
                ]
            )
    peaks = ("peak MiB, warm", "cold")
    head = ("cell", "system", "whole step, s (least-most)", *PHASES, *peaks, "speed against TRL", "steps")
    return "\n\n".join([table(head, rows), *_lengths(lines)])


def _lengths(lines: list[Line]) -> list[str]:
    """A sentence for each cell on how long its completions really were, where that was drawn."""
    found = []
    for name in _cells(lines):
        cell = cells.CELLS.get(name)
        drawn = [n for step in of_kind(lines, "step", cell=name, system="ours") for n in step.get("lengths", ())]
        if cell is not None and cell.mean_length is not None and drawn:
            mean = statistics.fmean(min(n, cell.completion_tokens) for n in drawn)
            found.append(f"The completions of {name} had {mean:.1f} tokens on average.")
    return found


def _floor(lines: list[Line]) -> str:
    rows = []
    for name in _cells(lines):
        floor = medians(lines, name, "floor")
        if floor is None:
            continue
        others = {system: medians(lines, name, system) for system in ("ours", "trl", "tunix")}
        flops = of_kind(lines, "step", cell=name, system="floor")[0]["flops"]
        for phase in (*PHASES, "whole"):
            gflop = (sum(flops.values()) if phase == "whole" else flops[phase]) / 1e9
            ratios = [f"{found[phase] / floor[phase]:.1f}" if found else "" for found in others.values()]
            rows.append([name, phase, f"{gflop:.0f}", f"{floor[phase]:.2f}", *ratios])
    head = (
        "cell",
        "phase",
        "GFLOP",
        "floor, s",
        *(f"{SYSTEMS[system]} / floor" for system in ("ours", "trl", "tunix")),
    )
    return table(head, rows)


def _calibration(lines: list[Line]) -> str:
    rows = [
        [
            line["cell"],
            str(line["micro_batch"]),
            f"{line['whole']:.2f}",
            f"{line['peak_mib']:.0f}",
            line["kept"] * "yes",
        ]
        for line in of_kind(lines, "calibration")
    ]
    return table(("cell", "completions in a micro-batch", "whole step, s", "peak MiB", "kept"), rows)


def _scaling(lines: list[Line]) -> str:
    rows = []
    for axis, found in _axes(lines).items():
        xs = [line["x"] for line in found]
        rows.append(
            [
                axis,
                ", ".join(f"{x:g}" for x in xs),
                ", ".join(f"{line['seconds']:.2f}" for line in found),
                ", ".join(f"{line['mib']:.0f}" for line in found),
                f"{growth(xs, [line['seconds'] for line in found]):.2f}",
                f"{growth(xs[-2:], [line['seconds'] for line in found][-2:]):.2f}",
                f"{growth(xs, [line['mib'] for line in found]):.2f}",
                f"{growth(xs[-2:], [line['mib'] for line in found][-2:]):.2f}",
            ]
        )
    head = (
        "axis",
        "values",
        "step, s",
        "temporaries, MiB",
        "time grows as",
        "at the end",
        "memory grows as",
        "at the end",
    )
    note = "Growth is the exponent b of x^b, fitted over all values, and between the last two."
    return f"{table(head, rows)}\n\n{note}"


def _whole_run(lines: list[Line]) -> str:
    found = of_kind(lines, "whole_run")
    in_turn, vmapped = (statistics.median(line[name] for line in found) for name in ("in_turn", "vmapped"))
    first = found[0]
    rows = [
        [
            str(first["seeds"]),
            f"{in_turn:.2f}",
            f"{vmapped:.2f}",
            f"{in_turn / vmapped:.2f}x",
            f"{first['compile_one']:.1f}",
            f"{first['compile_vmapped']:.1f}",
            f"{first['largest_difference']:.1e}",
        ]
    ]
    head = ("seeds", "in turn, s", "vmapped, s", "ratio", "compile one, s", "compile vmapped, s", "rewards differ by")
    return table(head, rows)


def _startup(lines: list[Line]) -> str:
    rows = [
        ["kept" if line["kept"] else "compiled", f"{line['first_step']:.1f}", f"{line['whole']:.1f}"]
        for line in of_kind(lines, "startup")
    ]
    return table(("programs", "to the first step, s", "in all, s"), rows)


def _gpu(lines: list[Line]) -> str:
    found = of_kind(lines, "gpu")
    rows = [
        [
            line["cell"],
            line["attention"],
            f"{line['decode_tokens_per_second']:.0f}",
            f"{line['bandwidth_share']:.0%}",
            f"{line['learn_tokens_per_second']:.0f}",
            f"{line['flops_utilisation']:.0%}",
            f"{line['sample_peak_gib']:.1f}",
            f"{line['learn_peak_gib']:.1f}",
            f"{line['planned_peak_gib']:.1f}",
        ]
        for line in found
    ]
    head = ("cell", "attention", "decode tokens/s", "of copy bandwidth", "learning tokens/s", "of the matrix rate")
    parts = [table((*head, "peak GiB, sampling", "peak GiB, with learning", "planned"), rows)]
    for trl in of_kind(lines, "gpu_trl"):
        parts += [
            f"TRL on {trl['cell']}, micro-batches of {trl['micro_batch']}: {trl['whole']:.1f} s a step, "
            f"{trl['peak_gib']:.1f} GiB; {trl['whole'] / (ours['sample_seconds'] + ours['learn_seconds']):.2f} times "
            f"ours with {ours['attention']}."
            for ours in found
            if ours["cell"] == trl["cell"]
        ]
    return "\n\n".join(parts)


def _cells(lines: list[Line]) -> list[str]:
    return list(dict.fromkeys(line["cell"] for line in of_kind(lines, "step")))


def _axes(lines: list[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in of_kind(lines, "scaling"):
        found.setdefault(line["axis"], []).append(line)
    return {axis: points for axis, points in found.items() if len(points) > 1}


# ------------------------------------------------------------------------------- plot


def plot(lines: list[Line], path: Path) -> bool:
    """Steps by phase, and growth on logarithmic axes; False if there is neither."""
    import matplotlib.figure  # without pyplot: no window system, no global state

    from grpo_jax.study.figures import PALETTE

    names, axes_of = _cells(lines), _axes(lines)
    if not names and not axes_of:
        return False
    columns, parts = max(len(names), 2), bool(names) + bool(axes_of)
    figure = matplotlib.figure.Figure(figsize=(3 * columns, 3.5 * parts), layout="constrained")
    folds = iter(figure.subfigures(parts, 1, squeeze=False)[:, 0])
    panels = next(folds).subplots(1, len(names), squeeze=False)[0] if names else []
    for axes, name in zip(panels, names, strict=True):
        found = {system: medians(lines, name, system) for system in SYSTEMS}
        shown = {"floor" if system == "floor" else SYSTEMS[system]: m for system, m in found.items() if m}
        below = [0.0] * len(shown)
        for phase, colour in zip(PHASES, PALETTE, strict=False):
            heights = [m[phase] for m in shown.values()]
            axes.bar(list(shown), heights, bottom=below, label=phase, color=colour)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axes.set_title(name)
        axes.set_ylabel("seconds per step")
        axes.tick_params(axis="x", labelrotation=30)
        axes.margins(y=0.25)  # for the legend
        axes.legend(fontsize="small", ncols=len(PHASES), loc="upper center", columnspacing=0.8, handlelength=1.0)
    panels = next(folds).subplots(1, 2) if axes_of else []
    for axes, what, unit in zip(panels, ("seconds", "mib"), ("step, s", "temporaries, MiB"), strict=False):
        for colour, (axis, points) in zip(PALETTE, axes_of.items(), strict=False):
            smallest = points[0]["x"]
            xs, ys = [line["x"] / smallest for line in points], [line[what] for line in points]
            axes.loglog(xs, ys, marker="o", color=colour, label=f"{axis} from {smallest:g}")
        axes.set_xlabel("times the smallest")
        axes.set_ylabel(unit)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
