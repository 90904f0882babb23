"""GRPO (Group Relative Policy Optimization) in pure JAX: functions over pytrees.

A step, in the order that data flows:

    sample      prompts -> rollout                  sampling.py
    reward      rollout -> rewards                  rewards/
    score       rollout -> log-probs, entropy       scoring.py
    advantage   rewards -> advantages               advantages.py
    loss        scores, experience -> terms         losses/
    update      gradients -> state                  updates.py

`train_step.py` composes them into one pure function; `types.py` has what they hand
to each other, `policies.py` what a network must offer. Around the step: `preparation.py`
(filters of tokens), `dynamic_sampling.py`, `schedules.py`, `reference.py` (renewal of the
reference policy), `entropy_control.py`, `curriculum.py`, and `recipes/` with published
settings. Around the run: `tasks/`, `evaluation.py`, `metrics.py`, `monitoring.py` and
`checkpoint.py`.
"""

from grpo_jax import (
    ablation,
    advantages,
    baselines,
    checkpoint,
    compilation,
    curriculum,
    data,
    descent,
    dynamic_sampling,
    entropy_control,
    evaluation,
    hf,
    losses,
    metrics,
    models,
    monitoring,
    packing,
    policies,
    preemption,
    preparation,
    recipes,
    reference,
    refill,
    rewards,
    rollouts,
    runs,
    sampling,
    schedules,
    scoring,
    tasks,
    testing,
    train_step,
    types,
    updates,
)
from grpo_jax.policies import Policy, from_logits_fn
from grpo_jax.runs import make_run
from grpo_jax.sampling import sample
from grpo_jax.schedules import Scheduled
from grpo_jax.scoring import score
from grpo_jax.train_step import make_collect, make_learn, make_train_step
from grpo_jax.types import Experience, Max, Mean, Prompts, Rollout, Scores, TrainState
from grpo_jax.updates import init_state, update

__all__ = [
    "Experience",
    "Max",
    "Mean",
    "Policy",
    "Prompts",
    "Rollout",
    "Scheduled",
    "Scores",
    "TrainState",
    "ablation",
    "advantages",
    "baselines",
    "checkpoint",
    "compilation",
    "curriculum",
    "data",
    "descent",
    "dynamic_sampling",
    "entropy_control",
    "evaluation",
    "from_logits_fn",
    "hf",
    "init_state",
    "losses",
    "make_collect",
    "make_learn",
    "make_run",
    "make_train_step",
    "metrics",
    "models",
    "monitoring",
    "packing",
    "policies",
    "preemption",
    "preparation",
    "recipes",
    "reference",
    "refill",
    "rewards",
    "rollouts",
    "runs",
    "sample",
    "sampling",
    "schedules",
    "score",
    "scoring",
    "tasks",
    "testing",
    "train_step",
    "types",
    "update",
    "updates",
]
