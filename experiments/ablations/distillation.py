"""Distillation against GRPO and supervised learning at equal samples: 64 completions per step, from the same starts.

python experiments/ablations/distillation.py               # each at its best rate; --estimate tells the time before
python experiments/ablations/distillation.py --no-rank     # all at one rate, with curves

The teacher is a network of the same size that has learned the sums from right demonstrations. The policy samples 8
completions of 8 prompts and learns from a verifier (GRPO), from the teacher's log-prob of each token that was drawn,
from its whole distribution at each token, or from verifier and teacher. Or the teacher samples the completions, and the
policy learns their tokens (SFT). What came of it: `docs/pages/results/ablations.md`.
"""

from typing import Any

import jax
import optax
import setting
from setting import Condition, Config, Metrics, Prompts, TrainState

from grpo_jax import losses
from grpo_jax.advantages import distillation_advantages
from grpo_jax.policies import Policy
from grpo_jax.protocols import Reward, Sampler, VocabularyDivergence
from grpo_jax.scoring import Teacher
from grpo_jax.study.runs import StepFunction
from grpo_jax.tasks import modular_sums
from grpo_jax.train_step import make_collect, make_learn
from grpo_jax.types import Params, PRNGKey
from grpo_jax.updates import init_state

# Most of what is to be learned is learned in few steps.
DEFAULT = Config(rank=True, rate_seeds=4, rank_seeds=16, rank_steps=30, rank_evaluations=6)


def experiment(config: Config) -> None:
    """What is learned from x who samples."""
    drawn = {"loss": losses.reinforce(aggregate=losses.token_mean), "advantage": distillation_advantages()}
    both = {"loss": losses.plus(losses.grpo(), losses.sampled_reverse_kl(0.1))}
    conditions = [
        Condition("GRPO", setting.make(config)),
        Condition("token drawn", make(config, drawn)),
        Condition("reverse KL", make(config, whole(losses.reverse_kl))),
        Condition("forward KL", make(config, whole(losses.forward_kl))),
        Condition("GRPO + 0.1 x token drawn", make(config, both)),
        Condition("teacher samples, SFT", make(config, {"loss": losses.sft()}, build=sampled_by_the_teacher)),
    ]
    names = ("greedy", "sampled")
    teacher = jax.jit(learned, static_argnums=1)(jax.random.key(2_000_000), config)  # a seed of none of the starts
    accuracy = jax.jit(setting.evaluate, static_argnums=1)(teacher, config)
    print(f"the teacher's greedy accuracy is {accuracy['greedy']:.3f}")
    setting.run(
        "distillation", config, conditions, metrics=names, curves=names, against="GRPO", shared={"teacher": teacher}
    )


def learned(key: PRNGKey, config: Config) -> Params:
    """The teacher: as a start, but from demonstrations without a mistake."""
    terms, modulus = setting.terms_of(config, setting.STANDARD), setting.modulus_of(config)
    return setting.warm_up(key, terms, config.warmup_steps, modular_sums.TeacherRates(), modulus)


def whole(divergence: VocabularyDivergence) -> setting.Settings:
    """Settings of a step that learns from the teacher's whole distribution."""
    return {"loss": losses.distill(), "teacher": Teacher(setting.policy, divergence)}


def make(config: Config, settings: setting.Settings, **who: Any) -> setting.Run:
    """The standard run with a teacher, in the place of the reference policy."""
    return setting.make(config, lambda hyper: settings, initial=taught, **who)


def taught(key: PRNGKey, hyper: setting.Hyper, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of a run with a teacher."""
    return init_state(hyper["params"], optimizer, key)._replace(ref_params=hyper["teacher"])


def sampled_by_the_teacher(
    policy: Policy, optimizer: optax.GradientTransformation, sampler: Sampler, *, reward: Reward, **settings: Any
) -> StepFunction:
    """A step of learning from completions of the teacher."""
    collect = make_collect(policy, sampler, reward=reward)
    learn = make_learn(policy, optimizer, **settings)

    def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics]:
        return learn(state, collect(state._replace(params=state.ref_params), prompts))

    return step


if __name__ == "__main__":
    setting.main(experiment, __doc__, default=DEFAULT)
