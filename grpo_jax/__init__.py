"""GRPO (Group Relative Policy Optimization) in pure JAX: functions over pytrees.

A step, in the order that data flows:

    sample      prompts -> rollout                  sampling/
    reward      rollout -> rewards                  rewards/
    score       rollout -> log-probs, entropy       scoring.py
    advantage   rewards -> advantages               advantages/
    loss        scores, experience -> terms         losses/
    update      gradients -> state                  updates.py

`train_step.py` composes them into one pure function; `types.py` has what they hand to each other, `policies.py` what
a network offers. Beside the step: `transforms.py` (token filters), `dynamic_sampling.py`, `schedules/`, `baselines/`
and `recipes/` with published settings. Networks and their weights are in `models/`, prompts with verifiers in
`tasks/`, files and tokens in `data`. Around it: `run/` is one run (loop, checkpoints, metrics), `study/` whole
experiments (grids of runs, evaluation).

Nothing is imported before it is used: `import grpo_jax` costs no more than JAX does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.policies import Policy as Policy
    from grpo_jax.policies import from_logits_fn as from_logits_fn
    from grpo_jax.sampling import PolicySampler as PolicySampler
    from grpo_jax.schedules import Scheduled as Scheduled
    from grpo_jax.scoring import score as score
    from grpo_jax.statistics import Max as Max
    from grpo_jax.statistics import Mean as Mean
    from grpo_jax.study.runs import make_run as make_run
    from grpo_jax.train_step import make_collect as make_collect
    from grpo_jax.train_step import make_learn as make_learn
    from grpo_jax.train_step import make_train_step as make_train_step
    from grpo_jax.types import Experience as Experience
    from grpo_jax.types import Prompts as Prompts
    from grpo_jax.types import Rollout as Rollout
    from grpo_jax.types import Scores as Scores
    from grpo_jax.types import TrainState as TrainState
    from grpo_jax.updates import init_state as init_state
    from grpo_jax.updates import update as update

_HOME = {
    "Experience": "types",
    "Max": "statistics",
    "Mean": "statistics",
    "Policy": "policies",
    "PolicySampler": "sampling",
    "Prompts": "types",
    "Rollout": "types",
    "Scheduled": "schedules",
    "Scores": "types",
    "TrainState": "types",
    "from_logits_fn": "policies",
    "init_state": "updates",
    "make_collect": "train_step",
    "make_learn": "train_step",
    "make_run": "study.runs",
    "make_train_step": "train_step",
    "score": "scoring",
    "update": "updates",
}
_MODULES = (
    "advantages",
    "baselines",
    "data",
    "dynamic_sampling",
    "environments",
    "freezing",
    "losses",
    "models",
    "optimizers",
    "packing",
    "policies",
    "protocols",
    "recipes",
    "rewards",
    "run",
    "sampling",
    "schedules",
    "scoring",
    "statistics",
    "study",
    "tasks",
    "testing",
    "tools",
    "train_step",
    "transforms",
    "truncation",
    "turn_advantages",
    "types",
    "updates",
)

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
