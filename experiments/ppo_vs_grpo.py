"""PPO with a critic against GRPO: memory, seconds a step, accuracy by step and by second.

python experiments/ppo_vs_grpo.py

Task, start and network are those of `experiments/ablations/setting.py`. Every method samples 64 completions a step and
has the same optimiser and learning rate: GRPO 8 prompts x 8, PPO 64 prompts x 1, which is its usual way, and 8 x 8.
The large critic starts as a copy of the policy; the small one, of half the width and half the layers, at random; both
have a value head of zeros. PPO's discount, decay, value and entropy weight are 0.99, 0.95, 0.5 and 0.01. No method has
a reward model, since rewards are verified, nor, where it learns here, a reference policy.

Memory is that of a step of 8 prompts x 8 with one update of float32 parameters under Adam, by method and size of model:

- on paper, from `jax.eval_shape`: parameters, gradients, Adam's two moments, and the reference policy;
- compiled: what the programs of sampling and of learning hold at their worst beside parameters, Adam and reference,
  for the device that this runs on, with no array made. Activations are what learning holds but for one copy
  of the gradients; where there are micro-batches, the second copy that they are summed in is among them;
- measured: seconds and, on a GPU, the peak of the device's memory, at the sizes that are run at all.

Written are `ppo_vs_grpo.csv`, `.md` and `.png` (by step), `ppo_vs_grpo_by_second.png` and `ppo_vs_grpo_memory.csv`.
Seconds a step are those of all seeds in one program, without the evaluation: the fastest chunk less the
fastest evaluation, since what else the machine does can only add to them.

What came of it: `experiments/README.md`.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
import tyro
from ablations import setting
from ablations.setting import Config, Hyper

from grpo_jax import losses, models, sampling
from grpo_jax.baselines import heads, ppo
from grpo_jax.models.config import DecoderConfig
from grpo_jax.policies import Policy
from grpo_jax.run import compilation
from grpo_jax.study import figures, footprints, grid, results, runs, tables
from grpo_jax.study.grid import Condition
from grpo_jax.study.intervals import bootstrap
from grpo_jax.study.results import Row
from grpo_jax.tasks import modular_sums
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.types import Params, PRNGKey, Prompts, TrainState
from grpo_jax.updates import Updates, init_state

NAME = "ppo_vs_grpo"
# The run folder, with its starts, is the ablations'.
DEFAULT = Config(results=pathlib.Path(__file__).parent / "results")
GRPO = "GRPO, 8 x 8, 1 pass"
SECONDS = "seconds of steps"


def experiment(config: Config) -> None:
    """Learning, then memory."""
    setting.run(
        NAME,
        config,
        learning_conditions(config),
        metrics=("greedy", "sampled", "length", "entropy"),
        curves=("greedy", "sampled", "length", "explained_variance"),
        against=GRPO,
    )
    rows = results.read(config.results / f"{NAME}.csv")
    seconds = seconds_per_step(config, results.read(config.run_dir / NAME / grid.TIMING))
    timed_rows = [row | {SECONDS: row["step"] * seconds[row["condition"]]} for row in rows]
    figures.curves(timed_rows, ("greedy", "sampled"), config.results / f"{NAME}_by_second.png", x=SECONDS)
    lines = [memory_of(size, method) for size in sizes(config) for method in methods(config)]
    results.write(config.results / f"{NAME}_memory.csv", lines)
    written = [seconds_table(rows, seconds), memory_table(lines)]
    path = config.results / f"{NAME}.md"
    path.write_text("\n".join([path.read_text(), *written]))
    print("\n".join(written))


# ----------------------------------------------------------------------------- learning


def learning_conditions(config: Config) -> list[Condition]:
    """GRPO, and PPO with either critic; what differs from the first line of each is named."""
    large = functools.partial(ppo_run, config, setting.policy, copied)
    small = functools.partial(ppo_run, config, models.decoder(half(setting.policy.config)), from_nothing)
    four = setting.make(config, lambda hyper: {"updates": dataclasses.replace(setting.UPDATES, iterations=4)})
    discounted, undiscounted = {"gamma": 0.99, "gae_lambda": 0.95}, {"gamma": 1.0, "gae_lambda": 1.0}
    once = large(1)
    found = [
        Condition(GRPO, setting.make(config)),
        Condition("PPO, large critic, 64 x 1, 1 pass", once, discounted),
        Condition("PPO, large critic, 64 x 1, 1 pass, gamma = lambda = 1", once, undiscounted),
        Condition("PPO, large critic, 8 x 8, 1 pass", large(1, prompts=8), discounted),
        Condition("PPO, small critic, 64 x 1, 1 pass", small(1), discounted),
        Condition("GRPO, 8 x 8, 4 passes", four),
        Condition("PPO, large critic, 64 x 1, 4 passes", large(4), discounted),
        Condition("PPO, small critic, 64 x 1, 4 passes", small(4), discounted),
    ]
    return [found[0], found[4], found[6]] if config.smoke else found


COMPLETIONS = 64  # of a step, under every method


def ppo_run(
    config: Config,
    critic: Policy,
    init_critic: Callable[[Policy, PRNGKey, Params], Params],
    iterations: int,
    prompts: int = COMPLETIONS,
) -> runs.Run:
    """The standard run with PPO in the place of GRPO.

    Args:
      config: of the experiment.
      critic: its network.
      init_critic: `(critic, key, params of the policy) -> params of the critic`.
      iterations: of the updates.
      prompts: of a step, each with its share of the completions.
    """
    optimizer = optax.adam(setting.LEARNING_RATE, b2=0.99)

    def init(key: PRNGKey, hyper: Hyper) -> TrainState:
        params = {"policy": hyper["params"], "critic": init_critic(critic, key, hyper["params"])}
        return init_state(params, optimizer, key)

    def step(hyper: Hyper) -> Step:
        guide = {"gamma": hyper["gamma"], "gae_lambda": hyper["gae_lambda"]}
        return ppo.make_train_step(
            setting.policy,
            critic,
            optimizer,
            setting.sampler(group_size=COMPLETIONS // prompts),
            reward=setting.reward(),
            advantage=ppo.gae_advantages(**guide, weights=setting.WEIGHTS),
            loss=ppo.ppo_loss(value_weight=0.5, entropy_weight=0.01),
            updates=dataclasses.replace(setting.UPDATES, iterations=iterations),
        )

    return runs.make_run(
        init,
        step,
        lambda key, n, hyper: modular_sums.problems(jax.random.fold_in(key, n), prompts, terms=setting.STANDARD),
        num_steps=config.steps,
        evaluate=lambda params, hyper: setting.evaluate(params["policy"], setting.STANDARD),
        evaluate_every=config.steps // 10,
    )


def copied(critic: Policy, key: PRNGKey, params: Params) -> Params:
    """A critic that starts as the policy."""
    return heads.init_from(critic, params)


def from_nothing(critic: Policy, key: PRNGKey, params: Params) -> Params:
    """A critic that starts from nothing."""
    return heads.init(critic, key)


def seconds_per_step(config: Config, timing: Sequence[Row]) -> dict[str, float]:
    """By condition. The first chunk, which compiles, is left out."""
    evaluate = jax.jit(jax.vmap(functools.partial(setting.evaluate, terms=setting.STANDARD)))
    params = jax.block_until_ready(setting.starts(config))
    evaluation = min(footprints.timed(evaluate, params)[0] for _ in range(10))
    chunks: dict[str, list[float]] = {}
    for row in timing:
        if row["chunk"] > 1:
            chunks.setdefault(row["condition"], []).append(row["seconds"])
    return {name: (min(of_chunks) - evaluation) / (config.steps // 10) for name, of_chunks in chunks.items()}


def seconds_table(rows: Sequence[Row], seconds: Mapping[str, float]) -> str:
    """Seconds a step, and the greedy accuracy when the fastest method has ended."""
    steps = sorted({row["step"] for row in rows})
    budget = min(seconds.values()) * steps[-1]
    lines = []
    for condition, of_step in seconds.items():
        of_condition = [row for row in rows if row["condition"] == condition]
        at_the_end = functools.partial(np.interp, budget / of_step, steps)
        reached = bootstrap(results.per_seed(of_condition, "greedy", at_the_end)[condition])
        lines.append([condition, f"{of_step:.4f}", f"{of_step / seconds[GRPO]:.2f}", tables.text(reached)])
    return tables.markdown(
        ["condition", "seconds per step", f"times {GRPO}", f"greedy after {budget:.1f} seconds"], lines
    )


# ------------------------------------------------------------------------------- memory


class Size(NamedTuple):
    """A model and the completions of a step, 8 prompts x 8."""

    name: str
    config: DecoderConfig
    prompt_tokens: int
    max_tokens: int
    micro_batches: int
    on: tuple[str, ...] = ()  # the backends that run it; on others it is compiled at most


class Method(NamedTuple):
    """What a method keeps beside its policy."""

    name: str
    critic: Callable[[DecoderConfig], DecoderConfig] | None = None
    reference: bool = False


def qwen(width: int, layers: int, heads: int, kv_heads: int, inner: int, words: int, tied: bool) -> Any:
    """The shape of a Qwen2.5."""
    return transformers.Qwen2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=words,
        tie_word_embeddings=tied,
    )


HALF_B = qwen(896, 24, 14, 2, 4864, 151936, True)
ONE_B = qwen(1536, 28, 12, 2, 8960, 151936, True)
SEVEN_B = qwen(3584, 28, 28, 4, 18944, 152064, False)


def sizes(config: Config) -> list[Size]:
    """From what a CPU runs to what is on paper."""
    tiny = Size("128 wide", models.from_hf_config(qwen(128, 2, 4, 2, 384, 256, True)), 16, 16, 1, ("cpu", "gpu", "tpu"))
    if config.smoke:
        return [tiny]
    bfloat16 = functools.partial(models.from_hf_config, dtype=jnp.bfloat16)
    return [
        tiny,
        Size("256 wide", models.from_hf_config(qwen(256, 4, 4, 2, 768, 2048, True)), 64, 64, 1, ("cpu", "gpu", "tpu")),
        Size("Qwen2.5-0.5B", bfloat16(HALF_B), 512, 512, 8, ("gpu",)),
        Size("Qwen2.5-1.5B", bfloat16(ONE_B), 512, 512, 8),
        Size("Qwen2.5-7B", bfloat16(SEVEN_B), 512, 512, 8),
    ]


def methods(config: Config) -> list[Method]:
    """With and without a reference policy."""
    found = [
        Method("GRPO"),
        Method("GRPO, reference", reference=True),
        Method("PPO, small critic", critic=half),
        Method("PPO, small critic, reference", critic=half, reference=True),
        Method("PPO, large critic", critic=whole),
        Method("PPO, large critic, reference", critic=whole, reference=True),
    ]
    return found[-2:-1] if config.smoke else found


def whole(config: DecoderConfig) -> DecoderConfig:
    """The policy's network without its last product, which a critic does not need."""
    return dataclasses.replace(config, tie_embeddings=True)


def half(config: DecoderConfig) -> DecoderConfig:
    """Half the width and half the layers."""
    return dataclasses.replace(
        whole(config),
        hidden_size=config.hidden_size // 2,
        intermediate_size=config.intermediate_size // 2,
        num_layers=config.num_layers // 2,
        num_heads=config.num_heads // 2,
        num_kv_heads=config.num_kv_heads // 2,
    )


def programs(size: Size, method: Method) -> tuple[Callable[[PRNGKey], TrainState], Step]:
    """The state that a step of a method begins with, and the step, of one update and without a reward."""
    policy, optimizer = models.decoder(size.config), optax.adam(1e-6, b2=0.99)
    sampler = sampling.sampler(group_size=8, max_tokens=size.max_tokens, eos_ids=())
    updates = Updates(micro_batches=size.micro_batches, max_grad_norm=1.0)
    if method.critic is None:
        loss = losses.grpo(penalty=losses.k3(0.04) if method.reference else None)
        step = make_train_step(policy, optimizer, sampler, loss=loss, updates=updates)
        return lambda key: init_state(policy.init(key), optimizer, key, reference=method.reference), step
    critic = models.decoder(method.critic(size.config))

    def init(key: PRNGKey) -> TrainState:
        params = {"policy": policy.init(key), "critic": heads.init(critic, key)}
        state = init_state(params, optimizer, key)
        # The policy's alone: `init_state(reference=True)` would keep a copy of the critic as well.
        return state._replace(ref_params={"policy": params["policy"]} if method.reference else None)

    advantage = ppo.gae_advantages(kl_weight=0.05 if method.reference else None)
    return init, ppo.make_train_step(policy, critic, optimizer, sampler, advantage=advantage, updates=updates)


def random_prompts(size: Size) -> Prompts:
    """Eight prompts of random tokens."""
    tokens = np.random.default_rng(0).integers(0, size.config.vocab_size, (8, size.prompt_tokens))
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.full(8, size.prompt_tokens, jnp.int32))


def memory_of(size: Size, method: Method) -> dict[str, Any]:
    """One line of the table: on paper, compiled and, where it is run, measured."""
    line = {"size": size.name, "method": method.name}
    line |= footprints.footprint(*programs(size, method), random_prompts(size))
    return line | (footprints.in_a_process(measure, size, method) if jax.default_backend() in size.on else {})


def measure(size: Size, method: Method) -> dict[str, float]:
    """Seconds, and the peak of the device's memory."""
    return footprints.measure(*programs(size, method), random_prompts(size))


# ------------------------------------------------------------------------------- tables

KEPT = ("parameters", "gradients", "optimizer", "reference")  # bytes on paper
HELD = ("sampling", "learning", "activations")  # bytes by the compiler
PPO = "PPO, large critic"


def memory_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """In GiB, and as a share of PPO's with a large critic at the same size, without and with a reference."""
    sums = {"on paper": KEPT, "compiled": HELD, "peak": ()}
    header = ["size", "method"]
    for total, parts in sums.items():
        header += [*parts, total, "of PPO", "of PPO with reference"]
    header += ["seconds of sampling", "seconds of learning"]

    def cells(line: Mapping[str, Any]) -> list[str]:
        found = [line["size"], line["method"]]
        for total, parts in sums.items():
            found += [gib(line.get(name)) for name in (*parts, total)]
            found += [share(line, total, method) for method in (PPO, f"{PPO}, reference")]
        return found + [f"{line[name]:.3f}" if name in line else "" for name in header[-2:]]

    def share(line: Mapping[str, Any], total: str, method: str) -> str:
        other = [o for o in lines if o["size"] == line["size"] and o["method"] == method and total in o]
        return f"{line[total] / other[0][total]:.2f}" if other else ""

    return tables.markdown(header, [cells(line) for line in lines])


def gib(number: int | None) -> str:
    """Bytes in GiB."""
    return "" if number is None else f"{number / 2**30:.3g}"


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # what is measured has a process of its own
    compilation.enable_compilation_cache()
    experiment(setting.configured(tyro.cli(Config, default=DEFAULT, description=__doc__)))
