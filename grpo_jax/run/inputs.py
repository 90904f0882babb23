"""Checks of a run's inputs, before the weights of a model are read."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import transformers

from grpo_jax.data import place_of
from grpo_jax.data.rows import gold_column_of
from grpo_jax.models import from_hf_config
from grpo_jax.models.hf.folders import CONFIG, local_folder, read_config
from grpo_jax.rewards import group_size_of, name_of
from grpo_jax.rewards.answers import gold_text
from grpo_jax.rewards.calling import reads_of

# Arguments that `rewards.host` passes beside the columns of the data.
_PASSED = {"prompts", "completions", "completion_ids", "prompt_tail", "trainer_state", "log_metric", "log_extra"}
_PASSED |= {"turn_rewards"}  # of conversations
_READ = _PASSED - {"trainer_state", "log_metric", "log_extra"}


def check_tokens(
    model: str,
    tokenizer: Any,
    sequences: Iterable[Sequence[int]],
    *,
    max_tokens: int = 0,
    revision: str | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Checks tokens against the configuration of the model that will read them.

    A warning is printed if the longest sequence and its completion pass the positions that the model was made for.

    Args:
      model: a folder or a repository; its configuration is read.
      tokenizer: of the model.
      sequences: prompts as tokens, or whole texts.
      max_tokens: of a completion after them.
      revision: of a repository.
      rows: of the sequences, one each, for an error to say where they were read.

    Raises:
      ValueError: if the tokenizer has more tokens than the model, or a sequence has one that the model does not.
    """
    config = transformers.AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    config = config.get_text_config()
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and {model} only {config.vocab_size}: use the model's own "
            "tokenizer, or a model whose embeddings were extended"
        )
    longest = 0
    for number, ids in enumerate(sequences):
        longest = max(longest, len(ids))
        if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < config.vocab_size)
            limit = config.vocab_size - 1
            where = place_of(rows[number] if rows else {}, number + 1)
            raise ValueError(f"{where} has the token {wrong}; {model} has 0 to {limit}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest + max_tokens > positions:
        print(
            f"warning: the longest prompt ({longest} tokens) and a completion of {max_tokens} pass the {positions} "
            f"positions that {model} was made for"
        )


def check_experts(model: str, **settings: Any) -> None:
    """Checks that a model is a mixture of experts, if there are settings of one.

    Args:
      model: a folder or a repository; its configuration is read.
      settings: by their names on the command line; False, 0 and None are not given.

    Raises:
      ValueError: with those that are given, for another model.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value]
    if not given:
        return
    if from_hf_config(read_config(local_folder(model, None, [CONFIG]))).experts is None:
        raise ValueError(f"{model} is no mixture of experts: leave out {' and '.join(given)}")


def tell_repeated(prompts: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]) -> None:
    """Prints a warning if prompts to evaluate on are trained on, as where rows are in the data twice."""
    trained = {tuple(ids) for ids in prompts}
    if repeated := sum(tuple(ids) in trained for ids in held_out):
        print(
            f"warning: {repeated} of the {len(held_out)} prompts to evaluate on are also trained on: what is measured "
            "on them is memory, too"
        )


def check_rewards(
    functions: Sequence[Callable[..., Any]],
    *,
    weights: Sequence[float] | None = None,
    group_size: int | None = None,
) -> None:
    """Checks reward functions against each other and the group that they will see.

    Args:
      functions: of a run or an evaluation.
      weights: one each.
      group_size: completions of a prompt; None where nothing is evaluated.

    Raises:
      ValueError: for no function at all, two of one name, another number of weights, one that is not finite, or a
        function that compares the completions of a group of another size.
    """
    names = [name_of(function) for function in functions]
    if not names:
        raise ValueError("there is no reward function, so that nothing would be learned: name one, as module:function")
    if len(set(names)) < len(names):
        raise ValueError(f"reward functions have one name each, got {', '.join(names)}: set their __name__")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights for {len(names)} reward functions")
    if not all(map(math.isfinite, weights or ())):
        raise ValueError(f"weights of reward functions are finite numbers, got {list(weights or ())}")
    for name, function in zip(names, functions, strict=True):
        if group_size is not None and (size := group_size_of(function)) not in (None, group_size):
            raise ValueError(
                f"{name} compares groups of {size} completions and the evaluation draws {group_size} per prompt: let "
                f"it draw {size} (grpo.py --eval-group-size {size}, evaluate.py --no-greedy --group-size {size}), or "
                "leave the function out"
            )


def check_arguments(
    functions: Sequence[Callable[..., Any]], rows: Sequence[Mapping[str, Any]], *, prompt_column: str
) -> None:
    """Checks that each reward function, and each that it calls, gets the arguments that it requires, for every row.

    Prints a warning if some rows have no gold answer that a function can tell.

    Args:
      functions: of a run or an evaluation; they may say what they read, see `rewards.calling.reading`.
      rows: as the functions see them.
      prompt_column: which they get as `prompts`.

    Raises:
      ValueError: for an argument without a default that is no column of the data; for a row that has none or a null
        there, or an empty text as its `answer`; for a gold answer that is neither text nor a number, and where there
        is none in any row; for a class, and for a function that takes nothing of the completions: it is likely a maker
        that was not called.
    """
    known = _PASSED | ({name for row in rows for name in row} - {prompt_column})
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        sees = any(p.kind is p.VAR_KEYWORD or p.name in _READ for p in parameters)
        if inspect.isclass(function) or not sees:
            raise ValueError(
                f"{name_of(function)} is no reward function: it takes neither prompts nor completions. A maker? Then "
                f"write {name_of(function)}()"
            )
        required = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        required += getattr(function, "requires", ())  # of what it calls, such as `in_worker_processes`
        reads = reads_of(function)
        check_arguments(reads.calls, rows, prompt_column=prompt_column)
        absent = [name for name in (*required, *reads.columns) if name not in known]
        if reads.golds and not known.intersection(reads.golds):
            absent.append(" or ".join(reads.golds))
        if absent:
            raise ValueError(
                f"the reward function {name_of(function)} requires {', '.join(absent)}, and the data has the columns "
                f"{', '.join(sorted(known - _PASSED))}"
            )
        gold = next((name for name in reads.golds if name in known), None)
        untold: list[str] = []  # places of gold answers
        looked_at = range(1, len(rows) + 1, max(len(rows) // _LOOKED_AT, 1) if reads.told else 1)
        for number, row in enumerate(rows, start=1):
            if gold is not None:
                told = gold_column_of(row) if len(reads.golds) > 1 else None
                text = _gold(row, told or gold, place_of(row, number))
                if number in looked_at and (text is None or (reads.told and not reads.told(text))):
                    untold.append(place_of(row, number))
            for name in required:
                value = row.get(name)
                if name not in _PASSED and (value is None or (name == "answer" and value == "")):
                    found = "not there" if name not in row else "null" if value is None else "empty"
                    raise ValueError(
                        f"{place_of(row, number)}: the reward function {name_of(function)} requires {name}, which is "
                        f"{found}; the row has the columns {', '.join(row)} (an argument with a default, such as None, "
                        "is not required)"
                    )
        if untold:
            found = f"have no gold answer that {name_of(function)} can tell, such as {untold[0]}"
            if len(untold) == len(looked_at):
                raise ValueError(f"all {len(untold)} rows that were looked at {found}: see its documentation")
            print(f"warning: {len(untold)} of {len(looked_at)} rows {found}: it gives no reward for them")


_LOOKED_AT = 200  # rows whose gold answers are read before a run, where that takes a millisecond each


def _gold(row: Mapping[str, Any], name: str, where: str) -> str | None:
    try:
        return gold_text(row.get(name))
    except ValueError as error:
        raise ValueError(f"{where}: {name}: {error}") from None
