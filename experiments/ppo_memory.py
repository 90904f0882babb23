"""The memory and the time of a step of PPO with a critic and of GRPO, by size of the model.

python experiments/ppo_memory.py

A step is 8 prompts x 8 with one update of float32 parameters under Adam. The critic is as large as the policy or, the
small one, of half the width and half the layers. Of each size and method:

- on paper: parameters, gradients, the optimiser's two moments, and the reference policy, by their shapes;
- compiled: what the programs of sampling and of learning hold at their worst beside what is kept, for the device that
  this runs on, with no array made. Activations are what learning holds but for one copy of the gradients; where there
  are micro-batches, the second copy that they are summed in is among them;
- measured: seconds and, on a GPU, the peak of the device's memory, at the sizes that are run at all.

Written are `ppo_memory.csv` and `.md`. What came of it: `docs/pages/results/neighbours.md`.
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

from grpo_jax import losses, models, sampling
from grpo_jax.baselines import heads, ppo
from grpo_jax.models.config import DecoderConfig
from grpo_jax.run import command
from grpo_jax.study import footprints, results, tables
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.types import PRNGKey, Prompts, TrainState
from grpo_jax.updates import Updates, init_state


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    results: pathlib.Path = pathlib.Path(__file__).parent / "results"  # where the CSV and the table go
    smoke: bool = False  # one method at the smallest size, to see that it runs


def experiment(config: Config) -> None:
    """One line of each size and method."""
    lines = [table_line(size, method) for size in sizes(config.smoke) for method in methods(config.smoke)]
    config.results.mkdir(parents=True, exist_ok=True)
    results.write(config.results / "ppo_memory.csv", lines)
    written = table(lines)
    (config.results / "ppo_memory.md").write_text(written)
    print(written)


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


def sizes(smoke: bool) -> list[Size]:
    """From what a CPU runs to what is on paper."""
    tiny = Size("128 wide", models.from_hf_config(qwen(128, 2, 4, 2, 384, 256, True)), 16, 16, 1, ("cpu", "gpu", "tpu"))
    if smoke:
        return [tiny]
    bfloat16 = functools.partial(models.from_hf_config, dtype=jnp.bfloat16)
    return [
        tiny,
        Size("256 wide", models.from_hf_config(qwen(256, 4, 4, 2, 768, 2048, True)), 64, 64, 1, ("cpu", "gpu", "tpu")),
        Size("Qwen2.5-0.5B", bfloat16(HALF_B), 512, 512, 8, ("gpu",)),
        Size("Qwen2.5-1.5B", bfloat16(ONE_B), 512, 512, 8),
        Size("Qwen2.5-7B", bfloat16(SEVEN_B), 512, 512, 8),
    ]


def methods(smoke: bool) -> list[Method]:
    """With and without a reference policy."""
    found = [
        Method("GRPO"),
        Method("GRPO, reference", reference=True),
        Method("PPO, small critic", critic=half),
        Method("PPO, small critic, reference", critic=half, reference=True),
        Method("PPO, large critic", critic=whole),
        Method("PPO, large critic, reference", critic=whole, reference=True),
    ]
    return found[-2:-1] if smoke else found


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


def table_line(size: Size, method: Method) -> dict[str, Any]:
    """One line of the table: on paper, compiled and, where it is run, measured."""
    expected = footprints.footprint(*programs(size, method), random_prompts(size))
    measured = footprints.in_a_process(measure, size, method) if jax.default_backend() in size.on else {}
    return {"size": size.name, "method": method.name} | expected | measured


def measure(size: Size, method: Method) -> dict[str, float]:
    """Seconds, and the peak of the device's memory."""
    return footprints.measure(*programs(size, method), random_prompts(size))


# -------------------------------------------------------------------------------- table

KEPT = ("parameters", "gradients", "optimizer", "reference")  # bytes on paper
HELD = ("sampling", "learning", "activations")  # bytes by the compiler
PPO = "PPO, large critic"


def table(lines: Sequence[Mapping[str, Any]]) -> str:
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
    command(experiment, Config, __doc__)
