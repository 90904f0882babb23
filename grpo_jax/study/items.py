"""Items of an evaluation: which completions are right, the numbers of all, the file, the table on a terminal.

An item is one prompt, as plain values: `row` (its index), `prompt`, `completions`, `lengths` in tokens, `truncated`,
`rewards` by name (None where there is none), `right` (None where it could not be scored), `pass_rate` (the share of
scored completions that are right; None if none was), and `answers` where they were extracted. A tag that the prompt
opens, from which the completions go on, is `opened` (`rewards.formats.opened_by`). Of conversations, `completions` is
what the policy wrote, and `turns` all of it: who wrote what.
`write_items` keeps them, `data.read_jsonl` reads them, and `mark_right` and `summarise` work on either.
"""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import rich.table
import rich.text

from grpo_jax.data import Text
from grpo_jax.study.intervals import bootstrap
from grpo_jax.study.pass_at_k import majority_at_k, pass_at_k

Item = dict[str, Any]
Extract = Callable[[str], str | None]
AnyRow = TypeVar("AnyRow")


def mark_right(
    items: Sequence[Item], *, accuracy: str | None = None, threshold: float = 1.0, extract: Extract | None = None
) -> list[Item]:
    """The items with `right` and `pass_rate` by one of their rewards, and with `answers` where asked for.

    Args:
      items: of an evaluation.
      accuracy: the name of the reward that says what is right; None for the first.
      threshold: a completion is right if that reward is at least this.
      extract: the answer in a completion, None if it has none, for `majority@k`.

    Raises:
      ValueError: if `accuracy` is none of the rewards.
    """
    marked = []
    for item in items:
        names = list(item["rewards"])
        if accuracy is not None and accuracy not in names:
            raise ValueError(f"accuracy is the name of a reward function, one of {', '.join(names)}, got {accuracy!r}")
        scores = item["rewards"][accuracy or names[0]]
        # Rewards are float32, in which 0.9 is less.
        right = [None if score is None else bool(score >= np.float32(threshold)) for score in scores]
        scored = [value for value in right if value is not None]
        item = item | {"right": right, "pass_rate": sum(scored) / len(scored) if scored else None}
        if extract is not None:
            item["answers"] = [extract(item.get("opened", "") + completion) for completion in item["completions"]]
        marked.append(item)
    return marked


def summarise(items: Sequence[Item], *, k: Sequence[int] = (), level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """The numbers of an evaluation.

    Args:
      items: of an evaluation, or read from where they were written.
      k: for pass@k and majority@k.
      level: of the intervals.
      seed: of the subsets of majority@k.

    Returns:
      `accuracy`, the mean pass rate, which is the greedy accuracy if the completions
      were greedy; for each `k` `pass@k` and, if there are answers, `majority@k`; each of
      these with `_low` and `_high`, the ends of its interval over prompts. A completion
      that could not be scored is left out, and so is a prompt of which fewer than `k`
      could be (of which none could, for the accuracy); NaN where nothing is left. Then
      the shares of prompts `always_solved` and `never_solved`, and over all completions
      the shares `truncated` and `unscored`, the mean `length` in tokens, and the mean
      `reward/<name>`.

    Raises:
      ValueError: for a `k` below 1 or above the number of completions.
    """
    most = max((len(item["completions"]) for item in items), default=0)
    if wrong := [number for number in k if not 1 <= number <= most]:
        raise ValueError(f"k is from 1 to the {most} completions per prompt, got {wrong[0]}")
    scored = [[right is not None for right in item["right"]] for item in items]
    right = [list(itertools.compress(item["right"], told)) for item, told in zip(items, scored, strict=True)]
    rates = pass_rates(items)
    measured = {"accuracy": rates[~np.isnan(rates)]}
    for number in k:
        enough = [i for i, judgements in enumerate(right) if len(judgements) >= number]
        n, c = [len(right[i]) for i in enough], [sum(right[i]) for i in enough]
        measured[f"pass@{number}"] = pass_at_k(c, n, number)
        if items and "answers" in items[0]:
            answers = [list(itertools.compress(items[i]["answers"], scored[i])) for i in enough]
            measured[f"majority@{number}"] = majority_at_k(answers, [right[i] for i in enough], number, seed=seed)
    summary: dict[str, float] = {}
    for name, values in measured.items():
        mean, low, high = bootstrap(values, level=level) if values.size else (math.nan,) * 3
        summary |= {name: mean, f"{name}_low": low, f"{name}_high": high}

    def over_completions(column: str) -> list[float]:
        return [value for item in items for value in item[column]]

    summary |= {
        "always_solved": _mean(measured["accuracy"] == 1),
        "never_solved": _mean(measured["accuracy"] == 0),
        "truncated": _mean(over_completions("truncated")),
        "unscored": _mean([right is None for right in over_completions("right")]),
        "length": _mean(over_completions("lengths")),
    }
    for name in items[0]["rewards"] if items else ():
        scores = [value for item in items for value in item["rewards"][name] if value is not None]
        summary[f"reward/{name}"] = _mean(scores)
    return summary


def _mean(values: Any) -> float:
    values = np.asarray(values, np.float64)
    return float(values.mean()) if values.size else math.nan


def pass_rates(items: Sequence[Item]) -> np.ndarray:
    """`[N]`, the share of each prompt's scored completions that are right; NaN where none was scored."""
    return np.array([math.nan if item["pass_rate"] is None else item["pass_rate"] for item in items], np.float64)


def between(
    rows: Sequence[AnyRow], rates: np.ndarray | Sequence[float], *, low: float = 0.0, high: float = 1.0
) -> list[AnyRow]:
    """The rows with `low < pass rate < high`; by default those that are solved sometimes, but not always.

    A row that is always or never solved gives zero-variance groups, whose advantages are 0. A row with rate NaN,
    which could not be scored, is left out.

    Raises:
      ValueError: for another number of rates than rows, or an empty range.
    """
    if len(rows) != len(rates):
        raise ValueError(f"{len(rates)} pass rates for {len(rows)} rows")
    if not low < high:
        raise ValueError(f"low is less than high, got {low} and {high}")
    return [row for row, rate in zip(rows, rates, strict=True) if low < rate < high]


def write_items(path: str | os.PathLike[str], items: Sequence[Item]) -> None:
    """Writes items as JSON lines, in ASCII; what was at the path is replaced."""
    lines = [json.dumps(item, allow_nan=False) + "\n" for item in items]
    pathlib.Path(path).write_text("".join(lines), encoding="ascii")


def sample_table(items: Sequence[Item], n: int = 4, *, completions: int = 2, characters: int = 400) -> rich.table.Table:
    """The first `n` items as a table of prompt, completion and reward by reward, for `rich.print`.

    What a model writes could move the cursor, clear the screen or turn the text around:
    such characters are shown as escapes.

    Args:
      items: of an evaluation.
      n: prompts.
      completions: of each prompt, the first ones.
      characters: longer texts are cut in the middle.
    """
    table = rich.table.Table(show_lines=True)
    names = list(items[0]["rewards"]) if items else []
    for name in ("prompt", "completion"):
        table.add_column(name, overflow="fold")
    for name in names:
        table.add_column(rich.text.Text(name), justify="right")
    for item in items[:n]:
        for g, completion in enumerate(_shown(item)[:completions]):
            scores = [item["rewards"][name][g] for name in names]
            shown = ["-" if score is None else f"{score:.3g}" for score in scores]
            prompt = _plain_prompt(item["prompt"]) if g == 0 else ""
            cells = [_visible(prompt, characters), _visible(completion, characters), *shown]
            table.add_row(*map(rich.text.Text, cells))
    return table


def _shown(item: Item) -> list[str]:
    if "turns" not in item:
        return list(item["completions"])
    return ["\n".join(f"{part['by']}> {part['text']}" for part in turns) for turns in item["turns"]]


def _plain_prompt(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or message.get('tool_calls')}" for message in prompt)


def _visible(text: str, characters: int) -> str:
    if len(text) > characters:
        text = f"{text[: characters // 2]} ... {text[len(text) - characters // 2 :]}"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
