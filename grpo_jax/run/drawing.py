"""The settings of scripts that say how completions are sampled.

```python
@dataclasses.dataclass(frozen=True)
class Config(SamplingSettings):
    model: str

sampler = config.make_sampler(tokenizer, eos_ids)
```
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo_jax import sampling
from grpo_jax.run import ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Groups of completions, their limit, and the distribution that they are drawn from."""

    group_size: int = 8
    max_tokens: int = 512  # of a completion
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    replay_truncation: bool = True  # score under top-k, top-p and min-p, too; TRL and verl do not
    slots: int | None = None  # decode so many completions at a time, refilled as they end; all together if not given
    stop: tuple[str, ...] = ()  # texts that end a completion, such as "</answer>", beside the end-of-sequence tokens
    record_experts: bool = False  # tokens are scored by the experts that they were sampled by (router replay)

    def make_sampler(self, tokenizer: "PreTrainedTokenizerBase", eos_ids: Sequence[int]) -> sampling.PolicySampler:
        """The sampler; see `sampling.sampler`, and with slots `sampling.continuous`. What has no effect is told."""
        drawn = sampling.sampler(
            group_size=self.group_size, max_tokens=self.max_tokens, eos_ids=eos_ids, temperature=self.temperature,
            top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, record_experts=self.record_experts,
            stop=sampling.stop_strings(tokenizer, self.stop) if self.stop else None,
        )  # fmt: skip
        if drawn.truncation is None:
            ranges.tell_unused(self, ["replay_truncation"], without="--top-k, --top-p or --min-p")
        return dataclasses.replace(drawn, slots=self.slots)
