"""How good a policy is on a task: accuracy, pass@k and majority@k, each with an interval, and an item a prompt.

    summary, items = evaluate(policy, params, tokenizer, rows, [correct], eos_ids=eos_ids, max_tokens=512, greedy=True)
    summary, items = evaluate(..., group_size=16, k=(1, 4, 16), extract=answer)
    kept = between(rows, pass_rates(items))      # what the model solves sometimes: there a group has spread

An item is a dict of plain values, a line of JSON, and has all that a summary is made of:
`write_items` keeps them, `data.read_jsonl` reads them again and `summarise` sums them up anew.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import rich.table
import rich.text
from transformers import PreTrainedTokenizerBase

from grpo_jax import data, rewards, sampling
from grpo_jax.policies import Policy
from grpo_jax.rewards.calling import LogMetric, RewardFunction
from grpo_jax.study.intervals import bootstrap
from grpo_jax.study.pass_at_k import majority_at_k, pass_at_k
from grpo_jax.types import Array, Params, Rollout

Item = dict[str, Any]
Extract = Callable[[str], str | None]
Kept = TypeVar("Kept")

# -------------------------------------------------------------------------- of a policy


def evaluate(
    policy: Policy,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    functions: Sequence[RewardFunction],
    *,
    eos_ids: Sequence[int],
    max_tokens: int,
    group_size: int = 1,
    k: Sequence[int] = (),
    greedy: bool = False,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    extract: Extract | None = None,
    accuracy: str | None = None,
    threshold: float = 1.0,
    prompts: Sequence[Sequence[int]] | None = None,
    prompt_column: str = "prompt",
    log_metric: LogMetric | None = None,
    trainer_state: rewards.TrainerState | None = None,
    batch_size: int = 64,
    bucket: int = 64,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, float], list[Item]]:
    """Samples completions for each row, has the reward functions judge them, and sums up.

    One program is compiled for each width of a batch of prompts. The same seed and
    `batch_size` draw the same completions.

    Args:
      policy: any.
      params: its parameters, such as `state.params` in the middle of a run.
      tokenizer: of the policy.
      rows: `N` of them, with the prompt, as text or chat messages, and the columns that
        the functions ask for.
      functions: as `rewards.host` takes them; their exceptions pass through.
      eos_ids: tokens that end a completion.
      max_tokens: the longest completion.
      group_size: `n`, completions of each prompt.
      k: for which pass@k and majority@k are wanted, each at most `group_size`.
      greedy: take the likeliest completion, of which there is one.
      temperature: as in `sampling.sample`.
      top_k: as in `sampling.sample`.
      top_p: as in `sampling.sample`.
      extract: the answer in a completion, None if it has none; without it there is no
        majority.
      accuracy: the name of the function that says what is right; None for the first.
      threshold: a completion is right if that function gives it at least this much.
      prompts: the rows' prompts as tokens; None encodes them by `data.encode_prompt`.
      prompt_column: the name of the prompt's column.
      log_metric: as of `rewards.host`, what reward functions log, once a batch.
      trainer_state: the place in the run, for reward functions that ask for it.
      batch_size: prompts sampled at a time.
      bucket: prompts are padded to a multiple of it, so that few programs compile.
      level: of the intervals.
      seed: of sampling and intervals.

    Returns:
      The summary (see `summarise`) and an item a row, in their order: `row` (its index),
      `prompt`, `completions` as the functions saw them, `lengths` in tokens, `truncated`,
      `rewards` by name (None where there was none to give), `right` (None likewise),
      `answers` if they were extracted, and `pass_rate`, the share of judged completions
      that are right (None if none was judged).

    Raises:
      ValueError: for no rows or functions, two functions of one name, an `accuracy` that
        is none of them, a `k` out of range, several greedy completions, or another
        number of `prompts`.
    """
    names = [rewards.name_of(function) for function in functions]
    _check(rows, names, accuracy, group_size, k, greedy)
    if prompts is None:
        prompts = [data.encode_prompt(tokenizer, row[prompt_column]) for row in rows]
    if len(prompts) != len(rows):
        raise ValueError(f"{len(prompts)} prompts for {len(rows)} rows")
    reward = rewards.host(
        functions, rows, tokenizer, prompt_column=prompt_column, eos_ids=eos_ids, log_metric=log_metric
    )
    judge = names.index(accuracy) if accuracy is not None else 0

    items: list[Item] = []
    for start in range(0, len(rows), batch_size):
        indices = np.arange(start, min(start + batch_size, len(rows)))
        # The last batch repeats rows, for the same program.
        filled = np.resize(indices, min(batch_size, len(rows))).tolist()
        rollout = dataclasses.replace(
            sampling.sampler(
                group_size=group_size,
                max_tokens=max_tokens,
                eos_ids=eos_ids,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            ),
            greedy=greedy,
        )(
            policy,
            params,
            data.make_prompts([prompts[i] for i in filled], filled, multiple=bucket),
            jax.random.fold_in(jax.random.key(seed), start),
        )
        rollout = _first(rollout, len(indices))
        given, mask = reward(rollout, trainer_state)
        right = given[..., judge] >= np.float32(threshold)  # as the rewards are: 0.9 is less in float32
        texts = rewards.completion_texts(rollout, tokenizer, eos_ids)
        for b, row in enumerate(indices.tolist()):
            judged = mask[b, :, judge]
            item = {
                "row": row,
                "prompt": rows[row][prompt_column],
                "completions": texts[b],
                "lengths": rollout.lengths[b].tolist(),
                "truncated": rollout.truncated[b].tolist(),
                "rewards": {name: _or_none(given[b, :, i], mask[b, :, i]) for i, name in enumerate(names)},
                "right": _or_none(right[b], judged),
                "pass_rate": float(right[b][judged].mean()) if judged.any() else None,
            }
            items.append(item if extract is None else item | {"answers": [extract(text) for text in texts[b]]})
    return summarise(items, k=k, level=level, seed=seed), items


def _check(
    rows: Sequence[Any], names: Sequence[str], accuracy: str | None, group_size: int, k: Sequence[int], greedy: bool
) -> None:
    if not rows or not names:
        raise ValueError(f"an evaluation needs rows and reward functions, got {len(rows)} and {len(names)}")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"several reward functions are called {', '.join(repeated)}; set their __name__")
    if accuracy is not None and accuracy not in names:
        raise ValueError(f"accuracy is the name of a reward function, one of {', '.join(names)}, got {accuracy!r}")
    if greedy and group_size != 1:
        raise ValueError(f"the {group_size} greedy completions of a prompt would be equal; group_size is 1 with greedy")
    if out := [number for number in k if not 1 <= number <= group_size]:
        raise ValueError(f"k is from 1 to group_size = {group_size}, got {out[0]}")


def _first(rollout: Rollout, count: int) -> Rollout:
    """The completions of the first prompts, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[:count], rollout)


def _or_none(values: np.ndarray, mask: np.ndarray) -> list[Any]:
    return [value if given else None for value, given in zip(values.tolist(), mask.tolist(), strict=True)]


# --------------------------------------------------------------------------- of items


def summarise(items: Sequence[Item], *, k: Sequence[int] = (), level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """The numbers of an evaluation.

    Args:
      items: of `evaluate`, or read from where they were written.
      k: for pass@k and majority@k.
      level: of the intervals.
      seed: of the intervals and of majority@k.

    Returns:
      `accuracy`, the mean pass rate, which is the greedy accuracy if the completions
      were greedy; for each `k` `pass@k` and, if there are answers, `majority@k`; each of
      these with `_low` and `_high`, the ends of its interval over prompts. A completion
      that could not be judged is left out, and so is a prompt of which fewer than `k`
      could be (of which none could, for the accuracy); NaN where nothing is left. Then
      the shares of prompts `always_solved` and `never_solved`, and over all completions
      the shares `truncated` and `unscored`, the mean `length` in tokens, and the mean
      `reward/<name>`.
    """
    judged = [[right is not None for right in item["right"]] for item in items]
    right = [list(itertools.compress(item["right"], given)) for item, given in zip(items, judged, strict=True)]
    rates = pass_rates(items)
    measured = {"accuracy": rates[~np.isnan(rates)]}
    for number in k:
        enough = [i for i, judgements in enumerate(right) if len(judgements) >= number]
        n, c = [len(right[i]) for i in enough], [sum(right[i]) for i in enough]
        measured[f"pass@{number}"] = pass_at_k(c, n, number)
        if items and "answers" in items[0]:
            answers = [list(itertools.compress(items[i]["answers"], judged[i])) for i in enough]
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
        given = [value for item in items for value in item["rewards"][name] if value is not None]
        summary[f"reward/{name}"] = _mean(given)
    return summary


def _mean(values: Any) -> float:
    values = np.asarray(values, np.float64)
    return float(values.mean()) if values.size else math.nan


def pass_rates(items: Sequence[Item]) -> np.ndarray:
    """`[N]`, the share of each prompt's judged completions that are right; NaN where none was judged."""
    return np.array([math.nan if item["pass_rate"] is None else item["pass_rate"] for item in items], np.float64)


def between(
    rows: Sequence[Kept], rates: np.ndarray | Sequence[float], *, low: float = 0.0, high: float = 1.0
) -> list[Kept]:
    """The rows with `low < pass rate < high`; by default those that are solved sometimes, but not always.

    A row that is always or never solved gives groups without spread, which teach
    nothing. A rate of NaN, of a row that could not be judged, lies nowhere.

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
      items: of `evaluate`.
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
        for g, completion in enumerate(item["completions"][:completions]):
            given = [item["rewards"][name][g] for name in names]
            shown = ["-" if reward is None else f"{reward:.3g}" for reward in given]
            prompt = _plain_prompt(item["prompt"]) if g == 0 else ""
            cells = [_visible(prompt, characters), _visible(completion, characters), *shown]
            table.add_row(*map(rich.text.Text, cells))
    return table


def _plain_prompt(prompt: data.Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _visible(text: str, characters: int) -> str:
    if len(text) > characters:
        text = f"{text[: characters // 2]} ... {text[len(text) - characters // 2 :]}"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
