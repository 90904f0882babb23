"""What an experiment with several conditions and seeds leaves behind: rows, table and curves, by one name."""

import pathlib
from collections.abc import Sequence

from grpo_jax.study import figures, results, tables


def write_results(
    folder: pathlib.Path,
    name: str,
    rows: Sequence[results.Record],
    columns: Sequence[str],
    *,
    curves: Sequence[str] | None = None,
) -> str:
    """Writes `name.csv`, `.md` and `.png`, and returns the table, the means of the last step with intervals.

    Args:
      folder: where they go.
      name: of the experiment.
      rows: condition, seed, step and metrics.
      columns: metrics of the table.
      curves: metrics of the figure; those of the table unless given.
    """
    results.write(folder / f"{name}.csv", rows)
    table = tables.markdown(*tables.cells(results.summarise(rows, columns)))
    steps, seeds = max(row["step"] for row in rows), len({row["seed"] for row in rows})
    (folder / f"{name}.md").write_text(f"# {name}\n\nAfter {steps} steps, {seeds} seeds.\n\n{table}")
    figures.curves(rows, columns if curves is None else curves, folder / f"{name}.png")
    return table
