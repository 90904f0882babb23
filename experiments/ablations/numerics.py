"""In which numbers one samples and learns: what each does to the gap between sampler and scorer, and to learning.

python experiments/ablations/numerics.py               # half as long as the others: CPUs make these numbers in software

The arithmetic is float32, bfloat16 or float16 (with a scale of the loss that follows overflows), with the last norm
rounded or not; the sampler's copy of the weights is whole, or in 8 bits. The gap is corrected by truncated importance
sampling (TIS), masked (MIS), or by ratios to the sampler with a trust region (DPPO), or not at all. Half an hour of a
core; what came of it: `docs/pages/results/ablations.md`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
import setting
from setting import Condition, Config, Metrics, Prompts, TrainState

from grpo_jax import losses, models
from grpo_jax.models import quantized
from grpo_jax.policies import Policy
from grpo_jax.protocols import Loss, Sampler
from grpo_jax.run import measured
from grpo_jax.schedules import Scheduled, loss_scale
from grpo_jax.study.runs import StepFunction
from grpo_jax.train_step import make_train_step


def experiment(config: Config) -> None:
    """Each arithmetic alone, and what leaves a gap with each correction."""
    in_16 = {name: computing(dtype=dtype) for name, dtype in (("bfloat16", jnp.bfloat16), ("float16", jnp.float16))}
    alone = {
        "float32": setting.policy,
        "bfloat16, last norm float32": computing(dtype=jnp.bfloat16, last_norm_dtype=jnp.float32),
        "bfloat16, head bfloat16": computing(dtype=jnp.bfloat16, logits_dtype=jnp.bfloat16),
    }
    corrected = in_16 | {f"{kind} copy": quantized.sampled(setting.policy, kind) for kind in ("int8", "fp8")}
    conditions = [Condition(name, make(config, policy, losses.grpo())) for name, policy in alone.items()]
    for name, policy in corrected.items():
        for correction, loss in corrections().items():
            conditions.append(Condition(f"{name}, {correction}", make(config, policy, loss)))
    names = ("greedy", "sampled", "sampler_gap", "sampler_gap_max", "sampler_kl", "skipped")
    setting.run("numerics", config, conditions, metrics=names, curves=("greedy", "sampler_gap"), against="float32")


def computing(**fields: Any) -> Policy:
    """The network of all ablations in other dtypes."""
    return models.decoder(dataclasses.replace(setting.policy.config, **fields))


def corrections() -> dict[str, Loss]:
    """What is done about the gap."""
    return {
        "none": losses.grpo(),
        "TIS": losses.grpo(weight=losses.truncated_importance(2.0)),
        "MIS": losses.grpo(weight=losses.masked_importance(0.5, 2.0)),
        "DPPO": losses.dppo(),
    }


def make(config: Config, policy: Policy, loss: Loss) -> setting.Run:
    """The standard run with this network and loss; the gap is measured at each step."""

    def build(_: Policy, optimizer: optax.GradientTransformation, sampler: Sampler, **settings: Any) -> StepFunction:
        scaled = policy.config.dtype == jnp.float16
        if scaled:
            scale = Scheduled(lambda step, extra: extra.scale)
            settings["updates"] = dataclasses.replace(settings["updates"], loss_scale=scale)
        settings["transforms"] = (*settings["transforms"], measured.sampler_gap())
        step = make_train_step(policy, optimizer, sampler, score_old=True, **settings)

        def step_and_follow(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics]:
            state, metrics = step(state, prompts)
            return state._replace(extra=loss_scale.follow(state.extra, state.skipped)) if scaled else state, metrics

        return step_and_follow

    def begin(state: TrainState) -> TrainState:
        return state._replace(extra=loss_scale.init()) if policy.config.dtype == jnp.float16 else state

    return setting.make(config, lambda hyper: {"loss": loss}, build=build, begin=begin)


if __name__ == "__main__":
    setting.main(experiment, __doc__, default=Config(steps=50, evaluations=5))
