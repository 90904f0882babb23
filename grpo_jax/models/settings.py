"""The settings of scripts that say which weights are trained, and in what form they are written.

```python
@dataclasses.dataclass(frozen=True)
class Config(WeightSettings):
    model: str

policy, params, frozen = config.load(config.model, compute_dtype=dtype, seed=config.seed)
state = init_state(params, optimizer, key, frozen=frozen)
config.save(policy, state, folder, base_model=config.model, tokenizer=tokenizer, eos_ids=eos_ids)
```
"""

import dataclasses
import os
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import transformers
from jax.typing import DTypeLike

from grpo_jax.models import hf, lora, quantized
from grpo_jax.policies import Policy
from grpo_jax.types import Params, PRNGKey, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """Whole weights, or adapters over a base that is frozen.

    Raises:
      ValueError: for settings of adapters without a rank, for an unknown target, and for a dtype of exported adapters,
        which are float32.
    """

    lora_rank: int | None = None  # train adapters of this rank (LoRA) in place of the weights; 8 to 64 are usual
    lora_alpha: float = 32.0  # adapters are scaled by alpha / rank
    lora_targets: tuple[str, ...] | None = None  # linear layers with adapters, such as q_proj v_proj; all if not given
    quantize: quantized.Kind | None = None  # the frozen weights under adapters to few bits
    export: Literal["merged", "adapters"] = "merged"  # as a whole model, or as a folder that PEFT reads
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = (
        None  # of a whole model; as it is held if not given
    )

    def __post_init__(self) -> None:
        if self.export == "adapters" and self.export_dtype is not None:
            raise ValueError(f"--export-dtype {self.export_dtype} is of whole models: adapters are written in float32")
        if self.lora_rank is not None:
            lora.ranks_of(self.lora_rank, self.lora_targets)
            return
        without = {"lora_alpha": 32.0, "lora_targets": None, "quantize": None, "export": "merged"}
        if given := [name for name, value in without.items() if getattr(self, name) != value]:
            named = ", ".join(f"--{name.replace('_', '-')} {getattr(self, name)}" for name in given)
            raise ValueError(f"{named} is of adapters: give a --lora-rank, too, such as 16")

    def rate(self, given: float | None, whole: float) -> float:
        """The peak learning rate: the one given, or `whole`, of whole weights, or ten times that, of adapters.

        Adapters take about ten times the rate (Schulman et al. 2025, "LoRA Without Regret").
        """
        return given if given is not None else whole if self.lora_rank is None else 10 * whole

    def load(
        self, model: str | os.PathLike[str], *, compute_dtype: DTypeLike, seed: int, **settings: Any
    ) -> tuple[Policy, Params, Params | None]:
        """Reads a model and divides its weights; `settings` are those of `hf.load_pretrained`.

        Trained weights are float32. Frozen ones are of the compute dtype, or quantised.

        Returns:
          The policy, what is trained, and what is frozen, if anything is.
        """
        dtype = self.param_dtype(compute_dtype)
        policy, params = hf.load_pretrained(
            model, dtype=dtype, compute_dtype=compute_dtype, quantize=self.quantize, **settings
        )
        key = jax.random.fold_in(jax.random.key(seed), jnp.uint32(2**32 - 2))  # no step's
        return policy, *self.divide(policy, params, key)

    def param_dtype(self, compute_dtype: DTypeLike) -> DTypeLike:
        """The dtype that a model's weights are kept in: no wider than the arithmetic, where they are frozen."""
        return jnp.float32 if self.lora_rank is None else compute_dtype

    def shapes(self, policy: Policy) -> tuple[Params, Params | None]:
        """The shapes of what is trained and of what is frozen, of a policy made with `param_dtype`."""

        def made() -> tuple[Params, Params | None]:
            params = policy.init(jax.random.key(0))
            params = params if self.quantize is None else quantized.quantize(params, self.quantize)
            return self.divide(policy, params, jax.random.key(0))

        return jax.eval_shape(made)

    def divide(self, policy: Policy, params: Params, key: PRNGKey) -> tuple[Params, Params | None]:
        """What is trained, and what is frozen, of params that are quantised already where they are to be."""
        if self.lora_rank is None:
            return params, None
        return lora.adapt(
            policy, params, rank=self.lora_rank, alpha=self.lora_alpha, targets=self.lora_targets, key=key
        )

    def save(
        self,
        policy: Policy,
        state: TrainState,
        folder: str | os.PathLike[str],
        *,
        base_model: str | os.PathLike[str],
        tokenizer: transformers.PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> None:
        """Writes the trained model, or its adapters; `settings` are those of either's writer, such as `eos_ids`.

        Merged adapters of which rounding leaves less than a half are a warning.
        """
        if self.export == "adapters":
            about: dict[str, Any] = {"base_model": os.fspath(base_model), "tokenizer": tokenizer, **settings}
            hf.save_adapters(policy, state.params, state.frozen, folder, **about)
            return
        params = state.params
        if self.lora_rank is not None:
            params = lora.merge_later(state.params, state.frozen, dtype=self.export_dtype)
            if (lost := lora.rounded_off(state.params, state.frozen, dtype=self.export_dtype)) > 0.5:
                warnings.warn(
                    f"of what the adapters change in the weights, rounding takes {min(lost, 1):.0%} in {folder}: "
                    "take --export-dtype float32, or --export adapters",
                    stacklevel=2,
                )
        hf.save_pretrained(policy, params, folder, tokenizer=tokenizer, dtype=self.export_dtype, **settings)
