"""How much memory a step takes, before it is run.

    python -m grpo_jax.run.memory --model Qwen/Qwen2.5-0.5B --group-size 16 --prompts-per-step 32 --device-gib 80
    python -m grpo_jax.run.memory --model Qwen/Qwen2.5-7B --lora-rank 16 --quantize nf4 --device-gib 24
    python -m grpo_jax.run.memory --model Qwen/Qwen2.5-0.5B --teacher Qwen/Qwen2.5-7B --quantize-teacher int8
    python -m grpo_jax.run.memory --model Qwen/Qwen2.5-7B --topology v5p:2x2x1 --mesh fsdp=4 --attention splash

Nothing is allocated: sizes of what is kept come from `jax.eval_shape`, and those of what a step needs
beside it from the compiled programs of `collect` and `learn`. They are of the backend that this runs on: a plan for a
GPU is made on one, since another backend fuses otherwise and, by default, computes attention otherwise. Only the
model's configuration is read, not its weights.

With `--topology` the programs are those of TPUs that need not be there, and the plan says what they ask of each chip:
its memory, matrix products, what is sent, and the least time that these take (`run.chips`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Compiled, Traced

from grpo_jax import losses, models, sampling
from grpo_jax.compiler_options import saving_memory
from grpo_jax.freezing import bind
from grpo_jax.models import quantized, sharding
from grpo_jax.models.hf.folders import CONFIG, local_folder, read_config
from grpo_jax.models.settings import WeightSettings
from grpo_jax.policies import Policy
from grpo_jax.protocols import Loss
from grpo_jax.run import chips, command
from grpo_jax.run.names import resolve
from grpo_jax.sampling import PolicySampler
from grpo_jax.scoring import CHUNK_TOKENS, Teacher
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.types import Experience, Params, Prompts, TrainState
from grpo_jax.updates import Updates, init_state


class Plan(NamedTuple):
    """Bytes of a step, on each device.

    The first four are there all the time; moments, reference and gradients are of what is trained alone. `sampling` and
    `learning` are what those programs hold at their worst beside them, rollout included; the others say what is in
    those two.
    """

    parameters: int  # what is trained
    frozen: int  # and what is not; 0 without adapters
    optimizer: int
    reference: int  # or a teacher; 0 without one
    cast: int  # in sampling: copies of the parameters, trained or frozen, that are not in the compute dtype
    weights: int  # in sampling: what each step of decoding reads of the parameters, of those copies and of the others
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


def plan(policy: Policy, optimizer: optax.GradientTransformation, sampler: PolicySampler, **settings: Any) -> Plan:
    """The memory of one step; see `planned`."""
    return planned(policy, optimizer, sampler, **settings).plan


def planned(
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
    teacher: Teacher | None = None,
    teacher_params: Params | None = None,
) -> "Planned":
    """The memory of one step of `prompts * sampler.group_size` completions, by device of the policy's mesh.

    Without a mesh it is of the default backend.

    `learn` is taken to donate its state and to be compiled with `compiler_options.saving_memory()`, as by
    `step.jit()`.

    Args:
      policy: the network; its compute dtype, attention, rematerialisation and mesh count. The devices of a mesh need
        not be there.
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
      teacher: of distillation, in place of a reference; its divergence is a part of learning.
      teacher_params: its parameters, or their shapes; None for those of its `init`.
    """
    array: Callable[..., Any] = jax.ShapeDtypeStruct
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(policy.init, key) if params is None else jax.eval_shape(lambda: params)
    init = functools.partial(init_state, optimizer=optimizer, reference=reference)
    state = jax.eval_shape(lambda params, frozen, key: init(params, frozen=frozen, key=key), params, frozen, key)
    if teacher is not None:
        make = teacher.policy.init
        theirs = jax.eval_shape(make, key) if teacher_params is None else jax.eval_shape(lambda: teacher_params)
        state = state._replace(ref_params=theirs)
    batch = Prompts(array((prompts, prompt_tokens), jnp.int32), array((prompts,), jnp.int32))
    step = make_train_step(policy, optimizer, sampler, loss=loss, updates=updates, score_old=score_old, teacher=teacher)
    mesh: Mesh | None = getattr(policy.config, "mesh", None)
    # The programs of chips that are not there know nothing of a CPU's options.
    options: dict[str, str | bool] | None = None if mesh is None or mesh.devices.flat[0].platform == "cpu" else {}
    found = compiled(step, state, batch, mesh=mesh, compiler_options=options)
    return Planned(_items(policy, sampler, state, batch, updates, found), found)


def _items(
    policy: Policy, sampler: PolicySampler, state: TrainState, batch: Prompts, updates: Updates, found: "Programs"
) -> Plan:
    group_size, max_tokens, prompts = sampler.group_size, sampler.max_tokens, batch.tokens.shape[0]
    mesh: Mesh | None = getattr(policy.config, "mesh", None)
    whole = bind(state.params, state.frozen)
    before, cast = whole, jax.eval_shape(policy.cast, whole)
    rows, V = prompts // updates.parts, jax.eval_shape(policy.unembed, whole, _hidden(policy, whole, batch)).shape[-1]
    of_prompts = of_completions = of_rows = of_vocabulary = 1  # how many devices share them
    if mesh is not None:
        state = placed(state, sharding.shardings(mesh, state))
        before = placed(before, sharding.shardings(mesh, before))
        cast = placed(cast, sharding.gathered_shardings(mesh, cast))
        tensor = mesh.shape["tensor"]
        of_heads = tensor if policy.config.num_kv_heads % tensor == 0 else 1
        of_prompts = of_heads * sharding.row_parts(mesh, prompts)
        of_completions = of_heads * sharding.row_parts(mesh, prompts, group_size)
        of_rows = sharding.row_parts(mesh, rows, group_size)
        of_vocabulary = tensor if V % tensor == 0 else 1
    of_params, (sampling, learning) = size(state.params), bytes_of(found)
    rows = rows * group_size // of_rows
    width = min(max_tokens, max(1, CHUNK_TOKENS // rows))
    logits = 2 * rows * width * (V // of_vocabulary) * 4
    decoded = (prompts, group_size) if sampler.slots is None else (min(sampler.slots, prompts * group_size), 1)
    completion_cache = jax.eval_shape(functools.partial(policy.init_cache, *decoded, max_tokens))
    return Plan(
        parameters=of_params,
        frozen=size(state.frozen),
        optimizer=size(state.opt_state),
        reference=size(state.ref_params),
        cast=sum(
            size(new)
            for old, new in zip(*map(jax.tree.leaves, (before, cast)), strict=True)
            if new.dtype != old.dtype or size(new) != size(old)
        ),
        weights=size(_products(cast)),
        sampling=sampling,
        learning=learning,
        prompt_cache=size(jax.eval_shape(policy.prefill, whole, *batch[:2])) // of_prompts,
        completion_cache=size(completion_cache) // of_completions,
        gradients=of_params,
        logits=logits,
        activations=max(0, learning - of_params - logits),
    )


class Programs(NamedTuple):
    """The programs of a step, compiled."""

    collect: Compiled
    learn: Compiled
    experience: Experience  # the shapes of what `learn` reads
    jaxprs: tuple[Any, Any]  # of both, before they were compiled


class Planned(NamedTuple):
    """A plan, and the programs that it was read from."""

    plan: Plan
    programs: Programs


def programs(
    step: Step, state: Any, prompts: Prompts, *, compiler_options: Mapping[str, str | bool] | None = None
) -> tuple[int, int]:
    """Bytes that the programs of sampling and of learning hold at their worst beside the state; see `compiled`."""
    return bytes_of(compiled(step, state, prompts, compiler_options=compiler_options))


def bytes_of(found: Programs) -> tuple[int, int]:
    """Bytes that the programs of sampling and of learning hold at their worst beside the state; of one device."""
    return held(found.collect), held(found.learn) + size(found.experience)


def compiled(
    step: Step,
    state: Any,
    prompts: Prompts,
    *,
    mesh: Mesh | None = None,
    compiler_options: Mapping[str, str | bool] | None = None,
) -> Programs:
    """The programs of a step.

    Args:
      step: as in `traced`.
      state: as in `traced`.
      prompts: as in `traced`.
      mesh: as in `traced`.
      compiler_options: as of `Step.jit`; as there, learning donates the state.
    """
    collect, learn, experience = traced(step, state, prompts, mesh=mesh)
    options: dict[str, Any] = dict(saving_memory() if compiler_options is None else compiler_options)
    jaxprs = collect.jaxpr, learn.jaxpr
    return Programs(collect.lower().compile(), learn.lower().compile(compiler_options=options), experience, jaxprs)


def traced(step: Step, state: Any, prompts: Prompts, *, mesh: Mesh | None = None) -> tuple[Traced, Traced, Experience]:
    """The programs of sampling and of learning, before they are compiled, and the shapes of what the second one reads.

    Args:
      step: without a reward; one reward of each completion is put in between its halves.
      state: its shapes, from `jax.eval_shape`, or a state.
      prompts: theirs.
      mesh: of the step's policy; its devices need not be there.
    """
    if mesh is not None:
        state = placed(state, sharding.shardings(mesh, state))
        prompts = placed(prompts, sharding.batch_shardings(mesh, prompts))
    experience: Experience = jax.eval_shape(step.collect, state, prompts)
    shape = (*experience.rollout.tokens.shape[:2], 1)
    rewards, reward_mask = jax.eval_shape(lambda: (jnp.zeros(shape), jnp.zeros(shape, bool)))
    experience = experience._replace(rewards=rewards, reward_mask=reward_mask)
    if mesh is not None:
        experience = placed(experience, sharding.batch_shardings(mesh, experience))
    learn = jax.jit(step.learn, donate_argnums=0)
    return jax.jit(step.collect).trace(state, prompts), learn.trace(state, experience), experience


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree, where its arrays will lie."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def beside(program: Any, *arguments: Any) -> int:
    """Bytes that a jitted program holds at its worst beside its arguments; donated ones are written over."""
    return held(program.lower(*arguments).compile())


def held(program: Compiled) -> int:
    """`beside` of a program that is compiled; of one device."""
    found: Any = program.memory_analysis()
    return int(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes)


def size(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device; two codes of 4 bits take one."""
    return sum(math.prod(_part(leaf)) * bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(tree))


def _part(leaf: Any) -> tuple[int, ...]:
    where = getattr(leaf, "sharding", None)
    return leaf.shape if where is None else where.shard_shape(leaf.shape)


def bits(dtype: Any) -> int:
    """Of a number on a device."""
    return 4 if dtype in (jnp.int4, jnp.uint4) else 8 * dtype.itemsize


def fewest_micro_batches(
    bytes_of: Callable[[int], int], prompts: int, budget: int, *, mesh: Mesh | None = None, group_size: int = 1
) -> int:
    """The smallest number of micro-batches, a divisor of `prompts`, for which `bytes_of(number)` is within the budget.

    Args:
      bytes_of: of a number of micro-batches.
      prompts: `B`.
      budget: bytes of the device.
      mesh: over which the rows of a micro-batch are to divide, or devices would compute what others do.
      group_size: `G`.

    Raises:
      ValueError: if not even the smallest micro-batches fit, of one prompt at a time without a mesh; as
        `sharding.check_rows` for the whole batch.
    """
    if mesh is not None:
        sharding.check_rows(mesh, prompts, group_size)
    for parts in (n for n in range(1, prompts + 1) if prompts % n == 0):
        if mesh is not None and not sharding.rows_divide(mesh, prompts // parts, group_size):
            continue
        at_a_time, needed = prompts // parts, bytes_of(parts)
        if needed <= budget:
            return parts
    few = "one prompt at a time takes" if at_a_time == 1 else f"{at_a_time} prompts at a time, one a device, take"
    raise ValueError(f"{few} {gib(needed)}, more than the {gib(budget)} that there are")


def fit(
    updates: Updates,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    sampler: PolicySampler,
    *,
    prompts: int,
    budget: int,
    packed: bool = False,
    **settings: Any,
) -> Updates:
    """The same updates in the fewest micro-batches with which a step is within the budget.

    Args:
      updates: of the step.
      policy: as in `planned`, like all that follow.
      optimizer: as in `planned`.
      sampler: as in `planned`.
      prompts: `B`.
      budget: bytes of the device.
      packed: whether groups are laid into few rows, so that over a mesh prompts alone are divided.
      settings: as in `planned`.

    Raises:
      ValueError: as `fewest_micro_batches`.
    """

    def peak(micro_batches: int) -> int:
        parts = dataclasses.replace(updates, micro_batches=micro_batches)
        return plan(policy, optimizer, sampler, prompts=prompts, updates=parts, **settings).peak

    mesh, size_of_group = getattr(policy.config, "mesh", None), 1 if packed else sampler.group_size
    micro_batches = fewest_micro_batches(
        peak, prompts // updates.minibatches, budget, mesh=mesh, group_size=size_of_group
    )
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


def _products(params: Any) -> Any:
    """Without an embedding that is not the head as well: a few rows of it are looked up."""
    untied = isinstance(params, dict) and "lm_head" in params
    return {name: x for name, x in params.items() if name != "embed_tokens"} if untied else params


def _hidden(policy: Policy, params: Any, batch: Prompts) -> Any:
    """The shape of hidden states of one token of one completion."""
    one = jax.ShapeDtypeStruct((batch.tokens.shape[0], 1, 1), jnp.int32)
    cache = jax.eval_shape(policy.prefill, params, batch.tokens, batch.lengths)
    return jax.eval_shape(lambda *x: policy.extend(*x)[0], params, one, one, cache)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is planned."""

    model: str  # a folder or a repository; its configuration is read
    prompts_per_step: int = 8  # B
    group_size: int = 8  # G
    max_prompt_tokens: int = 512  # P
    max_tokens: int = 512  # T
    slots: int | None = None  # completions decoded at a time (continuous batching); all together if not given
    micro_batches: int = 1
    beta: float = 0.0  # above 0, a reference policy is kept
    teacher: str | None = None  # of distillation, a folder or a repository
    quantize_teacher: quantized.Kind | None = None
    divergence: str = "reverse_kl"  # from the teacher, of grpo_jax.losses
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    remat: bool = True
    lora_rank: int | None = None  # of adapters, over a base in the compute dtype
    lora_targets: tuple[str, ...] | None = None  # all linear layers if not given
    quantize: quantized.Kind | None = None  # the base under adapters
    attention: str = "auto"  # of grpo_jax.models.attention, or module:function
    mesh: str | None = None  # of several devices, such as data=2,fsdp=4
    topology: str | None = None  # of TPUs, such as v5p:2x2x1; the mesh takes its first chips, one if not given
    device_gib: float | None = None  # of the device: says how many prompts fit, and in how many micro-batches


def main(config: Config) -> Plan:
    """Prints and returns the plan.

    Raises:
      ValueError: for prompts and completions that do not divide over the mesh, or slots beside a topology; as
        `of_config`.
    """
    if config.slots is not None and config.topology is not None:
        raise ValueError(f"how long --slots {config.slots} take depends on lengths: leave them out beside --topology")
    if (mesh := mesh_of(config)) is not None:
        sharding.check_rows(mesh, config.prompts_per_step // config.micro_batches, config.group_size)
        if config.slots is not None:
            sharding.check_slots(mesh, min(config.slots, config.prompts_per_step * config.group_size))
    where = jax.default_backend() if config.topology is None else f"each chip of {config.topology}"
    made = functools.cache(of_config)
    found, compiled = made(config)
    print(f"{config.prompts_per_step} prompts x {config.group_size}, {config.max_prompt_tokens} + {config.max_tokens} "
          f"tokens, {config.compute_dtype}, on {where}\n{table(found)}")  # fmt: skip
    if config.topology is not None:
        chip = chips.CHIPS[config.topology.partition(":")[0]]
        for name, need in zip(("collect", "learn"), needs(found, compiled, config), strict=True):
            print(chips.table(name, need, chip))
        caches = found.prompt_cache + found.completion_cache
        print(f"a token of decoding reads and writes {gib(of_a_token(compiled, config))} in all")
        print(f"  weights and caches are {gib(found.weights + caches)}")
        if found.peak > chip.memory:
            raise ValueError(f"{_remedy(config)}: it takes {gib(found.peak)} of the {gib(chip.memory)} of a chip")
    if config.device_gib is not None:
        if jax.default_backend() == "cpu" and config.topology is None:
            print("planned on a CPU: for another device, run this there")

        def peak(prompts: int, micro_batches: int) -> int:
            return made(dataclasses.replace(config, prompts_per_step=prompts, micro_batches=micro_batches)).plan.peak

        budget = int(config.device_gib * 2**30)
        prompts = config.prompts_per_step
        unit = next(n for n in itertools.count(1) if mesh is None or sharding.rows_divide(mesh, n, config.group_size))
        largest = unit * largest_batch(lambda units: peak(units * unit, 1), budget)
        print(f"prompts that fit into {gib(budget)} in one piece: {largest}")
        try:
            parts = fewest_micro_batches(
                lambda parts: peak(prompts, parts), prompts, budget, mesh=mesh, group_size=config.group_size
            )
            print(f"micro-batches in which {prompts} prompts fit: {parts}")
        except ValueError as reason:
            print(f"{prompts} prompts do not fit: {reason}")
    return found


def of_config(config: Config) -> Planned:
    """The plan of what a command is told, and its programs.

    Raises:
      ValueError: if they do not fit into a chip, where its compiler says so; with what to change.
    """
    hf_config = read_config(local_folder(config.model, None, [CONFIG]))
    weights = WeightSettings(
        lora_rank=config.lora_rank, lora_targets=config.lora_targets, quantize=config.quantize
    )  # fmt: skip
    dtype = jnp.dtype(config.compute_dtype)
    attention = resolve(config.attention, "grpo_jax.models.attention")
    settings: dict[str, Any] = {"dtype": dtype, "param_dtype": weights.param_dtype(dtype), "remat": config.remat}
    settings |= {"attention": attention, "mesh": mesh_of(config)}
    policy = models.decoder(models.from_hf_config(hf_config, **settings))
    params, frozen = weights.shapes(policy)
    loss = losses.grpo(penalty=losses.k3(config.beta)) if config.beta else losses.grpo()
    teacher, teacher_params = None, None
    if config.teacher is not None:
        if config.beta:
            raise ValueError(f"a teacher is in the place of the reference: leave out --beta {config.beta}")
        loss = losses.distill()
        theirs = read_config(local_folder(config.teacher, None, [CONFIG]))
        network = models.decoder(models.from_hf_config(theirs, **settings | {"param_dtype": dtype}))
        teacher = Teacher(network, resolve(config.divergence, "grpo_jax.losses"))
        teacher_params = jax.eval_shape(functools.partial(_made, network, config.quantize_teacher))
    try:
        return planned(
            policy,
            optax.adamw(1e-6),
            dataclasses.replace(
                sampling.sampler(group_size=config.group_size, max_tokens=config.max_tokens, eos_ids=()),
                slots=config.slots,
            ),
            loss=loss,
            prompts=config.prompts_per_step,
            prompt_tokens=config.max_prompt_tokens,
            reference=config.beta > 0,
            params=params,
            frozen=frozen,
            updates=Updates(micro_batches=config.micro_batches),
            teacher=teacher,
            teacher_params=teacher_params,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"{_remedy(config)}\n  {str(error).splitlines()[0]}") from error


def mesh_of(config: Config) -> Mesh | None:
    """The mesh that a command is told; without one, the first chip of a topology, or None."""
    if config.topology is None and config.mesh is None:
        return None
    axes = sharding.sizes(config.mesh or "fsdp=1")
    devices = None if config.topology is None else chips.devices(config.topology, math.prod(axes.values()))
    return sharding.mesh(**axes, devices=devices)


def _made(network: Policy, kind: quantized.Kind | None) -> Params:
    params = network.init(jax.random.key(0))
    return params if kind is None else quantized.quantize(params, kind)


def needs(plan: Plan, programs: Programs, config: Config) -> tuple[chips.Need, chips.Need]:
    """What both programs ask of each chip.

    Of memory, the least: in sampling the weights and half of the caches for each token; in learning the weights
    forward, in the recomputation and backward, with a reference once more, for each micro-batch, and the state read
    and written.
    """
    mesh = mesh_of(config)
    devices = 1 if mesh is None else mesh.size
    products = [chips.flops(jaxpr.jaxpr, turns=config.max_tokens) / devices for jaxpr in programs.jaxprs]
    decoding = config.max_tokens * (plan.weights + plan.prompt_cache + plan.completion_cache / 2)
    passes = config.micro_batches * (3 + (plan.reference > 0))
    learning = passes * plan.weights + 2 * (plan.parameters + plan.optimizer + plan.gradients)
    return (
        chips.Need(products[0], decoding, chips.collectives(programs.collect)),
        chips.Need(products[1], learning, chips.collectives(programs.learn)),
    )


def of_a_token(programs: Programs, config: Config) -> float:
    """Bytes that a chip reads and writes for each token that it decodes, with caches at their full width.

    As the program has it, beside which `needs` counts what it cannot do without. A TPU multiplies a head in float32 as
    one in bfloat16, and may read it so: half of what a plan says of it.
    """
    return chips.bytes_of_a_turn(programs.collect, config.max_tokens)


def _remedy(config: Config) -> str:
    return (
        f"{config.prompts_per_step} prompts in {config.micro_batches} micro-batches over {config.mesh or 'one device'} "
        "do not fit: take more micro-batches, more of fsdp (weights and state) or of tensor (the copy for sampling), "
        "shorter completions, or adapters (--lora-rank 16)"
    )


if __name__ == "__main__":
    command(main, Config, __doc__)
