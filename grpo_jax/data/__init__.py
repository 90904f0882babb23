"""From files to the prompts of a step, in the order of the functions' use.

    read_problems       a file or a data set -> rows with a prompt and an answer         rows, prompt_sets
    hold_out            rows -> rows to train on, held-out rows
    encode_rows         rows -> PromptSet: the rows and the tokens of their prompts       prompts
    PromptSet.batch     (seed, step, size) -> the prompts of a step                       batches
    between_turns       what an environment says -> the tokens that follow those of the policy
    encode_demonstrations, make_demonstrations: the same for completions that are given, for supervised learning

Nothing here holds a position: the rows of a batch follow from the seed and the step, so that a resumed run goes on
where it stopped.
"""

from grpo_jax.data.batches import (
    batch_indices,
    batch_rows_by_length,
    bucket,
    make_demonstrations,
    make_prompts,
    pad,
    token_pairs,
)
from grpo_jax.data.between_turns import Between, between_texts, between_turns, read_between
from grpo_jax.data.prompt_sets import PromptSet, encode_demonstrations, encode_rows, has_chats, hold_out, read_problems
from grpo_jax.data.prompts import (
    Text,
    TooLong,
    chat,
    encode_demonstration,
    encode_prompt,
    limit_prompts,
    prompt_tail,
    turn_end,
)
from grpo_jax.data.rows import (
    Row,
    field,
    place_of,
    read_csv,
    read_hugging_face,
    read_json,
    read_jsonl,
    read_parquet,
    read_rows,
)
from grpo_jax.data.settings import PromptSettings

__all__ = [
    "Between",
    "PromptSet",
    "PromptSettings",
    "Row",
    "Text",
    "TooLong",
    "batch_indices",
    "batch_rows_by_length",
    "between_texts",
    "between_turns",
    "bucket",
    "chat",
    "encode_demonstration",
    "encode_demonstrations",
    "encode_prompt",
    "encode_rows",
    "field",
    "has_chats",
    "hold_out",
    "limit_prompts",
    "make_demonstrations",
    "make_prompts",
    "pad",
    "place_of",
    "prompt_tail",
    "read_between",
    "read_csv",
    "read_hugging_face",
    "read_json",
    "read_jsonl",
    "read_parquet",
    "read_problems",
    "read_rows",
    "token_pairs",
    "turn_end",
]
