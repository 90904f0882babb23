"""Tables of summaries in Markdown and for a terminal."""

import io

import rich.console

from grpo_jax.study import tables
from grpo_jax.study.intervals import Interval

SUMMARY = {
    "a [1]": {"score": Interval(0.51234, 0.4, 0.6), "length": Interval(12345.0, 12000.0, 13000.0)},
    "b[sum]": {"score": Interval(-0.5, -1.0, 0.0), "score - a": Interval(-1.0, -1.6, -0.4)},
}


def test_the_markdown_holds_every_interval_and_leaves_out_what_there_is_not():
    assert tables.markdown(*tables.cells(SUMMARY)).splitlines() == [
        "| condition | score | length | score - a |",
        "| --- | --- | --- | --- |",
        "| a [1] | 0.512 [0.4, 0.6] | 1.23e+04 [1.2e+04, 1.3e+04] |  |",
        "| b[sum] | -0.5 [-1, 0] |  | -1 [-1.6, -0.4] |",
    ]


def test_the_table_holds_the_same_cells():
    """Names are no markup, though they may have brackets."""
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(tables.terminal(*tables.cells(SUMMARY)))
    lines = [line for line in console.file.getvalue().splitlines() if any(map(str.isalpha, line))]
    cells = [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]
    header, _, *body = tables.markdown(*tables.cells(SUMMARY)).splitlines()
    assert cells == [[cell.strip() for cell in line[1:-1].split("|")] for line in (header, *body)]
