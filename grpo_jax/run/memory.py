"""How much memory a step takes, before it is run.

    python -m grpo_jax.run.memory --model Qwen/Qwen2.5-0.5B --group-size 16 --prompts 32 --device-gib 80
    python -m grpo_jax.run.memory --model Qwen/Qwen2.5-7B --lora-rank 16 --quantize nf4 --device-gib 24

Nothing is allocated: sizes of what is kept come from `jax.eval_shape`, and those of what a step needs
beside it from the compiled programs of `collect` and `learn`. They are of the backend that this runs on: a plan for a
GPU is made on one, since another backend fuses otherwise and, by default, computes attention otherwise. Only the
model's configuration is read, not its weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import transformers

from grpo_jax import losses, models, sampling
from grpo_jax.compiler_options import saving_memory
from grpo_jax.freezing import bind
from grpo_jax.models import quantized
from grpo_jax.models.settings import WeightSettings
from grpo_jax.policies import Policy
from grpo_jax.protocols import Loss
from grpo_jax.run import command
from grpo_jax.sampling import PolicySampler
from grpo_jax.scoring import CHUNK_TOKENS
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.types import Experience, Params, Prompts
from grpo_jax.updates import Updates, init_state


class Plan(NamedTuple):
    """Bytes of a step.

    The first four are there all the time; moments, reference and gradients are of what is trained alone. `sampling` and
    `learning` are what those programs hold at their worst beside them, rollout included; the others say what is in
    those two.
    """

    parameters: int  # what is trained
    frozen: int  # and what is not; 0 without adapters
    optimizer: int
    reference: int  # 0 without one
    cast: int  # in sampling: copies of the parameters, trained or frozen, that are not in the compute dtype
    sampling: int
    learning: int
    prompt_cache: int  # in sampling: keys and values, once a prompt
    completion_cache: int  # in sampling: keys and values of all completions
    gradients: int  # in learning
    logits: int  # in learning: those of a chunk, and their gradient
    activations: int  # in learning: what is left

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step."""
        kept = self.parameters + self.frozen + self.optimizer + self.reference
        return kept + max(self.sampling, self.learning)


def plan(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    sampler: PolicySampler,
    *,
    loss: Loss,
    prompts: int,
    prompt_tokens: int,
    reference: bool,
    params: Params | None = None,
    frozen: Params | None = None,
    updates: Updates = Updates(),
    score_old: bool = False,
) -> Plan:
    """The memory of one step of `prompts * sampler.group_size` completions, on the default backend.

    `learn` is taken to donate its state and to be compiled with `compiler_options.saving_memory()`, as by
    `step.jit()`.

    Args:
      policy: the network; its compute dtype, attention and rematerialisation count.
      optimizer: any optax optimiser.
      sampler: of the step.
      loss: any loss.
      prompts: `B`.
      prompt_tokens: `P`, what prompts are padded to.
      reference: whether a reference policy is kept.
      params: what is trained, or its shapes; None for all of the policy's.
      frozen: the rest of what the network reads, such as the base of adapters, or its shapes.
      updates: of the step.
      score_old: as of `make_train_step`.
    """
    group_size, max_tokens = sampler.group_size, sampler.max_tokens
    array: Callable[..., Any] = jax.ShapeDtypeStruct
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(policy.init, key) if params is None else jax.eval_shape(lambda: params)
    init = functools.partial(init_state, optimizer=optimizer, reference=reference)
    state = jax.eval_shape(lambda params, frozen, key: init(params, frozen=frozen, key=key), params, frozen, key)
    tokens, lengths = array((prompts, prompt_tokens), jnp.int32), array((prompts,), jnp.int32)
    batch = Prompts(tokens, lengths)
    step = make_train_step(policy, optimizer, sampler, loss=loss, updates=updates, score_old=score_old)
    sampling, learning = programs(step, state, batch)
    of_params = size(params)
    rows = prompts // updates.parts * group_size
    width = min(max_tokens, max(1, CHUNK_TOKENS // rows))
    whole = bind(params, state.frozen)
    logits = 2 * rows * width * jax.eval_shape(policy.unembed, whole, _hidden(policy, whole, batch)).shape[-1] * 4
    before, cast = jax.tree.leaves(whole), jax.tree.leaves(jax.eval_shape(policy.cast, whole))
    return Plan(
        parameters=of_params,
        frozen=size(state.frozen),
        optimizer=size(state.opt_state),
        reference=size(state.ref_params),
        cast=size([new for old, new in zip(before, cast, strict=True) if new.dtype != old.dtype]),
        sampling=sampling,
        learning=learning,
        prompt_cache=size(jax.eval_shape(policy.prefill, whole, tokens, lengths)),
        completion_cache=size(jax.eval_shape(functools.partial(policy.init_cache, prompts, group_size, max_tokens))),
        gradients=of_params,
        logits=logits,
        activations=max(0, learning - of_params - logits),
    )


def programs(
    step: Step, state: Any, prompts: Prompts, *, compiler_options: Mapping[str, str | bool] | None = None
) -> tuple[int, int]:
    """Bytes that the programs of sampling and of learning hold at their worst beside the state.

    Args:
      step: without a reward; one reward of each completion is put in between its halves.
      state: its shapes, from `jax.eval_shape`, or a state.
      prompts: theirs.
      compiler_options: as of `Step.jit`; as there, learning donates the state.
    """
    experience: Experience = jax.eval_shape(step.collect, state, prompts)
    shape = (*experience.rollout.tokens.shape[:2], 1)
    rewards, reward_mask = jax.eval_shape(lambda: (jnp.zeros(shape), jnp.zeros(shape, bool)))
    experience = experience._replace(rewards=rewards, reward_mask=reward_mask)
    options = saving_memory() if compiler_options is None else dict(compiler_options)
    learn = jax.jit(step.learn, donate_argnums=0, compiler_options=options)
    return beside(jax.jit(step.collect), state, prompts), beside(learn, state, experience) + size(experience)


def beside(program: Any, *arguments: Any) -> int:
    """Bytes that a jitted program holds at its worst beside its arguments; donated ones are written over."""
    found = program.lower(*arguments).compile().memory_analysis()
    return int(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes)


def size(tree: Any) -> int:
    """Bytes of the arrays of a tree; two codes of 4 bits take one."""
    return sum(leaf.size * bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(tree))


def bits(dtype: Any) -> int:
    """Of a number on a device."""
    return 4 if dtype in (jnp.int4, jnp.uint4) else 8 * dtype.itemsize


def fewest_micro_batches(bytes_of: Callable[[int], int], prompts: int, budget: int) -> int:
    """The smallest number of micro-batches, a divisor of `prompts`, for which `bytes_of(number)` is within the budget.

    Raises:
      ValueError: if not even one prompt at a time fits.
    """
    for parts in (n for n in range(1, prompts + 1) if prompts % n == 0):
        if (needed := bytes_of(parts)) <= budget:
            return parts
    raise ValueError(f"one prompt at a time takes {gib(needed)}, more than the {gib(budget)} that there are")


def fit(
    updates: Updates,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    sampler: PolicySampler,
    *,
    prompts: int,
    budget: int,
    **settings: Any,
) -> Updates:
    """The same updates in the fewest micro-batches with which a step is within the budget.

    Args:
      updates: of the step.
      policy: as in `plan`, like all that follow.
      optimizer: as in `plan`.
      sampler: as in `plan`.
      prompts: `B`.
      budget: bytes of the device.
      settings: as in `plan`.

    Raises:
      ValueError: if not even one prompt at a time fits.
    """

    def peak(micro_batches: int) -> int:
        parts = dataclasses.replace(updates, micro_batches=micro_batches)
        return plan(policy, optimizer, sampler, prompts=prompts, updates=parts, **settings).peak

    micro_batches = fewest_micro_batches(peak, prompts // updates.minibatches, budget)
    print(f"micro-batches with which a step fits into {gib(budget)}: {micro_batches}")
    return dataclasses.replace(updates, micro_batches=micro_batches)


def largest_batch(bytes_of: Callable[[int], int], budget: int, limit: int = 4096) -> int:
    """The largest number of prompts, up to a limit, for which `bytes_of(number)` is within the budget; 0 if none is."""
    low, high = 0, 1
    while high <= limit and bytes_of(high) <= budget:
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= budget else (low, middle)
    return low


def gib(number: float) -> str:
    """Bytes in GiB, or in MiB under one."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def table(found: Plan) -> str:
    """A line an item; what lies within another is set in."""
    of_sampling, of_learning = ("cast", "prompt_cache", "completion_cache"), ("gradients", "logits", "activations")
    names = ["parameters", "frozen", "optimizer", "reference", "sampling"]
    names += [*(f"  {name}" for name in of_sampling), "learning", *(f"  {name}" for name in of_learning)]
    lines = [f"{name:<20}{gib(getattr(found, name.strip())):>12}" for name in names]
    return "\n".join([*lines, f"{'peak of a step':<20}{gib(found.peak):>12}"])


def _hidden(policy: Policy, params: Any, batch: Prompts) -> Any:
    """The shape of hidden states of one token of one completion."""
    one = jax.ShapeDtypeStruct((batch.tokens.shape[0], 1, 1), jnp.int32)
    cache = jax.eval_shape(policy.prefill, params, batch.tokens, batch.lengths)
    return jax.eval_shape(lambda *x: policy.extend(*x)[0], params, one, one, cache)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is planned."""

    model: str  # a folder or a repository; its configuration is read
    prompts: int = 8  # B, of a step
    group_size: int = 8  # G
    prompt_tokens: int = 512  # P
    max_tokens: int = 512  # T
    micro_batches: int = 1
    beta: float = 0.0  # above 0, a reference policy is kept
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool = True
    lora_rank: int | None = None  # of adapters, over a base in the compute dtype
    lora_targets: tuple[str, ...] | None = None  # all linear layers if not given
    quantize: quantized.Kind | None = None  # the base under adapters
    device_gib: float | None = None  # of the device: says how many prompts fit, and in how many micro-batches


def main(config: Config) -> Plan:
    """Prints and returns the plan."""
    hf_config = transformers.AutoConfig.from_pretrained(config.model, trust_remote_code=False)
    weights = WeightSettings(
        lora_rank=config.lora_rank, lora_targets=config.lora_targets, quantize=config.quantize
    )  # fmt: skip
    dtype = jnp.dtype(config.compute_dtype)
    settings = {"dtype": dtype, "param_dtype": weights.param_dtype(dtype), "remat": config.remat}
    policy = models.decoder(models.from_hf_config(hf_config, **settings))
    params, frozen = weights.shapes(policy)
    loss = losses.grpo(penalty=losses.k3(config.beta)) if config.beta else losses.grpo()

    @functools.cache
    def planned(prompts: int, micro_batches: int) -> Plan:
        return plan(
            policy,
            optax.adamw(1e-6),
            sampling.sampler(group_size=config.group_size, max_tokens=config.max_tokens, eos_ids=()),
            loss=loss,
            prompts=prompts,
            prompt_tokens=config.prompt_tokens,
            reference=config.beta > 0,
            params=params,
            frozen=frozen,
            updates=Updates(micro_batches=micro_batches),
        )

    found = planned(config.prompts, config.micro_batches)
    print(f"{config.prompts} prompts x {config.group_size}, {config.prompt_tokens} + {config.max_tokens} tokens, "
          f"{config.compute_dtype}, on {jax.default_backend()}\n{table(found)}")  # fmt: skip
    if config.device_gib is not None:
        if jax.default_backend() == "cpu":
            print("planned on a CPU: for another device, run this there")
        budget = int(config.device_gib * 2**30)
        largest = largest_batch(lambda prompts: planned(prompts, 1).peak, budget)
        print(f"prompts that fit into {gib(budget)} in one piece: {largest}")
        try:
            parts = fewest_micro_batches(lambda parts: planned(config.prompts, parts).peak, config.prompts, budget)
            print(f"micro-batches in which {config.prompts} prompts fit: {parts}")
        except ValueError as reason:
            print(f"{config.prompts} prompts do not fit: {reason}")
    return found


if __name__ == "__main__":
    command(main, Config, __doc__)
