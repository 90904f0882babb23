"""The settings of scripts that say whom the policy talks with: an environment, or tools.

```python
@dataclasses.dataclass(frozen=True)
class Config(ConversationSettings):
    model: str

talk = config.talk(tokenizer, rows)
prompts = config.encode(tokenizer, rows)                # the template tells the policy of its tools
draw = talk.converse(sampler, prompts.rows)             # the sampler itself, where there is nobody to talk with
reward = rewards.host(functions, prompts.rows, tokenizer, read=talk.read)
```
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_jax import sampling, tools
from grpo_jax.data import PromptSettings, between_turns, read_between
from grpo_jax.environment_workers import in_worker_processes
from grpo_jax.environments import Respond
from grpo_jax.rewards.conversations import Read
from grpo_jax.run.names import resolve
from grpo_jax.sampling.servers import EngineSampler
from grpo_jax.tools import Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DataSet = Sequence[Mapping[str, Any]]
Drawing = sampling.PolicySampler | EngineSampler


class Talk(NamedTuple):
    """How the policy talks with an environment."""

    converse: Callable[[Drawing, DataSet], Drawing | sampling.ConversationSampler]
    read: Read | None  # of `rewards.host`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationSettings(PromptSettings):
    """An environment or tools, and the limits of a conversation; without either, completions are single turns."""

    environment: str | None = None  # what answers the policy, as module:respond; see grpo_jax.environments
    tools: tuple[str, ...] = ()  # functions that the policy may call, as module:function; see grpo_jax.tools
    max_turns: int = 8  # of the policy in a conversation, whose tokens are at most --max-tokens in all
    max_answer_tokens: int = 1024  # of one answer of the environment or its tools
    answer_timeout: float = 60.0  # seconds for one answer
    environment_workers: int = 0  # processes for an environment that may hang or crash; 0 calls it in this one
    keep_history: bool = False  # go on after what was sampled where the chat template would write it anew

    @functools.cached_property
    def functions(self) -> list[Tool]:
        """The tools: those of `--tools`, or those that the environment brings as its attribute `tools`."""
        if self.environment is not None and self.tools:
            raise ValueError(
                f"either --environment {self.environment}, which may have tools as its attribute `tools`, or --tools "
                f"{' '.join(self.tools)}"
            )
        if self.environment is None and self.environment_workers:
            raise ValueError(
                f"--environment-workers {self.environment_workers} are for an --environment, and there is none: tools "
                "run in this process"
            )
        if self.environment is not None:
            return [*getattr(self.respond, "tools", ())]
        return [resolve(name, "grpo_jax.tools") for name in self.tools]

    @functools.cached_property
    def respond(self) -> Respond:
        """The environment by its name."""
        assert self.environment is not None
        respond = resolve(self.environment)
        workers = self.environment_workers
        return in_worker_processes(respond, workers=workers) if workers else respond

    @property
    def template(self) -> dict[str, Any]:
        """Arguments of the chat template, with what the tools are."""
        functions = self.functions
        return super().template | ({"tools": tools.schemas(functions)} if functions else {})

    def _refuse_limits(self) -> None:
        fields = {field.name: field.default for field in dataclasses.fields(ConversationSettings)}
        for name in ("max_turns", "max_answer_tokens", "answer_timeout", "keep_history"):
            if (value := getattr(self, name)) != fields[name]:
                flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                raise ValueError(
                    f"{flag} is of conversations: name whom the policy talks with, --environment or --tools"
                )

    def talk(self, tokenizer: "PreTrainedTokenizerBase", rows: DataSet) -> Talk:
        """How the policy talks.

        Args:
          tokenizer: of the policy.
          rows: with prompts, of the form that all have.

        Raises:
          ValueError: for an environment beside tools, limits of conversations without either, tools without chat
            messages, and as `data.between_turns`, `tools.call_format` and `sampling.conversations`.
        """
        if not self.functions and self.environment is None:
            self._refuse_limits()
            return Talk(lambda sampler, rows: sampler, None)
        chat = self.has_chats(rows)
        if self.functions and not chat:
            raise ValueError("tools are told by the chat template: --chat, or give prompts as messages")
        role = "tool" if self.functions else "user"
        between = read = None
        if chat:
            between = between_turns(tokenizer, role=role, keep_history=self.keep_history, **self.template)
            read = read_between(tokenizer, roles=(role, "user"), **self.template)
        if self.environment is None:
            seconds = 0.75 * self.answer_timeout
            respond = tools.environment(self.functions, tools.call_format(tokenizer), seconds=seconds)
        else:
            respond = self.respond

        def converse(sampler: Drawing, rows: DataSet) -> Drawing | sampling.ConversationSampler:
            return sampling.conversations(
                sampler, respond, tokenizer, rows, max_turns=self.max_turns, between=between,
                prompt_column=self.prompt_column, max_answer_tokens=self.max_answer_tokens,
                timeout=self.answer_timeout,
            )  # fmt: skip

        return Talk(converse, read)
