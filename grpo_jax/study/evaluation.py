"""How good a policy is on a task: completions of held-out prompts, scored by reward functions.

    evaluate = make_evaluate(policy, sampling.greedy(max_tokens=512, eos_ids=eos_ids), tokenizer, rows, [correct])
    items = evaluate(state.params)                        # one item per prompt
    items = mark_right(items, accuracy="correct", threshold=0.5, extract=answer)    # another rule than the default
    summary = summarise(items, k=(1, 4, 16))              # accuracy, pass@k, majority@k with intervals
    kept = between(rows, pass_rates(items))               # rows that are solved sometimes: groups with variance

An item is a dict of plain values, one line of JSON: see `items`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo_jax import data, processes, rewards
from grpo_jax.policies import Policy
from grpo_jax.rewards.calling import LogMetric, RewardFunction
from grpo_jax.rewards.formats import TAGS, marks_of, opened_by
from grpo_jax.rewards.host import prompt_tails
from grpo_jax.run import inputs
from grpo_jax.run.completions import turns
from grpo_jax.run.conversations import Talk
from grpo_jax.run.metrics import Logged
from grpo_jax.sampling import PolicySampler, greedy
from grpo_jax.sampling.servers import EngineSampler
from grpo_jax.study.items import Item, mark_right, summarise
from grpo_jax.types import Params, Rollout


class Evaluate(Protocol):
    """Evaluates parameters on the rows that it was made for."""

    def __call__(
        self, params: Params, *, seed: int = 0, trainer_state: rewards.TrainerState | None = None
    ) -> list[Item]:
        """Samples completions for each row and scores them.

        Args:
          params: of the policy, such as `state.params` in the middle of a run.
          seed: of the sampling. The same seed and batch size draw the same completions.
          trainer_state: the place in the run, for reward functions that ask for it.

        Returns:
          One item per row, in their order (`items.Item`).
        """


def make_evaluate(
    policy: Policy,
    sampler: PolicySampler | EngineSampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]] | data.PromptSet,
    functions: Sequence[RewardFunction],
    *,
    prompt_column: str = "prompt",
    batch_size: int = 64,
    bucket: int = 64,
    log_metric: LogMetric | None = None,
    talk: Talk | None = None,
    report_after: float | None = 300.0,
) -> Evaluate:
    """Makes `evaluate(params) -> items`.

    One program is compiled for each width of a batch of prompts.

    Args:
      policy: any.
      sampler: draws the completions: `sampling.greedy(...)` one per prompt, `sampling.sampler(group_size=16, ...)`
        several.
      tokenizer: of the policy.
      rows: `N` rows with a prompt, text or chat messages, and the columns that the functions ask for; or a
        `PromptSet`, whose prompts are tokens already.
      functions: as `rewards.host` takes them; their exceptions pass through. The first one says which completions
        are right; `mark_right` chooses another.
      prompt_column: the name of the prompt's column.
      batch_size: prompts sampled at a time.
      bucket: prompts are padded to a multiple of this, so that few programs compile.
      log_metric: receives what reward functions log, once per batch, under `eval/<name>`, apart from training's.
      talk: with an environment or with tools, of `run.conversations`; None draws one turn.
      report_after: seconds after which a function that has not returned is reported, as by `rewards.host`.

    Raises:
      ValueError: for no rows or functions, two functions of one name, several greedy completions per prompt, or a
        function that compares the completions of a group (`group_size_of`) where groups have another size.
    """
    prompts = rows.prompts if isinstance(rows, data.PromptSet) else None
    rows = rows.rows if isinstance(rows, data.PromptSet) else rows
    names = [rewards.name_of(function) for function in functions]
    if not rows or not names:
        raise ValueError(f"an evaluation needs rows and reward functions, got {len(rows)} and {len(names)}")
    G = sampler.group_size
    if sampler.greedy and G != 1:
        raise ValueError(f"the {G} greedy completions of a prompt would be equal; group_size is 1 with greedy")
    inputs.check_rewards(functions, group_size=G)
    if prompts is None:
        prompts = [data.encode_prompt(tokenizer, row[prompt_column]) for row in rows]

    def log_eval(name: str, value: Any) -> None:
        if log_metric is not None:
            log_metric(f"eval/{name}", value)

    reward = rewards.host(
        functions, rows, tokenizer, prompt_column=prompt_column, eos_ids=sampler.eos_ids,
        log_metric=log_eval, read=None if talk is None else talk.read, report_after=report_after,
    )  # fmt: skip
    draw = sampler if talk is None else talk.converse(sampler, rows)

    def evaluate(params: Params, *, seed: int = 0, trainer_state: rewards.TrainerState | None = None) -> list[Item]:
        items: list[Item] = []
        for start in range(0, len(rows), batch_size):
            indices = range(start, min(start + batch_size, len(rows)))
            # The last batch repeats rows, so that it runs the same program; a server has none.
            size = len(indices) if isinstance(sampler, EngineSampler) else min(batch_size, len(rows))
            filled = np.resize(indices, size).tolist()
            batch = data.make_prompts([prompts[i] for i in filled], filled, multiple=bucket)
            key = jax.random.fold_in(jax.random.key(seed), start)
            rollout = _first(draw(policy, params, batch, key), len(indices))
            scores, mask = reward(rollout, trainer_state)
            texts = rewards.completion_texts(rollout, tokenizer, sampler.eos_ids)
            opened = [opened_by(tail, marks_of(TAGS)) for tail in prompt_tails(rollout.prompts, tokenizer)]
            if rollout.turns is not None:
                said = rewards.conversation_messages(rollout, tokenizer, sampler.eos_ids)
                texts = [[rewards.text_of(messages) for messages in group] for group in said]
            for b, row in enumerate(indices):
                items.append(
                    {
                        "row": row,
                        "prompt": rows[row][prompt_column],
                        "completions": texts[b],
                        "lengths": rollout.lengths[b].tolist(),
                        "truncated": rollout.truncated[b].tolist(),
                        "rewards": {name: _or_none(scores[b, :, i], mask[b, :, i]) for i, name in enumerate(names)},
                    }
                )
                if opened[b]:
                    items[-1]["opened"] = opened[b]
                if rollout.turns is not None:
                    items[-1]["turns"] = [turns(rollout, b, g, tokenizer) for g in range(G)]
        return mark_right(items)

    return evaluate


def make_mean_rewards(
    policy: Policy,
    sampler: PolicySampler | EngineSampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]] | data.PromptSet,
    functions: Sequence[RewardFunction],
    *,
    group_size: int | None = None,
    weights: Sequence[float] | None = None,
    stop_after_failed: int = 1,
    **settings: Any,
) -> Callable[[Params, rewards.TrainerState], dict[str, float]]:
    """Makes `evaluate(params, trainer_state) -> {"eval/reward": ..., "eval/<name>": ...}`, for the middle of a run.

    The mean of each reward over all completions that it scored, and their weighted sum, which is NaN if a function
    failed. One that scored none, such as that of another task, is left out of the sum, as it is of a completion's.

    Args:
      policy: any.
      sampler: of the run; that of a server is given the params that are evaluated, whatever its lag.
      tokenizer: of the policy.
      rows: as `make_evaluate` takes them; none give no numbers.
      functions: as `rewards.host` takes them. Their failures are counted apart from training's.
      group_size: completions sampled of each prompt; None takes the one likeliest.
      weights: of the functions; 1 each if not given.
      stop_after_failed: a function's exception passes through at this many failed batches in a row.
      settings: of `make_evaluate`.

    Raises:
      ValueError: as `make_evaluate`.
    """
    if not (rows.rows if isinstance(rows, data.PromptSet) else rows):
        return lambda params, trainer_state: {}
    logged, names = Logged(), [rewards.name_of(function) for function in functions]
    skipping = [rewards.skip_failed_batches(function, batches=stop_after_failed) for function in functions]
    drawing = sampler.drawing if isinstance(sampler, EngineSampler) else sampler
    drawn = greedy(max_tokens=drawing.max_tokens, eos_ids=drawing.eos_ids, stop=drawing.stop)
    if group_size is not None:
        drawn = dataclasses.replace(drawing, group_size=group_size, slots=None)
    evaluated = dataclasses.replace(sampler, drawing=drawn, max_lag=0) if isinstance(sampler, EngineSampler) else drawn
    score = make_evaluate(policy, evaluated, tokenizer, rows, skipping, log_metric=logged, **settings)

    def evaluate(params: Params, trainer_state: rewards.TrainerState) -> dict[str, float]:
        summary = summarise(score(params, trainer_state=trainer_state))
        means = {name: summary[f"reward/{name}"] for name in names}
        failed = any(value > 0 for name, value in logged.take().items() if name.endswith("/failed"))
        parts = np.array(list(means.values())) * np.asarray(weights or 1.0)
        total = np.nan if failed or np.isnan(parts).all() else float(np.nansum(parts))
        return {"eval/reward": total} | {f"eval/{name}": mean for name, mean in means.items()}

    return evaluate


def _first(rollout: Rollout, count: int) -> Rollout:
    """The completions of the first prompts, on the host."""
    return jax.tree.map(lambda x: x[:count], processes.whole(rollout))


def _or_none(values: np.ndarray, mask: np.ndarray) -> list[Any]:
    return [value if scored else None for value, scored in zip(values.tolist(), mask.tolist(), strict=True)]
