"""What test_sharding.py runs in a process of its own, as the number of devices is settled when JAX starts.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/models/on_eight_devices.py step data=2,fsdp=4 \
  packed data=2,fsdp=4
"""

import dataclasses
import functools
import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import losses, models, packing, processes, sampling, testing
from grpo_jax.models import attention, lora, quantized, sharding
from grpo_jax.models.attention import KeyValues, MaskInputs
from grpo_jax.run import chips, memory
from grpo_jax.train_step import make_train_step
from grpo_jax.updates import Updates, init_state

SAMPLER = sampling.sampler(group_size=4, max_tokens=6, eos_ids=range(16))  # a quarter of the tokens


def reward(rollout):
    rewards = jnp.mean(rollout.tokens % 2, axis=-1, dtype=jnp.float32)[..., None]
    return rewards, jnp.ones(rewards.shape, bool)


def stepped(mesh, *, sampler=SAMPLER, B=4, parts=2, rank=None, kind=None, packed=False, beta=0.1):
    """A state, the one after a step from it, and the tokens drawn."""
    optimizer, prompts = optax.sgd(1.0), testing.random_prompts(0, B, 6)
    config = testing.tiny_policy("qwen3", vocab_size=64, tie_word_embeddings=B == 4).config
    params, frozen = jax.jit(models.decoder(config).init)(jax.random.key(0)), None
    policy = models.decoder(dataclasses.replace(config, mesh=mesh))
    if rank is not None:
        params = params if kind is None else quantized.quantize(params, kind)
        params, frozen = lora.adapt(policy, params, rank=rank, key=jax.random.key(2))
        params = jax.tree.map(lambda x: x + 0.1, params)  # else lora_a has no gradient
    state = init_state(params, optimizer, jax.random.key(1), frozen=frozen, reference=beta is not None)
    if mesh is not None:
        state, prompts = sharding.place(mesh, state), sharding.batch(mesh, prompts)
    loss, updates = losses.grpo(penalty=None if beta is None else losses.k3(beta)), Updates(micro_batches=parts)
    step = make_train_step(policy, optimizer, sampler, loss=loss, reward=reward, updates=updates)
    experience = jax.jit(step.collect)(state, prompts)
    if packed:
        experience = experience._replace(packing=packing.pack(experience.rollout, multiple=2))
        assert experience.packing is not None
    after, _ = jax.jit(step.learn)(state, experience)
    return state, after, experience.rollout.tokens


@functools.cache
def on_one(**settings):
    """What several meshes are compared with."""
    return stepped(None, **settings)


def step(axes, **settings):
    """By one process, or by several, of which the first compares."""
    mesh = sharding.parse(axes)
    state, after, drawn = stepped(mesh, **settings)
    state, after = (s._replace(key=None) for s in (state, after))
    divided = 0
    for (path, a), was in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(state), strict=True):
        name = jax.tree_util.keystr(path)
        assert a.sharding.is_equivalent_to(was.sharding, a.ndim), (name, a.sharding, was.sharding)
        divided += not a.sharding.is_fully_replicated
    assert divided > 5
    state, after, drawn = processes.whole((state, after, drawn))
    if not processes.is_first():
        return
    _, expected, tokens = on_one(**settings)
    np.testing.assert_array_equal(drawn, tokens)
    moved = 0.0
    expected = jax.tree_util.tree_leaves_with_path(expected._replace(key=None))
    for (path, b), a, was in zip(expected, jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=0, atol=3e-6, err_msg=jax.tree_util.keystr(path))
            moved = max(moved, np.max(np.abs(a - was)))
    assert moved > 1e-2


def sent(axes):
    """What `learn` sends over `fsdp`: each weight is gathered once in each pass, and nothing else; nothing to all.

    A pass is one of prompts and completions together.
    """
    mesh = sharding.parse(axes)
    config = testing.tiny_policy("qwen3", vocab_size=512, tie_word_embeddings=True).config  # sums of fewer are padded
    policy, optimizer = models.decoder(dataclasses.replace(config, mesh=mesh)), optax.sgd(1.0)
    loss, updates = losses.grpo(penalty=losses.k3(0.1)), Updates(micro_batches=2)
    made = make_train_step(policy, optimizer, SAMPLER, loss=loss, updates=updates)
    init = functools.partial(init_state, optimizer=optimizer, reference=True)
    state = jax.eval_shape(lambda key: init(policy.init(key), key=key), jax.random.key(0))
    prompts = testing.random_prompts(0, 16, 6)
    _, learn, _ = memory.traced(made, state, jax.eval_shape(lambda: prompts), mesh=mesh)
    found = chips.collectives(learn.lower().compile())

    def received(tree):
        parts = zip(jax.tree.leaves(tree), jax.tree.leaves(sharding.shardings(mesh, tree)), strict=True)
        divided = sum(x.size * x.dtype.itemsize for x, where in parts if "fsdp" in where.spec)
        return divided * (1 - 1 / mesh.shape["fsdp"])

    layers, ends = received({"layers": state.params["layers"]}), received({**state.params, "layers": {}})
    passes = 2 * (1 + 2)  # micro-batches; the reference, forward and the recomputation
    assert found.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}, found
    assert found["all-gather"][1] == passes * layers + 2 * 2 * ends, (found, layers, ends)
    # A CPU's program has whole sums of layers in place of scattered ones; the recomputation has no gradient. The tied
    # table has two gradients, scattered and then summed over `data`: a half of a fourth, from each of two.
    summed = found["all-reduce"][1] + found["reduce-scatter"][1]
    assert found["reduce-scatter"][1] == 2 * 2 * ends, (found, layers, ends)
    assert summed < 2 * (2.5 * layers + 2 * (1 + 1 / 3) * ends) * 1.01, (found, layers, ends)


def attentions(axes):
    """Values and gradients of each attention, with fewer key-value heads than devices of `tensor`."""
    mesh = sharding.parse(axes)
    rng = np.random.default_rng(0)
    B, G, S, P, N, K, h = 2, 2, 5, 3, 8, 2, 8

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    arrays = random(B, G, S, N, h), *(KeyValues(random(*x, K, h), random(*x, K, h)) for x in ((B, G, S), (B, P)))
    positions = jnp.broadcast_to(jnp.arange(S), (B, G, S)) + jnp.array([1, 2])[:, None, None]
    masks = MaskInputs(positions, positions, jnp.broadcast_to(jnp.array([[1], [2]]), (B, G)))
    weights = random(B, G, S, N, h)
    splash = attention.from_causal_kernel(functools.partial(attention.splash_kernel, interpret=True))
    windowed = masks._replace(window=jnp.int32(2), segments=jnp.broadcast_to(jnp.array([0, 0, 1, 1, 1]), (B, G, S)))
    for name, f, seen in (
        ("reference", attention.reference, masks),
        ("auto", attention.auto, windowed),  # on CPUs blockwise
        ("splash", splash, masks),
    ):

        def value(f, *arrays, seen=seen):
            out = f(*arrays, seen)
            return jnp.sum(out * weights), out

        a, b = (
            jax.jit(jax.grad(functools.partial(value, attention.over_mesh(f, on)), argnums=(0, 1, 2), has_aux=True))(
                *arrays
            )
            for on in (None, mesh)
        )
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert np.max(np.abs(x)) > 0.1
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-5, err_msg=name)


def experts_and_sinks(axes, B=4):
    """Logits of gpt-oss and their gradient, with experts and biases of experts in parts."""
    mesh = sharding.parse(axes)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "vocab_size": 64}
    config = testing.tiny_policy("gpt_oss", **sizes).config
    params = jax.jit(models.decoder(config).init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05, params)  # else biases are 0
    tokens = jax.random.randint(jax.random.key(1), (B, 6), 2, 60)
    completions = jax.random.randint(jax.random.key(2), (B, 2, 5), 2, 60)

    def value(policy, params, tokens, completions):
        positions = jnp.broadcast_to(5 + jnp.arange(5), completions.shape)
        hidden, _ = policy.forward(params, tokens, jnp.full(B, 6), completions, positions)
        return jnp.mean(jnp.sin(policy.unembed(params, hidden)))

    found = []
    for on in (None, mesh):
        policy = models.decoder(dataclasses.replace(config, mesh=on))
        given = params, tokens, completions
        if on is not None:
            given = sharding.place(mesh, params), *sharding.batch(mesh, (tokens, completions))
            assert given[0]["layers"]["mlp"]["experts_up"]["kernel"].sharding.spec[1:3] == ("tensor", "fsdp")
        found.append(jax.jit(jax.value_and_grad(functools.partial(value, policy)))(*given))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.max(np.abs(x)) > 1e-5
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.max(np.abs(x))))


CASES = {
    "experts and sinks": experts_and_sinks,
    "experts, prompts that do not divide": functools.partial(experts_and_sinks, B=2),
    "step": step,
    "sent": sent,
    "one prompt": functools.partial(step, B=1, parts=1),
    "adapters over codes": functools.partial(step, rank=2, kind="nf4"),
    "slots": functools.partial(step, sampler=dataclasses.replace(SAMPLER, slots=8)),
    "packed": functools.partial(step, packed=True),
    "attentions": attentions,
}

if __name__ == "__main__":
    gc.disable()  # a twelfth of the time, and it ends soon
    for case, axes in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(case, axes, flush=True)
        CASES[case](axes)
