"""The settings of scripts that say which inference server samples, if not this process.

```python
@dataclasses.dataclass(frozen=True)
class Config(ServerSettings):
    model: str

sampler = config.serve(sampler, stop=config.stop, model=config.model, tokenizer=tokenizer, folder=run_dir / "engine")
```
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import jax

from grpo_jax.freezing import partition
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.sampling import PolicySampler, servers
from grpo_jax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """vLLM or SGLang behind HTTP; without a URL this process samples itself."""

    server: str | None = None  # URL of an inference server that samples, and that sees the run's folder
    server_kind: Literal["vllm", "sglang"] = "vllm"
    server_model: str | None = None  # what vLLM calls the model; --model unless given
    server_timeout: float = 600.0  # seconds for a request

    def serve(
        self,
        sampler: PolicySampler,
        *,
        stop: Sequence[str],
        model: str,
        tokenizer: "PreTrainedTokenizerBase",
        folder: pathlib.Path,
        adapters: bool = False,
        max_lag: int = 0,
    ) -> PolicySampler | servers.EngineSampler:
        """The same sampler, of the server; itself where there is none.

        Args:
          sampler: that of this process, with all settings.
          stop: the texts of `sampler.stop`, as servers take them.
          model: what the run began with.
          tokenizer: of the model; written beside its weights.
          folder: as in `servers.engine_sampler`.
          adapters: whether those alone are trained, and written.
          max_lag: as in `servers.engine_sampler`.

        Raises:
          ValueError: for settings of a server without one; for what a server cannot do; in a run of several processes.
        """
        if self.server is None:
            if max_lag or self.server_model is not None or self.server_kind != "vllm":
                raise ValueError("--max-lag, --server-kind and --server-model are of a --server, and there is none")
            return sampler
        if sampler.record_experts:
            raise ValueError("servers do not tell the experts that they chose: leave out --record-experts")
        if sampler.slots is not None:
            raise ValueError(f"a server has slots of its own: leave out --slots {sampler.slots}")
        if jax.process_count() > 1:
            raise ValueError("a server is given the weights by one process: leave out --coordinator")
        if self.server_kind == "vllm":
            server = servers.vllm(self.server, model=self.server_model or model, adapters=adapters)
        else:
            server = servers.sglang(self.server, adapters=adapters)

        def write(policy: Policy, params: Params, folder: pathlib.Path) -> None:
            if adapters:
                hf.save_adapters(policy, *partition(params, "^(?!.*lora_[ab]$)"), folder, base_model=model)
            else:
                hf.save_pretrained(policy, params, folder, tokenizer=tokenizer, eos_ids=sampler.eos_ids)

        top_p, min_p = (None if x is None else float(x) for x in (sampler.top_p, sampler.min_p))
        return servers.engine_sampler(
            server, write=write, folder=folder, group_size=sampler.group_size, max_tokens=sampler.max_tokens,
            eos_ids=sampler.eos_ids, temperature=float(sampler.temperature), top_k=sampler.top_k,
            top_p=top_p, min_p=min_p, stop=stop, stop_table=sampler.stop, max_lag=max_lag, timeout=self.server_timeout,
        )  # fmt: skip
