"""Tables of results, for a terminal and in Markdown.

```python
header, lines = cells(summary)
rich.print(terminal(header, lines))
path.write_text(markdown(header, lines))
```
"""

from collections.abc import Sequence

import rich.markup
import rich.table

from grpo_jax.study.intervals import Interval
from grpo_jax.study.results import Summary

Cells = tuple[list[str], list[list[str]]]  # the header, and a line per row of the table


def cells(summary: Summary) -> Cells:
    """A line per condition with its intervals as text, empty where it has none."""
    names = list(dict.fromkeys(name for columns in summary.values() for name in columns))
    lines = [
        [condition, *(text(columns[name]) if name in columns else "" for name in names)]
        for condition, columns in summary.items()
    ]
    return ["condition", *names], lines


def text(interval: Interval) -> str:
    """`mean [low, high]`, with three digits."""
    return f"{interval.mean:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, which ends in a line break."""
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, ["---"] * len(header), *lines])


def terminal(header: Sequence[str], lines: Sequence[Sequence[str]]) -> rich.table.Table:
    """A table for `rich.print`; cells are text and not markup."""
    table = rich.table.Table(*map(rich.markup.escape, header))
    for line in lines:
        table.add_row(*map(rich.markup.escape, line))
    return table
