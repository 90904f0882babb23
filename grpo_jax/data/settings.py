"""The settings of scripts that say how rows become prompts.

```python
@dataclasses.dataclass(frozen=True)
class Config(PromptSettings):
    model: str

rows = config.read(source)
prompts = config.encode(tokenizer, rows)
```
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo_jax.data.prompt_sets import PromptSet, encode_rows, has_chats, read_problems
from grpo_jax.data.prompts import TooLong
from grpo_jax.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Where the prompt and the answer of a row are, and how a prompt becomes tokens."""

    prompt_column: str = "prompt"
    answer_column: str | None = None  # passed to the rewards as `answer` as well; `outer.inner` is a nested field
    answer_after: str | None = None  # keep of the answer only the text after the last of these, as "####" in GSM8K
    rename: dict[str, str] = dataclasses.field(default_factory=dict)  # old and new names of columns, all at once
    chat: bool = False  # put prompts that are text through the chat template, as a user's message
    system: str | None = None  # a system message before each prompt, which has none of its own; implies --chat
    thinking: bool | None = None  # `enable_thinking` of chat templates that know it, such as Qwen3's
    date_string: str | None = None  # in place of today's date, for chat templates that write it, such as Llama 3.2's
    max_prompt_tokens: int = 512
    too_long: TooLong = "refuse"  # what to do with longer prompts
    bucket: int = 64  # prompts are padded to a multiple of this, so that few programs compile

    def read(self, source: str | os.PathLike[str], *, split: str | None = None, subset: str | None = None) -> list[Row]:
        """Reads rows with their answers; see `read_problems`."""
        return read_problems(
            source, prompt_column=self.prompt_column, answer_column=self.answer_column,
            answer_after=self.answer_after, rename=self.rename, split=split, subset=subset,
        )  # fmt: skip

    @property
    def template(self) -> dict[str, Any]:
        """Arguments of the chat template."""
        return {"enable_thinking": self.thinking, "date_string": self.date_string}

    def has_chats(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether prompts go through the chat template; see `has_chats`."""
        return has_chats(rows, prompt_column=self.prompt_column, chat=self.chat, system=self.system)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> PromptSet:
        """Encodes the prompts; see `encode_rows`."""
        return encode_rows(
            tokenizer, rows, prompt_column=self.prompt_column, chat=self.chat, system=self.system,
            template=self.template, max_prompt_tokens=self.max_prompt_tokens, too_long=self.too_long,
        )  # fmt: skip
