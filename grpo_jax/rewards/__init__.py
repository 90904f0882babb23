"""Verifiers: on text, on the host, and on tokens, inside the program.

    host.py         functions with TRL's signature -> the reward of a rollout; callback
    calling.py      one call of such functions: their arguments, the checks of their values
    combining.py    combine: several functions as one
    failures.py     skip_failed_batches: a failed batch is masked
    completions.py  the text of a completion
    conversations.py  environment: what an environment gave; conversations as messages
    answers.py      exact_answer, plain_answer: the answer in a text, by text or by number
    mathematics.py  accuracy: whether two answers are equal as mathematics (latex.py and units.py read them)
    calculations.py worked_steps: whether the calculations in a text are right
    consistency.py  self_consistency: the majority of a group
    formats.py      strict_format, soft_format, tag_count: the tags
    lengths.py      reasoning_length, soft_overlong, cosine_length
    repetition.py   repetition_penalty
    language.py     language_consistency
    python.py       python_tests: code against unit tests, in a sandbox
    program_tests.py  tests of programs, in the forms that public data sets have
    judging.py      judge: a language model behind an HTTP endpoint
    rubrics.py      rubric: a judge of each criterion of a row's list
    comparing.py    pairwise, listwise: a judge of a group's completions against one another
    process.py      steps: rewards of the steps of a completion, at their tokens; step_judge
    held_out.py     held_out_metrics: a verifier that is not trained on
    model.py        reward_model: a sequence-classification checkpoint in JAX
    pool.py         WorkerPool, in_worker_processes: worker processes that can be killed
    sandbox.py      bubblewrap: the command that runs another in a sandbox
    tokens.py       verifiers of tokens, traced into the step

The makers here are those of text; `rewards.tokens` has the traced ones of the same names.
A share without a denominator (no calculation, no letter) is a reward of 0. Rewards on text take
time linear in a completion's length; only a pattern or a function of the caller's can take longer.
"""

from grpo_jax.rewards import tokens
from grpo_jax.rewards.answers import answer_of, exact_answer, plain_answer
from grpo_jax.rewards.calculations import worked_steps
from grpo_jax.rewards.calling import RewardFunction, TrainerState, group_size_of, name_of
from grpo_jax.rewards.combining import combine
from grpo_jax.rewards.comparing import listwise, pairwise
from grpo_jax.rewards.completions import text_of
from grpo_jax.rewards.consistency import self_consistency
from grpo_jax.rewards.conversations import conversation_messages, environment
from grpo_jax.rewards.failures import skip_failed_batches
from grpo_jax.rewards.formats import R1_WEIGHTS, soft_format, strict_format, tag_count
from grpo_jax.rewards.held_out import held_out_metrics
from grpo_jax.rewards.host import HostReward, callback, completion_texts, host
from grpo_jax.rewards.judging import judge
from grpo_jax.rewards.language import language_consistency
from grpo_jax.rewards.lengths import cosine_length, cosine_scale, overlong_penalty, reasoning_length, soft_overlong
from grpo_jax.rewards.mathematics import accuracy
from grpo_jax.rewards.model import reward_model
from grpo_jax.rewards.pool import WorkerPool, in_worker_processes
from grpo_jax.rewards.process import step_judge, steps
from grpo_jax.rewards.python import python_tests
from grpo_jax.rewards.repetition import repetition_penalty
from grpo_jax.rewards.rubrics import rubric
from grpo_jax.rewards.tokens import TokenReward, traced

__all__ = [
    "R1_WEIGHTS",
    "HostReward",
    "RewardFunction",
    "TokenReward",
    "TrainerState",
    "WorkerPool",
    "accuracy",
    "answer_of",
    "callback",
    "combine",
    "completion_texts",
    "conversation_messages",
    "cosine_length",
    "cosine_scale",
    "environment",
    "exact_answer",
    "group_size_of",
    "held_out_metrics",
    "host",
    "in_worker_processes",
    "judge",
    "language_consistency",
    "listwise",
    "name_of",
    "overlong_penalty",
    "pairwise",
    "plain_answer",
    "python_tests",
    "reasoning_length",
    "repetition_penalty",
    "reward_model",
    "rubric",
    "self_consistency",
    "skip_failed_batches",
    "soft_format",
    "soft_overlong",
    "step_judge",
    "steps",
    "strict_format",
    "tag_count",
    "text_of",
    "tokens",
    "traced",
    "worked_steps",
]
