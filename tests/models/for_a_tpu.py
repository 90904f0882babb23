"""What test_tpu.py runs in a process of its own: a step compiled for TPUs that are not there.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/models/for_a_tpu.py fsdp=2,tensor=2
"""

import sys

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from grpo_jax import losses, models, sampling, testing
from grpo_jax.models import attention, sharding
from grpo_jax.run import chips, memory
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Prompts
from grpo_jax.updates import init_state

B, G, P, T = 4, 2, 32, 96
HEAD = 128
WIDE, NARROW = 4096, 1024  # the weights of the narrow one stay on a chip while it decodes; it compiles in half the time


def traced(axes, width):
    """`collect` and `learn` for chips of a v5p, their mesh, and the shapes of the parameters."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = sharding.parse(axes, devices=devices if "=1" not in axes else devices[:1])
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": 2 * width + 256}
    config = testing.tiny_hf_config("llama", **sizes, num_attention_heads=8, head_dim=HEAD)
    settings = {"dtype": jnp.bfloat16, "attention": attention.splash, "mesh": mesh}
    policy, optimizer = models.decoder(models.from_hf_config(config, **settings)), optax.sgd(0.1)
    sampler = sampling.sampler(group_size=G, max_tokens=T, eos_ids=(0,))
    step = make_train_step(policy, optimizer, sampler, loss=losses.grpo())
    state = jax.eval_shape(lambda key: init_state(policy.init(key), optimizer, key), jax.random.key(0))
    prompts = Prompts(jax.ShapeDtypeStruct((B, P), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32))
    collect, learn, _ = memory.traced(step, state, prompts, mesh=mesh)
    return collect, learn, mesh, state.params


if __name__ == "__main__":
    collect, _, mesh, params = traced(sys.argv[1], WIDE)
    collect = collect.lower().compile()
    assert "tpu_custom_call" in collect.as_text()
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]

    def matrices(params):
        return sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)

    # A token reads weights and caches, in bfloat16, and little else; some stay on the chip for all tokens.
    caches = 2 * 2 * B * (P - 1 + G * T) * 2 * HEAD / fsdp  # keys and values of two layers and two heads
    least = 2 * (matrices(params) + params["lm_head"].size + caches) / tensor
    found = chips.bytes_of_a_turn(collect, T)
    assert 0.7 * least < found < 1.3 * least, (found, least)

    # Layers are gathered forward and in the recomputation, their ends once, and gradients are summed into their parts:
    # of each matrix, in bfloat16, and what `tensor` divides stays so.
    _, learn, _, params = traced(sys.argv[1], NARROW)
    learn = learn.lower().compile()
    assert "tpu_custom_call" in learn.as_text()
    ends = params["embed_tokens"]["embedding"].size + params["lm_head"].size
    columns = params["lm_head"].shape[1] // tensor  # no multiple of 512, as of Qwen2.5-0.5B
    parts = 2 / tensor * (1 - 1 / fsdp)
    sent = {kind: received for kind, (_, received) in chips.collectives(learn).items()}
    padded = -(-columns // 512) * 512 / columns
    assert abs(sent.get("reduce-scatter", 0.0) - parts * (matrices(params) + padded * ends)) < 1e5, (sent, parts, ends)
    assert sent.get("all-gather", 0.0) <= 1.05 * parts * (2 * matrices(params) + ends), (sent, parts, ends)
