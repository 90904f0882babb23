"""Sampled completions, to be read while a run goes: a table in the terminal, and lines of `completions.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich
import rich.table
import rich.text

from grpo_jax.rewards.conversations import written_in_turn
from grpo_jax.rewards.host import own_texts
from grpo_jax.types import Experience, Rollout

Line = dict[str, Any]


def lines(
    experience: Experience,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    column: str = "prompt",
    count: int = 4,
) -> list[Line]:
    """Some completions of an experience, one dict each, with their rewards by name (None where there is none).

    Of a conversation, `turns` takes the place of `completion`: what the policy wrote, and what it read between.

    Args:
      experience: with rewards, as `step.learn` takes it.
      tokenizer: turns tokens into text.
      rows: of the data set, into which `prompts.info["row"]` points.
      names: one per reward function.
      column: of the rows, with the prompt.
      count: how many completions, in the order of the groups; of several processes, of those that this one rewards.
    """
    own, rollout = own_texts(experience.rollout)
    of_prompts, tokens, lengths = rollout.prompts, rollout.tokens, rollout.lengths
    rewards, mask = np.asarray(experience.rewards)[own], np.asarray(experience.reward_mask)[own]
    places = [(b, g) for b in range(tokens.shape[0]) for g in range(tokens.shape[1])][:count]
    prompts = [rows[row][column] for row in of_prompts.info["row"].tolist()]
    said = {place: {"completion": tokenizer.decode(tokens[place][: lengths[place]])} for place in places}
    if rollout.turns is not None:
        said = {place: {"turns": turns(rollout, *place, tokenizer)} for place in places}
    return [
        {"prompt": prompts[b]}
        | said[b, g]
        | {name: float(rewards[b, g, k]) if mask[b, g, k] else None for k, name in enumerate(names)}
        for b, g in places
    ]


def turns(rollout: Rollout, b: int, g: int, tokenizer: Any) -> list[dict[str, str]]:
    """A conversation as it was read and written: `by` policy or environment, and `text` with all of its tokens."""
    return [
        {"by": "policy" if wrote else "environment", "text": tokenizer.decode(tokens)}
        for tokens, wrote in written_in_turn(rollout, b, g)
    ]


def print_table(step: int, shown: Sequence[Mapping[str, Any]], *, longest: int = 400) -> None:
    """Prints completions as a table; of longer texts the end."""
    columns = list(dict.fromkeys(name for line in shown for name in line))
    table = rich.table.Table(title=f"completions of step {step}", show_lines=True)
    for name in columns:
        table.add_column(rich.text.Text(name))
    for line in shown:
        table.add_row(*(rich.text.Text(_short(line.get(name), longest)) for name in columns))
    rich.print(table)


def _short(value: Any, longest: int) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
    if isinstance(value, list) and all(isinstance(part, dict) and part.keys() == {"by", "text"} for part in value):
        text = "\n".join(f"{part['by']}> {part['text']}" for part in value)
    text = text if len(text) <= longest else f"... {text[-longest:]}"
    # A completion could move the cursor or clear the screen.
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
